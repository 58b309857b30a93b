"""Objectives, advantages and controllers on TensorDict batches."""

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
