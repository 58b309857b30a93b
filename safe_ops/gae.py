"""Generalised advantage estimation under a mask."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from safe_ops import _gae_rows
from safe_ops.compilation import has_kernels


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
    lambda 0 this is the one-step error, with lambda 1 the discounted return minus V. A value or
    reward that counts and is not finite spoils the steps before it that it reaches; computed in
    blocks, all steps of its row before it.

    A linear recurrence: eagerly on a CPU with a C compiler one pass in C (as ``compile_backend``
    says), else computed in blocks, so that few operations depend on T; one graph for all sizes.
    ``tests/benchmarks/bench_gae.py`` compares it with loops.

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
        ValueError: shapes disagree, a flag is not bool, ``reward`` or ``value`` not floating
            point, or both ``bootstrap_value`` and ``next_value`` are given.

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
    arguments: list[Any] = [reward, value, mask, terminated, truncated, bootstrap_value, next_value]
    dtype, work = _dtypes(reward, value)
    factors = [x for x in (discount, gae_lambda) if isinstance(x, Tensor)]
    if _gae_rows.can_estimate(work, *arguments, *factors):
        like = value.new_empty(0, dtype=work)
        numbers = [None if x is None else _number(x, like) for x in (bootstrap_value, next_value)]
        advantage, value_target = _gae_rows.estimate(
            *(_number(x, like) for x in (reward, value)),
            *(mask, terminated, truncated, *numbers),
            *(_number(x, like) for x in (discount, gae_lambda)),
        )
        return AdvantageEstimate(advantage.to(dtype), value_target.to(dtype))
    for x in (discount, gae_lambda):
        arguments.append(x.detach().expand(batch, steps) if isinstance(x, Tensor) and x.ndim else x)
    # A graph must not depend on the number of rows, and a GPU wants all of them at once.
    at_once = torch.compiler.is_compiling() or reward.device.type != "cpu"
    rows = batch if at_once else max(1, CACHED // max(1, steps))
    if rows >= batch:
        return _estimate(*arguments)
    parts = [
        _estimate(*[x[i : i + rows] if isinstance(x, Tensor) and x.ndim else x for x in arguments])
        for i in range(0, batch, rows)
    ]
    return AdvantageEstimate(*[torch.cat(part) for part in zip(*parts, strict=True)])


def _dtypes(reward: Tensor, value: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Of the results and of the arithmetic."""
    dtype = torch.promote_types(reward.dtype, value.dtype)
    return dtype, torch.promote_types(dtype, torch.float32)


CACHED = 1 << 18
"""Steps that are worked on at a time on a CPU: twice as fast at [256, 4096] as all at once."""

BLOCK = 8


def _estimate(
    reward: Tensor,
    value: Tensor,
    mask: Tensor,
    terminated: Tensor,
    truncated: Tensor | None,
    bootstrap_value: Tensor | None,
    next_value: Tensor | None,
    discount: float | Tensor,
    gae_lambda: float | Tensor,
) -> AdvantageEstimate:
    dtype, work = _dtypes(reward, value)
    reward, value = reward.detach().to(work), value.detach().to(work)
    discount = _number(discount, value)
    one_lambda = not isinstance(gae_lambda, Tensor) or gae_lambda.ndim == 0
    gae_lambda = _number(gae_lambda, value)
    counts, goes_on = _bits(mask, work), _bits(mask & ~terminated, work)
    last = value.new_zeros(value.shape[:1])
    if bootstrap_value is not None:
        open_row = _bits(~_ends_terminated(counts, terminated), work)
        last = _select(bootstrap_value.detach().to(last), open_row)

    # Own tensors are changed in place where it can be: memory is what takes the time.
    advantage = reward - value
    if truncated is None and next_value is None and one_lambda:
        # V + lambda A is all that the step before needs, and a recurrence of its own. With
        # truncations, or a lambda of each step, it is not: one step needs V, the next V + A.
        factor = _select(discount * gae_lambda, goes_on).add_(_one(~counts, work))
        mixed = _select_(torch.addcmul(value, advantage, gae_lambda), counts)
        after = _following(mixed, factor, last)
        advantage.addcmul_(_select_(after, goes_on), discount)
    else:
        recurs = goes_on if truncated is None else _bits(~truncated, work).bitwise_and_(goes_on)
        decay = discount * gae_lambda
        hold = _one(~counts, work)
        if next_value is None:
            after = _following(_select(value, counts), hold, last)
        else:
            after = next_value.detach().to(work, copy=True)
        advantage.addcmul_(_select_(after, goes_on), discount)
        _select_(advantage, counts)
        factor = _select(decay, recurs).add_(hold)
        carried = _following(advantage, factor, torch.zeros_like(last))
        advantage.addcmul_(_select_(carried, recurs), decay)
    _select_(advantage, counts)
    value_target = _select_(advantage + value, counts)
    return AdvantageEstimate(advantage.to(dtype), value_target.to(dtype))


