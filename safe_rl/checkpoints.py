"""One file that holds a run: written whole or not at all, read whole or refused."""

import copy
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from safe_rl.sharded_tensors import divided_like, whole_on_cpu


class Stateful(Protocol):
    """Anything with a ``state_dict``: modules, optimizers, controllers."""

    def state_dict(self) -> Any:
        """What must be saved."""
        ...

    def load_state_dict(self, state_dict: Any) -> Any:
        """Take it back."""
        ...


class TrainableParameters:
    """The parameters of a module that are trained: the adapters, and not the frozen base.

    Those that are divided over ranks are saved whole: every rank calls ``state_dict``.

    Args:
        module: Its parameters with ``requires_grad`` count.

    Raises:
        ValueError: on loading, when the names or shapes saved are not those of the module.

    Example:
        >>> list(TrainableParameters(torch.nn.Linear(1, 1)).state_dict())
        ['weight', 'bias']
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Name and value of each trained parameter."""
        return {name: whole_on_cpu(p.detach()) for name, p in self._parameters.items()}

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Copy the values in place; nothing is copied unless all fit."""
        saved = {name: tuple(value.shape) for name, value in state_dict.items()}
        held = {name: tuple(value.shape) for name, value in self._parameters.items()}
        if saved != held:
            odd = sorted(set(saved.items()) ^ set(held.items()))[:4]
            raise ValueError(f"saved parameters are not those of this model; they differ in {odd}")
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(divided_like(state_dict[name], parameter))


class OptimizerState:
    """An optimizer in a checkpoint, its state whole where parameters are divided over ranks.

    Of plain parameters it is the optimizer's own ``state_dict``. Of divided ones every rank calls
    it, and what is saved loads on any number of ranks.

    Args:
        optimizer: Over the parameters as they are now; not over ones that are sharded later.

    Example:
        >>> layer = torch.nn.Linear(1, 1)
        >>> state = OptimizerState(torch.optim.Adam(layer.parameters())).state_dict()
        >>> sorted(state)
        ['param_groups', 'state']
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """Its ``state_dict``, all tensors whole."""
        held = self._optimizer.state_dict()
        return {
            **held,
            "state": {i: _each_tensor(whole_on_cpu, s) for i, s in held["state"].items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take it back, each rank its part."""
        groups = self._optimizer.param_groups
        parameters = dict(enumerate(p for group in groups for p in group["params"]))
        state = {
            place: _each_tensor(partial(_part_of, parameters[place]), values)
            for place, values in state_dict["state"].items()
        }
        self._optimizer.load_state_dict({**state_dict, "state": state})


def _each_tensor(function: Callable[[Tensor], Tensor], values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: function(v) if isinstance(v, Tensor) else v for k, v in values.items()}


def _part_of(parameter: Tensor, value: Tensor) -> Tensor:
    # Counts of steps are as they are.
    return divided_like(value, parameter) if value.shape == parameter.shape else value


class RandomStates:
    """torch's global generators, of the CPU and of this process's GPU, and any others of the run.

    Args:
        generators: By name.

    Example:
        >>> states = RandomStates(order=torch.Generator())
        >>> sorted(states.state_dict())
        ['order', 'torch']
    """

    def __init__(self, **generators: torch.Generator) -> None:
        self._generators = generators | {"torch": torch.default_generator}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """State of each generator."""
        states = {name: generator.get_state() for name, generator in self._generators.items()}
        return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Set every generator back.

        Raises:
            ValueError: other generators were saved, as on a machine with a GPU or without one.
        """
        held = self._generators.keys() | ({"cuda"} if torch.cuda.is_available() else set())
        if held != state_dict.keys():
            raise ValueError(
                f"random states saved are of {sorted(state_dict)}, this run has {sorted(held)}"
            )
        for name, generator in self._generators.items():
            generator.set_state(state_dict[name])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(state_dict["cuda"])


def save_checkpoint(
    path: str | os.PathLike[str], step: int, parts: Mapping[str, Stateful], *, write: bool = True
) -> None:
    """Write the state of every part, to a temporary name first.

    Args:
        path: A file; replaced only once the new one is complete on disk.
        step: Updates done.
        parts: By name.
        write: False on all ranks but one: they take part in collecting the states.

    Example:
        >>> import tempfile
        >>> layer = torch.nn.Linear(1, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(f"{folder}/checkpoint.pt", 3, {"layer": layer})
        ...     load_checkpoint(f"{folder}/checkpoint.pt", {"layer": layer})
        3
    """
    path = Path(path)
    # One name, so that what a killed process left behind is overwritten by the next.
    temporary = path.with_name(f".{path.name}.tmp")
    states = {name: part.state_dict() for name, part in parts.items()}
    if not write:
        return
    try:
        with open(temporary, "wb") as file:
            torch.save({"step": step, "parts": states}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: str | os.PathLike[str], parts: Mapping[str, Stateful]) -> int:
    """Give every part its state back; where one does not fit, all stay as they were.

    Args:
        path: What ``save_checkpoint`` wrote. Only tensors and plain values are unpickled.
        parts: The same names.

    Returns:
        Updates done.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut or is none of ours, its parts have other names, or one of them
            does not fit.
    """
    step, states = read_checkpoint(path)
    if set(states) != set(parts):
        raise ValueError(
            f"checkpoint {path} holds {sorted(states)}, this run needs {sorted(parts)}"
        )
    # Copies: the state of a module is the module's own tensors.
    before = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
    for position, (name, part) in enumerate(parts.items()):
        try:
            part.load_state_dict(states[name])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            for touched in list(parts)[: position + 1]:
                parts[touched].load_state_dict(before[touched])
            reason = " ".join(str(error).split())
            raise ValueError(f"checkpoint {path}, part {name!r} does not fit: {reason}") from error
    return step


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[int, dict[str, Any]]:
    """Updates done and the state of each part, which no part has been given yet.

    Args:
        path: What ``save_checkpoint`` wrote. Only tensors and plain values are unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut or is none of ours.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(f"{folder}/checkpoint.pt", 3, {"layer": torch.nn.Linear(1, 1)})
        ...     step, states = read_checkpoint(f"{folder}/checkpoint.pt")
        >>> step, list(states["layer"])
        (3, ['weight', 'bias'])
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    # Bytes that are no checkpoint raise whatever the unpickler trips over.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"checkpoint {path} cannot be read, it may be cut: {reason}") from error
    match saved:
        case {"step": int(step), "parts": dict(states)}:
            return step, states
    raise ValueError(f"checkpoint {path} is none of ours: it holds no step and parts")
