"""The formulas of docs/stability.md against roots, simulation and the laws themselves."""

import dataclasses
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor

from safe_ops.controllers import (
    EMA,
    PID,
    EntropyGatedKL,
    Momentum,
    Phase,
    global_gain,
    kl_excess_bound,
    reward_loop_gain,
    smooth_gain,
    stable_gain,
    stable_gain_with_momentum,
)
from tests.reference.closed_loops import late_switches, with_adam, with_reward, without_reward
from tests.reference.kl_plant import simulate, swing
from tests.strategies import PROPERTY

DRIFT, THRESHOLD = 0.01, 0.3
decays = st.floats(0.0, 0.95)
# Each example is a run of thousands of updates.
RUNS = settings(PROPERTY, max_examples=12)


def loop_matrix(
    decay: float, gain: float, *, ki: float = 0.0, delay: int = 0, momentum: float = 0.0
) -> Tensor:
    """One update of (KL, s, o, averaged penalty, waiting penalty), all as deviations from rest."""
    kl, s, o, averaged, waiting = torch.eye(5, dtype=torch.float64)
    new_averaged = momentum * averaged + (1 - momentum) * gain * (s + o)
    new_kl = kl - (waiting if delay else new_averaged)
    new_s = decay * s + (1 - decay) * new_kl
    rows = [new_kl, new_s, o + ki * new_s, new_averaged, new_averaged]
    keep = [0, 1, *([2] if ki else []), 3, 4]
    return torch.stack(rows)[keep][:, keep]


def radius(matrix: Tensor) -> float:
    return float(torch.linalg.eigvals(matrix).abs().max())


# --- the local limits are those of the roots ----------------------------------------------------


@PROPERTY
@given(decay=st.floats(0.0, 0.99), ki=st.floats(0, 0.5), delay=st.sampled_from([0, 1]))
@example(decay=0.9, ki=0.0, delay=0)
@example(decay=0.9, ki=0.1, delay=0)
@example(decay=0.9, ki=0.12, delay=0)
@example(decay=0.5, ki=0.3, delay=1)
def test_stable_gain_is_where_the_roots_leave_the_circle(decay, ki, delay):
    ki = ki if ki > 1e-3 else 0.0
    limit = stable_gain(decay, ki=ki, delay=delay)
    if limit > 0.02:
        assert radius(loop_matrix(decay, 0.99 * limit, ki=ki, delay=delay)) < 1
    for gain in (1.01 * limit + 0.01, 3 * limit + 0.1):
        assert radius(loop_matrix(decay, gain, ki=ki, delay=delay)) > 1


@PROPERTY
@given(decay=st.floats(0.05, 0.95), momentum=st.floats(0.0, 0.99))
@example(decay=0.7, momentum=0.9)
@example(decay=0.7, momentum=0.05)
def test_stable_gain_with_momentum_is_where_the_roots_leave_the_circle(decay, momentum):
    limit = stable_gain_with_momentum(decay, momentum=momentum)
    assert radius(loop_matrix(decay, 0.99 * limit, momentum=momentum)) < 1
    assert radius(loop_matrix(decay, 1.02 * limit, momentum=momentum)) > 1


def test_without_momentum_it_is_the_plain_limit():
    assert stable_gain_with_momentum(0.7, momentum=0.0) == pytest.approx(stable_gain(0.7))
    assert stable_gain_with_momentum(0.0, momentum=0.9) == pytest.approx(38.0)


@PROPERTY
@given(decay=st.floats(0.05, 0.95), delay=st.sampled_from([0, 1]))
def test_smooth_gain_is_where_the_roots_become_complex(decay, delay):
    limit = smooth_gain(decay, delay=delay)
    inside = torch.linalg.eigvals(loop_matrix(decay, 0.99 * limit, delay=delay))
    outside = torch.linalg.eigvals(loop_matrix(decay, 1.01 * limit, delay=delay))
    assert float(inside.imag.abs().max()) < 1e-6
    assert float(outside.imag.abs().max()) > 1e-4


# --- simulation ---------------------------------------------------------------------------------


def small_swing(
    decay: float,
    gain: float,
    *,
    ki: float = 0.0,
    delay: int = 0,
    drift: float = DRIFT,
    share: float = 0.02,
) -> tuple[float, ...]:
    """Deviation at the start, a share of the active side of the ramp, and at the end."""
    offset = drift / gain
    start, held = (THRESHOLD, offset) if ki else (THRESHOLD + offset, 0.0)
    kls = simulate(
        decay,
        gain,
        start=start + share * offset,
        drift=drift,
        steps=2000,
        keep=100,
        ki=ki,
        delay=delay,
        offset_start=held,
    )
    return abs(share) * offset, float((kls - start).abs().max())


