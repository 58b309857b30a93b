"""What is done to a block of logits: sums over its rows, and slopes in its place; their memory.

In C for float32 on a CPU (memory is taken for any dtype), where there is a compiler for it; else by
bodies for torch.compile.
"""

import ctypes
import functools
import mmap
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from safe_ops.compilation import c_library, compile_backend, compiled_body


def absorb(
    z: Tensor, scale: Tensor, sums: Sequence[Tensor], tokens: Tensor, start: int, logit: Tensor
) -> tuple[Sequence[Tensor], Tensor]:
    """One step of the online sums m, s and u, and of the tokens' logits over the temperature.

    ``start``: the place of the block in the vocabulary. What is returned may be what was given,
    changed in place.
    """
    kernels = _kernels(z)
    if kernels is None:
        return absorb_block(z, scale, *sums), _read_chosen(z, tokens, start, scale, logit)
    kernels.absorb_rows(*_layout(z, scale), *_pointers(z, tokens), start, *_pointers(*sums, logit))
    return sums, logit


def turn_into_slopes(
    z: Tensor, scale: Tensor, tokens: Tensor, start: int, rows: Sequence[Tensor]
) -> None:
    """z becomes the slopes, in place: ``rows`` as ``RowSlopes`` has them, the token's own last."""
    kernels = _kernels(z)
    if kernels is None:
        slopes_of_block(z, scale, *rows[:-1])
        _write_chosen(z, tokens, start, rows[-1])
    else:
        kernels.rows_to_slopes(*_layout(z, scale), *_pointers(z, tokens), start, *_pointers(*rows))


def absorb_pair(
    z: Tensor, ref_z: Tensor, scale: Tensor, sums: Sequence[Tensor]
) -> Sequence[Tensor]:
    """One step of m, s, u, m' and s' of the exact KL; perhaps in place, as ``absorb``."""
    kernels = _kernels(z, ref_z)
    if kernels is None:
        return absorb_block_pair(z, ref_z, scale, *sums)
    kernels.absorb_row_pairs(*_layout(z, scale), *_pointers(z, ref_z, *sums))
    return sums


def turn_pair_into_slopes(
    z: Tensor, ref_z: Tensor, scale: Tensor, rows: Sequence[Tensor], *, ref_needed: bool
) -> None:
    """Both become slopes, in place. ``rows``: m, log s, m', log s', the KL and its gradient."""
    kernels = _kernels(z, ref_z)
    if kernels is None:
        slopes_of_block_pair(z, ref_z, scale, ref_needed, *rows)
    else:
        kernels.row_pairs_to_slopes(
            *_layout(z, scale), *_pointers(z, ref_z, *rows), int(ref_needed)
        )


def take_pages(memory: Tensor) -> None:
    """Have the system hand out contiguous memory that holds nothing yet; some of it becomes 0.

    Else a product that writes there is stopped at every page, and the system's zeros push what it
    multiplies out of the cache.
    """
    library = _library() if memory.is_cpu and compile_backend() == "inductor" else None
    if library is not None:
        library.take_pages(
            memory.nbytes, mmap.PAGESIZE, torch.get_num_threads(), *_pointers(memory)
        )


def _kernels(*logits: Tensor) -> ctypes.CDLL | None:
    """The C functions, where they can work on these logits and compiling is chosen."""
    z = logits[0]
    # A pair of tiles has one layout.
    fit = all(
        x.dtype == torch.float32 and x.device.type == "cpu" and x.stride() == z.stride()
        for x in logits
    )
    return _library() if fit and compile_backend() == "inductor" else None


