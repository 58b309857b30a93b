"""These tests need a GPU: `make test-gpu`. Elsewhere they are skipped."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

from safe_ops import set_compile_backend


@pytest.fixture(autouse=True)
def compiled_bodies(eager_bodies: None) -> None:
    """As users have them."""
    set_compile_backend("auto")


@pytest.fixture
def gpu() -> torch.device:
    """The device; skips the test where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device("cuda")


@contextmanager
def _no_waits() -> Iterator[None]:
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def no_waits(gpu: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """A context in which it is an error that the host waits for the device."""
    with pytest.raises(RuntimeError, match="synchronizing"), _no_waits():
        torch.ones(1, device=gpu).item()
    return _no_waits
