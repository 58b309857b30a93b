"""What the ops on hidden states share: checks, rows that count, blocks of the vocabulary.

An op walks over chunks of the rows that count and, for each, over blocks of the vocabulary; the
only buffer that grows with the vocabulary is one tile, [rows of the chunk, entries of the block].
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from safe_ops._linear_rows import take_pages


class Room(NamedTuple):
    """How much is worked on at a time. Constants, so that a token's sums are always taken in the
    same order, whatever the number of tokens (by ``_linear_kernels`` they are not)."""

    block_size: int
    """Entries of the vocabulary in a block."""
    tile_bytes: int
    """Of the tile of logits, and of a chunk's hidden states."""
    kept_bytes: int
    """Of the logits of one chunk of tokens that ``linear_loss`` keeps."""
    row_gap: int
    """Entries between the rows of a tile, where without it 1024 would divide their distance."""


CPU_ROOM = Room(block_size=4096, tile_bytes=2**24, kept_bytes=49 * 2**20, row_gap=64)
"""A tile lies in a core's cache, where rows whole pages apart would fall on the same lines."""
GPU_ROOM = Room(block_size=16384, tile_bytes=2**29, kept_bytes=2**31, row_gap=0)
"""A product must take longer than Python needs to launch what follows it."""


def room(device: torch.device) -> Room:
    """What suits a device."""
    return CPU_ROOM if device.type == "cpu" else GPU_ROOM


ROW_TILE = 16
"""Rows. A matrix product of fewer rows, or of a number that 4 does not divide, may round some rows
in another way. Chunks are filled up with zeros to a multiple, so that a row's result depends
neither on its place nor on which other rows count."""

NEVER = {torch.float32: -200.0, torch.float64: -1000.0}
"""exp of it is 0; stands for log 0 of a banned token, since 0 * -inf is nan."""


class RowChunk(NamedTuple):
    """Rows that are worked on together: where they are, how many, and how many with filling."""

    rows: Tensor | slice
    count: int
    padded: int

    def take(self, x: Tensor, dtype: torch.dtype, *, filling: float = 0.0) -> Tensor:
        """[padded, ...], the filling at the end."""
        # Detached: compiling looks at what a view of a saved result would have as its gradient.
        picked = x.detach()[self.rows]
        if self.count == self.padded:
            # Of one number a row a copy: compiling would tell a view of some from one of all.
            return picked.to(dtype, copy=x.ndim == 1)
        shape = self.padded, *x.shape[1:]
        filled = torch.full(shape, filling, dtype=dtype, device=x.device)
        filled[: self.count] = picked
        return filled

    def put(self, target: Tensor, x: Tensor) -> None:
        """Write [padded, ...] to its rows of the target, without the filling."""
        target[self.rows] = x[: self.count].to(target.dtype)

    def sum_into(self, target: Tensor, dtype: torch.dtype) -> Tensor:
        """[padded, ...], zeros to add to, for ``put``: the target's own rows where they will do."""
        if isinstance(self.rows, slice) and self.count == self.padded and target.dtype == dtype:
            return target[self.rows].zero_()
        return torch.zeros(self.padded, *target.shape[1:], dtype=dtype, device=target.device)


