"""Arithmetic that is the same on Python's numbers and on tensors.

The control laws are written in it (``safe_ops.controllers``): with operators, ``abs`` and these. A
condition is a bool or a bool tensor, joined with ``&``.
"""

import math
from collections.abc import Iterable
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

Number: TypeAlias = Any
"""A float, an int or a 0-d tensor; a list of floats or a tensor [W] where a history is meant."""

SelectedT = TypeVar("SelectedT")


def larger(a: Number, b: Number) -> Number:
    """The larger of two; NaN if one is.

    Example:
        >>> larger(1.0, 2.0), larger(torch.tensor(1.0), 2.0)
        (2.0, tensor(2.))
    """
    if isinstance(a, Tensor):
        return torch.maximum(a, b) if isinstance(b, Tensor) else a.clamp(min=b)
    if isinstance(b, Tensor):
        return b.clamp(min=a)
    return a if a > b or a != a else b


def smaller(a: Number, b: Number) -> Number:
    """The smaller of two; NaN if one is.

    Example:
        >>> smaller(1.0, 2.0), smaller(torch.tensor(1.0), 2.0)
        (1.0, tensor(1.))
    """
    if isinstance(a, Tensor):
        return torch.minimum(a, b) if isinstance(b, Tensor) else a.clamp(max=b)
    if isinstance(b, Tensor):
        return b.clamp(max=a)
    return a if a < b or a != a else b


def clamped(x: Number, lower: Number, upper: Number) -> Number:
    """``x`` within limits; the upper one wins. Infinite floats cost no operation.

    Example:
        >>> clamped(torch.tensor(3.0), -math.inf, 2.0), clamped(3, 1, 2)
        (tensor(2.), 2)
    """
    if isinstance(lower, Tensor) or lower != -math.inf:
        x = larger(x, lower)
    if isinstance(upper, Tensor) or upper != math.inf:
        x = smaller(x, upper)
    return x


def root(x: Number) -> Number:
    """The square root.

    Example:
        >>> root(4.0), root(torch.tensor(4.0))
        (2.0, tensor(2.))
    """
    return x.sqrt() if isinstance(x, Tensor) else math.sqrt(x)


def exponential(x: Number) -> Number:
    """e^x; beyond about 700 a float is refused by Python, where a tensor is infinite.

    Example:
        >>> exponential(0.0), exponential(torch.tensor(0.0))
        (1.0, tensor(1.))
    """
    return x.exp() if isinstance(x, Tensor) else math.exp(x)


def logarithm(x: Number) -> Number:
    """The natural logarithm, of what is positive.

    Example:
        >>> logarithm(1.0), logarithm(torch.tensor(1.0))
        (0.0, tensor(0.))
    """
    return x.log() if isinstance(x, Tensor) else math.log(x)


def negated(condition: bool | Tensor) -> Any:
    """``not``.

    Example:
        >>> negated(True), negated(torch.tensor(True))
        (False, tensor(False))
    """
    return ~condition if isinstance(condition, Tensor) else not condition


def select(condition: bool | Tensor, chosen: SelectedT, other: SelectedT) -> SelectedT:
    """``torch.where`` over two numbers, two histories or two states of one law.

    A condition that is a bool returns one of the two as it is.

    Example:
        >>> from safe_ops.controllers import EMA
        >>> state = EMA().init()
        >>> other = state._replace(value=torch.tensor(3.0))
        >>> select(True, other, state).value, select(torch.tensor(True), other, state).value
        (tensor(3.), tensor(3.))
    """
    if not isinstance(condition, Tensor):
        return chosen if condition else other
    if isinstance(chosen, tuple):
        parts = [select(condition, a, b) for a, b in zip(chosen, cast(Any, other), strict=True)]
        return type(chosen)(*parts)
    if isinstance(chosen, float) and isinstance(other, float):
        # Of two floats torch.where makes one of the default dtype.
        chosen = cast(Any, torch.full((), chosen, dtype=torch.float32, device=condition.device))
    return cast(Any, torch.where(condition, cast(Any, chosen), cast(Any, other)))


def all_within(limit: float, values: Iterable[Number]) -> Any:
    """Whether the magnitude of every number is at most a limit; that of a NaN is not.

    All are tensors or none is.

    Example:
        >>> all_within(9.0, [1.0, -2.0]), all_within(9.0, [torch.tensor([1.0, math.nan])])
        (True, tensor(False))
    """
    values = list(values)
    if isinstance(values[0], Tensor):
        # Counts are always finite.
        floats = [value.reshape(-1) for value in values if value.is_floating_point()]
        return (torch.cat(floats).abs() <= limit).all()
    # A NaN has no place in an order: it is looked for first.
    return all(map(math.isfinite, values)) and max(map(abs, values)) <= limit


def newest_first(history: Number, value: Number) -> Number:
    """A history with a new value at its front and without its last one.

    Example:
        >>> newest_first([3.0, 2.0], 4.0), newest_first(torch.tensor([3.0, 2.0]), torch.tensor(4.0))
        ([4.0, 3.0], tensor([4., 3.]))
    """
    if isinstance(history, Tensor):
        return torch.cat((value.view(1), history[:-1]))
    return [value, *history[:-1]]
