"""One whole update: its stages, SAFE against our own PPO, and both against TRL's PPOTrainer.

    make bench                                             # all, into docs/benchmarks.md
    .venv-bench/bin/python -m tests.benchmarks.bench_step

CPU time of one thread. Every loop runs in fresh processes, in turn, and the medians are over all
updates but the first two of each process. The tiny model is a Llama with 4 layers of 128 and 8192
tokens, LoRA on all projections, and a reward model of its size; a batch is 16 x (24 + 24) tokens,
two epochs of two minibatches. "demo" is SmolLM2-135M as `make demo` runs it.
"""

import argparse
import json
import resource
import statistics
import tempfile
from pathlib import Path

import torch

from tests.benchmarks import step_trainers as trainers
from tests.benchmarks.measure import Table, json_of_fresh_process, write_results
from tests.benchmarks.stopwatch import Update

TRAINERS = ("SAFE", "PPO", "TRL")
STAGES = (
    "sampling",
    "scoring",
    "controller",
    "advantages",
    "losses",
    "backward",
    "optimizer",
    "trust region",
    "checkpoint",
    "rest",
)
WARM_UP = 2
Found = dict[str, list[Update]]


def run(trainer: str, model: str, updates: int) -> dict[str, object]:
    """One process's part: updates of one loop, and the process's peak memory."""
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if model == "tiny":
            trainers.make_tiny_model(folder)
        if trainer == "TRL":
            found = trainers.trl(folder, updates=updates, output=folder / "run")
        else:
            config = trainers.tiny_config(folder) if model == "tiny" else trainers.demo_config()
            algorithm, output = trainer.lower(), folder / "run"
            found = trainers.ours(config, algorithm=algorithm, updates=updates, output=output)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"updates": found[WARM_UP:], "peak": peak}


def interleaved(
    names: tuple[str, ...], model: str, *, updates: int, rounds: int
) -> tuple[Found, dict[str, float]]:
    """Updates of every loop over all rounds, and its highest peak memory in GiB."""
    found: Found = {name: [] for name in names}
    peaks = dict.fromkeys(names, 0.0)
    for _ in range(rounds):
        for name in names:
            part = json_of_fresh_process(__spec__.name, "--run", name, model, str(updates))
            found[name] += part["updates"]
            peaks[name] = max(peaks[name], part["peak"])
    return found, peaks


def median(updates: list[Update], name: str) -> float:
    """Of a stage over the updates, in seconds; one that does not run in each counts by its mean."""
    values = [update.get(name, 0.0) for update in updates]
    return statistics.mean(values) if name == "checkpoint" else statistics.median(values)


def train(updates: list[Update]) -> float:
    """From the advantages to the last optimizer step."""
    return statistics.median(update["trained"] - update["scored"] for update in updates)


def score_and_train(updates: list[Update]) -> float:
    return statistics.median(update["trained"] - update["sampled"] for update in updates)


def compared(found: Found, peaks: dict[str, float]) -> Table:
    """Ours beside TRL's."""
    theirs = found["TRL"]
    rows = []
    for name, updates in found.items():
        parts = [
            f"{1e3 * part(updates):.0f} ({part(updates) / part(theirs):.2f})"
            for part in (train, score_and_train, lambda updates: median(updates, "whole"))
        ]
        rows.append([name, *parts, f"{peaks[name]:.2f}"])
    columns = ["loop", "train, ms (of TRL's)", "score + train", "whole update", "peak memory, GiB"]
    return Table("Update of the tiny model: CPU time of one thread", columns, rows)


def stages(title: str, found: Found, peaks: dict[str, float], tokens: int) -> Table:
    """Where SAFE's and PPO's time goes."""
    rows = []
    for stage in STAGES:
        safe, ppo = (median(found[name], stage) for name in ("SAFE", "PPO"))
        share = safe / median(found["SAFE"], "whole")
        rows.append([stage, f"{1e3 * safe:.1f}", f"{1e3 * ppo:.1f}", f"{100 * share:.1f} %"])
    whole = {name: median(found[name], "whole") for name in ("SAFE", "PPO")}
    ratio = f"{whole['SAFE'] / whole['PPO']:.3f} of PPO's"
    rows.append(["whole", *(f"{1e3 * x:.1f}" for x in whole.values()), ratio])
    for label, place in (("p50", 50), ("p95", 95)):
        walls = [
            statistics.quantiles([u["wall"] for u in found[name]], n=100)[place - 1]
            for name in whole
        ]
        rows.append([f"wall clock, {label}", *(f"{1e3 * wall:.1f}" for wall in walls), ""])
    rows.append(["response tokens a second", *(f"{tokens / x:.0f}" for x in whole.values()), ""])
    rows.append(["peak memory, GiB", *(f"{peaks[name]:.2f}" for name in whole), ""])
    return Table(title, ["stage", "SAFE, ms", "PPO, ms", "share of SAFE"], rows)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for step.json")
    parser.add_argument("--updates", type=int, default=22)
    parser.add_argument("--demo-updates", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", nargs=3, metavar=("LOOP", "MODEL", "UPDATES"))
    given = parser.parse_args()
    if given.run:
        loop, model, updates = given.run
        print(json.dumps(run(loop, model, int(updates))))
        return
    found, peaks = interleaved(TRAINERS, "tiny", updates=given.updates, rounds=given.rounds)
    tokens = trainers.ROWS * trainers.RESPONSE
    tables = [compared(found, peaks), stages("Stages, tiny model", found, peaks, tokens)]
    for table in tables:
        print(table.markdown(), flush=True)
    found, peaks = interleaved(
        ("SAFE", "PPO"), "demo", updates=given.demo_updates, rounds=given.rounds
    )
    tables.append(stages("Stages, SmolLM2-135M (the demo)", found, peaks, tokens))
    write_results("step", tables, given.output)


if __name__ == "__main__":
    main()
