"""Generalised advantage estimation under a mask."""

from typing import NamedTuple

import torch
from torch import Tensor

from safe_ops.masked import fill_masked


class AdvantageEstimate(NamedTuple):
    """Advantage, and the value target it implies; both in reward units, detached."""

    advantage: Tensor
    value_target: Tensor


def generalized_advantage_estimate(
    reward: Tensor,
    value: Tensor,
    *,
    mask: Tensor,
    terminated: Tensor,
    truncated: Tensor | None = None,
    bootstrap_value: Tensor | None = None,
    next_value: Tensor | None = None,
    discount: float | Tensor = 1.0,
    gae_lambda: float | Tensor = 0.95,
) -> AdvantageEstimate:
    """Advantage of each step over its baseline, mixing all horizons.

        delta_t = r_t + discount (1 - terminated_t) V_{t+1} - V_t
        A_t     = delta_t + discount lambda (1 - terminated_t - truncated_t) A_{t+1}
        target  = A_t + V_t

    V_{t+1} is the value at the next step that counts: masked steps are stepped over, whatever
    stands in them. After the last step that counts V is ``bootstrap_value``, A is 0. With
    lambda 0 this is the one-step error, with lambda 1 the discounted return minus V.

    Args:
        reward: [B, T].
        value: [B, T], of the state *before* step t.
        mask: bool [B, T], True = counts. Right padding is False.
        terminated: bool [B, T]; nothing follows, so no bootstrap.
        truncated: bool [B, T]; a cut without an end: bootstraps, but the recursion stops.
        bootstrap_value: [B], value after the last step that counts; None: 0.
        next_value: [B, T], V_{t+1} of each step, overrides the above; needed where rows hold
            several episodes with truncations inside.
        discount: Float or [B, T].
        gae_lambda: Float or [B, T].

    Returns:
        ``AdvantageEstimate(advantage, value_target)``, [B, T] each, detached, 0 where ``mask``
        is False.

    Raises:
        ValueError: shapes disagree, a flag is not bool, or both ``bootstrap_value`` and
            ``next_value`` are given.

    Source: Schulman et al. (arXiv 1506.02438).

    Example:
        >>> flags = torch.tensor([[False, True]])
        >>> generalized_advantage_estimate(
        ...     torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]]),
        ...     mask=torch.ones(1, 2).bool(), terminated=flags, gae_lambda=1.0,
        ... ).advantage
        tensor([[0.5000, 0.5000]])
    """
    _check(reward, value, mask, terminated, truncated, bootstrap_value, next_value)
    batch, steps = reward.shape
    reward = fill_masked(reward.detach(), mask)
    value = fill_masked(value.detach(), mask)
    stop = terminated if truncated is None else terminated | truncated
    discount = torch.as_tensor(discount, dtype=value.dtype, device=value.device).expand(
        batch, steps
    )
    gae_lambda = torch.as_tensor(gae_lambda, dtype=value.dtype, device=value.device).expand(
        batch, steps
    )
    following_value = (
        value.new_zeros(batch) if bootstrap_value is None else bootstrap_value.detach().to(value)
    )
    following_advantage = value.new_zeros(batch)
    advantages = []
    for t in reversed(range(steps)):
        after = following_value if next_value is None else next_value[:, t].detach().to(value)
        zero = torch.zeros_like(after)
        bootstrap = torch.where(terminated[:, t], zero, after)
        carried = torch.where(stop[:, t], zero, following_advantage)
        delta = reward[:, t] + discount[:, t] * bootstrap - value[:, t]
        advantage = delta + discount[:, t] * gae_lambda[:, t] * carried
        following_advantage = torch.where(mask[:, t], advantage, following_advantage)
        following_value = torch.where(mask[:, t], value[:, t], following_value)
        advantages.append(advantage)
    # An empty row of steps is an empty answer.
    stacked = torch.stack(advantages[::-1], 1) if advantages else torch.zeros_like(value)
    advantage = fill_masked(stacked, mask)
    return AdvantageEstimate(advantage, fill_masked(advantage + value, mask))


def _check(
    reward: Tensor,
    value: Tensor,
    mask: Tensor,
    terminated: Tensor,
    truncated: Tensor | None,
    bootstrap_value: Tensor | None,
    next_value: Tensor | None,
) -> None:
    if reward.ndim != 2:
        raise ValueError(f"reward must be [B, T], got {tuple(reward.shape)}")
    flags = {"mask": mask, "terminated": terminated, "truncated": truncated}
    for name, tensor in {"value": value, **flags, "next_value": next_value}.items():
        if tensor is not None and tensor.shape != reward.shape:
            raise ValueError(
                f"{name} must have the shape of reward, "
                f"got {name} {tuple(tensor.shape)} and reward {tuple(reward.shape)}"
            )
    for name, tensor in flags.items():
        if tensor is not None and tensor.dtype != torch.bool:
            raise ValueError(f"{name} must be bool, got {tensor.dtype}")
    if bootstrap_value is not None:
        if next_value is not None:
            raise ValueError("give bootstrap_value or next_value, not both")
        if bootstrap_value.shape != reward.shape[:1]:
            raise ValueError(
                f"bootstrap_value must be [B] = {tuple(reward.shape[:1])}, "
                f"got {tuple(bootstrap_value.shape)}"
            )
