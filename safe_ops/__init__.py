"""Pure tensor functions and control laws for RLHF; torch and nothing else."""

from safe_ops.clipped_policy import ClippedPolicyTerms, clipped_policy_loss, clipped_policy_terms
from safe_ops.compilation import compile_backend, compile_with, set_compile_backend
from safe_ops.gae import AdvantageEstimate, generalized_advantage_estimate
from safe_ops.gated_kl import entropy_gate, gated_kl_penalty, momentum_penalty, token_kl_penalty
from safe_ops.kl import (
    kl_exact,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_shaped_reward,
    kl_surrogate,
    kl_surrogate_token,
)
from safe_ops.kl_baseline import kl_baseline, kl_to_go
from safe_ops.linear_kl import linear_kl
from safe_ops.linear_log_probs import linear_log_probs
from safe_ops.linear_loss import linear_loss
from safe_ops.log_probs import TokenLogProbs, token_log_probs
from safe_ops.masked import fill_masked, masked_mean, masked_sum, masked_var, masked_whiten
from safe_ops.soft_min import soft_min, soft_min_weights
from safe_ops.value_loss import explained_variance, value_loss, value_terms

__all__ = [
    "AdvantageEstimate",
    "ClippedPolicyTerms",
    "TokenLogProbs",
    "clipped_policy_loss",
    "clipped_policy_terms",
    "compile_backend",
    "compile_with",
    "entropy_gate",
    "explained_variance",
    "fill_masked",
    "gated_kl_penalty",
    "generalized_advantage_estimate",
    "kl_baseline",
    "kl_exact",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_shaped_reward",
    "kl_surrogate",
    "kl_surrogate_token",
    "kl_to_go",
    "linear_kl",
    "linear_log_probs",
    "linear_loss",
    "masked_mean",
    "masked_sum",
    "masked_var",
    "masked_whiten",
    "momentum_penalty",
    "set_compile_backend",
    "soft_min",
    "soft_min_weights",
    "token_kl_penalty",
    "token_log_probs",
    "value_loss",
    "value_terms",
]
