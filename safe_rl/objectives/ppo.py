"""PPO as a strong baseline: the KL is in the reward, not in the loss."""

from dataclasses import dataclass

from tensordict.nn import TensorDictModuleBase

from safe_rl.objectives.base import Reduction
from safe_rl.objectives.clipped_policy import ClippedPolicyLoss
from safe_rl.objectives.composite import SumOfObjectives
from safe_rl.objectives.soft_min_value import SoftMinValueLoss


class PPOLoss(SumOfObjectives):
    """``loss_policy + loss_entropy + loss_value``; shape the reward with ``KLReward`` before.

    Args:
        network: Writes ``log_prob``, ``entropy`` and ``state_values`` in one forward; None: they
            are in the batch.
        clip: Half-width of the trust interval of the ratio, or (low, high).
        entropy_coef: Of the entropy bonus.
        temperature: Of the soft-min in the diagnostics, in reward units; nothing with one head.
        huber_delta: Reward units; None is the squared value loss.
        value_coef: Of the value loss.
        value_clip: See ``SoftMinValueLoss``; None: no clip.
        functional: See ``Objective``.
        reduction: See ``Objective``.
        delay_value: See ``Objective``.

    Raises:
        ValueError: a value is out of range, or a key is missing or of the wrong shape.

    Source: Schulman et al. (arXiv 1707.06347), Ziegler et al. (arXiv 1909.08593).

    Example:
        >>> [key for key in PPOLoss().out_keys if key.startswith("loss_")]
        ['loss_policy', 'loss_entropy', 'loss_value']
    """

    @dataclass
    class _AcceptedKeys(ClippedPolicyLoss._AcceptedKeys, SoftMinValueLoss._AcceptedKeys):
        pass

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys

    def __init__(
        self,
        network: TensorDictModuleBase | None = None,
        *,
        clip: float | tuple[float, float] = 0.2,
        entropy_coef: float = 0.01,
        temperature: float = 0.3,
        huber_delta: float | None = None,
        value_coef: float = 0.5,
        value_clip: float | None = None,
        functional: bool = False,
        reduction: Reduction = "mean",
        delay_value: bool = False,
    ) -> None:
        super().__init__(
            network,
            [
                ClippedPolicyLoss(clip=clip, entropy_coef=entropy_coef, reduction=reduction),
                SoftMinValueLoss(
                    temperature=temperature,
                    huber_delta=huber_delta,
                    value_coef=value_coef,
                    clip=value_clip,
                    reduction=reduction,
                ),
            ],
            functional=functional,
            reduction=reduction,
            delay_value=delay_value,
        )
