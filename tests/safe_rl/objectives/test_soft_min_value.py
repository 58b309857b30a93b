import pytest
import torch
from tensordict import TensorDict
from torch.testing import assert_close

from safe_ops import soft_min
from safe_rl import SoftMinValueLoss
from tests.safe_rl.objectives.batches import make_batch


def one_token(*heads: float, target: float = 0.0) -> TensorDict:
    return TensorDict(
        {
            "state_values": torch.tensor([[heads]], dtype=torch.float64),
            "value_target": torch.tensor([[[target]]], dtype=torch.float64),
            "response_mask": torch.ones(1, 1, dtype=torch.bool),
        },
        [1],
    )


def test_values_by_hand():
    # Huber at .5: .2^2 / 2 = .02 inside, .5 (2 - .25) = .875 outside; the mean, times .5.
    result = SoftMinValueLoss()(one_token(0.2, 2.0))
    assert result["loss_value"].item() == pytest.approx(0.5 * (0.02 + 0.875) / 2)
    assert result["head_disagreement"].item() == pytest.approx(1.8)
    value = soft_min(torch.tensor([0.2, 2.0], dtype=torch.float64), 0.3)
    assert_close(result["value_mean"], value)
    squared = SoftMinValueLoss(huber_delta=None, value_coef=1.0)(one_token(0.2, 2.0))
    assert squared["loss_value"].item() == pytest.approx((0.02 + 2.0) / 2)


def test_every_head_is_fitted():
    """The soft-min weight of the upper head is e^-100: a loss on V would leave it where it is."""
    batch = one_token(0.0, 30.0, target=1.0)
    values = batch["state_values"].requires_grad_()
    loss = SoftMinValueLoss()(batch)["loss_value"]
    (gradient,) = torch.autograd.grad(loss, values)
    assert_close(gradient, torch.tensor([[[-0.125, 0.125]]], dtype=torch.float64))


def test_a_head_alone_may_lack_its_dimension():
    batch = make_batch()
    batch["state_values"] = batch["state_values"][..., :1]
    expected = SoftMinValueLoss()(batch)
    batch["state_values"] = batch["state_values"].squeeze(-1)
    assert_close(SoftMinValueLoss()(batch).to_dict(), expected.to_dict())
    assert expected["head_disagreement"] == 0


def test_explained_variance_is_of_the_soft_min():
    batch = make_batch()
    batch["state_values"] = batch["value_target"].expand(-1, -1, 2)
    assert_close(
        SoftMinValueLoss()(batch)["explained_variance"], torch.tensor(1.0, dtype=torch.float64)
    )


def test_clip_by_hand():
    batch = one_token(1.0)
    batch["old_state_values"] = torch.zeros(1, 1, 1, dtype=torch.float64)
    # Squared: 1/2 as it is, .2^2 / 2 with the change clipped to .2; their mean.
    result = SoftMinValueLoss(clip=0.2, huber_delta=None, value_coef=1.0)(batch)
    assert result["loss_value"].item() == pytest.approx((0.5 + 0.02) / 2)


def test_the_old_values_are_read_only_to_clip():
    assert "old_state_values" not in SoftMinValueLoss().in_keys
    assert "old_state_values" in SoftMinValueLoss(clip=0.2).in_keys


def test_coefficient_is_changed_in_place():
    loss, batch = SoftMinValueLoss(), make_batch()
    before = loss(batch)["loss_value"]
    loss.value_coef = 0.25
    assert_close(loss(batch)["loss_value"], before / 2)


@pytest.mark.parametrize("name", ["temperature", "huber_delta", "clip"])
def test_errors(name):
    with pytest.raises(ValueError, match=rf"{name} must be positive, got 0\.0"):
        SoftMinValueLoss(**{name: 0.0})
    with pytest.raises(ValueError, match="value_coef must not be negative"):
        SoftMinValueLoss(value_coef=-0.1)
