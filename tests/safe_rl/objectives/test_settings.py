"""What may be set on an objective once it is made, and what is refused."""

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close

from safe_ops import clipped_policy_terms, kl_surrogate, kl_surrogate_token, value_terms
from safe_rl import ClippedPolicyLoss, GatedKLLoss, PPOLoss, SAFELoss, SoftMinValueLoss
from safe_rl.objectives.composite import SumOfObjectives
from tests.safe_rl.objectives.batches import TinyNetwork, make_batch
from tests.safe_rl.objectives.test_every_objective import every

FULL = {"value_clip": 0.2, "token_kl_coef": 0.3}
# A setting of the sum, before and after; those that are buffers come first.
COEFFICIENTS = {
    "clip": (0.2, 0.01),
    "entropy_coef": (0.01, 0.5),
    "value_coef": (0.5, 0.1),
    "value_clip": (0.2, 0.01),
    "token_kl_coef": (0.3, 0.1),
}
SETTINGS = {
    **COEFFICIENTS,
    "huber_delta": (0.5, None),
    "temperature": (0.3, 5.0),
    "surrogate": (kl_surrogate, kl_surrogate_token),
}


def wide(batch: TensorDict) -> TensorDict:
    """Ratios that a narrower clip cuts."""
    batch["log_prob"] = batch["old_log_prob"] + 0.5 * batch["advantage"].squeeze(-1)
    return batch


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize(("name", "values"), SETTINGS.items(), ids=SETTINGS)
def test_set_on_the_sum_is_made_with_it(name, values, functional):
    before, after = values
    batch = wide(make_batch())
    network = TinyNetwork() if functional else None
    loss = SAFELoss(network, functional=functional, **FULL)
    if name in COEFFICIENTS:
        assert float(getattr(loss, name)) == pytest.approx(before)
    else:
        assert getattr(loss, name) == before
    first = loss(batch).detach().to_dict()
    setattr(loss, name, after)
    expected = SAFELoss(network, **{**FULL, name: after})(batch).detach().to_dict()
    assert_close(loss(batch).detach().to_dict(), expected, rtol=0, atol=0)
    assert any(not torch.equal(first[key], expected[key]) for key in first)
    setattr(loss, name, before)
    assert_close(loss(batch).detach().to_dict(), first, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "values"), COEFFICIENTS.items(), ids=COEFFICIENTS)
def test_coefficients_are_in_the_state(name, values):
    loss, other = SAFELoss(**FULL), SAFELoss(**FULL)
    tensor = getattr(loss, name)
    setattr(loss, name, values[1])
    assert getattr(loss, name) is tensor
    other.load_state_dict(loss.state_dict())
    assert float(getattr(other, name)) == pytest.approx(values[1])
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert float(getattr(twin, name)) == pytest.approx(values[1])
        setattr(twin, name, values[0])
        assert float(getattr(twin, name)) == pytest.approx(values[0])
    assert float(getattr(loss, name)) == pytest.approx(values[1])


def test_a_clip_of_two_sides():
    batch = wide(make_batch())
    loss = PPOLoss(clip=(0.1, 0.3))
    assert_close(loss.clip, torch.tensor([0.1, 0.3]))
    loss.clip = (0.05, 0.2)
    expected = PPOLoss(clip=(0.05, 0.2))(batch)
    assert_close(loss(batch).to_dict(), expected.to_dict(), rtol=0, atol=0)
    # One number is that of both.
    loss.clip = 0.1
    assert_close(loss(batch)["loss_policy"], PPOLoss(clip=0.1)(batch)["loss_policy"])
    with pytest.raises(ValueError, match=r"clip must have the shape it was made with, \(\), got"):
        PPOLoss().clip = (0.1, 0.2)
    with pytest.raises(ValueError, match=r"clip must be a number or a pair.*got \(0.1, 0.2, 0.3\)"):
        PPOLoss(clip=(0.1, 0.2, 0.3))


def test_a_tensor_is_copied_not_held():
    loss, value = SAFELoss(), torch.tensor(0.5, dtype=torch.float64)
    held = loss.entropy_coef
    loss.entropy_coef = value
    assert loss.entropy_coef is held
    assert (held.dtype, held.item()) == (torch.float32, 0.5)
    value.zero_()
    assert loss.entropy_coef == 0.5


def test_a_coefficient_made_as_an_integer_takes_fractions():
    loss = SAFELoss(entropy_coef=0, clip=1)
    loss.entropy_coef, loss.clip = 0.25, 0.5
    assert (loss.entropy_coef, loss.clip) == (0.25, 0.5)


