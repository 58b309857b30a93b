"""Soft-min of critics: a pessimistic value between their minimum and their mean."""

import math

import torch
from torch import Tensor


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def soft_min(values: Tensor, temperature: float, *, dim: int = -1) -> Tensor:
    """Pessimistic combination of critics, between their minimum and their mean.

        V = -a * log(mean_k exp(-v_k / a))

    For K critics and any a > 0:  min v <= V <= min(mean v, min v + a log K). It is shift
    equivariant, symmetric, monotone and 1-Lipschitz in the sup norm; its gradient is
    ``soft_min_weights``.

    Args:
        values: One estimate per critic, [..., K], in reward units.
        temperature: a, in reward units. Small is near the minimum, large near the mean.
        dim: The critic dimension.

    Returns:
        [...], in the dtype of ``values``; differentiable.

    Raises:
        ValueError: ``temperature`` is not positive and finite.

    Source: SAFE (arXiv 2602.04651), double soft-min critic.

    Example:
        >>> soft_min(torch.tensor([1.0, 3.0]), 0.3)
        tensor(1.2076)
    """
    _check_temperature(temperature)
    # Shifted by the minimum, and in expm1/log1p: a plain logsumexp leaves the bounds by 2e-6 at
    # a = .3 and by 7e-3 at a = 1e5, where all exponents are near 1 and only differences matter.
    # V is shift equivariant, so a detached shift leaves exactly the soft-min weights as gradient.
    minimum = values.amin(dim, keepdim=True).detach()
    excess = torch.expm1(-(values - minimum) / temperature).mean(dim)
    return minimum.squeeze(dim) - temperature * torch.log1p(excess)


def soft_min_weights(values: Tensor, temperature: float, *, dim: int = -1) -> Tensor:
    """Weight of each critic in the soft-min: its gradient.

        w = softmax(-v / a) = dV/dv

    Non-negative, sums to 1. The weight of a critic that stands well above the lowest vanishes,
    which is why a loss on V alone does not train it.

    Args:
        values: One estimate per critic, [..., K], in reward units.
        temperature: a, in reward units.
        dim: The critic dimension.

    Returns:
        Shape and dtype of ``values``.

    Raises:
        ValueError: ``temperature`` is not positive and finite.

    Source: SAFE (arXiv 2602.04651), double soft-min critic.

    Example:
        >>> soft_min_weights(torch.tensor([1.0, 1.0]), 0.3)
        tensor([0.5000, 0.5000])
    """
    _check_temperature(temperature)
    return torch.softmax(-values / temperature, dim)
