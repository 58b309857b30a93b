"""Advantages from pessimistic values, and rewards with the KL in them."""

from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives.value import ValueEstimatorBase

from safe_ops import (
    fill_masked,
    generalized_advantage_estimate,
    kl_shaped_reward,
    masked_sum,
    soft_min,
)
from safe_rl.controllers import sum_over_ranks
from safe_rl.keys import (
    RESPONSE_MASK,
    KeyedModule,
    at_least_float32,
    read,
    read_coefficient,
    read_heads,
    read_per_token,
)


class SoftMinGAE(ValueEstimatorBase):
    """Generalised advantages whose value is the soft-min of the critic's heads.

        V_t = soft_min_k v_tk;   advantage, value_target = GAE(reward, V)

    Reads ``state_values`` [B, T, K] (the target critic's, before token t), ``reward``,
    ``terminated``, ``truncated`` [B, T, 1] and ``response_mask`` [B, T]; where there is one,
    ``bootstrap_values`` [B, K] after the last token, or ``("next", "state_values")`` [B, T, K]
    after every step, which rows with several episodes need. Writes ``state_value``,
    ``advantage`` and ``value_target`` [B, T, 1]; the heads share the target.

    Whitening is over all tokens of all ranks, so call this on the whole rollout.

    Args:
        temperature: Of the soft-min, in reward units.
        discount: Per token.
        gae_lambda: In [0, 1].
        average_gae: Whiten the advantages.

    Raises:
        ValueError: a value is out of range, a key is missing or of the wrong shape, or a
            truncated row has no value to bootstrap from (in a compiled graph, which cannot look
            at values, such a row becomes NaN).

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

    @dataclass
    class _AcceptedKeys:
        state_values: NestedKey = "state_values"
        reward: NestedKey = "reward"
        terminated: NestedKey = "terminated"
        truncated: NestedKey = "truncated"
        response_mask: NestedKey = RESPONSE_MASK
        bootstrap_values: NestedKey = "bootstrap_values"
        next_state_values: NestedKey = ("next", "state_values")
        value: NestedKey = "state_value"
        advantage: NestedKey = "advantage"
        value_target: NestedKey = "value_target"

    default_keys = _AcceptedKeys

    def __init__(
        self,
        *,
        temperature: float = 0.3,
        discount: float = 1.0,
        gae_lambda: float = 0.95,
        average_gae: bool = True,
    ) -> None:
        super().__init__(value_network=None)
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        for name, value in {"discount": discount, "gae_lambda": gae_lambda}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        self.temperature = temperature
        self.discount = discount
        self.gae_lambda = gae_lambda
        self.average_gae = average_gae
        # Resolved at the first read, the keys would cost a compiled graph a second compilation.
        self.set_keys()

    @property
    def in_keys(self) -> list[NestedKey]:
        """What is read; the last two may be missing."""
        keys = self.tensor_keys
        return [
            keys.state_values,
            keys.reward,
            keys.terminated,
            keys.truncated,
            keys.response_mask,
            keys.bootstrap_values,
            keys.next_state_values,
        ]

    @property
    def out_keys(self) -> list[NestedKey]:
        """What is written."""
        keys = self.tensor_keys
        return [keys.value, keys.advantage, keys.value_target]

    @dispatch
    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write ``state_value``, ``advantage`` and ``value_target``."""
        keys = self.tensor_keys
        mask = read(tensordict, keys.response_mask)
        value = soft_min(read_heads(tensordict, keys.state_values, mask), self.temperature)
        truncated = read_per_token(tensordict, keys.truncated, mask)
        following: dict[str, Tensor] = {}
        if tensordict.get(keys.next_state_values, None) is not None:
            after = read_heads(tensordict, keys.next_state_values, mask)
            following["next_value"] = soft_min(after, self.temperature)
        elif tensordict.get(keys.bootstrap_values, None) is not None:
            after = at_least_float32(tensordict.get(keys.bootstrap_values))
            following["bootstrap_value"] = soft_min(after, self.temperature)
        elif torch.compiler.is_compiling():
            # A graph cannot look at values: what eager mode refuses becomes NaN.
            lacking = (truncated & mask).any(-1, keepdim=True)
            value = torch.where(lacking, torch.nan, value)
        elif (truncated & mask).any():
            raise ValueError(
                f"a truncated row needs {keys.bootstrap_values!r} or {keys.next_state_values!r}, "
                "got neither; a response that was scored is terminated, not truncated"
            )
        estimate = generalized_advantage_estimate(
            read_per_token(tensordict, keys.reward, mask).to(value.dtype),
            value,
            mask=mask,
            terminated=read_per_token(tensordict, keys.terminated, mask),
            truncated=truncated,
            discount=self.discount,
            gae_lambda=self.gae_lambda,
            **following,
        )
        advantage = estimate.advantage
        if self.average_gae:
            advantage = whiten_over_ranks(advantage, mask)
        tensordict.set(keys.value, value.unsqueeze(-1))
        tensordict.set(keys.advantage, advantage.unsqueeze(-1))
        tensordict.set(keys.value_target, estimate.value_target.unsqueeze(-1))
        return tensordict


def whiten_over_ranks(x: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """``safe_ops.masked_whiten`` with the mean and variance of all ranks.

    Example:
        >>> whiten_over_ranks(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
        tensor([-1.,  1.,  0.])
    """
    total, count = sum_over_ranks(masked_sum(x.double(), mask), mask.sum())
    centred = fill_masked(x.double(), mask) - total / count.clamp_min(1)
    (square,) = sum_over_ranks(masked_sum(centred.square(), mask))
    whitened = centred * torch.rsqrt(square / count.clamp_min(1) + eps)
    return fill_masked(whitened, mask).to(x.dtype)


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
        mask = read(tensordict, keys.response_mask)
        shaped = kl_shaped_reward(
            read_per_token(tensordict, keys.reward, mask),
            read_per_token(tensordict, keys.old_log_prob, mask),
            read_per_token(tensordict, keys.ref_log_prob, mask),
            mask=mask,
            coef=fill_masked(read_coefficient(tensordict, keys.kl_reward_coef, mask), mask),
        )
        return tensordict.set(keys.shaped_reward, shaped.unsqueeze(-1))
