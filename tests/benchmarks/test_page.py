"""The page of results keeps its words and takes each benchmark's tables."""

import pytest

from tests.benchmarks.measure import Table
from tests.benchmarks.page import fill, section

PAGE = "Words.\n<!-- gae -->\nold\n<!-- end of gae -->\nMore, <!-- head --><!-- end of head -->."


def test_what_stands_between_the_markers_is_replaced():
    filled = fill(PAGE, "gae", r"new \1")
    assert filled == PAGE.replace("\nold\n", "\n\nnew \\1\n\n")
    assert fill(filled, "gae", "old").replace("\n\n", "\n") == PAGE


def test_a_page_without_the_markers_is_refused():
    with pytest.raises(ValueError, match=r"page must have '<!-- step -->'.* once, found 0"):
        fill(PAGE, "step", "")


def test_a_section_has_the_tables_and_what_they_depend_on():
    table = Table("Speed", ["by", "ms"], [["ours", "1"]])
    text = section({"circumstances": {"torch": "2.13.0"}, "tables": [list(table)]})
    assert text == "### Speed\n\n| by | ms |\n| --- | --- |\n| ours | 1 |\n\n*torch 2.13.0*"
