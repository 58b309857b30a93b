"""The clipped surrogate of PPO and what to watch beside it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from safe_ops.kl import kl_k3
from safe_ops.masked import fill_masked, masked_mean, masked_sum


class ClippedPolicyTerms(NamedTuple):
    """The loss per token, and its diagnostics, detached."""

    loss: Tensor
    """[B, T], 0 where the mask is False; differentiable in ``log_prob``."""
    clip_fraction: Tensor
    """0-d, share of tokens where the clip is active."""
    ratio_max: Tensor
    """0-d, the largest importance ratio."""
    effective_sample_size: Tensor
    """0-d, share of the tokens: (sum w)^2 / (n sum w^2); 1 on-policy."""
    kl_old_k3: Tensor
    """0-d, KL(old || new) estimate, nats per token."""


def clipped_policy_terms(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    mask: Tensor,
    clip: float | tuple[float, float] | Tensor = 0.2,
) -> ClippedPolicyTerms:
    """The clipped surrogate per token, for a caller with a denominator of his own.

        l_t = -min( w_t A_t, clip(w_t, 1 - low, 1 + high) A_t )      w_t = exp(log pi - log old)

    Args:
        log_prob: [B, T], nats, of the policy that is trained.
        old_log_prob: [B, T], nats, of the policy that drew the tokens.
        advantage: [B, T].
        mask: bool [B, T], True = counts.
        clip: Half-width of the trust interval of the ratio, or (low, high); a tensor, 0-d or [2],
            is not looked at, so that one graph holds while it changes.

    Returns:
        ``ClippedPolicyTerms``.

    Raises:
        ValueError: shapes disagree, ``mask`` is not bool, or ``clip`` is not positive.

    Source: Schulman et al. (arXiv 1707.06347).

    Example:
        >>> one = torch.ones(1, 1)
        >>> clipped_policy_terms(-one, -one, 2 * one, mask=one.bool()).loss
        tensor([[-2.]])
    """
    low, high = _interval(clip, log_prob.dtype)
    for name, tensor in {"old_log_prob": old_log_prob, "advantage": advantage}.items():
        if tensor.shape != log_prob.shape:
            raise ValueError(
                f"{name} must have the shape of log_prob, "
                f"got {tuple(tensor.shape)} and {tuple(log_prob.shape)}"
            )
    log_ratio = fill_masked(log_prob - old_log_prob.detach(), mask)
    advantage = fill_masked(advantage.detach(), mask)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - low, 1 + high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    weight = ratio.detach()
    active = (clipped * advantage < ratio * advantage).to(weight.dtype)
    count = mask.sum().clamp_min(1)
    weight_sum = masked_sum(weight, mask)
    square_sum = masked_sum(weight.square(), mask)
    return ClippedPolicyTerms(
        loss=fill_masked(loss, mask),
        clip_fraction=masked_mean(active, mask).detach(),
        ratio_max=_largest(fill_masked(weight, mask)),
        effective_sample_size=weight_sum.square()
        / (count * square_sum).clamp_min(torch.finfo(weight.dtype).tiny),
        kl_old_k3=masked_mean(kl_k3(torch.zeros_like(weight), log_ratio.detach()), mask),
    )


def _interval(clip: float | tuple[float, float] | Tensor, dtype: torch.dtype) -> tuple[Any, Any]:
    if isinstance(clip, Tensor):
        low, high = clip.to(dtype).expand(2).unbind()
        return low, high
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    if not (low > 0 and high > 0):
        raise ValueError(f"clip must be positive, got {clip}")
    return low, high


def _largest(x: Tensor) -> Tensor:
    """0 of nothing."""
    return x.amax() if x.numel() else x.sum()


def clipped_policy_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    *,
    mask: Tensor,
    clip: float | tuple[float, float] | Tensor = 0.2,
) -> Tensor:
    """The clipped surrogate of PPO as a loss: the mean of its terms over the tokens that count.

        L = -mean_t min( w_t A_t, clip(w_t, 1 - low, 1 + high) A_t )

    Args:
        log_prob: [B, T], nats, of the policy that is trained.
        old_log_prob: [B, T], nats, of the policy that drew the tokens.
        advantage: [B, T].
        mask: bool [B, T], True = counts.
        clip: As ``clipped_policy_terms``.

    Returns:
        0-d, differentiable in ``log_prob``.

    Raises:
        ValueError: shapes disagree, ``mask`` is not bool, or ``clip`` is not positive.

    Source: Schulman et al. (arXiv 1707.06347).

    Example:
        >>> one = torch.ones(1, 1)
        >>> clipped_policy_loss(-one, -one, 2 * one, mask=one.bool())
        tensor(-2.)
    """
    terms = clipped_policy_terms(log_prob, old_log_prob, advantage, mask=mask, clip=clip)
    return masked_mean(terms.loss, mask)
