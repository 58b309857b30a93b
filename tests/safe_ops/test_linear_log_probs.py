"""Against logits written out in float64."""

import gc
import math
import re
from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from safe_ops import (
    TokenLogProbs,
    _linear_rows,
    linear_log_probs,
    set_compile_backend,
    token_log_probs,
)
from safe_ops import _linear_blocks as blocks
from tests.strategies import PROPERTY, bool_tensors, log_uniform, tensors

BLOCK = 16
"""A few blocks and a short one, for every vocabulary below."""


def naive(
    hidden: Tensor, weight: Tensor, tokens: Tensor, bias: Tensor | float, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    log_p = ((hidden.double() @ weight.double().t() + bias) / temperature).log_softmax(-1)
    finite = torch.where(log_p == -torch.inf, 0.0, log_p)
    chosen = log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return chosen, -(log_p.exp() * finite).sum(-1)


def inputs(kind: str, *, V: int = 101, N: int = 40, H: int = 24) -> dict[str, Tensor]:
    """The four kinds of logits that a head may give."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(N, H), torch.randn(V, H) * H**-0.5, torch.randn(V)
    tokens = torch.randint(2, V, (N,))
    if kind == "flat":
        hidden, bias = hidden * 1e-4, torch.zeros(V)
    if kind == "peaked":
        bias[tokens[0]] = 80.0
    if kind == "banned":
        # The whole first block too.
        bias[: BLOCK + 1] = -torch.inf
        tokens.clamp_min_(BLOCK + 1)
    return {"hidden": hidden, "weight": weight, "tokens": tokens, "bias": bias}


def gradients(results: tuple[Tensor, Tensor], x: dict[str, Tensor]) -> list[Tensor]:
    n = results[0].numel()
    slopes = torch.sin(torch.arange(2.0 * n)).reshape(2, *results[0].shape).to(results[0].device)
    loss = (results[0] * slopes[0] + results[1] * slopes[1]).sum()
    return list(torch.autograd.grad(loss, [x["hidden"], x["weight"], x["bias"]]))


def leaves(x: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: t.to(dtype).requires_grad_() if t.is_floating_point() else t for name, t in x.items()
    }


def worst(found: Tensor, truth: Tensor) -> float:
    assert found.isfinite().all()
    return (found.double() - truth.double()).abs().max().item()


def check_errors(
    kind: str, dtype: torch.dtype, *, device: torch.device | str = "cpu", **keywords: int
) -> None:
    """Ours is no further from the truth than naive arithmetic on the same inputs."""
    x = leaves({k: t.to(device) for k, t in inputs(kind, **keywords).items()}, dtype)
    y = {name: t.detach().double().requires_grad_() if t.is_floating_point() else t
         for name, t in x.items()}  # fmt: skip
    truth = naive(**y)
    true_slopes = gradients(truth, y)
    plain = token_log_probs(x["hidden"] @ x["weight"].t() + x["bias"], x["tokens"])
    plain_slopes = gradients(plain, x)
    ours = linear_log_probs(**x, block_size=BLOCK)
    our_slopes = gradients(ours, x)
    assert (ours.log_prob <= 0).all()
    # Two units in the last place of what is compared, where naive happens to be exact.
    for o, p, t in zip((*ours, *our_slopes), (*plain, *plain_slopes), (*truth, *true_slopes),
                       strict=True):  # fmt: skip
        unit = torch.finfo(o.dtype).eps * t.abs().max().item()
        assert worst(o, t) <= 1.5 * worst(p, t) + 2 * unit


@pytest.mark.parametrize("kind", ["random", "peaked", "flat", "banned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_those_of_the_naive_op(kind: str, dtype: torch.dtype) -> None:
    check_errors(kind, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "peaked", "flat", "banned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_with_compiled_bodies(kind: str, dtype: torch.dtype) -> None:
    check_errors(kind, dtype)
    check_errors(kind, dtype, V=5003, N=65)


@PROPERTY
@given(
    tensors(2, 3, 4, low=-3, high=3),
    tensors(7, 4, low=-3, high=3),
    st.lists(st.integers(0, 6), min_size=6, max_size=6),
    bool_tensors(2, 3),
    log_uniform(0.1, 10),
    st.integers(1, 9),
)
def test_results_do_not_depend_on_blocks(
    hidden: Tensor, weight: Tensor, ids: list[int], mask: Tensor, temperature: float, size: int
) -> None:
    tokens = torch.tensor(ids).reshape(2, 3)
    found = linear_log_probs(
        hidden, weight, tokens, mask=mask, temperature=temperature, block_size=size
    )
    truth = naive(hidden, weight, tokens, 0.0, temperature)
    for x, t in zip(found, truth, strict=True):
        torch.testing.assert_close(x, torch.where(mask, t, 0.0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradcheck(masked: bool, temperature: float) -> None:
    x = leaves(inputs("random", V=11, N=6, H=3), torch.float64)
    mask = torch.tensor([True, False, True, True, False, True]) if masked else None

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear_log_probs(hidden, weight, x["tokens"], bias=bias, mask=mask,
                                      temperature=temperature, block_size=4))  # fmt: skip

    assert torch.autograd.gradcheck(call, (x["hidden"], x["weight"], x["bias"]))


def test_opcheck() -> None:
    x = leaves(inputs("random", V=11, N=6, H=3), torch.float32)
    mask = torch.arange(6) % 2 == 0
    for given_mask in (None, mask):
        torch.library.opcheck(
            torch.ops.safe_ops.linear_log_probs.default,
            (x["hidden"], x["weight"], x["tokens"], x["bias"], given_mask, 0.7, 4),
        )


def test_a_masked_row_is_not_read() -> None:
    x = leaves(inputs("random"), torch.float32)
    mask = torch.arange(40) % 3 > 0
    dirty = x["hidden"].detach().clone()
    dirty[~mask] = torch.nan
    dirty.requires_grad_()
    tokens = x["tokens"].masked_fill(~mask, -100)
    found = linear_log_probs(dirty, x["weight"], tokens, bias=x["bias"], mask=mask)
    slopes = gradients(found, {**x, "hidden": dirty})
    assert all(t.isfinite().all() for t in (*found, *slopes))
    assert (found.log_prob[~mask] == 0).all()
    assert (slopes[0][~mask] == 0).all()
    clean = linear_log_probs(**x)
    torch.testing.assert_close(found.log_prob[mask], clean.log_prob[mask])


def rows_multiplied(call: Callable[[], object]) -> int:
    """Rows of the results, summed over all products."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as profile:
        call()
    products = {"aten::mm": 0, "aten::addmm_": 1}
    return sum(
        event.input_shapes[products[event.name]][0]
        for event in profile.events()
        if event.name in products
    )


def test_a_masked_row_and_a_frozen_head_cost_no_product() -> None:
    x = leaves(inputs("random", N=64), torch.float32)
    half = torch.arange(64) < 32
    with torch.no_grad():
        all_rows = rows_multiplied(lambda: linear_log_probs(**x))
        assert rows_multiplied(lambda: linear_log_probs(**x, mask=half)) * 2 == all_rows == 64
    frozen = {**x, "weight": x["weight"].detach(), "bias": x["bias"].detach()}
    loss = linear_log_probs(**frozen).log_prob.sum()
    # The logits and the gradient of hidden: no product of V rows.
    assert rows_multiplied(lambda: torch.autograd.grad(loss, x["hidden"])) == 2 * 64


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes of tensors at one time, beyond those that there were before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        kept = call()
    results = profile.profiler.kineto_results if profile.profiler else None
    assert results is not None
    events = [event for event in results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    del kept
    return max(accumulate(event.nbytes() for event in events))


def test_nothing_of_the_width_of_hidden_beside_the_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Two chunks of 64 rows.
    monkeypatch.setattr(blocks, "CPU_ROOM", blocks.CPU_ROOM._replace(tile_bytes=64 * 4 * 128))
    beside = []
    for H in (64, 128):
        x = leaves(inputs("random", N=128, H=H), torch.float32)

        def both(x: dict[str, Tensor] = x) -> list[Tensor]:
            return gradients(linear_log_probs(**x, block_size=128), x)

        both()
        beside.append(peak_bytes(both) - x["hidden"].nbytes - x["weight"].nbytes)
    assert beside[0] == beside[1]


def test_many_chunks_need_no_graph_that_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(_linear_rows, "_kernels", lambda *_: None)
    for name in ("absorb_block", "slopes_of_block"):
        body = torch.compile(getattr(_linear_rows, name).__wrapped__, backend=count, dynamic=True)
        monkeypatch.setattr(_linear_rows, name, body)
    monkeypatch.setattr(blocks, "CPU_ROOM", blocks.CPU_ROOM._replace(tile_bytes=64 * 4 * 48))
    found = []
    for N in (64, 128, 256):
        x = leaves(inputs("random", N=N), torch.float32)
        gradients(linear_log_probs(**x, block_size=48), x)
        found.append(len(graphs))
    # Of each body one for rows that lie together and one for those of a shorter block.
    assert found == [4, 4, 4]


def bitwise(a: TokenLogProbs, b: TokenLogProbs) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def check_bits() -> None:
    torch.manual_seed(0)
    B, T, H, V = 12, 16, 96, 9001
    hidden, weight = torch.randn(B, T, H), torch.randn(V, H)
    tokens = torch.randint(V, (B, T))
    full = linear_log_probs(hidden, weight, tokens)
    for turn in range(6):
        order = torch.randperm(B)
        mask = torch.rand(B, T) < (turn + 1) / 6
        mask[0, 0] = True
        for piece in order.split([5, 4, 3] if turn % 2 else [B]):
            found = linear_log_probs(hidden[piece], weight, tokens[piece], mask=mask[piece])
            kept = mask[piece]
            expected = TokenLogProbs(*(x[piece][kept] for x in full))
            assert bitwise(TokenLogProbs(*(x[kept] for x in found)), expected)
    # One token alone, and a batch that needs several chunks.
    alone = linear_log_probs(hidden[3, 5], weight, tokens[3, 5])
    assert bitwise(alone, TokenLogProbs(*(x[3, 5] for x in full)))
    many = linear_log_probs(hidden.repeat(8, 1, 1), weight, tokens.repeat(8, 1))
    assert bitwise(many, TokenLogProbs(*(x.repeat(8, 1) for x in full)))


def test_bits_do_not_depend_on_place_or_mask() -> None:
    check_bits()


@pytest.mark.slow
def test_bits_do_not_depend_on_place_or_mask_with_compiled_bodies() -> None:
    check_bits()


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1,), (3, 5, 7)])
def test_weird_shapes(shape: tuple[int, ...]) -> None:
    hidden = torch.ones(*shape, 3, requires_grad=True)
    weight = torch.zeros(11, 3, requires_grad=True)
    found = linear_log_probs(hidden, weight, torch.zeros(shape, dtype=torch.int64), block_size=4)
    assert found.log_prob.shape == found.entropy.shape == shape
    torch.testing.assert_close(found.entropy, torch.full(shape, math.log(11.0)))
    slopes = torch.autograd.grad(found.log_prob.sum(), (hidden, weight))
    assert [s.shape for s in slopes] == [hidden.shape, weight.shape]
    expected = torch.full((11, 3), -hidden[..., 0].numel() / 11)
    expected[0] += hidden[..., 0].numel()
    torch.testing.assert_close(slopes[1], expected)


