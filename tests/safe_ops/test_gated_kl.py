"""The penalty must act: its value, and above all its slope."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from safe_ops import entropy_gate, gated_kl_penalty, momentum_penalty, token_kl_penalty
from tests.strategies import PROPERTY, log_uniform, tensors

EXACT = {"rtol": 1e-12, "atol": 1e-12}
kls = tensors(4, low=-1.0, high=5.0)
small = st.floats(0.0, 2.0)


def slope(penalty: Tensor, at: Tensor) -> Tensor:
    return torch.autograd.grad(penalty.sum(), at)[0]


# --- gated_kl_penalty ---------------------------------------------------------------------------


@PROPERTY
@given(kls, small, small, small, small)
def test_penalty_and_its_slope_are_the_formula(
    kl: Tensor, threshold: float, gate: float, coef: float, lead: float
) -> None:
    kl.requires_grad_()
    penalty = gated_kl_penalty(kl, threshold=threshold, gate=gate, coef=coef, lead=lead)
    excess = [max(0.0, x + lead - threshold) for x in kl.tolist()]
    torch.testing.assert_close(penalty.tolist(), [gate * coef * e**2 for e in excess], **EXACT)
    torch.testing.assert_close(
        slope(penalty, kl).tolist(), [2 * gate * coef * e for e in excess], **EXACT
    )


def test_penalty_by_hand() -> None:
    penalty = gated_kl_penalty(
        torch.tensor([0.1, 0.3, 0.5]), threshold=0.3, gate=2.0, coef=10.0, lead=0.1
    )
    torch.testing.assert_close(penalty, torch.tensor([0.0, 0.2, 1.8]))


@PROPERTY
@given(small, st.floats(0.0, 3.0))
def test_penalty_has_no_slope_up_to_the_threshold(threshold: float, below: float) -> None:
    kl = torch.tensor(threshold - below, dtype=torch.float64, requires_grad=True)
    penalty = gated_kl_penalty(kl, threshold=threshold, gate=4.0, coef=100.0)
    assert penalty.item() == 0
    assert slope(penalty, kl).item() == 0


def test_penalty_grows_from_the_threshold_without_a_kink() -> None:
    kl = torch.tensor([0.3 - 1e-6, 0.3 + 1e-6], dtype=torch.float64, requires_grad=True)
    below, above = slope(gated_kl_penalty(kl, threshold=0.3, coef=1.0), kl).tolist()
    assert below == 0
    assert above == pytest.approx(2e-6)


def test_penalty_strength_reaches_the_gradient() -> None:
    """The reference code's did not: penalty 0 and 1e4 gave the same bits."""
    kl = torch.tensor(0.5, requires_grad=True)
    slopes = [
        slope(gated_kl_penalty(kl, threshold=0.3, coef=coef), kl).item() for coef in (0.0, 0.1, 1e4)
    ]
    assert slopes == pytest.approx([0.0, 0.04, 4e3])


def test_a_rising_kl_gives_another_gradient_than_a_steady_one() -> None:
    kl = torch.tensor(0.25, requires_grad=True)
    steady = slope(gated_kl_penalty(kl, threshold=0.3, lead=0.0), kl)
    rising = slope(gated_kl_penalty(kl, threshold=0.3, lead=0.1), kl)
    assert steady.item() == 0
    assert rising.item() == pytest.approx(0.01)


def test_penalty_takes_tensors_for_what_changes_from_step_to_step() -> None:
    kl = torch.tensor([0.2, 0.8])
    numbers = {"threshold": 0.3, "gate": 1.5, "coef": 0.1, "lead": 0.05}
    as_tensors = {name: torch.tensor(value) for name, value in numbers.items()}
    torch.testing.assert_close(gated_kl_penalty(kl, **as_tensors), gated_kl_penalty(kl, **numbers))


def test_penalty_of_the_mean_is_not_the_mean_of_the_penalties() -> None:
    """Why the KL is reduced over all ranks first."""
    kl = torch.tensor([0.0, 0.8])
    whole = gated_kl_penalty(kl.mean(), threshold=0.3)
    assert gated_kl_penalty(kl, threshold=0.3).mean().item() > 2 * whole.item()


def test_penalty_gradcheck() -> None:
    kl = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    gate = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda k, g: gated_kl_penalty(k, threshold=0.3, gate=g, lead=0.05), (kl, gate)
    )


