"""The value loss of a soft-min critic: every head is fitted."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from safe_ops import explained_variance, masked_mean, soft_min, value_terms
from safe_rl.keys import read_heads
from safe_rl.objectives.base import Objective, Reduction
from safe_rl.objectives.settings import Rule


class SoftMinValueLoss(Objective):
    """Huber loss of every head against one target, or against its own.

        loss_value = value_coef * mean_t mean_k Huber_delta(v_tk - target_t)

    ``value_target`` is [B, T, 1], or [B, T, K] with a target per head.

    Args:
        network: See ``Objective``.
        temperature: Of the soft-min in the diagnostics, in reward units.
        huber_delta: Reward units; None is the squared loss.
        value_coef: Factor of the loss. ``loss.value_coef = 0.1`` changes it in place.
        clip: Half-width of the change from ``old_state_values`` beyond which the value is clipped,
            in the units of the return; None: no clip. It often hurts. ``loss.clip = 0.1`` changes
            it in place, ``loss.value_clip = 0.1`` on a sum.
        functional: See ``Objective``.
        reduction: See ``Objective``.
        delay_value: See ``Objective``.

    Raises:
        ValueError: a value is out of range, or a key is missing or of the wrong shape.

    Source: SAFE (arXiv 2602.04651), critic loss.

    Example:
        >>> from tensordict import TensorDict
        >>> batch = TensorDict({"state_values": torch.zeros(1, 2, 2),
        ...     "value_target": torch.ones(1, 2), "response_mask": torch.ones(1, 2).bool()}, [1])
        >>> SoftMinValueLoss(huber_delta=None, value_coef=1.0)(batch)["loss_value"]
        tensor(0.5000)
    """

    @dataclass
    class _AcceptedKeys(Objective._AcceptedKeys):
        state_values: NestedKey = "state_values"
        old_state_values: NestedKey = "old_state_values"
        value_target: NestedKey = "value_target"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    _schedulable_buffers = frozenset({"value_coef", "clip"})
    settings: ClassVar[Mapping[str, Rule]] = {
        "temperature": "positive",
        "huber_delta": "positive or None",
        "value_coef": "not negative",
        "clip": "positive or None",
    }
    names_on_a_sum: ClassVar[Mapping[str, str]] = {"clip": "value_clip"}
    value_coef: Tensor
    clip: Tensor | None
    reads = ("state_values", "value_target", "response_mask")
    fresh = ("state_values",)
    shaped_like = "value_target"
    writes = ("loss_value", "explained_variance", "head_disagreement", "value_mean")

    def __init__(
        self,
        network: TensorDictModuleBase | None = None,
        *,
        temperature: float = 0.3,
        huber_delta: float | None = 0.5,
        value_coef: float = 0.5,
        clip: float | None = None,
        functional: bool = False,
        reduction: Reduction = "mean",
        delay_value: bool = False,
    ) -> None:
        if clip is not None:
            self.reads = (*self.reads, "old_state_values")
        super().__init__(
            network, functional=functional, reduction=reduction, delay_value=delay_value
        )
        self.temperature = temperature
        self.huber_delta = huber_delta
        self._register_coefficient("value_coef", value_coef)
        self._register_coefficient("clip", clip)

    def terms(self, batch: TensorDictBase, mask: Tensor) -> dict[str, Tensor]:
        """See the class."""
        keys = self.tensor_keys
        values = read_heads(batch, keys.state_values, mask)
        targets = read_heads(batch, keys.value_target, mask)
        loss = value_terms(
            values,
            targets,
            mask=mask,
            huber_delta=self.huber_delta,
            old_value=None if self.clip is None else read_heads(batch, keys.old_state_values, mask),
            clip=self.clip,
        )
        held = values.detach()
        value = soft_min(held, self.temperature)
        target = soft_min(targets.detach(), self.temperature)
        return {
            "loss_value": self.value_coef * self.reduce(loss, mask, batch),
            "explained_variance": explained_variance(value, target, mask=mask),
            "head_disagreement": masked_mean(held.amax(-1) - held.amin(-1), mask),
            "value_mean": masked_mean(value, mask),
        }
