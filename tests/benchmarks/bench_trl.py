"""The KL that a controller holds in TRL's trainers: the table of docs/other_trainers.md.

    .venv-trl/bin/python -m tests.benchmarks.bench_trl      # the environment of `make test-trl`

`examples.trl_beta` on a tiny random model; the least and the highest over the seeds of the mean KL
in the second half of a run.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import warnings
from pathlib import Path

from examples import trl_beta as example
from tests.benchmarks.measure import Table, write_results
from tests.tiny_models import TEXT, save_language_model

UPDATES, TARGET, RATE = 150, 0.2, 0.003
GAINS = (0.5, 0.2, 0.0)


def tiny_on_a_cpu(algorithm: str, seed: int) -> None:
    """Have the example build its trainer with short completions, and with a seed."""
    config, trainer = example.TRAINERS[algorithm]

    def build(*args: object, **given: object) -> object:
        fixed = {"use_cpu": True, "max_completion_length": 6, "disable_tqdm": True, "seed": seed}
        return config(*args, **(given | fixed | {"save_steps": 10 * UPDATES}))

    example.TRAINERS[algorithm] = build, trainer


def mean_kl(folder: Path, algorithm: str, gain: float, seed: int) -> float:
    """Of the second half of one run."""
    arguments = {
        "--model": folder / "model",
        "--prompts": folder / "prompts.txt",
        "--output": folder / "run",
        "--algorithm": algorithm,
        "--steps": UPDATES,
        "--target": TARGET,
        "--gain": gain,
        "--lr": RATE,
    }
    before = example.TRAINERS[algorithm]
    tiny_on_a_cpu(algorithm, seed)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = example.main([str(word) for pair in arguments.items() for word in pair])
    finally:
        example.TRAINERS[algorithm] = before
    kls = [entry["kl"] for entry in trainer.state.log_history if "beta" in entry]
    return statistics.fmean(kls[-UPDATES // 2 :])


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument(
        "--algorithms", nargs="+", choices=example.TRAINERS, default=list(example.TRAINERS)
    )
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_language_model(folder / "model")
        (folder / "prompts.txt").write_text("\n".join(TEXT * 4))
        for algorithm in given.algorithms:
            found = [
                [mean_kl(folder, algorithm, gain, seed) for seed in given.seeds] for gain in GAINS
            ]
            spans = [f"{min(kls):.2f} to {max(kls):.2f}" for kls in found]
            rows.append([algorithm.upper(), *spans])
            print(rows[-1], flush=True)
    columns = ["", *(f"gain {gain}" if gain else "beta fixed" for gain in GAINS)]
    title = f"Mean KL at a target of {TARGET}, {len(given.seeds)} seeds"
    write_results("trl", [Table(title, columns, rows)], None)


if __name__ == "__main__":
    main()
