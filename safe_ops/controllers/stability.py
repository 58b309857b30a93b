"""How much gain the KL loop bears: the formulas of docs/stability.md, on floats."""

import cmath
import math


def stable_gain(decay: float, *, ki: float = 0.0, delay: int = 0) -> float:
    """Gain below which small disturbances of the KL die out.

        KL+ = KL + d - k (s - tau + o)        s = b s + (1 - b) KL        o = o + ki (s - tau)

        delay 0: k < 4 (1 + b) / ((1 - b) (2 + ki)), given ki < (1 - b) / b
        delay 1: k < 1 - ki / (1 - b)

    Linearised around the rest point, where KL = tau + d / k (= tau with ki > 0). Both are exact:
    above them some small disturbance grows. The loop's gain k is ``2 coef gate lr |grad KL|^2`` for
    plain gradient steps, taken at the largest gate; with Adam it is identified from a run.

    Args:
        decay: b, of the KL filter, in [0, 1).
        ki: Of ``EntropyGatedKL.kl_integral``.
        delay: Updates between the measured policy and the one that is corrected, 0 or 1.

    Returns:
        The limit of k; 0 where no gain is stable.

    Raises:
        ValueError: ``decay``, ``ki`` or ``delay`` is out of its range.

    Example:
        >>> round(stable_gain(0.7), 2), round(stable_gain(0.7, delay=1), 2)
        (11.33, 1.0)
    """
    _check(decay)
    if not 0 <= ki < math.inf:
        raise ValueError(f"ki must be finite and not negative, got {ki}")
    if delay not in (0, 1):
        raise ValueError(f"delay must be 0 or 1, got {delay}")
    if delay == 1:
        return max(0.0, 1 - ki / (1 - decay))
    if ki * decay >= 1 - decay:
        return 0.0
    return 4 * (1 + decay) / ((1 - decay) * (2 + ki))


def stable_gain_with_momentum(decay: float, *, momentum: float) -> float:
    """``stable_gain`` where the optimizer averages its gradients, as Adam does with beta1.

        k < min( 2 (1 + b) (1 + m) / ((1 - b) (1 - m)),  (1 - b m) / (b m) )

    The average is one more lag in the loop, and a costly one: at b = 0.7 and m = 0.9 the limit is
    0.59 and not 11.3. k is the lasting effect of a penalty on the KL, all steps that the average
    spreads it over included; for Adam that is ``2 coef gate lr sum_i (d KL / d theta_i)^2 /
    (sqrt(v_i) + eps)``, with v as it stands. No delay and no integral action.

    Args:
        decay: b, of the KL filter, in [0, 1).
        momentum: m, in [0, 1), over one update of the law: beta1^n with n optimizer steps in it.

    Raises:
        ValueError: ``decay`` or ``momentum`` is outside [0, 1).

    Example:
        >>> round(stable_gain_with_momentum(0.7, momentum=0.9), 3)
        0.587
    """
    _check(decay)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), got {momentum}")
    flips = 2 * (1 + decay) * (1 + momentum) / ((1 - decay) * (1 - momentum))
    product = decay * momentum
    return min(flips, (1 - product) / product) if product > 0 else flips


def smooth_gain(decay: float, *, delay: int = 0) -> float:
    """Largest gain without integral action at which the KL settles without overshooting.

        delay 0: k <= (1 - sqrt b) / (1 + sqrt b)        delay 1: k <= (1 - b) / 4

    Args:
        decay: b, of the KL filter, in [0, 1).
        delay: As in ``stable_gain``.

    Raises:
        ValueError: ``decay`` or ``delay`` is out of its range.

    Example:
        >>> round(smooth_gain(0.9), 4), round(smooth_gain(0.9, delay=1), 4)
        (0.0263, 0.025)
    """
    _check(decay)
    if delay not in (0, 1):
        raise ValueError(f"delay must be 0 or 1, got {delay}")
    if delay == 1:
        return (1 - decay) / 4
    root = math.sqrt(decay)
    return (1 - root) / (1 + root)


def global_gain(decay: float) -> float:
    """Gain below which the KL settles at tau + d / k from any start.

        k < 2 (1 - b) / (1 + b)

    Sufficient, not necessary, for delay 0, plain gradient steps and no integral action:
    ``(KL - rest)^2 + (s - KL)^2 / b`` falls at every update, also on the flat side of the ramp and
    at the floor KL = 0. (At b = 0 it is the local limit: both are 2.)

    Args:
        decay: b, of the KL filter, in [0, 1).

    Raises:
        ValueError: ``decay`` is outside [0, 1).

    Example:
        >>> round(global_gain(0.7), 3)
        0.353
    """
    _check(decay)
    return 2 * (1 - decay) / (1 + decay)


def kl_excess_bound(
    decay: float, *, gain: float, drift: float, threshold_rate: float = 0.0
) -> float:
    """How far above its threshold the KL can ever be, in a run that starts at the reference.

        KL - tau <= d/c + r (1/c - b/(1 - b))        c = min(k, smooth_gain(b))

    For delay 0, a KL that drifts up by at most d per update, a threshold that falls by at most r
    per update, and *every* gain k or more, stable or not: a larger gate, a lead and an offset can
    only push the KL further down.

    Args:
        decay: b, of the KL filter, in [0, 1).
        gain: k at the *smallest* gate.
        drift: d, nats per token per update, not negative.
        threshold_rate: r, nats per token per update, not negative.

    Returns:
        Nats per token.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> round(kl_excess_bound(0.7, gain=0.05, drift=0.01, threshold_rate=0.002), 4)
        0.2353
    """
    _check(decay)
    if not gain > 0:
        raise ValueError(f"gain must be positive, got {gain}")
    for name, value in (("drift", drift), ("threshold_rate", threshold_rate)):
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    c = min(gain, smooth_gain(decay))
    return drift / c + threshold_rate * (1 / c - decay / (1 - decay))


def reward_loop_gain(
    *, kp: float, slope: float, deviation: float, decay: float, window: int, factor: float = 1.0
) -> float:
    """How much of a change of the threshold comes back through the reward; below 1 it dies out.

        kp factor slope / deviation * max over w of |1 - z^-W| / W * (1 - b) / |1 - b z^-1|,
        z = e^iw

    A wider threshold lets the KL rise, the reward rises with it, and its velocity widens the
    threshold: positive feedback. Sufficient by the small-gain theorem where the KL follows its
    threshold without overshooting (k <= smooth_gain). Above 1 threshold, KL and reward may swing
    for ever within the PID's authority, and the phases with them.

    Args:
        kp: Of ``EntropyGatedKL.pid``.
        slope: Reward per nat per token, by which the reward follows the KL.
        deviation: The reward's mean absolute deviation (its noise; 1 if not ``normalize_reward``).
        decay: b, of the reward filter, in [0, 1).
        window: W, of the velocity.
        factor: Largest of the phases.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> round(reward_loop_gain(kp=2.0, slope=1.2, deviation=0.08, decay=0.95, window=10), 2)
        1.33
    """
    _check(decay)
    for name, value in (("deviation", deviation), ("window", window)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    peak = 0.0
    for i in range(1, 1001):
        z = cmath.exp(-1j * math.pi * i / 1000)
        peak = max(peak, abs((1 - z**window) / window * (1 - decay) / (1 - decay * z)))
    return kp * factor * abs(slope) / deviation * peak


def _check(decay: float) -> None:
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}")
