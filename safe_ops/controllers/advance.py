"""One step of a law: in Python's numbers where a CPU holds the state, else on its tensors."""

from array import array
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from safe_ops.compilation import is_plain

StateT = TypeVar("StateT", bound=tuple)


def advance(
    step: Callable[..., StateT], state: StateT, /, **measurements: float | Tensor
) -> StateT:
    """What every ``update`` calls: ``step(state, **measurements)``, wherever it is cheapest.

    An operation on a tensor of one number takes microseconds, one of Python fifty times less. So
    on a CPU ``step`` is given the state with floats for its float32 tensors, ints for its counts
    and lists for its histories, computes in float64, and what it returns is made into tensors
    again, rounded to float32. On a GPU, which would be waited for, in a graph of torch.compile,
    which would break, and under vmap, where a number is many, it is given the tensors themselves.
    Measurements are rounded to float32 either way, a law's gains only on tensors: on a CPU a
    measurement of a limit's own number may be beyond it by that.

    ``step`` is written for both, with operators and ``safe_ops.arithmetic``, in which a state of
    tensors reads like one of numbers.

    Args:
        step: Pure; returns a state of the same fields.
        state: Of tensors.
        measurements: Floats or 0-d tensors, by the names that errors call them.

    Raises:
        TypeError: a measurement is a bool or no number.
        ValueError: a measurement is a tensor of more than one number.

    Example:
        >>> from safe_ops.controllers import EMA
        >>> law = EMA()
        >>> advance(law.propose, law.init(), value=3.0).value
        tensor(3.)
    """
    for name, value in measurements.items():
        _check(name, value)
    given = list(measurements.values())
    leaves = list(_leaves(state))
    if not _may_be_read(leaves, given):
        like = leaves[0]
        return step(state, **{k: measurement(k, v, like=like) for k, v in measurements.items()})
    # Rounded as a tensor would be; what float32 cannot hold becomes infinite.
    numbers = (x.item() if isinstance(x, Tensor) else float(x) for x in given)
    rounded = array("f", numbers).tolist()
    before = _rebuilt(state, iter([leaf.tolist() for leaf in leaves]))
    after = step(before, **dict(zip(measurements, rounded, strict=True)))
    return _rebuilt(state, _as_tensors(list(_leaves(after)), leaves))


def measurement(name: str, value: float | Tensor, *, like: Tensor) -> Tensor:
    """A measurement as a law computes with it on tensors: float32, 0-d, on the state's device.

    Args:
        name: What errors call it.
        value: A float or a 0-d tensor; NaN and infinities pass, the law refuses them.
        like: A tensor of the state, for its device.

    Returns:
        0-d, float32, detached.

    Raises:
        TypeError: ``value`` is a bool or no number.
        ValueError: ``value`` is a tensor of more than one number.

    Example:
        >>> measurement("kl", 0.25, like=torch.tensor(0))
        tensor(0.2500)
    """
    _check(name, value)
    if isinstance(value, Tensor):
        # A copy: a law may keep it, and the caller may write into his.
        return value.detach().to(device=like.device, dtype=torch.float32, copy=True)
    # By way of float64: what float32 cannot hold becomes infinite instead of raising. Written on
    # the device: a copy from the host would be waited for.
    return torch.full((), float(value), dtype=torch.float64, device=like.device).to(torch.float32)


def _check(name: str, value: object) -> None:
    if isinstance(value, Tensor):
        if value.dtype == torch.bool or value.is_complex():
            raise TypeError(f"{name} must be a float or a real 0-d tensor, got {value.dtype}")
        if value.ndim != 0:
            raise ValueError(
                f"{name} must be one number, a float or a 0-d tensor, got shape "
                f"{tuple(value.shape)}: reduce it over tokens and ranks first"
            )
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float or a 0-d tensor, got {type(value).__name__}")


def _may_be_read(leaves: list[Tensor], measurements: list[float | Tensor]) -> bool:
    given = [value for value in measurements if isinstance(value, Tensor)]
    return is_plain(*leaves, *given) and all(x.dtype in CODES for x in leaves)


def _leaves(state: tuple) -> Iterator[Any]:
    for value in state:
        if isinstance(value, tuple):
            yield from _leaves(value)
        else:
            yield value


def _rebuilt(state: StateT, leaves: Iterator[Any]) -> StateT:
    """A state of the same fields with other leaves."""
    values = [_rebuilt(x, leaves) if isinstance(x, tuple) else next(leaves) for x in state]
    return type(state)(*values)


def _as_tensors(numbers: list[Any], like: list[Tensor]) -> Iterator[Tensor]:
    """Numbers as tensors of float32 and int64, all single ones of a dtype at once."""
    kinds = [leaf.dtype if leaf.ndim == 0 else None for leaf in like]
    parts = {}
    for dtype in {kind for kind in kinds if kind is not None}:
        of_it = [x for x, kind in zip(numbers, kinds, strict=True) if kind is dtype]
        # Copies: of views of one tensor none may be written to without the others. (torch's stub
        # says that there are none.)
        parts[dtype] = iter(cast(Any, torch.unbind_copy(_tensor(of_it, dtype))))
    for number, kind in zip(numbers, kinds, strict=True):
        yield _tensor(number, torch.float32) if kind is None else next(parts[kind])


CODES = {torch.float32: "f", torch.int64: "q"}


def _tensor(values: list[Any], dtype: torch.dtype) -> Tensor:
    # torch.tensor takes ten times as long for a hundred numbers.
    return torch.frombuffer(array(CODES[dtype], values), dtype=dtype)
