"""Sums over the rows of the logits and slopes of a block, with the chosen token in its place.

For the ops that give log-prob and entropy. Half-precision products on a GPU have kernels.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from safe_ops import _linear_blocks as blocks
from safe_ops.compilation import has_kernels


class RowSlopes(NamedTuple):
    """What the derivative by the logits of a row is made of, [N] each."""

    highest: Tensor
    log_total: Tensor
    constant: Tensor
    slope: Tensor
    at_token: Tensor


def has_fused(hidden: Tensor, weight: Tensor) -> bool:
    """Whether kernels multiply and do the rest, without logits."""
    return blocks.product_dtype(hidden, weight).itemsize == 2 and has_kernels(hidden)


def sum_rows(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    scale: Tensor,
    tiles: Iterable[tuple[blocks.Tile, slice]],
) -> tuple[Sequence[Tensor], Tensor]:
    """m, s and u over the whole vocabulary, and the chosen token's logit over the temperature."""
    if has_fused(states, weight):
        from safe_ops._linear_kernels import row_sums

        return row_sums(states, weight, bias, tokens, scale)
    sums = blocks.sum_start(states, scale.dtype)
    logit = torch.zeros_like(sums[0])
    for tile, part in tiles:
        entries = weight[part].to(states.dtype)
        z = tile.logits(states, entries, None if bias is None else bias[part])
        sums = blocks.absorb_block(z, scale, *sums)
        logit = _read_chosen(z, tokens, part, scale, logit)
    return sums, logit


def block_slopes(
    states: Tensor,
    entries: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    part: slice,
    scale: Tensor,
    rows: RowSlopes,
    tile: blocks.Tile,
    *,
    kept: bool = False,
) -> Tensor:
    """The derivative by the logits of a part of the vocabulary, in the tile.

    ``entries``: that part of the weight. ``kept``: the tile holds the logits.
    """
    if has_fused(states, entries):
        from safe_ops._linear_kernels import write_slopes

        z = tile.room_for(states, entries, states.dtype)
        write_slopes(states, entries, bias, tokens, part.start, scale, rows, z)
        return z
    if kept:
        z = tile.room_for(states, entries, tile.logits_dtype)
    else:
        z = tile.logits(states, entries, bias)
    blocks.turn_into_slopes(z, scale, *rows[:-1])
    _write_chosen(z, tokens, part, rows.at_token)
    return z


def _place(tokens: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Whether each token lies in the block, and its column there (a valid one in any case)."""
    inside = (tokens >= part.start) & (tokens < part.stop)
    return inside, (tokens - part.start).clamp(0, part.stop - part.start - 1).unsqueeze(1)


def _read_chosen(z: Tensor, tokens: Tensor, part: slice, scale: Tensor, known: Tensor) -> Tensor:
    """The chosen token's logit over the temperature, where it lies in this block."""
    inside, column = _place(tokens, part)
    return torch.where(inside, z.gather(1, column).squeeze(1).to(known.dtype) * scale, known)


def _write_chosen(z: Tensor, tokens: Tensor, part: slice, value: Tensor) -> None:
    """Set the chosen token's entry, where it lies in this block."""
    inside, column = _place(tokens, part)
    there = torch.where(inside, value.to(z.dtype), z.gather(1, column).squeeze(1))
    z.scatter_(1, column, there.unsqueeze(1))


def finish(sums: Sequence[Tensor], chosen_logit: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-prob, entropy, highest logit and log sum e^(z - highest).

    Both results are differences of numbers near the highest logit: a shift is harmless. The sum
    has e^0 in it, so that no log-prob is positive.
    """
    highest, total, weighted = sums
    log_total = total.log()
    return chosen_logit - highest - log_total, log_total - weighted / total, highest, log_total


def coefficients(
    log_prob: Tensor, entropy: Tensor, g: Tensor, g_entropy: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivative by a logit: p (constant + slope log p), and its value at the chosen token.

    d log_prob / dz = [v = token] - p        d entropy / dz = -p (log p + entropy)
    """
    possible = log_prob.clamp_min(blocks.NEVER[log_prob.dtype])
    at_token = -g * possible.expm1() - g_entropy * possible.exp() * (possible + entropy)
    return -(g + g_entropy * entropy) * scale, -g_entropy * scale, at_token * scale