drifts = st.floats(1e-3, 0.05)
# On both sides of the rest point, within the active side of the ramp.
starts = st.floats(0.005, 0.05) | st.floats(-0.05, -0.005)


@RUNS
@given(
    decay=decays,
    share=st.floats(0.05, 0.9),
    ki_share=st.sampled_from([0.0, 0.3, 0.7]),
    delay=st.sampled_from([0, 1]),
    drift=drifts,
    start=starts,
)
def test_inside_the_local_region_small_disturbances_die_out(
    decay, share, ki_share, delay, drift, start
):
    ki = ki_share * ((1 - decay) if delay else min(1.0, (1 - decay) / max(decay, 1e-9)))
    gain = share * stable_gain(decay, ki=ki, delay=delay)
    before, after = small_swing(decay, gain, ki=ki, delay=delay, drift=drift, share=start)
    assert after < 0.5 * before


@RUNS
@given(
    decay=decays,
    factor=st.floats(1.1, 4.0),
    delay=st.sampled_from([0, 1]),
    drift=drifts,
    start=starts,
)
def test_outside_it_the_loop_keeps_swinging_and_does_not_diverge(
    decay, factor, delay, drift, start
):
    gain = factor * stable_gain(decay, delay=delay)
    before, after = small_swing(decay, gain, delay=delay, drift=drift, share=start)
    assert after > 2 * before
    # One-sided ramp and the floor at 0: the swing is bounded, here by the drift and the fall to 0.
    assert after < THRESHOLD + kl_excess_bound(decay, gain=gain, drift=drift) * (1 + delay)


def test_inside_the_local_region_large_swings_can_persist():
    # b = 0.99, k = 120: the limit is 398, and the swing from a run's own start stays.
    assert stable_gain(0.99) == pytest.approx(398.0)
    [kls] = [simulate(0.99, 120.0, start=0.0, steps=6000, keep=600)]
    assert float(swing(kls)) > 50 * DRIFT / 120
    before, after = small_swing(0.99, 120.0)
    assert after < before


@PROPERTY
@given(
    decay=st.floats(0.01, 0.95),
    share=st.floats(0.1, 0.999),
    drift=st.floats(1e-3, 0.1),
    kl=st.floats(0, 30),
    filtered=st.floats(0, 30),
)
def test_below_the_global_gain_every_start_comes_closer_at_every_update(
    decay, share, drift, kl, filtered
):
    gain = share * global_gain(decay)
    rest, s = THRESHOLD + drift / gain, filtered

    def distance() -> float:
        return (kl - rest) ** 2 + (s - kl) ** 2 / decay

    for _ in range(300):
        before = distance()
        kl = max(0.0, kl + drift - gain * max(0.0, s - THRESHOLD))
        s = decay * s + (1 - decay) * kl
        assert distance() <= before * (1 + 1e-9) + 1e-12


numbers = st.lists(st.floats(0, 1), min_size=40, max_size=40)


@PROPERTY
@given(
    decay=st.floats(0.0, 0.98),
    gain=st.floats(0.005, 20),
    drifts=numbers,
    gates=numbers,
    leads=numbers,
    falls=numbers,
)
def test_the_kl_never_exceeds_its_bound(decay, gain, drifts, gates, leads, falls):
    kl = s = 0.0
    threshold, drift, rate = 0.6, 0.03, 0.01
    bound = kl_excess_bound(decay, gain=gain, drift=drift, threshold_rate=rate)
    for more, gate, lead, fall in [*zip(drifts, gates, leads, falls, strict=True)] * 5:
        assert kl - threshold <= bound * (1 + 1e-9)
        s = decay * s + (1 - decay) * kl
        penalty = gain * (1 + 9 * gate) * max(0.0, s + 0.1 * lead - threshold)
        kl = max(0.0, kl + drift * more - penalty)
        # Up at will, down at most by the rate.
        threshold = 0.6 if fall > 0.95 else max(0.1, threshold - rate * fall)


@pytest.mark.parametrize("rate", [0.0, 0.002])
def test_the_bound_is_reached(rate):
    # A constant drift, and a threshold that falls for as long as the loop needs.
    decay, gain, drift, threshold = 0.7, 0.05, 0.01, 1.0
    kl = s = threshold
    for _ in range(200):
        s = decay * s + (1 - decay) * kl
        kl += drift - gain * max(0.0, s - threshold)
        threshold -= rate
    bound = kl_excess_bound(decay, gain=gain, drift=drift, threshold_rate=rate)
    assert kl - threshold == pytest.approx(bound, rel=1e-3)


# --- the law itself in the loop -----------------------------------------------------------------

