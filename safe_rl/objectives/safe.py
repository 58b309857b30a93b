"""SAFE: clipped policy, soft-min value and gated KL, on one forward."""

from tensordict.nn import TensorDictModuleBase

from safe_rl.objectives.clipped_policy import ClippedPolicyLoss
from safe_rl.objectives.composite import SumOfObjectives
from safe_rl.objectives.gated_kl import GatedKLLoss
from safe_rl.objectives.soft_min_value import SoftMinValueLoss


class SAFELoss(SumOfObjectives):
    """The sum that users look for: ``loss_policy + loss_entropy + loss_value + loss_kl``.

    Args:
        network: Writes ``log_prob``, ``entropy`` and ``state_values`` in one forward, like
            ``CausalLMActorCritic``; None: they are in the batch.
        clip: Half-width of the trust interval of the ratio.
        entropy_coef: Of the entropy bonus.
        temperature: Of the soft-min in the diagnostics, in reward units.
        huber_delta: Reward units; None is the squared value loss.
        value_coef: Of the value loss.

    Raises:
        ValueError: a value is out of range, or a key is missing or of the wrong shape.

    Source: SAFE (arXiv 2602.04651).

    Example:
        >>> [key for key in SAFELoss().out_keys if key.startswith("loss_")]
        ['loss_policy', 'loss_entropy', 'loss_value', 'loss_kl']
    """

    def __init__(
        self,
        network: TensorDictModuleBase | None = None,
        *,
        clip: float = 0.2,
        entropy_coef: float = 0.01,
        temperature: float = 0.3,
        huber_delta: float | None = 0.5,
        value_coef: float = 0.5,
    ) -> None:
        super().__init__(
            network,
            [
                ClippedPolicyLoss(clip=clip, entropy_coef=entropy_coef),
                SoftMinValueLoss(
                    temperature=temperature, huber_delta=huber_delta, value_coef=value_coef
                ),
                GatedKLLoss(),
            ],
        )
