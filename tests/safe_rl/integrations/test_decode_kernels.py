"""Attention of a new token and the norm, shapes drawn: against float64, written out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from safe_rl.integrations.c_kernels import compiled
from safe_rl.integrations.decode_kernels import (
    PackedLayer,
    PackedLinear,
    attend_one,
    decode_layers,
    rms_norm,
)
from safe_rl.integrations.packed_linear import pack
from tests.strategies import PROPERTY

pytestmark = pytest.mark.skipif(compiled() is None, reason="no C compiler")


def rope(x: Tensor, angle: Tensor) -> Tensor:
    """Of each head the pairs (i, i + D/2), turned by an angle a pair: [heads, D], [D/2]."""
    first, second = x.chunk(2, -1)
    turned = [
        first * angle.cos() - second * angle.sin(),
        second * angle.cos() + first * angle.sin(),
    ]
    return torch.cat(turned, -1)


def expected(
    mixed: Tensor, angle: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float
) -> Tensor:
    """One row: every head looks at the visible places and at the new token."""
    key_heads, _, size = keys.shape
    parts = mixed.view(-1, size)
    heads = len(parts) - 2 * key_heads
    query, key, value = parts.split([heads, key_heads, key_heads])
    query, key = rope(query, angle), rope(key, angle)
    seen = []
    for head in range(heads):
        of = head * key_heads // heads
        all_keys = torch.cat([keys[of, :-1][visible[:-1]], key[of : of + 1]])
        all_values = torch.cat([values[of, :-1][visible[:-1]], value[of : of + 1]])
        seen.append((scale * all_keys @ query[head]).softmax(0) @ all_values)
    return torch.cat(seen)


@PROPERTY
@given(
    rows=st.integers(1, 3),
    groups=st.integers(1, 4),
    key_heads=st.integers(1, 3),
    half=st.integers(1, 9),
    length=st.integers(1, 20),
)
def test_attention_equals_float64(
    rows: int, groups: int, key_heads: int, half: int, length: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    size = 2 * half
    mixed = torch.randn(rows, (groups + 2) * key_heads * size, generator=generator)
    angle = torch.randn(rows, half, generator=generator).double()
    # The cache has room for more tokens and rows than there are.
    whole = torch.randn(2, rows + 1, key_heads, length + 3, size, generator=generator)
    cache = whole[:, :rows, :, :length]
    before = whole.clone()
    visible = torch.rand(rows, length, generator=generator) < 0.6
    visible[:, -1] = True
    cos, sin = (
        torch.cat([x, y], -1).float()
        for x, y in ((angle.cos(), angle.cos()), (-angle.sin(), angle.sin()))
    )
    seen = attend_one(mixed, cos, sin, cache, visible, scale=0.3)
    for row in range(rows):
        exact = expected(
            mixed[row].double(), angle[row], *before[:, row, :, :length].double(), visible[row], 0.3
        )
        torch.testing.assert_close(seen[row].double(), exact, rtol=1e-5, atol=1e-5)
        heads = mixed[row].view(-1, size)[groups * key_heads :]
        key, value = heads.chunk(2)
        turned = rope(key.double(), angle[row]).float()
        torch.testing.assert_close(cache[0, row, :, -1], turned, rtol=1e-5, atol=1e-5)
        assert torch.equal(cache[1, row, :, -1], value)
    # Nothing else is written.
    before[:, :rows, :, length - 1] = cache[:, :, :, -1]
    assert torch.equal(whole, before)


def test_what_is_not_visible_may_be_nan() -> None:
    cache = torch.zeros(2, 1, 1, 3, 2)
    cache[:, :, :, 0] = torch.nan
    visible = torch.tensor([[False, True, True]])
    mixed, one, zero = torch.ones(1, 6), torch.ones(1, 2), torch.zeros(1, 2)
    seen = attend_one(mixed, one, zero, cache, visible, scale=0.0)
    torch.testing.assert_close(seen, torch.full((1, 2), 0.5))


@PROPERTY
@given(
    rows=st.integers(1, 4),
    size=st.integers(1, 50),
)
def test_norm_equals_float64(rows: int, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, rows, generator=generator).T
    weight = torch.randn(size, generator=generator)
    exact = x.double() * weight / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), exact, rtol=1e-5, atol=1e-6)


def test_what_is_not_float32_is_refused() -> None:
    half = torch.ones(4, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"x must be float32 on a CPU, got torch\.bfloat16"):
        rms_norm(half, torch.ones(8), 1e-5)
    with pytest.raises(ValueError, match=r"weight must be float32 on a CPU, got torch\.bfloat16"):
        rms_norm(half.float(), half[0], 1e-5)
    cache, turn = torch.zeros(2, 1, 1, 3, 4), torch.ones(1, 4)
    visible, mixed = torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 12)
    with pytest.raises(ValueError, match=r"mixed must be float32 on a CPU, got torch\.float64"):
        attend_one(mixed.double(), turn, turn, cache, visible, scale=1.0)
    with pytest.raises(ValueError, match="a head's cache must be in one piece, got strides"):
        attend_one(mixed, turn, turn, cache.transpose(3, 4).contiguous().mT, visible, scale=1.0)


def test_what_has_another_shape_is_refused() -> None:
    cache, turn = torch.zeros(2, 2, 1, 3, 4), torch.ones(2, 4)
    visible, mixed = torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 12)
    for wrong in (mixed[:1], mixed[:, :11], mixed[:, :8], mixed.unsqueeze(1)):
        with pytest.raises(ValueError, match=r"mixed must be \[B, .*, got \("):
            attend_one(wrong, turn, turn, cache, visible, scale=1.0)
    with pytest.raises(ValueError, match=r"cos must be \[B, D\], \(2, 4\), got \(1, 4\)"):
        attend_one(mixed, turn[:1], turn, cache, visible, scale=1.0)
    with pytest.raises(ValueError, match=r"sin must be \[B, D\], \(2, 4\), got \(2, 2\)"):
        attend_one(mixed, turn, turn[:, :2], cache, visible, scale=1.0)
    with pytest.raises(ValueError, match=r"weight must be \(8,\) as x, got \(4,\)"):
        rms_norm(torch.ones(3, 8), torch.ones(4), 1e-5)


def test_rows_of_no_width() -> None:
    assert rms_norm(torch.ones(3, 0), torch.ones(0), 1e-5).shape == (3, 0)


def layer_in_float64(
    hidden: Tensor, weights: dict[str, Tensor], biases: dict[str, Tensor | None], attend
) -> Tensor:
    """Written out; ``attend`` is from the mixed queries, keys and values to what they see."""

    def linear(name: str, x: Tensor) -> Tensor:
        y, bias = x @ weights[name].double().T, biases[name]
        return y if bias is None else y + bias.double()

    def norm(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    hidden = hidden.double()
    mixed = linear("query_key_value", norm(hidden))
    hidden = hidden + linear("attention_out", attend(mixed))
    gate, up = linear("gate_up", norm(hidden)).chunk(2, -1)
    return hidden + linear("down", gate * gate.sigmoid() * up)


@PROPERTY
@given(
    rows=st.integers(1, 19),
    groups=st.integers(1, 3),
    key_heads=st.integers(1, 2),
    half=st.integers(1, 5),
    inner=st.integers(1, 40),
    length=st.integers(1, 5),
    has_bias=st.booleans(),
    threads=st.integers(1, 3),
)
def test_layers_equal_float64(
    rows: int,
    groups: int,
    key_heads: int,
    half: int,
    inner: int,
    length: int,
    has_bias: bool,
    threads: int,
) -> None:
    generator = torch.Generator().manual_seed(0)
    size, heads = 2 * half, groups * key_heads
    width = heads * size
    shapes = {
        "query_key_value": ((heads + 2 * key_heads) * size, width),
        "attention_out": (width, width),
        "gate_up": (2 * inner, width),
        "down": (width, inner),
    }
    layers, found = [], torch.randn(rows, width, generator=generator)
    cache = torch.randn(2, 2, rows, key_heads, length, size, generator=generator)
    angle = torch.randn(rows, half, generator=generator)
    visible = torch.ones(rows, length, dtype=torch.bool)
    cos, sin = torch.cat([angle.cos()] * 2, 1), torch.cat([-angle.sin(), angle.sin()], 1)
    held, hidden = [], found.double()
    for layer in range(2):
        weights = {
            name: torch.randn(shape, generator=generator) / shape[1] ** 0.5
            for name, shape in shapes.items()
        }
        biases = {
            name: torch.randn(shape[0], generator=generator) if has_bias else None
            for name, shape in shapes.items()
        }
        before = cache[layer].double()

        def attend(mixed: Tensor, before: Tensor = before) -> Tensor:
            seen = [
                expected(mixed[i], angle[i].double(), *before[:, i], visible[i], 0.3)
                for i in range(rows)
            ]
            return torch.stack(seen)

        hidden = layer_in_float64(hidden, weights, biases, attend)
        packed = {name: pack(weight) for name, weight in weights.items()}
        ones = torch.ones(width)
        # Their memory must outlive the loop.
        held.append((packed, biases, ones))
        layers.append(
            PackedLayer(
                *[ones.data_ptr()] * 2,
                *[1e-5] * 2,
                *(
                    PackedLinear(
                        packed[name].data_ptr(), bias if bias is None else bias.data_ptr(), shape[0]
                    )
                    for (name, shape), bias in zip(shapes.items(), biases.values(), strict=True)
                ),
            )
        )
    before_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        decode_layers(layers, found, cos, sin, cache, visible, heads=heads, scale=0.3)
    finally:
        torch.set_num_threads(before_threads)
    torch.testing.assert_close(found.double(), hidden, rtol=1e-4, atol=1e-4)


def test_the_gate_does_not_overflow() -> None:
    one, width = torch.ones(2), 2
    gates = torch.tensor([[1e4, 0.0], [-1e4, 0.0], [1.0, 1.0], [1.0, 1.0]])
    linear = {
        "query_key_value": torch.zeros(6, 2),
        "attention_out": torch.zeros(2, 2),
        "gate_up": gates,
        "down": torch.eye(2),
    }
    packed = {name: pack(weight) for name, weight in linear.items()}
    layer = PackedLayer(
        *[one.data_ptr()] * 2,
        *[0.0] * 2,
        *(PackedLinear(packed[name].data_ptr(), None, len(w)) for name, w in linear.items()),
    )
    hidden, turn = torch.ones(1, width), torch.ones(1, width)
    decode_layers(
        [layer],
        hidden,
        turn,
        0 * turn,
        torch.zeros(1, 2, 1, 1, 1, width),
        torch.ones(1, 1, dtype=torch.bool),
        heads=1,
        scale=1.0,
    )
    torch.testing.assert_close(hidden, torch.tensor([[1 + 2e4, 1.0]]))