# --- entropy_gate -------------------------------------------------------------------------------


@PROPERTY
@given(
    tensors(5, low=0.0, high=100.0), log_uniform(1e-3, 1e3), small, small, log_uniform(1e-6, 1.0)
)
def test_gate_stays_in_its_bounds_and_never_rises_with_the_entropy(
    entropy: Tensor, floor: float, a: float, b: float, eps: float
) -> None:
    lower, upper = sorted((a, b))
    gate = entropy_gate(entropy.sort().values, floor=floor, lower=lower, upper=upper, eps=eps)
    assert (gate >= lower).all()
    assert (gate <= upper).all()
    assert (gate.diff() <= 0).all()
    expected = [min(max(floor / (h + eps), lower), upper) for h in entropy.sort().values.tolist()]
    torch.testing.assert_close(gate.tolist(), expected, **EXACT)


def test_gate_as_printed_has_no_upper_bound() -> None:
    entropy = torch.tensor([0.0, 0.9, 30.0])
    printed = entropy_gate(entropy, floor=2.0, upper=math.inf)
    torch.testing.assert_close(printed, torch.tensor([20.0, 2.0, 0.5]))
    torch.testing.assert_close(entropy_gate(entropy, floor=2.0), torch.tensor([4.0, 2.0, 0.5]))


def test_gate_multiplies_the_slope() -> None:
    kl = torch.tensor(0.5, requires_grad=True)
    open_, shut = (
        slope(
            gated_kl_penalty(
                kl, threshold=0.3, gate=entropy_gate(torch.tensor(entropy), floor=2.0)
            ),
            kl,
        )
        for entropy in (8.0, 0.4)
    )
    assert shut.item() == pytest.approx(8 * open_.item())


# --- momentum_penalty ---------------------------------------------------------------------------


@PROPERTY
@given(kls, kls, st.integers(1, 60), small)
def test_momentum_penalty_and_its_slope_are_the_formula(
    kl: Tensor, past: Tensor, window: int, coef: float
) -> None:
    kl.requires_grad_()
    penalty = momentum_penalty(kl, past, window=window, coef=coef)
    rate = [max(0.0, (x - y) / window) for x, y in zip(kl.tolist(), past.tolist(), strict=True)]
    torch.testing.assert_close(penalty.tolist(), [coef * m**2 for m in rate], **EXACT)
    torch.testing.assert_close(
        slope(penalty, kl).tolist(), [2 * coef * m / window for m in rate], **EXACT
    )


def test_momentum_penalty_is_nothing_beside_the_main_term() -> None:
    """The paper's constants, with the KL .2 above its threshold and .2 above 50 updates ago."""
    kl = torch.tensor(0.5, requires_grad=True)
    main = slope(gated_kl_penalty(kl, threshold=0.3, coef=0.1), kl)
    momentum = slope(momentum_penalty(kl, torch.tensor(0.3), window=50, coef=5.0), kl)
    assert 0 < momentum.item() < 0.03 * main.item()


def test_momentum_penalty_holds_the_past() -> None:
    kl, past = torch.tensor(0.5, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    momentum_penalty(kl, past, window=2).backward()
    assert kl.grad is not None
    assert past.grad is None


# --- token_kl_penalty ---------------------------------------------------------------------------


@PROPERTY
@given(tensors(4, low=-5.0, high=0.0), tensors(4, low=-5.0, high=0.0), small, small, small)
def test_token_penalty_and_its_slope_are_the_formula(
    log_prob: Tensor, ref: Tensor, threshold: float, gate: float, coef: float
) -> None:
    log_prob.requires_grad_()
    ref.requires_grad_()
    penalty = token_kl_penalty(log_prob, ref, threshold=threshold, gate=gate, coef=coef)
    excess = [
        max(0.0, p - q - threshold) for p, q in zip(log_prob.tolist(), ref.tolist(), strict=True)
    ]
    torch.testing.assert_close(penalty.tolist(), [gate * coef * e**2 for e in excess], **EXACT)
    found, into_ref = torch.autograd.grad(penalty.sum(), (log_prob, ref), allow_unused=True)
    torch.testing.assert_close(found.tolist(), [2 * gate * coef * e for e in excess], **EXACT)
    assert into_ref is None
