"""C kernels for a CPU, compiled at first use."""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from safe_ops.compilation import c_library

NAMES = ("packed_linear.c", "attend_one.c", "rms_norm.c", "decode_layer.c")
SOURCES = [Path(__file__).with_name(name) for name in NAMES]


def require(name: str, x: Tensor) -> None:
    """Kernels read what lies in memory: float32 on a CPU, or an error that names ``x``."""
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise ValueError(f"{name} must be float32 on a CPU, got {x.dtype} on {x.device}")


def kernels() -> ctypes.CDLL:
    """The kernels, for who knows that there is a compiler.

    Raises:
        RuntimeError: there is none.
    """
    found = compiled()
    if found is None:
        raise RuntimeError("no C compiler that makes code for this processor: set CC")
    return found


@functools.cache
def compiled(*options: str) -> ctypes.CDLL | None:
    """The kernels for this processor; None where there is no C compiler, or not one for it.

    Args:
        options: More of the compiler's.
    """
    kernels = c_library(*SOURCES, options=options)
    if kernels is None:
        return None
    pointer, number, threads = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    kernels.columns.restype = kernels.padded.restype = number
    kernels.padded.argtypes = [number]
    kernels.pack.argtypes = [pointer, number, number, pointer, threads]
    kernels.multiply.argtypes = [pointer, number, number, pointer, pointer, number, threads]
    kernels.attend_one.argtypes = [*[pointer] * 5, threads]
    kernels.decode_layer.argtypes = [*[pointer] * 4, number, *[pointer] * 2, threads]
    kernels.rms_norm.argtypes = [pointer, pointer, pointer, number, number, ctypes.c_float]
    return kernels
