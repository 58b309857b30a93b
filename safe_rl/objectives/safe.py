"""SAFE: clipped policy, soft-min value and gated KL, on one forward."""

from collections.abc import Callable
from dataclasses import dataclass

from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from safe_ops import kl_surrogate
from safe_rl.objectives.base import Objective, Reduction
from safe_rl.objectives.clipped_policy import ClippedPolicyLoss
from safe_rl.objectives.composite import SumOfObjectives
from safe_rl.objectives.gated_kl import GatedKLLoss, TokenKLLoss
from safe_rl.objectives.soft_min_value import SoftMinValueLoss


class SAFELoss(SumOfObjectives):
    """The sum that users look for: ``loss_policy + loss_entropy + loss_value + loss_kl``.

    Args:
        network: Writes ``log_prob``, ``entropy`` and ``state_values`` in one forward, like
            ``CausalLMActorCritic``; None: they are in the batch.
        clip: Half-width of the trust interval of the ratio, or (low, high).
        entropy_coef: Of the entropy bonus.
        temperature: Of the soft-min in the diagnostics, in reward units.
        huber_delta: Reward units; None is the squared value loss.
        value_coef: Of the value loss.
        value_clip: See ``SoftMinValueLoss``; None: no clip.
        surrogate: See ``GatedKLLoss``.
        token_kl_coef: Adds a ``TokenKLLoss``, as ``loss_token_kl``; None: without it.
        functional: See ``Objective``.
        reduction: See ``Objective``.
        delay_value: See ``Objective``.

    Raises:
        ValueError: a value is out of range, or a key is missing or of the wrong shape.

    Source: SAFE (arXiv 2602.04651).

    Example:
        >>> [key for key in SAFELoss().out_keys if key.startswith("loss_")]
        ['loss_policy', 'loss_entropy', 'loss_value', 'loss_kl']
    """

    @dataclass
    class _AcceptedKeys(
        ClippedPolicyLoss._AcceptedKeys,
        SoftMinValueLoss._AcceptedKeys,
        GatedKLLoss._AcceptedKeys,
        TokenKLLoss._AcceptedKeys,
    ):
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
        huber_delta: float | None = 0.5,
        value_coef: float = 0.5,
        value_clip: float | None = None,
        surrogate: Callable[..., Tensor] = kl_surrogate,
        token_kl_coef: float | None = None,
        functional: bool = False,
        reduction: Reduction = "mean",
        delay_value: bool = False,
    ) -> None:
        parts: list[Objective] = [
            ClippedPolicyLoss(clip=clip, entropy_coef=entropy_coef, reduction=reduction),
            SoftMinValueLoss(
                temperature=temperature,
                huber_delta=huber_delta,
                value_coef=value_coef,
                clip=value_clip,
                reduction=reduction,
            ),
            GatedKLLoss(surrogate=surrogate, reduction=reduction),
        ]
        if token_kl_coef is not None:
            parts.append(TokenKLLoss(token_kl_coef=token_kl_coef, reduction=reduction))
        super().__init__(
            network, parts, functional=functional, reduction=reduction, delay_value=delay_value
        )
