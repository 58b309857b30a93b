"""Sums over the rows of the logits and slopes of a block, with the chosen token in its place.

For the ops that give log-prob and entropy. Half-precision products on a GPU have kernels.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from safe_ops import _linear_blocks as blocks
from safe_ops._linear_rows import absorb, turn_into_slopes
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
    sums: Sequence[Tensor] = blocks.sum_start(states, scale.dtype)
    logit = torch.zeros_like(sums[0])
    for tile, part in tiles:
        entries = weight[part].to(states.dtype)
        z = tile.logits(states, entries, None if bias is None else bias[part])
        sums, logit = absorb(z, scale, sums, tokens, part.start, logit)
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
    turn_into_slopes(z, scale, tokens, part.start, rows)
    return z


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
