"""Rewards with the KL in them."""

from dataclasses import dataclass

from tensordict import TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey

from safe_ops import fill_masked, kl_shaped_reward
from safe_rl.keys import (
    RESPONSE_MASK,
    KeyedModule,
    padded,
    read_coefficient,
    read_mask,
    read_per_token,
)


class KLReward(KeyedModule):
    """Takes the KL off the reward, token by token, for PPO.

        reward_t <- reward_t - kl_reward_coef * k1_t

    Reads ``reward`` [B, T, 1], ``old_log_prob``, ``ref_log_prob``, ``response_mask`` [B, T] and
    ``kl_reward_coef`` [B]. Rewrites ``reward``, so call it once a rollout;
    ``set_keys(shaped_reward=...)`` writes elsewhere.

    Raises:
        ValueError: a key is missing or of the wrong shape.

    Source: Ziegler et al. (arXiv 1909.08593).

    Example:
        >>> from tensordict import TensorDict
        >>> one = torch.ones(1, 1)
        >>> batch = TensorDict({"reward": one, "old_log_prob": -one, "ref_log_prob": -2 * one,
        ...     "kl_reward_coef": torch.tensor([0.25]), "response_mask": one.bool()}, [1])
        >>> KLReward()(batch)["reward"].squeeze()
        tensor(0.7500)
    """

    @dataclass
    class _AcceptedKeys:
        reward: NestedKey = "reward"
        old_log_prob: NestedKey = "old_log_prob"
        ref_log_prob: NestedKey = "ref_log_prob"
        kl_reward_coef: NestedKey = "kl_reward_coef"
        response_mask: NestedKey = RESPONSE_MASK
        shaped_reward: NestedKey = "reward"

    default_keys = _AcceptedKeys

    def _set_in_out_keys(self) -> None:
        keys = self.tensor_keys
        self.in_keys = [
            keys.reward,
            keys.old_log_prob,
            keys.ref_log_prob,
            keys.kl_reward_coef,
            keys.response_mask,
        ]
        self.out_keys = [keys.shaped_reward]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the shaped reward, [B, T, 1]."""
        keys = self.tensor_keys
        tensordict = padded(tensordict, mask=keys.response_mask)
        mask = read_mask(tensordict, keys.response_mask, like=keys.reward)
        shaped = kl_shaped_reward(
            read_per_token(tensordict, keys.reward, mask),
            read_per_token(tensordict, keys.old_log_prob, mask),
            read_per_token(tensordict, keys.ref_log_prob, mask),
            mask=mask,
            coef=fill_masked(read_coefficient(tensordict, keys.kl_reward_coef, mask), mask),
        )
        return tensordict.set(keys.shaped_reward, shaped.unsqueeze(-1))
