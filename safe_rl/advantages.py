"""Advantages from pessimistic values, and rewards with the KL in them."""

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from safe_ops import generalized_advantage_estimate, kl_shaped_reward, masked_whiten, soft_min
from safe_rl.keys import RESPONSE_MASK, read, read_per_token


class SoftMinGAE(TensorDictModuleBase):
    """Generalised advantages whose value is the soft-min of the critic's heads.

    Reads ``state_values`` [B, T, K], ``reward``, ``terminated``, ``truncated`` [B, T, 1],
    ``response_mask`` [B, T] and, where there is one, ``bootstrap_values`` [B, K]. Writes
    ``state_value``, ``advantage`` and ``value_target`` [B, T, 1]; the heads share the target.

    Args:
        temperature: Of the soft-min, in reward units.
        discount: Per token.
        gae_lambda: In [0, 1].
        average_gae: Whiten the advantages over the batch, which should be the whole rollout.

    Raises:
        ValueError: a key is missing or of the wrong shape.

    Source: Schulman et al. (arXiv 1506.02438); SAFE (arXiv 2602.04651).

    Example:
        >>> from tensordict import TensorDict
        >>> flag = torch.tensor([[[False], [True]]])
        >>> batch = TensorDict({"state_values": torch.zeros(1, 2, 2), "terminated": flag,
        ...     "truncated": flag & False, "reward": flag.float(),
        ...     "response_mask": torch.ones(1, 2).bool()}, [1])
        >>> SoftMinGAE(gae_lambda=1.0)(batch)["value_target"].squeeze()
        tensor([1., 1.])
    """

    in_keys = ["state_values", "reward", "terminated", "truncated", RESPONSE_MASK]  # noqa: RUF012
    out_keys = ["state_value", "advantage", "value_target"]  # noqa: RUF012

    def __init__(
        self,
        *,
        temperature: float = 0.3,
        discount: float = 1.0,
        gae_lambda: float = 0.95,
        average_gae: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.discount = discount
        self.gae_lambda = gae_lambda
        self.average_gae = average_gae

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write ``state_value``, ``advantage`` and ``value_target``."""
        mask = read(tensordict, RESPONSE_MASK)
        value = soft_min(read(tensordict, "state_values").float(), self.temperature)
        bootstrap = tensordict.get("bootstrap_values", None)
        estimate = generalized_advantage_estimate(
            read_per_token(tensordict, "reward", mask).float(),
            value,
            mask=mask,
            terminated=read_per_token(tensordict, "terminated", mask),
            truncated=read_per_token(tensordict, "truncated", mask),
            bootstrap_value=None if bootstrap is None else soft_min(bootstrap, self.temperature),
            discount=self.discount,
            gae_lambda=self.gae_lambda,
        )
        advantage: Tensor = estimate.advantage
        if self.average_gae:
            advantage = masked_whiten(advantage, mask)
        tensordict.set("state_value", value.unsqueeze(-1))
        tensordict.set("advantage", advantage.unsqueeze(-1))
        tensordict.set("value_target", estimate.value_target.unsqueeze(-1))
        return tensordict


class KLReward(TensorDictModuleBase):
    """Takes the KL off the reward, token by token, for PPO.

        reward_t <- reward_t - kl_reward_coef * k1_t

    Reads ``reward`` [B, T, 1], ``old_log_prob``, ``ref_log_prob``, ``response_mask`` [B, T] and
    ``kl_reward_coef`` [B]; rewrites ``reward``.

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

    in_keys = ["reward", "old_log_prob", "ref_log_prob", "kl_reward_coef", RESPONSE_MASK]  # noqa: RUF012
    out_keys = ["reward"]  # noqa: RUF012

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Rewrite ``reward``."""
        mask = read(tensordict, RESPONSE_MASK)
        shaped = kl_shaped_reward(
            read_per_token(tensordict, "reward", mask),
            read_per_token(tensordict, "old_log_prob", mask),
            read_per_token(tensordict, "ref_log_prob", mask),
            mask=mask,
            coef=read(tensordict, "kl_reward_coef").reshape(-1, 1),
        )
        return tensordict.set("reward", shaped.unsqueeze(-1))
