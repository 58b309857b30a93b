"""The one place that chooses a backend of torch.compile."""

import functools
import os
import shutil
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

_CXX_NAMES = ("g++", "clang++", "cl")
_chosen: list[str | None] = ["auto"]

P = ParamSpec("P")
R = TypeVar("R")


@functools.cache
def _has_compiler() -> bool:
    named = os.environ.get("CXX")
    return any(shutil.which(name) for name in ((named,) if named else _CXX_NAMES))


def compile_backend() -> str | None:
    """The backend that element-wise bodies are compiled with; None: they run eagerly.

    Unless ``set_compile_backend`` has said otherwise, inductor where a C++ compiler is found and
    None elsewhere: the results are the same up to rounding, the bodies take twice as long.

    Returns:
        The name of a registered backend, or None.

    Example:
        >>> compile_backend() in ("inductor", None)
        True
    """
    if _chosen[0] == "auto":
        return "inductor" if _has_compiler() else None
    return _chosen[0]


def set_compile_backend(backend: str | None) -> None:
    """Choose the backend of all later calls, in all threads; ``"auto"`` takes the choice back.

    Args:
        backend: ``"inductor"``, ``"aot_eager"`` or any other registered backend; None runs the
            bodies eagerly; ``"auto"`` is what holds before the first call.

    Raises:
        ValueError: no such backend is registered.

    Example:
        >>> set_compile_backend(None)
        >>> compile_backend() is None
        True
        >>> set_compile_backend("auto")
    """
    if backend not in (None, "auto"):
        known = torch.compiler.list_backends(exclude_tags=None)
        if backend not in known:
            raise ValueError(f"backend must be None, 'auto' or one of {known}, got {backend!r}")
    _chosen[0] = backend


def compiled_body(body: Callable[P, R]) -> Callable[P, R]:
    """Compile a function of tensors that runs inside an op, where no gradient is recorded.

    Compiled at the first call, for every shape at once; size 1, another dtype and another number of
    threads make a graph each. float64 is for checks and runs eagerly.

    Args:
        body: Pure, or changing its arguments in place.

    Returns:
        A function with the signature of ``body``.

    Example:
        >>> @compiled_body
        ... def double(x):
        ...     return x * 2
        >>> set_compile_backend(None)
        >>> double(torch.ones(2))
        tensor([2., 2.])
        >>> set_compile_backend("auto")
    """
    by_backend: dict[str, Callable[P, R]] = {}

    @functools.wraps(body)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        backend = compile_backend()
        double = any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in args)
        if backend is None or double:
            return body(*args, **kwargs)
        if backend not in by_backend:
            by_backend[backend] = torch.compile(body, backend=backend, dynamic=True, fullgraph=True)
        return by_backend[backend](*args, **kwargs)

    return run
