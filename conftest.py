"""What every doctest and test may rely on."""

from collections.abc import Iterator

import pytest
import torch

from safe_ops import set_compile_backend


@pytest.fixture(autouse=True)
def doctest_names(doctest_namespace: dict[str, object]) -> None:
    """Examples in docstrings start where ``import torch`` has been typed."""
    doctest_namespace["torch"] = torch


@pytest.fixture(autouse=True)
def eager_bodies(request: pytest.FixtureRequest) -> Iterator[None]:
    """Bodies run eagerly, but in the tests marked slow: compiling takes seconds."""
    set_compile_backend("auto" if request.node.get_closest_marker("slow") else None)
    yield
    set_compile_backend("auto")
