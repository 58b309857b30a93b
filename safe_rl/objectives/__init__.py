"""Losses as TorchRL modules: a batch in, ``loss_*`` entries and diagnostics out."""

from safe_rl.objectives.base import total_loss
from safe_rl.objectives.clipped_policy import ClippedPolicyLoss
from safe_rl.objectives.gated_kl import GatedKLLoss, TokenKLLoss
from safe_rl.objectives.ppo import PPOLoss
from safe_rl.objectives.safe import SAFELoss
from safe_rl.objectives.soft_min_value import SoftMinValueLoss

__all__ = [
    "ClippedPolicyLoss",
    "GatedKLLoss",
    "PPOLoss",
    "SAFELoss",
    "SoftMinValueLoss",
    "TokenKLLoss",
    "total_loss",
]
