"""The ops on hidden states against their matrix products and the peers.

    make bench                                              # all, into docs/benchmarks.md
    .venv-bench/bin/python -m tests.benchmarks.bench_head --shapes S --dtypes float32

CPU time of one thread, all calls in turn in every round, medians, as ratios to the bare matrix
products: mm = hidden @ weight.T, floor4 = 2 mm + dH + dW (the backward makes the logits again),
floor3 = mm + dH + dW. Peak memory beyond inputs and returned gradients, a fresh process each.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import head_peers as peers
from tests.benchmarks.head_calls import SHAPES, HeadProblem, Results
from tests.benchmarks.measure import (
    GIVES_BACK,
    Table,
    interleaved_seconds,
    json_of_fresh_process,
    peak_bytes,
    write_results,
)

Run = Callable[[HeadProblem], Results]


def forward(call: Run, problem: HeadProblem) -> Results:
    with torch.no_grad():
        return call(problem)


def both(call: Run, problem: HeadProblem) -> Results:
    return problem.gradients(*call(problem))


PER_TOKEN: dict[str, Run] = {
    "ours": HeadProblem.ours,
    "naive": HeadProblem.naive,
    **peers.PER_TOKEN,
}
KL: dict[str, Run] = {"ours": HeadProblem.kl, "naive": HeadProblem.naive_kl}

FORWARD = "forward / mm"
BOTH = "forward + backward / floor4"
FROZEN = "head frozen, forward + backward / (2 mm + dH)"
FUSED = "fused loss / floor3"
KL_FORWARD = "exact KL, forward / 2 mm"
KL_BOTH = "exact KL, forward + backward / (4 mm + dH + dW)"

RUNS: dict[tuple[str, str], Run] = {
    **{(FORWARD, name): partial(forward, call) for name, call in PER_TOKEN.items()},
    **{(BOTH, name): partial(both, call) for name, call in PER_TOKEN.items()},
    (BOTH, "ours, half the tokens masked"): HeadProblem.half_masked,
    (BOTH, "torch (a mean, no entropy)"): peers.torch_loss,
    (FROZEN, "ours"): HeadProblem.frozen_head,
    (FUSED, "ours"): HeadProblem.fused,
    (FUSED, "Liger GRPO (no entropy)"): peers.liger_grpo,
    **{(KL_FORWARD, name): partial(forward, call) for name, call in KL.items()},
    **{(KL_BOTH, name): partial(both, call) for name, call in KL.items()},
}
"""What is measured: (figure, implementation) to the call."""
ONLY_S = {(BOTH, "torch (a mean, no entropy)")}
"""22 times the bare product at M."""


def ratios(
    problem: HeadProblem, runs: dict[tuple[str, str], Run], seconds_of: Callable[..., Any]
) -> dict[tuple[str, str], float]:
    """Of each run's time to its matrix products, and of half masked to none."""
    calls = {("", name): product for name, product in problem.products().items()}
    calls |= {key: partial(run, problem) for key, run in runs.items()}
    seconds = seconds_of(calls)
    mm, d_hidden, d_weight = (seconds["", name] for name in ("mm", "dH", "dW"))
    floors = {
        FORWARD: mm,
        BOTH: 2 * mm + d_hidden + d_weight,
        FROZEN: 2 * mm + d_hidden,
        FUSED: mm + d_hidden + d_weight,
        KL_FORWARD: 2 * mm,
        KL_BOTH: 4 * mm + d_hidden + d_weight,
    }
    found = {key: seconds[key] / floors[key[0]] for key in runs}
    found["half masked / none", "ours"] = (
        seconds[BOTH, "ours, half the tokens masked"] / seconds[BOTH, "ours"]
    )
    found["mm, seconds", "torch"] = mm
    return found


def peak(shape: str, dtype: torch.dtype, key: tuple[str, str], scale: int) -> float:
    """MiB beyond the inputs and the returned gradients."""
    tokens, width, vocabulary = SHAPES[shape]
    run = RUNS[key]
    # One small call first: what is compiled or allocated once is not counted.
    run(HeadProblem(peers.ROW, width, 2048, dtype))
    problem = HeadProblem(scale * tokens, width, vocabulary, dtype)
    returned = problem.hidden.nbytes + (problem.weight.nbytes if key[0] != FROZEN else 0)
    return (peak_bytes(partial(run, problem)) - returned) / 2**20