def _number(x: float | Tensor, like: Tensor) -> Tensor:
    """As a tensor. A float is written on the device: a copy from the host would be waited for."""
    return x.detach().to(like) if isinstance(x, Tensor) else like.new_full((), x)


# ``torch.where`` takes a bool, which torch does not vectorise on a CPU: 44 us for 64 x 1024 floats
# where a bitwise ``and`` takes 10. All bits set keeps a number, none makes it 0, NaN included.
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def _bits(flag: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool tensor as bits for ``_select`` of numbers of that dtype."""
    return flag.view(torch.int8).neg().to(_INTEGERS[dtype])


def _select(x: Tensor, bits: Tensor) -> Tensor:
    """``torch.where(flag, x, 0)`` for the bits of a flag."""
    return (x.view(bits.dtype) & bits).view(x.dtype)


def _select_(x: Tensor, bits: Tensor) -> Tensor:
    """``_select`` in place."""
    x.view(bits.dtype).bitwise_and_(bits)
    return x


def _one(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """The flag of the bits as 1 or 0."""
    return _select(torch.ones((), dtype=dtype, device=bits.device), bits)


def _ends_terminated(counts: Tensor, terminated: Tensor) -> Tensor:
    """bool [B], whether the last step that counts is terminated."""
    if counts.shape[1] == 0:
        return counts.new_zeros(counts.shape[:1], dtype=torch.bool)
    places = torch.arange(counts.shape[1], dtype=counts.dtype, device=counts.device)
    last = (places & counts).amax(1, keepdim=True)
    return terminated.gather(1, last.long()).squeeze(1)


def _following(x: Tensor, factor: Tensor, last: Tensor) -> Tensor:
    """What each step finds behind it of a linear recurrence, [B, T].

    f_t = y_{t+1}        y_t = x_t + factor_t y_{t+1}        y_T = last
    """
    # The number of operations depends on T: traced, a graph would hold for few lengths.
    scan = _following_op if torch.compiler.is_compiling() else _following_eager
    return scan(x, factor, last)


def _following_eager(x: Tensor, factor: Tensor, last: Tensor) -> Tensor:
    if has_kernels(x):
        from safe_ops._scan_kernel import following

        return following(x, factor, last)
    y = torch.cat([x, last.unsqueeze(1)], 1)
    _scan_(y, factor)
    return y[:, 1:]


@torch.library.custom_op("safe_ops::gae_following", mutates_args=())
def _following_op(x: Tensor, factor: Tensor, last: Tensor) -> Tensor:
    return _following_eager(x, factor, last).contiguous()


@_following_op.register_fake
def _(x: Tensor, factor: Tensor, last: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _scan_(y: Tensor, factor: Tensor) -> None:
    """y_t = y_t + factor_t y_{t+1} in place, [B, T + 1] and [B, T].

    BLOCK steps become one step of a shorter recurrence, whose result is that of their first step;
    the others follow from the first step of the next block. All blocks go at once, so there are
    3 BLOCK log T / log BLOCK operations, on less and less: O(BT) in all.
    """
    steps = factor.shape[1]
    whole = steps - steps % BLOCK if steps > BLOCK else 0
    for t in reversed(range(whole, steps)):
        y[:, t].addcmul_(factor[:, t], y[:, t + 1])
    if whole == 0:
        return
    ys = y[:, :whole].unflatten(1, (-1, BLOCK)).unbind(2)
    factors = factor[:, :whole].unflatten(1, (-1, BLOCK)).unbind(2)
    blocks = y.new_empty(y.shape[0], whole // BLOCK + 1)
    blocks[:, -1].copy_(y[:, whole])
    total = torch.addcmul(ys[-2], factors[-2], ys[-1], out=blocks[:, :-1])
    product = factors[-2] * factors[-1]
    for i in reversed(range(BLOCK - 2)):
        torch.addcmul(ys[i], factors[i], total, out=total)
        product.mul_(factors[i])
    _scan_(blocks, product)
    behind = blocks[:, 1:]
    for i in reversed(range(1, BLOCK)):
        behind = ys[i].addcmul_(factors[i], behind)
    ys[0].copy_(blocks[:, :-1])


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
    for name, tensor in {"reward": reward, "value": value}.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
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