def check_arguments(
    hidden: Tensor,
    weight: Tensor,
    *,
    names: tuple[str, str] = ("hidden", "weight"),
    temperature: float,
    block_size: int | None,
    mask: Tensor | None,
) -> None:
    """Shapes, dtypes and hyper-parameters that every op on hidden states has."""
    hidden_name, weight_name = names
    for name, x in ((hidden_name, hidden), (weight_name, weight)):
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
    if hidden.ndim < 1 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{hidden_name} must be [..., H] and {weight_name} [V, H], "
            f"got {hidden_name} {tuple(hidden.shape)} and {weight_name} {tuple(weight.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"{weight_name} must have a vocabulary, got {tuple(weight.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool (True = counts), got {mask.dtype}")
    if mask.shape != hidden.shape[:-1]:
        raise ValueError(
            f"mask must have the shape of {hidden_name} without its last dimension, "
            f"got mask {tuple(mask.shape)} and {hidden_name} {tuple(hidden.shape)}"
        )


def check_tokens(hidden: Tensor, tokens: Tensor) -> None:
    """Chosen tokens: int64 ids, one for each hidden state."""
    if tokens.dtype != torch.int64:
        raise ValueError(f"tokens must be int64 ids, got {tokens.dtype}")
    if tokens.shape != hidden.shape[:-1]:
        raise ValueError(
            "tokens must have the shape of hidden without its last dimension, "
            f"got tokens {tuple(tokens.shape)} and hidden {tuple(hidden.shape)}"
        )
    if tokens.device != hidden.device:
        raise ValueError(f"tokens must be where hidden is, got {tokens.device} and {hidden.device}")


def check_range(tokens: Tensor, mask: Tensor | None, vocabulary: int) -> None:
    """Ids that count lie in the vocabulary. On an accelerator the check does not wait."""
    wrong = (tokens < 0) | (tokens >= vocabulary)
    if mask is not None:
        wrong &= mask
    if tokens.device.type != "cpu":
        torch._assert_async(~wrong.any(), f"tokens must be in [0, {vocabulary})")
    elif wrong.any():
        first = tokens[wrong][0].item()
        raise ValueError(f"tokens must be in [0, V) with V = {vocabulary} of weight, got {first}")


def arithmetic_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 where an input is."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What the products multiply: the higher dtype of the two."""
    return torch.promote_types(hidden.dtype, weight.dtype)


def tile_rows(hidden: Tensor, block_size: int) -> int:
    """Rows whose tile of logits, and whose hidden states, take the tile's bytes."""
    width = max(block_size, hidden.shape[1])
    return whole_tiles(room(hidden.device).tile_bytes // (4 * width))


def row_stride(entries: int, device: torch.device) -> int:
    """Of a tile, in entries."""
    return entries + (room(device).row_gap if entries % 1024 == 0 else 0)


def whole_tiles(rows: int) -> int:
    """Rows rounded down to whole tiles; at least one."""
    return max(rows // ROW_TILE, 1) * ROW_TILE


def row_chunks(
    hidden: Tensor, mask: Tensor | None, rows: int, *, first: int | None = None
) -> Iterator[RowChunk]:
    """The rows that count, so many at a time; ``first``: so many in the first chunk."""
    kept = None if mask is None else mask.nonzero().squeeze(1)
    total = hidden.shape[0] if kept is None else len(kept)
    start, size = 0, first or rows
    while start < total:
        piece = slice(start, min(start + size, total))
        count = piece.stop - start
        padded = -(-count // ROW_TILE) * ROW_TILE
        yield RowChunk(piece if kept is None else kept[piece], count, padded)
        start, size = piece.stop, rows


class Tile:
    """A buffer for one block of logits of one chunk, made at its first use, once for all of them.

    ``memory``, contiguous and of the logits' dtype, is used in the place of memory of its own.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        rows: int,
        block_size: int,
        *,
        memory: Tensor | None = None,
    ) -> None:
        self.dtype = product_dtype(hidden, weight)
        # The products of half-precision inputs are summed in float32. CUDA can hand these sums
        # out; a CPU can only round them, as the model's own head does.
        self.keeps_sums = hidden.device.type == "cuda" and self.dtype.itemsize == 2
        self.logits_dtype = torch.float32 if self.keeps_sums else self.dtype
        self._stride = row_stride(min(block_size, weight.shape[0]), hidden.device)
        self._size = rows * self._stride
        self._flat = None if memory is None else memory.view(-1)[: self._size]

    @property
    def nbytes(self) -> int:
        """Of the logits."""
        return self._size * self.logits_dtype.itemsize

    def logits(self, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[rows, entries]: states [rows, H] times weight [entries, H], plus bias [entries]."""
        z = self.room_for(states, weight, self.logits_dtype)
        if self.keeps_sums:
            torch.mm(states, weight.t(), out_dtype=torch.float32, out=z)
        else:
            torch.mm(states, weight.t(), out=z)
        return z if bias is None else z.add_(bias)

    def room_for(self, states: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The buffer, of a dtype that is the same at each call; still as ``logits`` left it."""
        if self._flat is None:
            self._flat = states.new_empty(self._size, dtype=dtype)
        rows = self._flat[: states.shape[0] * self._stride].view(-1, self._stride)
        return rows[:, : weight.shape[0]]


def vocabulary_blocks(weight: Tensor, block_size: int) -> Iterator[slice]:
    """Slices of the vocabulary, in order."""
    for start in range(0, weight.shape[0], block_size):
        yield slice(start, min(start + block_size, weight.shape[0]))


def add_product(target: Tensor, a: Tensor, b: Tensor) -> None:
    """target += a @ b, in the dtype of the target; the product in that of b."""
    a = a.to(b.dtype)
    if target.dtype == b.dtype:
        target.addmm_(a, b)
    elif target.is_cuda and target.dtype == torch.float32 and b.dtype.itemsize == 2:
        torch.addmm(target, a, b, out_dtype=torch.float32, out=target)
    else:
        target.add_(torch.mm(a, b))


def write_product(target: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """Like ``add_product``; the first time the target, contiguous, is only written."""
    if not first:
        add_product(target, a, b)
        return
    take_pages(target)
    if target.dtype == b.dtype:
        torch.mm(a.to(b.dtype), b, out=target)
    else:
        target.copy_(torch.mm(a.to(b.dtype), b))


def number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """0-d. Written on the device: a copy from the host would be waited for."""
    return torch.full((), value, dtype=dtype, device=device)


def sum_start(states: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """m, s and u before the first block; m is the lowest number, since inf - inf is nan."""
    lowest = states.new_full(states.shape[:1], torch.finfo(dtype).min, dtype=dtype)
    return [lowest, torch.zeros_like(lowest), torch.zeros_like(lowest)]


def empty_grads(inputs: tuple[Tensor, ...], needed: list[bool]) -> list[Tensor]:
    """Room for each gradient that is needed; an op cannot return None, so empty for the others.

    Nothing is written: zeros below all of a weight's gradient take a pass over it. Those of hidden
    states need ``zero_masked``, those of weights zeros where no row counts.
    """
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for x, need in zip(inputs, needed, strict=True)
    ]


def zero_masked(d_hidden: Tensor, mask: Tensor | None) -> None:
    """Zeros for the rows [N, H] that no chunk writes."""
    if mask is not None:
        d_hidden.zero_()


def only_needed(grads: tuple[Tensor, ...], needed: list[bool]) -> list[Tensor | None]:
    """None in the place of each gradient that is not needed."""
    return [grad if need else None for grad, need in zip(grads, needed, strict=True)]
