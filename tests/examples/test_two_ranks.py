"""The example loop on two processes, started as its user starts it."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.testing import assert_close

from examples.lm_rlhf import train as example
from examples.lm_rlhf.config import smollm2_135m
from examples.lm_rlhf.models import load_policy
from safe_rl import CausalLMActorCritic, SAFELoss, SoftMinCritic, total_loss
from safe_rl.checkpoints import TrainableParameters
from safe_rl.monitoring import RunLog
from safe_rl.monitoring.run_log import split_chain
from tests.tiny_models import save_language_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SIZES = ["--batch-size", "4", "--minibatch-size", "2", "--max-new-tokens", "8", "--threads", "1"]
# The first update goes beyond the trust region and is taken back.
RATE = ["--policy-learning-rate", "0.012"]
SHARDED = ["--sharded", "--no-merged-sampling", "--checkpoint-every", "2"]


class Runs(NamedTuple):
    """Three updates at once, and two with the third after a resume; by two ranks each.

    First with a copy of the model on each rank, then with its layers divided; there the resume is
    of the folder as it was after two.
    """

    model: Path
    arguments: list[str]
    whole: Path
    cut: Path
    sharded: Path
    sharded_cut: Path


def two_ranks(
    output: Path, *arguments: str, module: str = "watched_train", scenario: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", f"tests.examples.{module}", *scenario]
    command += [str(output.with_name(output.name + "-ranks")), "--output", str(output), *arguments]
    settings = {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command,
        cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("two_ranks")
    # The demo's config begins every chat with a system message, so the model needs a template.
    model = save_language_model(folder / "model", chat=True)
    prompts = folder / "prompts.txt"
    prompts.write_text("tell me about a day\na rainy meeting\na good street\nlove\nbad day\n")
    arguments = ["--model", str(model), "--prompts", str(prompts), *SIZES, *RATE]
    for output, *more in (
        ("whole", "--steps", "3"),
        ("cut", "--steps", "2"),
        ("cut", "--steps", "3", "--resume"),
        ("sharded", "--steps", "3", *SHARDED),
        # As it was after two updates: killed, for what is on disk.
        ("sharded_cut", "--steps", "3", *SHARDED, "--resume"),
    ):
        if output == "sharded_cut":
            shutil.copytree(folder / "sharded-ranks" / "run_step2", folder / output)
        done = two_ranks(folder / output, *arguments, *more)
        assert done.returncode == 0, done.stderr
    outputs = (folder / name for name in Runs._fields[2:])
    return Runs(model, arguments, *outputs)


def held(output: Path, rank: int, what: str) -> Any:
    """What a rank wrote while it ran."""
    folder = output.with_name(output.name + "-ranks")
    return torch.load(folder / f"rank{rank}_{what}.pt", weights_only=True)


def updates(output: Path) -> list[bytes]:
    # Without the hash, which hangs on the steps asked for in the first line.
    lines = (output / "log.jsonl").read_bytes().splitlines()
    return [split_chain(line)[0] for line in lines if b'"record": "update"' in line]


def test_the_run_leaves_one_log_and_a_report(runs: Runs) -> None:
    records = [r for r in RunLog.read(runs.whole / "log.jsonl") if r["record"] == "update"]
    assert [record["step"] for record in records] == [0, 1, 2]
    assert records[0]["ratio_first"] == 1.0
    assert records[0]["kl_nats_per_token"] == 0.0
    assert records[-1]["kl_nats_per_token"] != 0.0
    timing = RunLog.read(runs.whole / "timing.jsonl")
    assert [record["step"] for record in timing] == [0, 1, 2]
    names = {path.name for path in runs.whole.iterdir()}
    states = {"checkpoint.pt", "last_good_00000000.pt"}
    assert names == states | {"log.jsonl", "timing.jsonl", "report.html", "report.png"}


def test_both_ranks_hold_the_same_weights_and_controller(runs: Runs) -> None:
    for step in (0, 3):
        first, second = (held(runs.whole, rank, f"step{step}") for rank in range(2))
        assert_close(first, second, rtol=0, atol=0)
    assert int(first["controller"]["step"]) == 3
    start = held(runs.whole, 0, "step0")
    assert any(
        (first["adapters"][name] != start["adapters"][name]).any() for name in start["adapters"]
    )


def test_wrapped_models_go_before_their_process_group(runs: Runs) -> None:
    # Else the group's threads and the interpreter may wait for each other for ever.
    for output in (runs.whole, runs.sharded):
        assert [held(output, rank, "wrapped_at_end") for rank in range(2)] == [0, 0]


def test_the_ranks_draw_different_tokens(runs: Runs) -> None:
    first, second = (held(runs.whole, rank, "piece") for rank in range(2))
    assert (first["tokens"]["response"] != second["tokens"]["response"]).any()
    for key in ("kl_coef", "entropy_gate", "response_tokens_mean"):
        assert_close(first[key], second[key], rtol=0, atol=0)


@pytest.mark.parametrize("way", ["", "sharded"])
def test_stopped_and_resumed_equals_uninterrupted(way: str, runs: Runs) -> None:
    at_once, stopped = (runs.sharded, runs.sharded_cut) if way else (runs.whole, runs.cut)
    assert updates(stopped) == updates(at_once)
    for rank in range(2):
        assert_close(held(stopped, rank, "step3"), held(at_once, rank, "step3"), rtol=0, atol=0)
    whole, cut = (
        torch.load(output / "checkpoint.pt", weights_only=True)["parts"]["random"]["ranks"]
        for output in (at_once, stopped)
    )
    assert len(whole) == 2
    assert_close(whole, cut, rtol=0, atol=0)
    assert (whole[0]["torch"] != whole[1]["torch"]).any()


def test_sharded_equals_copies(runs: Runs) -> None:
    for rank in range(2):
        copy, part = (held(output, rank, "piece") for output in (runs.whole, runs.sharded))
        assert torch.equal(part["tokens"]["response"], copy["tokens"]["response"])
        for count in (28, 6):  # adapters, and the critic
            gradients = (held(output, rank, f"gradients{count}") for output in runs[2:5:2])
            assert_close(*gradients, rtol=1e-5, atol=1e-6)
        copy, part = (held(output, rank, "step3") for output in (runs.whole, runs.sharded))
        # Its checkpoints are more.
        assert (copy.pop("last_good"), part.pop("last_good")) == ({"step": 0}, {"step": 2})
        assert_close(part, copy, rtol=1e-5, atol=1e-5)
    copies, parts = ([json.loads(line) for line in updates(o)] for o in (runs.whole, runs.sharded))
    assert [record["update_scale"] for record in parts] == [0, 1, 1]
    for copy, part in zip(copies, parts, strict=True):
        assert copy.pop("phase") == part.pop("phase")
        assert copy.pop("record") == part.pop("record")
        assert part == pytest.approx(copy, rel=1e-5, abs=1e-5)


def test_each_rank_holds_half_of_each_layer(runs: Runs) -> None:
    first, second = (held(runs.sharded, rank, "parts") for rank in range(2))
    for name, (here, of) in first.items():
        assert (here, second[name][0]) == ((of / 2, of / 2) if ".layers." in name else (of, of))
    assert sum(".layers." in name for name in first) > len(first) - 4


def test_sharded_needs_ranks_and_whole_weights_nowhere(runs: Runs, capsys) -> None:
    output = runs.whole.with_name("alone")
    arguments = ["--output", str(output), *runs.arguments]
    for more, message in (
        (["--sharded"], "error: merged_sampling must be off where layers are sharded"),
        (SHARDED, "error: sharding needs at least 2 processes, got 1: start them with torchrun"),
    ):
        assert example.main([*arguments, *more]) == 2
        assert message in capsys.readouterr().err
        assert not output.exists()


def test_the_first_gradient_is_that_of_one_process_on_both_shares(runs: Runs) -> None:
    pieces = [held(runs.whole, rank, "piece") for rank in range(2)]
    batch = torch.cat([TensorDict(piece, piece["score"].shape) for piece in pieces])
    assert batch.batch_size == (2,)
    config = dataclasses.replace(smollm2_135m(), model=str(runs.model))
    language_model = load_policy(config).language_model
    critic = SoftMinCritic(16, num_heads=config.critic_heads)
    start = held(runs.whole, 0, "step0")
    TrainableParameters(language_model).load_state_dict(start["adapters"])
    critic.load_state_dict(start["critic"])
    objective = SAFELoss(
        CausalLMActorCritic(language_model, critic),
        clip=config.clip,
        entropy_coef=config.entropy_coef,
        value_coef=config.value_coef,
    )
    total_loss(objective(batch)).backward()

    def check(parameters: list[nn.Parameter]) -> None:
        expected = [parameter.grad for parameter in parameters]
        assert any(gradient.abs().max() > 1e-4 for gradient in expected)
        for rank in range(2):
            found = held(runs.whole, rank, f"gradients{len(parameters)}")
            assert_close(found, expected, rtol=1e-5, atol=1e-6)

    check([p for p in language_model.parameters() if p.requires_grad])
    check(list(critic.parameters()))


def test_another_number_of_processes_is_refused(runs: Runs, capsys) -> None:
    before = {path: path.read_bytes() for path in runs.whole.iterdir()}
    arguments = ["--output", str(runs.whole), *runs.arguments, "--steps", "4", "--resume"]
    assert example.main(arguments) == 2
    errors = [ln for ln in capsys.readouterr().err.splitlines() if ln.startswith("error: ")]
    assert len(errors) == 1
    assert "saved by 2 processes and has 1 now: resume it with as many" in errors[0]
    assert {path: path.read_bytes() for path in runs.whole.iterdir()} == before


def test_a_minibatch_that_two_ranks_cannot_share_is_refused(runs: Runs) -> None:
    output = runs.whole.with_name("odd")
    done = two_ranks(output, *runs.arguments, "--minibatch-size", "1")
    assert done.returncode != 0
    assert "error: minibatch_size must be a multiple of the 2 processes, got 1" in done.stderr
    assert not output.exists()


def guarded(folder: Path, scenario: str, *arguments: str) -> list[dict[str, Any]]:
    """What rank 0 decided in each update, once rank 1 is seen to have done and to hold the same."""
    model = save_language_model(folder / "model", chat=True)
    prompts = folder / "prompts.txt"
    prompts.write_text("tell me about a day\na rainy meeting\na good street\nlove\nbad day\n")
    arguments = ("--model", str(model), "--prompts", str(prompts), *SIZES, *arguments)
    output = folder / "run"
    done = two_ranks(output, *arguments, module="guarded_train", scenario=(scenario,))
    assert done.returncode == 0, done.stderr
    first, second = (held(output, rank, "decisions") for rank in range(2))
    for one, other in zip(first, second, strict=True):
        for key in ("record", "events", "rates", "threshold"):
            assert one[key] == other[key]
        for key in ("adapters", "controller"):
            assert_close(one[key], other[key], rtol=0, atol=0)
        one["other_losses_finite"] = other["own_losses_finite"]
    return first


def actions(update: dict[str, Any], detector: str) -> list[str]:
    return [event["action"] for event in update["events"] if event["detector"] == detector]


def test_a_loss_that_one_rank_finds_not_finite_is_answered_alike_by_both(tmp_path: Path) -> None:
    updates = guarded(tmp_path, "poison", "--steps", "4")
    # Seen by rank 1 alone.
    assert all(all(update["own_losses_finite"]) for update in updates)
    assert [update["other_losses_finite"].count(False) for update in updates] == [0, 2, 2, 0]
    assert [u["record"]["optimizer_steps_skipped"] for u in updates] == [0, 2, 2, 0]
    assert [actions(update, "non_finite") for update in updates] == [
        [],
        ["skip_step", "lower_learning_rate"],
        ["skip_step", "roll_back"],
        [],
    ]
    assert [update["rates"][0] for update in updates] == [0.02, 0.01, 0.01, 0.01]
    start = torch.load(tmp_path / "run" / "last_good_00000000.pt", weights_only=True)
    start = list(start["parts"]["adapters"].values())
    moved = [
        any((a != b).any() for a, b in zip(update["adapters"], start, strict=True))
        for update in updates
    ]
    # Back at the start with the third, and on from there.
    assert moved == [True, True, False, True]
    assert [int(update["controller"]["step"]) for update in updates] == [1, 2, 0, 1]


def test_an_update_beyond_the_trust_region_is_shortened_alike_by_both(tmp_path: Path) -> None:
    updates = guarded(tmp_path, "trust_region", "--steps", "2")
    scales = [update["record"]["update_scale"] for update in updates]
    assert any(0 < scale < 1 for scale in scales)
    for update, scale in zip(updates, scales, strict=True):
        assert (actions(update, "trust_region") == ["shorten"]) == (0 < scale < 1)
        assert (update["record"]["kl_proposed_nats_per_token"] > 0.01) == (scale < 1)
