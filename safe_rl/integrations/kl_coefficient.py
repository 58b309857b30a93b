"""A controller as the KL coefficient of verl and OpenRLHF: ``value`` and ``update``."""

from typing import Any

from torch import Tensor

from safe_ops.controllers import Controller, flatten_state


class KLCoefficient:
    """Takes the place of their ``AdaptiveKLController``, which one NaN poisons for ever.

        trainer.kl_ctrl_in_reward = KLCoefficient(controller)                        # verl
        trainer.kl_ctl = trainer.experience_maker.kl_ctl = KLCoefficient(controller) # OpenRLHF

    In OpenRLHF both the trainer and its experience maker hold the object; replacing one of the two
    leaves the penalty in the reward at its first value.

    Both libraries call ``update`` once per rollout with the mean KL in nats per token, so the law's
    target is per token too, and its gain is per rollout: the number of samples that they pass does
    not scale it. Neither saves its controller: put ``state_dict`` beside the checkpoint.

    Args:
        controller: Its law must need one measurement and no more: the KL is all they give.
        coef: Field of the law's state that is the coefficient.

    Raises:
        ValueError: the law needs several measurements, or ``coef`` is not in its state.

    Example:
        >>> from safe_ops.controllers import AdaptiveKL
        >>> coefficient = KLCoefficient(Controller(AdaptiveKL(target=0.1, initial_coef=1.0)))
        >>> coefficient.update(0.5, 64)
        >>> round(coefficient.value, 4)
        1.02
    """

    def __init__(self, controller: Controller, *, coef: str = "coef") -> None:
        known = [key for key, value in flatten_state(controller.state).items() if value.ndim == 0]
        law = type(controller.law).__name__
        if len(controller.measurements) != 1:
            raise ValueError(
                f"the law must need the KL alone, {law} needs {', '.join(controller.measurements)}"
            )
        if coef not in known:
            raise ValueError(f"coef must name a field of the state of {law}, got {coef!r}: {known}")
        self.controller = controller
        self.coef = coef

    @property
    def value(self) -> float:
        """The coefficient, reward units per nat."""
        return float(flatten_state(self.controller.state)[self.coef])

    def update(self, current_kl: float | Tensor, n_steps: int) -> None:
        """Take in one rollout's KL, nats per token; ``n_steps`` is their call's and unused."""
        self.controller(**{self.controller.measurements[0]: current_kl})

    def state_dict(self) -> dict[str, Any]:
        """The controller's."""
        return self.controller.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back."""
        self.controller.load_state_dict(state_dict)
