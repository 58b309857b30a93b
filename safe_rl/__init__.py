"""Objectives, advantages and controllers on TensorDict batches."""

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
