"""The KL penalty and a policy loss of verl, with a controller, on a small policy.

    python -m examples.verl_controller

The parts are verl's: ``apply_kl_penalty`` pays the penalty and moves the controller, the registry
hands out advantages and loss. In a real run set ``trainer.kl_ctrl_in_reward`` of a PPO trainer.
"""

import argparse

import numpy as np
import torch
from verl import DataProto
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo.core_algos import AdvantageEstimator, get_adv_estimator_fn, get_policy_loss_fn
from verl.trainer.ppo.ray_trainer import apply_kl_penalty
from verl.workers.config import ActorConfig

import safe_rl.integrations.verl  # noqa: F401  registers "safe_clipped"
from safe_ops import token_log_probs
from safe_ops.controllers import AdaptiveKL, Controller
from safe_rl.integrations.kl_coefficient import KLCoefficient

ROWS, TOKENS, VOCABULARY = 256, 8, 6


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    """Train; returns verl's metrics per update."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=float, default=0.1, help="nats per token")
    parser.add_argument("--gain", type=float, default=0.2, help="0 keeps the coefficient fixed")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)

    torch.manual_seed(options.seed)
    policy = torch.zeros(TOKENS, VOCABULARY, requires_grad=True)
    reference = policy.detach().clone()
    optimizer = torch.optim.SGD([policy], lr=50.0)
    config = ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True)
    advantage_fn = get_adv_estimator_fn(AdvantageEstimator.RLOO)
    loss_fn = get_policy_loss_fn("safe_clipped")
    law = AdaptiveKL(target=options.target, initial_coef=0.05, gain=options.gain)
    kl_ctrl = KLCoefficient(Controller(law))

    metrics = []
    mask, one_prompt = torch.ones(ROWS, TOKENS), np.zeros(ROWS, dtype=object)
    for _ in range(options.updates):
        tokens = torch.distributions.Categorical(logits=policy.detach()).sample((ROWS,))
        log_prob, ref_log_prob = (
            token_log_probs(logits.expand(ROWS, -1, -1), tokens).log_prob
            for logits in (policy, reference)
        )
        old = log_prob.detach()
        batch = {"response_mask": mask, "old_log_probs": old, "ref_log_prob": ref_log_prob}
        # One reward per response, on its last token: the share of zeros.
        batch["token_level_scores"] = torch.zeros(ROWS, TOKENS)
        batch["token_level_scores"][:, -1] = (tokens == 0).float().mean(-1)
        data, measured = apply_kl_penalty(DataProto.from_dict(batch), kl_ctrl=kl_ctrl)
        rewards = data.batch["token_level_rewards"]
        advantages, _ = advantage_fn(rewards, mask, index=one_prompt, config=AlgoConfig(gamma=1.0))
        loss, diagnostics = loss_fn(old, log_prob, advantages, mask, "token-mean", config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        metrics.append(measured | diagnostics)
    return metrics


if __name__ == "__main__":
    for row in main()[::20]:
        print(
            "kl {actor/reward_kl_penalty:.3f} coef {actor/reward_kl_penalty_coeff:.3f}".format(
                **row
            )
        )
