import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from safe_ops.controllers import Momentum


def run(law, values):
    states = [law.init()]
    for value in values:
        states.append(law.update(states[-1], value=value))
    return states[1:]


def test_by_hand():
    # w = 2; the value counts as 1 before it was first seen.
    momenta = [float(s.momentum) for s in run(Momentum(window=2), [1.0, 2.0, 4.0, 3.0])]
    assert momenta == [0.0, 0.5, 1.5, 0.5]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=14), st.integers(1, 5))
def test_is_the_difference_over_the_window(values, window):
    state = run(Momentum(window=window), values)[-1]
    past = values[max(0, len(values) - 1 - window)]
    assert float(state.past) == past
    assert float(state.momentum) == pytest.approx((values[-1] - past) / window, abs=1e-4)


def test_grows_into_the_slope_without_a_jump():
    momenta = [float(s.momentum) for s in run(Momentum(window=4), [0.1 * t for t in range(9)])]
    assert momenta == pytest.approx([0, 0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.1, 0.1])


@pytest.mark.parametrize("window", [0, -1, 2.5])
def test_window_is_checked(window):
    with pytest.raises(ValueError, match="window must be a positive whole number, got"):
        Momentum(window=window)
