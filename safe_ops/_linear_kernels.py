"""Triton kernels of the ops on hidden states, for half-precision products on a GPU.

The logits stay in the registers of the tile that multiplies them: the sums over a row, and the
slopes that the backward multiplies, leave it, and nothing else goes to memory.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Launch(NamedTuple):
    """Rows, entries and states of a tile of a product, and how a program runs."""

    rows: int
    entries: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None
    """Of a thread, at most; fewer let a second program run on the same processor."""


# Of the four of tests/benchmarks/bench_gpu.py on an H100, within 5 % of the fastest on every shape.
SUMS = Launch(rows=128, entries=128, depth=32, warps=8, stages=4, registers=128)
SLOPES = Launch(rows=128, entries=256, depth=64, warps=8, stages=3)
SLOPES_BYTES = 150_000
"""Of shared memory that SLOPES takes; where there is less, slopes are launched like sums."""
WAVES = 4
"""Programs for each processor, at least, where there is so much to do. So the number of rows
decides in how many parts the vocabulary is summed up, and in which order a row's sums are taken."""


@triton.jit
def _logits(
    hidden, weight, bias, inverse_temperature, rows, entries, N, V, H,
    hidden_row, hidden_state, weight_row, weight_state,
    HAS_BIAS: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of the logits over the temperature, -inf beyond the vocabulary.

    ``WHOLE``: the depth divides H.
    """
    z = tl.zeros((ROWS, ENTRIES), dtype=tl.float32)
    depth = tl.arange(0, DEPTH)
    a = hidden + rows.to(tl.int64)[:, None] * hidden_row + depth[None, :] * hidden_state
    b = weight + entries.to(tl.int64)[None, :] * weight_row + depth[:, None] * weight_state
    for start in range(0, H, DEPTH):
        rows_in, entries_in = (rows < N)[:, None], (entries < V)[None, :]
        if not WHOLE:
            rows_in &= (depth < H - start)[None, :]
            entries_in &= (depth < H - start)[:, None]
        x = tl.load(a, mask=rows_in, other=0.0)
        w = tl.load(b, mask=entries_in, other=0.0)
        z = tl.dot(x, w, z)
        a += DEPTH * hidden_state
        b += DEPTH * weight_state
    if HAS_BIAS:
        z += tl.load(bias + entries, mask=entries < V, other=0.0).to(tl.float32)[None, :]
    return tl.where((entries < V)[None, :], z * inverse_temperature, -float("inf"))


@triton.jit
def _sums_kernel(
    hidden, weight, bias, tokens, scale, results, N, V, H, per_split,
    hidden_row, hidden_state, weight_row, weight_state,
    HAS_BIAS: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = tl.load(tokens + rows, mask=rows < N, other=-1)
    scale = tl.load(scale)
    shift = tl.full((ROWS,), -3.4028234663852886e38, dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    weighted = tl.zeros((ROWS,), dtype=tl.float32)
    chosen = tl.zeros((ROWS,), dtype=tl.float32)
    for first in range(split * per_split, min(V, (split + 1) * per_split), ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        x = _logits(
            hidden, weight, bias, scale, rows, entries, N, V, H,
            hidden_row, hidden_state, weight_row, weight_state,
            HAS_BIAS, WHOLE, ROWS, ENTRIES, DEPTH,
        )  # fmt: skip
        chosen += tl.sum(tl.where(entries[None, :] == tokens[:, None], x, 0.0), 1)
        higher = tl.maximum(shift, tl.max(x, 1))
        below = tl.maximum(x - higher[:, None], -200.0, propagate_nan=tl.PropagateNan.ALL)
        e = tl.exp(below)
        moved = tl.maximum(shift - higher, -200.0)
        carried = tl.exp(moved)
        weighted = (weighted + total * moved) * carried + tl.sum(e * below, 1)
        total = total * carried + tl.sum(e, 1)
        shift = higher
    out = results + split * 4 * N + rows
    tl.store(out, shift, mask=rows < N)
    tl.store(out + N, total, mask=rows < N)
    tl.store(out + 2 * N, weighted, mask=rows < N)
    tl.store(out + 3 * N, chosen, mask=rows < N)


@triton.jit
def _slopes_kernel(
    hidden, weight, bias, tokens, first_token, scale, shift, log_total, constant, slope, at_token,
    out, N, V, H, hidden_row, hidden_state, weight_row, weight_state, out_row,
    HAS_BIAS: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    entries = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    inside = rows < N
    x = _logits(
        hidden, weight, bias, tl.load(scale), rows, entries, N, V, H,
        hidden_row, hidden_state, weight_row, weight_state, HAS_BIAS, WHOLE, ROWS, ENTRIES, DEPTH,
    )  # fmt: skip
    shift = tl.load(shift + rows, mask=inside, other=0.0)
    log_total = tl.load(log_total + rows, mask=inside, other=0.0)
    constant = tl.load(constant + rows, mask=inside, other=0.0)
    slope = tl.load(slope + rows, mask=inside, other=0.0)
    at_token = tl.load(at_token + rows, mask=inside, other=0.0)
    tokens = tl.load(tokens + rows, mask=inside, other=-1) - first_token
    log_p = tl.maximum(x - shift[:, None], -200.0, propagate_nan=tl.PropagateNan.ALL)
    log_p -= log_total[:, None]
    value = tl.exp(log_p) * (constant[:, None] + slope[:, None] * log_p)
    value = tl.where(entries[None, :] == tokens[:, None], at_token[:, None], value)
    place = out + rows.to(tl.int64)[:, None] * out_row + entries[None, :]
    tl.store(place, value.to(out.dtype.element_ty), mask=inside[:, None] & (entries < V)[None, :])


def _shape(launch: Launch, states: Tensor) -> dict[str, int | None]:
    return {
        "WHOLE": states.shape[1] % launch.depth == 0,
        "ROWS": launch.rows,
        "ENTRIES": launch.entries,
        "DEPTH": launch.depth,
        "num_warps": launch.warps,
        "num_stages": launch.stages,
        "maxnreg": launch.registers,
    }


def row_sums(
    states: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, scale: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Of all entries: m = max x, s = sum e^(x-m), u = sum e^(x-m) (x-m), and the token's x; [N]."""
    N, V = len(states), len(weight)
    tiles = triton.cdiv(V, SUMS.entries)
    groups = triton.cdiv(N, SUMS.rows)
    # A program takes a part of the vocabulary, so that few rows keep the whole GPU busy.
    splits = min(tiles, max(1, WAVES * _properties(states.device).multi_processor_count // groups))
    per_split = triton.cdiv(tiles, splits)
    splits = triton.cdiv(tiles, per_split)
    tokens, bias = tokens.contiguous(), None if bias is None else bias.contiguous()
    results = torch.empty(splits, 4, N, dtype=torch.float32, device=states.device)
    with torch.cuda.device(states.device):
        _sums_kernel[groups, splits](
            states, weight, bias, tokens, scale, results, N, V, states.shape[1],
            per_split * SUMS.entries, *states.stride(), *weight.stride(),
            HAS_BIAS=bias is not None, **_shape(SUMS, states),
        )  # fmt: skip
    shift, total, weighted, chosen = results.unbind(1)
    highest = shift.amax(0)
    moved = (shift - highest).clamp_min(-200.0)
    carried = moved.exp()
    sums = [highest, (total * carried).sum(0), ((weighted + total * moved) * carried).sum(0)]
    return sums, chosen.sum(0)


def write_slopes(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    first_token: int,
    scale: Tensor,
    rows: Sequence[Tensor],
    out: Tensor,
) -> None:
    """Write the derivative by the logits of a part of the vocabulary, whose first id is given.

    ``weight`` is that part of it; ``rows`` are ``RowSlopes``.
    """
    large = _properties(states.device).shared_memory_per_block_optin >= SLOPES_BYTES
    launch = SLOPES if large else SUMS
    grid = triton.cdiv(len(states), launch.rows), triton.cdiv(len(weight), launch.entries)
    tokens, bias = tokens.contiguous(), None if bias is None else bias.contiguous()
    with torch.cuda.device(states.device):
        _slopes_kernel[grid](
            states, weight, bias, tokens, first_token, scale, *(x.contiguous() for x in rows), out,
            len(states), len(weight), states.shape[1], *states.stride(), *weight.stride(),
            out.stride(0), HAS_BIAS=bias is not None, **_shape(launch, states),
        )  # fmt: skip


def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)