def test_every_token_masked() -> None:
    x = leaves(inputs("random"), torch.float32)
    found = linear_log_probs(**x, mask=torch.zeros(40).bool())
    assert not any(t.any() for t in (*found, *gradients(found, x)))


@pytest.mark.parametrize("backend", [None, "inductor"])
@pytest.mark.parametrize("N", [5, 40])
def test_a_bias_whose_exponential_is_infinite(backend: str | None, N: int) -> None:
    """Rows that fill up a chunk have it as their logit, and no gradient."""
    set_compile_backend(backend)
    x = inputs("peaked", N=N)
    x["bias"] *= 2
    x = leaves(x, torch.float32)
    y = {name: t.detach().double() if t.is_floating_point() else t for name, t in x.items()}
    y = leaves(y, torch.float64)
    found = linear_log_probs(**x, temperature=0.7, block_size=BLOCK)
    truth = naive(y["hidden"] / 0.7, y["weight"], y["tokens"], y["bias"] / 0.7)
    for a, b in zip(gradients(found, x), gradients(truth, y), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-4)


def test_entropy_of_large_logits() -> None:
    # Rounding at 1000 is in the logits; what is compared comes from the same ones.
    x = inputs("random")
    x["bias"] = x["bias"] + 1000
    found = linear_log_probs(**x, block_size=BLOCK)
    rounded = (x["hidden"] @ x["weight"].t() + x["bias"]).double()
    truth = naive(rounded, torch.eye(101), x["tokens"], 0.0)
    for f, t in zip(found, truth, strict=True):
        assert worst(f, t) < 5e-4
    exact = linear_log_probs(
        torch.zeros(1, 1), torch.zeros(4, 1), torch.tensor([1]),
        bias=torch.tensor([1.0, 0.5, -0.25, -2.0]) + 1000,
    )  # fmt: skip
    truth = naive(torch.zeros(1, 1), torch.zeros(4, 1), torch.tensor([1]),
                  torch.tensor([1.0, 0.5, -0.25, -2.0]))  # fmt: skip
    assert worst(exact.entropy, truth[1]) < 1e-6


