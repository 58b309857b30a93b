"""Small operations of a step of decoding on a CPU, as C kernels.

Of torch's own, attention takes twenty operations and a norm six, each of which costs more to call
than to compute.
"""

import math

import torch
from torch import Tensor

from safe_rl.integrations.c_kernels import kernels, require


def attend_one(
    mixed: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, visible: Tensor, *, scale: float
) -> Tensor:
    """Turn the new query and key, write key and value into the cache, and attend.

        o = softmax(scale * rope(q) [k_1 .. rope(k_L)]^T) [v_1 .. v_L]

    Args:
        mixed: float32 [B, (heads + 2 key heads) * D], queries, keys and values of a token a row.
        cos: float32 [B, D]; rope(x) = x * cos + [x2, x1] * sin.
        sin: float32 [B, D], negative in its first half.
        cache: float32 [2, B, key heads, L, D], keys and values; the last place is written.
        visible: bool [B, L], the last place True.
        scale: Of the scores.

    Returns:
        float32 [B, heads * D].

    Raises:
        ValueError: an input is not float32 on a CPU, or the cache has gaps within a head.
    """
    for name, x in {"mixed": mixed, "cos": cos, "sin": sin, "cache": cache}.items():
        require(name, x)
    if cache.stride()[3:] != (cache.shape[4], 1):
        raise ValueError(f"a head's cache must be in one piece, got strides {cache.stride()}")
    _, rows, key_heads, length, size = cache.shape
    heads = mixed.shape[-1] // size - 2 * key_heads
    seen = mixed.new_empty(rows, heads * size)
    kernels().attend_one(
        *(x.data_ptr() for x in (mixed, cos, sin, cache[0], cache[1], visible, seen)),
        *(rows, heads, key_heads, size, length, cache.stride(1), cache.stride(2)),
        scale,
        torch.get_num_threads(),
    )
    return seen


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Each row over its root mean square.

        y = weight * x / sqrt(mean(x^2) + eps)

    Args:
        x: float32 [..., H].
        weight: float32 [H].
        eps: Added to the mean square.

    Returns:
        float32 [..., H].

    Raises:
        ValueError: an input is not float32 on a CPU.
    """
    require("x", x)
    require("weight", weight)
    x, weight = x.contiguous(), weight.contiguous()
    y, rows, size = torch.empty_like(x), math.prod(x.shape[:-1]), x.shape[-1]
    kernels().rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), rows, size, eps)
    return y
