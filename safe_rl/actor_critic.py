"""An actor and a critic of TorchRL as the network of an objective; what a frozen copy says."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from tensordict.nn import (
    CompositeDistribution,
    ProbabilisticTensorDictSequential,
    TensorDictModuleBase,
)
from tensordict.utils import NestedKey
from torch import Tensor
from torch.distributions import Distribution
from torchrl.modules.distributions import has_analytic_entropy

from safe_rl.keys import RESPONSE_MASK, KeyedModule, padded, read


class ActorCritic(KeyedModule):
    """Scores stored actions: log-prob, entropy and every critic head's value, in one forward.

    ``SAFELoss(ActorCritic(actor, critic))`` stands where ``ClipPPOLoss(actor, critic)`` stood. The
    distribution of the actor may be discrete, continuous or composite; log-probs and entropies of
    its parts are added up.

    Reads what the actor and the critic read, and ``action`` (each action of a composite). Writes
    ``log_prob``, ``entropy`` (nats, shape of the batch) and what the critic writes, of which
    ``state_values`` [..., K] is what objectives read; a critic that writes another key is named by
    ``set_keys(state_values=...)`` of the objective.

    Args:
        actor: With ``get_dist``, as ``ProbabilisticActor`` has.
        critic: A module that writes values; None: an actor alone, for ``ClippedPolicyLoss``.
        entropy_samples: Drawn for the entropy where the distribution has no formula for it
            (``TanhNormal``).

    Raises:
        ValueError: ``actor`` has no ``get_dist``, ``entropy_samples`` is not positive, or a batch
            lacks an action.

    Example:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> from torchrl.modules import OneHotCategorical, ProbabilisticActor
        >>> logits = TensorDictModule(torch.nn.Linear(4, 2), ["observation"], ["logits"])
        >>> actor = ProbabilisticActor(logits, ["logits"], distribution_class=OneHotCategorical)
        >>> critic = TensorDictModule(torch.nn.Linear(4, 2), ["observation"], ["state_values"])
        >>> batch = TensorDict({"observation": torch.zeros(3, 4),
        ...     "action": torch.tensor([[1, 0]] * 3)}, [3])
        >>> ActorCritic(actor, critic)(batch)["log_prob"].shape
        torch.Size([3])
    """

    @dataclass
    class _AcceptedKeys:
        action: NestedKey = "action"
        log_prob: NestedKey = "log_prob"
        entropy: NestedKey = "entropy"

    default_keys = _AcceptedKeys

    def __init__(
        self,
        actor: ProbabilisticTensorDictSequential,
        critic: TensorDictModuleBase | None = None,
        *,
        entropy_samples: int = 1,
    ) -> None:
        super().__init__()
        if not callable(getattr(actor, "get_dist", None)):
            raise ValueError(
                f"actor must have get_dist, as ProbabilisticActor has, got {type(actor).__name__}"
            )
        if entropy_samples < 1:
            raise ValueError(f"entropy_samples must be positive, got {entropy_samples}")
        self.actor = actor
        self.critic = critic
        self.entropy_samples = entropy_samples
        self._set_in_out_keys()

    def _set_in_out_keys(self) -> None:
        modules = self.__dict__.get("_modules", {})
        actor, critic = modules.get("actor"), modules.get("critic")
        if actor is None:
            return
        keys = self.tensor_keys
        read_by = [actor, critic] if critic is not None else [actor]
        wanted = [key for module in read_by for key in module.in_keys]
        self.in_keys = list(dict.fromkeys([*wanted, *self._actions()]))
        self.out_keys = [keys.log_prob, keys.entropy]
        self.out_keys += critic.out_keys if critic is not None else []

    def _actions(self) -> list[NestedKey]:
        """The action, or those of a composite where no single one is named."""
        action = self.tensor_keys.action
        drawn = list(getattr(self.actor, "dist_sample_keys", [action]))
        several = action == self._AcceptedKeys.action and action not in drawn
        return drawn if several else [action]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write ``log_prob``, ``entropy`` and the values."""
        distribution = self.actor.get_dist(tensordict)
        if isinstance(distribution, CompositeDistribution):
            parts = list(distribution.dists.items())
        else:
            parts = [(self.tensor_keys.action, distribution)]
        size = tensordict.batch_size
        log_probs, entropies = [], []
        for key, part in parts:
            action = read(tensordict, key).detach()
            log_probs.append(_added_up(part.log_prob(action), size))
            entropies.append(_added_up(self._entropy(part), size))
        tensordict.set(self.tensor_keys.log_prob, sum(log_probs[1:], log_probs[0]))
        tensordict.set(self.tensor_keys.entropy, sum(entropies[1:], entropies[0]))
        return tensordict if self.critic is None else self.critic(tensordict)

    def _entropy(self, distribution: Distribution) -> Tensor:
        if has_analytic_entropy(distribution):
            return distribution.entropy()
        if not distribution.has_rsample:
            raise ValueError(
                f"{type(distribution).__name__} has neither a formula for its entropy "
                "nor samples with a gradient"
            )
        drawn = distribution.rsample((self.entropy_samples,))
        return -distribution.log_prob(drawn).mean(0)


def _added_up(x: Tensor, size: torch.Size) -> Tensor:
    """What a distribution gives per dimension of the action, as one number an entry."""
    return x if x.ndim <= len(size) else x.flatten(len(size)).sum(-1)


class Scores(TensorDictModuleBase):
    """What a network says of a batch, without a gradient and under other names.

    ``Scores(reference, {"log_prob": "ref_log_prob"})`` in a collector's ``postproc`` or a
    ``TensorDictSequential`` writes the log-probs of a reference policy;
    ``Scores(network, {"log_prob": "old_log_prob", "entropy": "entropy"})`` those before the
    update. Scored by one function, old and new log-probs have a ratio of exactly 1.

    Args:
        network: ``ActorCritic`` or any other module.
        names: Key that it writes to the key in the batch.

    Raises:
        ValueError: the network does not write a key of ``names``.

    Example:
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule
        >>> network = TensorDictModule(torch.nn.Identity(), ["x"], ["log_prob"])
        >>> module = Scores(network, {"log_prob": "ref_log_prob"})
        >>> sorted(module(TensorDict({"x": torch.ones(2)}, [2])).keys())
        ['ref_log_prob', 'x']
    """

    def __init__(self, network: TensorDictModuleBase, names: Mapping[str, NestedKey]) -> None:
        super().__init__()
        for key in names:
            if key not in network.out_keys:
                raise ValueError(f"network must write {key!r}, it writes {network.out_keys}")
        self.network = network
        self.names = dict(names)
        self.out_keys = list(self.names.values())

    @property
    def in_keys(self) -> list[NestedKey]:
        """What the network reads."""
        return list(self.network.in_keys)

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Run the network on what it reads and keep what ``names`` lists."""
        keys = getattr(self.network, "tensor_keys", None)
        tensordict = padded(tensordict, mask=getattr(keys, "response_mask", RESPONSE_MASK))
        scored = self.network(tensordict.select(*self.in_keys))
        for key, name in self.names.items():
            tensordict.set(name, scored.get(key))
        return tensordict
