"""Reductions under a mask against the same over the entries picked out."""

import pytest
import torch
from hypothesis import given
from torch import Tensor

from safe_ops import fill_masked, masked_mean, masked_sum, masked_var, masked_whiten
from tests.strategies import PROPERTY, bool_tensors, tensors

grids, masks = tensors(3, 4), bool_tensors(3, 4)
EXACT = {"rtol": 1e-12, "atol": 1e-12}
REDUCTIONS = [masked_sum, masked_mean, masked_var]
OPS = [*REDUCTIONS, fill_masked, masked_whiten]


def expected(op: object, picked: Tensor) -> Tensor:
    """Over the entries that count; 0 where none does."""
    if picked.numel() == 0:
        return picked.new_zeros(())
    if op is masked_sum:
        return picked.sum()
    return picked.mean() if op is masked_mean else picked.var(correction=0)


@pytest.mark.parametrize("op", REDUCTIONS)
@PROPERTY
@given(x=grids, mask=masks)
def test_reduction_is_over_the_entries_that_count(op: object, x: Tensor, mask: Tensor) -> None:
    torch.testing.assert_close(op(x, mask), expected(op, x[mask]), **EXACT)
    by_row = torch.stack([expected(op, row[kept]) for row, kept in zip(x, mask, strict=True)])
    torch.testing.assert_close(op(x, mask, dim=-1), by_row, **EXACT)
    by_column = torch.stack(
        [expected(op, row[kept]) for row, kept in zip(x.T, mask.T, strict=True)]
    )
    torch.testing.assert_close(op(x, mask, dim=0), by_column, **EXACT)


def test_reductions_by_hand() -> None:
    x = torch.tensor([[1.0, 5.0], [3.0, torch.nan]])
    mask = torch.tensor([[True, True], [True, False]])
    assert masked_sum(x, mask).item() == 9.0
    assert masked_mean(x, mask).item() == 3.0
    torch.testing.assert_close(masked_var(x, mask).item(), 8 / 3)
    assert masked_mean(x, mask, dim=1).tolist() == [3.0, 3.0]
    assert masked_var(x, mask, dim=1).tolist() == [4.0, 0.0]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_garbage_that_does_not_count_reaches_neither_value_nor_gradient(
    op: object, garbage: float
) -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    clean = torch.tensor([[1.0, 4.0, 0.0], [2.0, 0.0, 0.0]])

    def run(fill: float) -> tuple[Tensor, Tensor]:
        x = torch.where(mask, clean, torch.full_like(clean, fill)).requires_grad_()
        y = op(x, mask)
        return y.detach(), torch.autograd.grad(y.square().sum(), x)[0]

    for found, wanted in zip(run(garbage), run(0.0), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert (run(garbage)[1][~mask] == 0).all()


@pytest.mark.parametrize("op", OPS)
def test_op_with_nothing_that_counts_is_zero(op: object) -> None:
    x = torch.full((2, 3), torch.nan, requires_grad=True)
    found = op(x, torch.zeros(2, 3).bool())
    assert (found == 0).all()
    assert (torch.autograd.grad(found.sum(), x)[0] == 0).all()
    empty = op(torch.zeros(0, 3), torch.zeros(0, 3).bool())
    assert (empty == 0).all()


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op: object) -> None:
    x = torch.tensor([[1.0, -2.0, 0.5], [3.0, 1.0, 7.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    assert torch.autograd.gradcheck(lambda y: op(y, mask), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_dtype_stays(op: object, dtype: torch.dtype) -> None:
    assert op(torch.ones(3, 7, dtype=dtype), torch.ones(3, 7).bool()).dtype == dtype


def test_fill_masked_value() -> None:
    x, mask = torch.tensor([1.0, torch.nan]), torch.tensor([True, False])
    assert fill_masked(x, mask, -torch.inf).tolist() == [1.0, -torch.inf]


# --- whitening ----------------------------------------------------------------------------------


@PROPERTY
@given(grids, masks)
def test_whitened_entries_have_mean_zero_and_unit_variance(x: Tensor, mask: Tensor) -> None:
    picked = masked_whiten(x, mask, eps=1e-8)[mask]
    if picked.numel() == 0:
        return
    torch.testing.assert_close(picked.mean(), torch.zeros(()).double(), rtol=0, atol=1e-9)
    # The eps takes its share: var / (var + eps).
    variance = x[mask].var(correction=0)
    torch.testing.assert_close(
        picked.var(correction=0), variance / (variance + 1e-8), rtol=1e-6, atol=1e-9
    )


@PROPERTY
@given(grids, masks)
def test_whitening_rescales_around_the_mean_when_told(x: Tensor, mask: Tensor) -> None:
    if not mask.any():
        return
    kept = masked_whiten(x, mask, shift_mean=False)[mask]
    torch.testing.assert_close(kept.mean(), x[mask].mean(), rtol=0, atol=1e-9)
    shifted = masked_whiten(x, mask)[mask]
    torch.testing.assert_close(kept - x[mask].mean(), shifted, rtol=0, atol=1e-9)


@PROPERTY
@given(grids, masks, tensors(3, 4, low=-1e6, high=1e6))
def test_whitening_does_not_see_what_is_masked(x: Tensor, mask: Tensor, other: Tensor) -> None:
    changed = torch.where(mask, x, other)
    torch.testing.assert_close(masked_whiten(changed, mask), masked_whiten(x, mask), rtol=0, atol=0)


@pytest.mark.parametrize("count", [1, 3])
def test_whitening_without_variance_is_zero(count: int) -> None:
    x = torch.full((1, 4), 2.0, requires_grad=True)
    mask = (torch.arange(4) < count).unsqueeze(0)
    found = masked_whiten(x, mask)
    assert (found == 0).all()
    assert torch.autograd.grad(found.sum(), x)[0].isfinite().all()
    around = masked_whiten(x, mask, shift_mean=False)
    assert (around[mask] == 2).all()
    assert (around[~mask] == 0).all()


def test_whitening_is_global_and_not_by_row() -> None:
    x = torch.tensor([[1.0, 1.0], [3.0, 3.0]])
    found = masked_whiten(x, torch.ones(2, 2).bool())
    torch.testing.assert_close(found, torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