def test_float32_hidden_makes_exact_products_of_a_bfloat16_head() -> None:
    x = inputs("random")
    weight = x["weight"].bfloat16()
    found = linear_log_probs(x["hidden"], weight, x["tokens"])
    truth = naive(x["hidden"], weight, x["tokens"], 0.0)
    for f, t in zip(found, truth, strict=True):
        assert worst(f, t) < 2e-6


def test_adapted_and_tied_head() -> None:
    torch.manual_seed(0)
    ids, tokens = torch.randint(20, (2, 16)), torch.randint(20, (2, 16))
    embed, A, B = (torch.randn(*s, requires_grad=True) for s in ((20, 8), (2, 8), (20, 2)))
    hidden = embed[ids].tanh()
    found = linear_log_probs(
        torch.cat([hidden, 0.5 * hidden @ A.t()], -1), torch.cat([embed, B], 1), tokens
    )
    plain = token_log_probs(hidden @ (embed + 0.5 * B @ A).t(), tokens)
    for f, p in zip(found, plain, strict=True):
        torch.testing.assert_close(f, p)
    ours, theirs = (
        torch.autograd.grad(r.log_prob.sum() + r.entropy.sum(), (embed, A, B), retain_graph=True)
        for r in (found, plain)
    )
    for f, p in zip(ours, theirs, strict=True):
        torch.testing.assert_close(f, p, rtol=1e-4, atol=1e-5)


