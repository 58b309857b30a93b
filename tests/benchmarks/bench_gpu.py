"""What the other benchmarks measure on a CPU, on a GPU.

    make bench-gpu                                          # all, into docs/benchmarks.md
    .venv-bench/bin/python -m tests.benchmarks.bench_gpu --parts head gae --output runs/bench

Seconds between events on the GPU, launches included; calls in turn in every round, medians. Memory:
the tensors' peak. The head's shapes are those of `bench_head` with 8192 tokens. The update is that
of Qwen2.5-3B with random weights, at the settings of `--config qwen2_5_3b`.
"""

import argparse
import dataclasses
import statistics
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from examples.lm_rlhf.architectures import read_architecture
from examples.lm_rlhf.config import Config, qwen2_5_3b, smollm2_135m
from examples.lm_rlhf.memory import memory, read_sizes
from safe_ops import _linear_kernels
from safe_ops._linear_kernels import Launch
from safe_ops.controllers import Controller
from tests.benchmarks import bench_gae, bench_head, step_trainers
from tests.benchmarks.bench_controllers import LAWS
from tests.benchmarks.bench_sampling import Candidates
from tests.benchmarks.bench_step import STAGES, median
from tests.benchmarks.head_calls import SHAPES, HeadProblem
from tests.benchmarks.measure import (
    Table,
    gpu_peak_bytes,
    interleaved_gpu_seconds,
    write_results,
)
from tests.benchmarks.stopwatch import Update, gpu_clock

GIB = 2**30
TOKENS = 8192
COLUMNS = (
    ("S", torch.bfloat16),
    ("M", torch.bfloat16),
    ("L", torch.bfloat16),
    ("S", torch.float32),
)
NAMES = [f"{shape}, {str(dtype).removeprefix('torch.')}" for shape, dtype in COLUMNS]
HALF_ONLY = ("cut-cross-entropy (no entropy)",)
LAUNCHES = (
    Launch(rows=128, entries=128, depth=64, warps=8, stages=3, registers=128),
    Launch(rows=128, entries=256, depth=64, warps=8, stages=3),
    Launch(rows=128, entries=128, depth=64, warps=8, stages=3),
    Launch(rows=128, entries=128, depth=32, warps=8, stages=4, registers=128),
)
BLOCK = 16_384
# Torch's own chunked op, which not every version has.
RUNS = {key: run for key, run in bench_head.RUNS.items() if key not in bench_head.ONLY_S}
OUR_STAGES = ("controller", "advantages", "losses")


def head() -> list[Table]:
    """Times as ratios to the bare products, and peaks."""
    found, peaks = [], []
    for shape, dtype in COLUMNS:
        problem = HeadProblem(TOKENS, *SHAPES[shape][1:], dtype, device="cuda")
        runs = {key: RUNS[key] for key in RUNS if dtype != torch.float32 or key[1] not in HALF_ONLY}
        found.append(bench_head.ratios(problem, runs, partial(interleaved_gpu_seconds, rounds=3)))
        returned = problem.hidden.nbytes + problem.weight.nbytes
        peaks.append(
            {
                key: (gpu_peak_bytes(partial(run, problem)) - returned) / 2**20
                for key, run in runs.items()
                if key[0] in (bench_head.BOTH, bench_head.FUSED, bench_head.KL_BOTH)
            }
        )
        print(shape, dtype, found[-1], peaks[-1], flush=True)
        del problem
        torch.cuda.empty_cache()
    products = [f.pop(("mm, seconds", "torch")) for f in found]

    def row(key: tuple[str, str], columns: list[dict[tuple[str, str], float]], form: str) -> list:
        return [*key, *(f"{c[key]:{form}}" if key in c else "" for c in columns)]

    rows = [row(key, found, ".2f") for key in found[0]]
    rows.append(["mm, ms", "torch", *(f"{1e3 * x:.2f}" for x in products)])
    memory = "Head on a GPU: peak memory, MiB beyond inputs and returned gradients"
    return [
        Table(f"Head on a GPU, {TOKENS} tokens", ["figure", "by", *NAMES], rows),
        Table(memory, ["of", "by", *NAMES], [row(key, peaks, ".0f") for key in peaks[0]]),
    ]


def launch_seconds(shape: str) -> dict[tuple[str, Launch | None], float]:
    """Of each kernel with each launch, and of the bare product of the same size."""
    problem = HeadProblem(TOKENS, *SHAPES[shape][1:], torch.bfloat16, device="cuda")
    hidden, weight = problem.hidden.detach(), problem.weight.detach()
    some = weight[:BLOCK]
    one, row = torch.ones((), device="cuda"), torch.rand(TOKENS, device="cuda")
    out = hidden.new_empty(TOKENS, BLOCK)

    def sums(launch: Launch) -> object:
        _linear_kernels.SUMS = launch
        return _linear_kernels.row_sums(hidden, weight, None, problem.tokens, one)

    def slopes(launch: Launch) -> None:
        _linear_kernels.SLOPES = launch
        _linear_kernels.write_slopes(hidden, some, None, problem.tokens, 0, one, 5 * (row,), out)

    calls: dict[tuple[str, Launch | None], Callable[[], object]] = {
        ("sums", None): lambda: hidden @ weight.t(),
        ("slopes", None): lambda: torch.mm(hidden, some.t(), out=out),
    }
    for launch in LAUNCHES:
        calls["sums", launch] = partial(sums, launch)
        calls["slopes", launch] = partial(slopes, launch)
    chosen = _linear_kernels.SUMS, _linear_kernels.SLOPES
    seconds = interleaved_gpu_seconds(calls, rounds=5)
    _linear_kernels.SUMS, _linear_kernels.SLOPES = chosen
    return seconds


