"""Shortens a step whose KL would be too large."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from safe_ops.arithmetic import Number, larger, root, select, smaller
from safe_ops.controllers.advance import advance
from safe_ops.controllers.base import settle, zero, zero_count
from safe_ops.controllers.ema import EMA, EMAState


def trust_region_scale(step_kl: Number, limit: float | Tensor) -> Number:
    """By how much to scale a parameter step so that its KL keeps to a limit.

        scale = min( 1, sqrt(limit / KL) )

    The KL between the policies before and after a small step grows with the square of the step, so
    the scaled step has a KL of ``scale^2 KL <= limit``. (The paper scales by limit / KL, which
    leaves limit^2 / KL: less than was allowed.)

    Args:
        step_kl: KL of the whole step, nats per token; a float, or a tensor of any shape. Below 0 it
            is noise: scale 1.
        limit: Nats per token, not negative.

    Returns:
        Shape of ``step_kl``, in [0, 1].

    Source: SAFE (arXiv 2602.04651), preview; the square root as in TRPO (arXiv 1502.05477).

    Example:
        >>> trust_region_scale(torch.tensor([-0.1, 0.5, 2.0]), 0.5)
        tensor([1.0000, 1.0000, 0.5000])
    """
    # At or below the limit the quotient is at least 1, and 0 / 0 does not occur.
    over = step_kl > limit
    return select(over, root(limit / select(over, step_kl, 1.0)), 1.0)


class TrustRegionState(NamedTuple):
    """State of ``TrustRegion``."""

    scale: Tensor
    """What to multiply the parameter change by, in (0, 1]."""
    predicted_kl: Tensor
    """Of the whole step, nats per token."""
    scaled_kl: Tensor
    """Expected of the scaled step, nats per token."""
    limited: Tensor
    """int64, steps that were shortened."""
    step: Tensor
    non_finite: Tensor
    filter: EMAState


@dataclass(frozen=True, kw_only=True)
class TrustRegion:
    """Scales steps so that the KL of none exceeds a limit.

        predicted = max( step KL, filter(step KL) )
        scale     = min( 1, sqrt(limit / predicted), last scale * growth )

    ``scale^2 * step KL <= limit`` for the step at hand, always. A filter with memory and a finite
    ``growth`` keep the steps after an outlier short as well; the default has neither.

    Give it the KL of the whole step: measured on the batch after a trial step, before that is
    accepted, or predicted. Where only a step scaled by s was taken, its KL over s^2.

    Args:
        limit: Nats per token. Paper: ceiling 0.5.
        growth: Largest factor between the scales of two updates, above 1.
        filter: Of the step KL. Decay 0 is none.

    Raises:
        ValueError: a parameter is out of its range.

    Source: SAFE (arXiv 2602.04651), preview.

    Example:
        >>> law = TrustRegion(limit=0.5)
        >>> law.update(law.init(), step_kl=2.0).scale
        tensor(0.5000)
    """

    limit: float = 0.5
    growth: float = math.inf
    filter: EMA = field(default_factory=lambda: EMA(decay=0.0))

    def __post_init__(self) -> None:
        if not 0 < self.limit < math.inf:
            raise ValueError(f"limit must be positive and finite, got {self.limit}")
        if not self.growth > 1:
            raise ValueError(f"growth must be above 1, got {self.growth}")

    def init(self) -> TrustRegionState:
        """The state before the first update: whole steps."""
        return TrustRegionState(
            scale=torch.ones((), dtype=torch.float32),
            predicted_kl=zero(),
            scaled_kl=zero(),
            limited=zero_count(),
            step=zero_count(),
            non_finite=zero_count(),
            filter=self.filter.init(),
        )

    def update(self, state: TrustRegionState, *, step_kl: float | Tensor) -> TrustRegionState:
        """Take in the KL of one whole step, nats per token."""
        return advance(self._step, state, step_kl=step_kl)

    def _step(self, state: TrustRegionState, step_kl: Number) -> TrustRegionState:
        filtered = settle(state.filter, self.filter.propose(state.filter, step_kl), step_kl)
        predicted = larger(step_kl, filtered.value)
        scale = trust_region_scale(predicted, self.limit)
        if self.growth < math.inf:
            scale = smaller(scale, state.scale * self.growth)
        new = state._replace(
            scale=scale,
            predicted_kl=predicted,
            scaled_kl=scale * scale * step_kl,
            limited=state.limited + (scale < 1),
            filter=filtered,
        )
        return settle(state, new, step_kl)
