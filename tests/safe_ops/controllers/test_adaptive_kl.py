import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from safe_ops.controllers import AdaptiveKL


def run(law, values):
    state = law.init()
    for kl in values:
        state = law.update(state, kl=kl)
    return state


@pytest.mark.parametrize(
    ("kl", "factor"),
    # target 0.1, gain 0.1: errors +0.1 unclipped, then clipped at +0.2 and -0.2, then 0.
    [(0.11, 1.01), (1.0, 1.02), (0.0, 0.98), (0.1, 1.0), (-0.5, 0.98)],
)
def test_by_hand(kl, factor):
    coef = float(run(AdaptiveKL(target=0.1, initial_coef=2.0), [kl]).coef)
    assert coef == pytest.approx(2.0 * factor)


def test_a_positive_kl_above_the_target_raises_the_coefficient():
    law = AdaptiveKL(target=6.0, initial_coef=0.1)
    assert run(law, [12.0] * 5).coef > 0.1 > run(law, [3.0] * 5).coef


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(width=32), max_size=15))
def test_stays_within_its_limits(values):
    law = AdaptiveKL(initial_coef=0.1, gain=4.0, lower=0.05, upper=0.2)
    assert 0.05 * 0.999 <= float(run(law, values).coef) <= 0.2 * 1.001


def test_leaves_its_lower_limit():
    law = AdaptiveKL(target=0.1, initial_coef=0.1, lower=0.1)
    assert run(law, [0.0, 0.0, 1.0]).coef > 0.1


def test_settles_at_its_target():
    # Plant: KL falls as the coefficient rises; at rest KL = target.
    law = AdaptiveKL(target=0.2, initial_coef=0.1, gain=0.5)
    state = law.init()
    for _ in range(80):
        state = law.update(state, kl=0.1 / float(state.coef))
    assert 0.1 / float(state.coef) == pytest.approx(0.2, rel=0.01)


def test_without_gain_the_coefficient_is_fixed():
    law = AdaptiveKL(initial_coef=0.2, gain=0.0)
    state = law.init()
    for kl in (0.0, 5.0, 1e3):
        state = law.update(state, kl=kl)
        assert float(state.coef) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("gains", "message"),
    [
        ({"target": 0.0}, "target must be positive and finite, got 0"),
        ({"gain": -1.0}, "gain must not be negative, got -1"),
        ({"gain": float("nan")}, "gain must not be negative, got nan"),
        ({"lower": 0.0}, "lower must be positive"),
        ({"gain": 5.0}, "gain \\* error_limit must be below 1"),
        ({"initial_coef": 200.0}, "initial_coef must be within"),
    ],
)
def test_parameters_are_checked(gains, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveKL(**gains)
