"""The display: plain lines where nobody watches a terminal, bars where somebody does."""

import io
import math
import re

import pytest
import torch
from rich.console import Console

from safe_rl.monitoring.progress import RunProgress, measurement_fields

RECORD = {
    "record": "update",
    "step": 0,
    "reward_mean": 0.25,
    "reward_std": 0.5,
    "kl_nats_per_token": 0.12,
    "kl_threshold_nats_per_token": 0.1,
    "entropy_nats_per_token": 2.0,
    "entropy_gate": 0.75,
    "phase": "climbing",
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(progress, updates=2):
    with progress:
        for _ in range(updates):
            progress.stage("sampling", total=4)
            progress.advance(4)
            progress.stage("updates", total=None)
            progress.advance()
            progress.update(RECORD)


def test_pipe_gets_one_plain_line_per_update_and_nothing_else(capsys):
    run(RunProgress(5, start=3))
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert re.fullmatch(
        r"update 4/5  reward 0\.250 ± 0\.500  KL 0\.1200 > threshold 0\.1000 nats/token  "
        r"entropy 2\.000 nats/token  gate 0\.75  phase climbing  \d+\.\d s",
        first,
    )
    assert second.startswith("update 5/5")
    assert err == ""


def test_forced_colours_in_ci_do_not_bring_the_live_display_back(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    run(RunProgress(2))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert len(out.splitlines()) == 2


def test_terminal_gets_both_bars_and_the_measurements():
    terminal = Terminal()
    console = Console(file=terminal, force_terminal=True, width=160)
    with RunProgress(3, start=1, console=console) as progress:
        progress.stage("sampling", total=8)
        progress.advance(6)
        progress._live.refresh()
        progress.update(RECORD)
        progress._live.refresh()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert re.search(r"run +.* 1/3 ", text)
    assert re.search(r"run +.* 2/3 ", text)
    assert re.search(r"sampling +.* 6/8 ", text)
    assert "reward 0.250 ± 0.500  KL 0.1200 > threshold 0.1000" in text
    # What stays on the screen at the end has no stage any more.
    assert "sampling" not in text.rpartition("run ")[2]


def test_a_stage_of_unknown_length_does_not_inherit_the_last_total():
    terminal = Terminal()
    console = Console(file=terminal, force_terminal=True, width=120)
    with RunProgress(1, console=console) as progress:
        progress.stage("scoring", total=77)
        progress.stage("updates", total=None)
        progress.advance(3)
        progress._live.refresh()
    assert "3/?" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())


def test_ctrl_c_gives_the_cursor_back_and_is_not_swallowed():
    terminal = Terminal()
    progress = RunProgress(3, console=Console(file=terminal, force_terminal=True))
    with pytest.raises(KeyboardInterrupt), progress:
        raise KeyboardInterrupt
    assert terminal.getvalue().rstrip().endswith("\x1b[?25h")


def test_fields_that_a_record_lacks_are_left_out():
    assert measurement_fields({}) == []
    assert measurement_fields({"reward_mean": torch.tensor(0.5), "kl_nats_per_token": 0.1}) == [
        "reward 0.500",
        "KL 0.1000 nats/token",
    ]


def test_what_is_not_finite_is_said_and_does_not_look_like_under_the_threshold():
    record = {
        "kl_nats_per_token": math.nan,
        "kl_threshold_nats_per_token": 0.1,
        "non_finite": 1.0,
    }
    assert measurement_fields(record) == [
        "KL nan ? threshold 0.1000 nats/token",
        "NON-FINITE",
    ]


def test_bad_totals_are_refused():
    with pytest.raises(ValueError, match="total_steps must not be negative, got -1"):
        RunProgress(-1)
    with pytest.raises(ValueError, match="start must be between 0 and total_steps 2, got 3"):
        RunProgress(2, start=3)
