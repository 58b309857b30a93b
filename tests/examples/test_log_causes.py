"""Why the threshold moved: from the lines of the log and the settings alone."""

import dataclasses
from itertools import pairwise
from pathlib import Path
from statistics import fmean, variance

import pytest
import torch

from examples.lm_rlhf.config import short_run_law
from examples.lm_rlhf.train import controller_record
from safe_ops.controllers import PHASE_NAMES, PID, Controller, EntropyGatedKL
from safe_rl.monitoring import RunLog

LAW = dataclasses.replace(short_run_law(), pid=PID(kp=0.1, ki=0.02, kd=0.05))
WARM_UP = PHASE_NAMES[0]


def within(value: float, lower: float, upper: float) -> float:
    return min(max(value, lower), upper)


def almost(value: float) -> object:
    return pytest.approx(value, rel=1e-4, abs=2e-6)


def rewards() -> list[float]:
    """Level, a climb, level again, a fall: with noise of 0.02."""
    noise = 0.02 * torch.randn(80, generator=torch.Generator().manual_seed(0))
    means = (
        [0.0] * 12
        + [0.05 * t for t in range(25)]
        + [1.2] * 25
        + [1.2 - 0.06 * t for t in range(18)]
    )
    return [mean + float(n) for mean, n in zip(means, noise, strict=True)]


def written(path: Path, law: EntropyGatedKL) -> list[dict]:
    """A log with the lines that the loop writes, of a controller that meets these rewards."""
    log, controller = RunLog(path), Controller(law)
    for step, reward in enumerate(rewards()):
        controller(kl=0.02 * step, entropy=1.5, reward=reward)
        line = {"record": "update", "step": step, "reward_mean": reward}
        log.write(line | controller_record(controller, safe=True))
    return RunLog.read(path)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return written(tmp_path_factory.mktemp("causes") / "log.jsonl", LAW)


def factor(line: dict) -> float:
    return LAW.phases.factors[PHASE_NAMES.index(line["phase"])]


def reach(line: dict, before: float) -> tuple[float, float]:
    """How far the threshold may move from where it was."""
    return (
        max(before - LAW.threshold_rate, LAW.threshold_lower),
        min(before + LAW.threshold_rate, LAW.threshold_upper),
    )


def thresholds_before(lines: list[dict]) -> list[float]:
    start = within(LAW.threshold * LAW.phases.factors[0], LAW.threshold_lower, LAW.threshold_upper)
    return [start, *(line["kl_threshold_nats_per_token"] for line in lines[:-1])]


def test_the_threshold_is_that_of_shift_phase_and_the_line_before(lines: list[dict]) -> None:
    authority = LAW.pid_authority * (LAW.threshold_upper - LAW.threshold_lower)
    for line, before in zip(lines, thresholds_before(lines), strict=True):
        terms = ("proportional", "integral", "derivative")
        output = sum(line[f"pid_{term}_nats_per_token"] for term in terms)
        shift = within(output, -authority, authority)
        assert line["kl_threshold_shift_nats_per_token"] == almost(shift)
        expected = within((LAW.threshold + shift) * factor(line), *reach(line, before))
        assert line["kl_threshold_nats_per_token"] == almost(expected)
    moved = {round(line["kl_threshold_nats_per_token"], 3) for line in lines}
    assert len(moved) > 20


def test_the_terms_of_the_pid_are_those_of_the_rewards_velocity(lines: list[dict]) -> None:
    authority = LAW.pid_authority * (LAW.threshold_upper - LAW.threshold_lower)
    pid, integral, derivative, last = LAW.pid, 0.0, 0.0, None
    held = 0
    for line, before in zip(lines, thresholds_before(lines), strict=True):
        found = [
            line[f"pid_{term}_nats_per_token"]
            for term in ("proportional", "integral", "derivative")
        ]
        if line["phase"] == WARM_UP:
            assert found == [0.0, 0.0, 0.0]
            continue
        velocity = line["reward_velocity"]
        error = velocity - LAW.target_velocity
        change = 0.0 if last is None else velocity - last
        proportional, last = pid.kp * error, velocity
        derivative = (
            pid.derivative_decay * derivative + (1 - pid.derivative_decay) * pid.kd * change
        )
        others = proportional + derivative
        # The integral stops where the threshold stops.
        slowest, fastest = (edge / factor(line) - LAW.threshold for edge in reach(line, before))
        free = integral + pid.ki * error
        stopped = within(
            free,
            min(max(slowest, -authority) - others, integral),
            max(min(fastest, authority) - others, integral),
        )
        held += stopped != free
        integral = stopped
        assert found == [almost(proportional), almost(integral), almost(derivative)]
        integral, derivative = found[1], found[2]
    assert 0 < held < len(lines)


def test_rise_and_its_error_are_those_of_the_rewards(lines: list[dict]) -> None:
    for number, line in enumerate(lines, start=1):
        if number < 4:
            assert (line["reward_rise"], line["reward_rise_error"]) == (0.0, 0.0)
            continue
        size = min(number // 2, LAW.phases.window)
        seen = [r["reward_mean"] for r in lines[:number]]
        windows = seen[-size:], seen[-2 * size : -size]
        assert line["reward_rise"] == almost(fmean(windows[0]) - fmean(windows[1]))
        error = (sum(map(variance, windows)) / size) ** 0.5
        assert line["reward_rise_error"] == pytest.approx(error, rel=1e-3, abs=1e-5)


def test_a_climb_begins_and_ends_where_the_rise_says(lines: list[dict]) -> None:
    begun = ended = 0
    for before, line in pairwise(lines):
        was, now = (x["phase"] == "climbing" for x in (before, line))
        errors = line["reward_rise"] / line["reward_rise_error"] if line["reward_rise_error"] else 0
        if now and not was:
            assert errors > LAW.phases.enter
            begun += 1
        if was and not now:
            assert errors <= LAW.phases.leave
            ended += 1
    assert begun >= 1
    assert ended >= 1
    assert {line["phase"] for line in lines} == set(PHASE_NAMES)
