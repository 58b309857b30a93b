"""What runs have learnt, as one table, from their logs alone.

    python -m examples.lm_rlhf.summarize runs/seed0 runs/seed1

Means are over the first and the last ten updates.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from safe_rl.monitoring.run_log import LOG_NAME, TIMING_NAME, RunLog

UPDATES = 10
COLUMNS = (
    "run",
    "updates",
    "reward first → last",
    "KL, nats per token",
    "perplexity × start's",
    "bigrams × start's",
    "minutes",
    "peak memory, GiB",
)


def row(path: Path) -> tuple[str, ...]:
    """One run.

    Raises:
        ValueError: the run has fewer than twenty updates, whose means would overlap.
        FileNotFoundError: there is no log.
    """
    records = RunLog.read(path / LOG_NAME)
    updates = [record for record in records if record["record"] == "update"]
    if len(updates) < 2 * UPDATES:
        raise ValueError(f"run {path} has {len(updates)} updates, needs {2 * UPDATES}")
    timings = RunLog.read(path / TIMING_NAME)
    seconds = sum(
        value for record in timings for key, value in record.items() if key.endswith("_seconds")
    )
    peak = max(record["peak_memory_gib"] for record in timings)
    reward = _first_and_last(updates, "reward_mean")
    kl = _first_and_last(updates, "kl_nats_per_token")
    perplexity = _first_and_last(updates, "ref_perplexity")
    bigrams = _first_and_last(updates, "distinct_bigrams_fraction")
    return (
        path.name,
        str(len(updates)),
        f"{reward[0]:.3f} → {reward[1]:.3f} ({reward[1] - reward[0]:+.3f})",
        f"{kl[1]:.3f}",
        f"{perplexity[1] / perplexity[0]:.2f}",
        f"{bigrams[1] / bigrams[0]:.2f}",
        f"{seconds / 60:.1f}",
        f"{peak:.2f}",
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows under ``COLUMNS``, in Markdown.

    Example:
        >>> print(table([["a"] * len(COLUMNS)]).splitlines()[2][:9])
        | a | a |
    """
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _first_and_last(updates: Sequence[dict[str, Any]], key: str) -> tuple[float, float]:
    first, last = updates[:UPDATES], updates[-UPDATES:]
    return fmean(record[key] for record in first), fmean(record[key] for record in last)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line about what was wrong with the input."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    try:
        print(table([row(path) for path in parser.parse_args(argv).runs]))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
