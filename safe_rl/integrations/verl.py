"""The clipped surrogate as a policy loss of verl, registered when this module is imported.

Set ``VERL_USE_EXTERNAL_MODULES=safe_rl.integrations.verl``, so that every worker imports it, and
choose the loss with ``actor.policy_loss.loss_mode=safe_clipped``. A controller takes the place of
verl's through ``safe_rl.integrations.kl_coefficient``. Both need torch and verl alone, not torchrl.
"""

from typing import Any

from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss

from safe_ops import clipped_policy_terms


@register_policy_loss("safe_clipped")
def safe_clipped(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """``safe_ops.clipped_policy_terms``, aggregated by verl.

        l_t = -min( w_t A_t, clip(w_t, 1 - low, 1 + high) A_t )      w_t = exp(log pi - log old)

    Unlike verl's ``vanilla`` there is no second clip of negative advantages, padding may hold NaN,
    ``actor/ppo_kl`` is the k3 estimate, and the logs have the largest ratio and the effective
    sample size. verl hands its policy losses no log-probs of the reference: a penalty on the KL
    goes into its reward.

    Args:
        old_log_prob: [B, T], nats.
        log_prob: [B, T], nats.
        advantages: [B, T].
        response_mask: [B, T], bool or 0 and 1.
        loss_agg_mode: verl's.
        config: verl's ``ActorConfig``: the clip range and the global counts.
        rollout_is_weights: [B, T], verl's correction for another sampling engine.

    Returns:
        The loss, 0-d, and the diagnostics.

    Raises:
        ValueError: there is no ``config``.

    Example:
        >>> from verl.workers.config import ActorConfig
        >>> config = ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True)
        >>> one = torch.ones(1, 1)
        >>> loss, diagnostics = safe_clipped(-one, -one, 2 * one, one, config=config)
        >>> loss, diagnostics["actor/ratio_max"]
        (tensor(-2.), 1.0)
    """
    if config is None:
        raise ValueError("safe_clipped needs verl's actor config: it holds the clip range")
    mask = response_mask.bool()
    low, high = (
        config.clip_ratio if ratio is None else ratio
        for ratio in (config.clip_ratio_low, config.clip_ratio_high)
    )
    terms = clipped_policy_terms(log_prob, old_log_prob, advantages, mask=mask, clip=(low, high))
    loss = terms.loss
    if rollout_is_weights is not None:
        loss = loss * rollout_is_weights.masked_fill(~mask, 0.0)
    diagnostics = {
        "actor/pg_clipfrac": terms.clip_fraction,
        "actor/ppo_kl": terms.kl_old_k3,
        "actor/ratio_max": terms.ratio_max,
        "actor/effective_sample_size": terms.effective_sample_size,
    }
    return (
        agg_loss(loss, mask, loss_agg_mode, **config.global_batch_info),
        {name: value.item() for name, value in diagnostics.items()},
    )
