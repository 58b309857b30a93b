"""A loss of log-prob and entropy whose gradients are made together with its value."""

from collections.abc import Callable

import torch
from torch import Tensor

from safe_ops import _linear_blocks as blocks
from safe_ops import _linear_chosen as chosen
from safe_ops._linear_rows import take_pages

TokenLoss = Callable[[Tensor, Tensor, Tensor], Tensor]

FEWEST_ROWS = 128
"""Of a chunk, where there are so many: a chunk costs a pass over the weight and its gradient, and
products of few rows are slow. What does not fit into what is kept is made again."""


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    token_loss: TokenLoss,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    block_size: int | None = None,
) -> Tensor:
    """Sum of a per-token loss, with its gradients made in the forward.

        loss = sum_t token_loss(log_prob_t, entropy_t, t)        over the tokens that count

    Where the loss needs nothing that comes after the head, the logits of a few tokens at a time,
    over the whole vocabulary, serve both the value and the gradients: three matrix products
    instead of the four of ``linear_log_probs`` and its backward. At most 49 MiB of them are kept at
    a time; those of the first chunk, of about H tokens, lie in the memory that is to become the
    gradient of ``weight`` too. A chunk has 128 tokens at least, since each costs a pass over the
    weight and its gradient: in a vocabulary of more than 100,352 some of its logits are made twice.
    On a GPU 2 GiB are kept; in half precision none, and all are made twice, which takes less time
    than to write them.

    Not for ``torch.compile(fullgraph=True)``: ``token_loss`` is a Python function that is
    differentiated on the way. ``linear_log_probs`` is for that.

    Args:
        hidden: [..., H], before the head.
        weight: [V, H], of the head.
        tokens: [...], int64, in [0, V) where ``mask`` is True.
        token_loss: Called once for each chunk of n tokens with ``log_prob`` [n], ``entropy`` [n],
            both as ``linear_log_probs`` gives them, and ``index`` [n], int64, the tokens' places in
            ``tokens.flatten()``: advantages and old log-probs are read there. Returns the losses
            [n], their denominators included. Gradients flow through the first two alone.
        mask: bool [...], True = counts; None: all count.
        temperature: Of the sampling; divides the logits. Positive.
        block_size: As in ``linear_log_probs``.

    Returns:
        0-d, float32 (float64 where an input is); differentiable once in ``hidden`` and ``weight``.

    Raises:
        ValueError: shapes or dtypes disagree, a token lies outside of the vocabulary,
            ``temperature`` or ``block_size`` is not positive, ``token_loss`` does not return one
            loss for each token or does not depend on what it is given.

    Example:
        >>> hidden = torch.zeros(2, 3, requires_grad=True)
        >>> advantage = torch.tensor([1.0, -2.0])
        >>> loss = linear_loss(hidden, torch.ones(4, 3), torch.tensor([2, 0]),
        ...     lambda log_prob, entropy, index: -advantage[index] * log_prob)
        >>> loss.detach()
        tensor(-1.3863)
    """
    blocks.check_arguments(
        hidden, weight, temperature=temperature, block_size=block_size, mask=mask
    )
    blocks.check_tokens(hidden, tokens)
    return _LinearLoss.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        tokens.reshape(-1),
        token_loss,
        None if mask is None else mask.reshape(-1),
        float(temperature),
        block_size or blocks.room(hidden.device).block_size,
        torch.is_grad_enabled(),
    )


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        token_loss: TokenLoss,
        mask: Tensor | None,
        temperature: float,
        block_size: int,
        recording: bool,
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            blocks.check_range(tokens, mask, weight.shape[0])
            needed = [recording and need for need in ctx.needs_input_grad[:2]]
            grads = blocks.empty_grads((hidden, weight), needed)
            blocks.zero_masked(grads[0], mask)
            dtype = blocks.arithmetic_dtype(hidden, weight)
            loss = torch.zeros((), dtype=dtype, device=hidden.device)
            scale = blocks.number(1 / temperature, dtype, hidden.device)
            store = _LogitStore(hidden, weight, grads[1], block_size)
            for chunk in blocks.row_chunks(hidden, mask, store.rows, first=store.first_rows):
                states = chunk.take(hidden, blocks.product_dtype(hidden, weight))
                ids = chunk.take(tokens, torch.int64)
                loss += _work_on_chunk(
                    chunk, states, ids, weight, token_loss, scale, store, grads[0], needed
                )
            store.finish()
        ctx.grads = blocks.only_needed(tuple(grads), needed)
        return loss

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "linear_loss gives its gradients out once; call linear_loss again, or use "
                "linear_log_probs for a second backward"
            )
        # In place: a second copy would be as large as the weight.
        by = grads[0]
        untouched = by.device.type == "cpu" and by.item() == 1
        d_hidden, d_weight = (
            d if d is None or untouched else d.mul_(by.to(d.dtype)) for d in ctx.grads
        )
        ctx.grads = None
        return d_hidden, d_weight, *[None] * 6


