"""Rate of change over a window of updates."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from safe_ops.arithmetic import Number, newest_first, select
from safe_ops.controllers.advance import advance
from safe_ops.controllers.base import settle, zero, zero_count


class MomentumState(NamedTuple):
    """State of ``Momentum``; ``momentum`` in units of the value per update."""

    momentum: Tensor
    past: Tensor
    """x_{t-w}, or x_1 while the window is not full."""
    history: Tensor
    """[W], the last values, the newest first."""
    step: Tensor
    non_finite: Tensor


@dataclass(frozen=True, kw_only=True)
class Momentum:
    """How fast a value moves, per update.

        m_t = (x_t - x_{t-w}) / w        x_s = x_1 for s < 1

    The value counts as constant before its first update. So m starts at 0 and grows smoothly into
    the slope, too small rather than too large; a difference over the age of the history would start
    with the bare noise of two neighbours, and 0 until the window is full would end in a jump.

    Args:
        window: w, updates.

    Raises:
        ValueError: ``window`` is not a positive whole number.

    Source: SAFE (arXiv 2602.04651), KL momentum; w = 50 there.

    Example:
        >>> law = Momentum(window=2)
        >>> state = law.init()
        >>> for x in (1.0, 2.0, 3.0, 4.0):
        ...     state = law.update(state, value=x)
        >>> state.momentum
        tensor(1.)
    """

    window: int = 10

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"window must be a positive whole number, got {self.window!r}")

    def init(self) -> MomentumState:
        """The state before the first update."""
        return MomentumState(
            momentum=zero(),
            past=zero(),
            history=torch.zeros(self.window, dtype=torch.float32),
            step=zero_count(),
            non_finite=zero_count(),
        )

    def update(self, state: MomentumState, *, value: float | Tensor) -> MomentumState:
        """Take in one value."""
        return advance(self._step, state, value=value)

    def _step(self, state: MomentumState, value: Number) -> MomentumState:
        return settle(state, self.propose(state, value), value)

    def propose(self, state: MomentumState, value: Number) -> MomentumState:
        """A step without the refusal: for a law that holds this one and refuses for it."""
        full = value.expand(self.window) if isinstance(value, Tensor) else [value] * self.window
        history = select(state.step == 0, full, state.history)
        past = history[-1]
        return state._replace(
            momentum=(value - past) / self.window,
            past=past,
            history=newest_first(history, value),
        )
