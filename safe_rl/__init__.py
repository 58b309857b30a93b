"""Objectives, advantages and controllers on TensorDict batches."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safe_rl.actor_critic import ActorCritic, Scores
    from safe_rl.advantages import SoftMinGAE
    from safe_rl.causal_lm import CausalLMActorCritic
    from safe_rl.controllers import ControllerModule, PolicyMeasurements
    from safe_rl.critic import SoftMinCritic
    from safe_rl.kl_baseline import KLBaseline
    from safe_rl.kl_reward import KLReward
    from safe_rl.objectives import (
        ClippedPolicyLoss,
        GatedKLLoss,
        PPOLoss,
        SAFELoss,
        SoftMinValueLoss,
        TokenKLLoss,
        total_loss,
    )

__all__ = [
    "ActorCritic",
    "CausalLMActorCritic",
    "ClippedPolicyLoss",
    "ControllerModule",
    "GatedKLLoss",
    "KLBaseline",
    "KLReward",
    "PPOLoss",
    "PolicyMeasurements",
    "SAFELoss",
    "Scores",
    "SoftMinCritic",
    "SoftMinGAE",
    "SoftMinValueLoss",
    "TokenKLLoss",
    "total_loss",
]

# Where a name is, loaded when it is first asked for: the adapters in safe_rl.integrations can then
# be imported beside a trainer whose tensordict is older than the one that torchrl needs.
_HOMES = {
    "ActorCritic": "actor_critic",
    "CausalLMActorCritic": "causal_lm",
    "ControllerModule": "controllers",
    "KLBaseline": "kl_baseline",
    "KLReward": "kl_reward",
    "PolicyMeasurements": "controllers",
    "Scores": "actor_critic",
    "SoftMinCritic": "critic",
    "SoftMinGAE": "advantages",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'objectives')}"), name)
