"""Every public op is one graph, and the graph gives what eager gives."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import safe_ops


def wave(frequency: float, *shape: int) -> Tensor:
    return torch.sin(torch.arange(torch.Size(shape).numel()) * frequency).reshape(shape)


B, T, K, V = 2, 3, 2, 5
X, Y, Z, HEADS, LOGITS = wave(1, B, T), wave(2, B, T), wave(3, B, T), wave(4, B, T, K), wave(
    5, B, T, V
)  # fmt: skip
HIDDEN, HEAD, IDS = wave(6, B, T, 4), wave(7, V, 4), torch.zeros(B, T, dtype=torch.int64)
MASK = torch.tensor([[True, True, False], [True, True, True]])
END = torch.tensor([[False, True, False], [False, False, False]])
KL = torch.tensor(0.5)

# (positional arguments, keywords); what is differentiated is the first one.
ARGUMENTS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "clipped_policy_loss": ((X, Y, Z), {"mask": MASK}),
    "clipped_policy_terms": ((X, Y, Z), {"mask": MASK, "clip": (0.2, 0.3)}),
    "entropy_gate": ((X.abs(),), {"floor": 0.5}),
    "explained_variance": ((X, Y), {"mask": MASK}),
    "fill_masked": ((X, MASK), {}),
    "gated_kl_penalty": (
        (KL,),
        {"threshold": torch.tensor(0.3), "gate": torch.tensor(2.0), "lead": torch.tensor(0.1)},
    ),
    "generalized_advantage_estimate": (
        (X, Y),
        {"mask": MASK, "terminated": END, "bootstrap_value": torch.ones(B)},
    ),
    "kl_baseline": ((X, Y), {"mask": MASK, "decay": 0.9}),
    "kl_exact": ((LOGITS, LOGITS.flip(-1)), {}),
    "kl_k1": ((X, Y), {}),
    "kl_k2": ((X, Y), {}),
    "kl_k3": ((X, Y), {}),
    "kl_shaped_reward": ((X, Y, Z), {"mask": MASK, "coef": torch.tensor(0.1)}),
    "kl_surrogate": (
        (X, Y),
        {"mask": MASK, "old_log_prob": Z, "baseline": X.flip(-1), "decay": 0.9},
    ),
    "kl_surrogate_token": ((X, Y), {"mask": MASK, "old_log_prob": Z}),
    "kl_to_go": ((X, Y), {"mask": MASK}),
    "linear_kl": ((HIDDEN, HEAD, HIDDEN.flip(-1), HEAD), {"mask": MASK}),
    "linear_log_probs": ((HIDDEN, HEAD, IDS), {"bias": wave(8, V), "mask": MASK}),
    "masked_mean": ((X, MASK), {"dim": -1}),
    "masked_sum": ((X, MASK), {"dim": -1}),
    "masked_var": ((X, MASK), {}),
    "masked_whiten": ((X, MASK), {}),
    "momentum_penalty": ((KL, torch.tensor(0.3)), {"window": 10}),
    "soft_min": ((HEADS, 0.3), {}),
    "soft_min_weights": ((HEADS, 0.3), {}),
    "token_kl_penalty": ((X, Y), {"threshold": torch.tensor(0.1)}),
    "token_log_probs": ((LOGITS, torch.zeros(B, T, dtype=torch.int64)), {"temperature": 0.7}),
    "value_loss": ((HEADS, Y), {"mask": MASK, "old_value": HEADS + 0.3, "clip": 0.2}),
    "value_terms": ((HEADS, Y), {"mask": MASK, "huber_delta": None}),
}


# A choice of what compiles, and a loss that calls back into Python (it says so).
NOT_OPS = {"compile_backend", "compile_with", "set_compile_backend", "linear_loss"}


def public_ops() -> list[str]:
    functions = {name for name in safe_ops.__all__ if inspect.isfunction(getattr(safe_ops, name))}
    return sorted(functions - NOT_OPS)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def run(op: Callable[..., Any], name: str) -> list[Tensor]:
    """The results, and the gradient of their sum where there is one."""
    (first, *others), keywords = ARGUMENTS[name]
    first = first.clone().requires_grad_()
    results = op(first, *others, **keywords)
    results = [results] if isinstance(results, Tensor) else list(results)
    differentiable = [result.square().sum() for result in results if result.requires_grad]
    if differentiable:
        results.append(torch.autograd.grad(sum(differentiable), first)[0])
    return [result.detach() for result in results]


def test_every_public_op_is_here() -> None:
    assert sorted(ARGUMENTS) == sorted(public_ops())


@pytest.mark.parametrize("name", public_ops())
def test_op_is_one_graph_and_gives_what_eager_gives(name: str) -> None:
    op = getattr(safe_ops, name)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for found, expected in zip(run(compiled, name), run(op, name), strict=True):
        torch.testing.assert_close(found, expected)


def test_what_changes_from_step_to_step_does_not_recompile() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=count)
    def step(kl: Tensor, threshold: Tensor, gate: Tensor, lead: Tensor) -> Tensor:
        return safe_ops.gated_kl_penalty(kl, threshold=threshold, gate=gate, lead=lead)

    for i in range(5):
        threshold, gate, lead = torch.tensor([0.1, 1.0, 0.01]).mul(i + 1).unbind()
        found = step(KL, threshold, gate, lead)
        expected = safe_ops.gated_kl_penalty(KL, threshold=threshold, gate=gate, lead=lead)
        torch.testing.assert_close(found, expected)
    assert len(graphs) == 1
