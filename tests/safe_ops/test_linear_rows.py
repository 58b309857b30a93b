"""The C functions on a block's logits against the bodies in float64, and where there are none."""

import mmap
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from safe_ops import _linear_blocks as blocks
from safe_ops import (
    _linear_rows,
    linear_kl,
    linear_log_probs,
    linear_loss,
    set_compile_backend,
)
from tests.strategies import PROPERTY

needs_compiler = pytest.mark.skipif(_linear_rows._library() is None, reason="no C compiler")


class Found(NamedTuple):
    """Of two models: sums and slopes by a policy loss, and those of the KL."""

    sums: Sequence[Tensor]
    logit: Tensor
    slopes: Tensor
    pair_sums: Sequence[Tensor]
    pair_slopes: tuple[Tensor, Tensor]


def all_of(z: Tensor, ref_z: Tensor, tokens: Tensor, scale: float, block: int) -> Found:
    """By the code for the dtype of z, a block of the vocabulary at a time."""
    by = blocks.number(scale, z.dtype, z.device)
    z, ref_z = z.clone(), ref_z.clone()
    sums: Sequence[Tensor] = blocks.sum_start(z, z.dtype)
    pair: Sequence[Tensor] = [*blocks.sum_start(z, z.dtype), *blocks.sum_start(z, z.dtype)[:2]]
    logit = torch.zeros_like(sums[0])
    parts = [slice(i, min(i + block, z.shape[1])) for i in range(0, z.shape[1], block)]
    for part in parts:
        sums, logit = _linear_rows.absorb(z[:, part], by, sums, tokens, part.start, logit)
        pair = _linear_rows.absorb_pair(z[:, part], ref_z[:, part], by, pair)
    shift, total, weighted, ref_shift, ref_total = pair
    kl = weighted / total - total.log() + ref_total.log()
    slopes = z.clone()
    ones = torch.ones_like(shift)
    of_row = (sums[0], sums[1].log(), -ones, ones / 2, 3 * ones)
    of_pair = (shift, total.log(), ref_shift, ref_total.log(), kl, ones)
    for part in parts:
        _linear_rows.turn_into_slopes(slopes[:, part], by, tokens, part.start, of_row)
        _linear_rows.turn_pair_into_slopes(z[:, part], ref_z[:, part], by, of_pair, ref_needed=True)
    return Found(sums, logit, slopes, pair, (z, ref_z))


