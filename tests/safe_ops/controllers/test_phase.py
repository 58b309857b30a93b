import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from safe_ops.controllers import PHASE_NAMES, Phase

SHORT = Phase(warm_up=4, window=4, dwell=3)


def run(law, rewards):
    states = [law.init()]
    for reward in rewards:
        states.append(law.update(states[-1], reward=reward))
    return states[1:]


def names(states):
    return [PHASE_NAMES[int(s.phase)] for s in states]


def noise(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator)


def test_the_life_of_a_run():
    rewards = [*(0.01 * noise(40) + torch.linspace(0, 1, 40)), *(0.01 * noise(40, 1) + 1)]
    phases = names(run(SHORT, [float(r) for r in rewards]))
    assert phases[3] == "warm_up"
    assert set(phases[8:40]) == {"climbing"}
    # Level noise: a little of it may look like a climb, never like a plateau.
    assert phases[48:].count("converged") > 25
    assert "plateau" not in phases[41:]


def test_a_crash_is_a_plateau():
    rewards = [*torch.linspace(0, 1, 20), *[1.0] * 8, *[0.0] * 8]
    assert names(run(SHORT, [float(r) for r in rewards]))[-1] == "plateau"


def test_a_fall_from_a_high_level_is_a_plateau_at_once():
    rewards = [float(r) for r in torch.linspace(0, 1, 20)] + [1.0] * 8
    assert names(run(SHORT, rewards))[-1] == "converged"
    # Still at 0.85 of its range, but falling.
    assert names(run(SHORT, [*rewards, *[0.85] * 4]))[-1] == "plateau"


def test_a_constant_reward_is_a_plateau():
    states = run(SHORT, [0.3] * 20)
    assert set(names(states)[4:]) == {"plateau"}
    assert float(states[-1].factor) == pytest.approx(0.8)


def test_windows_by_hand():
    # W = 2. Four rewards: (1, 2) and (4, 6). Error: sqrt((0.5 + 2) / 2).
    state = run(Phase(warm_up=0, window=2, enter=3.0), [1.0, 2.0, 4.0, 6.0])[-1]
    assert float(state.rise) == pytest.approx(3.5)
    assert float(state.rise_error) == pytest.approx(1.25**0.5, rel=1e-4)
    assert PHASE_NAMES[int(state.phase)] == "climbing"
    # Five: the window slides, (2, 4) and (6, 0).
    state = run(Phase(warm_up=0, window=2), [1.0, 2.0, 4.0, 6.0, 0.0])[-1]
    assert float(state.rise) == pytest.approx(0.0)
    assert (float(state.lowest), float(state.highest)) == (1.5, 5.0)


def test_before_the_windows_are_full_they_are_halves():
    state = run(Phase(warm_up=0, window=50), [1.0, 2.0, 4.0, 6.0, 9.0])[-1]
    assert float(state.rise) == pytest.approx(7.5 - 3.0)


@settings(max_examples=20, deadline=None)
@given(
    rewards=st.lists(st.floats(-8, 8, width=16), min_size=5, max_size=20),
    scale=st.sampled_from([0.25, 4.0, 64.0]),
)
def test_phases_do_not_depend_on_the_rewards_unit(rewards, scale):
    # Powers of two scale without rounding, so this holds on every limit too.
    assert names(run(SHORT, rewards)) == names(run(SHORT, [scale * r for r in rewards]))


def test_phases_do_not_depend_on_the_rewards_zero():
    rewards = [float(r) for r in noise(60).cumsum(0)]
    phases = names(run(SHORT, rewards))
    assert set(phases) == set(PHASE_NAMES)
    assert phases == names(run(SHORT, [r + 2.0 for r in rewards]))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-5, 5, width=32), max_size=25))
def test_a_phase_lasts_at_least_its_dwell(rewards):
    phases = names(run(SHORT, rewards))
    switches = [t for t in range(1, len(phases)) if phases[t] != phases[t - 1]]
    assert all(b - a >= SHORT.dwell for a, b in itertools.pairwise(switches))
    assert phases[:4] == ["warm_up"] * len(phases[:4])
    assert "warm_up" not in phases[4:]


def test_does_not_flap_where_the_printed_rule_does():
    rewards = [float(r) for r in 0.04 * noise(600) + 0.7]
    ours, printed = run(Phase(), rewards), run(Phase.paper(), rewards)

    def switches(states):
        return sum(a.phase != b.phase for a, b in itertools.pairwise(states))

    assert switches(ours) <= 5 < 15 <= switches(printed)


def test_hysteresis():
    # A climb of 1.4 standard errors: kept by a climbing run, not enough to begin one.
    limits = {"warm_up": 0, "window": 2, "dwell": 1}
    rewards = [0.0, 0.1, 1.0, 1.1, 1.1, 1.27]
    z = [float(s.rise / s.rise_error) for s in run(Phase(**limits), rewards)]
    assert 1 < z[-1] < 3
    assert names(run(Phase(**limits), rewards))[3] == "climbing"
    assert names(run(Phase(**limits), rewards))[-1] == "climbing"
    assert names(run(Phase(**limits, leave=2.0), rewards))[-1] != "climbing"


def test_paper_by_hand():
    law = Phase.paper()
    ramp = [0.01 * t for t in range(100)]
    assert set(names(run(law, ramp))[:50]) == {"warm_up"}
    assert names(run(law, ramp))[-1] == "climbing"
    assert names(run(law, [0.8] * 60))[-1] == "converged"
    assert names(run(law, [0.6] * 60))[-1] == "plateau"
    assert names(run(law, [0.77, 0.83] * 30))[-1] == "plateau"
    assert [float(law.update(law.init(), reward=0.0).factor)] == [1.5]


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"window": 1}, "window must be a whole number, at least 2, got 1"),
        ({"warm_up": -1}, "warm_up must be"),
        ({"dwell": 0}, "dwell must be"),
        ({"leave": 5.0}, "leave <= enter, got 5.0, 4.0"),
        ({"moved": -1.0}, "moved must be finite and not negative"),
        ({"level_leave": 0.9}, "level_leave must not exceed level_enter"),
        ({"factors": (1.0, 1.0, 0.0, 1.0)}, "factors must be four positive numbers"),
        ({"factors": (1.0, 1.0)}, "factors must be four positive numbers"),
        # 0 in float32.
        ({"factors": (1e-50, 1.0, 1.0, 1.0)}, "factors must be four positive numbers"),
        ({"spread_limit": 0.0}, "spread_limit must be positive"),
    ],
)
def test_parameters_are_checked(settings_, message):
    with pytest.raises(ValueError, match=message):
        Phase(**settings_)
