"""The clipped policy loss with an entropy bonus."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from safe_ops import clipped_policy_terms, masked_mean
from safe_rl.keys import read_per_token
from safe_rl.objectives.base import Objective, Reduction
from safe_rl.objectives.settings import Rule


class ClippedPolicyLoss(Objective):
    """PPO's clipped surrogate, and an entropy bonus.

        loss_policy  = -mean_t min( w_t A_t, clip(w_t) A_t )
        loss_entropy = -entropy_coef * mean_t H_t

    Args:
        network: See ``Objective``.
        clip: Half-width of the trust interval of the ratio, or (low, high). ``loss.clip = 0.1``
            changes it in place, ``loss.clip = (0.1, 0.2)`` a pair.
        entropy_coef: 0 for none. ``loss.entropy_coef = 0.003`` changes it in place.
        functional: See ``Objective``.
        reduction: See ``Objective``.

    Raises:
        ValueError: a value is out of range, or a key is missing or of the wrong shape.

    Source: Schulman et al. (arXiv 1707.06347).

    Example:
        >>> from tensordict import TensorDict
        >>> one = torch.ones(1, 2)
        >>> batch = TensorDict({"log_prob": -one, "old_log_prob": -one, "entropy": one,
        ...     "advantage": one, "response_mask": one.bool()}, [1])
        >>> ClippedPolicyLoss()(batch)["loss_policy"]
        tensor(-1.)
    """

    @dataclass
    class _AcceptedKeys(Objective._AcceptedKeys):
        log_prob: NestedKey = "log_prob"
        old_log_prob: NestedKey = "old_log_prob"
        advantage: NestedKey = "advantage"
        entropy: NestedKey = "entropy"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    _schedulable_buffers = frozenset({"clip", "entropy_coef"})
    settings: ClassVar[Mapping[str, Rule]] = {"clip": "positive", "entropy_coef": "not negative"}
    clip: Tensor
    entropy_coef: Tensor
    reads = ("log_prob", "old_log_prob", "advantage", "entropy", "response_mask")
    fresh = ("log_prob", "entropy")
    writes = (
        "loss_policy",
        "loss_entropy",
        "clip_fraction",
        "ratio_max",
        "effective_sample_size",
        "kl_old_k3_nats_per_token",
        "entropy_new_nats_per_token",
    )

    def __init__(
        self,
        network: TensorDictModuleBase | None = None,
        *,
        clip: float | tuple[float, float] = 0.2,
        entropy_coef: float = 0.01,
        functional: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(network, functional=functional, reduction=reduction)
        self._register_coefficient("clip", clip)
        self._register_coefficient("entropy_coef", entropy_coef)

    def terms(self, batch: TensorDictBase, mask: Tensor) -> dict[str, Tensor]:
        """See the class."""
        keys = self.tensor_keys
        policy = clipped_policy_terms(
            read_per_token(batch, keys.log_prob, mask),
            read_per_token(batch, keys.old_log_prob, mask),
            read_per_token(batch, keys.advantage, mask),
            mask=mask,
            clip=self.clip,
        )
        entropy = read_per_token(batch, keys.entropy, mask)
        return {
            "loss_policy": self.reduce(policy.loss, mask, batch),
            "loss_entropy": -self.entropy_coef * self.reduce(entropy, mask, batch),
            "clip_fraction": policy.clip_fraction,
            "ratio_max": policy.ratio_max,
            "effective_sample_size": policy.effective_sample_size,
            "kl_old_k3_nats_per_token": policy.kl_old_k3,
            "entropy_new_nats_per_token": masked_mean(entropy.detach(), mask),
        }
