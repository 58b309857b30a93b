"""Interleaved timings of one thread and peak memory in a fresh process, for every benchmark."""

import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

Call = Callable[[], object]


def interleaved_seconds(calls: dict[str, Call], *, rounds: int) -> dict[str, float]:
    """Median CPU seconds of one thread; every round runs every call once, after one to warm up."""
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.thread_time()
            result = call()
            spent = time.thread_time() - start
            del result
            if turn:
                seconds[name].append(spent)
    return {name: statistics.median(spent) for name, spent in seconds.items()}


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(call: Call) -> int:
    """Highest resident memory during the call, above what was there before it.

    Inputs made before are outside; what the call returns (its gradients) is inside and is for the
    caller to subtract.
    """
    done = threading.Event()
    before = resident_bytes()
    highest = [before]

    def watch() -> None:
        while not done.wait(0.001):
            highest[0] = max(highest[0], resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = call()
        highest[0] = max(highest[0], resident_bytes())
        del result
    finally:
        done.set()
        watcher.join()
    return highest[0] - before


def in_fresh_process(script: str, *arguments: str) -> object:
    """Run a script that prints JSON on its last line, and read it."""
    output = subprocess.run(
        [sys.executable, script, *arguments], check=True, capture_output=True, text=True
    ).stdout
    return json.loads(output.strip().splitlines()[-1])


def circumstances() -> dict[str, str]:
    """What a figure depends on: processor, versions, date."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in (cpuinfo.read_text().splitlines() if cpuinfo.exists() else [])
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "date": time.strftime("%Y-%m-%d"),
        "load": " ".join(f"{x:.1f}" for x in os.getloadavg()),
    }
