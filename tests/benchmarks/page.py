"""The page of results, from what the benchmarks have written.

    python -m tests.benchmarks.page runs/bench docs/benchmarks.md

The page keeps its own words; what stands between a benchmark's markers is replaced.
"""

import json
import re
import sys
from pathlib import Path

from tests.benchmarks.measure import Table


def section(found: dict) -> str:
    """Tables of one benchmark, with what they depend on."""
    facts = ", ".join(f"{name} {value}" for name, value in found["circumstances"].items())
    tables = [Table(*table).markdown() for table in found["tables"]]
    return "\n".join([*tables, f"*{facts}*"])


def fill(page: str, name: str, text: str) -> str:
    """Put a text between the markers of a name.

    Raises:
        ValueError: the page has no such markers.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    filled, count = re.subn(
        f"(?<={re.escape(begin)}).*?(?={re.escape(end)})",
        lambda _: f"\n\n{text}\n\n",
        page,
        flags=re.DOTALL,
    )
    if count != 1:
        raise ValueError(f"page must have {begin!r} and {end!r} once, found {count}")
    return filled


def main() -> None:
    """Fill in every benchmark that has written something."""
    folder, path = map(Path, sys.argv[1:])
    page = path.read_text(encoding="utf-8")
    for file in sorted(folder.glob("*.json")):
        page = fill(page, file.stem, section(json.loads(file.read_text())))
    path.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
