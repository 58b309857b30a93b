"""Value losses: Huber or squared, clipped or not, for every head."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from safe_ops.masked import fill_masked, masked_mean, masked_var


def value_terms(
    value: Tensor,
    value_target: Tensor,
    *,
    mask: Tensor,
    huber_delta: float | None = 0.5,
    old_value: Tensor | None = None,
    clip: float | Tensor | None = None,
) -> Tensor:
    """The value loss per token, averaged over the heads: every head is fitted to the target.

        l(v) = Huber_delta(v - target)              or (v - target)^2 / 2 without a delta
        with a clip: (l(v) + l(old + clamp(v - old, -clip, clip))) / 2

    A loss on the soft-min alone would leave the higher head untrained, since its gradient is its
    soft-min weight. Value clipping often hurts and is off unless asked for.

    Args:
        value: [B, T] or [B, T, K] for K heads.
        value_target: [B, T] or [B, T, 1], shared by the heads, or the shape of ``value``.
        mask: bool [B, T], True = counts.
        huber_delta: Where the loss turns linear, in reward units; None is the squared loss.
        old_value: Shape of ``value``; the values at the rollout, needed with ``clip``.
        clip: Half-width of the clipped change, in the units of the return; None: no clip. A 0-d
            tensor is not looked at, so that one graph holds while it changes.

    Returns:
        [B, T], 0 where ``mask`` is False; differentiable in ``value``.

    Raises:
        ValueError: shapes disagree, ``mask`` is not bool, ``huber_delta`` or ``clip`` is not
            positive, or ``clip`` is given without ``old_value`` or the other way round.

    Source: SAFE (arXiv 2602.04651), critic loss.

    Example:
        >>> value = torch.tensor([[[0.0, 1.0]]])
        >>> value_terms(value, torch.zeros(1, 1), mask=torch.ones(1, 1).bool(), huber_delta=None)
        tensor([[0.2500]])
    """
    if huber_delta is not None and not huber_delta > 0:
        raise ValueError(f"huber_delta must be positive, got {huber_delta}")
    if clip is not None and not isinstance(clip, Tensor) and not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}")
    if (clip is None) != (old_value is None):
        raise ValueError("clip and old_value go together: give both or neither")
    heads = value if value.ndim == mask.ndim + 1 else value.unsqueeze(-1)
    target = value_target if value_target.ndim == heads.ndim else value_target.unsqueeze(-1)
    if heads.shape[:-1] != mask.shape or target.shape[:-1] != mask.shape:
        raise ValueError(
            "value must be [B, T] or [B, T, K] and value_target [B, T] like mask, got value "
            f"{tuple(value.shape)}, value_target {tuple(value_target.shape)}, "
            f"mask {tuple(mask.shape)}"
        )
    if target.shape[-1] not in (1, heads.shape[-1]):
        raise ValueError(
            "value_target must have one entry a token or one a head, "
            f"got value {tuple(value.shape)} and value_target {tuple(value_target.shape)}"
        )
    counts = mask.unsqueeze(-1).expand_as(heads)
    heads = fill_masked(heads, counts)
    target = fill_masked(target.detach().expand_as(heads), counts)
    loss = _distance(heads, target, huber_delta)
    if old_value is not None and clip is not None:
        if old_value.shape != value.shape:
            raise ValueError(
                "old_value must have the shape of value, "
                f"got {tuple(old_value.shape)} and {tuple(value.shape)}"
            )
        old = fill_masked(old_value.detach().reshape(heads.shape), counts)
        limit: Any = clip
        clipped = old + (heads - old).clamp(-limit, limit)
        loss = (loss + _distance(clipped, target, huber_delta)) / 2
    return fill_masked(loss.mean(-1), mask)


def _distance(value: Tensor, target: Tensor, huber_delta: float | None) -> Tensor:
    if huber_delta is None:
        return (value - target).square() / 2
    return F.huber_loss(value, target, reduction="none", delta=huber_delta)


def value_loss(
    value: Tensor,
    value_target: Tensor,
    *,
    mask: Tensor,
    huber_delta: float | None = 0.5,
    old_value: Tensor | None = None,
    clip: float | Tensor | None = None,
) -> Tensor:
    """The mean of ``value_terms`` over the tokens that count.

    Args:
        value: [B, T] or [B, T, K] for K heads.
        value_target: [B, T] or [B, T, 1], shared by the heads, or the shape of ``value``.
        mask: bool [B, T], True = counts.
        huber_delta: Where the loss turns linear, in reward units; None is the squared loss.
        old_value: Shape of ``value``; the values at the rollout, needed with ``clip``.
        clip: Half-width of the clipped change, in the units of the return; None: no clip. A 0-d
            tensor is not looked at, so that one graph holds while it changes.

    Returns:
        0-d, differentiable in ``value``.

    Raises:
        ValueError: as ``value_terms``.

    Source: SAFE (arXiv 2602.04651), critic loss.

    Example:
        >>> value_loss(torch.ones(1, 1), torch.zeros(1, 1), mask=torch.ones(1, 1).bool())
        tensor(0.3750)
    """
    terms = value_terms(
        value,
        value_target,
        mask=mask,
        huber_delta=huber_delta,
        old_value=old_value,
        clip=clip,
    )
    return masked_mean(terms, mask)


def explained_variance(value: Tensor, value_target: Tensor, *, mask: Tensor) -> Tensor:
    """Share of the target's variance that the value explains: 1 is perfect, 0 no better than mean.

        1 - var(target - value) / var(target)

    Args:
        value: [B, T].
        value_target: [B, T].
        mask: bool [B, T], True = counts.

    Returns:
        0-d, detached; 0 where the target does not vary.

    Raises:
        ValueError: shapes disagree or ``mask`` is not bool.

    Example:
        >>> target = torch.tensor([[0.0, 1.0]])
        >>> explained_variance(target, target, mask=torch.ones(1, 2).bool())
        tensor(1.)
    """
    if not value.shape == value_target.shape == mask.shape:
        raise ValueError(
            f"value and value_target must have the shape of mask, got value {tuple(value.shape)}, "
            f"value_target {tuple(value_target.shape)}, mask {tuple(mask.shape)}"
        )
    residual = masked_var((value_target - value).detach(), mask)
    total = masked_var(value_target.detach(), mask)
    share = 1 - residual / torch.where(total > 0, total, torch.ones_like(total))
    # A target that hardly varies: the quotient may overflow.
    share = share.clamp(min=torch.finfo(share.dtype).min)
    return torch.where(total > 0, share, torch.zeros_like(share))
