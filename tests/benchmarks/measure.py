"""Interleaved timings of one thread, peak memory in a fresh process, tables of results."""

import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

Call = Callable[[], object]
Job = Callable[[str, Callable[[object], None]], object]


class Table(NamedTuple):
    """What a benchmark found, as the docs show it."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """The table under its title."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return f"### {self.title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_results(name: str, tables: list[Table], folder: Path | None) -> None:
    """Print the tables, and keep them with their circumstances where a folder is given."""
    for table in tables:
        print(table.markdown(), flush=True)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        found = {"circumstances": circumstances(), "tables": tables}
        (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


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


def interleaved_gpu_seconds(calls: dict[str, Call], *, rounds: int) -> dict[str, float]:
    """Median seconds on a GPU, launches included; every round runs every call once, after one."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            result = call()
            end.record()
            torch.cuda.synchronize()
            del result
            if turn:
                seconds[name].append(start.elapsed_time(end) / 1e3)
    return {name: statistics.median(spent) for name, spent in seconds.items()}


def gpu_peak_bytes(call: Call) -> int:
    """Most memory of tensors on the GPU during the call, above what was there before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    # A Path interns its parts: asked for every millisecond, that made Python grow by 4 MiB.
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


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


GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""glibc gives large blocks back at once: what it keeps of freed ones is not what a call needs."""


def json_of_fresh_process(
    module: str, *arguments: str, environment: Mapping[str, str] | None = None
) -> Any:
    """Run a module that prints JSON on its last line, and read it."""
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    variables = {**os.environ, **(environment or {})}
    output = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=variables
    ).stdout
    return json.loads(output.strip().splitlines()[-1])


def in_turns(job: Job, names: Iterable[str], *, turns: int) -> tuple[dict[str, list[Any]], Any]:
    """Fresh processes at work one at a time: a turn of each, and round again.

    So a machine that slows down slows all of them. ``job(name, tell)`` calls ``tell(result)`` at
    the end of every turn, which returns when it is its turn again.

    Returns:
        What each told, in order, and what each job returned.
    """
    context = multiprocessing.get_context("spawn")
    ends: dict[str, Connection] = {}
    processes = []
    for name in names:
        ends[name], theirs = context.Pipe()
        processes.append(context.Process(target=_work, args=(job, name, theirs), daemon=True))
        processes[-1].start()
        # Else a process that dies leaves this one waiting.
        theirs.close()
    told: dict[str, list[Any]] = {name: [] for name in ends}
    for _ in range(turns):
        for name, end in ends.items():
            end.send(None)
            told[name].append(end.recv())
    returned = {}
    for name, end in ends.items():
        end.send(None)
        returned[name] = end.recv()
    for process in processes:
        process.join()
    return told, returned


def _work(job: Job, name: str, pipe: Connection) -> None:
    def tell(result: object) -> None:
        pipe.send(result)
        pipe.recv()

    pipe.recv()
    pipe.send(job(name, tell))


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
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "load": " ".join(f"{x:.1f}" for x in os.getloadavg()),
    }
