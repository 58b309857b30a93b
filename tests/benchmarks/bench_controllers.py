"""What the controllers cost: their import, one update of each law, one call of the Controller.

    python -m tests.benchmarks.bench_controllers

One thread. Least of many short batches, so that other work on the machine counts little. Prints
JSON: seconds of import (least of five fresh processes), microseconds of an update and the number of
tensor operations in it. Limits: the import adds under 5 % of torch's own, an update of
EntropyGatedKL takes under 500 us.
"""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
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


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    of_torch, of_controllers = import_seconds()
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "import_torch_s": round(of_torch, 3),
        "import_controllers_s": round(of_controllers, 4),
        "import_share": round(of_controllers / of_torch, 4),
        "update_us": {},
        "controller_us": {},
        "operations": {},
    }
    for name, (law, names) in LAWS.items():
        measured = {key: torch.tensor(0.5) for key in names}
        controller = Controller(law)
        for _ in range(60):
            controller(**measured)
        state = controller.state
        report["update_us"][name] = round(microseconds(partial(law.update, state, **measured)), 1)
        report["controller_us"][name] = round(microseconds(partial(controller, **measured)), 1)
        with CountOperations() as counter:
            law.update(state, **measured)
        report["operations"][name] = counter.count
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
