"""What a control law is, and the module that keeps its state."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from safe_ops.arithmetic import Number, all_within, negated, select

StateT = TypeVar("StateT", bound=tuple)
StateT_co = TypeVar("StateT_co", bound=tuple, covariant=True)

LARGEST = torch.finfo(torch.float32).max


class ControlLaw(Protocol[StateT_co]):
    """A frozen dataclass of gains, with its state passed in and out.

        state = law.init();  state = law.update(state, kl=..., ...)

    ``update`` is pure and reads its measurements (floats or 0-d tensors, already reduced over
    tokens and ranks) by keyword. The state is a NamedTuple, possibly nested: float32 tensors, 0-d
    but for histories [W], and int64 counts. ``step`` counts the updates taken in, ``non_finite``
    those refused: a measurement that is NaN or infinite holds the state. Ours end in ``settle``,
    which sees to that, and are called by ``advance``, which makes them cheap on a CPU.

    Example:
        >>> from safe_ops.controllers import EMA
        >>> law = EMA(decay=0.5)
        >>> law.update(law.init(), value=2.0).value
        tensor(2.)
    """

    def init(self) -> StateT_co:
        """The state before the first update."""
        ...

    # The parameters differ from law to law; a Callable of them is what they share.
    @property
    def update(self) -> Callable[..., StateT_co]:
        """``update(state, *, ...) -> state``, pure."""
        ...


class Controller(nn.Module, Generic[StateT]):
    """A law and its state, as a module: the state is in buffers, so in ``state_dict``.

    Call it once per rollout with the law's measurements; it takes one step and returns the new
    state. Buffers are named as by ``flatten_state``. The module moves between devices, but its
    state is never cast: in bfloat16 an average of decay 0.99 does not move.

    Args:
        law: A ``ControlLaw``. Its keyword-only parameters of ``update`` are ``measurements``, or
            ``optional`` where they have a default.

    Raises:
        TypeError: A measurement is missing, misspelt, or neither a float nor a 0-d tensor.
        ValueError: A measurement was not reduced to one number.

    Example:
        >>> from safe_ops.controllers import AdaptiveKL
        >>> controller = Controller(AdaptiveKL(target=0.1, initial_coef=1.0))
        >>> controller(kl=0.5).coef
        tensor(1.0200)
        >>> list(controller.state_dict())
        ['coef', 'error', 'step', 'non_finite']
    """

    def __init__(self, law: ControlLaw[StateT]) -> None:
        super().__init__()
        self.law = law
        state = law.init()
        self._structure = _structure(state)
        for name, leaf in flatten_state(state).items():
            self.register_buffer(name, leaf.clone())
        parameters = [
            p
            for p in inspect.signature(law.update).parameters.values()
            if p.kind is inspect.Parameter.KEYWORD_ONLY
        ]
        empty = inspect.Parameter.empty
        self.measurements: tuple[str, ...] = tuple(p.name for p in parameters if p.default is empty)
        self.optional: tuple[str, ...] = tuple(p.name for p in parameters if p.default is not empty)

    @property
    def state(self) -> StateT:
        """The current state, as clones: later calls do not change it."""
        return self._read(self._structure)

    @torch.no_grad()
    def forward(self, **measurements: float | Tensor) -> StateT:
        """Take one step of the law; returns the new state."""
        self._check_names(measurements)
        new = self.law.update(self.state, **measurements)
        for name, leaf in flatten_state(new).items():
            self._buffer(name).copy_(leaf)
        return new

    def extra_repr(self) -> str:
        """The law."""
        return repr(self.law)

    def _check_names(self, measurements: dict[str, Any]) -> None:
        missing = [name for name in self.measurements if name not in measurements]
        known = (*self.measurements, *self.optional)
        unknown = [name for name in measurements if name not in known]
        if missing or unknown:
            raise TypeError(
                f"{type(self.law).__name__} needs the measurements {', '.join(self.measurements)}; "
                f"missing: {', '.join(missing) or 'none'}, unknown: {', '.join(unknown) or 'none'}"
            )

    def _read(self, structure: tuple) -> StateT:
        kind, parts = structure
        return kind(
            *[
                self._buffer(part).clone() if isinstance(part, str) else self._read(part)
                for part in parts
            ]
        )

    def _buffer(self, name: str) -> Tensor:
        # Module.get_buffer looks for dots first: 118 calls of 1 us in one EntropyGatedKL step.
        return cast(Tensor, self._buffers[name])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Controller[StateT]":
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return cast("Controller[StateT]", super()._apply(move, recurse))


def flatten_state(state: tuple) -> dict[str, Tensor]:
    """A state as one flat table: what a log writes, what a checkpoint holds.

    A nested field is named ``outer__inner``: a dot cannot stand in the name of a buffer.

    Args:
        state: A NamedTuple of tensors and such NamedTuples.

    Returns:
        Name to tensor, in the order of the fields; the tensors themselves, not copies.

    Example:
        >>> from safe_ops.controllers import EMA
        >>> list(flatten_state(EMA().init()))
        ['value', 'weight', 'step', 'non_finite']
    """
    flat: dict[str, Tensor] = {}
    for name, value in zip(_fields(state), state, strict=True):
        if isinstance(value, Tensor):
            flat[name] = value
        else:
            for inner, leaf in flatten_state(value).items():
                flat[f"{name}__{inner}"] = leaf
    return flat


def settle(state: StateT, new: StateT, *measurements: Number) -> StateT:
    """End of most steps: take the new state, or refuse it whole and count.

    Refused when a measurement is not finite, or when a new value is not or does not fit float32 (an
    overflow of finite measurements; what Python's numbers hold on the way is none). ``step`` of the
    new state is set here.

    Args:
        state: Before the update, of tensors or of numbers; has ``step`` and ``non_finite``.
        new: What the law made of it; its ``step`` and ``non_finite`` are ignored.
        measurements: Numbers.

    Returns:
        ``new`` with ``step`` one higher, or ``state`` with ``non_finite`` one higher.

    Example:
        >>> from safe_ops.controllers import EMA
        >>> law = EMA()
        >>> law.update(law.init(), value=float("nan")).non_finite
        tensor(1)
    """
    accepted = all_within(LARGEST, [*measurements, *_numbers(new)])
    return take(state, new, accepted=accepted, refused=negated(accepted))


def take(state: StateT, new: StateT, *, accepted: bool | Tensor, refused: bool | Tensor) -> StateT:
    """The new state where ``accepted``, else the old one; both are counted.

    For a law that holds laws: it calls their ``propose`` and decides once for all of them. With
    neither set the state is held and nothing is counted.

    Args:
        state: Before the update; has ``step`` and ``non_finite``.
        new: What the law proposes; its ``step`` and ``non_finite`` are ignored.
        accepted: A bool or a bool tensor.
        refused: Likewise: a measurement was not finite.

    Example:
        >>> from safe_ops.controllers import EMA
        >>> law = EMA()
        >>> state = law.init()
        >>> new = law.propose(state, value=torch.tensor(3.0))
        >>> take(state, new, accepted=True, refused=False).value
        tensor(3.)
    """
    before = cast(Any, state)
    held = cast(Any, select(accepted, new, state))
    return held._replace(
        step=counted(before.step, accepted), non_finite=counted(before.non_finite, refused)
    )


def counted(count: Number, condition: bool | Tensor) -> Number:
    """One more where the condition is met.

    Example:
        >>> counted(3, True), counted(torch.tensor(3), torch.tensor(True))
        (4, tensor(4))
    """
    return count + condition


def _numbers(state: tuple) -> Iterator[Number]:
    """Every number of a state, histories' one by one where they are lists."""
    for value in state:
        if isinstance(value, tuple):
            yield from _numbers(value)
        elif isinstance(value, list):
            yield from value
        else:
            yield value


def zero() -> Tensor:
    """A float32 0 of a state, whatever the default dtype.

    Example:
        >>> zero()
        tensor(0.)
    """
    return torch.zeros((), dtype=torch.float32)


def zero_count() -> Tensor:
    """An int64 0 of a state.

    Example:
        >>> zero_count()
        tensor(0)
    """
    return torch.zeros((), dtype=torch.int64)


def _fields(state: tuple) -> tuple[str, ...]:
    return cast(Any, state)._fields


def _structure(state: tuple, prefix: str = "") -> tuple:
    """(type, names of its buffers), nested: enough to build the state back from buffers."""
    parts = [
        f"{prefix}{name}" if isinstance(value, Tensor) else _structure(value, f"{prefix}{name}__")
        for name, value in zip(_fields(state), state, strict=True)
    ]
    return type(state), tuple(parts)
