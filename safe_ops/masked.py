"""Reductions under a mask: the only place where they are written."""

import torch
from torch import Tensor


def _check_mask(x: Tensor, mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool (True = counts), got {mask.dtype}")
    if mask.shape != x.shape:
        raise ValueError(
            f"mask and x must have one shape, got mask {tuple(mask.shape)} and x {tuple(x.shape)}"
        )


def fill_masked(x: Tensor, mask: Tensor, value: float = 0.0) -> Tensor:
    """Put a harmless value where the mask is False, before anything is computed there.

    ``where`` after a product is too late: the forward is right but 0 * inf or 0 * nan poisons
    the gradient.

    Args:
        x: Any shape.
        mask: bool, shape of ``x``; True = counts.
        value: What stands in the places that do not count.

    Returns:
        Shape and dtype of ``x``; no gradient flows to the filled places.

    Raises:
        ValueError: ``mask`` is not bool or differs in shape.

    Example:
        >>> fill_masked(torch.tensor([1.0, torch.nan]), torch.tensor([True, False]))
        tensor([1., 0.])
    """
    _check_mask(x, mask)
    return torch.where(mask, x, torch.full_like(x, value))


def masked_sum(x: Tensor, mask: Tensor, *, dim: int | None = None) -> Tensor:
    """Sum of the entries that count.

    Args:
        x: Any shape. What stands where ``mask`` is False may be anything, nan included.
        mask: bool, shape of ``x``; True = counts.
        dim: Dimension to sum over; None sums over all.

    Returns:
        0-d, or the shape of ``x`` without ``dim``.

    Raises:
        ValueError: ``mask`` is not bool or differs in shape.

    Example:
        >>> masked_sum(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([True, True, False]))
        tensor(3.)
    """
    filled = fill_masked(x, mask)
    return filled.sum() if dim is None else filled.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, *, dim: int | None = None) -> Tensor:
    """Mean of the entries that count; 0 where none does.

    Args:
        x: Any shape. What stands where ``mask`` is False may be anything, nan included.
        mask: bool, shape of ``x``; True = counts.
        dim: Dimension to reduce; None reduces all.

    Returns:
        0-d, or the shape of ``x`` without ``dim``.

    Raises:
        ValueError: ``mask`` is not bool or differs in shape.

    Example:
        >>> masked_mean(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([True, True, False]))
        tensor(1.5000)
    """
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(x, mask, dim=dim) / count.clamp_min(1)


def masked_var(x: Tensor, mask: Tensor, *, dim: int | None = None) -> Tensor:
    """Variance of the entries that count, with their number as denominator; 0 where none does.

    Args:
        x: Any shape. What stands where ``mask`` is False may be anything, nan included.
        mask: bool, shape of ``x``; True = counts.
        dim: Dimension to reduce; None reduces all.

    Returns:
        0-d, or the shape of ``x`` without ``dim``. Never negative.

    Raises:
        ValueError: ``mask`` is not bool or differs in shape.

    Example:
        >>> masked_var(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
        tensor(1.)
    """
    mean = masked_mean(x, mask, dim=dim)
    if dim is not None:
        mean = mean.unsqueeze(dim)
    return masked_mean((fill_masked(x, mask) - mean).square(), mask, dim=dim)


def masked_whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Scale the entries that count to unit variance, and to zero mean unless told otherwise.

        y = (x - mean) / sqrt(var + eps)        (+ mean, if not shift_mean)

    Mean and variance are over all entries that count, so pass the whole rollout, not one
    minibatch. With zero variance (one entry, or all alike) the result is 0 (+ mean).

    Args:
        x: Any shape.
        mask: bool, shape of ``x``; True = counts.
        shift_mean: Whether the mean goes. False rescales around it.
        eps: Added to the variance.

    Returns:
        Shape of ``x``; 0 where ``mask`` is False.

    Raises:
        ValueError: ``mask`` is not bool or differs in shape.

    Example:
        >>> masked_whiten(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
        tensor([-1.,  1.,  0.])
    """
    mean = masked_mean(x, mask)
    whitened = (fill_masked(x, mask) - mean) * torch.rsqrt(masked_var(x, mask) + eps)
    if not shift_mean:
        whitened = whitened + mean
    return fill_masked(whitened, mask)
