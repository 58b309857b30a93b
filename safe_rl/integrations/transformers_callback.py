"""A controller in a transformers Trainer: moved by what is logged, saved in its checkpoints."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from safe_ops.controllers import Controller


class ControllerCallback(TrainerCallback):
    """Moves a controller by one update per log and hands its new state to the trainer.

    A log that holds none of the measurements (an evaluation, the summary at the end) moves nothing.
    A measurement that is NaN, infinite or None holds the state and is counted by the law. Every
    rank must log the same numbers, reduced over ranks.

    The state is kept in ``TrainerState.stateful_callbacks``, so it is written into each
    checkpoint's ``trainer_state.json``, and ``train(resume_from_checkpoint=...)`` takes it back bit
    for bit, whatever ``restore_callback_states_from_checkpoint`` says: that switch builds callbacks
    anew from JSON, which cannot hold a law (with it on, transformers logs that the entry is
    ignored; it is not).

    Args:
        controller: Holds the law and its state.
        on_update: Called with the law's state when training begins or resumes and after each
            update; it sets what the loss reads.
        log_keys: Measurement to key of the logs. None: each under its own name.
        name: Of the state in the checkpoint; controllers of one run need different ones.

    Raises:
        ValueError: ``log_keys`` are not the law's measurements; a log holds some of them and not
            others; training ends and no log held them; two callbacks have one name.
        RuntimeError: the checkpoint holds the state of another law.

    Example:
        >>> from safe_ops.controllers import AdaptiveKL
        >>> coefs = []
        >>> callback = ControllerCallback(
        ...     Controller(AdaptiveKL(target=0.1, initial_coef=1.0)),
        ...     on_update=lambda state: coefs.append(float(state.coef)),
        ... )
        >>> args, state, control = None, TrainerState(), TrainerControl()
        >>> callback.on_train_begin(args, state, control)
        >>> callback.on_log(args, state, control, logs={"loss": 2.0, "kl": 0.5})
        >>> coefs
        [1.0, 1.0199999809265137]
    """

    def __init__(
        self,
        controller: Controller,
        *,
        on_update: Callable[[Any], None],
        log_keys: Mapping[str, str] | None = None,
        name: str = "controller",
    ) -> None:
        if log_keys is None:
            log_keys = {measurement: measurement for measurement in controller.measurements}
        known = {*controller.measurements, *controller.optional}
        if not set(controller.measurements) <= set(log_keys) <= known:
            raise ValueError(
                f"log_keys must name the measurements {', '.join(controller.measurements)} "
                f"of {type(controller.law).__name__}, got {', '.join(log_keys) or 'none'}"
            )
        self.controller = controller
        self.log_keys = dict(log_keys)
        self.name = name
        self._on_update = on_update
        self._published: dict[str, Any] | None = None
        self._read_once = False
        self._other_keys: set[str] = set()

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Take the state back from a checkpoint that is resumed, and let it act."""
        self._published = state.stateful_callbacks.get(self.name)
        if self._published is not None:
            dtypes = {name: b.dtype for name, b in self.controller.state_dict().items()}
            self.controller.load_state_dict(
                {
                    name: torch.tensor(value, dtype=dtypes.get(name))
                    for name, value in self._published.items()
                }
            )
        self._read_once, self._other_keys = False, set()
        self._publish(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """Move the controller, if the log holds its measurements."""
        measured = self.read(logs)
        if measured:
            self.move(state, measured)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Refuse a run whose logs never held a measurement."""
        if self._other_keys and not self._read_once:
            raise ValueError(
                f"no log held {', '.join(self.log_keys.values())}, so the controller never moved; "
                f"logged were {', '.join(sorted(self._other_keys))}"
            )

    def read(self, logs: Mapping[str, Any]) -> dict[str, float]:
        """The measurements that a log holds, None as NaN."""
        found = {name: logs[key] for name, key in self.log_keys.items() if key in logs}
        self._read_once |= bool(found)
        self._other_keys |= set(logs)
        return {name: math.nan if value is None else value for name, value in found.items()}

    def move(self, state: TrainerState, measured: Mapping[str, float]) -> None:
        """One update, from all the measurements."""
        missing = [key for name, key in self.log_keys.items() if name not in measured]
        if missing:
            raise ValueError(
                f"{', '.join(measured)} came without {', '.join(missing)}: "
                "log all measurements of one update together"
            )
        self.controller(**measured)
        self._publish(state)

    def _publish(self, state: TrainerState) -> None:
        if state.stateful_callbacks.get(self.name) is not self._published:
            raise ValueError(f"two callbacks are named {self.name!r}: give each its own name")
        self._published = {
            name: buffer.tolist() for name, buffer in self.controller.state_dict().items()
        }
        state.stateful_callbacks[self.name] = self._published
        self._on_update(self.controller.state)