def test_autocast_and_checkpointing() -> None:
    x = leaves(inputs("random"), torch.float32)
    plain = gradients(linear_log_probs(**x), x)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_log_probs(**x)
        assert found.log_prob.dtype == torch.float32
        for a, b in zip(gradients(found, x), plain, strict=True):
            assert torch.equal(a, b)
    again = torch.utils.checkpoint.checkpoint(
        lambda hidden: linear_log_probs(
            hidden, x["weight"], x["tokens"], bias=x["bias"]
        ),
        x["hidden"],
        use_reentrant=False,
    )  # fmt: skip
    for a, b in zip(gradients(again, x), plain, strict=True):
        assert torch.equal(a, b)


def test_compiles_with_changing_shapes() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    step = torch.compile(linear_log_probs, fullgraph=True, dynamic=True, backend=count)
    torch.manual_seed(0)
    weight = torch.randn(11, 4)
    for B, T in ((2, 3), (4, 5), (3, 9)):
        hidden, tokens = torch.randn(B, T, 4), torch.randint(11, (B, T))
        mask = torch.rand(B, T) < 0.5
        found = step(hidden, weight, tokens, mask=mask)
        assert bitwise(found, linear_log_probs(hidden, weight, tokens, mask=mask))
    assert len(graphs) == 1
    torch.compiler.reset()


