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
    48 MiB, or those of 16 tokens.

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
            size = blocks.product_dtype(hidden, weight).itemsize
            rows = LOGITS_BYTES // (size * weight.shape[0]) // blocks.ROW_TILE * blocks.ROW_TILE
            rows = max(rows, blocks.ROW_TILE)
            parts = list(blocks.vocabulary_blocks(weight, block_size))
            tiles: list[blocks.Tile] = []
            for chunk in blocks.row_chunks(hidden, mask, block_size, rows=rows):
                first = not tiles
                tiles = tiles or [
                    blocks.Tile(hidden, weight[part], chunk.padded, block_size) for part in parts
                ]
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
                        blocks.write_product(d_weight[part], z.t(), states, first=first)
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
