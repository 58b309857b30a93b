"""The TorchRL examples: a few frames of each, and what they learn."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from examples import torchrl_cartpole, torchrl_pendulum
from examples.torchrl_loop import LEARNERS, gym_environment, main, minibatches, train

ROOT = Path(__file__).parents[2]
TASKS = {"cartpole": torchrl_cartpole.TASK, "pendulum": torchrl_pendulum.TASK}
every_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


@every_task
def test_a_few_frames(task, capsys):
    short = dataclasses.replace(task, frames_per_batch=512, minibatch=128, epochs=2)
    main(short, "short", ["--loss", *LEARNERS, "--seeds", "0", "1", "--frames", "1024"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    for name, mine in zip(LEARNERS, (lines[:3], lines[3:]), strict=True):
        for seed in (0, 1):
            expected = rf"{name} seed {seed}: mean return \S+ of 20 episodes after 1024 frames"
            assert re.match(expected, mine[seed])
        assert mine[2].startswith(f"{name}: median of 2 seeds: inf frames to {task.solved:g}, ")


@every_task
@pytest.mark.parametrize("name", LEARNERS)
def test_a_seed_is_a_run(task, name):
    short = dataclasses.replace(
        task, frames_per_batch=512, minibatch=256, epochs=1, frames=512, solved=float("inf")
    )
    first, second = train(short, name, seed=3), train(short, name, seed=3)
    assert str(first) == str(second)


def test_a_solved_task_stops():
    task = dataclasses.replace(
        torchrl_cartpole.TASK, frames_per_batch=256, frames=2560, epochs=1, solved=5.0
    )
    frames, mean = train(task, "safe", seed=0)
    assert frames == 256
    assert mean >= 5.0


def test_an_episode_ends_with_its_own_last_state():
    """Restarted by TorchRL and not by gymnasium, so "next" is not the first of another episode."""
    environment = gym_environment("CartPole-v1", 2, reward_scale=0.5)
    environment.set_seed(0)
    torch.manual_seed(0)
    steps = environment.rollout(60, break_when_any_done=False)
    ended = steps["next", "terminated"].squeeze(-1)
    assert ended.any()
    last = steps["next", "observation"][ended]
    # Twelve degrees, or 2.4 units, is where an episode ends; all begin within 0.05.
    assert ((last[:, 2].abs() > 0.2) | (last[:, 0].abs() > 2.4)).all()
    follows = ended.nonzero()
    follows = follows[follows[:, 1] < 59]
    first = steps["observation"][follows[:, 0], follows[:, 1] + 1]
    assert (first.abs() <= 0.05).all()
    # The sum of rewards as the environment pays them.
    assert steps["next", "reward"].unique().tolist() == [0.5]
    assert steps["next", "episode_reward"][ended].min() >= 8
    environment.close()


def test_minibatches_hold_every_frame_once():
    frames = TensorDict({"x": torch.arange(10)}, [10])
    parts = [part["x"] for part in minibatches(frames, 4)]
    assert [len(part) for part in parts] == [4, 4, 2]
    assert torch.cat(parts).sort().values.tolist() == list(range(10))
    assert torch.cat(parts).tolist() != list(range(10))


@pytest.mark.slow
@every_task
@pytest.mark.parametrize("name", LEARNERS)
def test_learns(task, name):
    frames, mean = train(task, name, seed=0)
    assert frames is not None, mean
    assert frames < task.frames


@pytest.mark.slow
def test_two_workers(tmp_path):
    """The same loop behind a ``MultiSyncCollector``, whose workers need a main guard."""
    script = tmp_path / "two_workers.py"
    script.write_text(TWO_WORKERS)
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(
        [sys.executable, "-W", "ignore", script],
        cwd=ROOT, capture_output=True, text=True, timeout=1200, env=environment,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    report = dict(line.split() for line in run.stdout.splitlines() if line.startswith("got_"))
    assert int(report["got_frames"]) == 12 * 1024
    # One update of the law a rollout, of all workers together.
    assert int(report["got_updates"]) == 12
    # What the workers act by is what was learnt: else the two drift apart by tenths of a nat.
    assert float(report["got_stale"]) < 1e-4
    # From about 20.
    assert float(report["got_last"]) > 2 * float(report["got_first"])


@pytest.mark.slow
def test_two_workers_by_command():
    command = [sys.executable, "-W", "ignore", "-m", "examples.torchrl_cartpole"]
    run = subprocess.run(
        [*command, "--workers", "2", "--frames", "2048"],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "after 2048 frames" in run.stdout


TWO_WORKERS = """
import dataclasses

from torchrl.collectors import MultiSyncCollector

from examples.torchrl_cartpole import TASK
from examples.torchrl_loop import learn, make_collector, safe
from safe_rl import ControllerModule

if __name__ == "__main__":
    task = dataclasses.replace(TASK, frames_per_batch=1024, frames=12 * 1024)
    collector, actor = make_collector(task, seed=0, workers=2)
    assert isinstance(collector, MultiSyncCollector)
    laws, stale = [], []

    def watched(*arguments):
        learner = safe(*arguments)
        laws.extend(m for m in learner.prepare.modules() if isinstance(m, ControllerModule))

        def prepare(batch):
            batch = learner.prepare(batch)
            stale.append((batch["action_log_prob"] - batch["old_log_prob"]).abs().max().item())
            return batch

        return dataclasses.replace(learner, prepare=prepare)

    means = []
    for frames, mean, _ in learn(TASK, collector, actor, watched):
        means.append(mean)
    collector.shutdown()
    print("got_frames", frames)
    print("got_updates", int(laws[0].controller.state.step))
    print("got_stale", max(stale))
    print("got_first", means[0])
    print("got_last", means[-1])
"""
