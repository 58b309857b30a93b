"""The chosen token's part in a block of logits, for the ops that give log-prob and entropy."""

from collections.abc import Sequence

import torch
from torch import Tensor

from safe_ops._linear_blocks import NEVER


def _place(tokens: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Whether each token lies in the block, and its column there (a valid one in any case)."""
    inside = (tokens >= part.start) & (tokens < part.stop)
    return inside, (tokens - part.start).clamp(0, part.stop - part.start - 1).unsqueeze(1)


def read_chosen(z: Tensor, tokens: Tensor, part: slice, scale: Tensor, known: Tensor) -> Tensor:
    """The chosen token's logit over the temperature, where it lies in this block."""
    inside, column = _place(tokens, part)
    return torch.where(inside, z.gather(1, column).squeeze(1).to(known.dtype) * scale, known)


def write_chosen(z: Tensor, tokens: Tensor, part: slice, value: Tensor) -> None:
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


def slopes(
    log_prob: Tensor, entropy: Tensor, g: Tensor, g_entropy: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivative by a logit: p (constant + slope log p), and its value at the chosen token.

    d log_prob / dz = [v = token] - p        d entropy / dz = -p (log p + entropy)
    """
    possible = log_prob.clamp_min(NEVER[log_prob.dtype])
    at_token = -g * possible.expm1() - g_entropy * possible.exp() * (possible + entropy)
    return -(g + g_entropy * entropy) * scale, -g_entropy * scale, at_token * scale