def test_a_second_derivative_is_refused() -> None:
    x = leaves(inputs("random"), torch.float32)
    (slope,) = torch.autograd.grad(
        linear_log_probs(**x).log_prob.sum(), x["hidden"], create_graph=True
    )
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(slope.sum(), x["hidden"])


class Head(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())

    def forward(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        log_prob, entropy = linear_log_probs(hidden, self.weight, tokens)
        return (log_prob + 0.1 * entropy).mean()


def ddp_worker(rank: int, rendezvous: str, results: str) -> None:
    set_compile_backend(None)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    x = inputs("random")
    head = nn.parallel.DistributedDataParallel(Head(x["weight"]))
    half = slice(20 * rank, 20 * (rank + 1))
    head(x["hidden"][half], x["tokens"][half]).backward()
    torch.save(head.module.weight.grad, f"{results}{rank}")
    # The module keeps the group in cycles of references; its threads must end before the process.
    dist.barrier()
    del head
    gc.collect()
    dist.destroy_process_group()


@pytest.mark.slow
def test_gradients_of_two_ranks_are_those_of_the_whole_batch(tmp_path) -> None:
    found = str(tmp_path / "grad")
    torch.multiprocessing.spawn(ddp_worker, (str(tmp_path / "meet"), found), nprocs=2)
    x = inputs("random")
    head = Head(x["weight"])
    head(x["hidden"], x["tokens"]).backward()
    for rank in range(2):
        torch.testing.assert_close(torch.load(f"{found}{rank}"), head.weight.grad)


H, W, IDS = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.int64)
ERRORS: dict[str, tuple[tuple[Tensor, Tensor, Tensor], dict[str, object], list[str]]] = {
    "integer-hidden": ((IDS, W, IDS), {}, ["hidden must be floating", "int64"]),
    "integer-weight": ((H, W.long(), IDS), {}, ["weight must be floating", "int64"]),
    "width": ((H, W[:, :3], IDS), {}, ["hidden", "weight", "(2, 3, 4)", "(5, 3)"]),
    "vocabulary": ((H, W[:0], IDS), {}, ["weight must have a vocabulary", "(0, 4)"]),
    "float-tokens": ((H, W, H[..., 0]), {}, ["tokens must be int64", "float32"]),
    "token-device": ((H, W, IDS.to("meta")), {}, ["tokens must be where hidden is", "meta", "cpu"]),
    "token-shape": ((H, W, IDS[:1]), {}, ["tokens", "(1, 3)", "(2, 3, 4)"]),
    "high-token": ((H, W, IDS + 5), {}, ["tokens must be in [0, V)", "V = 5", "got 5"]),
    "low-token": ((H, W, IDS - 1), {}, ["tokens must be in [0, V)", "got -1"]),
    "bias": ((H, W, IDS), {"bias": torch.zeros(4)}, ["bias", "(4,)", "(5, 4)"]),
    "mask": ((H, W, IDS), {"mask": IDS}, ["mask must be bool", "int64"]),
    "mask-shape": ((H, W, IDS), {"mask": IDS[:1] == 0}, ["mask", "(1, 3)", "(2, 3, 4)"]),
    "temperature": ((H, W, IDS), {"temperature": 0.0}, ["temperature must be positive", "0.0"]),
    "block": ((H, W, IDS), {"block_size": 0}, ["block_size must be at least 1", "0"]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name: str) -> None:
    arguments, keywords, said = ERRORS[name]
    with pytest.raises(ValueError, match=re.escape(said[0])) as caught:
        linear_log_probs(*arguments, **keywords)
    assert all(part in str(caught.value) for part in said), str(caught.value)
