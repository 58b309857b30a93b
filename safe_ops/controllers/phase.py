"""Phase of a training run, read from its reward."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from safe_ops.arithmetic import Number, clamped, larger, newest_first, root, select, smaller
from safe_ops.controllers.advance import advance
from safe_ops.controllers.base import settle, zero, zero_count

PHASE_NAMES = ("warm_up", "climbing", "converged", "plateau")
"""Names of the int64 phase."""

WARM_UP, CLIMBING, CONVERGED, PLATEAU = range(4)


class PhaseState(NamedTuple):
    """State of ``Phase``; rewards in reward units."""

    phase: Tensor
    """int64, an index of ``PHASE_NAMES``."""
    factor: Tensor
    """Multiplier of the threshold, no unit."""
    rise: Tensor
    """Mean of the last window less that of the one before; 0 until there are two."""
    rise_error: Tensor
    """Standard error of ``rise``, from the spread within the windows."""
    lowest: Tensor
    """Least mean of a full window so far; of the two current ones until they are full."""
    highest: Tensor
    dwelt: Tensor
    """int64, updates spent in the phase."""
    history: Tensor
    """[2 W], rewards, the newest first."""
    step: Tensor
    non_finite: Tensor


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Warm-up, climbing, converged or plateau, relative to the reward's own scale.

        rise   = mean(last W) - mean(W before)
        error  = s sqrt(2 / W)                   s: spread within the two windows
        extent = highest - lowest
        level  = (mean(last W) - lowest) / extent

        climbing    rise > enter error
        converged   else, if level > level_enter, extent > moved error and rise > -leave error
        plateau     else; a reward in free fall is here too

    ``lowest`` and ``highest`` are the extreme window means so far. While a phase holds, its own
    limits are wider: ``leave`` for ``enter`` and the other way round (hysteresis). A phase lasts at
    least ``dwell`` updates. A reward a r + b with a > 0 has the phases of r. Before 2 W rewards are
    in, the windows are the halves of what there is.

    Args:
        warm_up: Updates; the phase begins with 4 rewards at the earliest.
        window: W, updates.
        enter: Standard errors. The windows slide, so that a level reward offers many chances of a
            false climb: with 3 the phase changes every few hundred updates.
        leave: Standard errors, at most ``enter``.
        moved: Standard errors that the window means must have spanned. Those of level noise span
            up to 5 in a long run.
        level_enter: Share of the reward's range; reward units if not ``relative``.
        level_leave: At most ``level_enter``.
        dwell: Updates.
        factors: Multipliers of the threshold for warm-up, climbing, converged, plateau.
        relative: False gives the paper's rule in reward units: ``error`` is 1, ``level`` the mean,
            and converged asks for a spread below ``spread_limit`` instead of the last two.
        spread_limit: Reward units; only read if not ``relative``.

    Raises:
        ValueError: a parameter is out of its range.

    Source: SAFE (arXiv 2602.04651), phases; hysteresis, dwell and scale are ours. The printed rules
    switched 169 times in 4,000 updates of a mild run.

    Example:
        >>> law = Phase(warm_up=4, window=2, dwell=1)
        >>> state = law.init()
        >>> for reward in (0.0, 0.1, 0.2, 0.6, 0.7):
        ...     state = law.update(state, reward=reward)
        >>> PHASE_NAMES[int(state.phase)], state.factor
        ('climbing', tensor(1.2000))
    """

    warm_up: int = 50
    window: int = 50
    enter: float = 4.0
    leave: float = 1.0
    moved: float = 6.0
    level_enter: float = 0.7
    level_leave: float = 0.6
    dwell: int = 10
    factors: tuple[float, float, float, float] = (1.5, 1.2, 1.0, 0.8)
    relative: bool = True
    spread_limit: float = 0.02

    def __post_init__(self) -> None:
        for name, least in (("warm_up", 0), ("window", 2), ("dwell", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number, at least {least}, got {value!r}")
        if not 0 <= self.leave <= self.enter < math.inf:
            raise ValueError(
                f"leave and enter must satisfy 0 <= leave <= enter, got {self.leave}, {self.enter}"
            )
        if not 0 <= self.moved < math.inf:
            raise ValueError(f"moved must be finite and not negative, got {self.moved}")
        if not self.level_leave <= self.level_enter:
            raise ValueError(
                "level_leave must not exceed level_enter, "
                f"got {self.level_leave} and {self.level_enter}"
            )
        least = torch.finfo(torch.float32).tiny
        if len(self.factors) != 4 or not all(least <= f < math.inf for f in self.factors):
            raise ValueError(f"factors must be four positive numbers, got {self.factors}")
        if not self.spread_limit > 0:
            raise ValueError(f"spread_limit must be positive, got {self.spread_limit}")

    @classmethod
    def paper(cls) -> "Phase":
        """The printed rule: absolute reward, no hysteresis, no dwell.

        Example:
            >>> Phase.paper().level_enter
            0.7
        """
        return cls(relative=False, enter=0.01, leave=0.01, level_leave=0.7, dwell=1)

    def init(self) -> PhaseState:
        """Warm-up."""
        return PhaseState(
            phase=zero_count(),
            factor=torch.tensor(self.factors[WARM_UP], dtype=torch.float32),
            rise=zero(),
            rise_error=zero(),
            lowest=zero(),
            highest=zero(),
            dwelt=zero_count(),
            history=torch.zeros(2 * self.window, dtype=torch.float32),
            step=zero_count(),
            non_finite=zero_count(),
        )

    def update(self, state: PhaseState, *, reward: float | Tensor) -> PhaseState:
        """Take in the mean reward of one rollout."""
        return advance(self._step, state, reward=reward)

    def _step(self, state: PhaseState, reward: Number) -> PhaseState:
        return settle(state, self.propose(state, reward), reward)

    def propose(self, state: PhaseState, reward: Number) -> PhaseState:
        """A step without the refusal: for a law that holds this one and refuses for it."""
        step, phase = state.step, state.phase
        history = newest_first(state.history, reward)
        length = clamped((step + 1) // 2, 1, self.window)
        mean, variance = window_moments(history, 0, length)
        mean_before, variance_before = window_moments(history, 1, length)
        ready = step >= 3
        # What float32 cannot resolve is no rise.
        rounding = 1e-6 * (abs(mean) + abs(mean_before))
        error = root((variance + variance_before) / length) + rounding
        # Means of short windows are too noisy to be remembered.
        short = step < 2 * self.window
        new = state._replace(
            rise=select(ready, mean - mean_before, state.rise),
            rise_error=select(ready, error, state.rise_error),
            lowest=smaller(mean, select(short, mean_before, state.lowest)),
            highest=larger(mean, select(short, mean_before, state.highest)),
            history=history,
        )

        # The phase does not end before the warm-up is over, and no phase leads back to it.
        may_leave = select(
            phase == WARM_UP, step >= max(3, self.warm_up), state.dwelt >= self.dwell
        )
        climbs, settled = self._signs(new, mean, variance, phase)

        def chosen(climbing: float, converged: float, plateau: float, held: Number) -> Number:
            other = select(settled, converged, plateau)
            return select(may_leave, select(climbs, climbing, other), held)

        new_phase = chosen(CLIMBING, CONVERGED, PLATEAU, phase)
        return new._replace(
            phase=new_phase,
            factor=chosen(*self.factors[1:], state.factor),
            dwelt=state.dwelt * (new_phase == phase) + 1,
        )

    def _signs(
        self, new: PhaseState, mean: Number, variance: Number, phase: Number
    ) -> tuple[bool | Tensor, bool | Tensor]:
        """Whether the reward climbs, and has settled."""
        climbing, converged = phase == CLIMBING, phase == CONVERGED
        level = select(converged, self.level_leave, self.level_enter)
        rise_needed = select(climbing, self.leave, self.enter)
        if not self.relative:
            settled = (mean > level) & (variance < self.spread_limit**2)
            return new.rise > rise_needed, settled
        unit = new.rise_error
        extent = new.highest - new.lowest
        stands = mean - new.lowest > extent * level
        holds = new.rise >= unit * select(converged, -self.enter, -self.leave)
        # Once converged it has moved: only its level and a fall end that.
        moved = (extent > unit * self.moved) | converged
        return new.rise > unit * rise_needed, stands & holds & moved


def window_moments(history: Number, back: int, length: Number) -> tuple[Number, Number]:
    """Mean and variance (of ``length - 1``) of one of the windows of a history, newest first.

    Args:
        history: A list, or a tensor, in which a window's place may not be known.
        back: How many windows lie before this one.
        length: Of a window.

    Example:
        >>> window_moments([4.0, 2.0, 1.0, 0.0], 0, 2)
        (3.0, 2.0)
    """
    if isinstance(history, Tensor):
        within = torch.arange(history.shape[0], device=history.device) // length == back
        mean = (history * within).sum() / length
        squares = ((history - mean) * within).square().sum()
    else:
        values = history[back * length : (back + 1) * length]
        mean = sum(values) / length
        squares = sum((x - mean) * (x - mean) for x in values)
    return mean, squares / larger(length - 1, 1)
