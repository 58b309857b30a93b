"""The one place that chooses a ``torch.compile`` backend, or calls a C compiler."""

import ctypes
import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")
R = TypeVar("R")

_CXX_NAMES = ("g++", "clang++", "cl")
_chosen: list[str | None] = ["auto"]


def compile_with(
    function: F, backend: str | None, *, dynamic: bool | None = True, fullgraph: bool = True
) -> F:
    """Compile a loss, a module or a whole loss part, by a backend's name; None leaves it as it is.

    Compilation happens at the first call. ``"aot_eager"`` captures the graph and runs it op by op:
    for finding what does not compile in seconds. ``"inductor"`` makes the fast code.

    Args:
        function: Function or module; what it reads from step to step must be tensors.
        backend: None, or a name that is registered with ``torch._dynamo.register_backend``.
        dynamic: True: one graph for all sizes from 2 (sizes that are equal at the first call are
            taken to be equal always). False: one a size. None: torch starts with the first size
            and generalises at the second, one compilation more.
        fullgraph: Whether what cannot be captured is an error. False cuts the graph there.

    Returns:
        The function itself, or its compiled form.

    Raises:
        ValueError: no backend of that name is registered; the message lists those that are.

    Example:
        >>> double = compile_with(lambda x: 2 * x, "aot_eager")
        >>> double(torch.tensor([1.0, 2.0]))
        tensor([2., 4.])
    """
    if backend is None:
        return function
    _check_registered(backend)
    return cast(F, torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=fullgraph))


@functools.cache
def _has_compiler() -> bool:
    named = os.environ.get("CXX")
    return any(shutil.which(name) for name in ((named,) if named else _CXX_NAMES))


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def has_kernels(x: Tensor) -> bool:
    """Whether the ops' Triton kernels run where a tensor is: on a GPU of NVIDIA.

    They are compiled as inductor's are, so only where that is the backend: none with another one,
    or with ``set_compile_backend(None)``.

    Example:
        >>> has_kernels(torch.ones(1))
        False
    """
    on_gpu = x.is_cuda and torch.version.cuda is not None
    return on_gpu and _has_triton() and compile_backend() == "inductor"


def is_plain(*tensors: Tensor) -> bool:
    """Whether the tensors' numbers may be read where they lie: on a CPU, neither traced nor mapped.

    Example:
        >>> is_plain(torch.ones(1)), is_plain(torch.ones(1, device="meta"))
        (True, False)
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    proxies = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    if proxies is not None or peek_interpreter_stack() is not None:
        return False
    return all(type(x) is Tensor and x.is_cpu for x in tensors)


def compile_backend() -> str | None:
    """The backend that element-wise bodies are compiled with; None: they run eagerly.

    Unless ``set_compile_backend`` has said otherwise, inductor where a C++ compiler is found and
    None elsewhere: the results are the same up to rounding, the bodies take longer. Where it is
    inductor and there is a C compiler, the advantages run in C on a CPU, and what the ops on hidden
    states do to float32 logits.

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
    if backend is not None and backend != "auto":
        _check_registered(backend)
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
            by_backend[backend] = compile_with(body, backend)
        return by_backend[backend](*args, **kwargs)

    return run


def c_library(*sources: Path, options: Sequence[str] = ()) -> ctypes.CDLL | None:
    """C compiled for this processor, with OpenMP; ``CC`` names the compiler.

    Args:
        sources: Files of C.
        options: More of the compiler's.

    Returns:
        Its functions; None where there is no C compiler, or not one for this processor.

    Example:
        >>> c_library(Path("no_such_file.c")) is None
        True
    """
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "library.so"
        command = shlex.split(os.environ.get("CC", "cc"))
        command += ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", *options]
        command += [*map(str, sources), "-lm", "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True)
            return ctypes.CDLL(str(library))
        except (OSError, subprocess.CalledProcessError):
            return None


def _check_registered(backend: str) -> None:
    # The default of list_backends leaves out what torch tags as a debugging aid: aot_eager too.
    registered = torch.compiler.list_backends(exclude_tags=())
    if backend not in registered:
        raise ValueError(
            f"backend must be None or a registered backend, got {backend!r}, "
            f"registered: {registered}"
        )
