"""The ops on a GPU: the numbers of a CPU in float64, and no wait."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from safe_ops import (
    _linear_blocks as blocks,
)
from safe_ops import (
    generalized_advantage_estimate,
    linear_kl,
    linear_log_probs,
    linear_loss,
    set_compile_backend,
)
from safe_ops.compilation import has_kernels
from tests.safe_ops.test_linear_log_probs import check_errors

N, H, V = 300, 64, 20_011
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
Results = list[Tensor]


def log_probs(hidden: Tensor, weight: Tensor, tokens: Tensor, mask: Tensor | None) -> Results:
    results = linear_log_probs(hidden, weight, tokens, mask=mask, temperature=0.7)
    loss = (results.log_prob - 0.1 * results.entropy).sum()
    return [*results, *torch.autograd.grad(loss, (hidden, weight))]


def kl(hidden: Tensor, weight: Tensor, tokens: Tensor, mask: Tensor | None) -> Results:
    ref_hidden = hidden.detach().flip(0).requires_grad_()
    found = linear_kl(hidden, weight, ref_hidden, weight.detach(), mask=mask, temperature=0.7)
    slopes = torch.sin(torch.arange(N, device=hidden.device))
    return [found, *torch.autograd.grad(found @ slopes.to(found), (hidden, weight, ref_hidden))]


def loss(hidden: Tensor, weight: Tensor, tokens: Tensor, mask: Tensor | None) -> Results:
    def token_loss(log_prob: Tensor, entropy: Tensor, index: Tensor) -> Tensor:
        return torch.sin(index.to(log_prob)) * log_prob - 0.1 * entropy

    found = linear_loss(hidden, weight, tokens, token_loss, mask=mask, temperature=0.7)
    return [found, *torch.autograd.grad(2 * found, (hidden, weight))]


CALLS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor | None], Results]] = {
    "log_probs": log_probs,
    "kl": kl,
    "loss": loss,
}


def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, H), torch.randn(V, H) * H**-0.5
    tokens = torch.randint(V, (N,))
    x, w = (t.to(device, dtype).requires_grad_() for t in (hidden, weight))
    return x, w, tokens.to(device)


@pytest.mark.parametrize("kind", ["random", "peaked", "flat", "banned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_those_of_the_naive_op(gpu: torch.device, kind: str, dtype: torch.dtype) -> None:
    check_errors(kind, dtype, device=gpu)
    check_errors(kind, dtype, device=gpu, V=5003, N=65)


@pytest.mark.parametrize("small", [False, True], ids=["one chunk", "many chunks"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CALLS)
def test_equals_float64(
    gpu: torch.device,
    name: str,
    dtype: torch.dtype,
    masked: bool,
    small: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if small:
        few = blocks.GPU_ROOM._replace(tile_bytes=2**21, kept_bytes=2**21)
        monkeypatch.setattr(blocks, "GPU_ROOM", few)
    x = inputs(gpu, dtype)
    mask = (torch.arange(N, device=gpu) % 3 > 0) if masked else None
    y = [t.detach().cpu() for t in x]
    y[:2] = [t.double().requires_grad_() for t in y[:2]]
    found = CALLS[name](*x, mask)
    truth = CALLS[name](*y, None if mask is None else mask.cpu())
    for a, b in zip(found, truth, strict=True):
        assert (a.cpu().double() - b).norm() <= TOLERANCE[dtype] * b.norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CALLS)
def test_does_not_wait(gpu: torch.device, name: str, dtype: torch.dtype, no_waits) -> None:
    x = inputs(gpu, dtype)
    CALLS[name](*x, None)
    with no_waits():
        CALLS[name](*x, None)


@pytest.mark.parametrize("name", CALLS)
def test_no_tokens_and_no_token_that_counts(gpu: torch.device, name: str) -> None:
    hidden, weight, tokens = inputs(gpu, torch.float32)
    for result in CALLS[name](hidden, weight, tokens, torch.zeros(N, device=gpu).bool()):
        assert not result.any()
    empty = linear_log_probs(hidden[:0], weight, tokens[:0])
    assert empty.log_prob.shape == (0,)


def test_the_kernels_run_and_can_be_switched_off(gpu: torch.device) -> None:
    x = torch.ones(1, device=gpu)
    assert has_kernels(x)
    set_compile_backend(None)
    assert not has_kernels(x)


@pytest.mark.parametrize("name", ["log_probs", "loss"])
def test_inputs_with_gaps(gpu: torch.device, name: str) -> None:
    rows = 64
    hidden, weight, tokens = (t.detach() for t in inputs(gpu, torch.bfloat16))
    hidden, tokens = hidden[:rows], tokens[:rows]
    expected = CALLS[name](hidden.requires_grad_(), weight.requires_grad_(), tokens, None)
    apart = [
        torch.stack([hidden.detach(), hidden.detach() + 1], 1)[:, 0].requires_grad_(),
        weight.detach().t().contiguous().t().requires_grad_(),
        torch.stack([tokens, tokens * 0], 1)[:, 0],
    ]
    assert not any(x.is_contiguous() for x in apart)
    for a, b in zip(CALLS[name](*apart, None), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
    if name == "log_probs":
        bias = torch.randn(V, 2, device=gpu)
        found = linear_log_probs(hidden, weight, tokens, bias=bias[:, 0])
        for a, b in zip(
            found, linear_log_probs(hidden, weight, tokens, bias=bias[:, 0].clone()), strict=True
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_logit_that_is_nan_shows(gpu: torch.device, dtype: torch.dtype) -> None:
    hidden, weight, tokens = inputs(gpu, dtype)
    with torch.no_grad():
        weight[7] = torch.nan
    results = linear_log_probs(hidden, weight, tokens.clamp_min(8))
    assert results.log_prob.isnan().all()
    assert results.entropy.isnan().all()


@pytest.mark.parametrize("name", ["log_probs", "loss"])
def test_peak_memory_does_not_grow_with_the_tokens(gpu: torch.device, name: str) -> None:
    peaks = []
    for tokens in (2**13, 2**15):
        hidden = torch.randn(tokens, 256, device=gpu).bfloat16().requires_grad_()
        weight = torch.randn(32_768, 256, device=gpu).bfloat16().requires_grad_()
        ids = torch.randint(32_768, (tokens,), device=gpu)
        CALLS[name](hidden, weight, ids, None)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        CALLS[name](hidden, weight, ids, None)
        returned = hidden.nbytes + weight.nbytes
        peaks.append((torch.cuda.max_memory_allocated() - before - returned) / 2**20)
    # One tile of slopes in bfloat16 is 256 MiB; hidden states of a chunk, results a token.
    assert peaks[1] < 1.1 * peaks[0] < 320


def test_a_token_out_of_range_ends_the_process_with_its_reason(gpu: torch.device) -> None:
    code = (
        "import torch; from safe_ops import linear_log_probs\n"
        "x = torch.zeros(4, 8, device='cuda')\n"
        "linear_log_probs(x, x, torch.tensor([0, 1, 2, 4], device='cuda'))\n"
        "torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "tokens must be in [0, 4)" in done.stdout + done.stderr


@pytest.mark.parametrize("shape", [(5, 1), (7, 300), (64, 1024), (3, 5000)])
@pytest.mark.parametrize("cuts", [False, True])
def test_advantages_equal_a_cpus_and_do_not_wait(
    gpu: torch.device, shape: tuple[int, int], cuts: bool, no_waits
) -> None:
    torch.manual_seed(0)
    reward, value = torch.randn(shape), torch.randn(shape)
    arguments = {
        "mask": torch.rand(shape) > 0.2,
        "terminated": torch.rand(shape) > 0.9,
        "truncated": torch.rand(shape) > 0.9 if cuts else None,
        "bootstrap_value": torch.randn(shape[0]),
    }
    expected = generalized_advantage_estimate(reward, value, **arguments, discount=0.99)
    there = {k: v if v is None else v.to(gpu) for k, v in arguments.items()}
    reward, value = reward.to(gpu), value.to(gpu)
    generalized_advantage_estimate(reward, value, **there, discount=0.99)
    with no_waits():
        found = generalized_advantage_estimate(reward, value, **there, discount=0.99)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5)
