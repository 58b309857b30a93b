"""The SAFE law: threshold, gate and coefficient of the KL penalty, once per rollout."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from safe_ops.controllers.base import measurement, settle, zero, zero_count
from safe_ops.controllers.ema import EMA, EMAState
from safe_ops.controllers.momentum import Momentum, MomentumState
from safe_ops.controllers.phase import Phase, PhaseState
from safe_ops.controllers.pid import PID, PIDState
from safe_ops.gated_kl import entropy_gate, gated_kl_penalty


class EntropyGatedKLState(NamedTuple):
    """State of ``EntropyGatedKL``: what it decided, then the states of its parts."""

    kl_threshold: Tensor
    """Nats per token."""
    entropy_gate: Tensor
    """No unit."""
    kl_coef: Tensor
    """Slope of the penalty at the filtered KL plus lead, f'(KL)."""
    kl_penalty: Tensor
    """The penalty there, f(KL)."""
    kl: Tensor
    """Filtered, nats per token."""
    kl_momentum: Tensor
    """Nats per token per update."""
    kl_lead: Tensor
    """Nats per token that the KL is expected to gain within the horizon."""
    phase: Tensor
    """int64, an index of ``PHASE_NAMES``."""
    kl_filter: EMAState
    momentum: MomentumState
    reward_filter: EMAState
    pid: PIDState
    phases: PhaseState
    non_finite: Tensor
    step: Tensor