def parts_of(dtype: str, shapes: list[str], scales: list[int]) -> list[tuple[str, ...]]:
    """What is measured apart: the ratios of a shape, the peak of a run at a number of tokens."""
    timed_both = [key for key in RUNS if key[0] in (BOTH, FROZEN, FUSED, KL_BOTH)]
    peaks = [(shape, *key, "1") for key in timed_both if key not in ONLY_S for shape in shapes]
    # A small shape's peak beside that of many times its tokens; L's are S's and M's in kind.
    peaks += [(s, BOTH, "ours", str(scale)) for scale in scales for s in shapes if s != "L"]
    return [("ratios", dtype, shape) for shape in shapes] + [("peak", dtype, *p) for p in peaks]


def measured(part: tuple[str, ...], rounds: int) -> dict[str, float]:
    """One part, in a process of its own."""
    environment = GIVES_BACK if part[0] == "peak" else None
    return json_of_fresh_process(
        __spec__.name, "--rounds", str(rounds), "--part", *part, environment=environment
    )


def tables(found: dict[tuple[str, ...], dict[str, float]], dtype: str) -> list[Table]:
    """The parts of one dtype."""
    shapes = [shape for kind, of, shape, *_ in found if kind == "ratios" and of == dtype]
    columns = [found["ratios", dtype, shape] for shape in shapes]
    ratio_rows = [
        [*name.split(" | "), *(f"{c[name]:.2f}" if name in c else "" for c in columns)]
        for name in columns[0]
    ]
    peaks = dict.fromkeys(
        part[3:] for part in found if part[:2] == ("peak", dtype) and part[2] == shapes[0]
    )
    peak_rows = [
        [
            key[0].split(" / ")[0],
            *key[1:],
            *(
                f"{found[part]['MiB']:.0f}" if (part := ("peak", dtype, s, *key)) in found else ""
                for s in shapes
            ),
        ]
        for key in peaks
    ]
    memory = f"Head, {dtype}: peak memory, MiB beyond inputs and returned gradients"
    return [
        Table(f"Head, {dtype}: CPU time of one thread", ["figure", "by", *shapes], ratio_rows),
        Table(memory, ["of", "by", "times the tokens", *shapes], peak_rows),
    ]


def main() -> None:
    """Measure, print and write; what a folder already holds is not measured again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for head.json and its parts")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scales", nargs="*", type=int, default=[4, 16])
    parser.add_argument("--part", nargs="+", metavar="WORD", help="one part, as JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.part:
        kind, dtype, shape, *rest = given.part
        if kind == "ratios":
            problem = HeadProblem(*SHAPES[shape], getattr(torch, dtype))
            runs = {key: run for key, run in RUNS.items() if shape == "S" or key not in ONLY_S}
            found = ratios(problem, runs, partial(interleaved_seconds, rounds=given.rounds))
            result = {" | ".join(key): ratio for key, ratio in found.items()}
        else:
            figure, by, scale = rest
            result = {"MiB": peak(shape, getattr(torch, dtype), (figure, by), int(scale))}
        print(json.dumps(result))
        return
    parts = given.output / "head.parts.jsonl" if given.output else None
    found: dict[tuple[str, ...], dict[str, float]] = {}
    if parts is not None and parts.exists():
        found = {tuple(key): result for key, result in map(json.loads, parts.open())}
    for dtype in given.dtypes:
        # One thread of bfloat16 is slow; its figures are asked for at S.
        shapes = given.shapes if dtype == "float32" else given.shapes[:1]
        for part in parts_of(dtype, shapes, given.scales if dtype == "float32" else []):
            if part in found:
                continue
            found[part] = measured(part, given.rounds)
            print(*part, found[part], flush=True)
            if parts is not None:
                parts.parent.mkdir(parents=True, exist_ok=True)
                with parts.open("a") as file:
                    file.write(json.dumps([part, found[part]]) + "\n")
    write_results("head", [t for d in given.dtypes for t in tables(found, d)], given.output)


if __name__ == "__main__":
    main()
