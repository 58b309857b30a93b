"""Several objectives on one forward of one network."""

from dataclasses import make_dataclass
from typing import Any

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from safe_rl.objectives.base import Objective


class SumOfObjectives(Objective):
    """Runs the network once and hands the batch to each part; keys are set in all of them.

    Args:
        network: See ``Objective``.
        parts: Objectives without a network of their own.
    """

    def __init__(self, network: TensorDictModuleBase | None, parts: list[Objective]) -> None:
        super().__init__(network)
        self.parts = nn.ModuleList(parts)
        self._objectives = tuple(parts)
        defaults = {k: v for part in parts for k, v in vars(part.tensor_keys).items()}
        fields = [(name, Any, value) for name, value in defaults.items()]
        # LossModule looks its keys up by these names; those of a sum are those of its parts.
        accepted = make_dataclass("_AcceptedKeys", fields)
        setattr(self, "_AcceptedKeys", accepted)  # noqa: B010
        self.default_keys = accepted
        self._tensor_keys = accepted()
        self.reads = tuple(dict.fromkeys(name for part in parts for name in part.reads))
        self.writes = tuple(name for part in parts for name in part.writes)

    def set_keys(self, **kwargs: Any) -> None:
        """Set keys here and in every part that has them."""
        super().set_keys(**kwargs)
        for part in self._objectives:
            known = vars(part.tensor_keys)
            part.set_keys(**{name: key for name, key in kwargs.items() if name in known})

    def terms(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """Losses and diagnostics of all parts."""
        return {
            name: value for part in self._objectives for name, value in part.terms(batch).items()
        }
