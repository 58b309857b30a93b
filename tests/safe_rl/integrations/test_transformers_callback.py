"""The callback in the real Trainer, by way of the example, and event by event."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from examples import transformers_trainer as example
from safe_ops.controllers import EMA, PID, AdaptiveKL, Controller, EntropyGatedKL
from safe_rl.integrations.transformers_callback import ControllerCallback
from tests.tiny_models import TEXT, save_language_model

STEPS, SAVE = 12, 6


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("anchored")
    (folder / "text.txt").write_text("\n".join(TEXT))
    return save_language_model(folder / "model"), folder / "text.txt"


@pytest.fixture
def run(files, monkeypatch):
    def call(output: Path, *more: str, **settings: object):
        fixed = {"use_cpu": True, "dataloader_pin_memory": False} | settings
        monkeypatch.setattr(
            example.transformers,
            "TrainingArguments",
            lambda *args, **given: TrainingArguments(*args, **(given | fixed)),
        )
        model, text = files
        given = {"--model": model, "--text": text, "--output": output, "--lr": 0.01}
        return example.main([str(word) for pair in given.items() for word in pair] + list(more))

    return call


def history(trainer):
    return [(r["kl"], r["kl_coef"]) for r in trainer.state.log_history if "kl" in r]


def test_coefficient_follows_the_law_on_the_logged_kl(run, tmp_path):
    rows = history(run(tmp_path, "--steps", str(STEPS)))
    assert len(rows) == STEPS
    coef = np.float32(0.1)
    for kl, used in rows:
        assert used == pytest.approx(coef, rel=1e-6)
        coef *= np.float32(1 + np.clip(kl / 0.1 - 1, -0.2, 0.2))
    assert len({used for _, used in rows}) == STEPS


@pytest.mark.parametrize("rebuild", [False, True])
def test_resume_equals_no_interruption(run, tmp_path, rebuild):
    whole = run(tmp_path / "whole", "--steps", str(STEPS), save_steps=SAVE)
    run(tmp_path / "cut", "--steps", str(SAVE), save_steps=SAVE)
    resumed = run(
        tmp_path / "cut", "--steps", str(STEPS), "--resume",
        save_steps=SAVE, restore_callback_states_from_checkpoint=rebuild,
    )  # fmt: skip
    assert history(resumed) == history(whole)
    saved = [
        json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
        for folder in (tmp_path / "whole", tmp_path / "cut")
    ]
    first, second = (state["stateful_callbacks"]["controller"] for state in saved)
    assert first == second
    assert first["step"] == STEPS


# --- event by event -----------------------------------------------------------------------------


class Loop:
    """The events of a Trainer, through its own dispatcher."""

    def __init__(self, *callbacks, state=None):
        self.handler = CallbackHandler(list(callbacks), None, None, None, None)
        self.state = state or TrainerState()
        self.control = TrainerControl()
        self.handler.on_train_begin(None, self.state, self.control)

    def log(self, **logs):
        self.handler.on_log(None, self.state, self.control, logs)

    def end(self):
        self.handler.on_train_end(None, self.state, self.control)


@pytest.fixture
def coefs():
    return []


@pytest.fixture
def callback(coefs):
    controller = Controller(AdaptiveKL(target=0.1, initial_coef=1.0))
    return ControllerCallback(controller, on_update=lambda state: coefs.append(float(state.coef)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
def test_bad_measurement_is_held_and_counted(callback, coefs, bad):
    loop = Loop(callback)
    for kl in (0.5, bad, 0.5):
        loop.log(kl=kl)
    assert coefs == pytest.approx([1.0, 1.02, 1.02, 1.0404])
    assert callback.controller.state.non_finite == 1
    assert loop.state.stateful_callbacks["controller"]["non_finite"] == 1


def test_other_logs_move_nothing(callback, coefs):
    loop = Loop(callback)
    loop.log(eval_loss=1.0, eval_kl=9.0)
    loop.log(train_runtime=1.0)
    assert coefs == [1.0]


def test_state_of_a_nested_law_passes_through_json_bit_for_bit():
    controller = Controller(EntropyGatedKL())
    loop = Loop(ControllerCallback(controller, on_update=lambda state: None))
    for update in range(25):
        loop.log(kl=0.1 * update, entropy=2.0 / (1 + update), reward=1 / 3 * update)
    state = TrainerState(stateful_callbacks=json.loads(json.dumps(loop.state.stateful_callbacks)))
    other = Controller(EntropyGatedKL())
    Loop(ControllerCallback(other, on_update=lambda state: None), state=state)
    for name, buffer in controller.state_dict().items():
        assert other.state_dict()[name].dtype == buffer.dtype
        assert other.state_dict()[name].tolist() == buffer.tolist(), name


def test_a_law_reads_other_keys_and_optional_measurements():
    seen = []
    pid = ControllerCallback(
        Controller(PID(kp=1.0)),
        on_update=lambda state: seen.append(float(state.output)),
        log_keys={"measurement": "train/kl", "setpoint": "goal"},
    )
    Loop(pid).log(**{"train/kl": 0.25, "goal": 1.0})
    assert seen == [0.0, 0.75]


def test_a_log_with_some_measurements_is_refused():
    loop = Loop(
        ControllerCallback(Controller(EntropyGatedKL()), on_update=lambda state: None),
    )
    with pytest.raises(ValueError, match="kl, reward came without entropy"):
        loop.log(kl=0.1, reward=1.0)


def test_a_run_that_never_logged_a_measurement_is_refused(callback):
    loop = Loop(callback)
    loop.log(loss=1.0, kl_div=0.1)
    with pytest.raises(ValueError, match=r"no log held kl.*logged were kl_div, loss"):
        loop.end()


def test_a_run_resumed_at_its_end_is_not(callback):
    Loop(callback).end()


def test_two_callbacks_need_two_names():
    def ema(name):
        return ControllerCallback(
            Controller(EMA()), on_update=lambda state: None, log_keys={"value": "kl"}, name=name
        )

    loop = Loop(ema("a"), ema("b"))
    loop.log(kl=0.1)
    assert set(loop.state.stateful_callbacks) == {"a", "b"}
    with pytest.raises(ValueError, match="two callbacks are named 'a'"):
        Loop(ema("a"), ema("a")).log(kl=0.1)


@pytest.mark.parametrize("keys", [{"kll": "kl"}, {"kl": "kl", "entropy": "entropy"}, {}])
def test_log_keys_must_be_measurements(keys):
    with pytest.raises(ValueError, match="log_keys must name the measurements kl of AdaptiveKL"):
        ControllerCallback(Controller(AdaptiveKL()), on_update=lambda state: None, log_keys=keys)


@pytest.mark.parametrize(
    ("change", "message"), [({"coef": None}, "Missing key"), ({"gate": 1.0}, "Unexpected key")]
)
def test_a_checkpoint_of_another_law_is_refused(callback, change, message):
    saved = {"coef": 1.0, "error": 0.0, "step": 1, "non_finite": 0} | change
    saved = {name: value for name, value in saved.items() if value is not None}
    with pytest.raises(RuntimeError, match=message):
        Loop(callback, state=TrainerState(stateful_callbacks={"controller": saved}))