def _work_on_chunk(
    chunk: blocks.RowChunk,
    states: Tensor,
    ids: Tensor,
    weight: Tensor,
    token_loss: TokenLoss,
    scale: Tensor,
    store: "_LogitStore",
    d_hidden: Tensor,
    needed: list[bool],
) -> Tensor:
    """The chunk's loss; its gradients are written where they are needed."""
    tiles = store.tiles(chunk)
    sums, logit = chosen.sum_rows(states, weight, None, ids, scale, tiles)
    log_prob, entropy, highest, log_total = chosen.finish(sums, logit)
    value, g, g_entropy = _slopes_of(token_loss, log_prob, entropy, chunk)
    if not any(needed):
        return value
    made = chosen.coefficients(log_prob, entropy, g, g_entropy, scale)
    rows = chosen.RowSlopes(highest, log_total, *made)
    d_states = chunk.sum_into(d_hidden, scale.dtype) if needed[0] else None
    used: blocks.Tile | None = None
    for tile, part in reversed(tiles):
        entries = weight[part].to(states.dtype)
        kept = tile is not used
        z = chosen.block_slopes(states, entries, None, ids, part, scale, rows, tile, kept=kept)
        used = tile
        if d_states is not None:
            blocks.add_product(d_states, z, entries)
        if needed[1]:
            store.write_gradient(part, z, states)
    store.next_chunk()
    if d_states is not None:
        chunk.put(d_hidden, d_states)
    return value


