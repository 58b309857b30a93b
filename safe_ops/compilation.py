"""The one place that chooses a ``torch.compile`` backend."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def compile_with(
    function: F, backend: str | None, *, dynamic: bool | None = True, fullgraph: bool = True
) -> F:
    """What a ``compile=`` setting means, everywhere: None leaves a function as it is.

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
    # The default of list_backends leaves out what torch tags as a debugging aid: aot_eager too.
    registered = torch.compiler.list_backends(exclude_tags=())
    if backend not in registered:
        raise ValueError(
            f"backend must be None or a registered backend, got {backend!r}, "
            f"registered: {registered}"
        )
    return cast(F, torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=fullgraph))
