"""The C kernel against float64, for shapes that fill no panel, and where there is no compiler."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from safe_rl.integrations import packed_linear
from safe_rl.integrations.c_kernels import compiled
from safe_rl.integrations.merged_linear import MergedLinear
from safe_rl.integrations.packed_linear import can_pack, pack
from tests.strategies import PROPERTY

needs_compiler = pytest.mark.skipif(compiled() is None, reason="no C compiler")


def product(x: Tensor, weight: Tensor) -> Tensor:
    return packed_linear.packed_linear(x, pack(weight), width=len(weight))


@needs_compiler
@PROPERTY
@given(
    rows=st.integers(1, 110),
    depth=st.integers(1, 40),
    width=st.integers(1, 70),
)
def test_equals_the_product_in_float64(rows: int, depth: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, depth, generator=generator)
    weight = torch.randn(width, depth, generator=generator)
    exact = x.double() @ weight.double().T
    bound = x.abs().double() @ weight.abs().double().T
    got = product(x, weight)
    assert got.shape == exact.shape
    assert ((got - exact).abs() <= depth * torch.finfo(torch.float32).eps * bound).all()


@needs_compiler
def test_a_row_depends_on_no_other_row_and_on_no_number_of_threads() -> None:
    x, weight = torch.randn(190, 33), torch.randn(50, 33)  # large enough for threads
    whole, threads = product(x, weight), torch.get_num_threads()
    assert torch.equal(product(x[7:12], weight), whole[7:12])
    try:
        torch.set_num_threads(threads + 1)
        assert torch.equal(product(x, weight), whole)
    finally:
        torch.set_num_threads(threads)


@needs_compiler
def test_what_lies_with_gaps_and_in_more_dimensions() -> None:
    x, weight = torch.randn(2, 8, 3).transpose(1, 2), torch.randn(8, 20).T
    torch.testing.assert_close(product(x, weight), x @ weight.T)
    assert product(x[:0], weight).shape == (0, 3, 20)


@needs_compiler
def test_nan_and_infinity_pass_and_stay_in_their_row() -> None:
    x = torch.ones(3, 4)
    x[0, 1], x[2, 2] = torch.nan, torch.inf
    got = product(x, torch.ones(5, 4))
    assert got[0].isnan().all()
    assert (got[1] == 4).all()
    assert (got[2] == torch.inf).all()


@needs_compiler
def test_a_packed_weight_is_written_again_in_place() -> None:
    first, second, x = torch.randn(20, 6), torch.randn(20, 6), torch.randn(4, 6)
    packed = pack(first)
    assert pack(second, packed).data_ptr() == packed.data_ptr()
    expected = product(x, second)
    assert torch.equal(packed_linear.packed_linear(x, packed, width=20), expected)


@needs_compiler
def test_wider_vectors_of_other_processors_compute_the_same() -> None:
    wide = compiled("-DLANES=16")
    assert wide is not None
    assert wide.columns() == 32
    x, weight = torch.randn(7, 12), torch.randn(64, 12)
    packed, y = torch.empty(2, 12, 32), torch.empty(7, 64)
    wide.pack(weight.data_ptr(), 64, 12, packed.data_ptr(), 1)
    wide.multiply(x.data_ptr(), 7, 12, packed.data_ptr(), y.data_ptr(), 64, 1)
    torch.testing.assert_close(y, x @ weight.T)


@needs_compiler
def test_errors_name_the_argument() -> None:
    packed = pack(torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"x must be \[..., 2\] as the weight is, got \(4, 3\)"):
        packed_linear.packed_linear(torch.ones(4, 3), packed, width=3)
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(ValueError, match=f"x must be float32 on a CPU, got {dtype}"):
            packed_linear.packed_linear(torch.ones(4, 2, dtype=dtype), packed, width=3)
        with pytest.raises(ValueError, match=f"weight must be float32 on a CPU, got {dtype}"):
            pack(torch.ones(3, 2, dtype=dtype))
    with pytest.raises(ValueError, match="x must need no gradient"):
        packed_linear.packed_linear(torch.ones(4, 2, requires_grad=True), packed, width=3)
    with pytest.raises(ValueError, match=r"packed must be .* for a weight \(300, 2\), got \(1, 2"):
        pack(torch.ones(300, 2), packed)


def test_without_a_compiler_the_product_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/no/such/compiler -O1")
    missing = compiled.__wrapped__
    assert missing() is None
    monkeypatch.setattr(packed_linear, "compiled", missing)
    layer = torch.nn.Linear(6, 5)
    assert not can_pack(layer.weight)
    merged = MergedLinear([layer])
    merged.refresh()
    x = torch.randn(4, 6)
    assert torch.equal(merged(x), layer(x))


def test_a_compiler_that_refuses_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled.__wrapped__("-no-such-option") is None