class _LogitStore:
    """Where the logits of a chunk lie, over the whole vocabulary, and the gradient's way out.

    Tiles of ``kept_bytes`` together, and one more that the blocks share for which these do not
    suffice; where kernels make slopes without logits, that one alone, for the slopes.

    The first chunk has more rows than that: tiles for its first blocks alone, the others lie one
    after another in the memory that is to become the weight's gradient. That is written from the
    last block to the first, each time behind all logits that are still to be used.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, d_weight: Tensor, block_size: int) -> None:
        self._inputs = hidden, weight, block_size
        self._parts = list(blocks.vocabulary_blocks(weight, block_size))
        self._d_weight = d_weight
        self._tiles: list[blocks.Tile] = []
        self._kept = hidden.new_empty(0)
        self._first = True
        self._kept_bytes = blocks.room(hidden.device).kept_bytes
        block, itemsize = min(block_size, weight.shape[0]), self._tile(0).logits_dtype.itemsize
        # A product of half precision sums in float32, in memory of its own.
        self._sums = 4 // itemsize if itemsize < 4 else 0
        row_bytes = itemsize * (weight.shape[0] + self._sums * block)
        self.rows = max(blocks.whole_tiles(self._kept_bytes // row_bytes), FEWEST_ROWS)
        if chosen.has_fused(hidden, weight):
            self._kept_bytes, self.rows = 0, blocks.tile_rows(hidden, block_size)
        self.first_rows, self._apart_at_first = self.rows, 0
        if d_weight.shape == weight.shape and d_weight.dtype == self._tile(0).logits_dtype:
            self._plan_first_chunk(block)
        if self._apart_at_first:
            take_pages(d_weight)

    def _plan_first_chunk(self, block: int) -> None:
        """Its rows, and how many of its blocks lie apart: the most rows of all such numbers.

        With n blocks of R numbers, k of them apart, and n of G in the gradient, the last perhaps
        fewer: k R fit into what is kept, and (n - k) R <= (n - 1) G, so that the logits end where
        the last block's gradient starts. Then those up to any block i end at
        (i + 1 - k) R <= i G too.
        """
        hidden, weight, _ = self._inputs
        n, gradient = len(self._parts), block * weight.shape[1]
        itemsize = self._tile(0).logits_dtype.itemsize
        kept = self._kept_bytes // itemsize
        row = blocks.row_stride(block, hidden.device)
        for k in range(1, n):
            rows = min(kept // (k + self._sums), (n - 1) * gradient // (n - k)) // row
            if rows >= self.first_rows + blocks.ROW_TILE:
                self.first_rows, self._apart_at_first = blocks.whole_tiles(rows), k

    def tiles(self, chunk: blocks.RowChunk) -> list[tuple[blocks.Tile, slice]]:
        """Every block of the vocabulary with the tile of its logits."""
        if self._first and self._apart_at_first:
            tiles = self._apart(chunk.padded, self._apart_at_first)
            tiles += self._in_memory(chunk.padded, self._d_weight.view(-1))
            tiles = tiles[: len(self._parts)]
        else:
            self._tiles = self._tiles or self._some_shared(chunk.padded)
            tiles = self._tiles
        return list(zip(tiles, self._parts, strict=True))

    def _tile(self, rows: int, memory: Tensor | None = None) -> blocks.Tile:
        hidden, weight, block_size = self._inputs
        return blocks.Tile(hidden, weight, rows, block_size, memory=memory)

    def _some_shared(self, rows: int) -> list[blocks.Tile]:
        one, n = self._tile(rows), len(self._parts)
        tiles = self._apart(rows, max(0, min(n, self._kept_bytes // one.nbytes - self._sums)))
        return tiles + [one] * (n - len(tiles))

    def _apart(self, rows: int, count: int) -> list[blocks.Tile]:
        """Tiles in what is kept, the same memory for every chunk: fresh memory takes time."""
        one = self._tile(rows)
        most = min(self._kept_bytes, len(self._parts) * one.nbytes)
        if self._kept.nbytes < most:
            itemsize = one.logits_dtype.itemsize
            self._kept = self._kept.new_empty(most // itemsize, dtype=one.logits_dtype)
            take_pages(self._kept[: count * one.nbytes // itemsize])
        return self._in_memory(rows, self._kept)[:count]

    def _in_memory(self, rows: int, memory: Tensor) -> list[blocks.Tile]:
        """As many tiles as lie there."""
        size = self._tile(rows).nbytes // memory.itemsize
        return [self._tile(rows, place) for place in memory.split(size) if len(place) == size]

    def write_gradient(self, part: slice, z: Tensor, states: Tensor) -> None:
        """The part's rows of the gradient (+)= z.T @ states."""
        blocks.write_product(self._d_weight[part], z.t(), states, first=self._first)

    def next_chunk(self) -> None:
        """The first chunk's gradients are all written."""
        self._first = False

    def finish(self) -> None:
        """The gradient is 0 where there was no chunk."""
        if self._first:
            self._d_weight.zero_()


def _slopes_of(
    token_loss: TokenLoss, log_prob: Tensor, entropy: Tensor, chunk: blocks.RowChunk
) -> tuple[Tensor, Tensor, Tensor]:
    """The chunk's loss, and its derivatives by log-prob and entropy, 0 in the filling."""
    rows = chunk.rows
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=log_prob.device)
    with torch.enable_grad():
        log_prob, entropy = (
            x[: chunk.count].detach().requires_grad_() for x in (log_prob, entropy)
        )
        losses = token_loss(log_prob, entropy, rows)
        if losses.shape != rows.shape:
            raise ValueError(
                "token_loss must return one loss for each token, "
                f"got {tuple(losses.shape)} for {tuple(rows.shape)}"
            )
        if not losses.requires_grad:
            raise ValueError("token_loss must depend on log_prob or entropy, got a constant")
        value = losses.sum()
        grads = torch.autograd.grad(
            value, (log_prob, entropy), allow_unused=True, materialize_grads=True
        )
    padded = [torch.nn.functional.pad(g, (0, chunk.padded - chunk.count)) for g in grads]
    return value.detach(), padded[0], padded[1]
