"""PID control that cannot wind up."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from safe_ops.arithmetic import Number, clamped, larger, select, smaller
from safe_ops.controllers.advance import advance
from safe_ops.controllers.base import settle, zero, zero_count


class PIDState(NamedTuple):
    """State of ``PID``, in output units but for ``measurement``."""

    output: Tensor
    """Within the law's own limits and rate."""
    proportional: Tensor
    integral: Tensor
    derivative: Tensor
    measurement: Tensor
    """The last one taken in."""
    step: Tensor
    non_finite: Tensor


@dataclass(frozen=True, kw_only=True)
class PID:
    """Brings a measurement y to its setpoint r.

        e = r - y
        P = kp e
        I = I + ki e,  but not beyond where P + I + D meets a limit that e pushes towards
        D = b D - (1 - b) kd (y - last y),  0 at the first update
        u = clamp( P + I + D, last u -+ rate_limit, lower, upper )

    The integral stops at the *final* saturation: give ``update`` the limits that the caller applies
    after this law, and I stops there too. With constant limits and kd = 0 the output leaves a limit
    in the very update in which the error changes sign. I is kept in output units, so that a
    changed ki does not bump the output; D reads the measurement, so a changed setpoint does not.

    Args:
        kp: Output per error.
        ki: Output per error and update.
        kd: Output per change of the measurement in one update.
        setpoint: r, in the unit of the measurement.
        lower: Least output.
        upper: Largest output.
        rate_limit: Largest change of the output in one update; it starts from 0.
        derivative_decay: b, in [0, 1); 0 is no filter.
        integral_limit: Bound on |I|, output units.
        anti_windup: False leaves only ``integral_limit``, as in the paper.

    Raises:
        ValueError: a gain is negative or not finite, or limits are not in order.

    Source: Åström & Murray, Feedback Systems, chapter 11 (windup, filtered derivative).

    Example:
        >>> law = PID(kp=1.0, ki=0.5, setpoint=1.0)
        >>> state = law.update(law.init(), measurement=0.0)
        >>> state.proportional, state.integral, state.output
        (tensor(1.), tensor(0.5000), tensor(1.5000))
    """

    kp: float = 0.0
    ki: float = 0.0
    kd: float = 0.0
    setpoint: float = 0.0
    lower: float = -math.inf
    upper: float = math.inf
    rate_limit: float = math.inf
    derivative_decay: float = 0.9
    integral_limit: float = math.inf
    anti_windup: bool = True

    def __post_init__(self) -> None:
        for name in ("kp", "ki", "kd"):
            gain = getattr(self, name)
            if not (gain >= 0 and math.isfinite(gain)):
                raise ValueError(
                    f"{name} must be finite and not negative, got {gain}: "
                    "for an output that rises with y, give -y and -r"
                )
        if not math.isfinite(self.setpoint):
            raise ValueError(f"setpoint must be finite, got {self.setpoint}")
        if not self.lower <= self.upper:
            raise ValueError(f"lower must not exceed upper, got {self.lower} and {self.upper}")
        if not self.rate_limit > 0:
            raise ValueError(f"rate_limit must be positive, got {self.rate_limit}")
        if not 0 <= self.derivative_decay < 1:
            raise ValueError(f"derivative_decay must be in [0, 1), got {self.derivative_decay}")
        if not self.integral_limit >= 0:
            raise ValueError(f"integral_limit must not be negative, got {self.integral_limit}")

    def init(self) -> PIDState:
        """The state before the first update: everything 0, the output 0 within its limits."""
        output = zero().clamp(self.lower, self.upper)
        return PIDState(output, zero(), zero(), zero(), zero(), zero_count(), zero_count())

    def update(
        self,
        state: PIDState,
        *,
        measurement: float | Tensor,
        setpoint: float | Tensor | None = None,
        lower: float | Tensor | None = None,
        upper: float | Tensor | None = None,
    ) -> PIDState:
        """Take in one measurement.

        Args:
            state: From ``init`` or the last ``update``.
            measurement: y.
            setpoint: r of this update; None: the law's own.
            lower: The caller's own saturation, in output units: I stops there, but clamping is
                left to the caller. Infinite is none.
            upper: Likewise.
        """
        return advance(
            self._step,
            state,
            measurement=measurement,
            setpoint=self.setpoint if setpoint is None else setpoint,
            lower=-math.inf if lower is None else lower,
            upper=math.inf if upper is None else upper,
        )

    def _step(
        self, state: PIDState, *, measurement: Number, setpoint: Number, **limits: Number
    ) -> PIDState:
        new = self.propose(state, measurement, setpoint=setpoint, **limits)
        return settle(state, new, measurement, setpoint)

    def propose(
        self,
        state: PIDState,
        measurement: Number,
        *,
        setpoint: Number,
        lower: Number = -math.inf,
        upper: Number = math.inf,
    ) -> PIDState:
        """A step without the refusal: for a law that holds this one and refuses for it."""
        error = setpoint - measurement
        proportional = self.kp * error
        derivative, others = state.derivative, proportional
        if self.kd > 0:
            change = measurement - select(state.step == 0, measurement, state.measurement)
            derivative = (
                self.derivative_decay * derivative - (1 - self.derivative_decay) * self.kd * change
            )
            others = proportional + derivative
        integral = state.integral + self.ki * error
        slowest, fastest = state.output - self.rate_limit, state.output + self.rate_limit
        if self.anti_windup:
            # As far as the limit, and never backwards: plain holding would stop short of it.
            lower = larger(larger(lower, self.lower), slowest)
            upper = smaller(smaller(upper, self.upper), fastest)
            integral = clamped(
                integral,
                smaller(lower - others, state.integral),
                larger(upper - others, state.integral),
            )
        integral = clamped(integral, -self.integral_limit, self.integral_limit)
        output = clamped(others + integral, slowest, fastest)
        return state._replace(
            output=clamped(output, self.lower, self.upper),
            proportional=proportional,
            integral=integral,
            derivative=derivative,
            measurement=measurement,
        )
