"""What guards a run, provoked as a user would: a bad gradient, a wild learning rate, edits."""

import dataclasses
import hashlib
from pathlib import Path

import pytest
import torch

from examples.lm_rlhf import train as example
from examples.lm_rlhf.config import CONFIGS, short_run_law, tiny
from safe_ops import gated_kl_penalty
from safe_rl.monitoring import RunLog
from safe_rl.monitoring.audit import audit_log
from safe_rl.monitoring.detectors import Alarm, KLRunaway
from safe_rl.monitoring.monitor import Monitor
from safe_rl.monitoring.run_log import split_chain
from tests.tiny_models import save_language_model

pytestmark = [
    # transformers warns of its own renaming when peft wraps a model.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch, model: Path):
    def call(**changes) -> None:
        config = dataclasses.replace(tiny(str(model)), **changes)
        monkeypatch.setitem(CONFIGS, "smollm2_135m", lambda: config)

    return call


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("tell me about a day\na rainy meeting\na good street\n")
    return path


@pytest.fixture
def run(prompts: Path):
    def call(output: Path, *more: str) -> int:
        return example.main(["--output", str(output), "--prompts", str(prompts), *more])

    return call


def records(output: Path, kind: str) -> list[dict]:
    return [r for r in RunLog.read(output / "log.jsonl") if r["record"] == kind]


def lines(output: Path) -> list[bytes]:
    """But for the first line, which names the steps asked for, hashes, and lines of a resume."""
    text = (output / "log.jsonl").read_bytes().splitlines()
    return [split_chain(line)[0] for line in text[1:] if b'{"record": "resume"' not in line]


def adapters(output: Path) -> list[torch.Tensor]:
    parts = torch.load(output / "checkpoint.pt", weights_only=True)["parts"]
    return list(parts["adapters"].values())


def test_a_gradient_that_is_not_finite_is_skipped_logged_and_shown(
    tmp_path: Path, run, configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    configured(steps=3)
    add, calls = example.total_loss, []

    def poisoned(losses):
        calls.append(1)
        loss = add(losses)
        # The loss itself stays finite, the gradient of a root at 0 does not.
        root = (loss - loss.detach()).abs().sqrt()
        return loss + root if len(calls) == 6 else loss

    monkeypatch.setattr(example, "total_loss", poisoned)
    output = tmp_path / "run"
    assert run(output) == 0
    (event,) = records(output, "event")
    assert (event["step"], event["detector"], event["seen"]) == (1, "non_finite", 1)
    assert event["action"] == "skip_step"
    assert "1 of 4 optimizer steps" in event["reason"]
    updates = records(output, "update")
    assert [r["optimizer_steps_skipped"] for r in updates] == [0, 1, 0]
    assert updates[2]["loss_value"] > 0
    assert all(value.isfinite().all() for value in adapters(output))
    assert event["reason"] in (output / "report.html").read_text()


def test_an_update_beyond_the_trust_region_is_shortened_or_taken_back(
    tmp_path: Path, run, configured
) -> None:
    configured(trust_region_limit=0.01, policy_learning_rate=0.05)
    output = tmp_path / "run"
    assert run(output) == 0
    held = {e["step"]: e for e in records(output, "event") if e["detector"] == "trust_region"}
    assert held
    for record in records(output, "update"):
        assert (record["update_scale"] < 1) == (record["step"] in held)
        assert (record["kl_proposed_nats_per_token"] > 0.01) == (record["step"] in held)
    assert all(event["seen"] > event["limit"] == 0.01 for event in held.values())


def test_a_learning_rate_that_breaks_the_policy_is_survived(
    tmp_path: Path, run, configured
) -> None:
    configured(policy_learning_rate=1e20)
    output = tmp_path / "run"
    assert run(output) in (0, 3)
    assert "take_back" in {event["action"] for event in records(output, "event")}
    assert all(value.isfinite().all() for value in adapters(output))
    # What was sampled from is the policy before the broken update, so the reference.
    assert all(record["kl_nats_per_token"] == 0 for record in records(output, "update"))


RUNAWAY = KLRunaway(alarm=Alarm(limit=0.01, release=0.001, patience=1, again=1))
LADDER = Monitor(
    kl_runaway=RUNAWAY,
    actions={"kl_runaway": ("tighten_threshold", "lower_learning_rate", "roll_back")},
)


def test_the_run_goes_back_to_where_it_was_well(tmp_path: Path, run, configured, capsys) -> None:
    configured(monitor=LADDER, steps=6, policy_learning_rate=0.02)
    whole = tmp_path / "whole"
    assert run(whole) == 0
    alarms = [e for e in records(whole, "event") if e["detector"] == "kl_runaway"]
    assert [(e["step"], e["action"]) for e in alarms[:3]] == [
        (1, "tighten_threshold"),
        (2, "lower_learning_rate"),
        (3, "roll_back"),
    ]
    assert "back to the state after 0 updates" in alarms[2]["reason"]
    log = records(whole, "update")
    assert log[3]["kl_nats_per_token"] > 0
    assert log[4]["kl_nats_per_token"] == 0.0  # the policy is the reference again
    assert [r["kl_threshold_scale"] for r in log[1:4]] == [1.0, 0.7, 0.7]
    assert [r["learning_rate_scale"] for r in log[1:5]] == [1.0, 1.0, 0.5, 0.5]
    # It went back at the last update too, which ended the alarm.
    assert alarms[-1]["action"] == "roll_back"
    assert alarms[-1]["step"] == 5
    parts = torch.load(whole / "checkpoint.pt", weights_only=True)["parts"]
    assert not parts["interventions"]["monitor"]["kl_runaway__alarm__active"]
    # One state to go back to, and a run that has lost it does not go on.
    (good,) = whole.glob("*last_good*")
    assert good.name == f"last_good_{parts['last_good']['step']:08d}.pt"
    good.unlink()
    capsys.readouterr()
    assert run(whole, "--resume", "--steps", "7") == 2
    assert f"{good} is missing" in capsys.readouterr().err
    page = (whole / "report.html").read_text()
    assert "roll_back" in page
    assert audit_log(whole / "log.jsonl").chain in page


@pytest.mark.slow
def test_a_resumed_run_goes_back_as_an_uninterrupted_one(tmp_path: Path, run, configured) -> None:
    configured(monitor=LADDER, steps=6, policy_learning_rate=0.02)
    whole = tmp_path / "whole"
    assert run(whole) == 0
    for cut in (2, 4):
        output = tmp_path / str(cut)
        assert run(output, "--steps", str(cut)) == 0
        assert run(output, "--resume") == 0
        assert lines(output) == lines(whole)
        audit_log(output / "log.jsonl")


def test_the_factors_reach_optimizer_and_law(tmp_path: Path, run, configured, monkeypatch) -> None:
    seen = []

    class Watched(example.Guard):
        def apply_factors(self) -> None:
            super().apply_factors()
            rates = [group["lr"] for group in self._optimizer.param_groups]
            seen.append((*rates, self._controller.law.threshold, self._controller.law.coef))

    monkeypatch.setattr(example, "Guard", Watched)
    actions = {"kl_runaway": ("tighten_threshold", "lower_learning_rate")}
    configured(monitor=Monitor(kl_runaway=RUNAWAY, actions=actions), policy_learning_rate=0.02)
    assert run(tmp_path / "run") == 0
    # At the start, and after each of four updates: nothing, tighter, slower, slower again.
    threshold, coef = short_run_law().threshold, short_run_law().coef
    expected = [
        (0.02, 1e-3, threshold, coef),
        (0.02, 1e-3, threshold, coef),
        (0.02, 1e-3, 0.7 * threshold, coef),
        (0.01, 5e-4, 0.7 * threshold, coef),
        (0.005, 2.5e-4, 0.7 * threshold, coef),
    ]
    assert seen == [pytest.approx(row) for row in expected]


def test_a_stop_has_its_own_exit_code_and_reason(tmp_path: Path, run, configured, capsys) -> None:
    monitor = Monitor(kl_runaway=RUNAWAY, actions={"kl_runaway": ("stop",)})
    configured(monitor=monitor, policy_learning_rate=0.02, trust_region_limit=None)
    output = tmp_path / "run"
    assert run(output) == 3
    assert len(records(output, "update")) == 2
    (event,) = records(output, "event")
    assert event["action"] == "stop"
    assert f"stopped: {event['reason']}" in capsys.readouterr().err
    assert event["reason"] in (output / "report.html").read_text()
    assert (output / "checkpoint.pt").exists()


@pytest.mark.slow
def test_ppo_is_guarded_by_its_target(tmp_path: Path, run, configured) -> None:
    actions = {"kl_runaway": ("tighten_threshold",)}
    configured(
        algorithm="ppo",
        monitor=Monitor(kl_runaway=RUNAWAY, actions=actions),
        policy_learning_rate=0.02,
    )
    assert run(tmp_path / "run") == 0
    first = records(tmp_path / "run", "event")[0]
    record = records(tmp_path / "run", "update")[first["step"]]
    assert first["detector"] == "kl_runaway"
    assert first["seen"] == pytest.approx(record["kl_nats_per_token"] / 0.25, rel=1e-5)


def test_the_log_is_an_audit_trail(tmp_path: Path, run, configured, prompts: Path, capsys) -> None:
    configured(steps=2)
    output = tmp_path / "run"
    assert run(output) == 0
    header = RunLog.read(output / "log.jsonl")[0]
    assert set(header["versions"]) >= {"torch", "python", "peft"}
    assert header["settings"]["seed"] == 0
    assert header["hashes"]["prompts"] == hashlib.sha256(prompts.read_bytes()).hexdigest()
    assert len(header["hashes"]["frozen_weights"]) == 64
    assert audit_log(output / "log.jsonl").records == 5  # the header, two updates, their samples
    capsys.readouterr()
    content = prompts.read_bytes()
    prompts.write_bytes(content + b"another one\n")
    assert run(output, "--resume", "--steps", "3") == 2
    assert "other content of: prompts" in capsys.readouterr().err
    prompts.write_bytes(content)
    log = output / "log.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"step": 1', b'"step": 0', 1))
    assert run(output, "--resume", "--steps", "3") == 2
    assert "line 4 does not follow" in capsys.readouterr().err


@pytest.mark.slow
def test_the_coefficient_follows_from_the_log_line_and_the_settings(
    tmp_path: Path, run, configured
) -> None:
    law = dataclasses.replace(
        short_run_law(), threshold=0.02, threshold_lower=0.01, threshold_upper=0.5
    )
    configured(kl_law=law, policy_learning_rate=0.02, monitor=Monitor(actions={}))
    assert run(tmp_path / "run") == 0
    acted = 0
    for record in records(tmp_path / "run", "update"):
        kl = torch.tensor(record["kl_filtered_nats_per_token"], requires_grad=True)
        penalty = gated_kl_penalty(
            kl,
            threshold=record["kl_threshold_nats_per_token"],
            gate=record["entropy_gate"],
            coef=law.coef,
            lead=record["kl_lead_nats_per_token"] + record["kl_offset_nats_per_token"],
        )
        (slope,) = torch.autograd.grad(penalty, kl)
        assert record["kl_coef"] == pytest.approx(float(slope), rel=1e-5, abs=1e-6)
        acted += record["kl_coef"] > 0
    assert acted > 1


def test_without_a_trust_region_nothing_is_measured(
    tmp_path: Path, run, configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    configured(trust_region_limit=None, steps=1)
    monkeypatch.setattr(example, "policy_kl", lambda *_, **__: pytest.fail("measured"))
    assert run(tmp_path / "run") == 0
    assert "update_scale" not in records(tmp_path / "run", "update")[0]
