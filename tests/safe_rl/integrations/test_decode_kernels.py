"""Attention of a new token and the norm, shapes drawn: against float64, written out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from safe_rl.integrations.c_kernels import compiled
from safe_rl.integrations.decode_kernels import attend_one, rms_norm
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


def test_rows_of_no_width() -> None:
    assert rms_norm(torch.ones(3, 0), torch.ones(0), 1e-5).shape == (3, 0)
