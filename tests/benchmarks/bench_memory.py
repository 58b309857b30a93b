"""What a run of the example holds after each stage, beside the formulas of `docs/memory.md`.

    python -m tests.benchmarks.bench_memory --config smollm2_135m --threads 1 --steps 1
    MALLOC_MMAP_THRESHOLD_=65536 python -m tests.benchmarks.bench_memory --config qwen2_5_3b \
        --random-weights --system-message "Be brief." --batch-size 4 --minibatch-size 1 \
        --max-new-tokens 32 --threads 1 --steps 1

Arguments are those of `examples.lm_rlhf.train`, but for ``--output``: the run is thrown away.
Resident memory of this process, in GiB; 0.55 of it is Python and its libraries.
"""

import functools
import resource
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch

from examples.lm_rlhf import train
from examples.lm_rlhf.architectures import read_architecture
from examples.lm_rlhf.command_line import parse
from examples.lm_rlhf.memory import memory, read_sizes
from tests.benchmarks.measure import Table, resident_bytes, write_results
from tests.benchmarks.step_trainers import STAGES

GIB = 2**30
LIBRARIES_GIB = 0.55


class Watch:
    """Resident memory at the end of every call of a stage, in the order of their first ones."""

    def __init__(self) -> None:
        self.after: dict[str, list[float]] = {}
        self.prompt_width = 0

    def wrap(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, watched."""

        @functools.wraps(call)
        def watched(*arguments: Any, **named: Any) -> Any:
            result = call(*arguments, **named)
            self.after.setdefault(stage, []).append(resident_bytes() / GIB)
            return result

        return watched

    def gather_rollout(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Read how wide the prompts were."""

        @functools.wraps(call)
        def watched(accelerator: Any, batch: Any) -> Any:
            self.prompt_width = batch["tokens", "prompt"].shape[1]
            return call(accelerator, batch)

        return watched


def main() -> None:
    """Run, and print what was seen."""
    watch = Watch()
    with tempfile.TemporaryDirectory() as output, ExitStack() as patches:
        config, folder, _ = parse([*sys.argv[1:], "--output", f"{output}/run"])
        torch.set_flush_denormal(True)
        for owner, name, stage in STAGES:
            watched = watch.wrap(stage, getattr(owner, name))
            patches.enter_context(patch.object(owner, name, watched))
        reads = watch.gather_rollout(train.gather_rollout)
        patches.enter_context(patch.object(train, "gather_rollout", reads))
        train.train(config, folder, resume=False)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    sizes = read_sizes(read_architecture(config.model))
    formulas = memory(config, sizes, prompt_width=watch.prompt_width).peak / GIB
    rows = [
        [stage, f"{seen[0]:.2f}", f"{max(seen[1:]):.2f}" if seen[1:] else ""]
        for stage, seen in watch.after.items()
    ]
    rows += [["**peak**", f"{peak:.2f}", ""]]
    rows += [[f"formulas, with {LIBRARIES_GIB}", f"{formulas + LIBRARIES_GIB:.2f}", ""]]
    columns = ["GiB after", "the first call", "later ones, at most"]
    write_results("memory", [Table(f"Memory of {config.model}", columns, rows)], None)


if __name__ == "__main__":
    main()
