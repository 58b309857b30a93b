"""A controller in TRL's GRPOTrainer and RLOOTrainer: it sets beta, the weight of the KL."""

from collections.abc import Mapping
from typing import Any, Protocol

from transformers import TrainerControl, TrainerState, TrainingArguments

from safe_ops.controllers import Controller, flatten_state
from safe_rl.integrations.transformers_callback import ControllerCallback

LEAST_BETA = 1e-8
"""At beta 0 TRL stops measuring the KL, and a law that went there could never come back."""


class HasBeta(Protocol):
    """A ``trl.GRPOTrainer`` or ``trl.RLOOTrainer``."""

    beta: float
    args: Any


class BetaCallback(ControllerCallback):
    """Moves a controller once per generation batch and sets ``trainer.beta`` from its state.

        trainer = GRPOTrainer(model, reward, args=GRPOConfig(beta=0.05, ...), ...)
        trainer.add_callback(BetaCallback(Controller(AdaptiveKL(initial_coef=0.05)), trainer))

    Measurements are TRL's logged ``kl``, ``entropy`` (nats per token) and ``reward`` (per
    completion, before any penalty), over all ranks. They are averaged over the optimizer steps of
    one generation batch (``steps_per_generation * num_iterations`` micro-batches), at the end of
    which a log is asked for, so that ``logging_steps`` changes nothing; the new beta acts from the
    next batch on. In GRPO beta multiplies the k3 estimate per token, in the loss, and ``kl`` is
    k3; in RLOO it multiplies the sum of log-ratios over the completion, in the reward, and ``kl``
    is the mean log-ratio, which may be negative.

    Each entry of ``log_history`` with a measurement gets the ``beta`` that was in force. The state
    is in the checkpoints, as with ``ControllerCallback``; a run resumed from a checkpoint that was
    written at the end of a generation batch goes on as if it had not been cut.

    Args:
        controller: Holds the law and its state.
        trainer: Built with a beta other than 0; only then it has a reference model.
        coef: Field of the law's state that becomes beta: "coef" of AdaptiveKL, "kl_coef" of
            EntropyGatedKL. Below ``LEAST_BETA`` it is raised to it.
        log_keys: Measurement to key of TRL's logs. None: each under its own name.
        name: Of the state in the checkpoint; callbacks of one run need different ones.

    Raises:
        ValueError: ``coef`` is not in the state; beta was 0 at construction; the trainer uses
            Liger's loss, which keeps the beta it was built with; an optimizer step would straddle
            two generation batches; see also ``ControllerCallback``.

    Example:
        >>> from types import SimpleNamespace
        >>> from safe_ops.controllers import AdaptiveKL
        >>> args = SimpleNamespace(steps_per_generation=1, num_iterations=1,
        ...     gradient_accumulation_steps=1)
        >>> trainer = SimpleNamespace(beta=0.05, args=args)  # stands for a GRPOTrainer
        >>> law = AdaptiveKL(target=0.1, initial_coef=0.04)
        >>> callback = BetaCallback(Controller(law), trainer)
        >>> callback.on_train_begin(args, TrainerState(), TrainerControl())
        >>> round(trainer.beta, 4)
        0.04
    """

    def __init__(
        self,
        controller: Controller,
        trainer: HasBeta,
        *,
        coef: str = "coef",
        log_keys: Mapping[str, str] | None = None,
        name: str = "controller",
    ) -> None:
        known = [key for key, value in flatten_state(controller.state).items() if value.ndim == 0]
        if coef not in known:
            raise ValueError(
                f"coef must name a field of the state of {type(controller.law).__name__}, "
                f"got {coef!r}: {known}"
            )
        if trainer.beta == 0.0:
            raise ValueError(
                "the trainer was built with beta 0, so without a reference model: "
                "give its config the beta to start from"
            )
        if hasattr(trainer, "liger_loss"):
            raise ValueError(
                "Liger's loss keeps the beta that it was built with: use_liger_kernel must be False"
            )
        super().__init__(controller, on_update=self._set_beta, log_keys=log_keys, name=name)
        self.trainer = trainer
        self.coef = coef
        self._steps_per_batch = _optimizer_steps_per_batch(trainer.args)
        # Counted like the trainer's own micro-steps: from its construction, not from a checkpoint,
        # since a resumed trainer generates anew at its first step.
        self._optimizer_steps = 0
        self._batch_ended = False
        self._last_logged = 0
        self._sums: dict[str, tuple[float, int]] = {}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Take the state back from a checkpoint that is resumed, and set beta."""
        super().on_train_begin(args, state, control, **kwargs)
        self._batch_ended, self._last_logged, self._sums = False, state.global_step, {}

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> TrainerControl:
        """Ask for a log where a generation batch ends."""
        self._optimizer_steps += 1
        self._batch_ended = self._optimizer_steps % self._steps_per_batch == 0
        control.should_log |= self._batch_ended
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """Take in the log; where a generation batch ends, move the controller."""
        measured = self.read(logs)
        # RLOO logs its KL, and both log the reward, in the first log of a batch alone.
        if measured:
            state.log_history[-1]["beta"] = self.trainer.beta
            steps = state.global_step - self._last_logged
            for name, value in measured.items():
                total, weight = self._sums.get(name, (0.0, 0))
                self._sums[name] = total + steps * value, weight + steps
            self._last_logged = state.global_step
        if self._batch_ended and self._sums:
            means = {name: total / weight for name, (total, weight) in self._sums.items()}
            self._sums, self._batch_ended = {}, False
            self._last_logged = state.global_step
            self.move(state, means)

    def _set_beta(self, state: Any) -> None:
        self.trainer.beta = max(float(flatten_state(state)[self.coef]), LEAST_BETA)


def _optimizer_steps_per_batch(args: Any) -> int:
    micro = args.steps_per_generation * args.num_iterations
    accumulated = args.gradient_accumulation_steps
    if micro % accumulated and accumulated % micro:
        raise ValueError(
            f"steps_per_generation * num_iterations and gradient_accumulation_steps must divide "
            f"one another, got {micro} and {accumulated}: an optimizer step would straddle two "
            "generation batches"
        )
    return max(micro // accumulated, 1)