def test_a_clip_as_a_tensor_is_the_clip_as_a_number():
    batch = wide(make_batch())
    mask = batch["response_mask"]
    policy = batch["log_prob"], batch["old_log_prob"], batch["advantage"].squeeze(-1)
    exact = torch.tensor([0.1, 0.3], dtype=torch.float64)
    found = clipped_policy_terms(*policy, mask=mask, clip=exact)
    assert_close(found, clipped_policy_terms(*policy, mask=mask, clip=(0.1, 0.3)))
    # In half precision 1 + .25 would be there, 1 + .2 would not.
    half = clipped_policy_terms(*policy, mask=mask, clip=torch.tensor(0.2).bfloat16())
    rounded = float(torch.tensor(0.2).bfloat16())
    assert_close(half, clipped_policy_terms(*policy, mask=mask, clip=rounded))
    values = batch["state_values"], batch["value_target"]
    old = {"mask": mask, "old_value": batch["old_state_values"]}
    assert_close(
        value_terms(*values, clip=torch.tensor(0.25), **old), value_terms(*values, clip=0.25, **old)
    )


@every
def test_a_misspelt_name_is_refused(make):
    loss = make()
    known = next(iter(loss._known_settings()))
    with pytest.raises(AttributeError, match=f"has no entropy_coeff.*{known}"):
        loss.entropy_coeff = 0.5
    assert not hasattr(loss, "entropy_coeff")


@pytest.mark.parametrize("make", [SAFELoss, GatedKLLoss])
def test_what_is_read_from_the_batch_is_said_to_be(make):
    loss = make()
    loss.set_keys(kl_coef=("control", "kl_coef"))
    message = r"kl_coef is no attribute.*from the batch, under \('control', 'kl_coef'\); set_keys"
    with pytest.raises(AttributeError, match=message):
        loss.kl_coef = 0.0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("clip", 0.0, "clip must be positive, got 0.0"),
        ("value_clip", -1.0, "^value_clip must be positive, got -1.0"),
        ("temperature", 0, "temperature must be positive, got 0"),
        ("temperature", None, "temperature must be positive, got None"),
        ("huber_delta", -0.5, "huber_delta must be positive, got -0.5"),
        ("entropy_coef", -0.1, "entropy_coef must not be negative, got -0.1"),
        ("entropy_coef", None, "entropy_coef must not be negative, got None"),
        ("value_coef", float("nan"), "value_coef must not be negative, got nan"),
        ("value_clip", None, "value_clip was a number when.*cannot become None"),
        ("reduction", "avg", "reduction must be 'mean', 'sum' or 'none', got 'avg'"),
    ],
)
def test_values_are_checked_when_they_are_set(name, value, message):
    loss = SAFELoss(**FULL)
    with pytest.raises(ValueError, match=message):
        setattr(loss, name, value)


def test_a_clip_that_is_not_there_is_not_made_later():
    loss = SoftMinValueLoss()
    assert loss.clip is None
    loss.clip = None
    with pytest.raises(ValueError, match=r"clip was None when.*cannot become 0.2; float\('inf'\)"):
        loss.clip = 0.2
    assert PPOLoss().value_clip is None
    batch = make_batch()
    unclipped = SoftMinValueLoss(clip=float("inf"))(batch)
    assert_close(unclipped.to_dict(), SoftMinValueLoss()(batch).to_dict())


@pytest.mark.parametrize("make", [PPOLoss, ClippedPolicyLoss])
def test_what_every_module_has_is_left_alone(make):
    loss = make(TinyNetwork())
    loss.eval()
    assert not loss.training
    loss.training = True
    loss.extra = nn.Linear(1, 1)
    loss.register_buffer("count", torch.zeros(()))
    loss.count = torch.ones(())
    loss._note = 3
    loss.value_estimator = None
    loss.loss_mask_key = None
    assert {"extra.weight", "count"} <= set(loss.state_dict())
    assert loss.state_dict()["count"] == 1
    assert loss.double().clip.dtype == torch.float64


class Own(ClippedPolicyLoss):
    """With an attribute of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 2.0


def test_a_class_of_ones_own_sets_what_it_has():
    loss = Own()
    loss.factor = 3.0
    loss.clip = 0.5
    assert (loss.factor, loss.clip) == (3.0, 0.5)
    with pytest.raises(AttributeError, match="Own has no factors"):
        loss.factors = 1.0


class Values(SumOfObjectives):
    """Of two critics."""

    default_keys = _AcceptedKeys = SoftMinValueLoss._AcceptedKeys


def test_a_setting_of_several_parts_goes_to_all():
    parts = [SoftMinValueLoss(), SoftMinValueLoss()]
    Values(None, [*parts]).huber_delta = 2.0
    assert [part.huber_delta for part in parts] == [2.0, 2.0]
