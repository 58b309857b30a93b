"""A Triton kernel of the recurrence behind the advantages: one launch, whatever its length."""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST = 2048
"""Steps that a program takes at a time."""


@triton.jit
def _after(later_factor, later, factor, x):
    """Step x_t + factor_t y on top of the steps behind it."""
    return later_factor * factor, x + factor * later


@triton.jit
def _following_kernel(x, factor, last, out, T, STEPS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    behind = tl.load(last + row)
    tl.store(out + row * T + T - 1, behind)
    for block in range(tl.cdiv(T, STEPS) - 1, -1, -1):
        steps = block * STEPS + tl.arange(0, STEPS)
        inside = steps < T
        a = tl.load(factor + row * T + steps, mask=inside, other=1.0)
        b = tl.load(x + row * T + steps, mask=inside, other=0.0)
        product, total = tl.associative_scan((a, b), 0, _after, reverse=True)
        y = total + product * behind
        tl.store(out + row * T + steps - 1, y, mask=inside & (steps > 0))
        behind = tl.sum(tl.where(steps == block * STEPS, y, 0.0), 0)


def following(x: Tensor, factor: Tensor, last: Tensor) -> Tensor:
    """f_t = y_{t+1} of y_t = x_t + factor_t y_{t+1}, y_T = last; [B, T] of [B, T] and [B]."""
    x, factor, last = x.contiguous(), factor.contiguous(), last.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        steps = min(triton.next_power_of_2(x.shape[1]), MOST)
        with torch.cuda.device(x.device):
            _following_kernel[(len(x),)](x, factor, last, out, x.shape[1], STEPS=steps)
    return out
