"""What every doctest and test may rely on."""

import pytest
import torch


@pytest.fixture(autouse=True)
def doctest_names(doctest_namespace: dict[str, object]) -> None:
    """Examples in docstrings start where ``import torch`` has been typed."""
    doctest_namespace["torch"] = torch
