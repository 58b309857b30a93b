"""All detectors of a run at once, and what each alarm leads to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from safe_ops.controllers.base import zero_count
from safe_rl.monitoring.detectors import (
    Alarm,
    AlarmState,
    KLRunaway,
    KLRunawayState,
    LossExplosion,
    LossExplosionState,
    RewardCrash,
    RewardCrashState,
    StartRatio,
    StartRatioState,
)

Action = Literal["log", "lower_learning_rate", "tighten_threshold", "roll_back", "stop"]

# What the n-th alarm of a run leads to; the last entry stands for all that follow.
ACTIONS: dict[str, tuple[Action, ...]] = {
    # Of all signals the one with the most noise.
    "reward_crash": ("log", "lower_learning_rate", "roll_back"),
    "entropy_collapse": ("tighten_threshold", "roll_back", "stop"),
    "entropy_surge": ("lower_learning_rate", "roll_back", "stop"),
    "kl_runaway": ("tighten_threshold", "roll_back", "stop"),
    "value_loss_explosion": ("lower_learning_rate", "roll_back"),
    "non_finite": ("roll_back", "roll_back", "stop"),
}
REASONS = {
    "reward_crash": "reward below its recent level, {seen:.3g} deviations in all, limit {limit:g}",
    "entropy_collapse": "entropy {seen:.3g} times its level at the start, limit {limit:g}",
    "entropy_surge": "entropy {seen:.3g} times its level at the start, limit {limit:g}",
    "kl_runaway": "KL {seen:.3g} times its threshold, limit {limit:g}",
    "value_loss_explosion": "value loss {seen:.3g} times its recent level, limit {limit:g}",
    "non_finite": "a share of {seen:.3g} of the optimizer steps was not finite, limit {limit:g}",
}


class MonitorState(NamedTuple):
    """State of ``Monitor``: those of its detectors."""

    reward_crash: RewardCrashState
    entropy_collapse: StartRatioState
    entropy_surge: StartRatioState
    kl_runaway: KLRunawayState
    value_loss_explosion: LossExplosionState
    non_finite: AlarmState
    step: Tensor


@dataclass(frozen=True, kw_only=True)
class Monitor:
    """The detectors of a run, and the answer to each alarm.

    A measurement that is not finite holds the detector that reads it, and the others go on.

    Args:
        reward_crash: Far below its own recent level.
        entropy_collapse: Below a share of the start.
        entropy_surge: Above a multiple of the start.
        kl_runaway: Above a multiple of its threshold.
        value_loss_explosion: Above a multiple of its own recent level.
        non_finite: On the share of an update's optimizer steps that were skipped.
        actions: Detector to what its first, second, … alarm of a run leads to; the last entry
            stands for all that follow, and none at all is "log".
        learning_rate_factor: Of "lower_learning_rate", each time.
        threshold_factor: Of "tighten_threshold", each time.

    Raises:
        ValueError: ``actions`` names an unknown detector or action, or a factor is not within
            (0, 1).

    Example:
        >>> law = Monitor()
        >>> state = law.init()
        >>> for kl in (1.0, 1.2, 1.4):
        ...     state = law.update(state, reward=0.0, entropy=2.0, kl=kl, kl_threshold=0.3,
        ...         value_loss=0.1, skipped=0.0)
        >>> state.kl_runaway.alarm.raised
        tensor(1)
    """

    reward_crash: RewardCrash = field(default_factory=RewardCrash)
    entropy_collapse: StartRatio = field(
        default_factory=lambda: StartRatio(alarm=Alarm(limit=0.3, release=0.5))
    )
    entropy_surge: StartRatio = field(
        default_factory=lambda: StartRatio(alarm=Alarm(limit=1.5, release=1.25))
    )
    kl_runaway: KLRunaway = field(default_factory=KLRunaway)
    value_loss_explosion: LossExplosion = field(default_factory=LossExplosion)
    non_finite: Alarm = field(default_factory=lambda: Alarm(limit=0.25, release=0.01, patience=1))
    actions: Mapping[str, tuple[Action, ...]] = field(default_factory=lambda: dict(ACTIONS))
    learning_rate_factor: float = 0.5
    threshold_factor: float = 0.7

    def __post_init__(self) -> None:
        for name, ladder in self.actions.items():
            if name not in ACTIONS:
                raise ValueError(f"actions must name detectors {list(ACTIONS)}, got {name!r}")
            for action in ladder:
                if action not in get_args(Action):
                    raise ValueError(
                        f"actions of {name!r} must be among {get_args(Action)}, got {action!r}"
                    )
        for name in ("learning_rate_factor", "threshold_factor"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be within (0, 1), got {getattr(self, name)}")

    def init(self) -> MonitorState:
        """All quiet."""
        return MonitorState(
            reward_crash=self.reward_crash.init(),
            entropy_collapse=self.entropy_collapse.init(),
            entropy_surge=self.entropy_surge.init(),
            kl_runaway=self.kl_runaway.init(),
            value_loss_explosion=self.value_loss_explosion.init(),
            non_finite=self.non_finite.init(),
            step=zero_count(),
        )

    def update(
        self,
        state: MonitorState,
        *,
        reward: float | Tensor,
        entropy: float | Tensor,
        kl: float | Tensor,
        kl_threshold: float | Tensor,
        value_loss: float | Tensor,
        skipped: float | Tensor,
    ) -> MonitorState:
        """One update's measurements, reduced over ranks: entropy and KL in nats per token.

        ``skipped`` is the share of its optimizer steps that were not finite.
        """
        return MonitorState(
            reward_crash=self.reward_crash.update(state.reward_crash, reward=reward),
            entropy_collapse=self.entropy_collapse.update(state.entropy_collapse, value=entropy),
            entropy_surge=self.entropy_surge.update(state.entropy_surge, value=entropy),
            kl_runaway=self.kl_runaway.update(state.kl_runaway, kl=kl, threshold=kl_threshold),
            value_loss_explosion=self.value_loss_explosion.update(
                state.value_loss_explosion, loss=value_loss
            ),
            non_finite=self.non_finite.update(state.non_finite, seen=skipped),
            step=state.step + 1,
        )

    def alarms(self, state: MonitorState) -> dict[str, tuple[Alarm, AlarmState]]:
        """Settings and state of the alarm of each detector."""
        found: dict[str, tuple[Alarm, AlarmState]] = {}
        for name in ACTIONS:
            law, part = getattr(self, name), getattr(state, name)
            found[name] = (law, part) if isinstance(law, Alarm) else (law.alarm, part.alarm)
        return found

    def after_roll_back(self, state: MonitorState) -> MonitorState:
        """All alarms over, their numbers and the levels learnt kept: the policy is another."""

        def calmed(alarm: AlarmState) -> AlarmState:
            none = torch.zeros_like(alarm.active)
            return alarm._replace(active=none, beyond=none, calm=none)

        parts: dict[str, Any] = {}
        for name in ACTIONS:
            part = getattr(state, name)
            parts[name] = (
                calmed(part)
                if isinstance(part, AlarmState)
                else part._replace(alarm=calmed(part.alarm))
            )
        return state._replace(**parts)
