"""Several objectives on one forward of one network."""

from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from safe_rl.objectives.base import Objective, Reduction


class SumOfObjectives(Objective):
    """Runs the network once and hands the batch to each part.

    Keys and settings are set here for all parts: ``loss.set_keys(...)``,
    ``loss.entropy_coef = 0.0``, ``loss.huber_delta = None``; the clip of the value loss is
    ``loss.value_clip``. A subclass lists the keys of its parts in ``_AcceptedKeys``.

    Args:
        network: See ``Objective``.
        parts: Objectives without a network of their own.
        functional: See ``Objective``.
        reduction: See ``Objective``; that of the parts.
        delay_value: See ``Objective``.
    """

    def __init__(
        self,
        network: TensorDictModuleBase | None,
        parts: list[Objective],
        *,
        functional: bool = False,
        reduction: Reduction = "mean",
        delay_value: bool = False,
    ) -> None:
        self.reads = tuple(dict.fromkeys(name for part in parts for name in part.reads))
        optional = dict.fromkeys(name for part in parts for name in part.may_read)
        self.may_read = tuple(name for name in optional if name not in self.reads)
        self.fresh = tuple(dict.fromkeys(name for part in parts for name in part.fresh))
        self.writes = tuple(name for part in parts for name in part.writes)
        self.shaped_like = parts[0].shaped_like
        super().__init__(
            network, functional=functional, reduction=reduction, delay_value=delay_value
        )
        self.parts = nn.ModuleList(parts)
        self._objectives = tuple(parts)

    def set_keys(self, **kwargs: Any) -> None:
        """Set keys here and in every part that has them."""
        super().set_keys(**kwargs)
        for part in self._objectives:
            known = vars(part.tensor_keys)
            part.set_keys(**{name: key for name, key in kwargs.items() if name in known})

    def terms(self, batch: TensorDictBase, mask: Tensor) -> dict[str, Tensor]:
        """Losses and diagnostics of all parts."""
        return {
            name: value
            for part in self._objectives
            for name, value in part.terms(batch, mask).items()
        }

    # A setting belongs to a part, the reduction to all. Set on the sum, they would otherwise be
    # attributes that nothing reads.
    def __setattr__(self, name: str, value: Any) -> None:
        owners = self._owners(name)
        shared = self.__dict__.get("_objectives", ()) if name == "reduction" else ()
        for part, own in (*owners, *((part, name) for part in shared)):
            part._set(own, value, called=name)
        if not owners:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        for part, own in self._owners(name):
            return getattr(part, own)
        return super().__getattr__(name)

    def _owners(self, name: str) -> list[tuple[Objective, str]]:
        """The parts with a setting that has that name here, and its name there."""
        return [
            (part, own)
            for part in self.__dict__.get("_objectives", ())
            for own in part.settings
            if part.names_on_a_sum.get(own, own) == name
        ]

    def _known_settings(self) -> list[str]:
        own = super()._known_settings()
        of_parts = [
            part.names_on_a_sum.get(name, name)
            for part in self._objectives
            for name in part.settings
        ]
        return sorted({*own, *of_parts})
