"""Against the KL of logits written out in float64."""

import re

import pytest
import torch
from hypothesis import given
from torch import Tensor

from safe_ops import _linear_blocks as blocks
from safe_ops import kl_exact, linear_kl, set_compile_backend
from tests.strategies import PROPERTY, bool_tensors, log_uniform, tensors

BLOCK = 16


def naive(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, temperature: float = 1.0
) -> Tensor:
    log_p = (hidden.double() @ weight.double().t() / temperature).log_softmax(-1)
    log_q = (ref_hidden.double() @ ref_weight.double().t() / temperature).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def inputs(kind: str, *, V: int = 101, N: int = 40) -> list[Tensor]:
    """Policy and reference; the widths differ, as those of two models may."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, 24), torch.randn(V, 24) / 5
    ref_hidden, ref_weight = torch.randn(N, 10), torch.randn(V, 10) / 3
    if kind == "flat":
        hidden, ref_hidden = hidden * 1e-3, ref_hidden * 1e-3
    if kind == "peaked":
        hidden[:, 0], weight[:, 0] = 1.0, 0.0
        weight[17, 0] = 80.0
    return [hidden, weight, ref_hidden, ref_weight]


def gradients(kl: Tensor, x: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(kl @ torch.sin(torch.arange(len(kl)).to(kl.dtype)), x)


def check_errors(kind: str, dtype: torch.dtype, **keywords: int) -> None:
    x = [t.to(dtype).requires_grad_() for t in inputs(kind, **keywords)]
    y = [t.detach().double().requires_grad_() for t in x]
    truth = naive(*y)
    plain = kl_exact(x[0] @ x[1].t(), x[2] @ x[3].t())
    ours = linear_kl(*x, block_size=BLOCK)
    assert ours.dtype == torch.float32
    for o, p, t in zip(
        (ours, *gradients(ours, x)), (plain, *gradients(plain, x)), (truth, *gradients(truth, y)),
        strict=True,
    ):  # fmt: skip
        assert o.isfinite().all()
        unit = torch.finfo(o.dtype).eps * t.abs().max().item()
        # The largest of a thousand rounding errors differs by half between equals.
        assert (o - t).abs().max() <= 2 * (p - t).abs().max() + 4 * unit


@pytest.mark.parametrize("kind", ["random", "peaked", "flat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_those_of_the_naive_op(kind: str, dtype: torch.dtype) -> None:
    check_errors(kind, dtype)


@PROPERTY
@given(
    tensors(2, 3, low=-3, high=3), tensors(7, 3, low=-3, high=3), tensors(2, 2, low=-3, high=3),
    tensors(7, 2, low=-3, high=3), bool_tensors(2), log_uniform(0.1, 10),
)  # fmt: skip
def test_kl_in_blocks_is_the_kl(
    hidden: Tensor,
    weight: Tensor,
    ref: Tensor,
    ref_weight: Tensor,
    mask: Tensor,
    temperature: float,
) -> None:
    found = linear_kl(
        hidden, weight, ref, ref_weight, mask=mask, temperature=temperature, block_size=3
    )
    truth = naive(hidden, weight, ref, ref_weight, temperature)
    torch.testing.assert_close(found, torch.where(mask, truth, 0.0), rtol=1e-9, atol=1e-9)
    assert (found >= -1e-12).all()


def test_gradcheck() -> None:
    x = [t[:, :3].double().requires_grad_() for t in inputs("random", V=7, N=5)]
    mask = torch.tensor([True, False, True, True, False])
    assert torch.autograd.gradcheck(
        lambda *x: linear_kl(*x, mask=mask, temperature=0.7, block_size=4), x, atol=1e-6
    )


@pytest.mark.slow
def test_opcheck() -> None:
    x = [t.requires_grad_() for t in inputs("random", V=11, N=5)]
    torch.library.opcheck(torch.ops.safe_ops.linear_kl.default, (*x, None, 0.7, 4))


@pytest.mark.slow
def test_compiled_bodies_see_no_gradient_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    # Views of saved results: compiling one that requires a gradient warns, an error here.
    monkeypatch.setattr(blocks, "CPU_ROOM", blocks.CPU_ROOM._replace(tile_bytes=2048))
    torch.compiler.reset()
    check_errors("random", torch.float32)
    check_errors("random", torch.bfloat16)


def test_a_frozen_reference_gets_no_gradient() -> None:
    hidden, weight, ref_hidden, ref_weight = inputs("random")
    hidden.requires_grad_()
    kl = linear_kl(hidden, weight, ref_hidden, ref_weight)
    kl.sum().backward()
    again = hidden.detach().double().requires_grad_()
    naive(again, weight, ref_hidden, ref_weight).sum().backward()
    torch.testing.assert_close(hidden.grad, again.grad.float(), rtol=1e-4, atol=1e-5)
    assert weight.grad is ref_hidden.grad is ref_weight.grad is None


def test_equal_policies_far_from_zero() -> None:
    hidden, weight, *_ = inputs("random")
    kl = linear_kl(hidden * 100, weight, hidden * 100, weight, block_size=BLOCK)
    assert torch.equal(kl, torch.zeros(40))


@pytest.mark.parametrize("block", [1, 2, 4])
def test_banned_tokens(block: int) -> None:
    one = torch.ones(1, 1)
    both = torch.tensor([[0.0], [-torch.inf], [1.0], [2.0]])
    none = both.clone()
    none[1] = 0.5
    # Banned by both or by the policy: adds nothing. By the reference alone: infinite.
    for weight, ref_weight in ((both, both.flip(0)[[3, 1, 2, 0]]), (both, none), (none, both)):
        expected = kl_exact((one @ weight.t()).double(), (one @ ref_weight.t()).double())
        found = linear_kl(one, weight, one, ref_weight, block_size=block)
        torch.testing.assert_close(found, expected.float())


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (3, 5)])
def test_weird_shapes(shape: tuple[int, ...]) -> None:
    hidden, weight = torch.ones(*shape, 3, requires_grad=True), torch.zeros(11, 3)
    kl = linear_kl(hidden, weight, hidden.detach(), weight, block_size=4)
    assert torch.equal(kl, torch.zeros(shape))
    assert not torch.autograd.grad(kl.sum(), hidden)[0].any()


def test_every_token_masked() -> None:
    x = [t.requires_grad_() for t in inputs("random")]
    kl = linear_kl(*x, mask=torch.zeros(40).bool())
    assert not any(t.any() for t in (kl, *gradients(kl, x)))


def test_autocast_and_checkpointing() -> None:
    x = [t.requires_grad_() for t in inputs("random")]
    plain = gradients(linear_kl(*x), x)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_kl(*x)
    again = torch.utils.checkpoint.checkpoint(linear_kl, *x, use_reentrant=False)
    for kl in (found, again):
        assert kl.dtype == torch.float32
        assert all(torch.equal(a, b) for a, b in zip(gradients(kl, x), plain, strict=True))


H, W = torch.zeros(2, 3, 4), torch.zeros(5, 4)
ERRORS = {
    "integer": ((H.long(), W, H, W), {}, ["hidden must be floating", "int64"]),
    "ref-integer": ((H, W, H, W.long()), {}, ["ref_weight must be floating", "int64"]),
    "width": ((H, W[:, :3], H, W), {}, ["hidden", "(2, 3, 4)", "(5, 3)"]),
    "ref-width": ((H, W, H, W[:, :3]), {}, ["ref_hidden", "(2, 3, 4)", "(5, 3)"]),
    "rows": ((H, W, H[:1], W), {}, ["hidden and ref_hidden", "(2, 3, 4)", "(1, 3, 4)"]),
    "vocabulary": ((H, W, H, W[:4]), {}, ["weight and ref_weight", "(5, 4)", "(4, 4)"]),
    "mask": ((H, W, H, W), {"mask": H[..., 0]}, ["mask must be bool", "float32"]),
    "temperature": ((H, W, H, W), {"temperature": -1.0}, ["temperature must be positive", "-1.0"]),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_argument(name: str) -> None:
    arguments, keywords, said = ERRORS[name]
    with pytest.raises(ValueError, match=re.escape(said[0])) as caught:
        linear_kl(*arguments, **keywords)
    assert all(part in str(caught.value) for part in said), str(caught.value)


@pytest.mark.parametrize("backend", [None, "inductor"])
@pytest.mark.parametrize("apart", [150.0, 400.0])
def test_the_gradient_where_the_reference_has_next_to_nothing(
    backend: str | None, apart: float
) -> None:
    """Its log-prob is below what a float32 exponential can hold; the KL is not."""
    set_compile_backend(backend)
    hidden, weight, ref_hidden, ref_weight = inputs("random")
    ref_hidden[:, 0], ref_weight[:, 0] = 1.0, 0.0
    ref_weight[3, 0] = -apart
    x = [hidden.requires_grad_(), weight, ref_hidden, ref_weight]
    y = [t.detach().double() for t in x]
    y[0].requires_grad_()
    kl, truth = linear_kl(*x, block_size=BLOCK), naive(*y)
    torch.testing.assert_close(kl, truth.float(), rtol=1e-5, atol=1e-5)
    [found], [exact] = (torch.autograd.grad(a.sum(), b[0]) for a, b in ((kl, x), (truth, y)))
    torch.testing.assert_close(found, exact.float(), rtol=1e-4, atol=1e-4)
