"""Log-probability and entropy of tokens from hidden states and the head; no logits in memory."""

import torch
from torch import Tensor

from safe_ops import _linear_blocks as blocks
from safe_ops import _linear_chosen as chosen
from safe_ops.log_probs import TokenLogProbs


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    block_size: int | None = None,
) -> TokenLogProbs:
    """``token_log_probs(hidden @ weight.T + bias, tokens)`` at the cost of its matrix products.

        z = (hidden @ weight.T + bias) / temperature
        log_prob = z[token] - logsumexp z
        entropy  = - sum_v p_v log p_v                   p = softmax z

    Never in memory: anything of the size of the logits. A tile of about 16 MiB of them (on a GPU
    512) is made, summed up and overwritten; the backward makes it again from the logsumexp that was
    kept. Half-precision logits on a GPU do not even fill a tile: a kernel sums them up while it
    multiplies, and in the backward writes their slopes. A row that ``mask`` leaves out is not
    multiplied, and a ``weight`` that is frozen costs no product.

    In float32 on a CPU, at one number of threads, the results of a row are bitwise the same
    wherever it stands and whichever other rows are there or masked.

    The products are in the higher dtype of ``hidden`` and ``weight``, all else in float32. On a
    CPU the logits of two bfloat16 inputs are rounded to bfloat16, as the model's own head does; a
    float32 ``hidden`` with a bfloat16 ``weight`` has exact products, in about twice the time, and
    no copy of the weight. A head with an adapter is ``cat([hidden, scale * hidden @ A.T], -1)`` on
    ``cat([weight, B], 1)``.

    Args:
        hidden: [..., H], before the head.
        weight: [V, H], of the head.
        tokens: [...], int64, in [0, V) where ``mask`` is True.
        bias: [V], of the head; -inf bans a token.
        mask: bool [...], True = counts; None: all count. On an accelerator a mask costs one wait
            for the number of rows that count.
        temperature: Of the sampling; divides the logits. Positive.
        block_size: Entries of the vocabulary that are worked on together; None: 4096 on a
            CPU, 16,384 on a GPU. Another one rounds in another way.

    Returns:
        ``TokenLogProbs(log_prob, entropy)``, [...] each, nats, float32 (float64 where an input
        is); 0 where ``mask`` is False; differentiable once in ``hidden``, ``weight`` and ``bias``.

    Raises:
        ValueError: shapes or dtypes disagree, a token lies outside of the vocabulary,
            ``temperature`` or ``block_size`` is not positive.

    Source: online softmax: Milakov & Gimelshein (arXiv 1805.02867).

    Example:
        >>> hidden, weight = torch.zeros(1, 3), torch.zeros(4, 3)
        >>> linear_log_probs(hidden, weight, torch.tensor([2])).entropy
        tensor([1.3863])
    """
    blocks.check_arguments(
        hidden, weight, temperature=temperature, block_size=block_size, mask=mask
    )
    blocks.check_tokens(hidden, tokens)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            "bias must be [V] with the V of weight, "
            f"got bias {tuple(bias.shape)} and weight {tuple(weight.shape)}"
        )
    log_prob, entropy, _, _ = _forward(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        tokens.reshape(-1),
        bias,
        None if mask is None else mask.reshape(-1),
        float(temperature),
        block_size or blocks.room(hidden.device).block_size,
    )
    return TokenLogProbs(log_prob.reshape(tokens.shape), entropy.reshape(tokens.shape))


