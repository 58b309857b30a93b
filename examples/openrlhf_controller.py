"""The KL penalty of OpenRLHF with a controller in place of its own, on a small policy.

    python -m examples.openrlhf_controller                     # ours
    python -m examples.openrlhf_controller --controller theirs # its AdaptiveKLController
    python -m examples.openrlhf_controller --controller fixed  # its FixedKLController

``kl_ctl`` is read and moved as by OpenRLHF's trainer and experience maker, and the penalised reward
is theirs (``compute_reward``). They themselves need a GPU: flash-attn, deepspeed, vllm.
"""

import argparse

import torch
from openrlhf.trainer.ppo_utils import AdaptiveKLController, Experience, FixedKLController
from torch import Tensor

from safe_ops import clipped_policy_loss, token_log_probs
from safe_ops.controllers import AdaptiveKL, Controller
from safe_rl.integrations.kl_coefficient import KLCoefficient

ROWS, TOKENS, VOCABULARY = 256, 8, 6
START, GAIN = 0.05, 0.2


def penalised(experience: Experience, coef: float) -> Tensor:
    """Rewards [B, T]: a row's own on its last token, minus ``coef`` times the KL on each."""
    last = experience.action_mask.cumsum(-1).argmax(-1, keepdim=True)
    return (-coef * experience.kl).scatter_add(-1, last, experience.rewards[:, None])


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    """Train; returns KL (nats per token), coefficient and reward of every update."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--controller", choices=("ours", "theirs", "fixed"), default="ours")
    parser.add_argument("--target", type=float, default=0.1, help="nats per token")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)

    law = AdaptiveKL(target=options.target, initial_coef=START, gain=GAIN)
    kl_ctl = {
        "ours": KLCoefficient(Controller(law)),
        "theirs": AdaptiveKLController(START, options.target, horizon=ROWS / GAIN),
        "fixed": FixedKLController(START),
    }[options.controller]
    torch.manual_seed(options.seed)
    policy = torch.zeros(TOKENS, VOCABULARY, requires_grad=True)
    optimizer = torch.optim.SGD([policy], lr=50.0)
    reference = policy.detach().clone().expand(ROWS, -1, -1)

    metrics = []
    mask = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    for _ in range(options.updates):
        tokens = torch.distributions.Categorical(logits=policy.detach()).sample((ROWS,))
        new = token_log_probs(policy.expand(ROWS, -1, -1), tokens).log_prob
        old, base = new.detach(), token_log_probs(reference, tokens).log_prob
        score = (tokens == 0).float().mean(-1)  # the share of zeros in a response
        # Its "rloo": what a row has more than the mean of the others.
        rewards = score - (score.sum() - score) / (ROWS - 1)
        experience = Experience(
            action_mask=mask, action_log_probs=old, kl=old - base, rewards=rewards
        )
        shaped = penalised(experience, kl_ctl.value)
        experience.advantages = shaped.flip(-1).cumsum(-1).flip(-1)
        kl, reward = experience.kl.mean().item(), score.mean().item()
        metrics.append({"kl": kl, "coef": kl_ctl.value, "reward": reward})
        optimizer.zero_grad()
        clipped_policy_loss(new, old, experience.advantages, mask=mask).backward()
        optimizer.step()
        kl_ctl.update(kl, ROWS)
    return metrics


if __name__ == "__main__":
    for row in main()[::20]:
        print("kl {kl:.3f} coef {coef:.3f} reward {reward:.3f}".format(**row))
