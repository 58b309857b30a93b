"""``linear_log_probs``, ``linear_kl`` and ``linear_loss`` against their matrix products and peers.

python tests/benchmarks/bench_linear_log_probs.py --output linear.json [--shapes S M L]
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from safe_ops import kl_exact, token_log_probs
from safe_ops.linear_kl import linear_kl
from safe_ops.linear_log_probs import linear_log_probs
from safe_ops.linear_loss import linear_loss
from tests.benchmarks.measure import (
    circumstances,
    in_fresh_process,
    interleaved_seconds,
    peak_bytes,
)

SHAPES = {"S": (2048, 576, 49_152), "M": (1024, 896, 151_936), "L": (512, 2048, 151_936)}
"""Tokens, H, V."""
PEERS = ("trl", "verl", "liger_kernel", "cut_cross_entropy")
COEF = 0.01
"""Of the entropy, so that both results have a gradient."""


class Problem:
    """Inputs of one shape and the calls that are compared on them."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        N, H, V = shape
        torch.manual_seed(0)
        self.hidden = torch.randn(N, H).to(dtype).requires_grad_()
        self.weight = torch.randn(V, H).mul_(H**-0.5).to(dtype).requires_grad_()
        self.ref_hidden = torch.randn(N, H).to(dtype)
        self.ref_weight = self.weight.detach()
        self.tokens = torch.randint(V, (N,))
        self.half = torch.rand(N).argsort() < N // 2
        self.slopes = torch.randn(N)

    def grads(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (self.hidden, self.weight))

    def loss(self, results: tuple[Tensor, Tensor]) -> Tensor:
        return results[0] @ self.slopes + COEF * results[1].sum()

    def ours(self, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return linear_log_probs(self.hidden, self.weight, self.tokens, mask=mask)

    def ours_both(self) -> object:
        return self.grads(self.loss(self.ours()))

    def half_both(self) -> object:
        return self.grads(self.loss(self.ours(self.half)))

    def frozen_both(self) -> object:
        results = linear_log_probs(self.hidden, self.ref_weight, self.tokens)
        return torch.autograd.grad(self.loss(results), self.hidden)

    def naive(self) -> tuple[Tensor, Tensor]:
        return token_log_probs(self.hidden @ self.weight.t(), self.tokens)

    def naive_both(self) -> object:
        return self.grads(self.loss(self.naive()))

    def torch_both(self) -> object:
        """torch's chunked cross entropy: no entropy of the distribution, a mean."""
        loss = torch.nn.functional.linear_cross_entropy(
            self.hidden,
            self.weight,
            self.tokens,
            options=torch.nn.LinearCrossEntropyOptions(),
        )
        return self.grads(loss)

    def fused_both(self) -> object:
        loss = linear_loss(
            self.hidden,
            self.weight,
            self.tokens,
            lambda log_prob, entropy, index: log_prob * self.slopes[index] + COEF * entropy,
        )
        return self.grads(loss)

    def kl(self) -> Tensor:
        return linear_kl(self.hidden, self.weight, self.ref_hidden, self.ref_weight)

    def kl_both(self) -> object:
        return self.grads(self.kl() @ self.slopes)

    def kl_naive(self) -> Tensor:
        logits, ref_logits = self.hidden @ self.weight.t(), self.ref_hidden @ self.ref_weight.t()
        return kl_exact(logits, ref_logits)

    def kl_naive_both(self) -> object:
        return self.grads(self.kl_naive() @ self.slopes)

    def product(self) -> Tensor:
        with torch.no_grad():
            return self.hidden @ self.weight.t()


FORWARD = ("ours", "naive", "kl", "kl_naive")
BOTH = ("ours_both", "half_both", "frozen_both", "naive_both", "torch_both", "fused_both",
        "kl_both", "kl_naive_both")  # fmt: skip


def products(problem: Problem) -> dict[str, object]:
    """The three bare matrix products, each into fresh memory as autograd makes them."""
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    slopes = torch.randn(hidden.shape[0], weight.shape[0], dtype=hidden.dtype)
    return {
        "mm": problem.product,
        "dH": lambda: slopes @ weight,
        "dW": lambda: slopes.t() @ hidden,
    }


def times(
    shape: str, dtype: torch.dtype, names: list[str], rounds: int
) -> dict[str, dict[str, float]]:
    problem = Problem(SHAPES[shape], dtype)

    def forward(name: str) -> object:
        with torch.no_grad():
            return getattr(problem, name)()

    calls = dict(products(problem))
    for name in names:
        call = getattr(problem, name)
        calls[name] = (lambda name=name: forward(name)) if name in FORWARD else call
    seconds = interleaved_seconds(calls, rounds=rounds)
    mm, back = seconds["mm"], seconds["dH"] + seconds["dW"]
    floors = {"kl": 2 * mm, "kl_naive": 2 * mm, "kl_both": 4 * mm + back,
              "kl_naive_both": 4 * mm + back, "fused_both": mm + back,
              "frozen_both": 2 * mm + seconds["dH"]}  # fmt: skip
    ratios = {
        name: seconds[name] / floors.get(name, mm if name in FORWARD else 2 * mm + back)
        for name in names
    }
    if {"half_both", "ours_both"} <= set(names):
        ratios["half / ours_both"] = seconds["half_both"] / seconds["ours_both"]
    return {"seconds": seconds, "ratio": ratios}


def peak(shape: str, dtype: torch.dtype, name: str, scale: int) -> float:
    """MiB beyond the inputs and the returned gradients, forward and backward."""
    N, H, V = SHAPES[shape]
    # One small call first: what is compiled or allocated once is not counted.
    getattr(Problem((32, H, 2048), dtype), name)()
    problem = Problem((scale * N, H, V), dtype)
    returned = problem.hidden.nbytes + (problem.weight.nbytes if name != "frozen_both" else 0)
    return (peak_bytes(getattr(problem, name)) - returned) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--names", nargs="+", default=[*FORWARD, *BOTH])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scales", nargs="*", type=int, default=[1])
    parser.add_argument("--peak", nargs=4, metavar=("SHAPE", "DTYPE", "NAME", "SCALE"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.peak:
        shape, dtype, name, scale = given.peak
        print(json.dumps(peak(shape, getattr(torch, dtype), name, int(scale))))
        return
    found: dict[str, object] = {"circumstances": circumstances(), "shapes": SHAPES}
    found["absent peers"] = [name for name in PEERS if importlib.util.find_spec(name) is None]
    for shape in given.shapes:
        for dtype in given.dtypes:
            result: dict[str, object] = times(
                shape, getattr(torch, dtype), given.names, given.rounds
            )
            result["peak MiB"] = {
                f"{name} x{scale}": in_fresh_process(
                    __file__, "--peak", shape, dtype, name, str(scale)
                )
                for name in given.names
                for scale in given.scales
                if name in BOTH and (scale == 1 or "naive" not in name)
            }
            found[f"{shape} {dtype}"] = result
            print(shape, dtype, json.dumps(result, indent=1), flush=True)
    if given.output:
        given.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
