"""One whole update: its stages, SAFE against our own PPO, and both against TRL's PPOTrainer.

    make bench                                             # all, into docs/benchmarks.md
    .venv-bench/bin/python -m tests.benchmarks.bench_step

CPU time of one thread. The loops run in processes of their own, fresh in every round, and take
turns of one update; the medians are over all updates but the first two of each process. The tiny
model is a Llama with 4 layers of 128 and 8192 tokens, LoRA on all projections, and a reward model
of its size; a batch is 16 x (24 + 24) tokens, two epochs of two minibatches. No response of ours
ends early, so that every loop has as many tokens. "demo" is
SmolLM2-135M as `make demo` runs it; "logits" is SAFE with the head's logits made, as the loop was
before it had `linear_log_probs`.
"""

import argparse
import resource
import statistics
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch

from tests.benchmarks import step_trainers as trainers
from tests.benchmarks.measure import Table, in_turns, write_results
from tests.benchmarks.stopwatch import Update

ON_TINY = ("SAFE", "PPO", "TRL")
ON_DEMO = ("SAFE", "PPO", "logits")
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


def run(model: str, updates: int, trainer: str, tell: Callable[[object], None]) -> float:
    """One process's part: updates of one loop; returns the process's peak memory in GiB."""
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if model == "tiny":
            trainers.make_tiny_model(folder)
        if trainer == "TRL":
            trainers.trl(folder, updates=updates, output=folder / "run", tell=tell)
        else:
            config = trainers.tiny_config(folder) if model == "tiny" else trainers.demo_config()
            trainers.ours(
                config,
                algorithm="ppo" if trainer == "PPO" else "safe",
                make_logits=trainer == "logits",
                updates=updates,
                output=folder / "run",
                tell=tell,
            )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def interleaved(
    names: tuple[str, ...], model: str, *, updates: int, rounds: int
) -> tuple[Found, dict[str, float]]:
    """Updates of every loop over all rounds, and its highest peak memory in GiB."""
    found: Found = {name: [] for name in names}
    peaks = dict.fromkeys(names, 0.0)
    for _ in range(rounds):
        told, returned = in_turns(partial(run, model, updates), names, turns=updates)
        for name in names:
            found[name] += told[name][WARM_UP:]
            peaks[name] = max(peaks[name], returned[name])
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
    """Where each loop's time goes."""

    def row(name: str, cells: Iterable[float], decimals: int = 0) -> list[str]:
        return [name, *(f"{cell:.{decimals}f}" for cell in cells)]

    whole = {name: median(updates, "whole") for name, updates in found.items()}
    rows = [row(s, (1e3 * median(u, s) for u in found.values()), 1) for s in STAGES]
    rows.append(row("whole", (1e3 * x for x in whole.values()), 1))
    rows.append(row("whole, of SAFE's", (x / whole["SAFE"] for x in whole.values()), 3))
    walls = {
        name: statistics.quantiles(
            [update["wall"] for update in updates], n=100, method="inclusive"
        )
        for name, updates in found.items()
    }
    for place in (50, 95):
        rows.append(row(f"wall clock, p{place}", (1e3 * w[place - 1] for w in walls.values())))
    rows.append(row("response tokens a second", (tokens / x for x in whole.values())))
    rows.append(row("peak memory, GiB", (peaks[name] for name in found), 2))
    return Table(title, ["ms", *found], rows)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for step.json")
    parser.add_argument("--updates", type=int, default=22)
    parser.add_argument("--demo-updates", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    found, peaks = interleaved(ON_TINY, "tiny", updates=given.updates, rounds=given.rounds)
    tokens = trainers.ROWS * trainers.RESPONSE
    ours = {name: found[name] for name in ON_TINY if name != "TRL"}
    tables = [compared(found, peaks), stages("Stages, tiny model", ours, peaks, tokens)]
    for table in tables:
        print(table.markdown(), flush=True)
    found, peaks = interleaved(ON_DEMO, "demo", updates=given.demo_updates, rounds=given.rounds)
    tables.append(stages("Stages, SmolLM2-135M (the demo)", found, peaks, tokens))
    write_results("step", tables, given.output)


if __name__ == "__main__":
    main()