def logits(rows: int, entries: int, seed: int, width: float = 8.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z, ref_z = (width * torch.randn(rows, entries, generator=generator) for _ in range(2))
    return z, ref_z, torch.randint(entries, (rows,), generator=generator)


def flat(found: Found) -> list[Tensor]:
    return [*found.sums, found.logit, found.slopes, *found.pair_sums, *found.pair_slopes]


@needs_compiler
@PROPERTY
@given(
    rows=st.integers(1, 5),
    entries=st.integers(1, 200),
    block=st.integers(1, 200),
    seed=st.integers(0, 9),
    scale=st.sampled_from([1.0, 0.7, 3.0]),
    banned=st.booleans(),
)
def test_equals_the_bodies_in_float64(
    rows: int, entries: int, block: int, seed: int, scale: float, banned: bool
) -> None:
    set_compile_backend("inductor")
    z, ref_z, tokens = logits(rows, entries, seed)
    if banned and entries > 1:
        other = (tokens + 1) % entries
        z.scatter_(1, other.unsqueeze(1), -torch.inf)
    found = flat(all_of(z, ref_z, tokens, scale, block))
    exact = flat(all_of(z.double(), ref_z.double(), tokens, scale, block))
    for x, y in zip(found, exact, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)


@pytest.fixture
def denormals() -> Iterator[None]:
    """Not flushed, by this thread: others keep what held when they were started."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)
    yield
    torch.set_num_threads(threads)


@needs_compiler
@pytest.mark.usefixtures("denormals")
def test_the_exponential_is_torchs_down_to_denormals() -> None:
    set_compile_backend("inductor")
    below = torch.cat([torch.linspace(-200, 0, 200_001), torch.tensor([-torch.inf])])
    p, zeros = below.unsqueeze(0).clone(), torch.zeros(1)
    rows = (zeros, zeros, zeros + 1, zeros, zeros + 1)
    one, elsewhere = torch.ones(()), torch.tensor([-1])
    _linear_rows.turn_into_slopes(p, one, elsewhere, 0, rows)
    exact = below.double().exp()
    eps, least = torch.finfo(torch.float32).eps, 2.0**-149
    assert ((p[0] - exact).abs() <= eps * exact + least).all()
    assert p[0, -1] == 0


@needs_compiler
def test_bits_depend_on_no_other_row_and_on_no_number_of_threads() -> None:
    set_compile_backend("inductor")
    z, ref_z, tokens = logits(64, 333, 0)
    whole, threads = flat(all_of(z, ref_z, tokens, 0.7, 100)), torch.get_num_threads()
    part = slice(7, 12)
    few = flat(all_of(z[part], ref_z[part], tokens[part], 0.7, 100))
    assert all(torch.equal(x, y[part]) for x, y in zip(few, whole, strict=True))
    try:
        torch.set_num_threads(threads + 1)
        again = flat(all_of(z, ref_z, tokens, 0.7, 100))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(again, whole, strict=True))


@needs_compiler
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_stays_so_in_its_row(bad: float) -> None:
    set_compile_backend("inductor")
    z, ref_z, tokens = logits(3, 50, 0)
    z[1, 20] = bad
    found = all_of(z, ref_z, tokens, 1.0, 50)
    for x in (found.sums[1], found.pair_sums[2], found.slopes[:, 21], found.pair_slopes[0][:, 21]):
        assert x.isfinite().tolist() == [True, False, True]


@needs_compiler
def test_what_only_the_reference_bans_makes_the_kl_infinite() -> None:
    set_compile_backend("inductor")
    torch.manual_seed(0)
    hidden, weight, ref_weight = torch.randn(4, 5), torch.randn(30, 5), torch.randn(30, 5)
    hidden[:, 0] = 1.0
    ref_weight[3, 0] = -torch.inf
    assert (linear_kl(hidden, weight, hidden, ref_weight) == torch.inf).all()
    weight[3, 0] = -torch.inf
    assert linear_kl(hidden, weight, hidden, ref_weight).isfinite().all()


def test_where_nothing_compiles_the_bodies_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    z, ref_z, tokens = logits(6, 100, 0)
    set_compile_backend("inductor")
    compiled = flat(all_of(z, ref_z, tokens, 0.7, 64))
    set_compile_backend(None)
    monkeypatch.setattr(_linear_rows, "_library", lambda: pytest.fail("must not be asked"))
    for x, y in zip(compiled, flat(all_of(z, ref_z, tokens, 0.7, 64)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2])
def test_takes_every_page_before_something_is_written_there(threads: int) -> None:
    set_compile_backend("inductor")
    pages, before = 500, torch.get_num_threads()
    memory = torch.frombuffer(mmap.mmap(-1, pages * mmap.PAGESIZE), dtype=torch.float32)
    faults = [page_faults()]
    try:
        torch.set_num_threads(threads)
        _linear_rows.take_pages(memory)
    finally:
        torch.set_num_threads(before)
    faults.append(page_faults())
    memory.fill_(1.0)
    faults.append(page_faults())
    assert faults[1] - faults[0] >= pages
    assert faults[2] - faults[1] < pages // 10


def page_faults() -> int:
    """Of this process, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


OPS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear_log_probs": lambda hidden, weight, tokens: linear_log_probs(hidden, weight, tokens)[0],
    "linear_kl": lambda hidden, weight, tokens: linear_kl(hidden, weight, hidden, weight.detach()),
    "linear_loss": lambda hidden, weight, tokens: linear_loss(
        hidden, weight, tokens, lambda log_prob, entropy, index: log_prob, block_size=64
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_no_product_is_the_first_to_write_into_the_gradient_of_a_weight(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[int, int]] = []
    for module in (_linear_rows, blocks, sys.modules["safe_ops.linear_loss"]):
        monkeypatch.setattr(
            module, "take_pages", lambda x: taken.append((x.data_ptr(), x.data_ptr() + x.nbytes))
        )
    hidden, weight = torch.randn(32, 8), torch.randn(1000, 8, requires_grad=True)
    result = OPS[name](hidden, weight, torch.arange(32)).sum()
    (grad,) = torch.autograd.grad(result, weight)
    place, end = grad.data_ptr(), grad.data_ptr() + grad.nbytes
    for start, stop in sorted(taken):
        if start <= place:
            place = max(place, stop)
    assert place >= end


def test_no_page_is_taken_that_the_fused_loss_does_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    room = blocks.CPU_ROOM._replace(kept_bytes=200 * 1024)
    monkeypatch.setattr(blocks, "CPU_ROOM", room)
    taken: list[Tensor] = []
    monkeypatch.setattr(sys.modules["safe_ops.linear_loss"], "take_pages", taken.append)
    hidden, weight = torch.randn(112, 200), torch.randn(1000, 200, requires_grad=True)
    OPS["linear_loss"](hidden, weight, torch.arange(112)).sum().backward()
    gradient, kept = taken
    assert gradient.shape == weight.shape
    # Room for 224 tokens: the logits of three blocks lie apart, the others where the gradient will.
    assert kept.numel() == 3 * 64 * 112
