import math

import pytest
import torch
from tensordict import TensorDict
from torch.testing import assert_close

from safe_rl import ClippedPolicyLoss
from tests.safe_rl.objectives.batches import make_batch


def two_tokens(ratio: float, advantage: float) -> TensorDict:
    """Two tokens that count, one of padding."""
    old = torch.full((1, 3), -2.0, dtype=torch.float64)
    return TensorDict(
        {
            "old_log_prob": old,
            "log_prob": old + math.log(ratio),
            "advantage": torch.full((1, 3, 1), advantage, dtype=torch.float64),
            "entropy": torch.tensor([[1.0, 3.0, 9.0]], dtype=torch.float64),
            "response_mask": torch.tensor([[True, True, False]]),
        },
        [1],
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [(1.0, 2.0, -2.0), (1.5, 2.0, -2.4), (0.5, 2.0, -1.0), (1.5, -2.0, 3.0), (0.5, -2.0, 1.6)],
)
def test_values_by_hand(ratio, advantage, loss):
    result = ClippedPolicyLoss(entropy_coef=0.1)(two_tokens(ratio, advantage))
    assert result["loss_policy"].item() == pytest.approx(loss)
    assert result["loss_entropy"].item() == pytest.approx(-0.2)
    assert result["entropy_new_nats_per_token"].item() == pytest.approx(2.0)
    assert result["ratio_max"].item() == pytest.approx(ratio)
    assert result["effective_sample_size"].item() == pytest.approx(1.0)
    assert result["clip_fraction"].item() == float((ratio - 1) * advantage > 0 and ratio != 1)


def test_uneven_clip():
    result = ClippedPolicyLoss(clip=(0.2, 0.4))(two_tokens(1.5, 1.0))
    assert result["loss_policy"].item() == pytest.approx(-1.4)


def test_entropy_coefficient_is_changed_in_place():
    loss, batch = ClippedPolicyLoss(entropy_coef=0.01), make_batch()
    held, before = loss.entropy_coef, loss(batch)["loss_entropy"]
    loss.entropy_coef = 0.02
    assert loss.entropy_coef is held
    assert_close(loss(batch)["loss_entropy"], 2 * before)
    loss.entropy_coef = 0.0
    assert loss(batch)["loss_entropy"] == 0
    assert loss.state_dict()["entropy_coef"] == 0


def test_the_bonus_raises_entropy():
    batch = make_batch()
    batch["entropy"] = batch["entropy"].requires_grad_()
    (gradient,) = torch.autograd.grad(ClippedPolicyLoss()(batch)["loss_entropy"], batch["entropy"])
    assert (gradient[batch["response_mask"]] < 0).all()


def test_frames_without_a_time_dimension():
    """What an environment's collector gives after flattening: [N] and [N, 1]."""
    batch = make_batch()
    mask = batch["response_mask"]
    expected = ClippedPolicyLoss()(batch)
    keys = ClippedPolicyLoss().in_keys[:-1]
    frames = TensorDict({key: batch[key][mask] for key in keys}, [int(mask.sum())])
    assert_close(ClippedPolicyLoss()(frames).to_dict(), expected.to_dict())
    frames["response_tokens_mean"] = torch.ones(int(mask.sum()), dtype=torch.float64)
    assert_close(ClippedPolicyLoss()(frames).to_dict(), expected.to_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clip": 0.0}, "clip must be positive, got 0.0"),
        ({"clip": (0.2, -0.1)}, r"clip must be positive, got \(0.2, -0.1\)"),
        ({"entropy_coef": -1.0}, "entropy_coef must not be negative, got -1.0"),
        ({"entropy_coef": math.nan}, "entropy_coef must not be negative, got nan"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClippedPolicyLoss(**arguments)
