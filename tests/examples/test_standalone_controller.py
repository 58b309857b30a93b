import subprocess
import sys
from pathlib import Path

import pytest

from examples import standalone_controller as example
from safe_ops.controllers import PID, EntropyGatedKL

LAW = EntropyGatedKL(coef=1.0, kl_integral=PID(ki=0.05, lower=0.0, upper=0.3), pid=PID(kp=0.5))


def test_the_law_holds_the_kl_at_its_threshold_and_without_it_the_kl_runs_away():
    held = example.simulate(LAW)
    late = held["kl"][-40:]
    assert sum(late) / 40 == pytest.approx(held["kl_threshold"][-1], abs=0.02)
    free = example.simulate(EntropyGatedKL(coef=0.0))
    assert free["kl"][-1] == pytest.approx(example.DRIFT * (example.UPDATES - 1))


def test_the_gate_answers_to_the_collapse():
    gates = example.simulate(LAW)["entropy_gate"]
    half = example.UPDATES // 2
    assert gates[half - 1] == pytest.approx(2 / 2.3)
    assert gates[half] == pytest.approx(2 / 0.9)


def test_text_plot():
    drawn = example.text_plot({"kl": [0.0, 0.5, 1.0, 2.0]}, width=4)
    assert drawn == "          kl  ▂▄█ last 2.00, largest 2.00"


def test_runs_as_a_user_would(tmp_path):
    root = Path(example.__file__).parents[1]
    command = [sys.executable, "-m", "examples.standalone_controller"]
    text = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    assert [line.split()[0] for line in text.splitlines()] == list(example.ROWS)
    example.main(["--png", str(tmp_path / "loop.png")])
    assert (tmp_path / "loop.png").read_bytes().startswith(b"\x89PNG")
