"""What may be set on an objective: coefficients, in place, and hyper-parameters; no other name."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torchrl.objectives import LossModule
from torchrl.objectives.common import _LossMeta

Rule = Literal["positive", "positive or None", "not negative", "any"]


class _SealedOnceMade(_LossMeta):
    """Lets ``__init__`` set what it likes, and knows when it is over."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        made = super().__call__(*args, **kwargs)
        made.__dict__["_made"] = True
        return made


class SettableLoss(LossModule, metaclass=_SealedOnceMade):
    """A loss whose settings are checked when they are set, and which takes no misspelt ones.

    Coefficients are buffers: ``loss.entropy_coef = 0.003`` writes into the tensor, which is in the
    ``state_dict`` and costs a compiled graph no recompilation.
    """

    settings: ClassVar[Mapping[str, Rule]] = {}
    """Names of the coefficients and hyper-parameters, and what they may be."""

    names_on_a_sum: ClassVar[Mapping[str, str]] = {}
    """Those that have another name on a sum, where another part has one of the same name."""

    def _register_coefficient(self, name: str, value: Any) -> None:
        """A buffer of the default dtype; a pair is [2], None stays None."""
        check_setting(name, value, self.settings[name])
        if value is None:
            setattr(self, name, None)
            return
        number = torch.as_tensor(value, dtype=torch.get_default_dtype())
        if number.shape not in ((), (2,)):
            raise ValueError(f"{name} must be a number or a pair (low, high), got {value}")
        self.register_buffer(name, number)

    def __setattr__(self, name: str, value: Any) -> None:
        self._set(name, value, called=name)

    def _set(self, name: str, value: Any, *, called: str) -> None:
        """``called`` is the name in messages: what whoever sets it calls it."""
        if name in self.settings:
            check_setting(called, value, self.settings[name])
        if not self.__dict__.get("_made"):
            super().__setattr__(name, value)
        elif name in type(self)._all_schedulable_buffers:
            self._set_coefficient(name, value, called)
        elif self._takes(name, value):
            super().__setattr__(name, value)
        else:
            raise AttributeError(self._unknown(name))

    def _set_coefficient(self, name: str, value: Any, called: str) -> None:
        held = self._buffers.get(name)
        if held is None and value is None:
            return
        if held is None or value is None:
            given = "None" if held is None else "a number"
            raise ValueError(
                f"{called} was {given} when the loss was made, and with it the keys that are read "
                f"were settled: it cannot become {value}; float('inf') has no effect"
            )
        given = torch.as_tensor(value, dtype=held.dtype, device=held.device).detach()
        if given.ndim and given.shape != held.shape:
            raise ValueError(
                f"{called} must have the shape it was made with, {tuple(held.shape)}, got {value}"
            )
        held.copy_(given)

    def _takes(self, name: str, value: Any) -> bool:
        """A name of its own, private, or of a class; and modules, wherever they are put."""
        return (
            name.startswith("_")
            or isinstance(value, (nn.Module, nn.Parameter))
            or hasattr(type(self), name)
            or any(
                name in self.__dict__.get(place, {})
                for place in ("_buffers", "_modules", "_parameters")
            )
            or name in self.__dict__
        )

    def _unknown(self, name: str) -> str:
        kind = type(self).__name__
        if name in vars(self.tensor_keys):
            return (
                f"{name} is no attribute of {kind}: it is read from the batch, under "
                f"{getattr(self.tensor_keys, name)!r}; set_keys({name}=...) names another key"
            )
        return f"{kind} has no {name}; what can be set: {self._known_settings()}"

    def _known_settings(self) -> list[str]:
        return sorted([*self.settings, "reduction"])


def check_setting(name: str, value: Any, rule: Rule) -> None:
    """A number is what the rule says; a tensor is not looked at.

    Raises:
        ValueError: it is not.

    Example:
        >>> check_setting("clip", (0.2, 0.3), "positive")
    """
    if rule == "any" or isinstance(value, Tensor) or (value is None and rule == "positive or None"):
        return
    lowest = min(value) if isinstance(value, (tuple, list)) else value
    if lowest is None or not (lowest > 0 or (rule == "not negative" and lowest == 0)):
        limit = "not be negative" if rule == "not negative" else "be positive"
        raise ValueError(f"{name} must {limit}, got {value}")
