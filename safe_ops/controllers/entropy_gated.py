"""The SAFE law: threshold, gate and coefficient of the KL penalty, once per rollout."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from safe_ops.arithmetic import Number, all_within, clamped, larger, negated, select, smaller
from safe_ops.controllers.advance import advance
from safe_ops.controllers.base import counted, take, zero, zero_count
from safe_ops.controllers.ema import EMA, EMAState
from safe_ops.controllers.momentum import Momentum, MomentumState
from safe_ops.controllers.phase import WARM_UP, Phase, PhaseState
from safe_ops.controllers.pid import PID, PIDState
from safe_ops.gated_kl import entropy_gate


class EntropyGatedKLState(NamedTuple):
    """State of ``EntropyGatedKL``: what it decided, then the states of its parts."""

    kl_threshold: Tensor
    """tau, nats per token."""
    entropy_gate: Tensor
    """g, no unit."""
    kl_coef: Tensor
    """f'(KL), per nat per token: what multiplies the KL surrogate in the loss."""
    kl_penalty: Tensor
    """f(KL)."""
    kl: Tensor
    """Filtered, nats per token."""
    kl_momentum: Tensor
    """Nats per token per update."""
    kl_trend: Tensor
    """Nats per token per update, from the two averages; 0 if ``trend_weight`` is."""
    kl_lead: Tensor
    """Nats per token that the KL is expected to gain within the horizon."""
    kl_offset: Tensor
    """Nats per token, the integral of the KL above its threshold; 0 if ``kl_integral`` is off."""
    threshold_shift: Tensor
    """Nats per token, the PID's output within its authority."""
    reward_velocity: Tensor
    """Deviations per update (reward units per update if not ``normalize_reward``)."""
    phase: Tensor
    """int64, an index of ``PHASE_NAMES``."""
    step: Tensor
    """int64, updates with every measurement finite."""
    non_finite: Tensor
    """int64, the other updates; each part counts its own as well."""
    kl_filter: EMAState
    kl_long_filter: EMAState
    momentum: MomentumState
    kl_integral: PIDState
    reward_filter: EMAState
    reward_deviation: EMAState
    velocity: MomentumState
    pid: PIDState
    phases: PhaseState


