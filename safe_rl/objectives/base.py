"""What every objective has: a network or none, keys that can be set, one denominator."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictParams, dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives import LossModule

from safe_ops import masked_sum
from safe_rl.keys import RESPONSE_MASK, RESPONSE_TOKENS_MEAN, at_least_float32, read


class Objective(LossModule):
    """A loss on a batch: ``loss_*`` entries whose sum is the loss, and detached diagnostics.

    Losses are sums over the tokens that count, divided by the number of rows times
    ``response_tokens_mean`` of the whole rollout. That is linear: minibatches and shards of equal
    size average to the loss and gradient of the full batch. Without that key the tokens of the
    batch itself are counted, and only the loss of the whole batch is exact.

    Tokens count where ``response_mask`` is True, and where TorchRL's own masks (``loss_mask_key``
    of ``LossModule``) are, if the batch has any.

    Args:
        network: Writes the fresh ``log_prob`` (and ``entropy``, ``state_values``) into a batch,
            in one forward. None: they are in the batch already.
        functional: Hold the network's parameters apart, as TorchRL's losses do. It breaks FSDP2
            and is slower around a language model.
    """

    @dataclass
    class _AcceptedKeys:
        response_mask: NestedKey = RESPONSE_MASK
        response_tokens_mean: NestedKey = RESPONSE_TOKENS_MEAN

    default_keys = _AcceptedKeys
    reads: tuple[str, ...] = ()
    """Names of the accepted keys that the loss itself must find."""
    may_read: tuple[str, ...] = ("response_tokens_mean",)
    """Those that it reads where they are there."""
    fresh: tuple[str, ...] = ()
    """Those of them that a network must write."""
    writes: tuple[str, ...] = ()

    network: TensorDictModuleBase | None
    network_params: TensorDictParams
    target_network_params: TensorDictParams

    def __init__(
        self, network: TensorDictModuleBase | None = None, *, functional: bool = False
    ) -> None:
        super().__init__()
        self._functional = functional and network is not None
        if self._functional:
            self.convert_to_functional(network, "network")
        else:
            self.network = network
        self._set_in_keys()
        self.out_keys = list(self.writes)

    @property
    def functional(self) -> bool:
        """Whether the network's parameters are held apart from it."""
        return self._functional

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        """The advantages are made before the loss, so only the loss itself has to follow."""
        self._set_in_keys()

    def _set_in_keys(self) -> None:
        """What the network reads, what the loss reads and the network does not write."""
        made = set(self.network.out_keys) if self.network is not None else set()
        wanted = list(self.network.in_keys) if self.network is not None else []
        # Some may be missing, but `batch.select(*in_keys)` must not lose them.
        for name in (*self.reads, *self.may_read):
            key = getattr(self.tensor_keys, name)
            if key not in made and key not in wanted:
                wanted.append(key)
        self.in_keys = wanted

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Losses and diagnostics of one batch, each 0-d, in a TensorDict of their own."""
        if self.network is not None:
            tensordict = self._run_network(self.network, tensordict.copy())
        return TensorDict(self.terms(tensordict, self.mask_of(tensordict)), [])

    def _run_network(
        self, network: TensorDictModuleBase, tensordict: TensorDictBase
    ) -> TensorDictBase:
        for name in self.fresh:
            key = getattr(self.tensor_keys, name)
            if key not in network.out_keys:
                raise ValueError(
                    f"network must write {key!r}, it writes {network.out_keys}; "
                    f"set_keys({name}=...) names another key"
                )
        if self._functional:
            with self.network_params.to_module(network):
                return network(tensordict)
        return network(tensordict)

    def terms(self, batch: TensorDictBase, mask: Tensor) -> dict[str, Tensor]:
        """Losses and diagnostics from a batch that holds the fresh log-probs.

        Args:
            batch: What ``reads`` names.
            mask: bool [B, T].
        """
        raise NotImplementedError(f"{type(self).__name__} must define terms")

    def mask_of(self, batch: TensorDictBase) -> Tensor:
        """bool [B, T]: the response mask, and TorchRL's masks where the batch has them."""
        mask = read(batch, self.tensor_keys.response_mask)
        if mask.dtype != torch.bool:
            raise ValueError(
                f"{self.tensor_keys.response_mask!r} must be bool (True = counts), got {mask.dtype}"
            )
        for key in self._loss_mask_keys():
            other = batch.get(key, None)
            if other is not None:
                mask = mask & self._expand_loss_mask(other.bool(), mask)
        return mask

    def token_mean(self, per_token: Tensor, mask: Tensor, batch: TensorDictBase) -> Tensor:
        """Sum over the tokens that count, by the rollout's number of them; see the class."""
        tokens_mean = batch.get(self.tensor_keys.response_tokens_mean, None)
        if tokens_mean is None:
            return masked_sum(per_token, mask) / mask.sum().clamp_min(1)
        # One number, expanded over the rows: their mean is it. Frames [N] are rows of one step.
        rows = math.prod(mask.shape[:-1]) if mask.ndim > 1 else mask.shape[0]
        count = at_least_float32(tokens_mean).detach().mean() * rows
        return masked_sum(per_token, mask) / count.clamp_min(torch.finfo(count.dtype).tiny)