FAST = EntropyGatedKL(
    coef=0.5,
    trend_weight=0.3,
    entropy_floor=1.0,
    entropy_ceiling=3.0,
    kl_integral=PID(ki=0.05, lower=0.0, upper=0.3),
    momentum=Momentum(window=4),
    velocity=Momentum(window=4),
    reward_filter=EMA(decay=0.8),
    phases=Phase(warm_up=6, window=5, dwell=3),
)


@RUNS
@given(
    effect=st.floats(0.05, 10),
    drifts=st.lists(st.floats(0, 1), min_size=60, max_size=60),
    entropies=st.lists(st.floats(0, 6), min_size=60, max_size=60),
    rewards=st.lists(st.floats(-1, 1), min_size=60, max_size=60),
)
def test_the_whole_law_keeps_the_kl_within_the_bound(effect, drifts, entropies, rewards):
    # Phases, PID, gate, lead and offset all at work; the smallest gate counts.
    gain = 2 * FAST.coef * FAST.gate_lower * effect
    bound = kl_excess_bound(
        FAST.kl_filter.decay, gain=gain, drift=0.05, threshold_rate=FAST.threshold_rate
    )
    state, kl, reward = FAST.init(), 0.0, 0.0
    for drift, entropy, change in zip(drifts, entropies, rewards, strict=True):
        reward += change
        state = FAST.update(state, kl=kl, entropy=entropy, reward=reward)
        assert kl - float(state.kl_threshold) <= bound + 1e-5
        kl = max(0.0, kl + 0.05 * drift - effect * float(state.kl_coef))


@RUNS
@given(
    rate=st.floats(0.001, 0.1),
    changes=st.lists(st.floats(-1, 1), min_size=40, max_size=40),
    ki=st.sampled_from([0.0, 0.05]),
)
def test_a_reward_of_bounded_drift_moves_the_threshold_by_a_bounded_shift(rate, changes, ki):
    law = dataclasses.replace(
        FAST,
        normalize_reward=False,
        pid_in_warm_up=True,
        pid=PID(kp=1.5, ki=ki),
        phases=Phase(factors=(1.0,) * 4),
    )
    state, reward, largest = law.init(), 0.0, 0.0
    authority = law.pid_authority * (law.threshold_upper - law.threshold_lower)
    for change in changes:
        state = law.update(state, kl=0.0, entropy=1.9, reward=reward)
        largest = max(largest, abs(reward))
        # The velocities add up to the way of the filtered reward, from 0.
        shift = min(authority, 1.5 * rate + 2 * ki * largest)
        assert abs(float(state.reward_velocity)) <= rate * (1 + 1e-4) + 1e-6
        assert abs(float(state.kl_threshold) - law.threshold) <= shift + 1e-5
        reward += rate * change


@RUNS
@given(
    rate=st.floats(0.001, 0.1),
    changes=st.lists(st.floats(-1, 1), min_size=80, max_size=80),
    drifts=st.lists(st.floats(0, 1), min_size=80, max_size=80),
    effect=st.floats(0.05, 10),
    ki=st.sampled_from([0.0, 0.05]),
)
@example(rate=0.02, changes=[1.0] * 40 + [-1.0] * 40, drifts=[1.0] * 80, effect=0.2, ki=0.05)
def test_the_kl_of_the_whole_law_under_a_reward_of_bounded_drift(rate, changes, drifts, effect, ki):
    law = dataclasses.replace(
        FAST, normalize_reward=False, pid_in_warm_up=True, pid=PID(kp=1.5, ki=ki)
    )
    gain = 2 * law.coef * law.gate_lower * effect
    excess = kl_excess_bound(
        law.kl_filter.decay, gain=gain, drift=0.05, threshold_rate=law.threshold_rate
    )
    authority = law.pid_authority * (law.threshold_upper - law.threshold_lower)
    state, kl, reward, factor, filtered = law.init(), 0.0, 0.0, 0.0, [0.0]
    for change, drift in zip(changes, drifts, strict=True):
        state = law.update(state, kl=kl, entropy=1.9, reward=reward)
        filtered.append(float(state.reward_filter.value))
        factor = max(factor, float(state.phases.factor))
        way = max(filtered) - min(filtered)
        highest = factor * (law.threshold + min(authority, 1.5 * rate + ki * way))
        assert float(state.kl_threshold) <= highest + 1e-5
        assert kl <= min(highest, law.threshold_upper) + excess + 1e-5
        reward += rate * change
        kl = max(0.0, kl + 0.05 * drift - effect * float(state.kl_coef))


# Phases that do not move the threshold; without_reward keeps the gate at its largest.
AT_REST = EntropyGatedKL(coef=1.0, horizon=0.0, phases=Phase(factors=(1.0,) * 4))
LARGEST = 2 * AT_REST.coef * AT_REST.gate_upper


