import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from safe_ops.controllers import PIDLagrangian


def run(law, costs):
    states = [law.init()]
    for cost in costs:
        states.append(law.update(states[-1], cost=cost))
    return states[1:]


def test_by_hand():
    # e = 1, 3, -2; the cost rises by 2, seen through half a filter, then falls.
    law = PIDLagrangian(limit=1.0, kp=0.5, ki=0.1, kd=0.4, derivative_decay=0.5)
    first, second, third = run(law, [2.0, 4.0, -1.0])
    assert [float(x) for x in first[:5]] == pytest.approx([0.6, 1.0, 0.5, 0.1, 0.0])
    assert [float(x) for x in second[:5]] == pytest.approx([2.3, 3.0, 1.5, 0.4, 0.4])
    assert [float(x) for x in third[:5]] == pytest.approx([0.0, -2.0, -1.0, 0.2, 0.2])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=10))
def test_without_limits_above_it_is_the_printed_algorithm(costs):
    integral, before, expected = 0.0, costs[0], 0.0
    for cost in costs:
        integral = max(0.0, integral + 0.2 * (cost - 0.5))
        rise, before = max(0.0, cost - before), cost
        expected = max(0.0, 0.3 * (cost - 0.5) + integral + 0.7 * rise)
    law = PIDLagrangian(limit=0.5, kp=0.3, ki=0.2, kd=0.7, derivative_decay=0.0, upper=1e6)
    assert float(run(law, costs)[-1].multiplier) == pytest.approx(expected, abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    before=st.lists(st.floats(0.125, 50, width=32), min_size=1, max_size=20),
    turn=st.floats(0.0625, 50, width=32),
    kd=st.sampled_from([0.0, 2.0]),
)
def test_leaves_saturation_as_soon_as_the_error_turns(before, turn, kd):
    law = PIDLagrangian(limit=1.0, kp=0.2, ki=0.3, kd=kd, upper=2.0)
    high = run(law, [1.0 + e for e in (*before, 20.0)])[-1]
    assert high.multiplier == 2.0
    assert law.update(high, cost=1.0 - turn).multiplier < 2.0
    low = run(law, [1.0 - e for e in (*before, 50.0)])[-1]
    assert low.multiplier == 0.0
    assert law.update(low, cost=1.0 + turn).multiplier > 0.0


def test_a_long_saturation_does_not_wind_up():
    law = PIDLagrangian(limit=1.0, kp=0.0, ki=0.1, upper=0.5)
    state = run(law, [2.0] * 500 + [0.0])[-1]
    assert float(state.multiplier) == pytest.approx(0.4)


def test_the_rate_limit_stops_the_integral():
    law = PIDLagrangian(limit=1.0, kp=0.0, ki=1.0, rate_limit=0.1)
    multipliers = [float(s.multiplier) for s in run(law, [2.0] * 4 + [0.5])]
    assert multipliers == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.3])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(width=32), max_size=15))
def test_stays_within_its_limits_and_rate(costs):
    law = PIDLagrangian(limit=0.0, kp=3.0, ki=1.0, kd=2.0, initial=0.3, upper=0.5, rate_limit=0.2)
    before = 0.3
    for state in run(law, costs):
        multiplier = float(state.multiplier)
        assert 0.0 <= multiplier <= 0.5
        assert 0.0 <= float(state.integral) <= 0.5
        assert abs(multiplier - before) <= 0.2 + 1e-6
        before = multiplier


def swing(law, steps=400):
    """Cost falls as the multiplier rises, with inertia; the largest overshoot of its last half."""
    state, cost, speed, late = law.init(), 3.0, 0.0, []
    for t in range(steps):
        state = law.update(state, cost=cost)
        speed = 0.9 * speed + 0.1 * (1.0 - float(state.multiplier)) * 0.3
        cost += speed
        if t >= steps // 2:
            late.append(abs(cost - 1.0))
    return max(late)


def test_proportional_action_damps_what_dual_ascent_leaves_swinging():
    ascent = swing(PIDLagrangian(limit=1.0, kp=0.0, ki=0.02))
    damped = swing(PIDLagrangian(limit=1.0, kp=0.4, ki=0.02))
    assert damped < 0.02 < 0.5 < ascent


def test_starts_at_its_initial_multiplier_and_without_a_kick():
    law = PIDLagrangian(limit=5.0, kd=10.0, initial=0.7)
    assert torch.equal(law.init().multiplier, torch.tensor(0.7))
    assert float(run(law, [5.0])[-1].multiplier) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("gains", "message"),
    [
        ({"limit": math.nan}, "limit must be finite, got nan"),
        ({"limit": 1.0, "kp": -1.0}, "kp must be finite and not negative, got -1.0"),
        ({"limit": 1.0, "ki": math.inf}, "ki must be finite"),
        ({"limit": 1.0, "initial": -0.1}, "initial and upper must satisfy .*got -0.1 and 100"),
        ({"limit": 1.0, "upper": math.inf}, "initial and upper must satisfy"),
        ({"limit": 1.0, "rate_limit": 0.0}, "rate_limit must be positive"),
        ({"limit": 1.0, "derivative_decay": 1.0}, r"derivative_decay must be in \[0, 1\)"),
    ],
)
def test_parameters_are_checked(gains, message):
    with pytest.raises(ValueError, match=message):
        PIDLagrangian(**gains)
