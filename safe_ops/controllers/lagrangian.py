"""Multiplier of a constraint, by PID control."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from safe_ops.arithmetic import Number, clamped, larger, select, smaller
from safe_ops.controllers.advance import advance
from safe_ops.controllers.base import settle, zero, zero_count


class PIDLagrangianState(NamedTuple):
    """State of ``PIDLagrangian``, in reward units per unit of cost but for ``error``, ``cost``."""

    multiplier: Tensor
    """lambda, never negative."""
    error: Tensor
    """cost - limit."""
    proportional: Tensor
    integral: Tensor
    derivative: Tensor
    cost: Tensor
    """The last one taken in."""
    step: Tensor
    non_finite: Tensor


@dataclass(frozen=True, kw_only=True)
class PIDLagrangian:
    """Multiplier that holds a cost below its limit.

        e = cost - limit
        P = kp e
        D = b D + (1 - b) kd max(0, cost - last cost),  0 at the first update
        I = clamp( I + ki e, 0, largest )       largest: where P + I + D meets the limit above
        multiplier = clamp( P + min(I + D, upper), last multiplier -+ rate_limit, 0, upper )

    Minimise ``loss + multiplier * cost``, or that over ``1 + multiplier``, so that a large
    multiplier does not lengthen the step. kp = kd = 0 is plain dual ascent, whose multiplier lags a
    quarter of a period behind the cost: the two circle each other, and kp damps that.

    Only a *rising* cost has a derivative. I shrinks while the constraint holds and does not grow
    past the saturation, so with a kp > 0 the multiplier leaves 0 or ``upper`` in the very update in
    which the error changes sign.

    Args:
        limit: Largest cost wanted, in the unit of the cost.
        kp: Multiplier per error.
        ki: Multiplier per error and update.
        kd: Multiplier per rise of the cost in one update.
        initial: Multiplier before the first update; the integral starts there.
        upper: Largest multiplier.
        rate_limit: Largest change of the multiplier in one update.
        derivative_decay: b, in [0, 1); 0 is no filter, as printed.

    Raises:
        ValueError: a parameter is out of its range.

    Source: Stooke, Achiam & Abbeel (arXiv 2007.03964), algorithm 2; the limits above, the filter
        and the anti-windup are ours.

    Example:
        >>> law = PIDLagrangian(limit=1.0, kp=0.5, ki=0.1)
        >>> state = law.update(law.init(), cost=3.0)
        >>> state.proportional, state.integral, state.multiplier
        (tensor(1.), tensor(0.2000), tensor(1.2000))
    """

    limit: float
    kp: float = 0.1
    ki: float = 0.01
    kd: float = 0.0
    initial: float = 0.0
    upper: float = 100.0
    rate_limit: float = math.inf
    derivative_decay: float = 0.9

    def __post_init__(self) -> None:
        if not math.isfinite(self.limit):
            raise ValueError(f"limit must be finite, got {self.limit}")
        for name in ("kp", "ki", "kd"):
            gain = getattr(self, name)
            if not 0 <= gain < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {gain}")
        if not 0 <= self.initial <= self.upper < math.inf:
            raise ValueError(
                "initial and upper must satisfy 0 <= initial <= upper < inf, "
                f"got {self.initial} and {self.upper}"
            )
        if not self.rate_limit > 0:
            raise ValueError(f"rate_limit must be positive, got {self.rate_limit}")
        if not 0 <= self.derivative_decay < 1:
            raise ValueError(f"derivative_decay must be in [0, 1), got {self.derivative_decay}")

    def init(self) -> PIDLagrangianState:
        """The state before the first update."""
        return PIDLagrangianState(
            multiplier=torch.tensor(self.initial, dtype=torch.float32),
            error=zero(),
            proportional=zero(),
            integral=torch.tensor(self.initial, dtype=torch.float32),
            derivative=zero(),
            cost=zero(),
            step=zero_count(),
            non_finite=zero_count(),
        )

    def update(self, state: PIDLagrangianState, *, cost: float | Tensor) -> PIDLagrangianState:
        """Take in the mean cost of one rollout."""
        return advance(self._step, state, cost=cost)

    def _step(self, state: PIDLagrangianState, cost: Number) -> PIDLagrangianState:
        error = cost - self.limit
        proportional = self.kp * error
        rise = select(state.step == 0, 0.0, larger(cost - state.cost, 0.0))
        decay = self.derivative_decay
        derivative = decay * state.derivative + (1 - decay) * self.kd * rise
        slowest = larger(state.multiplier - self.rate_limit, 0.0)
        fastest = smaller(state.multiplier + self.rate_limit, self.upper)
        # Up to the saturation and not beyond; what was there before may stay.
        largest = larger(fastest - proportional - derivative, state.integral)
        integral = clamped(smaller(state.integral + self.ki * error, largest), 0.0, self.upper)
        demand = proportional + smaller(integral + derivative, self.upper)
        new = state._replace(
            multiplier=clamped(demand, slowest, fastest),
            error=error,
            proportional=proportional,
            integral=integral,
            derivative=derivative,
            cost=cost,
        )
        return settle(state, new, cost)
