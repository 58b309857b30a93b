"""Exact divergence from the reference from hidden states and heads; no logits in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from safe_ops import _linear_blocks as blocks
from safe_ops._linear_rows import absorb_pair, turn_pair_into_slopes


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    block_size: int | None = None,
) -> Tensor:
    """``kl_exact(hidden @ weight.T, ref_hidden @ ref_weight.T)`` at the cost of its products.

        KL = sum_v pi_v (log pi_v - log ref_v)        pi, ref = softmax(logits / temperature)

    Two tiles of about 16 MiB (on a GPU 512) are in memory, never the logits; the backward makes
    them again. A row that ``mask`` leaves out is not multiplied; what is frozen, usually the
    reference, costs no gradient product. Products and rounding are those of ``linear_log_probs``,
    but that there is no kernel for half precision on a GPU: the tiles are float32 there.

    Args:
        hidden: [..., H], of the policy, before its head.
        weight: [V, H], of its head.
        ref_hidden: [..., H'], of the reference.
        ref_weight: [V, H'].
        mask: bool [...], True = counts; None: all count. On an accelerator a mask costs one wait
            for the number of rows that count.
        temperature: Of the sampling; divides both logits. Positive.
        block_size: Entries of the vocabulary that are worked on together; None: 4096 on a
            CPU, 16,384 on a GPU.

    Returns:
        [...], nats per token, float32 (float64 where an input is); 0 where ``mask`` is False;
        differentiable once in all four tensors.

    Raises:
        ValueError: shapes or dtypes disagree, ``temperature`` or ``block_size`` is not positive.

    Example:
        >>> weight = torch.zeros(4, 3)
        >>> linear_kl(torch.ones(1, 3), weight, torch.ones(1, 3), weight)
        tensor([0.])
    """
    blocks.check_arguments(
        hidden, weight, temperature=temperature, block_size=block_size, mask=mask
    )
    blocks.check_arguments(
        ref_hidden,
        ref_weight,
        names=("ref_hidden", "ref_weight"),
        temperature=temperature,
        block_size=block_size,
        mask=None,
    )
    if hidden.shape[:-1] != ref_hidden.shape[:-1]:
        raise ValueError(
            "hidden and ref_hidden must agree but for their last dimension, "
            f"got {tuple(hidden.shape)} and {tuple(ref_hidden.shape)}"
        )
    if weight.shape[0] != ref_weight.shape[0]:
        raise ValueError(
            "weight and ref_weight must have one vocabulary, "
            f"got {tuple(weight.shape)} and {tuple(ref_weight.shape)}"
        )
    kl, *_ = _forward(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        ref_hidden.reshape(-1, ref_hidden.shape[-1]),
        ref_weight,
        None if mask is None else mask.reshape(-1),
        float(temperature),
        block_size or blocks.room(hidden.device).block_size,
    )
    return kl.reshape(hidden.shape[:-1])


@torch.library.custom_op("safe_ops::linear_kl", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    mask: Tensor | None,
    temperature: float,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The KL, and for each side the highest logit or one near it, and log sum e^(z - that)."""
    dtype = blocks.arithmetic_dtype(hidden, weight, ref_hidden, ref_weight)
    results = [hidden.new_zeros(hidden.shape[0], dtype=dtype) for _ in range(5)]
    scale = blocks.number(1 / temperature, dtype, hidden.device)
    tiles = None
    for chunk in blocks.row_chunks(hidden, mask, blocks.tile_rows(hidden, block_size)):
        tiles = tiles or (
            blocks.Tile(hidden, weight, chunk.padded, block_size),
            blocks.Tile(ref_hidden, ref_weight, chunk.padded, block_size),
        )
        states = chunk.take(hidden, tiles[0].dtype)
        ref_states = chunk.take(ref_hidden, tiles[1].dtype)
        sums: Sequence[Tensor] = [
            *blocks.sum_start(states, dtype),
            *blocks.sum_start(states, dtype)[:2],
        ]
        for part in blocks.vocabulary_blocks(weight, block_size):
            z = tiles[0].logits(states, weight[part].to(tiles[0].dtype), None)
            ref_z = tiles[1].logits(ref_states, ref_weight[part].to(tiles[1].dtype), None)
            sums = absorb_pair(z, ref_z, scale, sums)
        highest, total, weighted, ref_highest, ref_total = sums
        log_total, ref_log_total = total.log(), ref_total.log()
        found = (weighted / total - log_total + ref_log_total, highest, log_total,
                 ref_highest, ref_log_total)  # fmt: skip
        for result, x in zip(results, found, strict=True):
            chunk.put(result, x)
        del states, ref_states  # before the next chunk's are made
    return results[0], results[1], results[2], results[3], results[4]


@_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    mask: Tensor | None,
    temperature: float,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = blocks.arithmetic_dtype(hidden, weight, ref_hidden, ref_weight)
    a, b, c, d, e = (hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(5))
    return a, b, c, d, e


@torch.library.custom_op("safe_ops::linear_kl_backward", mutates_args=())
def _backward(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    mask: Tensor | None,
    temperature: float,
    block_size: int,
    results: list[Tensor],
    grad: Tensor,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the four tensors; an empty tensor for one that is not needed."""
    dtype = grad.dtype
    inputs = (hidden, weight, ref_hidden, ref_weight)
    grads = blocks.empty_grads(inputs, needed)
    for d_hidden in grads[::2]:
        blocks.zero_masked(d_hidden, mask)
    scale = blocks.number(1 / temperature, dtype, hidden.device)
    tiles = None
    for chunk in blocks.row_chunks(hidden, mask, blocks.tile_rows(hidden, block_size)):
        first = tiles is None
        tiles = tiles or (
            blocks.Tile(hidden, weight, chunk.padded, block_size),
            blocks.Tile(ref_hidden, ref_weight, chunk.padded, block_size),
        )
        states = (chunk.take(hidden, tiles[0].dtype), chunk.take(ref_hidden, tiles[1].dtype))
        kl, shift, log_total, ref_shift, ref_log_total, g = (
            chunk.take(x, dtype) for x in (*results, grad)
        )
        d_states = [
            chunk.sum_into(target, dtype) if need else None
            for target, need in zip(grads[::2], needed[::2], strict=True)
        ]
        of_rows = shift, log_total, ref_shift, ref_log_total, kl, g * scale
        for part in blocks.vocabulary_blocks(weight, block_size):
            rows = (weight[part].to(tiles[0].dtype), ref_weight[part].to(tiles[1].dtype))
            z, ref_z = (tiles[i].logits(states[i], rows[i], None) for i in (0, 1))
            turn_pair_into_slopes(z, ref_z, scale, of_rows, ref_needed=needed[2] or needed[3])
            for i in (0, 1):
                if not any(needed[2 * i : 2 * i + 2]):
                    continue
                slopes = (z, ref_z)[i].to(tiles[i].dtype)
                d = d_states[i]
                if d is not None:
                    blocks.add_product(d, slopes, rows[i])
                if needed[2 * i + 1]:
                    d_weight = grads[2 * i + 1][part]
                    blocks.write_product(d_weight, slopes.t(), states[i], first=first)
                del slopes  # before the reference's are made
        for target, d in zip(grads[::2], d_states, strict=True):
            if d is not None:
                chunk.put(target, d)
        del states, d_states, d  # before the next chunk's are made
    if tiles is None:
        for d_weight in grads[1::2]:
            d_weight.zero_()
    return grads[0], grads[1], grads[2], grads[3]


@_backward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    mask: Tensor | None,
    temperature: float,
    block_size: int,
    results: list[Tensor],
    grad: Tensor,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (hidden, weight, ref_hidden, ref_weight)
    a, b, c, d = blocks.empty_grads(inputs, needed)
    return a, b, c, d


def _keep(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.temperature, ctx.block_size = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, grad: Tensor, *_: Tensor) -> tuple:
    hidden, weight, ref_hidden, ref_weight, mask, *results = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:4])
    grads = _backward(
        hidden, weight, ref_hidden, ref_weight, mask, ctx.temperature, ctx.block_size,
        results, grad, needed,
    )  # fmt: skip
    return *blocks.only_needed(grads, needed), None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)