@functools.cache
def _library() -> ctypes.CDLL | None:
    found = c_library(
        Path(__file__).with_suffix(".c"),
        options=("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    )
    if found is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_long
    layout = [number, number, number, ctypes.c_float, ctypes.c_int]
    found.absorb_rows.argtypes = [*layout, *[pointer] * 2, number, *[pointer] * 4]
    found.rows_to_slopes.argtypes = [*layout, *[pointer] * 2, number, *[pointer] * 5]
    found.absorb_row_pairs.argtypes = [*layout, *[pointer] * 7]
    found.take_pages.argtypes = [number, number, ctypes.c_int, pointer]
    found.row_pairs_to_slopes.argtypes = [*layout, *[pointer] * 8, ctypes.c_int]
    return found


def _layout(z: Tensor, scale: Tensor) -> tuple[int, int, int, float, int]:
    rows, entries = z.shape
    return rows, entries, z.stride(0), float(scale), torch.get_num_threads()


def _pointers(*tensors: Tensor) -> list[int]:
    """Of matrices with entries side by side, and of vectors."""
    for x in tensors:
        assert x.stride(-1) == 1 or x.shape[-1] == 1, x.stride()
    return [x.data_ptr() for x in tensors]


@compiled_body
def absorb_block(
    z: Tensor, inverse_temperature: Tensor, shift: Tensor, total: Tensor, weighted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of the online sums over a row: m = max x, s = sum e^(x-m), u = sum e^(x-m) (x-m)."""
    x = z.to(shift.dtype) * inverse_temperature
    never = -200.0 if shift.dtype == torch.float32 else -1000.0
    higher = torch.maximum(shift, x.amax(1))
    below = (x - higher.unsqueeze(1)).clamp_min(never)
    e = below.exp()
    moved = (shift - higher).clamp_min(never)
    scale = moved.exp()
    return (
        higher,
        total * scale + e.sum(1),
        (weighted + total * moved) * scale + (e * below).sum(1),
    )


@compiled_body
def slopes_of_block(
    z: Tensor,
    inverse_temperature: Tensor,
    shift: Tensor,
    log_total: Tensor,
    constant: Tensor,
    slope: Tensor,
) -> None:
    """z becomes p (constant + slope log p), in place."""
    x = z.to(shift.dtype) * inverse_temperature
    never = -200.0 if shift.dtype == torch.float32 else -1000.0
    log_p = (x - shift.unsqueeze(1)).clamp_min(never) - log_total.unsqueeze(1)
    z.copy_(log_p.exp() * (constant.unsqueeze(1) + slope.unsqueeze(1) * log_p))


@compiled_body
def absorb_block_pair(
    z: Tensor,
    ref_z: Tensor,
    scale: Tensor,
    shift: Tensor,
    total: Tensor,
    weighted: Tensor,
    ref_shift: Tensor,
    ref_total: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One step of the sums over a row of a model's logits and over one of its reference's.

    m = max x, s = sum e^(x-m), u = sum e^(x-m) ((x - m) - (x' - m')), m' <= max x', s' = sum
    e^(x'-m').
    """
    x, ref_x = z.to(shift.dtype) * scale, ref_z.to(shift.dtype) * scale
    never = -200.0 if shift.dtype == torch.float32 else -1000.0
    higher = torch.maximum(shift, x.amax(1))
    # Else m' stays: where one token has all the probability, u and the slopes then round its
    # x' - m' alike, and log p - log q - kl is 0 there.
    ref_best = ref_x.amax(1)
    moves = (higher > shift) | (ref_best - ref_shift > 60.0)
    ref_higher = torch.where(moves, torch.maximum(ref_shift, ref_best), ref_shift)
    below = (x - higher.unsqueeze(1)).clamp_min(never)
    ref_below = ref_x - ref_higher.unsqueeze(1)
    e = below.exp()
    # A token that only the reference bans makes u infinite; one that both ban adds nothing.
    gap = torch.where(e > 0, e * (below - ref_below), 0.0)
    moved, ref_moved = shift - higher, ref_shift - ref_higher
    factor = moved.clamp_min(never).exp()
    carried = (weighted + total * (moved - ref_moved)) * factor
    return (
        higher,
        total * factor + e.sum(1),
        torch.where((total > 0) & (factor > 0), carried, 0.0) + gap.sum(1),
        ref_higher,
        ref_total * ref_moved.clamp_min(never).exp() + ref_below.clamp_min(never).exp().sum(1),
    )


@compiled_body
def slopes_of_block_pair(
    z: Tensor,
    ref_z: Tensor,
    scale: Tensor,
    ref_needed: bool,
    shift: Tensor,
    log_total: Tensor,
    ref_shift: Tensor,
    ref_log_total: Tensor,
    kl: Tensor,
    grad: Tensor,
) -> None:
    """z becomes grad p (log p - log q - kl) and ref_z grad (q - p), in place."""
    never = -200.0 if shift.dtype == torch.float32 else -1000.0
    x, ref_x = z.to(shift.dtype) * scale, ref_z.to(shift.dtype) * scale
    log_p = (x - shift.unsqueeze(1)).clamp_min(never) - log_total.unsqueeze(1)
    log_q = ref_x - ref_shift.unsqueeze(1) - ref_log_total.unsqueeze(1)
    p = log_p.exp()
    slope = grad.unsqueeze(1) * p * (log_p - log_q - kl.unsqueeze(1))
    # log q may be -inf, which a token that has no probability does not meet.
    z.copy_(torch.where(p != 0, slope, 0.0))
    if ref_needed:
        ref_z.copy_(grad.unsqueeze(1) * (log_q.exp() - p))


def _place(tokens: Tensor, start: int, entries: int) -> tuple[Tensor, Tensor]:
    """Whether each token lies in the block, and its column there (a valid one in any case)."""
    column = tokens - start
    return (column >= 0) & (column < entries), column.clamp(0, entries - 1).unsqueeze(1)


def _read_chosen(z: Tensor, tokens: Tensor, start: int, scale: Tensor, known: Tensor) -> Tensor:
    """The chosen token's logit over the temperature, where it lies in this block."""
    inside, column = _place(tokens, start, z.shape[1])
    return torch.where(inside, z.gather(1, column).squeeze(1).to(known.dtype) * scale, known)


def _write_chosen(z: Tensor, tokens: Tensor, start: int, value: Tensor) -> None:
    """Set the chosen token's entry, where it lies in this block."""
    inside, column = _place(tokens, start, z.shape[1])
    there = torch.where(inside, value.to(z.dtype), z.gather(1, column).squeeze(1))
    z.scatter_(1, column, there.unsqueeze(1))
