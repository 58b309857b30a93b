"""Exponential moving average without start-up bias."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from safe_ops.arithmetic import Number
from safe_ops.controllers.advance import advance
from safe_ops.controllers.base import settle, zero, zero_count


class EMAState(NamedTuple):
    """State of ``EMA``; ``value`` in the unit of what is averaged."""

    value: Tensor
    """The average; 0 before the first update."""
    weight: Tensor
    """Effective number of values seen, 1 / (1 - decay) in the end."""
    step: Tensor
    non_finite: Tensor


@dataclass(frozen=True, kw_only=True)
class EMA:
    """Smooths a measurement; exact from its first one.

        w_t = d w_{t-1} + 1                       (= (1 - d^t) / (1 - d))
        v_t = v_{t-1} + (x_t - v_{t-1}) / w_t     (= bias-corrected average)

    v_1 = x_1; a constant stays itself; v lies between the least and the largest x so far. Its lag
    behind a ramp is d/(1 - d) updates.

    Args:
        decay: d, in [0, 1); 0 is no filter.

    Raises:
        ValueError: ``decay`` is outside [0, 1).

    Source: Kingma & Ba (arXiv 1412.6980), section 3, in incremental form: ``1 - d**t`` in float32
        is wrong by 6e-6 at t = 1 and d = 0.99.

    Example:
        >>> law = EMA(decay=0.5)
        >>> state = law.update(law.init(), value=3.0)
        >>> law.update(state, value=0.0).value
        tensor(1.)
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {self.decay}")

    def init(self) -> EMAState:
        """The state before the first update."""
        return EMAState(value=zero(), weight=zero(), step=zero_count(), non_finite=zero_count())

    def update(self, state: EMAState, *, value: float | Tensor) -> EMAState:
        """Take in one value."""
        return advance(self._step, state, value=value)

    def _step(self, state: EMAState, value: Number) -> EMAState:
        return settle(state, self.propose(state, value), value)

    def propose(self, state: EMAState, value: Number) -> EMAState:
        """A step without the refusal: for a law that holds this one and refuses for it."""
        weight = self.decay * state.weight + 1
        mean = state.value + (value - state.value) / weight
        return state._replace(value=mean, weight=weight)
