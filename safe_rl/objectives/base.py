"""What every objective has: a network or none, keys that can be set, one denominator."""

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives import LossModule

from safe_ops import masked_sum
from safe_rl.keys import RESPONSE_MASK, RESPONSE_TOKENS_MEAN, read


class Objective(LossModule):
    """A loss on a batch: ``loss_*`` entries whose sum is the loss, and detached diagnostics.

    Losses are sums over the tokens that count, divided by the number of rows times
    ``response_tokens_mean`` of the whole rollout. That is linear: minibatches and shards of equal
    size average to the loss and gradient of the full batch. Without that key the tokens of the
    batch itself are counted.

    Args:
        network: Writes the fresh ``log_prob`` (and ``entropy``, ``state_values``) into a batch,
            in one forward. None: they are in the batch already.
    """

    @dataclass
    class _AcceptedKeys:
        response_mask: NestedKey = RESPONSE_MASK
        response_tokens_mean: NestedKey = RESPONSE_TOKENS_MEAN

    default_keys = _AcceptedKeys
    reads: tuple[str, ...] = ()
    """Names of the accepted keys that the loss itself reads."""
    writes: tuple[str, ...] = ()

    def __init__(self, network: TensorDictModuleBase | None = None) -> None:
        self._in_keys: list[NestedKey] | None = None
        super().__init__()
        self.network = network

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        """The advantages are made before the loss: no estimator holds these keys."""

    @property
    def in_keys(self) -> list[NestedKey]:
        """Keys that the network and the loss read."""
        made = set(self.network.out_keys) if self.network is not None else set()
        wanted = list(self.network.in_keys) if self.network is not None else []
        for name in self.reads:
            key = getattr(self.tensor_keys, name)
            if key not in made and key not in wanted:
                wanted.append(key)
        return wanted

    @property
    def out_keys(self) -> list[str]:
        """Keys that ``forward`` writes."""
        return list(self.writes)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Losses and diagnostics of one batch, each 0-d, in a TensorDict of their own."""
        if self.network is not None:
            tensordict = self.network(tensordict.copy())
        return TensorDict(self.terms(tensordict), [])

    def terms(self, batch: TensorDictBase) -> dict[str, Tensor]:
        """Losses and diagnostics from a batch that holds the fresh log-probs."""
        raise NotImplementedError(f"{type(self).__name__} must define terms")

    def mask_of(self, batch: TensorDictBase) -> Tensor:
        """bool [B, T]."""
        return read(batch, self.tensor_keys.response_mask)

    def token_mean(self, per_token: Tensor, mask: Tensor, batch: TensorDictBase) -> Tensor:
        """Sum over tokens by the rollout's count; see the class."""
        tokens_mean = batch.get(self.tensor_keys.response_tokens_mean, None)
        if tokens_mean is None:
            return masked_sum(per_token, mask) / mask.sum().clamp_min(1)
        # One number, expanded over the rows: their mean is it.
        count = tokens_mean.detach().mean() * mask.shape[0]
        return masked_sum(per_token, mask) / count.clamp_min(torch.finfo(count.dtype).tiny)
