"""BetaCallback in the real GRPOTrainer and RLOOTrainer, by way of the example."""

import json
import math
from functools import partial

import numpy as np
import pytest
import trl
from transformers import TrainerControl, TrainerState
from trl import GRPOConfig, RLOOConfig

from examples import trl_beta as example
from safe_ops.controllers import EMA, AdaptiveKL, Controller, EntropyGatedKL
from safe_rl.integrations.trl import LEAST_BETA, BetaCallback
from tests.tiny_models import TEXT, save_language_model

pytestmark = [
    pytest.mark.slow,
    # TRL's own: without an accelerator, and names that transformers has replaced.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]
ALGORITHMS = ["grpo", "rloo"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    (folder / "prompts.txt").write_text("\n".join(TEXT * 4))
    return save_language_model(folder / "model"), folder / "prompts.txt"


@pytest.fixture
def run(files, monkeypatch):
    def call(output, algorithm, *more, **settings):
        config = {"grpo": GRPOConfig, "rloo": RLOOConfig}[algorithm]
        _, trainer = example.TRAINERS[algorithm]
        fixed = {"use_cpu": True, "max_completion_length": 6, "disable_tqdm": True} | settings
        monkeypatch.setitem(
            example.TRAINERS,
            algorithm,
            (lambda *args, **given: config(*args, **(given | fixed)), trainer),
        )
        model, prompts = files
        given = {"--model": model, "--prompts": prompts, "--output": output, "--lr": 0.01}
        words = [word for pair in given.items() for word in pair]
        return example.main([*map(str, words), "--algorithm", algorithm, *map(str, more)])

    return call


def rows(trainer):
    return [entry for entry in trainer.state.log_history if "beta" in entry]


def test_pinned_version():
    assert trl.__version__ == "1.9.2"


# Over seeds: tests/benchmarks/bench_trl.py, docs/other_trainers.md.
@pytest.mark.parametrize(("algorithm", "free_factor"), [("grpo", 5), ("rloo", 1.5)])
def test_kl_is_held_and_beta_moves(run, tmp_path, algorithm, free_factor):
    def last(gain):
        trainer = run(
            tmp_path / str(gain), algorithm, "--steps", 150, "--target", 0.2, "--gain", gain,
            "--lr", 0.003, save_steps=1000,
        )  # fmt: skip
        half = rows(trainer)[-75:]
        return sum(row["kl"] for row in half) / 75, {row["beta"] for row in half}

    held, betas = last(0.5)
    free, fixed = last(0)
    assert 0.13 < held < 0.3
    assert free > free_factor * held
    assert len(betas) > 40
    assert list(fixed) == pytest.approx([0.05])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("accumulated", "per_generation", "iterations", "logging", "optimizer_steps_per_batch"),
    [(1, 1, 1, 3, 1), (1, 2, 2, 1, 4), (2, 4, 1, 5, 2), (2, 1, 1, 1, 1)],
)
def test_one_update_per_generation_batch(
    run, tmp_path, algorithm, accumulated, per_generation, iterations, logging,
    optimizer_steps_per_batch,
):  # fmt: skip
    updates = 3
    generations = []
    trainer_class = example.TRAINERS[algorithm][1]
    original = trainer_class._generate_and_score_completions

    def generate(self, inputs):
        generations.append((self.state.global_step, self.beta))
        return original(self, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_class, "_generate_and_score_completions", generate)
        trainer = run(
            tmp_path, algorithm, "--steps", updates * optimizer_steps_per_batch,
            gradient_accumulation_steps=accumulated, steps_per_generation=per_generation,
            num_iterations=iterations, logging_steps=logging,
        )  # fmt: skip
    state = json.loads(next(tmp_path.glob("checkpoint-*/trainer_state.json")).read_text())
    assert state["stateful_callbacks"]["controller"]["step"] == updates
    assert state["global_step"] == updates * optimizer_steps_per_batch
    # The betas of the batches are the law's, applied to what TRL logged during each.
    per_update = len(generations) // updates
    betas = [beta for _, beta in generations[::per_update]]
    coef = np.float32(0.05)
    for batch, beta in enumerate(betas):
        assert beta == pytest.approx(coef, rel=1e-5)
        first = batch * optimizer_steps_per_batch
        logged = [
            r for r in rows(trainer) if first < r["step"] <= first + optimizer_steps_per_batch
        ]
        values = [row["kl"] for row in logged if "kl" in row]
        kl = sum(values) / len(values)
        coef *= np.float32(1 + 0.5 * np.clip(kl / 0.05 - 1, -0.2, 0.2))
    assert trainer.beta == pytest.approx(coef, rel=1e-5)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_resume_restores_beta_and_the_run(run, tmp_path, algorithm):
    whole = run(tmp_path / "whole", algorithm, "--steps", 8, logging_steps=1, save_steps=4)
    run(tmp_path / "cut", algorithm, "--steps", 4, logging_steps=1, save_steps=4)
    resumed = run(
        tmp_path / "cut", algorithm, "--steps", 8, "--resume", logging_steps=1, save_steps=4
    )

    def seen(trainer):
        return [(row["step"], row["beta"], row["kl"], row["reward"]) for row in rows(trainer)]

    assert seen(resumed) == seen(whole)
    assert resumed.state.stateful_callbacks == whole.state.stateful_callbacks
    assert resumed.beta == whole.beta != 0.05


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_reward_is_a_measurement_that_is_held(run, tmp_path, algorithm, monkeypatch):
    # TRL logs None for a batch without a single reward.
    monkeypatch.setattr(
        example, "sentiment", lambda completions, **columns: [None] * len(completions)
    )
    monkeypatch.setattr(example, "AdaptiveKL", lambda **gains: EMA())
    follow_reward = partial(BetaCallback, coef="value", log_keys={"value": "reward"})
    monkeypatch.setattr(example, "BetaCallback", follow_reward)
    trainer = run(tmp_path, algorithm, "--steps", 2, logging_steps=1)
    assert [row["reward"] for row in rows(trainer)] == [None, None]
    state = trainer.state.stateful_callbacks["controller"]
    assert (state["step"], state["non_finite"]) == (0, 2)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_safe_law_gets_kl_entropy_and_reward(run, tmp_path, algorithm, monkeypatch):
    monkeypatch.setattr(example, "AdaptiveKL", lambda **gains: EntropyGatedKL(coef=1.0))
    monkeypatch.setattr(example, "BetaCallback", partial(BetaCallback, coef="kl_coef"))
    # Two optimizer steps to a batch: the reward is in the log of the first alone.
    trainer = run(tmp_path, algorithm, "--steps", 40, steps_per_generation=2, logging_steps=1)
    state = trainer.state.stateful_callbacks["controller"]
    assert (state["step"], state["non_finite"]) == (20, 0)
    betas = [row["beta"] for row in rows(trainer)]
    assert betas[0] == pytest.approx(LEAST_BETA)
    assert trainer.beta == state["kl_coef"]
    assert max(betas) > 0.1


# --- construction -------------------------------------------------------------------------------


class BareTrainer:
    def __init__(self, config=GRPOConfig, **settings):
        self.beta = settings.get("beta", 0.05)
        self.args = config("unused", use_cpu=True, bf16=False, report_to="none", **settings)


def test_beta_never_reaches_zero():
    trainer = BareTrainer()
    callback = BetaCallback(Controller(EntropyGatedKL()), trainer, coef="kl_coef")
    callback.on_train_begin(trainer.args, TrainerState(), TrainerControl())
    assert trainer.beta == LEAST_BETA


@pytest.mark.parametrize("bad", [math.nan, None])
def test_bad_kl_within_a_batch_holds_beta(bad):
    trainer = BareTrainer(steps_per_generation=2)
    callback = BetaCallback(Controller(AdaptiveKL(initial_coef=0.05)), trainer)
    state, control = TrainerState(), TrainerControl()
    callback.on_train_begin(trainer.args, state, control)
    for kl in (0.1, bad):
        state.global_step += 1
        callback.on_step_end(trainer.args, state, control)
        state.log_history.append({"kl": kl})
        callback.on_log(trainer.args, state, control, logs={"kl": kl})
    assert trainer.beta == pytest.approx(0.05)
    assert callback.controller.state.non_finite == 1


def test_uneven_logs_are_weighted_by_their_optimizer_steps():
    trainer = BareTrainer(steps_per_generation=4)
    callback = BetaCallback(Controller(AdaptiveKL(initial_coef=0.05, target=1.0)), trainer)
    state, control = TrainerState(), TrainerControl()
    callback.on_train_begin(trainer.args, state, control)
    for step in range(1, 5):
        state.global_step = step
        callback.on_step_end(trainer.args, state, control)
        assert control.should_log == (step == 4)
        if step in (3, 4):
            logs = {"kl": 1.2 if step == 3 else 0.8}
            state.log_history.append(logs)
            callback.on_log(trainer.args, state, control, logs=logs)
    # (3 * 1.2 + 0.8) / 4 = 1.1: error 0.1, gain 0.1.
    assert trainer.beta == pytest.approx(0.05 * 1.01)


@pytest.mark.parametrize(
    ("settings", "change", "coef", "message"),
    [
        ({"beta": 0.0}, {}, "coef", "built with beta 0, so without a reference model"),
        ({}, {"liger_loss": object()}, "coef", "Liger's loss keeps the beta"),
        ({}, {}, "kl_coef", "coef must name a field of the state of AdaptiveKL"),
        (
            {"steps_per_generation": 3, "gradient_accumulation_steps": 2},
            {},
            "coef",
            "must divide one another, got 3 and 2",
        ),
    ],
)
def test_what_cannot_work_is_refused(settings, change, coef, message):
    trainer = BareTrainer(**settings)
    for name, value in change.items():
        setattr(trainer, name, value)
    with pytest.raises(ValueError, match=message):
        BetaCallback(Controller(AdaptiveKL()), trainer, coef=coef)
