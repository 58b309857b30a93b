"""The table of runs."""

from pathlib import Path

import pytest

from examples.lm_rlhf.summarize import COLUMNS, main
from safe_rl.monitoring.run_log import RunLog


def save_run(folder: Path, updates: int) -> Path:
    log, timing = RunLog(folder / "log.jsonl"), RunLog(folder / "timing.jsonl")
    log.write({"record": "run", "settings": {}})
    for step in range(updates):
        late = step >= updates - 10
        log.write(
            {
                "record": "update",
                "step": step,
                "reward_mean": 0.75 if late else 0.25,
                "kl_nats_per_token": 0.3 if late else 0.0,
                "ref_perplexity": 20.0 if late else 10.0,
                "distinct_bigrams_fraction": 0.8 if late else 0.9,
            }
        )
        timing.write(
            {"record": "timing", "step": step, "sampling_seconds": 1.0, "peak_memory_gib": step}
        )
    return folder


def test_a_row_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(save_run(tmp_path / "a", 30))]) == 0
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].strip("|").split("|")]
    assert dict(zip(COLUMNS, cells, strict=True)) == {
        "run": "a",
        "updates": "30",
        "reward first → last": "0.250 → 0.750 (+0.500)",
        "KL, nats per token": "0.300",
        "perplexity × start's": "2.00",
        "bigrams × start's": "0.89",
        "minutes": "0.5",
        "peak memory, GiB": "29.00",
    }


def test_bad_runs_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(save_run(tmp_path / "short", 19))]) == 2
    assert "short has 19 updates, needs 20" in capsys.readouterr().err
    assert main([str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err
