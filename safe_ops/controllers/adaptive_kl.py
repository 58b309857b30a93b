"""Proportional control of a KL coefficient."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from safe_ops.arithmetic import Number, clamped
from safe_ops.controllers.advance import advance
from safe_ops.controllers.base import settle, zero, zero_count


class AdaptiveKLState(NamedTuple):
    """State of ``AdaptiveKL``."""

    coef: Tensor
    """Reward units per nat."""
    error: Tensor
    """Clipped relative error, no unit."""
    step: Tensor
    non_finite: Tensor


@dataclass(frozen=True, kw_only=True)
class AdaptiveKL:
    """Coefficient of a KL penalty that steers the KL to a target.

        e    = clip( KL / target - 1, -error_limit, error_limit )
        coef = clamp( coef * (1 + gain e), lower, upper )

    A KL above the target raises the coefficient. (TorchRL's controller of this name expects the
    *negative*, reward-form KL.)

    Args:
        initial_coef: Before the first update, within the limits.
        target: Nats per token (0.25 is the source's 6 nats over its 24 tokens).
        gain: Relative change of the coefficient per unit of error and update; 0 keeps it fixed.
        error_limit: Of the relative error.
        lower: Least coefficient; at 0 the law could never leave it.
        upper: Largest coefficient.

    Raises:
        ValueError: a parameter is out of its range.

    Source: Ziegler et al. (arXiv 1909.08593), section 2.2; the limits are ours.

    Example:
        >>> law = AdaptiveKL(target=0.1, initial_coef=1.0)
        >>> law.update(law.init(), kl=0.0).coef
        tensor(0.9800)
    """

    initial_coef: float = 0.1
    target: float = 0.25
    gain: float = 0.1
    error_limit: float = 0.2
    lower: float = 1e-4
    upper: float = 100.0

    def __post_init__(self) -> None:
        if not self.gain >= 0:
            raise ValueError(f"gain must not be negative, got {self.gain}")
        for name in ("target", "error_limit", "lower"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if not self.gain * self.error_limit < 1:
            raise ValueError(
                "gain * error_limit must be below 1, or the coefficient changes sign, "
                f"got {self.gain} * {self.error_limit}"
            )
        if not self.lower <= self.initial_coef <= self.upper:
            raise ValueError(
                f"initial_coef must be within [lower, upper] = [{self.lower}, {self.upper}], "
                f"got {self.initial_coef}"
            )

    def init(self) -> AdaptiveKLState:
        """The state before the first update."""
        return AdaptiveKLState(
            coef=torch.tensor(self.initial_coef, dtype=torch.float32),
            error=zero(),
            step=zero_count(),
            non_finite=zero_count(),
        )

    def update(self, state: AdaptiveKLState, *, kl: float | Tensor) -> AdaptiveKLState:
        """Take in the KL of one rollout, nats per token."""
        return advance(self._step, state, kl=kl)

    def _step(self, state: AdaptiveKLState, kl: Number) -> AdaptiveKLState:
        error = clamped(kl / self.target - 1, -self.error_limit, self.error_limit)
        coef = clamped(state.coef * (1 + self.gain * error), self.lower, self.upper)
        return settle(state, state._replace(coef=coef, error=error), kl)
