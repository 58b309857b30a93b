"""What goes wrong in a run, as laws: each reads one number per update and raises an alarm.

They are control laws in the sense of ``safe_ops.controllers``: frozen settings, a pure ``update``
over a state of tensors, no wall clock, non-finite measurements held and counted. Put into a
``Controller`` they are saved with a run.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from safe_ops.arithmetic import (
    Number,
    clamped,
    exponential,
    larger,
    logarithm,
    negated,
    root,
    select,
)
from safe_ops.controllers.advance import advance
from safe_ops.controllers.base import settle, zero, zero_count
from safe_ops.controllers.ema import EMA, EMAState


class AlarmState(NamedTuple):
    """State of ``Alarm``."""

    seen: Tensor
    """The last value, in the unit of the limit."""
    active: Tensor
    """int64, 1 from an alarm until it is over."""
    raised: Tensor
    """int64, alarms so far."""
    beyond: Tensor
    """int64, updates in a row beyond the limit, since the last alarm."""
    calm: Tensor
    """int64, updates in a row on the good side of ``release``."""
    step: Tensor
    non_finite: Tensor


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """Raised by several values in a row beyond a limit, over after as many back at ``release``.

    While the value stays beyond, it is raised again every ``again`` updates: the answer had time to
    work, and a stronger one can follow. Between limit and release nothing happens: no flapping.

    Args:
        limit: In the unit of what is seen.
        release: On the good side of ``limit``, which tells that side: below it for a value that
            must not grow, above it for one that must not shrink.
        patience: Updates in a row.
        again: Updates in a row, during an alarm.

    Raises:
        ValueError: limit and release are equal or not finite, or ``patience`` or ``again`` is no
            positive whole number.

    Example:
        >>> law = Alarm(limit=3.0, release=1.0, patience=2)
        >>> state = law.init()
        >>> for seen in (4.0, 2.0, 4.0, 5.0):
        ...     state = law.update(state, seen=seen)
        >>> state.raised, state.active
        (tensor(1), tensor(1))
    """

    limit: float
    release: float
    patience: int = 3
    again: int = 5

    def __post_init__(self) -> None:
        if not (math.isfinite(self.limit) and math.isfinite(self.release)):
            raise ValueError(f"limit and release must be finite, got {self.limit}, {self.release}")
        if self.limit == self.release:
            raise ValueError(
                "release must differ from limit, on the good side of it, "
                f"got {self.release} and {self.limit}"
            )
        for name in ("patience", "again"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}")

    def init(self) -> AlarmState:
        """Quiet."""
        return AlarmState(
            seen=zero(),
            active=zero_count(),
            raised=zero_count(),
            beyond=zero_count(),
            calm=zero_count(),
            step=zero_count(),
            non_finite=zero_count(),
        )

    def is_beyond(self, seen: Number) -> bool | Tensor:
        """Whether a value is on the bad side of the limit."""
        return seen > self.limit if self.release < self.limit else seen < self.limit

    def update(self, state: AlarmState, *, seen: float | Tensor) -> AlarmState:
        """Take in one value."""
        return advance(self.step, state, seen=seen)

    def step(self, state: AlarmState, seen: Number) -> AlarmState:
        """``update``, for a detector that holds this alarm."""
        is_calm = seen <= self.release if self.release < self.limit else seen >= self.release
        beyond: Number = select(self.is_beyond(seen), state.beyond + 1, 0)
        calm: Number = select(is_calm, state.calm + 1, 0)
        rises = beyond >= select(state.active > 0, self.again, self.patience)
        active: Number = select(calm >= self.patience, 0, state.active)
        new = state._replace(
            seen=seen,
            active=larger(active, rises * 1),
            raised=state.raised + rises,
            beyond=beyond * negated(rises),
            calm=calm,
        )
        return settle(state, new, seen)


class RewardCrashState(NamedTuple):
    """State of ``RewardCrash``; rewards in reward units."""

    alarm: AlarmState
    score: Tensor
    """Deviations below the level beyond the slack, summed up."""
    mean: EMAState
    square: EMAState
    """Of the distance of a reward from the mean before it, squared."""
    step: Tensor
    non_finite: Tensor


@dataclass(frozen=True, kw_only=True)
class RewardCrash:
    """The reward falls below its own recent level, and stays there.

        z     = (mean - reward) / deviation         both averages of the rewards before
        score = clamp( score + min(z, cap) - slack, 0, limit + 2 slack )

    A deep fall is seen after three updates, one by three deviations after some six, a single
    outlier never. A reward a r + b with a > 0 is judged like r. While the score has half its
    limit the averages are held; once the alarm is raised they go on, the new level is learnt and
    the alarm ends.

    False alarms per update on a level reward, in 600,000 simulated updates each: 1e-5 with normal
    noise, 7e-5 with heavy tails (Student, 3 degrees of freedom), 8e-4 with noise of
    autocorrelation .5.

    Args:
        alarm: On the score.
        slack: Deviations below the level that are not counted.
        cap: Most deviations that one update counts for, below the alarm's limit.
        average: Of level and squared deviation.
        warm_up: Updates before the first judgement.

    Raises:
        ValueError: ``slack`` and ``cap`` are not in order, ``warm_up`` is below 2, or ``alarm`` is
            not one for a value that grows.

    Source: Page's cumulative sum (Biometrika 41, 1954), on deviations from running averages.

    Example:
        >>> law = RewardCrash(warm_up=4)
        >>> state = law.init()
        >>> for reward in (0.5, 0.6, 0.5, 0.6, 0.5, -1.0, -1.0, -1.0):
        ...     state = law.update(state, reward=reward)
        >>> state.alarm.raised
        tensor(1)
    """

    alarm: Alarm = field(default_factory=lambda: Alarm(limit=6.0, release=1.0, patience=1))
    slack: float = 1.0
    cap: float = 4.0
    average: EMA = field(default_factory=lambda: EMA(decay=0.95))
    warm_up: int = 10

    def __post_init__(self) -> None:
        _check_grows(self.alarm)
        _check_warm_up(self.warm_up)
        if not 0 < self.slack < self.cap < math.inf:
            raise ValueError(
                f"slack and cap must satisfy 0 < slack < cap, got {self.slack}, {self.cap}"
            )

    def init(self) -> RewardCrashState:
        """No level yet."""
        return RewardCrashState(
            alarm=self.alarm.init(),
            score=zero(),
            mean=self.average.init(),
            square=self.average.init(),
            step=zero_count(),
            non_finite=zero_count(),
        )

    def update(self, state: RewardCrashState, *, reward: float | Tensor) -> RewardCrashState:
        """Take in the mean reward of one rollout."""
        return advance(self._step, state, reward=reward)

    def _step(self, state: RewardCrashState, reward: Number) -> RewardCrashState:
        fall = state.mean.value - reward
        # What float32 cannot resolve is no deviation; a constant reward that falls is far beyond.
        rounding = 1e-6 * (abs(state.mean.value) + abs(reward)) + 1e-30
        deviations = clamped(fall / (root(state.square.value) + rounding), -self.cap, self.cap)
        judged = select(state.step >= self.warm_up, deviations, 0.0)
        # Bounded above, so that a reward that is back counts as back after a few updates.
        highest = self.alarm.limit + 2 * self.slack
        score = clamped(state.score + judged - self.slack, 0.0, highest)
        alarm = self.alarm.step(state.alarm, score)
        held = (score >= self.alarm.limit / 2) & (alarm.active == 0)
        mean = _averaged(self.average, state.mean, reward)
        square = _averaged(self.average, state.square, fall * fall)
        # The first reward has nothing to deviate from.
        square = select(state.step > 0, square, state.square)
        new = state._replace(
            alarm=alarm,
            score=score,
            mean=select(held, state.mean, mean),
            square=select(held, state.square, square),
        )
        return settle(state, new, reward)


class StartRatioState(NamedTuple):
    """State of ``StartRatio``."""

    alarm: AlarmState
    start: Tensor
    """Mean of the first values."""
    step: Tensor
    non_finite: Tensor


@dataclass(frozen=True, kw_only=True)
class StartRatio:
    """A positive quantity against its own mean at the start: entropy that collapses or surges.

        seen = value / mean of the first W values

    However slowly it gets there: a slow collapse is the one that goes unnoticed. With noise of a
    tenth of the level, the defaults of ``Monitor`` (.3 and 1.5) are 5 deviations away or more.

    Args:
        alarm: Limits as shares of the start.
        window: W, updates, before the first judgement.

    Raises:
        ValueError: ``window`` is not a positive whole number, or the limits are on both sides of 1.

    Example:
        >>> law = StartRatio(alarm=Alarm(limit=0.3, release=0.5, patience=1), window=1)
        >>> state = law.update(law.init(), value=2.0)
        >>> law.update(state, value=0.4).alarm.seen
        tensor(0.2000)
    """

    alarm: Alarm
    window: int = 5

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"window must be a positive whole number, got {self.window!r}")
        grows = self.alarm.release < self.alarm.limit
        if not (self.alarm.limit > 1 if grows else 0 < self.alarm.limit < 1):
            raise ValueError(
                "limit must be above 1 for a value that must not grow, between 0 and 1 for one "
                f"that must not shrink, got {self.alarm}"
            )

    def init(self) -> StartRatioState:
        """No start yet."""
        return StartRatioState(
            alarm=self.alarm.init(), start=zero(), step=zero_count(), non_finite=zero_count()
        )

    def update(self, state: StartRatioState, *, value: float | Tensor) -> StartRatioState:
        """Take in the value of one rollout."""
        return advance(self._step, state, value=value)

    def _step(self, state: StartRatioState, value: Number) -> StartRatioState:
        count = state.step + 1
        mean = state.start + (value - state.start) / count
        start = select(count <= self.window, mean, state.start)
        seen = select(count > self.window, value / larger(start, 1e-30), 1.0)
        new = state._replace(alarm=self.alarm.step(state.alarm, seen), start=start)
        return settle(state, new, value)


class KLRunawayState(NamedTuple):
    """State of ``KLRunaway``."""

    alarm: AlarmState
    step: Tensor
    non_finite: Tensor


@dataclass(frozen=True, kw_only=True)
class KLRunaway:
    """The KL is a multiple of the threshold that should hold it.

        seen = KL / threshold

    A penalty alone rests above its threshold, by drift over gain; the default is beyond that.

    Args:
        alarm: In thresholds.

    Raises:
        ValueError: ``alarm`` is not one for a value that grows.

    Example:
        >>> law = KLRunaway()
        >>> law.update(law.init(), kl=0.9, threshold=0.3).alarm.seen
        tensor(3.0000)
    """

    alarm: Alarm = field(default_factory=lambda: Alarm(limit=3.0, release=1.5, patience=3))

    def __post_init__(self) -> None:
        _check_grows(self.alarm)

    def init(self) -> KLRunawayState:
        """Quiet."""
        return KLRunawayState(alarm=self.alarm.init(), step=zero_count(), non_finite=zero_count())

    def update(
        self, state: KLRunawayState, *, kl: float | Tensor, threshold: float | Tensor
    ) -> KLRunawayState:
        """Take in the KL of one rollout and its threshold, nats per token."""
        return advance(self._step, state, kl=kl, threshold=threshold)

    def _step(self, state: KLRunawayState, kl: Number, threshold: Number) -> KLRunawayState:
        # A threshold of 0 has no multiple: refused as not finite.
        seen = kl / select(threshold > 0, threshold, math.nan)
        return settle(state, state._replace(alarm=self.alarm.step(state.alarm, seen)), seen)


class LossExplosionState(NamedTuple):
    """State of ``LossExplosion``; logarithms of the loss."""

    alarm: AlarmState
    log_mean: EMAState
    log_highest: Tensor
    """Of ``log_mean``, so far."""
    step: Tensor
    non_finite: Tensor


@dataclass(frozen=True, kw_only=True)
class LossExplosion:
    """A positive loss rises far above its own recent level, in whatever unit.

        seen = loss / max( m, floor_share * largest m so far )      m: geometric mean, recent

    What is beyond the limit does not enter the mean until the alarm is raised.

    Args:
        alarm: In multiples of the level.
        average: Of the logarithm of the loss.
        floor_share: A loss that has become tiny may grow back to this share of its old level.
        warm_up: Updates before the first judgement.

    Raises:
        ValueError: ``floor_share`` is not within (0, 1], ``warm_up`` is below 2, or ``alarm`` is
            not one for a value that grows.

    Example:
        >>> law = LossExplosion(warm_up=2)
        >>> state = law.init()
        >>> for loss in (0.1, 0.1, 0.1, 5.0):
        ...     state = law.update(state, loss=loss)
        >>> state.alarm.seen
        tensor(50.)
    """

    alarm: Alarm = field(default_factory=lambda: Alarm(limit=10.0, release=3.0, patience=2))
    average: EMA = field(default_factory=lambda: EMA(decay=0.9))
    floor_share: float = 0.01
    warm_up: int = 5

    def __post_init__(self) -> None:
        _check_grows(self.alarm)
        _check_warm_up(self.warm_up)
        if not 0 < self.floor_share <= 1:
            raise ValueError(f"floor_share must be within (0, 1], got {self.floor_share}")

    def init(self) -> LossExplosionState:
        """No level yet."""
        return LossExplosionState(
            alarm=self.alarm.init(),
            log_mean=self.average.init(),
            log_highest=zero(),
            step=zero_count(),
            non_finite=zero_count(),
        )

    def update(self, state: LossExplosionState, *, loss: float | Tensor) -> LossExplosionState:
        """Take in the loss of one update."""
        return advance(self._step, state, loss=loss)

    def _step(self, state: LossExplosionState, loss: Number) -> LossExplosionState:
        log_loss = logarithm(larger(loss, 1e-30))
        level = larger(state.log_mean.value, state.log_highest + math.log(self.floor_share))
        # Bounded, so that the quotient of finite losses is finite.
        seen = exponential(clamped(log_loss - level, -80.0, 80.0))
        seen = select(state.step >= self.warm_up, seen, 1.0)
        alarm = self.alarm.step(state.alarm, seen)
        held = (alarm.beyond > 0) & (alarm.active == 0)
        log_mean = select(held, state.log_mean, _averaged(self.average, state.log_mean, log_loss))
        highest = larger(log_mean.value, state.log_highest)
        new = state._replace(
            alarm=alarm,
            log_mean=log_mean,
            log_highest=select(state.step == 0, log_mean.value, highest),
        )
        return settle(state, new, loss)


def _averaged(average: EMA, state: EMAState, value: Number) -> EMAState:
    return settle(state, average.propose(state, value), value)


def _check_grows(alarm: Alarm) -> None:
    if not alarm.release < alarm.limit:
        raise ValueError(f"release must be below limit here, got {alarm.release}, {alarm.limit}")


def _check_warm_up(warm_up: int) -> None:
    if not isinstance(warm_up, int) or warm_up < 2:
        raise ValueError(f"warm_up must be a whole number, at least 2, got {warm_up!r}")
