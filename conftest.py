"""What every doctest and test may rely on."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from safe_ops import set_compile_backend

# Trainers of others pin versions that do not fit ours, or each other: each is installed in an
# environment of its own (Makefile), as are the peers of the benchmarks, and elsewhere what imports
# one cannot be collected.
OTHERS = {
    "trl": [
        "examples/trl_beta.py",
        "tests/benchmarks/bench_trl.py",
        "tests/safe_rl/integrations/test_trl.py",
    ],
    "verl": [
        "safe_rl/integrations/verl.py",
        "examples/verl_controller.py",
        "tests/safe_rl/integrations/test_verl.py",
    ],
    "openrlhf": [
        "examples/openrlhf_controller.py",
        "tests/safe_rl/integrations/test_openrlhf.py",
    ],
    "ray": ["tests/safe_rl/integrations/test_ray.py"],
    "vllm": ["tests/safe_rl/integrations/test_vllm.py"],
    "triton": ["safe_ops/_linear_kernels.py", "safe_ops/_scan_kernel.py"],
    "cut_cross_entropy": [
        "tests/benchmarks/bench_gpu.py",
        "tests/benchmarks/bench_head.py",
        "tests/benchmarks/head_peers.py",
    ],
}
collect_ignore = [
    path for library, paths in OTHERS.items() if find_spec(library) is None for path in paths
]


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
