"""A loss of log-prob and entropy whose gradients are made together with its value."""

from collections.abc import Callable

import torch
from torch import Tensor

from safe_ops import _linear_blocks as blocks
from safe_ops import _linear_chosen as chosen

TokenLoss = Callable[[Tensor, Tensor, Tensor], Tensor]

LOGITS_BYTES = 48 * 2**20
"""Of the logits of one chunk of tokens, over the whole vocabulary."""


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
    instead of the four of ``linear_log_probs`` and its backward. The logits of a chunk are at most
    48 MiB, or those of 16 tokens; those of the first H tokens lie in the memory that is to become
    the gradient of ``weight``, since a small chunk costs one pass over that gradient.

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
        block_size or blocks.BLOCK_SIZE,
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
            d_hidden, d_weight = blocks.empty_grads((hidden, weight), needed)
            dtype = blocks.arithmetic_dtype(hidden, weight)
            loss = torch.zeros((), dtype=dtype, device=hidden.device)
            scale = torch.tensor(1 / temperature, dtype=dtype, device=hidden.device)
            parts = list(blocks.vocabulary_blocks(weight, block_size))
            store = _LogitStore(hidden, weight, d_weight, parts, block_size)
            for chunk in blocks.row_chunks(hidden, mask, store.rows, first=store.first_rows):
                tiles = store.tiles(chunk)
                states = chunk.take(hidden, tiles[0].dtype)
                ids = chunk.take(tokens, torch.int64)
                logits = []
                sums = blocks.sum_start(chunk, hidden.device, dtype)
                logit = torch.zeros_like(sums[0])
                for tile, part in zip(tiles, parts, strict=True):
                    z = tile.logits(states, weight[part].to(tile.dtype), None)
                    sums = blocks.absorb_block(z, scale, *sums)
                    logit = chosen.read_chosen(z, ids, part, scale, logit)
                    logits.append(z)
                log_prob, entropy, highest, log_total = chosen.finish(sums, logit)
                value, g, g_entropy = _slopes_of(token_loss, log_prob, entropy, chunk)
                loss += value
                if not any(needed):
                    continue
                constant, slope, at_token = chosen.slopes(log_prob, entropy, g, g_entropy, scale)
                d_states = torch.zeros_like(states, dtype=dtype)
                for z, part in zip(logits, parts, strict=True):
                    blocks.turn_into_slopes(z, scale, highest, log_total, constant, slope)
                    chosen.write_chosen(z, ids, part, at_token)
                    if needed[0]:
                        blocks.add_product(d_states, z, weight[part].to(tiles[0].dtype))
                    if needed[1]:
                        store.write_gradient(d_weight[part], z, states)
                if needed[0]:
                    chunk.put(d_hidden, d_states)
        ctx.grads = blocks.only_needed((d_hidden, d_weight), needed)
        return loss

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "linear_loss gives its gradients out once; call linear_loss again, or use "
                "linear_log_probs for a second backward"
            )
        # In place: a second copy would be as large as the weight.
        d_hidden, d_weight = (
            None if d is None else d.mul_(grads[0].to(d.dtype)) for d in ctx.grads
        )
        ctx.grads = None
        return d_hidden, d_weight, *[None] * 6


class _LogitStore:
    """Where the logits of a chunk lie, over the whole vocabulary, and the gradient's way out.

    The first chunk has up to H rows: a block of its logits fits where the same block of the
    weight's gradient will be. That block's product goes through a buffer. Other chunks lie in tiles
    of 48 MiB together.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        d_weight: Tensor,
        parts: list[slice],
        block_size: int,
    ) -> None:
        self._inputs = hidden, weight, block_size
        self._parts = parts
        self._d_weight = d_weight
        self._in_gradient = self._fits_in_gradient()
        self._buffer: Tensor | None = None
        self._tiles: list[blocks.Tile] = []
        self._first = True
        size = blocks.product_dtype(hidden, weight).itemsize
        self.rows = blocks.whole_tiles(LOGITS_BYTES // (size * weight.shape[0]))
        self.first_rows = blocks.whole_tiles(weight.shape[1]) if self._in_gradient else self.rows

    def _fits_in_gradient(self) -> bool:
        hidden, weight, block_size = self._inputs
        like = blocks.Tile(hidden, weight[:0], 0, block_size)
        return (
            self._d_weight.shape == weight.shape
            and self._d_weight.dtype == like.logits_dtype
            and weight.shape[1] >= blocks.ROW_TILE
        )

    def tiles(self, chunk: blocks.RowChunk) -> list[blocks.Tile]:
        """One for each block of the vocabulary."""
        hidden, weight, size = self._inputs
        self._first = not self._tiles and self._buffer is None
        if self._first and self._in_gradient:
            block = min(size, weight.shape[0])
            self._buffer = torch.empty_like(self._d_weight[:block])
            return [
                blocks.Tile(hidden, weight[p], chunk.padded, size, memory=self._d_weight[p])
                for p in self._parts
            ]
        self._tiles = self._tiles or [
            blocks.Tile(hidden, weight[part], chunk.padded, size) for part in self._parts
        ]
        return self._tiles

    def write_gradient(self, target: Tensor, z: Tensor, states: Tensor) -> None:
        """target (+)= z.T @ states, where z may lie in the target."""
        if not (self._first and self._buffer is not None):
            blocks.write_product(target, z.t(), states, first=self._first)
            return
        product = self._buffer[: len(target)]
        torch.mm(z.t(), states, out=product)
        target.copy_(product)


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
