"""The soft-min's bounds hold to a few units in the last place, from 1e-3 to 1e5 in temperature."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from safe_ops import soft_min, soft_min_weights
from tests.strategies import PROPERTY, log_uniform, tensors

temperatures = log_uniform(1e-3, 1e5)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
K_MAX = 8


@st.composite
def critics(draw: st.DrawFn, dtype: torch.dtype, *, rows: int = 3, size: float = 1e6) -> Tensor:
    """[rows, K] for 1 to 8 critics, from nearly equal values to 1e6."""
    count = draw(st.integers(1, K_MAX))
    scale = draw(st.sampled_from([1e-6 * size, 1e-3 * size, size]))
    return draw(tensors(rows, count, low=-scale, high=scale, dtype=dtype))


def ulps(values: Tensor, temperature: float) -> Tensor:
    """Eight units in the last place of the largest value: the last digit of the result is rounded,
    and log1p at -1 + 1/K loses a factor (K - 1)/log K of its own. The second term is underflow."""
    limits = torch.finfo(values.dtype)
    return 8 * limits.eps * values.abs().amax(-1) + max(temperature, 1.0) * limits.tiny


def naive(values: Tensor, temperature: float) -> Tensor:
    """The formula as printed, in float64."""
    return -temperature * torch.log(torch.exp(-values.double() / temperature).mean(-1))


# --- values -------------------------------------------------------------------------------------


def test_soft_min_by_hand() -> None:
    # -log((e^0 + e^-log3)/2) = -log(2/3); and at a = 2 with values doubled, twice that
    values = torch.tensor([0.0, math.log(3.0)])
    torch.testing.assert_close(soft_min(values, 1.0).item(), math.log(1.5), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        soft_min(2 * values, 2.0).item(), 2 * math.log(1.5), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(soft_min_weights(values, 1.0), torch.tensor([0.75, 0.25]))


@PROPERTY
@given(tensors(3, 4, low=-5.0, high=5.0), log_uniform(0.1, 10.0))
def test_soft_min_is_the_formula_where_the_formula_is_accurate(
    values: Tensor, temperature: float
) -> None:
    torch.testing.assert_close(
        soft_min(values, temperature), naive(values, temperature), rtol=1e-12, atol=1e-12
    )


@dtypes
def test_soft_min_limits(dtype: torch.dtype) -> None:
    values = torch.tensor([[1.0, 3.0, 8.0], [-2.0, -2.0, 4.0]], dtype=dtype)
    torch.testing.assert_close(soft_min(values, 1e-3), values.amin(-1), rtol=2e-3, atol=0)
    torch.testing.assert_close(soft_min(values, 1e5), values.mean(-1), rtol=2e-4, atol=2e-4)


def test_soft_min_keeps_its_digits_where_a_plain_logsumexp_loses_them() -> None:
    values = torch.tensor([0.1, 0.3, 0.9])
    truth = soft_min(values.double(), 1e5)
    plain = -1e5 * (torch.logsumexp(-values / 1e5, -1) - math.log(3))
    assert (plain - truth).abs() > 1e-4
    torch.testing.assert_close(soft_min(values, 1e5), truth.float(), rtol=1e-6, atol=0)


# --- facts one may rely on ----------------------------------------------------------------------


@dtypes
@PROPERTY
@given(data=st.data(), temperature=temperatures)
def test_soft_min_bounds(dtype: torch.dtype, data: st.DataObject, temperature: float) -> None:
    values = data.draw(critics(dtype))
    found, slack = soft_min(values, temperature), ulps(values, temperature)
    exact = values.double()
    lowest = exact.amin(-1)
    assert (found >= lowest).all()  # without slack: nothing positive is subtracted
    assert (found <= exact.mean(-1) + slack).all()
    assert (found <= lowest + temperature * math.log(values.shape[-1]) + slack).all()


@dtypes
@PROPERTY
@given(data=st.data(), temperature=temperatures)
def test_soft_min_of_equal_critics_is_their_value(
    dtype: torch.dtype, data: st.DataObject, temperature: float
) -> None:
    values = data.draw(tensors(3, 1, low=-1e6, high=1e6, dtype=dtype)).expand(3, 4)
    assert (soft_min(values, temperature) == values[:, 0]).all()


@dtypes
@PROPERTY
@given(data=st.data(), temperature=temperatures)
def test_soft_min_weights_are_a_distribution(
    dtype: torch.dtype, data: st.DataObject, temperature: float
) -> None:
    values = data.draw(critics(dtype))
    weights = soft_min_weights(values, temperature)
    assert (weights >= 0).all()
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, dtype=dtype), rtol=0, atol=tolerance)
    # The lower a critic, the more it weighs.
    order = values.argsort(-1)
    assert (weights.gather(-1, order).diff(dim=-1) <= tolerance).all()


@dtypes
@PROPERTY
@given(data=st.data(), temperature=temperatures)
def test_soft_min_gradient_is_the_weights(
    dtype: torch.dtype, data: st.DataObject, temperature: float
) -> None:
    values = data.draw(critics(dtype, size=1e3)).requires_grad_()
    (slope,) = torch.autograd.grad(soft_min(values, temperature).sum(), values)
    # softmax divides by a first: its argument carries an error of |v|/a units in the last place.
    argument = 1 + float(values.detach().abs().max()) / temperature
    tolerance = min(1.0, 16 * torch.finfo(dtype).eps * argument)
    weights = soft_min_weights(values, temperature)
    torch.testing.assert_close(slope, weights, rtol=0, atol=tolerance)
    torch.testing.assert_close(
        slope.sum(-1), torch.ones(3, dtype=dtype), rtol=0, atol=32 * torch.finfo(dtype).eps
    )


@PROPERTY
@given(tensors(3, 4, low=-1e3, high=1e3), st.floats(-1e3, 1e3), temperatures)
def test_soft_min_is_shift_equivariant(values: Tensor, shift: float, temperature: float) -> None:
    # 1e-12: the shift itself rounds the values, in units of 2e3 * eps = 4e-13.
    torch.testing.assert_close(
        soft_min(values + shift, temperature),
        soft_min(values, temperature) + shift,
        rtol=0,
        atol=2e-12,
    )


@PROPERTY
@given(tensors(3, 4, low=-1e3, high=1e3), st.permutations(range(4)), temperatures)
def test_soft_min_is_symmetric(values: Tensor, order: list[int], temperature: float) -> None:
    torch.testing.assert_close(
        soft_min(values[:, order], temperature), soft_min(values, temperature), rtol=0, atol=2e-12
    )


@PROPERTY
@given(tensors(3, 4, low=-1e3, high=1e3), tensors(3, 4, low=0.0, high=1e3), temperatures)
@example(torch.zeros(1, 2).double(), torch.tensor([[0.0, 1e3]]).double(), 1e-3)
def test_soft_min_is_monotone(values: Tensor, rise: Tensor, temperature: float) -> None:
    before, after = soft_min(values, temperature), soft_min(values + rise, temperature)
    assert (after >= before - 2e-12).all()


@PROPERTY
@given(tensors(3, 4, low=-1e3, high=1e3), tensors(3, 4, low=-1e3, high=1e3), temperatures)
def test_soft_min_is_lipschitz_in_the_largest_difference(
    a: Tensor, b: Tensor, temperature: float
) -> None:
    change = (soft_min(a, temperature) - soft_min(b, temperature)).abs()
    assert (change <= (a - b).abs().amax(-1) + 2e-12).all()


@PROPERTY
@given(tensors(3, 4), temperatures, temperatures)
def test_soft_min_rises_with_the_temperature(values: Tensor, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert (soft_min(values, low) <= soft_min(values, high) + 1e-13).all()


# --- shapes, dtypes, gradients ------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.01, 0.3, 1e4])
def test_soft_min_gradcheck(temperature: float) -> None:
    spread = min(temperature, 1.0)
    values = spread * torch.tensor([[1.0, 2.0, 4.0], [0.5, 0.4, -1.0]], dtype=torch.float64)
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: soft_min(v, temperature), values)
    assert torch.autograd.gradcheck(lambda v: soft_min_weights(v, temperature), values)


def test_soft_min_gradient_where_critics_tie() -> None:
    values = torch.zeros(3, 2, requires_grad=True)
    soft_min(values, 0.3).sum().backward()
    torch.testing.assert_close(values.grad, torch.full((3, 2), 0.5))


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_soft_min_over_any_dimension(dim: int) -> None:
    values = torch.arange(2.0 * 3 * 5).reshape(2, 3, 5).sin()
    found = soft_min(values, 0.3, dim=dim)
    torch.testing.assert_close(found, naive(values.movedim(dim, -1), 0.3).float())
    weights = soft_min_weights(values, 0.3, dim=dim)
    assert weights.shape == values.shape
    torch.testing.assert_close(weights.sum(dim), torch.ones_like(found))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_soft_min_keeps_the_dtype(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, 3.0], dtype=dtype)
    found = soft_min(values, 0.3)
    assert found.dtype == soft_min_weights(values, 0.3).dtype == dtype
    truth = torch.tensor(1.2076, dtype=torch.float64)
    torch.testing.assert_close(found.double(), truth, rtol=4 * torch.finfo(dtype).eps, atol=1e-4)


def test_soft_min_weird_shapes() -> None:
    assert soft_min(torch.zeros(0, 3), 0.3).shape == (0,)
    assert soft_min(torch.tensor([[2.5]]), 0.3).tolist() == [2.5]


@pytest.mark.parametrize("op", [soft_min, soft_min_weights])
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_soft_min_wants_a_positive_finite_temperature(op: object, temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature must be positive.*got {temperature}"):
        op(torch.zeros(2), temperature)
