"""What docs/other_trainers.md names as an example of a trainer is read at one sitting."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHORT = (
    "accelerate_loop.py",
    "openrlhf_controller.py",
    "standalone_controller.py",
    "transformers_trainer.py",
    "trl_beta.py",
    "verl_controller.py",
)


@pytest.mark.parametrize("name", SHORT)
def test_is_short(name: str) -> None:
    assert len((ROOT / "examples" / name).read_text(encoding="utf-8").splitlines()) < 80


def test_every_trainer_of_the_page_has_one() -> None:
    text = (ROOT / "docs" / "other_trainers.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "adapter" not in line]
    trainers = [row for row in rows if "safe_rl.integrations" in row or "accelerator" in row]
    examples = [re.findall(r"`examples/(\w+\.py)`", row) for row in trainers]
    # Each once, and all but the one that needs no trainer.
    assert sorted(examples) == [[name] for name in SHORT if name != "standalone_controller.py"]
