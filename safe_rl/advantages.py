"""Advantages from pessimistic values."""

from dataclasses import dataclass, replace

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torchrl.objectives.value import ValueEstimatorBase

from safe_ops import (
    AdvantageEstimate,
    fill_masked,
    generalized_advantage_estimate,
    masked_sum,
    soft_min,
)
from safe_rl.controllers import sum_over_ranks
from safe_rl.keys import (
    RESPONSE_MASK,
    at_least_float32,
    every_step,
    padded,
    read_heads,
    read_mask,
    read_per_token,
)


class SoftMinGAE(ValueEstimatorBase):
    """Generalised advantages whose value is the soft-min of the critic's heads.

        V_t = soft_min_k v_tk;   advantage, value_target = GAE(reward, V)

    Reads ``state_values`` [B, T, K] (the target critic's, before token t), ``reward``,
    ``terminated``, ``truncated`` [B, T, 1] and ``response_mask`` [B, T]; where there is one,
    ``bootstrap_values`` [B, K] after the last token, or ``("next", "state_values")`` [B, T, K]
    after every step, which rows with several episodes need. Writes ``state_value``,
    ``advantage`` and ``value_target`` [B, T, 1]; the heads share the target unless told otherwise.

    With a ``value_network`` it takes the place of TorchRL's ``GAE``: rewards and flags are read
    under ``"next"``, as collectors write them, the values before and after each step are computed
    and written as ``state_values``, here and under "next", and without a mask every step counts.
    ``done`` stands in for a missing ``truncated``.

    Whitening is over all tokens of all ranks, so call this on the whole rollout.

    Args:
        value_network: Writes ``state_values`` from its own inputs, here and under ``"next"``;
            None: they are in the batch.
        temperature: Of the soft-min, in reward units.
        discount: Per token.
        gae_lambda: In [0, 1].
        average_gae: Whiten the advantages.
        per_head_targets: Give every head the return that it would have estimated itself,
            ``value_target`` [B, T, K]. The advantage stays that of the soft-min.
        shifted: One forward over T + 1 states instead of two over T. The state after a truncation
            inside a row is then not seen: that step is left out (``shifted_valid``, which the
            objectives read) and the one before it bootstraps.
        time_dim: Dimension of the mask that is time, after it those of single steps. None: the
            one named "time", or the last of at least two. Given, it says too that every step
            counts where there is no mask, though the batch be [B] and its entries [B, T, 1].

    Raises:
        ValueError: a value is out of range, a key is missing or of the wrong shape, ``value`` and
            ``state_values`` are one key for several heads, nothing tells which dimension is time, a
            row ends only where the mask is False, or a truncated row has no value to bootstrap from
            (in a compiled graph, which cannot look at values, such a row becomes NaN).

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
        done: NestedKey = "done"
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
        value_network: TensorDictModuleBase | None = None,
        temperature: float = 0.3,
        discount: float = 1.0,
        gae_lambda: float = 0.95,
        average_gae: bool = True,
        per_head_targets: bool = False,
        shifted: bool = False,
        time_dim: int | None = None,
    ) -> None:
        # The base class would look for the soft-min among the network's outputs.
        super().__init__(value_network=None, shifted=shifted)
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        for name, value in {"discount": discount, "gae_lambda": gae_lambda}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")
        if value_network is not None and not isinstance(value_network, TensorDictModuleBase):
            raise ValueError(
                "value_network must be a TensorDict module, with in_keys and out_keys, got "
                f"{type(value_network).__name__}; None reads the values from the batch"
            )
        if shifted and value_network is None:
            raise ValueError("shifted must come with a value_network: it is a way of calling one")
        self.temperature = temperature
        self.discount = discount
        self.gae_lambda = gae_lambda
        self.average_gae = average_gae
        self.per_head_targets = per_head_targets
        self.time_dim = time_dim
        # Resolved at the first read, the keys would cost a compiled graph a second compilation.
        self.set_keys()
        if value_network is not None:
            names = ("reward", "terminated", "truncated", "done")
            self.set_keys(**{name: ("next", name) for name in names})
            # Beside the modules: the parameters stay those of whoever owns the critic.
            self.__dict__["value_network"] = value_network

    def set_keys(self, **kwargs: NestedKey) -> None:
        """Read or write other keys than the default ones.

        ``next_state_values`` follows ``state_values``, under "next", unless it is named too.

        Raises:
            KeyError: a name is not an accepted one.
        """
        values = kwargs.get("state_values")
        # A loss forwards all of its keys at each change: only a new one is followed.
        if values is not None and values != self.tensor_keys.state_values:
            kwargs.setdefault("next_state_values", _next(values))
        # TorchRL's value is what the network writes; ours is the soft-min of that.
        value = kwargs.pop("value", None)
        super().set_keys(**kwargs)
        if value is not None:
            self._tensor_keys = replace(self._tensor_keys, value=unravel_key(value))

    @property
    def in_keys(self) -> list[NestedKey]:
        """What is read; the mask, ``done`` and what comes after may be missing."""
        keys = self.tensor_keys
        signals = [keys.reward, keys.terminated, keys.truncated, keys.response_mask, keys.done]
        if self.value_network is None:
            return [keys.state_values, *signals, keys.bootstrap_values, keys.next_state_values]
        observed = list(self.value_network.in_keys)
        return [*observed, *map(_next, observed), *signals]

    @property
    def out_keys(self) -> list[NestedKey]:
        """What is written: the values too where a network makes them."""
        keys = self.tensor_keys
        written = [keys.value, keys.advantage, keys.value_target]
        if self.value_network is not None:
            written += [keys.state_values, keys.next_state_values]
        if self.shifted:
            written.append("shifted_valid")
        return list(dict.fromkeys(written))

    @dispatch
    @torch.no_grad()
    def forward(
        self,
        tensordict: TensorDictBase,
        *,
        params: TensorDictBase | None = None,
        target_params: TensorDictBase | None = None,
        time_dim: int | None = None,
    ) -> TensorDictBase:
        """Write ``state_value``, ``advantage`` and ``value_target``.

        Args:
            tensordict: See the class.
            params: Of the value network for the states; None: its own.
            target_params: Of the value network for the states that follow; None: ``params``.
            time_dim: See the class.
        """
        keys = self.tensor_keys
        tensordict = padded(tensordict, mask=keys.response_mask)
        time_dim = self.time_dim if time_dim is None else time_dim
        mask = self._mask(tensordict, time_dim)
        time = self._time(mask, tensordict, time_dim)
        reward = read_per_token(tensordict, keys.reward, mask)
        terminated = read_per_token(tensordict, keys.terminated, mask)
        truncated = self._truncated(tensordict, mask)
        self._check_ends(mask, terminated | truncated, time)
        heads, following = self._values(
            tensordict, mask, truncated & ~terminated, time, params, target_params
        )
        if self.shifted and mask.shape[time]:
            kept = mask & ~_inside(truncated & ~terminated, time)
            # Where the state after a truncation was not seen, the one before it was: its step ends.
            truncated = truncated | _earlier(mask & ~kept, time)
            mask = kept
        if self.shifted:
            tensordict.set("shifted_valid", mask)

        def rows(x: Tensor) -> Tensor:
            """Time last, all other dimensions as one."""
            x = x.movedim(time, -1)
            return x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)

        def estimate(value: Tensor, following: dict[str, Tensor]) -> AdvantageEstimate:
            found = generalized_advantage_estimate(
                rows(reward.to(value.dtype)),
                rows(value),
                mask=rows(mask),
                terminated=rows(terminated),
                truncated=rows(truncated),
                discount=self.discount,
                gae_lambda=self.gae_lambda,
                **{
                    name: x.reshape(-1) if name == "bootstrap_value" else rows(x)
                    for name, x in following.items()
                },
            )
            shape = mask.movedim(time, -1).shape
            return AdvantageEstimate(*[x.reshape(shape).movedim(-1, time) for x in found])

        if keys.value == keys.state_values and heads.shape[-1] > 1:
            raise ValueError(
                f"value and state_values must be two keys where there are {heads.shape[-1]} heads, "
                f"got {keys.value!r} for both: the soft-min would take the place of the heads; "
                "set_keys(value=...) names another key"
            )
        value = soft_min(heads, self.temperature)
        pessimistic = {name: soft_min(x, self.temperature) for name, x in following.items()}
        advantage, target = estimate(value, pessimistic)
        targets = target.unsqueeze(-1)
        if self.per_head_targets:
            of_heads = [
                estimate(heads[..., k], {name: x[..., k] for name, x in following.items()})
                for k in range(heads.shape[-1])
            ]
            targets = torch.stack([found.value_target for found in of_heads], -1)
        if self.average_gae:
            advantage = whiten_over_ranks(advantage, mask)
        tensordict.set(keys.value, value.unsqueeze(-1))
        tensordict.set(keys.advantage, advantage.unsqueeze(-1))
        tensordict.set(keys.value_target, targets)
        return tensordict

    def value_estimate(
        self,
        tensordict: TensorDictBase,
        params: TensorDictBase | None = None,
        target_params: TensorDictBase | None = None,
        time_dim: int | None = None,
    ) -> Tensor:
        """``value_target`` alone; the batch is left as it is."""
        found = self.forward(
            tensordict.copy(), params=params, target_params=target_params, time_dim=time_dim
        )
        return found.get(self.tensor_keys.value_target)

    def _mask(self, batch: TensorDictBase, time_dim: int | None) -> Tensor:
        """A time that is named says that the entries' dimensions are steps: without a mask, all."""
        key, reward = self.tensor_keys.response_mask, self.tensor_keys.reward
        if time_dim is not None and batch.get(key, None) is None:
            return every_step(batch, reward)
        return read_mask(batch, key, like=reward, way_out=", or time_dim=1")

    def _time(self, mask: Tensor, batch: TensorDictBase, time_dim: int | None) -> int:
        if time_dim is not None:
            if not -mask.ndim <= time_dim < mask.ndim:
                raise ValueError(
                    f"time_dim must be a dimension of the mask {tuple(mask.shape)}, got {time_dim}"
                )
            return time_dim % mask.ndim
        names = list(batch.names or [])
        if "time" in names:
            return names.index("time")
        if mask.ndim < 2:
            raise ValueError(
                f"which dimension of {tuple(mask.shape)} is time? These may be steps of one "
                "trajectory or frames of many: give time_dim=0, or a batch [B, T]"
            )
        return mask.ndim - 1

    def _check_ends(self, mask: Tensor, ends: Tensor, time: int) -> None:
        """A row that ends, and only where nothing counts, has lost its last token."""
        if torch.compiler.is_compiling():
            return
        lost = mask.any(time) & ends.any(time) & ~(ends & mask).any(time)
        if lost.any():
            raise ValueError(
                f"{int(lost.sum())} rows end where {self.tensor_keys.response_mask!r} is False: a "
                "mask of `token != pad` drops the EOS where pad and EOS are one token; make it by "
                "position, see safe_rl.rollouts.response_mask"
            )

    def _truncated(self, batch: TensorDictBase, mask: Tensor) -> Tensor:
        """Where ``done`` stands in, terminated steps are marked too, which changes nothing."""
        keys = self.tensor_keys
        if batch.get(keys.truncated, None) is None and batch.get(keys.done, None) is not None:
            return read_per_token(batch, keys.done, mask)
        return read_per_token(batch, keys.truncated, mask)

    def _values(
        self,
        batch: TensorDictBase,
        mask: Tensor,
        cut: Tensor,
        time: int,
        params: TensorDictBase | None,
        target_params: TensorDictBase | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of every head: the values of the states, and of what follows, where there is any."""
        keys = self.tensor_keys
        network = self.value_network
        if network is not None:
            if network.out_keys and keys.state_values not in network.out_keys:
                raise ValueError(
                    f"value_network must write {keys.state_values!r}, it writes "
                    f"{network.out_keys}; set_keys(state_values=...) names another key"
                )
            seen = batch.select(*network.in_keys)
            after = batch["next"].select(*network.in_keys)
            if self.shifted and mask.shape[time]:
                if target_params is not None and target_params is not params:
                    raise ValueError("shifted is one forward: give params or target_params")
                # Of a batch [B] the steps are no dimensions to cut and join along.
                seen.batch_size = after.batch_size = mask.shape
                last = after.narrow(time, after.shape[time] - 1, 1)
                states = torch.cat([seen, last], time)
                values = self._run(network, states, params).get(keys.state_values)
                steps = mask.shape[time]
                found = [values.narrow(time, start, steps) for start in (0, 1)]
            else:
                later = params if target_params is None else target_params
                found = [
                    self._run(network, states, given).get(keys.state_values)
                    for states, given in ((seen, params), (after, later))
                ]
            batch.set(keys.state_values, found[0])
            batch.set(keys.next_state_values, found[1])
        heads = read_heads(batch, keys.state_values, mask)
        if batch.get(keys.next_state_values, None) is not None:
            return heads, {"next_value": read_heads(batch, keys.next_state_values, mask)}
        if batch.get(keys.bootstrap_values, None) is not None:
            return heads, {"bootstrap_value": at_least_float32(batch.get(keys.bootstrap_values))}
        lacking = cut & mask
        if torch.compiler.is_compiling():
            # A graph cannot look at values: what eager mode refuses becomes NaN.
            return torch.where(lacking.any(time, keepdim=True).unsqueeze(-1), torch.nan, heads), {}
        if lacking.any():
            raise ValueError(
                f"a truncated row needs {keys.bootstrap_values!r} or {keys.next_state_values!r}, "
                "got neither; a response that was scored is terminated, not truncated"
            )
        return heads, {}

    def _run(
        self, network: TensorDictModuleBase, states: TensorDictBase, params: TensorDictBase | None
    ) -> TensorDictBase:
        if params is None:
            return network(states)
        with params.to_module(network, preserve_module_state=False):
            return network(states)


def _next(key: NestedKey) -> NestedKey:
    return ("next", key) if isinstance(key, str) else ("next", *key)


def _earlier(flags: Tensor, time: int) -> Tensor:
    """The flag of the step that follows."""
    first = torch.zeros_like(flags.narrow(time, 0, 1))
    return torch.cat([flags.narrow(time, 1, flags.shape[time] - 1), first], time)


def _inside(flags: Tensor, time: int) -> Tensor:
    """The flags without that of the last step."""
    last = torch.zeros_like(flags.narrow(time, 0, 1))
    return torch.cat([flags.narrow(time, 0, flags.shape[time] - 1), last], time)


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