@torch.library.custom_op("safe_ops::linear_log_probs", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-prob, entropy; for the backward the highest logit and log sum e^(z - highest)."""
    blocks.check_range(tokens, mask, weight.shape[0])
    dtype = blocks.arithmetic_dtype(hidden, weight)
    results = [torch.zeros(len(tokens), dtype=dtype, device=hidden.device) for _ in range(4)]
    scale = blocks.number(1 / temperature, dtype, hidden.device)
    tile = None
    for chunk in blocks.row_chunks(hidden, mask, blocks.tile_rows(hidden, block_size)):
        tile = tile or blocks.Tile(hidden, weight, chunk.padded, block_size)
        states = chunk.take(hidden, tile.dtype)
        ids = chunk.take(tokens, torch.int64)
        tiles = ((tile, part) for part in blocks.vocabulary_blocks(weight, block_size))
        sums, logit = chosen.sum_rows(states, weight, bias, ids, scale, tiles)
        for result, x in zip(results, chosen.finish(sums, logit), strict=True):
            chunk.put(result, x)
        del states  # before the next chunk's are made
    return results[0], results[1], results[2], results[3]


@_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    block_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.empty_like(tokens, dtype=blocks.arithmetic_dtype(hidden, weight))
    return x, torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("safe_ops::linear_log_probs_backward", mutates_args=())
def _backward(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    block_size: int,
    results: list[Tensor],
    grad_log_prob: Tensor,
    grad_entropy: Tensor,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; an empty tensor for one that is not needed."""
    dtype = grad_log_prob.dtype
    d_hidden, d_weight, d_bias = _empty_grads(hidden, weight, bias, needed)
    blocks.zero_masked(d_hidden, mask)
    scale = blocks.number(1 / temperature, dtype, hidden.device)
    tile = None
    for chunk in blocks.row_chunks(hidden, mask, blocks.tile_rows(hidden, block_size)):
        first = tile is None
        tile = tile or blocks.Tile(hidden, weight, chunk.padded, block_size)
        states = chunk.take(hidden, tile.dtype)
        ids = chunk.take(tokens, torch.int64)
        log_prob, entropy, highest, log_total = results
        # The logits of filling rows are the bias, whose exponential may be infinite.
        highest = chunk.take(highest, dtype, filling=torch.finfo(dtype).max)
        log_prob, entropy, log_total, g, g_entropy = (
            chunk.take(x, dtype)
            for x in (log_prob, entropy, log_total, grad_log_prob, grad_entropy)
        )
        made = chosen.coefficients(log_prob, entropy, g, g_entropy, scale)
        rows = chosen.RowSlopes(highest, log_total, *made)
        d_states = chunk.sum_into(d_hidden, dtype) if needed[0] else None
        for part in blocks.vocabulary_blocks(weight, block_size):
            entries = weight[part].to(tile.dtype)
            of_block = None if bias is None else bias[part]
            z = chosen.block_slopes(states, entries, of_block, ids, part, scale, rows, tile)
            if d_states is not None:
                blocks.add_product(d_states, z, entries)
            if needed[1]:
                blocks.write_product(d_weight[part], z.t(), states, first=first)
            if needed[2]:
                total = z.sum(0, dtype=dtype)
                d_bias[part] = total if first else d_bias[part] + total
        if d_states is not None:
            chunk.put(d_hidden, d_states)
        del states, d_states  # before the next chunk's are made
    if tile is None:
        d_weight.zero_()
        d_bias.zero_()
    return d_hidden, d_weight, d_bias


def _empty_grads(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (hidden, weight, weight if bias is None else bias)
    d_hidden, d_weight, d_bias = blocks.empty_grads(inputs, needed)
    return d_hidden, d_weight, d_bias


@_backward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    block_size: int,
    results: list[Tensor],
    grad_log_prob: Tensor,
    grad_entropy: Tensor,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_grads(hidden, weight, bias, needed)


def _keep(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    hidden, weight, tokens, bias, mask, ctx.temperature, ctx.block_size = inputs
    ctx.save_for_backward(hidden, weight, tokens, bias, mask, *output)
    ctx.mark_non_differentiable(*output[2:])


def _differentiate(ctx, grad_log_prob: Tensor, grad_entropy: Tensor, *_: Tensor) -> tuple:
    hidden, weight, tokens, bias, mask, *results = ctx.saved_tensors
    needed = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    grads = _backward(
        hidden, weight, tokens, bias, mask, ctx.temperature, ctx.block_size,
        results, grad_log_prob, grad_entropy, needed,
    )  # fmt: skip
    d_hidden, d_weight, d_bias = blocks.only_needed(grads, needed)
    return d_hidden, d_weight, None, d_bias, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)