@dataclass(frozen=True, kw_only=True)
class EntropyGatedKL:
    """Penalty on the KL above a threshold that follows the reward, stronger at low entropy.

        KL   = kl_filter(measured)        m = momentum(KL)
        n    = (KL - kl_long_filter(measured)) / (lag of the long filter - lag of the short one)
        lead = horizon max( 0, (1 - trend_weight) m + trend_weight n )
        tau  = clamp( (threshold + shift) * phase factor, lower, upper ), rate-limited
        shift = PID(reward velocity - target_velocity), within +- authority
        g    = clamp( max(entropy_floor / (H + eps), (H + eps) / entropy_ceiling), gate_lower,
                      gate_upper )
        f    = g ( coef max(0, KL + lead + offset - tau)^2 + momentum_coef max(0, m)^2 )
        kl_coef = f'(KL) = 2 g ( coef max(0, KL + lead + offset - tau) + momentum_coef max(0, m)/w )

    with lead and offset held in the derivative. A reward that rises faster than ``target_velocity``
    widens the threshold, one that falls tightens it. Before the first KL nothing is penalised.

    A measurement that is not finite, or beyond 1e9 in magnitude, holds the parts that read it, and
    the others go on: the KL is controlled while the reward is missing, and by the last KL while
    that is missing. A part that is off (``trend_weight`` 0, ``kl_integral`` without gains) stays as
    it began. ``paper()`` is the law as printed; what the default changes is marked "Paper:".

    Args:
        coef: lambda, per (nat per token)^2; 0 switches the penalty off.
        momentum_coef: lambda_m. Paper: 5. Its slope is a hundredth of the main term's at w = 50.
        horizon: Updates ahead for which the rate of the KL counts, instead. Paper: 0.
        trend_weight: In [0, 1], the share of n in that rate. Both are exact on a ramp; n is the
            quieter and the later one, and grows into the slope over the long filter's lag.
        threshold: Nats per token, before shift and phase.
        threshold_lower: Least tau.
        threshold_upper: Largest tau.
        threshold_rate: Largest change of tau, nats per token per update. Paper: none; a change of
            phase halves tau at once, and the penalty jumps.
        entropy_floor: Nats per token, the gate is about 1 there.
        entropy_ceiling: Nats per token, the gate is about 1 there too and more above, within
            gate_upper. Paper: none.
        entropy_eps: Nats per token.
        gate_lower: Least gate.
        gate_upper: Largest gate. Paper: none; 20 at H = 0, beyond any margin of stability.
        target_velocity: In units of ``reward_velocity``. Paper: 0.001 reward units per update. A
            reward that is level misses any positive target for ever, so that the integral would
            sink to its limit in every converged run.
        normalize_reward: Divide the velocity by the reward's mean absolute deviation, so that the
            gains hold for any reward. Paper: False.
        pid_authority: Largest shift, as a share of threshold_upper - threshold_lower. Paper: none.
        pid_in_warm_up: Paper: True. Otherwise the PID is enabled, without a bump, when the warm-up
            ends and the velocity is an average.
        kl_filter: Paper: decay 0.9, a lag of 9 updates; ours lags by 2.3.
        kl_long_filter: Slower than ``kl_filter``; only read if ``trend_weight`` is positive. Paper:
            decay 0.99, and its value is never used.
        momentum: Paper: window 50, in which a KL may run away unseen.
        kl_integral: On KL - tau, giving the offset; off with its default ki = 0. With ki > 0 the KL
            settles at tau, where the penalty alone rests above it, by drift over gain. Its
            ``lower`` and ``upper`` bound the offset, nats per token.
        reward_filter: Before the velocity.
        reward_deviation: Average of |reward - filtered reward|. Slower than the filter, so that the
            quotient stays bounded after a jump.
        velocity: Of the filtered reward. Paper: window 1, which is mostly noise.
        pid: On the velocity, in nats per token; its integral stops where tau stops, its rate limit
            enables it without a bump. A reward that climbs evenly is ``1 / lag`` of its filter in
            velocity, .05: kp = .5 then adds .03 at once and the integral as much in 100 updates. A
            kp of 2 swings where the reward follows the KL (docs/stability.md). Paper: moves tau by
            about 0.03 at most, and winds up.
        phases: Paper: absolute reward, no hysteresis.

    Raises:
        ValueError: a parameter is out of its range.

    Source: SAFE (arXiv 2602.04651).

    Example:
        >>> law = EntropyGatedKL(coef=1.0)
        >>> state = law.update(law.init(), kl=1.0, entropy=1.9, reward=0.0)
        >>> state.kl_threshold, state.kl_coef
        (tensor(0.4500), tensor(1.1000))
    """

    coef: float = 0.1
    momentum_coef: float = 0.0
    horizon: float = 5.0
    trend_weight: float = 0.0
    threshold: float = 0.3
    threshold_lower: float = 0.1
    threshold_upper: float = 0.6
    threshold_rate: float = 0.02
    entropy_floor: float = 2.0
    entropy_ceiling: float = math.inf
    entropy_eps: float = 0.1
    gate_lower: float = 0.5
    gate_upper: float = 4.0
    target_velocity: float = 0.0
    normalize_reward: bool = True
    pid_authority: float = 0.3
    pid_in_warm_up: bool = False
    kl_filter: EMA = field(default_factory=lambda: EMA(decay=0.7))
    kl_long_filter: EMA = field(default_factory=lambda: EMA(decay=0.99))
    momentum: Momentum = field(default_factory=lambda: Momentum(window=10))
    kl_integral: PID = field(default_factory=lambda: PID(ki=0.0, lower=0.0, upper=0.3))
    reward_filter: EMA = field(default_factory=lambda: EMA(decay=0.95))
    reward_deviation: EMA = field(default_factory=lambda: EMA(decay=0.99))
    velocity: Momentum = field(default_factory=lambda: Momentum(window=10))
    pid: PID = field(default_factory=lambda: PID(kp=0.5, ki=0.005, rate_limit=0.02))
    phases: Phase = field(default_factory=Phase)

    def __post_init__(self) -> None:
        for name in ("coef", "momentum_coef", "horizon", "gate_lower"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        for name in ("threshold_rate", "pid_authority", "entropy_floor", "entropy_eps"):
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if not self.entropy_ceiling >= self.entropy_floor:
            raise ValueError(
                "entropy_ceiling must not be below entropy_floor, "
                f"got {self.entropy_ceiling} and {self.entropy_floor}"
            )
        if not 0 <= self.trend_weight <= 1:
            raise ValueError(f"trend_weight must be in [0, 1], got {self.trend_weight}")
        if self.trend_weight > 0 and not self.kl_long_filter.decay > self.kl_filter.decay:
            raise ValueError(
                "kl_long_filter must be slower than kl_filter, got decays "
                f"{self.kl_long_filter.decay} and {self.kl_filter.decay}"
            )
        if not 0 < self.threshold_lower <= self.threshold <= self.threshold_upper < math.inf:
            raise ValueError(
                "threshold_lower, threshold and threshold_upper must be positive and in order, "
                f"got {self.threshold_lower}, {self.threshold}, {self.threshold_upper}"
            )
        if not self.gate_lower <= self.gate_upper:
            raise ValueError(
                "gate_lower must not exceed gate_upper, "
                f"got {self.gate_lower} and {self.gate_upper}"
            )
        offset = self.kl_integral
        if not 0 <= offset.lower <= offset.upper < math.inf:
            raise ValueError(
                "kl_integral must have limits with 0 <= lower <= upper < inf, "
                f"got {offset.lower} and {offset.upper}"
            )
        if not math.isfinite(self.target_velocity):
            raise ValueError(f"target_velocity must be finite, got {self.target_velocity}")

    @classmethod
    def paper(cls) -> "EntropyGatedKL":
        """The printed equations with the reference code's constants, for comparison.

        Not safe to run as it is: see each "Paper:" above.

        Example:
            >>> EntropyGatedKL.paper().momentum_coef
            5.0
        """
        return cls(
            momentum_coef=5.0,
            horizon=0.0,
            threshold_rate=math.inf,
            gate_upper=math.inf,
            target_velocity=0.001,
            normalize_reward=False,
            pid_authority=math.inf,
            pid_in_warm_up=True,
            kl_filter=EMA(decay=0.9),
            momentum=Momentum(window=50),
            velocity=Momentum(window=1),
            # The printed clamp of +-1 is on the sum of errors, ours on ki times it.
            pid=PID(
                kp=0.3,
                ki=0.01,
                kd=0.05,
                derivative_decay=0.0,
                integral_limit=0.01,
                anti_windup=False,
            ),
            phases=Phase.paper(),
        )

    def init(self) -> EntropyGatedKLState:
        """Warm-up, no penalty."""
        phases = self.phases.init()
        start = (self.threshold * phases.factor).clamp(self.threshold_lower, self.threshold_upper)
        return EntropyGatedKLState(
            kl_threshold=start,
            entropy_gate=torch.ones((), dtype=torch.float32),
            kl_coef=zero(),
            kl_penalty=zero(),
            kl=zero(),
            kl_momentum=zero(),
            kl_trend=zero(),
            kl_lead=zero(),
            kl_offset=zero(),
            threshold_shift=zero(),
            reward_velocity=zero(),
            phase=zero_count(),
            step=zero_count(),
            non_finite=zero_count(),
            kl_filter=self.kl_filter.init(),
            kl_long_filter=self.kl_long_filter.init(),
            momentum=self.momentum.init(),
            kl_integral=self.kl_integral.init(),
            reward_filter=self.reward_filter.init(),
            reward_deviation=self.reward_deviation.init(),
            velocity=self.velocity.init(),
            pid=self.pid.init(),
            phases=phases,
        )

    def update(
        self,
        state: EntropyGatedKLState,
        *,
        kl: float | Tensor,
        entropy: float | Tensor,
        reward: float | Tensor,
    ) -> EntropyGatedKLState:
        """One rollout's KL and entropy (nats per token) and mean reward."""
        return advance(self._step, state, kl=kl, entropy=entropy, reward=reward)

    def _step(
        self, state: EntropyGatedKLState, *, kl: Number, entropy: Number, reward: Number
    ) -> EntropyGatedKLState:
        new, good_reward = self._update_threshold(state, reward)
        new, good_entropy = self._update_gate(new, entropy)
        new, good_kl = self._update_penalty(new, kl)
        good = good_reward & good_entropy & good_kl
        return new._replace(
            step=counted(state.step, good), non_finite=counted(state.non_finite, negated(good))
        )

    def _update_threshold(
        self, state: EntropyGatedKLState, reward: Number
    ) -> tuple[EntropyGatedKLState, bool | Tensor]:
        """The state with a new threshold, and whether the reward could be used."""
        filtered = self.reward_filter.propose(state.reward_filter, reward)
        deviation = self.reward_deviation.propose(
            state.reward_deviation, abs(reward - state.reward_filter.value)
        )
        slope = self.velocity.propose(state.velocity, filtered.value)
        velocity = slope.momentum
        if self.normalize_reward:
            # Where the reward has never deviated, its velocity is 0.
            velocity = velocity / larger(deviation.value, TINY)
        phases = self.phases.propose(state.phases, reward)

        limit = self.pid_authority * (self.threshold_upper - self.threshold_lower)
        down, up = (state.kl_threshold + x for x in (-self.threshold_rate, self.threshold_rate))
        # The rate comes first: limits that were moved past the threshold are approached at it.
        slowest = smaller(larger(down, self.threshold_lower), up)
        fastest = larger(smaller(up, self.threshold_upper), down)
        # The final saturation as the PID sees it. Minus turns its sign: a fast reward widens tau.
        pid = self.pid.propose(
            state.pid,
            -velocity,
            setpoint=-self.target_velocity,
            lower=larger(slowest / phases.factor - self.threshold, -limit),
            upper=smaller(fastest / phases.factor - self.threshold, limit),
        )

        good = _usable(reward, filtered, deviation, slope, phases, pid)
        refused = negated(good)
        # The first reward has nothing to deviate from.
        deviates = state.reward_filter.step > 0
        active = good if self.pid_in_warm_up else good & (phases.phase != WARM_UP)
        filtered = take(state.reward_filter, filtered, accepted=good, refused=refused)
        deviation = take(
            state.reward_deviation, deviation, accepted=good & deviates, refused=refused
        )
        slope = take(state.velocity, slope, accepted=good, refused=refused)
        phases = take(state.phases, phases, accepted=good, refused=refused)
        pid = take(state.pid, pid, accepted=active, refused=refused)

        shift = clamped(pid.output, -limit, limit)
        threshold = clamped((self.threshold + shift) * phases.factor, slowest, fastest)
        return state._replace(
            kl_threshold=select(good, threshold, state.kl_threshold),
            threshold_shift=shift,
            reward_velocity=select(good, velocity, state.reward_velocity),
            phase=phases.phase,
            reward_filter=filtered,
            reward_deviation=deviation,
            velocity=slope,
            pid=pid,
            phases=phases,
        ), good

    def _update_gate(
        self, state: EntropyGatedKLState, entropy: Number
    ) -> tuple[EntropyGatedKLState, bool | Tensor]:
        """The state with a new gate, and whether the entropy could be used."""
        gate = entropy_gate(
            entropy,
            floor=self.entropy_floor,
            ceiling=self.entropy_ceiling,
            lower=self.gate_lower,
            upper=self.gate_upper,
            eps=self.entropy_eps,
        )
        good = _usable(entropy)
        return state._replace(entropy_gate=select(good, gate, state.entropy_gate)), good

    def _update_penalty(
        self, state: EntropyGatedKLState, kl: Number
    ) -> tuple[EntropyGatedKLState, bool | Tensor]:
        """The state with a new penalty, and whether the KL could be used."""
        filtered = self.kl_filter.propose(state.kl_filter, kl)
        momentum = self.momentum.propose(state.momentum, filtered.value)
        long, integral = state.kl_long_filter, state.kl_integral
        follows_trend = self.trend_weight > 0
        integrates = max(self.kl_integral.kp, self.kl_integral.ki, self.kl_integral.kd) > 0
        if follows_trend:
            long = self.kl_long_filter.propose(long, kl)
        if integrates:
            # The offset's limits are the law's own.
            integral = self.kl_integral.propose(
                integral, -filtered.value, setpoint=-state.kl_threshold
            )
        good = _usable(kl, filtered, long, momentum, integral)
        refused = negated(good)
        filtered = take(state.kl_filter, filtered, accepted=good, refused=refused)
        momentum = take(state.momentum, momentum, accepted=good, refused=refused)
        kl, rate, trend = filtered.value, momentum.momentum, state.kl_trend
        if integrates:
            integral = take(state.kl_integral, integral, accepted=good, refused=refused)
        if follows_trend:
            long = take(state.kl_long_filter, long, accepted=good, refused=refused)
            # Both averages start at the first KL, so the full lag makes n too small at first.
            trend = (kl - long.value) / (_lag(self.kl_long_filter) - _lag(self.kl_filter))
            rate = (1 - self.trend_weight) * rate + self.trend_weight * trend
        lead = self.horizon * larger(rate, 0.0)
        offset = integral.output
        gate = state.entropy_gate
        # gated_kl_penalty and its derivative, of one excess.
        excess = larger(kl + lead + offset - state.kl_threshold, 0.0)
        slope = 2 * self.coef * gate * excess
        penalty = 0.5 * slope * excess
        if self.momentum_coef > 0:
            # momentum_penalty and its derivative.
            rising = self.momentum_coef * gate * larger(momentum.momentum, 0.0)
            penalty = penalty + rising * momentum.momentum
            slope = slope + 2 / self.momentum.window * rising
        return state._replace(
            kl_coef=slope,
            kl_penalty=penalty,
            kl=kl,
            kl_momentum=momentum.momentum,
            kl_trend=trend,
            kl_lead=lead,
            kl_offset=offset,
            kl_filter=filtered,
            kl_long_filter=long,
            momentum=momentum,
            kl_integral=integral,
        ), good


TINY = 1e-30

LIMIT = 1e9
"""Magnitude beyond which a number counts as not finite: then no product of two overflows."""


def _lag(law: EMA) -> float:
    """Updates by which an average that has seen much follows a ramp."""
    return law.decay / (1 - law.decay)


def _usable(measured: Number, *parts: tuple) -> bool | Tensor:
    """Whether a measurement and all numbers that its laws propose are within LIMIT."""
    numbers = [
        leaf
        for part in parts
        for leaf in part
        if (leaf.ndim == 0 if isinstance(leaf, Tensor) else not isinstance(leaf, list))
    ]
    return all_within(LIMIT, [measured, *numbers])
