import dataclasses
import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from safe_ops.controllers import EMA, PHASE_NAMES, PID, EntropyGatedKL, Momentum, Phase
from safe_ops.gated_kl import gated_kl_penalty, momentum_penalty

SHORT = EntropyGatedKL(
    coef=1.0,
    momentum=Momentum(window=3),
    velocity=Momentum(window=3),
    phases=Phase(warm_up=5, window=4, dwell=3),
)
SAMPLED = {"paper": EntropyGatedKL.paper(), "default": EntropyGatedKL(), "short": SHORT}


def run(law, kl, entropy=1.9, reward=0.0):
    """All states; each measurement a list or a constant."""
    length = max(len(x) for x in (kl, entropy, reward) if isinstance(x, list))
    columns = [x if isinstance(x, list) else [x] * length for x in (kl, entropy, reward)]
    states = [law.init()]
    for k, h, r in zip(*columns, strict=True):
        states.append(law.update(states[-1], kl=k, entropy=h, reward=r))
    return states[1:]


def test_by_hand():
    # Gate 2/(1.5+.1) = 1.25. KL filtered (d = 0.7): 0.8, then (0.3*1.2 + 0.21*0.8)/0.51.
    first, second = run(SHORT, [0.8, 1.2], entropy=1.5)
    assert float(first.kl_threshold) == pytest.approx(0.45)
    assert float(first.kl_coef) == pytest.approx(2 * 1.25 * (0.8 - 0.45))
    assert float(first.kl_penalty) == pytest.approx(1.25 * (0.8 - 0.45) ** 2)
    kl = (0.3 * 1.2 + 0.21 * 0.8) / 0.51
    momentum = (kl - 0.8) / 3
    assert float(second.kl) == pytest.approx(kl)
    assert float(second.kl_momentum) == pytest.approx(momentum)
    assert float(second.kl_lead) == pytest.approx(5 * momentum)
    assert float(second.kl_coef) == pytest.approx(2.5 * (kl + 5 * momentum - 0.45), rel=1e-5)


