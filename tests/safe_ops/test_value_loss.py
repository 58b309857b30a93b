"""Against Huber's definition token by token in floats."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from safe_ops import explained_variance, soft_min, value_loss, value_terms
from tests.strategies import PROPERTY, bool_tensors, tensors

B, T, K = 2, 3, 2
heads, grids, masks = tensors(B, T, K), tensors(B, T), bool_tensors(B, T)
deltas = st.none() | st.floats(0.1, 5.0)
ONE = torch.ones(1, 1).bool()


def distance(error: float, delta: float | None) -> float:
    if delta is None or abs(error) <= delta:
        return error**2 / 2
    return delta * (abs(error) - delta / 2)


def loop(
    value: Tensor,
    target: Tensor,
    mask: Tensor,
    delta: float | None,
    old: Tensor | None = None,
    clip: float | None = None,
) -> Tensor:
    terms = torch.zeros(mask.shape, dtype=torch.float64)
    for b, t in mask.nonzero().tolist():
        for k in range(value.shape[-1]):
            v, y = value[b, t, k].item(), target[b, t, k].item()
            term = distance(v - y, delta)
            if old is not None and clip is not None:
                o = old[b, t, k].item()
                term = (term + distance(o + max(-clip, min(clip, v - o)) - y, delta)) / 2
            terms[b, t] += term / value.shape[-1]
    return terms


@PROPERTY
@given(heads, grids, masks, deltas)
def test_value_terms_are_the_loop(
    value: Tensor, target: Tensor, mask: Tensor, delta: float | None
) -> None:
    expected = loop(value, target.unsqueeze(-1).expand(B, T, K), mask, delta)
    found = value_terms(value, target, mask=mask, huber_delta=delta)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    loss = value_loss(value, target, mask=mask, huber_delta=delta)
    torch.testing.assert_close(loss, expected.sum() / max(1, int(mask.sum())))


@PROPERTY
@given(heads, heads, masks, deltas, heads, st.floats(0.1, 5.0))
def test_clipped_value_terms_are_the_loop(
    value: Tensor, target: Tensor, mask: Tensor, delta: float | None, old: Tensor, clip: float
) -> None:
    expected = loop(value, target, mask, delta, old, clip)
    arguments = {"mask": mask, "huber_delta": delta, "old_value": old, "clip": clip}
    found = value_terms(value, target, **arguments)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    loss = value_loss(value, target, **arguments)
    torch.testing.assert_close(loss, expected.sum() / max(1, int(mask.sum())))


@pytest.mark.parametrize(
    ("value", "delta", "loss", "slope"),
    [
        (0.25, 0.5, 0.03125, 0.25),
        (2.0, 0.5, 0.875, 0.5),
        (-2.0, 0.5, 0.875, -0.5),
        (2.0, None, 2.0, 2.0),
    ],
)
def test_value_loss_by_hand(value: float, delta: float | None, loss: float, slope: float) -> None:
    x = torch.full((1, 1), value, requires_grad=True)
    found = value_loss(x, torch.zeros(1, 1), mask=ONE, huber_delta=delta)
    assert found.item() == pytest.approx(loss)
    assert torch.autograd.grad(found, x)[0].item() == pytest.approx(slope)


def test_value_clip_by_hand() -> None:
    # v = 1, old 0, clip .2, target 2: (1/2 + 1.8^2/2) / 2, and only the unclipped half pulls.
    x = torch.ones(1, 1, requires_grad=True)
    found = value_loss(
        x,
        torch.full((1, 1), 2.0),
        mask=ONE,
        huber_delta=None,
        old_value=torch.zeros(1, 1),
        clip=0.2,
    )
    assert found.item() == pytest.approx((0.5 + 1.62) / 2)
    assert torch.autograd.grad(found, x)[0].item() == pytest.approx(-0.5)


def test_every_head_is_fitted() -> None:
    value = torch.tensor([[[0.0, 5.0]]], requires_grad=True)
    target = torch.full((1, 1), 2.0)
    (slope,) = torch.autograd.grad(value_loss(value, target, mask=ONE, huber_delta=None), value)
    torch.testing.assert_close(slope, torch.tensor([[[-1.0, 1.5]]]))
    # On the soft-min alone the higher head would be left where it is.
    alone = value_loss(soft_min(value, 0.3), target, mask=ONE, huber_delta=None)
    (slope,) = torch.autograd.grad(alone, value)
    assert slope[0, 0, 1].abs() < 1e-6 < slope[0, 0, 0].abs()


def test_one_head_with_and_without_its_dimension() -> None:
    value, target = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]])
    mask = torch.tensor([[True, False]])
    torch.testing.assert_close(
        value_terms(value, target, mask=mask), value_terms(value.unsqueeze(-1), target, mask=mask)
    )


def test_as_many_heads_as_steps_are_not_confused() -> None:
    value = torch.zeros(1, 2, 2)
    target = torch.tensor([[0.0, 2.0]])
    found = value_terms(value, target, mask=torch.ones(1, 2).bool(), huber_delta=None)
    torch.testing.assert_close(found, torch.tensor([[0.0, 2.0]]))


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
def test_value_loss_ignores_garbage_where_nothing_counts(garbage: float) -> None:
    mask = torch.tensor([[True, False]])

    def run(fill: float) -> list[Tensor]:
        value = torch.tensor([[[1.0, 2.0], [fill, fill]]], requires_grad=True)
        target = torch.tensor([[0.5, fill]])
        old = torch.tensor([[[0.9, 2.5], [fill, fill]]])
        loss = value_loss(value, target, mask=mask, old_value=old, clip=0.2)
        share = explained_variance(value[..., 0], target, mask=mask)
        return [loss, share, torch.autograd.grad(loss, value)[0]]

    for found, expected in zip(run(garbage), run(0.0), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_value_loss_with_nothing_that_counts_is_zero() -> None:
    value = torch.full((2, 3, 2), torch.nan, requires_grad=True)
    loss = value_loss(value, torch.zeros(2, 3), mask=torch.zeros(2, 3).bool())
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, value)[0] == 0).all()


def test_value_loss_differentiates_the_value_alone() -> None:
    value, target, old = (torch.full((1, 2), x).requires_grad_() for x in (1.0, 2.0, 0.95))
    mask = torch.ones(1, 2).bool()
    value_loss(value, target, mask=mask, old_value=old, clip=0.2).backward()
    assert value.grad is not None
    assert target.grad is None
    assert old.grad is None


@pytest.mark.parametrize("delta", [None, 0.5])
def test_value_loss_gradcheck(delta: float | None) -> None:
    value = torch.sin(torch.arange(12.0, dtype=torch.float64)).mul(2).reshape(2, 3, 2)
    value.requires_grad_()
    target, mask = torch.zeros(2, 3).double(), torch.tensor([[True, True, False], [True] * 3])
    old = (value + 0.3).detach()
    assert torch.autograd.gradcheck(
        lambda v: value_loss(v, target, mask=mask, huber_delta=delta, old_value=old, clip=0.2),
        value,
    )


@pytest.mark.parametrize(
    ("value", "target"),
    [
        ((2, 3, 2), (2, 3, 3)),
        ((2, 3, 1), (2, 3, 2)),
        ((2, 3), (2, 3, 2)),
        ((2, 3, 2), (2, 3, 0)),
        ((2, 3, 2), (2, 1)),
        ((2, 3, 2), (2, 4, 2)),
        ((2, 3, 2), (3,)),
        ((2, 3, 2), ()),
        ((2, 4), (2, 3)),
        ((2, 1), (2, 3)),
        ((3,), (2, 3)),
        ((), (2, 3)),
        ((1, 2, 3, 2), (2, 3)),
    ],
)
def test_shapes_that_disagree_are_both_named(
    value: tuple[int, ...], target: tuple[int, ...]
) -> None:
    mask = torch.ones(2, 3).bool()
    for op in (value_terms, value_loss, explained_variance):
        with pytest.raises(ValueError, match="value_target") as caught:
            op(torch.zeros(value), torch.zeros(target), mask=mask)
        for shape in (value, target):
            assert str(tuple(shape)) in str(caught.value)


@pytest.mark.parametrize("heads", [1, 2])
def test_a_shared_target_may_keep_its_head_dimension(heads: int) -> None:
    value, target = torch.ones(2, 3, heads), torch.arange(6.0).reshape(2, 3)
    mask = torch.ones(2, 3).bool()
    torch.testing.assert_close(
        value_terms(value, target.unsqueeze(-1), mask=mask), value_terms(value, target, mask=mask)
    )


# --- explained variance -------------------------------------------------------------------------


@PROPERTY
@given(grids, grids, masks)
@example(
    torch.tensor([[0.0, 1.0]], dtype=torch.float64),
    torch.tensor([[0.0, 5e-155]], dtype=torch.float64),
    torch.ones(1, 2, dtype=torch.bool),
)
def test_explained_variance_is_one_minus_the_share_of_the_residual(
    value: Tensor, target: Tensor, mask: Tensor
) -> None:
    found = explained_variance(value, target, mask=mask)
    total = target[mask].var(correction=0) if mask.any() else torch.zeros(())
    if total < 1e-6:
        assert found.isfinite()
        return
    residual = (target - value)[mask].var(correction=0)
    torch.testing.assert_close(found, 1 - residual / total, rtol=1e-6, atol=1e-6)


def test_explained_variance_by_hand() -> None:
    target, mask = torch.tensor([[0.0, 2.0]]), torch.ones(1, 2).bool()
    assert explained_variance(target + 5, target, mask=mask).item() == 1  # an offset is not seen
    assert explained_variance(torch.ones(1, 2), target, mask=mask).item() == 0
    assert explained_variance(-target, target, mask=mask).item() == -3
    assert explained_variance(target, torch.ones(1, 2), mask=mask).item() == 0  # nothing varies
    assert not explained_variance(target.requires_grad_(), target, mask=mask).requires_grad
