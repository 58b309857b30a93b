import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from safe_ops.controllers import PID


def run(law, values, **inputs):
    states = [law.init()]
    for value in values:
        states.append(law.update(states[-1], measurement=value, **inputs))
    return states[1:]


def test_by_hand():
    # e = 1, -1; the measurement rises by 2, seen through half a filter.
    law = PID(kp=2.0, ki=0.5, kd=0.4, setpoint=1.0, derivative_decay=0.5)
    first, second = run(law, [0.0, 2.0])
    assert [float(x) for x in first[:4]] == pytest.approx([2.5, 2.0, 0.5, 0.0])
    assert [float(x) for x in second[:4]] == pytest.approx([-2.4, -2.0, 0.0, -0.4])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=10))
def test_unlimited_is_the_textbook_law(values):
    law = PID(kp=0.5, ki=0.2, kd=0.3, setpoint=0.7, derivative_decay=0.6)
    integral = derivative = 0.0
    before = values[0]
    for y in values:
        integral += 0.2 * (0.7 - y)
        derivative = 0.6 * derivative + 0.4 * 0.3 * (before - y)
        before = y
    state = run(law, values)[-1]
    expected = 0.5 * (0.7 - values[-1]) + integral + derivative
    assert float(state.output) == pytest.approx(expected, abs=1e-3)


def test_no_kick_from_the_first_measurement_or_a_new_setpoint():
    law = PID(kd=5.0, setpoint=1.0)
    [state] = run(law, [100.0])
    assert state.output == 0
    assert law.update(state, measurement=100.0, setpoint=-50.0).output == 0


def test_derivative_is_filtered():
    law = PID(kd=1.0, derivative_decay=0.9)
    states = run(law, [0.0, 1.0, 1.0, 1.0])
    assert [float(s.derivative) for s in states] == pytest.approx([0, -0.1, -0.09, -0.081])


@settings(max_examples=30, deadline=None)
@given(
    errors=st.lists(st.floats(0.125, 10, width=32), min_size=1, max_size=15),
    turn=st.floats(0.0625, 10, width=32),
    sign=st.sampled_from([1.0, -1.0]),
    caller=st.booleans(),
)
def test_leaves_saturation_as_soon_as_the_error_turns(errors, turn, sign, caller):
    # Limits of the law itself, and those that a caller applies after it.
    limits = {"lower": -1.0, "upper": 1.0}
    law = PID(kp=0.5, ki=0.3, **({} if caller else limits))
    inputs = limits if caller else {}
    state = run(law, [-sign * e for e in (*errors, 3.0)], **inputs)[-1]
    assert sign * float(state.output) >= 1.0
    assert sign * float(law.update(state, measurement=sign * turn, **inputs).output) < 1.0


def test_winds_up_only_without_anti_windup():
    values = [-1.0] * 50 + [1.0]
    guarded = run(PID(ki=0.1, upper=0.5, lower=-0.5), values)[-1]
    wound = run(PID(ki=0.1, upper=0.5, lower=-0.5, anti_windup=False), values)[-1]
    assert float(guarded.output) == pytest.approx(0.4)
    assert float(wound.output) == pytest.approx(0.5)
    assert float(wound.integral) == pytest.approx(4.9, rel=1e-4)


def test_integrates_as_far_as_the_limit_and_not_short_of_it():
    state = run(PID(ki=0.4, upper=1.0), [-1.0] * 4)[-1]
    assert float(state.integral) == pytest.approx(1.0)


def test_a_large_error_does_not_unwind_the_integral():
    law = PID(kp=1.0, ki=0.1, upper=1.0)
    before, after = run(law, [-0.5, -5.0])
    assert torch.equal(before.integral, after.integral)
    assert float(after.output) == 1.0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(width=32), max_size=15))
def test_output_stays_within_limits_and_rate(values):
    law = PID(kp=3.0, ki=1.0, kd=2.0, lower=-1.0, upper=0.5, rate_limit=0.2, integral_limit=0.8)
    before = 0.0
    for state in run(law, values):
        output = float(state.output)
        assert -1.0 <= output <= 0.5
        assert abs(output - before) <= 0.2 + 1e-6
        assert abs(float(state.integral)) <= 0.8 + 1e-6
        before = output


def test_rate_limit_stops_the_integral():
    # Rising by 0.1 an update for 5, then falling at once.
    law = PID(ki=1.0, rate_limit=0.1)
    states = run(law, [-1.0] * 5 + [1.0] * 2)
    outputs = [float(s.output) for s in states]
    assert outputs == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.4, 0.3])


def test_integral_removes_the_offset():
    law = PID(kp=0.2, ki=0.1, setpoint=1.0)
    state, y = law.init(), 0.0
    for _ in range(120):
        state = law.update(state, measurement=y)
        y = 0.8 * y + float(state.output) - 0.3
    assert y == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    ("gains", "message"),
    [
        ({"kp": -1.0}, "kp must be finite and not negative, got -1.0"),
        ({"ki": math.inf}, "ki must be finite"),
        ({"kd": math.nan}, "kd must be finite"),
        ({"setpoint": math.nan}, "setpoint must be finite"),
        ({"lower": 1.0, "upper": 0.0}, "lower must not exceed upper, got 1.0 and 0.0"),
        ({"rate_limit": 0.0}, "rate_limit must be positive"),
        ({"derivative_decay": 1.0}, r"derivative_decay must be in \[0, 1\)"),
        ({"integral_limit": -1.0}, "integral_limit must not be negative"),
    ],
)
def test_gains_are_checked(gains, message):
    with pytest.raises(ValueError, match=message):
        PID(**gains)


@pytest.mark.parametrize("limit", ["lower", "upper"])
def test_a_limit_that_is_no_number_is_refused(limit):
    law = PID(kp=1.0, ki=0.5, setpoint=1.0)
    state = law.update(law.init(), measurement=0.0, **{limit: math.nan})
    assert (int(state.step), int(state.non_finite)) == (0, 1)
