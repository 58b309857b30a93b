"""Products of a few rows with large matrices on a CPU."""

import math

import torch
from torch import Tensor

from safe_rl.integrations.c_kernels import compiled, kernels, require


def can_pack(weight: Tensor) -> bool:
    """Whether ``pack`` takes a weight: float32, on a CPU, and there is a C compiler.

    Example:
        >>> can_pack(torch.zeros(3, 2, dtype=torch.float64))
        False
    """
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and compiled() is not None


def pack(weight: Tensor, packed: Tensor | None = None) -> Tensor:
    """A weight in the order in which ``packed_linear`` reads it.

    Args:
        weight: [O, K], one that ``can_pack``.
        packed: What to write into, from an earlier call with a weight of this shape.

    Returns:
        float32 [panels, K, columns of a panel]; the O outputs are divided into panels.

    Raises:
        ValueError: the weight is not float32 on a CPU, or ``packed`` is of one of another shape.
    """
    require("weight", weight)
    kernel = kernels()
    weight, (width, depth) = weight.detach().contiguous(), weight.shape
    shape = packed_shape(width, depth)
    if packed is None:
        packed = weight.new_empty(shape)
    elif packed.shape != shape:
        raise ValueError(
            f"packed must be {shape} for a weight {tuple(weight.shape)}, got {tuple(packed.shape)}"
        )
    threads = torch.get_num_threads()
    kernel.pack(weight.data_ptr(), width, depth, packed.data_ptr(), threads)
    return packed


def packed_shape(width: int, depth: int) -> tuple[int, int, int]:
    """Of a packed weight [width, depth]: panels, depth, columns of a panel."""
    columns = kernels().columns()
    return -(-width // columns), depth, columns


def packed_linear(x: Tensor, packed: Tensor, *, width: int) -> Tensor:
    """The product with a packed weight, without a gradient.

        y = x W^T

    For 16 rows it takes a half to a third of the time of torch's product, which waits for memory
    when it does not multiply. A row's numbers do not depend on what other rows there are, nor on
    the number of threads.

    Args:
        x: float32 [..., K], on a CPU.
        packed: W [O, K], from ``pack``.
        width: O.

    Returns:
        float32 [..., O].

    Raises:
        ValueError: x is not float32 [..., K] on a CPU, or wants a gradient.
    """
    panels, depth, columns = packed.shape
    require("x", x)
    if x.shape[-1] != depth:
        raise ValueError(f"x must be [..., {depth}] as the weight is, got {tuple(x.shape)}")
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("x must need no gradient: call packed_linear under torch.no_grad()")
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], panels * columns)
    rows, threads = math.prod(x.shape[:-1]), torch.get_num_threads()
    kernels().multiply(
        x.data_ptr(), rows, depth, packed.data_ptr(), y.data_ptr(), y.shape[-1], threads
    )
    return y if y.shape[-1] == width else y[..., :width].contiguous()
