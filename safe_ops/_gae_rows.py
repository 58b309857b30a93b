"""Advantages and value targets in C, on a CPU: one pass over the steps of each row."""

import ctypes
import functools
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from safe_ops.compilation import c_library, compile_backend, is_plain

REALS = {torch.float32: "float", torch.float64: "double"}


def can_estimate(dtype: torch.dtype, *tensors: Tensor | None) -> bool:
    """Whether the arguments may be read where they lie, and there is a compiler."""
    # In this order: the other two cannot be traced.
    plain = is_plain(*[x for x in tensors if x is not None])
    return plain and compile_backend() == "inductor" and _library(dtype) is not None


def estimate(
    reward: Tensor,
    value: Tensor,
    mask: Tensor,
    terminated: Tensor,
    truncated: Tensor | None,
    bootstrap_value: Tensor | None,
    next_value: Tensor | None,
    discount: Tensor,
    gae_lambda: Tensor,
) -> tuple[Tensor, Tensor]:
    """Both, [B, T]. Numbers are all float32 or all float64; the last two 0-d, or each step's."""
    rows, steps = reward.shape
    advantage, target = value.new_empty(rows, steps), value.new_empty(rows, steps)
    # Kept in names until the call is over: a copy that nothing refers to is no memory any more.
    numbers = [x.contiguous() for x in (reward, value)]
    flags = [None if x is None else x.contiguous() for x in (mask, terminated, truncated)]
    behind = [None if x is None else x.contiguous() for x in (bootstrap_value, next_value)]
    factors = [x.expand(rows, steps) for x in (discount, gae_lambda)]
    cast(ctypes.CDLL, _library(value.dtype)).estimate_rows(
        *(rows, steps, torch.get_num_threads()),
        *(None if x is None else x.data_ptr() for x in (*numbers, *flags, *behind)),
        *(part for x in factors for part in (x.data_ptr(), *x.stride())),
        *(advantage.data_ptr(), target.data_ptr()),
    )
    return advantage, target


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    found = c_library(
        Path(__file__).with_suffix(".c"),
        options=(f"-DREAL={REALS[dtype]}", "-fno-math-errno", "-fno-trapping-math"),
    )
    if found is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_long
    factor = [pointer, number, number]
    found.estimate_rows.argtypes = [
        *(number, number, ctypes.c_int),
        *([pointer] * 7),
        *(factor * 2),
        *(pointer, pointer),
    ]
    return found
