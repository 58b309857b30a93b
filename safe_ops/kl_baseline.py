"""The KL still to come, and the baseline that takes the noise out of its gradient."""

from collections.abc import Callable

import torch
from torch import Tensor

from safe_ops.gae import generalized_advantage_estimate
from safe_ops.kl import kl_k1
from safe_ops.masked import fill_masked


def kl_to_go(log_prob: Tensor, ref_log_prob: Tensor, *, mask: Tensor, decay: float = 1.0) -> Tensor:
    """Log-ratio of each token and of those after it: one sample of the KL still to come.

        K_t = sum_{u >= t} decay^{u-t} k1_u

    Args:
        log_prob: [B, T], nats, of the drawn tokens under pi.
        ref_log_prob: [B, T], nats, under the reference.
        mask: bool [B, T], True on response tokens, EOS included.
        decay: In [0, 1].

    Returns:
        [B, T], nats, detached; 0 where ``mask`` is False.

    Raises:
        ValueError: shapes disagree, or ``mask`` is not bool.

    Example:
        >>> kl_to_go(torch.zeros(1, 2), -torch.ones(1, 2), mask=torch.ones(1, 2).bool())
        tensor([[2., 1.]])
    """
    # A return is an advantage over nothing.
    return generalized_advantage_estimate(
        kl_k1(log_prob, ref_log_prob),
        torch.zeros_like(log_prob),
        mask=mask,
        terminated=torch.zeros_like(mask),
        gae_lambda=decay,
    ).advantage


def kl_baseline(
    log_prob: Tensor,
    ref_log_prob: Tensor,
    *,
    mask: Tensor,
    decay: float = 1.0,
    sum_over_ranks: Callable[..., tuple[Tensor, ...]] | None = None,
) -> Tensor:
    """Baseline of ``kl_surrogate``: what the other sequences still had to come at the same place.

        b_t = 1 + mean_{other rows that reach t} K_t

    Leaving the row itself out keeps the gradient unbiased. Make it once per rollout, from the
    log-probs of the policy that drew it. Where no other row reaches t, b_t is 1.

    Args:
        log_prob: [B, T], nats, of the drawn tokens under the policy that drew them.
        ref_log_prob: [B, T], nats, under the reference.
        mask: bool [B, T], True on response tokens, EOS included.
        decay: That of the surrogate.
        sum_over_ranks: Adds its tensors [T] over all ranks; None: one rank.

    Returns:
        [B, T], nats, detached; 0 where ``mask`` is False.

    Raises:
        ValueError: shapes disagree, or ``mask`` is not bool.

    Example:
        >>> log_prob = torch.tensor([[-1.0], [-1.0]])
        >>> ref_log_prob = torch.tensor([[-1.5], [-3.0]])
        >>> kl_baseline(log_prob, ref_log_prob, mask=torch.ones(2, 1).bool())
        tensor([[3.0000],
                [1.5000]])
    """
    to_go = kl_to_go(log_prob, ref_log_prob, mask=mask, decay=decay)
    total, count = to_go.sum(0), mask.sum(0).to(to_go.dtype)
    if sum_over_ranks is not None:
        total, count = (tensor.to(to_go.dtype) for tensor in sum_over_ranks(total, count))
    others = (count - 1).clamp_min(1)
    return fill_masked(1 + torch.where(count > 1, (total - to_go) / others, 0.0), mask)
