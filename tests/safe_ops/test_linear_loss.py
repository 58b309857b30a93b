"""Against ``linear_log_probs`` and its backward, and against float64."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from safe_ops import _linear_blocks as blocks
from safe_ops import linear_log_probs, linear_loss, set_compile_backend
from safe_ops import linear_loss as op
from tests.safe_ops.test_linear_log_probs import inputs, naive

ADVANTAGE = torch.sin(torch.arange(400.0))


def token_loss(log_prob: Tensor, entropy: Tensor, index: Tensor) -> Tensor:
    ratio = (log_prob - log_prob.detach() + 0.1 * ADVANTAGE[index]).exp()
    return -ADVANTAGE[index] * ratio - 0.01 * entropy


def problem(dtype: torch.dtype, *, N: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    x = inputs("random", N=N)
    return (
        x["hidden"].to(dtype).requires_grad_(),
        x["weight"].to(dtype).requires_grad_(),
        x["tokens"],
    )


@pytest.mark.parametrize(("rows", "kept"), [(16, 0), (32, 0), (16, 1536)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_value_and_gradients_are_those_of_linear_log_probs(
    dtype: torch.dtype, masked: bool, rows: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several chunks. No logits are kept, but those of one block; or those of 3 blocks of the first
    # 32 rows, 4 more in the gradient's memory, and 6 of the 7 blocks of later chunks (4 of them in
    # half precision).
    kept_bytes = kept * dtype.itemsize
    monkeypatch.setattr(blocks, "CPU_ROOM", blocks.CPU_ROOM._replace(kept_bytes=kept_bytes))
    monkeypatch.setitem(op.__globals__, "FEWEST_ROWS", rows)
    hidden, weight, tokens = problem(dtype)
    mask = torch.arange(40) % 3 > 0 if masked else torch.ones(40).bool()
    found = linear_loss(
        hidden, weight, tokens, token_loss, mask=mask if masked else None, temperature=0.7,
        block_size=16,
    )  # fmt: skip
    results = linear_log_probs(
        hidden, weight, tokens, mask=mask, temperature=0.7, block_size=16
    )  # fmt: skip
    expected = torch.where(mask, token_loss(*results, torch.arange(40)), 0.0).sum()
    torch.testing.assert_close(found, expected)
    ours = torch.autograd.grad(3 * found, (hidden, weight))
    theirs = torch.autograd.grad(3 * expected, (hidden, weight))
    for a, b in zip(ours, theirs, strict=True):
        # In bfloat16 the weight's gradient is rounded, by 2^-9 of it, after each of 3 chunks here
        # and once there; 2^-8 each leaves room for the rounded slopes.
        atol = 3 * 2**-8 * b.abs().max().item() if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("backend", [None, "inductor"])
def test_gradients_against_float64(backend: str | None) -> None:
    set_compile_backend(backend)
    hidden, weight, tokens = problem(torch.float32)
    loss = linear_loss(hidden, weight, tokens, token_loss, block_size=16)
    y = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    truth = token_loss(*naive(*y, tokens, 0.0), torch.arange(40)).sum()
    torch.testing.assert_close(loss, truth.float())
    for a, b in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(truth, y), strict=True
    ):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-6)


def test_the_first_chunk_lies_in_the_gradient_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # 3 of its 7 blocks apart; where H * block numbers alone had to do, it would have 16 rows.
    monkeypatch.setattr(blocks, "CPU_ROOM", blocks.CPU_ROOM._replace(kept_bytes=1536 * 4))
    monkeypatch.setitem(op.__globals__, "FEWEST_ROWS", 16)
    hidden, weight, tokens = problem(torch.float32)
    sizes = []

    def counted(log_prob: Tensor, entropy: Tensor, index: Tensor) -> Tensor:
        sizes.append(len(index))
        return token_loss(log_prob, entropy, index)

    linear_loss(hidden, weight, tokens, counted, block_size=16)
    assert sizes == [32, 8]


def test_each_token_is_seen_once() -> None:
    hidden, weight, tokens = problem(torch.float32, N=400)
    mask = torch.arange(400).reshape(20, 20) % 3 > 0
    seen = []

    def count(log_prob: Tensor, entropy: Tensor, index: Tensor) -> Tensor:
        assert log_prob.shape == entropy.shape == index.shape
        seen.append(index)
        return log_prob

    linear_loss(hidden.reshape(20, 20, -1), weight, tokens.reshape(20, 20), count, mask=mask)
    assert torch.equal(torch.cat(seen), mask.flatten().nonzero().squeeze(1))


def test_no_gradient_and_frozen_head() -> None:
    hidden, weight, tokens = problem(torch.float32)
    expected = linear_loss(hidden, weight, tokens, token_loss)
    with torch.no_grad():
        value = linear_loss(hidden, weight, tokens, token_loss)
    assert not value.requires_grad
    assert torch.equal(value, expected.detach())
    frozen = linear_loss(hidden, weight.detach(), tokens, token_loss)
    slopes = [torch.autograd.grad(loss, hidden)[0] for loss in (frozen, expected)]
    assert torch.equal(*slopes)


def test_every_token_masked() -> None:
    hidden, weight, tokens = problem(torch.float32)
    never = torch.zeros(40, dtype=torch.bool)
    loss = linear_loss(hidden, weight, tokens, token_loss, mask=never)
    assert not any(x.any() for x in (loss, *torch.autograd.grad(loss, (hidden, weight))))


def test_autocast_and_checkpointing() -> None:
    hidden, weight, tokens = problem(torch.float32)
    plain = torch.autograd.grad(linear_loss(hidden, weight, tokens, token_loss), (hidden, weight))

    def in_float32(log_prob: Tensor, entropy: Tensor, index: Tensor) -> Tensor:
        assert not torch.is_autocast_enabled("cpu")
        return token_loss(log_prob, entropy, index)

    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_loss(hidden, weight, tokens, in_float32)
    again = torch.utils.checkpoint.checkpoint(
        linear_loss, hidden, weight, tokens, token_loss, use_reentrant=False
    )
    for found in (loss, again):
        assert found.dtype == torch.float32
        for a, b in zip(torch.autograd.grad(found, (hidden, weight)), plain, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("N", [0, 1])
def test_weird_shapes(N: int) -> None:
    hidden, weight, tokens = problem(torch.float32, N=N)
    loss = linear_loss(hidden, weight, tokens, token_loss)
    slopes = torch.autograd.grad(loss, (hidden, weight))
    assert loss.shape == ()
    assert bool(slopes[1].any()) == (N > 0)


def test_a_second_backward_is_refused() -> None:
    hidden, weight, tokens = problem(torch.float32)
    loss = linear_loss(hidden, weight, tokens, token_loss)
    torch.autograd.grad(loss, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="gives its gradients out once"):
        torch.autograd.grad(loss, hidden)


H, W, IDS = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.int64)
ERRORS = {
    "width": ((H, W[:, :3], IDS, token_loss), ["hidden", "weight", "(2, 3, 4)", "(5, 3)"]),
    "tokens": ((H, W, IDS[:1], token_loss), ["tokens", "(1, 3)", "(2, 3, 4)"]),
    "range": ((H, W, IDS + 5, token_loss), ["tokens must be in [0, V)", "got 5"]),
    "sum": ((H, W, IDS, lambda log_prob, entropy, index: log_prob.sum()),
            ["token_loss must return one loss for each token", "()", "(6,)"]),
    "constant": ((H, W, IDS, lambda log_prob, entropy, index: ADVANTAGE[index]),
                 ["token_loss must depend on log_prob or entropy"]),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name: str) -> None:
    arguments, said = ERRORS[name]
    with pytest.raises(ValueError, match=re.escape(said[0])) as caught:
        linear_loss(*arguments)
    assert all(part in str(caught.value) for part in said), str(caught.value)


def test_half_precision_leaves_room_for_the_sums_of_a_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    room = blocks.CPU_ROOM._replace(kept_bytes=160 * 2 * (1024 + 2 * 64))
    monkeypatch.setattr(blocks, "CPU_ROOM", room)
    logits = blocks.Tile.logits
    tiles: dict[int, int] = {}
    sums: list[int] = []

    def recorded(tile: blocks.Tile, *arguments: Any) -> Tensor:
        z = logits(tile, *arguments)
        tiles[z.data_ptr()] = tile.nbytes
        sums.append(4 * z.numel())
        return z

    monkeypatch.setattr(blocks.Tile, "logits", recorded)
    hidden = torch.randn(300, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1024, 8, dtype=torch.bfloat16)
    tokens = torch.arange(300)
    linear_loss(hidden, weight, tokens, lambda log_prob, entropy, index: log_prob, block_size=64)
    assert len(tiles) == 16
    assert sum(tiles.values()) + max(sums) <= room.kept_bytes
