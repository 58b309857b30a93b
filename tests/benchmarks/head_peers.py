"""The same of the peers' functions; runs in .venv-bench, where they are installed."""

import importlib.util
from collections.abc import Callable
from importlib.metadata import distribution
from types import ModuleType

import torch
from cut_cross_entropy import linear_cross_entropy
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from liger_kernel.chunked_loss.fused_linear_ppo import _ChunkedSelectiveLogProbFunction
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from tests.benchmarks.head_calls import CLIP, HeadProblem, Results

LIBRARIES = ("trl", "verl", "liger-kernel", "cut-cross-entropy")
ROW = 128
"""Tokens of a sequence; Liger's GRPO loss works on one sequence at a time."""


def _verl_file() -> ModuleType:
    """The package imports ray; the function's file needs torch alone."""
    path = str(distribution("verl").locate_file("verl/utils/experimental/torch_functional.py"))
    spec = importlib.util.spec_from_file_location("verl_torch_functional", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


verl_fused = _verl_file().FusedLinearForPPO()


def trl(problem: HeadProblem) -> Results:
    logits = problem.hidden @ problem.weight.t()
    return selective_log_softmax(logits, problem.tokens), entropy_from_logits(logits)


def verl(problem: HeadProblem) -> Results:
    return verl_fused(problem.hidden, problem.weight, problem.tokens, temperature=1.0)


def liger(problem: HeadProblem) -> Results:
    """Log-prob alone; 4096 is the block of Liger's own losses."""
    inputs = problem.hidden, problem.weight, problem.tokens
    return (_ChunkedSelectiveLogProbFunction.apply(*inputs, None, 1.0, 4096),)


def cut_cross_entropy(problem: HeadProblem) -> Results:
    """Log-prob alone; on a CPU this is the compiled naive op, on a GPU a kernel of its own."""
    inputs = problem.hidden, problem.weight, problem.tokens
    impl = "cce" if problem.hidden.is_cuda else "torch_compile"
    return (-linear_cross_entropy(*inputs, impl=impl, reduction="none"),)


def torch_loss(problem: HeadProblem) -> Results:
    """Gradients of torch's chunked cross entropy: a mean over the tokens, no entropy."""
    loss = torch.nn.functional.linear_cross_entropy(
        problem.hidden,
        problem.weight,
        problem.tokens,
        options=torch.nn.LinearCrossEntropyOptions(),
    )
    return torch.autograd.grad(loss, (problem.hidden, problem.weight))


liger_grpo_loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, epsilon_low=CLIP)


def liger_grpo(problem: HeadProblem) -> Results:
    """Gradients of the clipped policy loss; no entropy."""
    tokens = problem.tokens.view(-1, ROW)
    hidden = problem.hidden.view(*tokens.shape, -1)
    advantages = problem.slopes[: len(tokens)].to(hidden.dtype)
    mask = torch.ones_like(tokens)
    loss, *_ = liger_grpo_loss(hidden, problem.weight, tokens, mask, advantages)
    return torch.autograd.grad(loss, (problem.hidden, problem.weight))


PER_TOKEN: dict[str, Callable[[HeadProblem], Results]] = {
    "TRL": trl,
    "verl": verl,
    "Liger (no entropy)": liger,
    "cut-cross-entropy (no entropy)": cut_cross_entropy,
}
