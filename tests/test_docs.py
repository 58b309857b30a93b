"""Pages name tests as evidence: each must be there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
# `a/test_b.py::test_c`, `a/test_b.py`, and `::test_c` in the file named before it.
REFERENCE = re.compile(r"`((?:tests/)?(?:\w+/)*test_\w+\.py)?(?:::(test_\w+))?`")


def references(text: str) -> list[tuple[str, str | None]]:
    found: list[tuple[str, str | None]] = []
    for path, name in REFERENCE.findall(text):
        if path or name:
            found.append((path.removeprefix("tests/") or found[-1][0], name or None))
    return found


def test_references_are_read() -> None:
    text = "see `a/test_b.py::test_c`, `::test_d` and `tests/test_e.py`, not `kl.py`"
    assert references(text) == [
        ("a/test_b.py", "test_c"),
        ("a/test_b.py", "test_d"),
        ("test_e.py", None),
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    for path, name in references(page.read_text(encoding="utf-8")):
        file = ROOT / "tests" / path
        assert file.is_file(), f"{page.name} names {path}"
        assert name is None or f"def {name}(" in file.read_text(encoding="utf-8"), name


def test_the_comparison_with_the_reference_has_a_row_per_finding() -> None:
    text = (ROOT / "docs" / "paper_vs_code.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (\d+) \|", text, re.M) == [str(n) for n in range(1, 15)]