def paper_reference(kls, entropies, rewards):
    """Facts section 1 in float64 lists, with its EMAs bias-corrected."""
    raw_kl = raw_reward = integral = 0.0
    filtered, smooth, rows, velocities = [], [], [], []
    for t, (kl, entropy, reward) in enumerate(zip(kls, entropies, rewards, strict=True), 1):
        raw_kl = 0.9 * raw_kl + 0.1 * kl
        filtered.append(raw_kl / (1 - 0.9**t))
        raw_reward = 0.95 * raw_reward + 0.05 * reward
        smooth.append(raw_reward / (1 - 0.95**t))
        velocities.append(smooth[-1] - smooth[-2] if t > 1 else 0.0)
        error = velocities[-1] - 0.001
        integral = min(1.0, max(-1.0, integral + error))
        slope = velocities[-1] - velocities[-2] if t > 1 else 0.0
        shift = 0.3 * error + 0.01 * integral + 0.05 * slope
        half = max(1, min(50, t // 2))
        last, before = rewards[t - half : t], rewards[t - 2 * half : t - half]
        mean = sum(last) / half
        spread = (sum((r - mean) ** 2 for r in last) / max(1, half - 1)) ** 0.5
        if t <= 50:
            phase = 0
        elif mean > sum(before) / half + 0.01:
            phase = 1
        elif spread < 0.02 and mean > 0.7:
            phase = 2
        else:
            phase = 3
        tau = min(0.6, max(0.1, (0.3 + shift) * (1.5, 1.2, 1.0, 0.8)[phase]))
        gate = max(0.5, 2.0 / (entropy + 0.1))
        rise = max(0.0, (filtered[-1] - filtered[max(0, t - 51)]) / 50)
        over = max(0.0, filtered[-1] - tau)
        rows.append(
            {
                "phase": phase,
                "kl_threshold": tau,
                "entropy_gate": gate,
                "kl_penalty": gate * (0.1 * over**2 + 5 * rise**2),
                "kl_coef": gate * (2 * 0.1 * over + 2 * 5 * rise / 50),
            }
        )
    return rows


def test_paper_is_the_printed_law():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 130, generator=generator).tolist()
    kls = [0.006 * t + 0.05 * n for t, n in enumerate(noise[0])]
    entropies = [abs(2.0 + n) for n in noise[1]]
    rewards = [min(0.75, 0.03 * t) + 0.005 * n for t, n in enumerate(noise[2])]
    states = run(EntropyGatedKL.paper(), kls, entropies, rewards)
    expected = paper_reference(kls, entropies, rewards)
    assert {row["phase"] for row in expected} == {0, 1, 2}
    for t, (state, row) in enumerate(zip(states, expected, strict=True)):
        for name, value in row.items():
            got = float(getattr(state, name))
            assert got == pytest.approx(value, rel=1e-3, abs=1e-5), (t, name)


def test_paper_gate_has_no_upper_bound():
    assert float(run(EntropyGatedKL.paper(), [0.1], entropy=0.0)[-1].entropy_gate) == 20.0
    assert float(run(EntropyGatedKL(), [0.1], entropy=0.0)[-1].entropy_gate) == 4.0


@settings(max_examples=15, deadline=None)
@given(
    kls=st.lists(st.floats(0, 2, width=32), min_size=1, max_size=6),
    entropy=st.floats(0, 8, width=32),
    offset=st.sampled_from([0.0, 0.1]),
    momentum_coef=st.sampled_from([0.0, 5.0]),
)
def test_kl_coef_is_the_derivative_of_the_penalty(kls, entropy, offset, momentum_coef):
    law = dataclasses.replace(
        SHORT, momentum_coef=momentum_coef, kl_integral=PID(ki=offset, lower=0.0, upper=0.3)
    )
    state = run(law, kls, entropy)[-1]
    kl = state.kl.double().requires_grad_()
    gate = state.entropy_gate.double()
    lead = (state.kl_lead + state.kl_offset).double()
    penalty = gated_kl_penalty(
        kl, threshold=state.kl_threshold.double(), gate=gate, coef=1.0, lead=lead
    ) + gate * momentum_penalty(kl, state.momentum.past.double(), window=3, coef=momentum_coef)
    [slope] = torch.autograd.grad(penalty, kl)
    assert float(state.kl_penalty) == pytest.approx(float(penalty.detach()), rel=1e-4, abs=1e-6)
    assert float(state.kl_coef) == pytest.approx(float(slope), rel=1e-4, abs=1e-5)


def test_a_rising_kl_is_penalised_earlier_than_a_level_one():
    level, rising = run(SHORT, [0.5] * 4)[-1], run(SHORT, [0.35, 0.4, 0.45, 0.7])[-1]
    assert float(rising.kl_lead) > 0 == float(level.kl_lead)
    without = run(dataclasses.replace(SHORT, horizon=0.0), [0.35, 0.4, 0.45, 0.7])[-1]
    assert float(rising.kl_coef) > float(without.kl_coef)


def test_the_trend_is_the_slope_of_a_ramp_once_the_long_average_has_seen_it():
    law = dataclasses.replace(
        SHORT, trend_weight=1.0, kl_filter=EMA(decay=0.5), kl_long_filter=EMA(decay=0.8)
    )
    states = run(law, [0.01 * t for t in range(60)])
    trends = [float(s.kl_trend) for s in states]
    assert trends[-1] == pytest.approx(0.01, rel=1e-3)
    assert float(states[-1].kl_lead) == pytest.approx(0.05, rel=1e-3)
    # It starts at 0 and grows into the slope: no kick from two noisy neighbours.
    assert trends == sorted(trends)
    assert trends[0] == 0


def test_trend_by_hand():
    # d = 0.5: 1, then (0.5*1.6 + 0.25*1)/0.75; d = 0.8: (0.2*1.6 + 0.16*1)/0.36; lags 1 and 4.
    law = dataclasses.replace(
        SHORT, trend_weight=0.25, kl_filter=EMA(decay=0.5), kl_long_filter=EMA(decay=0.8)
    )
    state = run(law, [1.0, 1.6])[-1]
    short, long = 1.05 / 0.75, 0.48 / 0.36
    assert float(state.kl_trend) == pytest.approx((short - long) / 3, rel=1e-4)
    rate = 0.75 * (short - 1.0) / 3 + 0.25 * (short - long) / 3
    assert float(state.kl_lead) == pytest.approx(5 * rate, rel=1e-4)
    assert float(state.kl_coef) == pytest.approx(2 * (short + 5 * rate - 0.45), rel=1e-4)


def test_parts_that_are_off_stay_as_they_began():
    state = run(SHORT, [0.1, 0.9, 0.5])[-1]
    assert int(state.kl_long_filter.step) == int(state.kl_integral.step) == 0
    assert float(state.kl_trend) == float(state.kl_offset) == 0.0


def test_gate_answers_to_an_entropy_that_rises():
    law = dataclasses.replace(SHORT, entropy_floor=1.0, entropy_ceiling=3.0, gate_upper=2.0)
    entropies = [0.9, 2.0, 2.9, 4.4, 5.9, 50.0]
    gates = [float(s.entropy_gate) for s in run(law, 0.1, entropies)]
    assert gates == pytest.approx([1.0, 0.7, 1.0, 1.5, 2.0, 2.0])
    without = dataclasses.replace(law, entropy_ceiling=math.inf)
    assert float(run(without, [0.1], 50.0)[-1].entropy_gate) == 0.5


def test_a_falling_kl_has_no_lead():
    assert float(run(SHORT, [1.0, 0.8, 0.6])[-1].kl_lead) == 0.0


def test_coef_0_is_no_penalty():
    state = run(dataclasses.replace(SHORT, coef=0.0), [5.0, 9.0])[-1]
    assert (float(state.kl_coef), float(state.kl_penalty)) == (0.0, 0.0)


anything = st.lists(
    st.tuples(*[st.floats(width=32) | st.floats(-1, 4, width=32)] * 3), min_size=1, max_size=10
)


@pytest.mark.parametrize("law", SAMPLED.values(), ids=SAMPLED)
@settings(max_examples=15, deadline=None)
@given(rows=anything)
def test_outputs_stay_within_their_clamps(law, rows):
    before = float(law.init().kl_threshold)
    for state in run(law, *[list(column) for column in zip(*rows, strict=True)]):
        tau = float(state.kl_threshold)
        assert 0.1 - 1e-6 <= tau <= 0.6 + 1e-6
        assert abs(tau - before) <= law.threshold_rate + 1e-6
        assert law.gate_lower <= float(state.entropy_gate) <= law.gate_upper
        assert abs(float(state.threshold_shift)) <= law.pid_authority * 0.5 + 1e-6
        assert float(state.kl_coef) >= 0
        assert float(state.kl_penalty) >= 0
        assert float(state.kl_lead) >= 0
        assert 0 <= int(state.phase) < len(PHASE_NAMES)
        before = tau


def test_the_kl_is_controlled_while_the_reward_is_missing():
    states = run(SHORT, [0.2] * 8 + [2.0] * 4, reward=[0.1 * t for t in range(8)] + [math.nan] * 4)
    assert float(states[7].kl_coef) == 0 < float(states[-1].kl_coef)
    assert torch.equal(states[7].kl_threshold, states[-1].kl_threshold)
    assert int(states[-1].phases.non_finite) == int(states[-1].pid.non_finite) == 4
    assert int(states[-1].kl_filter.non_finite) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_missing_kl_never_opens_the_loop(bad):
    states = run(SHORT, [1.5] * 3 + [bad] * 5)
    # Still f' at the last good KL, under the threshold of today.
    assert float(states[-1].kl_coef) == pytest.approx(
        2 * (1.5 - float(states[-1].kl_threshold)), rel=1e-5
    )
    assert int(states[-1].non_finite) == 5


def test_a_missing_entropy_holds_the_gate():
    states = run(SHORT, [0.5] * 3, entropy=[1.0, math.nan, math.inf])
    assert {float(s.entropy_gate) for s in states} == {float(states[0].entropy_gate)}


def test_an_entropy_below_0_has_the_strongest_gate():
    assert float(run(SHORT, [0.5], entropy=-0.5)[-1].entropy_gate) == 4.0


def test_velocity_is_in_deviations_of_the_reward():
    # EMA (d = 0.95) of 1, 3 is 1 + 2/1.95; over the window of 3; the only deviation is 2.
    states = run(SHORT, 0.1, reward=[1.0, 3.0])
    assert float(states[0].reward_velocity) == 0.0
    assert float(states[1].reward_deviation.value) == 2.0
    assert float(states[1].reward_velocity) == pytest.approx(2 / 1.95 / 3 / 2)


def test_threshold_follows_the_reward():
    law = dataclasses.replace(SHORT, phases=Phase(warm_up=5, window=4, factors=(1.0,) * 4))
    wave = [0.02 * (-1) ** t for t in range(25)]
    rising = run(law, 0.1, reward=[0.1 * t + w for t, w in enumerate(wave)])[-1]
    falling = run(law, 0.1, reward=[-0.1 * t + w for t, w in enumerate(wave)])[-1]
    assert float(falling.kl_threshold) < 0.28
    assert float(rising.kl_threshold) > 0.32


@pytest.mark.parametrize("scale", [0.125, 16.0])
def test_threshold_does_not_depend_on_the_rewards_unit(scale):
    rewards = [float(t % 5 + 0.3 * t) for t in range(16)]
    a = run(SHORT, 0.1, reward=rewards)
    b = run(SHORT, 0.1, reward=[scale * r for r in rewards])
    for one, other in zip(a, b, strict=True):
        assert float(one.kl_threshold) == pytest.approx(float(other.kl_threshold), abs=1e-4)


def test_a_level_reward_does_not_sink_the_threshold():
    rewards = [0.3 + 0.01 * (-1) ** t for t in range(300)]
    level = run(SHORT, 0.1, reward=rewards)[-1]
    missed = run(dataclasses.replace(SHORT, target_velocity=0.1), 0.1, reward=rewards)[-1]
    assert abs(float(level.threshold_shift)) < 0.05
    assert float(missed.threshold_shift) == pytest.approx(-0.15)


def test_pid_is_enabled_without_a_bump():
    # A rate of the threshold that hides nothing, and phases that leave it where it is.
    law = dataclasses.replace(
        SHORT,
        threshold_rate=math.inf,
        pid=PID(kp=5.0, ki=0.02, kd=1.0, rate_limit=0.01),
        phases=dataclasses.replace(SHORT.phases, factors=(1.0,) * 4),
    )
    states = run(law, 0.1, reward=[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert [int(s.pid.step) for s in states] == [0, 0, 0, 0, 0, 1, 2]
    assert float(states[5].pid.derivative) == 0.0
    assert float(states[5].pid.proportional) > 0.1
    assert [float(s.kl_threshold) for s in states[4:]] == pytest.approx([0.3, 0.31, 0.32])


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_limits_that_are_moved_are_approached_at_the_rate(scale):
    # As the ladder of interventions tightens it: a law with other limits takes up the state.
    state = run(SHORT, 0.1, reward=[0.0] * 40)[-1]
    names = ("threshold", "threshold_lower", "threshold_upper")
    law = dataclasses.replace(SHORT, **{name: scale * getattr(SHORT, name) for name in names})
    thresholds = [float(state.kl_threshold)]
    for _ in range(40):
        state = law.update(state, kl=0.1, entropy=1.9, reward=0.0)
        thresholds.append(float(state.kl_threshold))
    steps = [abs(b - a) for a, b in itertools.pairwise(thresholds)]
    assert max(steps) == pytest.approx(law.threshold_rate, abs=1e-6)
    assert thresholds[-1] == pytest.approx(scale * thresholds[0], rel=1e-4)


@pytest.mark.parametrize("limits", [{}, {"lower": 0.0}, {"lower": -0.1, "upper": 0.3}])
def test_an_offset_without_limits_is_refused(limits):
    # Below 0 it would wind down while the KL is small, and then forgive a KL that runs away.
    with pytest.raises(ValueError, match="kl_integral must have limits"):
        EntropyGatedKL(kl_integral=PID(ki=0.05, **limits))


def test_the_pids_integral_stops_where_the_threshold_stops():
    # The clamp of tau is downstream of the PID: an integral that ignored it would go on to 0.15.
    law = dataclasses.replace(
        SHORT,
        threshold_upper=0.35,
        threshold_rate=1.0,
        pid_authority=1.0,
        normalize_reward=False,
        pid_in_warm_up=True,
        reward_filter=EMA(decay=0.0),
        velocity=Momentum(window=1),
        target_velocity=0.0,
        pid=PID(ki=0.02),
        phases=Phase(warm_up=5, window=4, factors=(1.0,) * 4),
    )
    climb = [float(t) for t in range(20)]
    top = run(law, 0.1, reward=climb)[-1]
    assert float(top.pid.integral) == pytest.approx(0.05, abs=1e-6)
    assert float(top.kl_threshold) == pytest.approx(0.35)
    turned = law.update(top, kl=0.1, entropy=1.9, reward=18.0)
    assert float(turned.kl_threshold) == pytest.approx(0.33, abs=1e-6)


def closed_loop(law, steps, drift=0.03, gain=0.2):
    """KL grows by the drift and falls by gain times f'(KL), per update."""
    state, kl = law.init(), 0.1
    for _ in range(steps):
        state = law.update(state, kl=kl, entropy=1.9, reward=0.3)
        kl = max(0.0, kl + drift - gain * float(state.kl_coef))
    return state, kl


def test_alone_the_penalty_rests_above_the_threshold_by_drift_over_gain():
    # tau 0.24 on a plateau; k = 2 coef gate gain = 0.4.
    state, kl = closed_loop(SHORT, 150)
    assert float(state.kl_threshold) == pytest.approx(0.24, abs=0.01)
    assert kl == pytest.approx(float(state.kl_threshold) + 0.03 / 0.4, abs=0.01)


def test_with_integral_action_the_kl_settles_at_its_threshold():
    law = dataclasses.replace(SHORT, kl_integral=PID(ki=0.05, lower=0.0, upper=0.3))
    state, kl = closed_loop(law, 250)
    assert kl == pytest.approx(float(state.kl_threshold), abs=0.005)
    assert float(state.kl_offset) == pytest.approx(0.03 / 0.4, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coef": -1.0}, "coef must be finite and not negative, got -1.0"),
        ({"horizon": math.inf}, "horizon must be finite"),
        ({"threshold": 0.7}, "must be positive and in order, got 0.1, 0.7, 0.6"),
        ({"threshold_lower": 0.0}, "must be positive and in order"),
        ({"threshold_rate": 0.0}, "threshold_rate must be positive"),
        ({"entropy_floor": math.nan}, "entropy_floor must be positive"),
        ({"entropy_ceiling": 1.5}, "entropy_ceiling must not be below entropy_floor, got 1.5 and"),
        ({"trend_weight": 1.5}, r"trend_weight must be in \[0, 1\], got 1.5"),
        (
            {"trend_weight": 0.5, "kl_long_filter": EMA(decay=0.7)},
            "kl_long_filter must be slower than kl_filter, got decays 0.7 and 0.7",
        ),
        ({"gate_lower": 5.0}, "gate_lower must not exceed gate_upper, got 5.0 and 4.0"),
        ({"pid_authority": 0.0}, "pid_authority must be positive"),
        ({"target_velocity": math.nan}, "target_velocity must be finite"),
    ],
)
def test_parameters_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        EntropyGatedKL(**changes)
