"""A step of decoding on a CPU, as C kernels.

Of torch's own, attention takes twenty operations and a norm six, each of which costs more to call
than to compute.
"""

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from safe_rl.integrations.c_kernels import kernels, require


class _Attention(ctypes.Structure):
    """As ``decode.h`` has it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("cosine", "sine", "visible")),
        *((name, ctypes.c_long) for name in ("rows", "heads", "key_heads", "size", "length")),
        *((name, ctypes.c_long) for name in ("cache_row", "cache_head")),
        ("scale", ctypes.c_float),
    )


class PackedLinear(ctypes.Structure):
    """A packed weight, its bias or None, and its outputs; as ``decode_layer.c`` has it."""

    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("width", ctypes.c_long),
    )


class PackedLayer(ctypes.Structure):
    """Where the weights of a layer are; as ``decode_layer.c`` has it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("attention_norm", "feed_forward_norm")),
        *((name, ctypes.c_float) for name in ("attention_eps", "feed_forward_eps")),
        *((name, PackedLinear) for name in ("query_key_value", "attention_out", "gate_up", "down")),
    )


class _Room(ctypes.Structure):
    """As ``decode_layer.c`` has it."""

    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("normed", "mixed", "seen", "both", "gated", "change")
    )


def decode_layers(
    layers: Sequence[PackedLayer],
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    visible: Tensor,
    *,
    heads: int,
    scale: float,
) -> None:
    """Take one new token a row through all layers of a Llama, ``hidden`` in place.

        h += W_o attention(rope(W_q n(h)), rope(W_k n(h)), W_v n(h))      n: RMS norm
        h += W_down (silu(W_gate n'(h)) * W_up n'(h))

    Args:
        layers: Whose weights are where they say.
        hidden: float32 [B, H].
        cos: See ``attend_one``.
        sin: See ``attend_one``.
        cache: float32 [layers, 2, B, key heads, L, D]; the last place is written.
        visible: bool [B, L], the last place True.
        heads: Of the queries.
        scale: Of the scores.

    Raises:
        ValueError: an input is not float32 on a CPU, not contiguous or of another shape, or the
            cache has gaps within a head.
    """
    require("hidden", hidden)
    if len(hidden) != cache.shape[2] or not hidden.is_contiguous():
        raise ValueError(
            f"hidden must be contiguous [B, H] of the cache {tuple(cache.shape)}, "
            f"got {tuple(hidden.shape)} with strides {hidden.stride()}"
        )
    how = _attention(cos, sin, cache[0], visible, heads=heads, scale=scale)
    rows, size = hidden.shape
    kernel, first = kernels(), layers[0]
    if size != first.attention_out.width:
        raise ValueError(
            f"hidden must be [B, {first.attention_out.width}], got {size} numbers a row"
        )
    widths = {
        "normed": size,
        "mixed": kernel.padded(first.query_key_value.width),
        "seen": heads * how.size,
        "both": kernel.padded(first.gate_up.width),
        "gated": first.gate_up.width // 2,
        "change": kernel.padded(size),
    }
    held = {name: hidden.new_empty(rows, width) for name, width in widths.items()}
    room = _Room(**{name: x.data_ptr() for name, x in held.items()})
    places = [(keys.data_ptr(), values.data_ptr()) for keys, values in cache]
    threads, at = torch.get_num_threads(), hidden.data_ptr()
    for layer, place in zip(layers, places, strict=True):
        kernel.decode_layer(
            *(ctypes.addressof(x) for x in (layer, how, room)), at, size, *place, threads
        )


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
        ValueError: an input is not float32 on a CPU, not contiguous or of another shape, or the
            cache has gaps within a head.
    """
    require("mixed", mixed)
    mixed = mixed.contiguous()
    key_heads, size = cache.shape[2], cache.shape[4]
    heads, rest = divmod(mixed.shape[-1], size)
    heads -= 2 * key_heads
    if mixed.shape[:-1] != cache.shape[1:2] or rest or heads < 1 or heads % key_heads:
        raise ValueError(
            "mixed must be [B, (heads + 2 key heads) * D], heads a multiple of the key heads of "
            f"the cache {tuple(cache.shape)}, got {tuple(mixed.shape)}"
        )
    how = _attention(cos, sin, cache, visible, heads=heads, scale=scale)
    seen = mixed.new_empty(len(mixed), heads * size)
    kernels().attend_one(
        ctypes.addressof(how),
        *(x.data_ptr() for x in (mixed, cache[0], cache[1], seen)),
        torch.get_num_threads(),
    )
    return seen


def _attention(
    cos: Tensor, sin: Tensor, cache: Tensor, visible: Tensor, *, heads: int, scale: float
) -> _Attention:
    for name, x in {"cos": cos, "sin": sin, "cache": cache}.items():
        require(name, x)
    if visible.shape != (cache.shape[1], cache.shape[3]) or visible.dtype != torch.bool:
        raise ValueError(
            f"visible must be bool [B, L] of the cache {tuple(cache.shape)}, "
            f"got {visible.dtype} {tuple(visible.shape)}"
        )
    turn = cache.shape[1], cache.shape[4]
    for name, x in {"cos": cos, "sin": sin}.items():
        if x.shape != turn:
            raise ValueError(f"{name} must be [B, D], {turn}, got {tuple(x.shape)}")
    for name, x in {"cos": cos, "sin": sin, "visible": visible}.items():
        if not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {x.stride()}")
    if cache.stride()[3:] != (cache.shape[4], 1):
        raise ValueError(f"a head's cache must be in one piece, got strides {cache.stride()}")
    _, rows, key_heads, length, size = cache.shape
    return _Attention(
        *(x.data_ptr() for x in (cos, sin, visible)),
        *(rows, heads, key_heads, size, length, cache.stride(1), cache.stride(2)),
        scale,
    )


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
        ValueError: an input is not float32 on a CPU, or of another shape.
    """
    require("x", x)
    require("weight", weight)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be {tuple(x.shape[-1:])} as x, got {tuple(weight.shape)}")
    x, weight = x.contiguous(), weight.contiguous()
    y, rows, size = torch.empty_like(x), math.prod(x.shape[:-1]), x.shape[-1]
    kernels().rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), rows, size, eps)
    return y
