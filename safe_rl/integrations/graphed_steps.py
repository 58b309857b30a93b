"""Steps of decoding on a GPU, recorded as CUDA graphs: hundreds of launches become one."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F


def can_record(x: Tensor) -> bool:
    """Whether a step on this tensor can be a graph.

    On the present GPU, where no gradient is recorded, and not under autocast, whose cached weights
    a graph would go on reading.

    Example:
        >>> can_record(torch.ones(1))
        False
    """
    if not x.is_cuda or x.device.index != torch.cuda.current_device():
        return False
    return not torch.is_grad_enabled() and not torch.is_autocast_enabled("cuda")


class GraphedSteps:
    """A function of rows, recorded at its first call for a number of rows, replayed afterwards.

    Rows are filled up to a power of two, so that there are few graphs however many rows have
    ended. A graph reads the same memory at each replay: what ``step`` uses besides its arguments
    must stay where it is, and what it writes is written once more while it is recorded.

    Args:
        most: Rows that a step can take.

    Example:
        >>> GraphedSteps(most=6).sizes
        []
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._graphs: dict[int, Callable[..., Tensor]] = {}
        self._pool: Any = None

    @property
    def sizes(self) -> list[int]:
        """Numbers of rows that there are graphs for."""
        return sorted(self._graphs)

    def __call__(self, step: Callable[..., Tensor], place: Tensor, *rows: Tensor) -> Tensor:
        """The step's result, for as many rows as are given.

        Args:
            step: (place, rows, rows, ...) -> rows, all tensors; the same function at every call.
            place: What all rows share.
            rows: Each with B of them in dimension 0.

        Raises:
            ValueError: there are more rows than a step can take.
        """
        count = len(rows[0])
        if count > self._most:
            raise ValueError(f"rows must be at most {self._most}, got {count}")
        size = min(1 << (count - 1).bit_length(), self._most)
        inputs = place, *(_filled(x, size) for x in rows)
        if size not in self._graphs:
            # One pool for all: no two of them run at a time, and results are copied out.
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            own = tuple(x.clone() for x in inputs)
            graph = torch.cuda.make_graphed_callables(step, own, pool=self._pool)
            self._graphs[size] = cast(Callable[..., Tensor], graph)
        return self._graphs[size](*inputs)[:count].clone()


def _filled(x: Tensor, size: int) -> Tensor:
    """With rows of zeros behind."""
    return F.pad(x, [0, 0] * (x.ndim - 1) + [0, size - len(x)])
