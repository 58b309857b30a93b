"""What the controllers cost: their import, one update of each law, one call of the Controller.

    make bench                                              # all, into docs/benchmarks.md
    python -m tests.benchmarks.bench_controllers

One thread. Least of many short batches, so that other work on the machine counts little. Imports:
least of five fresh processes.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from safe_ops.controllers import (
    EMA,
    PID,
    AdaptiveKL,
    Controller,
    EntropyGatedKL,
    Momentum,
    Phase,
    PIDLagrangian,
    TrustRegion,
)
from tests.benchmarks.measure import Table, write_results

LAWS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "ema": (EMA(), ("value",)),
    "momentum": (Momentum(), ("value",)),
    "pid": (PID(kp=1.0, ki=0.1), ("measurement",)),
    "phase": (Phase(), ("reward",)),
    "adaptive_kl": (AdaptiveKL(), ("kl",)),
    "pid_lagrangian": (PIDLagrangian(limit=1.0), ("cost",)),
    "trust_region": (TrustRegion(), ("step_kl",)),
    "entropy_gated": (EntropyGatedKL(), ("kl", "entropy", "reward")),
}

IMPORTS = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import safe_ops.controllers
print(middle - start, time.perf_counter() - middle)
"""


class CountOperations(TorchDispatchMode):
    """Counts the tensor operations under it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def import_seconds(runs: int = 5) -> tuple[float, float]:
    """Least import time of torch, and of the controllers after it."""
    pairs = []
    for _ in range(runs):
        out = subprocess.run(
            [sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True
        ).stdout
        pairs.append([float(x) for x in out.split()])
    return min(p[0] for p in pairs), min(p[1] for p in pairs)


def microseconds(call: Callable[[], object], batch: int = 10, batches: int = 200) -> float:
    """Of one call, least over the batches."""
    best = float("inf")
    for _ in range(batches):
        start = time.perf_counter()
        for _ in range(batch):
            call()
        best = min(best, (time.perf_counter() - start) / batch)
    return 1e6 * best


def law_row(name: str) -> list[str]:
    """Microseconds of a law's update and of its Controller's call, and the update's operations."""
    law, names = LAWS[name]
    measured = {key: torch.tensor(0.5) for key in names}
    controller = Controller(law)
    for _ in range(60):
        controller(**measured)
    state = controller.state
    with CountOperations() as counter:
        law.update(state, **measured)
    return [
        type(law).__name__,
        f"{microseconds(partial(law.update, state, **measured)):.0f}",
        f"{microseconds(partial(controller, **measured)):.0f}",
        str(counter.count),
    ]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for controllers.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    of_torch, of_controllers = import_seconds()
    share = f"{100 * of_controllers / of_torch:.1f} %"
    imports = Table(
        "Imports, seconds",
        ["torch", "safe_ops.controllers, after it", "share"],
        [[f"{of_torch:.2f}", f"{of_controllers:.3f}", share]],
    )
    columns = ["law", "update, µs", "Controller's call, µs", "tensor operations"]
    laws = Table("Controllers, eager on a CPU", columns, [law_row(name) for name in LAWS])
    write_results("controllers", [imports, laws], given.output)


if __name__ == "__main__":
    main()
