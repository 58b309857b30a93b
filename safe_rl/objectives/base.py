"""What every objective has: a network or none, keys that can be set, one denominator."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictParams, dispatch
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torchrl.objectives import ValueEstimators
from torchrl.objectives.value import ValueEstimatorBase

from safe_ops import masked_sum
from safe_rl.advantages import SoftMinGAE
from safe_rl.keys import (
    RESPONSE_MASK,
    RESPONSE_TOKENS_MEAN,
    at_least_float32,
    dense,
    read_mask,
)
from safe_rl.objectives.settings import SettableLoss

Reduction = Literal["mean", "sum", "none"]


class Objective(SettableLoss):
    """A loss on a batch: ``loss_*`` entries whose sum is the loss, and detached diagnostics.

    Losses are sums over the tokens that count, divided by the tokens of the whole rollout: its
    ``response_tokens_mean`` for every entry of the batch. That is linear: minibatches and shards
    of equal size average to the loss and gradient of the full batch. Without that key the tokens
    of the batch itself are counted, and only the loss of the whole batch is exact.

    Tokens count where ``response_mask`` is True, and where TorchRL's own masks (``loss_mask_key``
    of ``LossModule``) are, if the batch has any. A batch of an environment, [N] or [B, T], needs
    no mask. Lazily stacked rows of unequal lengths are padded.

    Args:
        network: Writes the fresh ``log_prob`` (and ``entropy``, ``state_values``) into a batch,
            in one forward. None: they are in the batch already.
        functional: Hold the network's parameters apart, as TorchRL's losses do. It breaks FSDP2
            and is slower around a language model.
        reduction: "mean" is the above; "sum" leaves out the division; "none" gives the losses per
            token, [B, T], 0 where none counts.
        delay_value: Keep ``target_critic_params``, a copy of the network's ``critic`` that
            ``torchrl.objectives.SoftUpdate`` moves.

    Raises:
        ValueError: ``reduction`` is none of the three, or ``delay_value`` is asked of a network
            without a critic.
    """

    @dataclass
    class _AcceptedKeys:
        response_mask: NestedKey = RESPONSE_MASK
        response_tokens_mean: NestedKey = RESPONSE_TOKENS_MEAN

    default_keys = _AcceptedKeys
    default_value_estimator = ValueEstimators.GAE
    reads: tuple[str, ...] = ()
    """Names of the accepted keys that the loss itself must find."""
    may_read: tuple[str, ...] = ("response_tokens_mean",)
    """Those that it reads where they are there."""
    fresh: tuple[str, ...] = ()
    """Those of them that a network must write."""
    writes: tuple[str, ...] = ()
    shaped_like: str = "old_log_prob"
    """That of them which has one entry a step, whatever else the batch holds."""

    network: TensorDictModuleBase | None
    network_params: TensorDictParams
    target_network_params: TensorDictParams
    target_critic_params: TensorDictParams

    def __init__(
        self,
        network: TensorDictModuleBase | None = None,
        *,
        functional: bool = False,
        reduction: Reduction = "mean",
        delay_value: bool = False,
    ) -> None:
        super().__init__()
        self.reduction = reduction
        self._functional = functional and network is not None
        if self._functional:
            self.convert_to_functional(network, "network")
        else:
            self.network = network
        if delay_value:
            held = self.critic_params.apply(lambda parameter: parameter.data.clone())
            self.target_critic_params = TensorDictParams(held, no_convert=True)
            self._has_update_associated["critic"] = False
        self._set_in_keys()
        self.out_keys = list(self.writes)

    @property
    def reduction(self) -> Reduction:
        """See the class."""
        return self._reduction

    @reduction.setter
    def reduction(self, reduction: Reduction) -> None:
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
        self._reduction: Reduction = reduction

    @property
    def functional(self) -> bool:
        """Whether the network's parameters are held apart from it."""
        return self._functional

    @property
    def critic_network(self) -> TensorDictModuleBase | nn.Module | None:
        """The network's ``critic``, if it has one."""
        return getattr(self.network, "critic", None)

    @property
    def critic_params(self) -> TensorDictBase:
        """The parameters of the network's critic, which ``SoftUpdate`` follows."""
        critic = self.critic_network
        if critic is None:
            raise ValueError(
                f"network must have a critic, got {type(self.network).__name__}: "
                "see ActorCritic and CausalLMActorCritic"
            )
        if self._functional:
            return self.network_params["critic"]
        return TensorDict.from_module(critic)

    def set_keys(self, **kwargs: Any) -> None:
        """Read other keys than the default ones; None is the default one.

        A network that reads the response mask (``CausalLMActorCritic``) reads the same as the loss.

        Raises:
            ValueError: a name is not one of ``default_keys``.
        """
        super().set_keys(**kwargs)
        masked = hasattr(getattr(self.network, "tensor_keys", None), "response_mask")
        if "response_mask" in kwargs and masked and self.network is not None:
            self.network.set_keys(response_mask=self.tensor_keys.response_mask)
            self._set_in_keys()

    def make_value_estimator(
        self,
        value_type: ValueEstimators | ValueEstimatorBase | type[ValueEstimatorBase] | None = None,
        **hyperparams: Any,
    ) -> "Objective":
        """Set ``value_estimator``: ``SoftMinGAE`` over the network's critic, or one that is given.

        A critic that is a TensorDict module is called by the estimator, before and after each
        step; of any other, as in ``CausalLMActorCritic``, the values are read from the batch. From
        then on a batch without ``advantage`` or ``value_target`` gets both from the estimator, in
        place of one that it had.

        Args:
            value_type: ``ValueEstimators.GAE`` or ``SoftMinGAE``, which None means too, or another
                estimator or its class. A ``SoftMinGAE`` that is given takes over the loss's keys.
            hyperparams: Of the estimator; TorchRL's ``gamma`` and ``lmbda``, .99 and .95 unless
                given, are ``discount`` and ``gae_lambda``.

        Returns:
            The objective.

        Raises:
            NotImplementedError: ``value_type`` names another estimator.
            TypeError: a hyper-parameter is not one of ``SoftMinGAE``, or is given under both names.
        """
        own = value_type in (None, "gae", ValueEstimators.GAE, SoftMinGAE)
        if not own and isinstance(value_type, (ValueEstimatorBase, type)):
            super().make_value_estimator(value_type, **hyperparams)
            self._forward_value_estimator_keys()
            return self
        if not own:
            raise NotImplementedError(
                f"{type(self).__name__} makes advantages with ValueEstimators.GAE, "
                f"got {value_type}; an estimator of your own can be given as it is"
            )
        # TorchRL names the device of the estimator's buffers; there are none.
        hyperparams.pop("device", None)
        for theirs, ours, default in (("gamma", "discount", 0.99), ("lmbda", "gae_lambda", 0.95)):
            if theirs in hyperparams and ours in hyperparams:
                raise TypeError(f"give {ours} or {theirs}, which is TorchRL's name of it, not both")
            hyperparams.setdefault(ours, hyperparams.pop(theirs, default))
        critic = self.critic_network
        called = isinstance(critic, TensorDictModuleBase)
        hyperparams.setdefault("value_network", critic if called else None)
        self.value_type = ValueEstimators.GAE
        self._value_estimator = SoftMinGAE(**hyperparams)
        self._forward_value_estimator_keys()
        return self

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        """Keys of the same name are the same entry: the estimator's follow those of the loss."""
        estimator = self._value_estimator
        if isinstance(estimator, SoftMinGAE):
            shared = vars(self.tensor_keys).keys() & vars(estimator.tensor_keys).keys()
            estimator.set_keys(**{name: getattr(self.tensor_keys, name) for name in shared})
        self._set_in_keys()

    def _set_in_keys(self) -> None:
        """What the network reads, what the loss reads and the network does not write."""
        made = set(self.network.out_keys) if self.network is not None else set()
        wanted = list(self.network.in_keys) if self.network is not None else []
        # Some may be missing, but `batch.select(*in_keys)` must not lose them.
        read = [getattr(self.tensor_keys, name) for name in (*self.reads, *self.may_read)]
        wanted += [key for key in read if key not in made]
        if self._estimated() and self._value_estimator is not None:
            wanted += self._value_estimator.in_keys
        self.in_keys = list(dict.fromkeys(wanted))

    def _estimated(self) -> list[NestedKey]:
        """What the loss reads and an estimator writes."""
        return [
            getattr(self.tensor_keys, name)
            for name in ("advantage", "value_target")
            if name in self.reads
        ]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Losses and diagnostics of one batch, each 0-d, in a TensorDict of their own."""
        keys = [*self.in_keys, *self._loss_mask_keys()]
        tensordict = dense(tensordict, keys, mask=self.tensor_keys.response_mask)
        if self._value_estimator is not None:
            missing = [key for key in self._estimated() if tensordict.get(key, None) is None]
            if missing:
                tensordict = self._estimate(self._value_estimator, tensordict.copy())
        if self.network is not None:
            tensordict = self._run_network(self.network, tensordict.copy())
        return TensorDict(self.terms(tensordict, self.mask_of(tensordict)), [])

    @torch.no_grad()
    def _estimate(
        self, estimator: ValueEstimatorBase, tensordict: TensorDictBase
    ) -> TensorDictBase:
        """Advantages and value targets: of the critic as it is, and of its target, if there is one.

        As TorchRL's PPO, the critic values the states and its target what follows them. Where the
        values come of one forward with the policy, the target's are those of both.
        """
        delayed = "target_critic_params" in self._modules
        target = self.target_critic_params if delayed else None
        critic = self.critic_network
        if critic is not None and estimator.value_network is critic:
            params = self.critic_params.detach() if self._functional else None
            return estimator(tensordict, params=params, target_params=target)
        if isinstance(estimator, SoftMinGAE) and estimator.value_network is None:
            keys = estimator.tensor_keys
            lacking = tensordict.get(keys.state_values, None) is None
            if lacking and self.network is not None and keys.state_values in self.network.out_keys:
                valued = self._run_network(self.network, tensordict.copy(), critic_params=target)
                values = valued.select(keys.state_values, keys.bootstrap_values, strict=False)
                tensordict.update(values)
        return estimator(tensordict)

    def _run_network(
        self,
        network: TensorDictModuleBase,
        tensordict: TensorDictBase,
        critic_params: TensorDictBase | None = None,
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
                return _run_with(network, tensordict, self.critic_network, critic_params)
        return _run_with(network, tensordict, self.critic_network, critic_params)

    def terms(self, batch: TensorDictBase, mask: Tensor) -> dict[str, Tensor]:
        """Losses and diagnostics from a batch that holds the fresh log-probs.

        Args:
            batch: What ``reads`` names.
            mask: bool [B, T].
        """
        raise NotImplementedError(f"{type(self).__name__} must define terms")

    def mask_of(self, batch: TensorDictBase) -> Tensor:
        """bool [B, T]: the response mask, and TorchRL's masks where the batch has them."""
        keys = self.tensor_keys
        mask = read_mask(batch, keys.response_mask, like=getattr(keys, self.shaped_like))
        for key in self._loss_mask_keys():
            other = batch.get(key, None)
            if other is not None:
                mask = mask & self._expand_loss_mask(other.bool(), mask)
        return mask

    def reduce(self, per_token: Tensor, mask: Tensor, batch: TensorDictBase) -> Tensor:
        """As ``reduction`` says: 0-d, or what was given, 0 where nothing counts."""
        if self.reduction == "none":
            return torch.where(mask, per_token, torch.zeros_like(per_token))
        if self.reduction == "sum":
            return masked_sum(per_token, mask)
        tokens_mean = batch.get(self.tensor_keys.response_tokens_mean, None)
        if tokens_mean is None:
            return masked_sum(per_token, mask) / mask.sum().clamp_min(1)
        # One number, expanded over the entries of the batch it is the mean of; 0-d: over the rows.
        count = at_least_float32(tokens_mean).detach().sum()
        if tokens_mean.ndim == 0:
            count = count * (math.prod(mask.shape[:-1]) if mask.ndim > 1 else mask.shape[0])
        return masked_sum(per_token, mask) / count.clamp_min(torch.finfo(count.dtype).tiny)


def _run_with(
    network: TensorDictModuleBase,
    tensordict: TensorDictBase,
    part: nn.Module | None,
    params: TensorDictBase | None,
) -> TensorDictBase:
    if params is None or part is None:
        return network(tensordict)
    with params.to_module(part, preserve_module_state=False):
        return network(tensordict)


def total_loss(losses: TensorDictBase) -> Tensor:
    """The sum of the ``loss_*`` entries: what to differentiate.

    ``losses.mean(reduce=True)``, as TorchRL's examples for language models have it, averages the
    diagnostics into the loss.

    Raises:
        ValueError: there is no such entry.

    Example:
        >>> total_loss(TensorDict({"loss_a": torch.tensor(1.0), "kl": torch.tensor(9.0)}, []))
        tensor(1.)
    """
    found = [value for key, value in losses.items() if key.startswith("loss_")]
    if not found:
        raise ValueError(f"losses must hold loss_* entries, got {sorted(losses.keys())}")
    return torch.stack(found).sum()