@RUNS
@given(
    decay=st.floats(0.2, 0.9),
    share=st.floats(0.1, 0.8),
    delay=st.sampled_from([0, 1]),
    drift=drifts,
    start=starts,
)
def test_the_law_at_its_largest_gate_settles_inside_the_local_region(
    decay, share, delay, drift, start
):
    law = dataclasses.replace(AT_REST, kl_filter=EMA(decay=decay))
    gain = share * stable_gain(decay, delay=delay)
    rest = law.threshold + drift / gain
    disturbance = start * drift / gain
    late = without_reward(
        law, gain / LARGEST, start=rest + disturbance, drift=drift, delay=delay, seen=rest
    )[-50:]
    assert max(late) - min(late) < 0.3 * abs(disturbance) + 1e-6
    assert sum(late) / 50 == pytest.approx(rest, abs=abs(disturbance) + 1e-5)


@pytest.mark.parametrize(
    ("horizon", "ki", "limit"),
    # With the lead: from the table of docs/stability.md.
    [(0.0, 0.0, stable_gain(0.7)), (5.0, 0.0, 4.5), (0.0, 0.1, stable_gain(0.7, ki=0.1))],
)
@pytest.mark.parametrize(("share", "settles"), [(0.8, True), (1.3, False)])
def test_the_margin_holds_at_the_largest_gate(share, settles, horizon, ki, limit):
    offset = PID(ki=ki, lower=0.0, upper=0.3)
    law = dataclasses.replace(AT_REST, horizon=horizon, kl_integral=offset)
    late = without_reward(law, share * limit / LARGEST, start=0.301)[-60:]
    assert (max(late) - min(late) < 1e-4) == settles


@pytest.mark.parametrize(("kp", "settles"), [(0.2, True), (3.0, False)])
def test_the_phase_does_not_flap_where_little_comes_back_through_the_reward(kp, settles):
    law = EntropyGatedKL(coef=0.5, pid=PID(kp=kp, ki=0.005))
    returned = reward_loop_gain(
        kp=kp, slope=1.2, deviation=0.08, decay=0.95, window=10, factor=max(law.phases.factors)
    )
    assert (returned < 0.3) if settles else (returned > 2)
    phases, thresholds = with_reward(law, noise=0.1, updates=800, seeds=16)
    assert {0, 1} < set(phases.flatten().tolist())
    switches = late_switches(phases)
    if settles:
        # Some reach their last phase late.
        assert int(switches.max()) <= 1
    else:
        assert int(switches.min()) >= 4
    assert float(thresholds.diff(dim=0).abs().max()) <= law.threshold_rate + 1e-6


# --- a real optimizer ---------------------------------------------------------------------------


def test_with_adam_the_identified_gain_tells_where_the_kl_swings():
    limit = stable_gain_with_momentum(0.7, momentum=0.9)
    quiet, gain = with_adam(10.0, beta1=0.9)
    assert gain < 0.7 * limit
    assert quiet < 1e-3
    loud, gain = with_adam(60.0, beta1=0.9)
    assert gain > 1.1 * limit
    assert loud > 0.02
    # The same penalty without the average of gradients: far inside the limit of 11.3.
    still, gain = with_adam(60.0, beta1=0.0)
    assert 2 * limit < gain < 0.2 * stable_gain(0.7)
    assert still < 1e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stable_gain(1.0), r"decay must be in \[0, 1\), got 1.0"),
        (lambda: stable_gain(0.5, ki=-1.0), "ki must be finite and not negative, got -1.0"),
        (lambda: stable_gain(0.5, delay=2), "delay must be 0 or 1, got 2"),
        (lambda: smooth_gain(0.5, delay=3), "delay must be 0 or 1, got 3"),
        (lambda: smooth_gain(-0.1), r"decay must be in \[0, 1\)"),
        (lambda: global_gain(math.nan), r"decay must be in \[0, 1\)"),
        (lambda: stable_gain_with_momentum(0.5, momentum=1.0), r"momentum must be in \[0, 1\)"),
        (
            lambda: reward_loop_gain(kp=1.0, slope=1.0, deviation=0.0, decay=0.9, window=5),
            "deviation must be positive, got 0.0",
        ),
        (lambda: kl_excess_bound(0.5, gain=0.0, drift=0.1), "gain must be positive, got 0.0"),
        (lambda: kl_excess_bound(0.5, gain=1.0, drift=-0.1), "drift must not be negative"),
        (
            lambda: kl_excess_bound(0.5, gain=1.0, drift=0.1, threshold_rate=math.nan),
            "threshold_rate must not be negative",
        ),
    ],
)
def test_arguments_are_checked(call, message):
    with pytest.raises(ValueError, match=message):
        call()