@dataclass(frozen=True, kw_only=True)
class EntropyGatedKL:
    """Penalty on the KL above a threshold that follows the reward, stronger at low entropy.

        tau    = clamp( (base + PID(reward velocity)) * phase factor, lower, upper ), rate-limited
        m      = slope of the filtered KL over a window        lead = horizon * max(0, m)
        g      = clamp( floor / (H + eps), gate_lower, gate_upper )
        f      = g * coef * max(0, KL + lead - tau)^2          kl_coef = f'(KL)

    The reward's velocity is the change of its EMA per update. A reward that rises faster than
    ``target_velocity`` widens the threshold, one that falls tightens it. One non-finite
    measurement holds the whole state, the penalty included, and is counted.

    Attributes:
        coef: lambda, per (nat per token)^2; 0 switches the penalty off.
        threshold: base, nats per token.
        threshold_lower: Least threshold.
        threshold_upper: Largest threshold.
        threshold_rate: Largest change of the threshold, nats per token per update. The paper has
            none: a change of phase moved it by half its range at once.
        horizon: Updates ahead for which the momentum counts. The paper penalises m itself, with a
            hundredth of the main term's slope.
        entropy_floor: Nats per token where the gate is about 1.
        gate_lower: Least gate.
        gate_upper: Largest gate. The paper's reaches 20, beyond any margin of stability.
        target_velocity: Reward units per update.
        kl_filter: Of the measured KL. Bias-corrected: right from the first update.
        momentum: Window of m.
        reward_filter: Of the reward, before its velocity is taken.
        pid: On the velocity; its output is in nats per token.
        phases: Phase factors.

    Raises:
        ValueError: a value is out of range.

    Source: SAFE (arXiv 2602.04651).

    Example:
        >>> law = EntropyGatedKL(coef=1.0)
        >>> state = law.update(law.init(), kl=1.0, entropy=1.9, reward=0.0)
        >>> state.kl_threshold, state.kl_coef
        (tensor(0.4500), tensor(1.1000))
    """

    coef: float = 0.1
    threshold: float = 0.3
    threshold_lower: float = 0.1
    threshold_upper: float = 0.6
    threshold_rate: float = 0.05
    horizon: float = 2.0
    entropy_floor: float = 2.0
    gate_lower: float = 0.5
    gate_upper: float = 4.0
    target_velocity: float = 0.001
    kl_filter: EMA = field(default_factory=lambda: EMA(decay=0.9))
    momentum: Momentum = field(default_factory=lambda: Momentum(window=50))
    reward_filter: EMA = field(default_factory=lambda: EMA(decay=0.95))
    pid: PID = field(
        default_factory=lambda: PID(kp=5.0, ki=0.1, direct=True, lower=-0.15, upper=0.15)
    )
    phases: Phase = field(default_factory=Phase)

    def __post_init__(self) -> None:
        for name in ("coef", "horizon"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} must be finite and not negative, got {getattr(self, name)}"
                )
        if not 0 < self.threshold_lower <= self.threshold <= self.threshold_upper < math.inf:
            raise ValueError(
                "threshold_lower, threshold and threshold_upper must be positive and in order, "
                f"got {self.threshold_lower}, {self.threshold}, {self.threshold_upper}"
            )
        if not self.threshold_rate > 0:
            raise ValueError(f"threshold_rate must be positive, got {self.threshold_rate}")
        if not math.isfinite(self.target_velocity):
            raise ValueError(f"target_velocity must be finite, got {self.target_velocity}")
        if not self.entropy_floor > 0:
            raise ValueError(f"entropy_floor must be positive, got {self.entropy_floor}")
        if not 0 <= self.gate_lower <= self.gate_upper:
            raise ValueError(
                "gate_lower and gate_upper must satisfy 0 <= gate_lower <= gate_upper, "
                f"got {self.gate_lower}, {self.gate_upper}"
            )

    def init(self) -> EntropyGatedKLState:
        """Warm-up, no penalty."""
        phases = self.phases.init()
        start = (self.threshold * phases.factor).clamp(self.threshold_lower, self.threshold_upper)
        return EntropyGatedKLState(
            kl_threshold=start,
            entropy_gate=torch.ones(()),
            kl_coef=zero(),
            kl_penalty=zero(),
            kl=zero(),
            kl_momentum=zero(),
            kl_lead=zero(),
            phase=zero_count(),
            kl_filter=self.kl_filter.init(),
            momentum=self.momentum.init(),
            reward_filter=self.reward_filter.init(),
            pid=self.pid.init(),
            phases=phases,
            non_finite=zero_count(),
            step=zero_count(),
        )

    def update(
        self,
        state: EntropyGatedKLState,
        *,
        kl: float | Tensor,
        entropy: float | Tensor,
        reward: float | Tensor,
    ) -> EntropyGatedKLState:
        """One update from the rollout's KL and entropy (nats per token) and mean reward."""
        kl = measurement("kl", kl, like=state.step)
        entropy = measurement("entropy", entropy, like=state.step)
        reward = measurement("reward", reward, like=state.step)

        kl_filter = self.kl_filter.update(state.kl_filter, value=kl)
        momentum = self.momentum.update(state.momentum, value=kl_filter.value)
        lead = self.horizon * torch.relu(momentum.momentum)
        # Entropy of a categorical is not negative; an estimate may be, by rounding.
        gate = entropy_gate(
            entropy.clamp_min(0),
            floor=self.entropy_floor,
            lower=self.gate_lower,
            upper=self.gate_upper,
        )
        reward_filter = self.reward_filter.update(state.reward_filter, value=reward)
        phases = self.phases.update(state.phases, reward=reward)
        pid = self._move_pid(state, reward_filter, phases)
        threshold = self._threshold(state, pid, phases)

        filtered = kl_filter.value
        penalty = gated_kl_penalty(
            filtered, threshold=threshold, gate=gate, coef=self.coef, lead=lead
        )
        slope = 2 * gate * self.coef * torch.relu(filtered + lead - threshold)
        new = EntropyGatedKLState(
            kl_threshold=threshold,
            entropy_gate=gate,
            kl_coef=slope,
            kl_penalty=penalty,
            kl=filtered,
            kl_momentum=momentum.momentum,
            kl_lead=lead,
            phase=phases.phase,
            kl_filter=kl_filter,
            momentum=momentum,
            reward_filter=reward_filter,
            pid=pid,
            phases=phases,
            non_finite=state.non_finite,
            step=state.step + 1,
        )
        return settle(state, new, kl, entropy, reward)

    def _move_pid(
        self, state: EntropyGatedKLState, reward_filter: EMAState, phases: PhaseState
    ) -> PIDState:
        """A reward that outruns its target widens the threshold.

        The limits are those of the threshold, seen from the PID, so that the integral stops where
        the threshold does.
        """
        velocity = reward_filter.value - state.reward_filter.value
        # The first update has no velocity yet; it counts as being on target.
        velocity = torch.where(state.step > 0, velocity, self.target_velocity)
        return self.pid.update(
            state.pid,
            setpoint=self.target_velocity,
            measurement=velocity,
            lower=self.threshold_lower / phases.factor - self.threshold,
            upper=self.threshold_upper / phases.factor - self.threshold,
        )

    def _threshold(self, state: EntropyGatedKLState, pid: PIDState, phases: PhaseState) -> Tensor:
        wanted = (self.threshold + pid.output) * phases.factor
        least = (state.kl_threshold - self.threshold_rate).clamp_min(self.threshold_lower)
        most = (state.kl_threshold + self.threshold_rate).clamp_max(self.threshold_upper)
        return torch.maximum(torch.minimum(wanted, most), least)
