"""The asymmetric, momentum-aware, entropy-gated penalty on the KL."""

import math

import torch
from torch import Tensor

from safe_ops.arithmetic import Number, clamped, larger
from safe_ops.kl import kl_k1


def entropy_gate(
    entropy: Number,
    *,
    floor: float,
    ceiling: float = math.inf,
    lower: float = 0.5,
    upper: float = 4.0,
    eps: float = 0.1,
) -> Number:
    """How strongly the penalty acts: more when the policy is nearly deterministic, or too random.

        g = clamp( max( floor / (H + eps), (H + eps) / ceiling ), lower, upper )

    Args:
        entropy: H, nats per token; a float, or a tensor of any shape.
        floor: Nats per token; the gate is about 1 there, and more below.
        ceiling: Nats per token; the gate is about 1 there too, and more above: a policy whose
            entropy surges is held as one whose entropy collapses. Paper: none, as with infinity.
        lower: Smallest gate.
        upper: Largest gate. The paper has none: at H = 0 its gate is 20, beyond any margin of
            stability; ``math.inf`` gives the printed equation.
        eps: Nats per token, keeps the quotient finite.

    Returns:
        Shape of ``entropy``, no unit.

    Raises:
        ValueError: ``floor`` or ``eps`` is not positive, ``ceiling`` is below ``floor``, or not
            0 <= lower <= upper.

    Source: SAFE (arXiv 2602.04651), entropy-gated penalty.

    Example:
        >>> entropy_gate(torch.tensor([0.0, 1.9, 8.0]), floor=2.0)
        tensor([4.0000, 1.0000, 0.5000])
        >>> entropy_gate(torch.tensor([1.9, 2.9, 5.9]), floor=2.0, ceiling=3.0)
        tensor([1., 1., 2.])
    """
    if not floor > 0:
        raise ValueError(f"floor must be positive, got {floor}")
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    if not ceiling >= floor:
        raise ValueError(f"ceiling must not be below floor, got {ceiling} and {floor}")
    if not 0 <= lower <= upper:
        raise ValueError(f"lower and upper must satisfy 0 <= lower <= upper, got {lower}, {upper}")
    # An estimate may be below 0 by rounding; the quotient must not change sign.
    spread = larger(entropy, 0.0) + eps
    gate = floor / spread
    if ceiling < math.inf:
        gate = larger(gate, spread / ceiling)
    return clamped(gate, lower, upper)


def gated_kl_penalty(
    kl: Tensor,
    *,
    threshold: float | Tensor,
    gate: float | Tensor = 1.0,
    coef: float | Tensor = 0.1,
    lead: float | Tensor = 0.0,
) -> Tensor:
    """Penalty on the KL above a threshold, taken where the KL is heading.

        f = g * coef * max(0, kl + lead - threshold)^2

    Zero with zero slope up to the threshold. ``kl`` must already be reduced over all ranks and
    micro-batches: f is not linear in it.

    Args:
        kl: Nats per token, any shape; the penalty is differentiable in it.
        threshold: Nats per token.
        gate: g, no unit.
        coef: Per (nat per token)^2.
        lead: Nats per token that the KL is expected to gain.

    Returns:
        Shape of ``kl``.

    Source: SAFE (arXiv 2602.04651), asymmetric KL; the lead is ours.

    Example:
        >>> gated_kl_penalty(torch.tensor([0.2, 0.5]), threshold=0.3, coef=1.0)
        tensor([0.0000, 0.0400])
    """
    return gate * coef * torch.relu(kl + lead - threshold).square()


def momentum_penalty(kl: Tensor, past_kl: Tensor, *, window: int, coef: float = 5.0) -> Tensor:
    """The paper's separate penalty on a rising KL.

        f = coef * max(0, m)^2        m = (kl - past_kl) / window

    Its slope is 2 coef m / window: at a window of 50 a hundredth of the main term's, which is
    why the default law puts the momentum into the lead of ``gated_kl_penalty`` instead.

    Args:
        kl: Nats per token, now; the penalty is differentiable in it.
        past_kl: Nats per token, ``window`` updates ago.
        window: Updates.
        coef: Per (nat per token per update)^2.

    Returns:
        Shape of ``kl``.

    Raises:
        ValueError: ``window`` is less than 1.

    Source: SAFE (arXiv 2602.04651), KL momentum.

    Example:
        >>> momentum_penalty(torch.tensor(0.5), torch.tensor(0.3), window=2)
        tensor(0.0500)
    """
    if window < 1:
        raise ValueError(f"window must be at least 1 update, got {window}")
    return coef * torch.relu((kl - past_kl.detach()) / window).square()


def token_kl_penalty(
    log_prob: Tensor,
    ref_log_prob: Tensor,
    *,
    threshold: float | Tensor,
    gate: float | Tensor = 1.0,
    coef: float | Tensor = 0.1,
) -> Tensor:
    """One-sided penalty on single tokens that became much likelier than under the reference.

        f_t = g * coef * max(0, log pi_t - log ref_t - threshold)^2

    The paper's other reading, "positive log-likelihood deviations": its gradient is the pathwise
    one, of the drawn tokens as they stand.

    Args:
        log_prob: [...], nats; the penalty is differentiable in it.
        ref_log_prob: [...], nats.
        threshold: Nats, broadcast against ``log_prob``.
        gate: No unit.
        coef: Per nat^2.

    Returns:
        [...].

    Raises:
        ValueError: the shapes of the log-probs differ.

    Source: SAFE (arXiv 2602.04651).

    Example:
        >>> token_kl_penalty(torch.tensor([-1.0]), torch.tensor([-2.0]), threshold=0.5, coef=1.0)
        tensor([0.2500])
    """
    log_ratio = kl_k1(log_prob, ref_log_prob.detach())
    return gate * coef * torch.relu(log_ratio - threshold).square()
