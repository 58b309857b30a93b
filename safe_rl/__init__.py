"""Objectives, advantages and controllers on TensorDict batches."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safe_rl.advantages import KLReward, SoftMinGAE
    from safe_rl.causal_lm import CausalLMActorCritic
    from safe_rl.controllers import ControllerModule, PolicyMeasurements
    from safe_rl.critic import SoftMinCritic
    from safe_rl.kl_baseline import KLBaseline
    from safe_rl.objectives import (
        ClippedPolicyLoss,
        GatedKLLoss,
        PPOLoss,
        SAFELoss,
        SoftMinValueLoss,
        TokenKLLoss,
    )

__all__ = [
    "CausalLMActorCritic",
    "ClippedPolicyLoss",
    "ControllerModule",
    "GatedKLLoss",
    "KLBaseline",
    "KLReward",
    "PPOLoss",
    "PolicyMeasurements",
    "SAFELoss",
    "SoftMinCritic",
    "SoftMinGAE",
    "SoftMinValueLoss",
    "TokenKLLoss",
]

# Where a name is, loaded when it is first asked for: the adapters in safe_rl.integrations can then
# be imported beside a trainer whose tensordict is older than the one that torchrl needs.
_HOMES = {
    "CausalLMActorCritic": "causal_lm",
    "ControllerModule": "controllers",
    "KLBaseline": "kl_baseline",
    "KLReward": "advantages",
    "PolicyMeasurements": "controllers",
    "SoftMinCritic": "critic",
    "SoftMinGAE": "advantages",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'objectives')}"), name)