def kernels() -> list[Table]:
    """Every launch on every shape."""
    rows = []
    for shape in SHAPES:
        seconds = launch_seconds(shape)
        rows += [
            [shape, kernel, *map(str, launch), f"{1e3 * x:.2f}", f"{x / seconds[kernel, None]:.2f}"]
            for (kernel, launch), x in seconds.items()
            if launch is not None
        ]
        torch.cuda.empty_cache()
    columns = ["shape", "kernel", *Launch._fields, "ms", "/ product"]
    return [Table(f"Kernels, {TOKENS} tokens, bfloat16", columns, rows)]


def gae() -> list[Table]:
    """Ours beside TorchRL's."""
    rows = []
    for batch, steps in bench_gae.SIZES:
        for name in ("no terminations", "general"):
            calls = bench_gae.case(name, batch, steps, device="cuda")
            seconds = interleaved_gpu_seconds(calls, rounds=3)
            rows += [
                [f"[{batch}, {steps}]", name, by, f"{1e3 * x:.2f}", f"{seconds['loop'] / x:.1f}"]
                for by, x in seconds.items()
            ]
    columns = ["[B, T]", "case", "by", "ms", "times faster than the loop"]
    return [Table("Advantages on a GPU", columns, rows)]


def laws() -> list[Table]:
    """One call of the Controller; its operations are launched, and not waited for."""
    calls: dict[str, Callable[[], object]] = {}
    for law, names in LAWS.values():
        controller = Controller(law).to("cuda")
        measured = dict.fromkeys(names, torch.tensor(0.5, device="cuda"))
        calls[type(law).__name__] = partial(controller, **measured)
    seconds = interleaved_gpu_seconds(calls, rounds=50)
    rows = [[name, f"{1e6 * x:.0f}"] for name, x in seconds.items()]
    return [Table("Controllers, eager on a GPU", ["law", "Controller's call, µs"], rows)]


def sampling() -> list[Table]:
    """The demo's sizes and longer responses, bfloat16, random weights."""
    config = dataclasses.replace(smollm2_135m(), random_weights=True, dtype="bfloat16")
    rows = []
    for batch, new_tokens in ((16, 24), (64, 64)):
        candidates = Candidates(batch, new_tokens, config=config, device="cuda")
        seconds = interleaved_gpu_seconds(candidates.all(), rounds=2)
        print(batch, new_tokens, seconds, flush=True)
        rows += [
            [
                f"{batch} x {new_tokens}",
                name,
                f"{x:.3f}",
                f"{batch * new_tokens / x:.0f}",
                f"{seconds['generate, LoRA in place'] / x:.2f}",
            ]
            for name, x in seconds.items()
        ]
    columns = ["rows x tokens", "by", "s", "tokens a second", "times generate"]
    return [Table("Sampling on a GPU, SmolLM2-135M with LoRA, bfloat16", columns, rows)]


def step(*, merged: bool = False) -> list[Table]:
    """Whole SAFE updates at 3B: stages, throughput, peak, and the share that is ours."""
    config = dataclasses.replace(
        qwen2_5_3b(),
        random_weights=True,
        system_message="Be brief.",
        checkpoint_every=1000,
        merged_sampling=merged,
    )
    sizes = f"{config.batch_size} x {config.max_new_tokens} tokens"
    how = "merged sampling" if merged else "adapters in place"
    title = f"One SAFE update of Qwen2.5-3B (random weights) on a GPU, {sizes}, {how}"
    return [Table(title, ["ms", "SAFE"], [[*row] for row in update_figures(config).items()])]


def update_figures(config: Config) -> dict[str, str]:
    """A run's figures, by their names."""
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        updates: list[Update] = []
        step_trainers.ours(
            config,
            algorithm="safe",
            make_logits=False,
            updates=4,
            output=Path(folder) / "run",
            tell=updates.append,
            clock=gpu_clock,
        )
    # The first warms up, the last writes a checkpoint.
    updates = updates[1:-1]
    peak = torch.cuda.max_memory_allocated() / GIB
    reserved = torch.cuda.max_memory_reserved() / GIB
    sizes = read_sizes(read_architecture(config.model))
    # Prompts are padded to whole tiles with the response.
    formulas = memory(config, sizes, prompt_width=32, gpus=1).peak / GIB
    whole = statistics.median(update["whole"] for update in updates)
    ours = sum(median(updates, stage) for stage in OUR_STAGES)
    tokens = config.batch_size * config.max_new_tokens
    return {
        **{stage: f"{1e3 * median(updates, stage):.0f}" for stage in STAGES},
        "whole": f"{1e3 * whole:.0f}",
        f"{', '.join(OUR_STAGES)}: share of the whole": f"{ours / whole:.3f}",
        "response tokens a second": f"{tokens / whole:.0f}",
        "peak of tensors, GiB": f"{peak:.2f}",
        "reserved by the allocator, GiB": f"{reserved:.2f}",
        "formulas, GiB": f"{formulas:.2f}",
    }


PARTS = {
    "head": head,
    "kernels": kernels,
    "gae": gae,
    "laws": laws,
    "sampling": sampling,
    "step": step,
    "merged_step": partial(step, merged=True),
}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for gpu_PART.json")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    for part in given.parts:
        write_results(f"gpu_{part}", PARTS[part](), given.output)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
