"""A controller in a TensorDict pipeline, and the measurements that it needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey
from torch import Tensor

from safe_ops import kl_k1, masked_sum
from safe_ops.controllers import Controller
from safe_ops.controllers.base import ControlLaw, flatten_state
from safe_rl.keys import (
    RESPONSE_MASK,
    RESPONSE_TOKENS_MEAN,
    KeyedModule,
    padded,
    read,
    read_mask,
    read_per_token,
)


def sum_over_ranks(*values: Tensor) -> tuple[Tensor, ...]:
    """0-d sums and counts, added over all ranks in one message; float64.

    Without a process group they are what they were.

    Example:
        >>> sum_over_ranks(torch.tensor(2.0), torch.tensor(3))
        (tensor(2., dtype=torch.float64), tensor(3., dtype=torch.float64))
    """
    sums = torch.stack([value.detach().double() for value in values])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    return sums.unbind()


class PolicyMeasurements(KeyedModule):
    """KL, entropy and reward of a rollout, as the controllers take them: one number each.

        kl      = sum over all response tokens of log pi - log ref, by their number
        entropy = the same mean of the entropy            reward = mean score of the sequences

    Sums and counts are added over all ranks first, so every rank gets the same numbers, whatever
    the lengths of its responses. A token that counts and is not finite makes the mean NaN, which
    the laws refuse; padding may hold anything.

    Reads ``old_log_prob``, ``ref_log_prob``, ``entropy``, ``response_mask`` [B, T] and ``score``
    [B]; writes ``("measurements", "kl" | "entropy" | "reward")`` in nats per token and reward
    per sequence, and ``response_tokens_mean``, the objectives' denominator, all float32 and
    expanded to the batch. In a batch of an environment, [N] or [B, T], an entry is a step, so give
    ``score`` expanded to it, the same in all the steps it speaks of.

    Raises:
        ValueError: a key is missing or of the wrong shape, or the first token of every row has a
            log-prob of 0 where its entropy says otherwise.

    Example:
        >>> from tensordict import TensorDict
        >>> one = torch.ones(1, 2)
        >>> batch = TensorDict({"old_log_prob": -one, "ref_log_prob": -2 * one, "entropy": one,
        ...     "response_mask": one.bool(), "score": torch.tensor([0.5])}, [1])
        >>> PolicyMeasurements()(batch)["measurements", "kl"]
        tensor([1.])
    """

    @dataclass
    class _AcceptedKeys:
        old_log_prob: NestedKey = "old_log_prob"
        ref_log_prob: NestedKey = "ref_log_prob"
        entropy: NestedKey = "entropy"
        response_mask: NestedKey = RESPONSE_MASK
        score: NestedKey = "score"
        kl: NestedKey = ("measurements", "kl")
        measured_entropy: NestedKey = ("measurements", "entropy")
        measured_reward: NestedKey = ("measurements", "reward")
        response_tokens_mean: NestedKey = RESPONSE_TOKENS_MEAN

    default_keys = _AcceptedKeys

    def _set_in_out_keys(self) -> None:
        keys = self.tensor_keys
        self.in_keys = [
            keys.old_log_prob,
            keys.ref_log_prob,
            keys.entropy,
            keys.response_mask,
            keys.score,
        ]
        self.out_keys = [
            keys.kl,
            keys.measured_entropy,
            keys.measured_reward,
            keys.response_tokens_mean,
        ]

    @dispatch
    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the measurements."""
        keys = self.tensor_keys
        tensordict = padded(tensordict, mask=keys.response_mask)
        mask = read_mask(tensordict, keys.response_mask, like=keys.old_log_prob)
        old, ref, entropy = (
            read_per_token(tensordict, key, mask).double()
            for key in (keys.old_log_prob, keys.ref_log_prob, keys.entropy)
        )
        self._check_first_tokens(old, entropy, mask)
        score = read(tensordict, keys.score)
        entries = tensordict.numel() if tensordict.batch_size else mask[..., 0].numel()
        if score.numel() != entries:
            raise ValueError(
                f"{keys.score!r} must hold one score per entry of the batch, "
                f"got {tuple(score.shape)} and mask {tuple(mask.shape)}"
            )
        kl, entropy_sum, tokens, score_sum, rows = sum_over_ranks(
            masked_sum(kl_k1(old, ref), mask),
            masked_sum(entropy, mask),
            mask.sum(),
            score.double().sum(),
            torch.full((), score.numel(), device=score.device),
        )
        for key, total, count in (
            (keys.kl, kl, tokens),
            (keys.measured_entropy, entropy_sum, tokens),
            (keys.measured_reward, score_sum, rows),
            (keys.response_tokens_mean, tokens, rows),
        ):
            # Of nothing there is no mean: NaN, which the laws refuse and count.
            tensordict.set(key, (total / count).float().expand(tensordict.batch_size))
        return tensordict

    def _check_first_tokens(self, old: Tensor, entropy: Tensor, mask: Tensor) -> None:
        """TorchRL's generating path reports 0 for the first token of every response."""
        if torch.compiler.is_compiling() or mask.ndim < 2 or mask.shape[-1] == 0:
            return
        rows = mask.any(-1)
        first = mask.int().argmax(-1, keepdim=True)
        certain = old.gather(-1, first).squeeze(-1)[rows] == 0
        uncertain = entropy.gather(-1, first).squeeze(-1)[rows]
        # Certain tokens have no entropy; in half precision a likely one may round to 0 too.
        if certain.numel() and certain.all() and uncertain.mean() > CERTAIN:
            raise ValueError(
                f"{self.tensor_keys.old_log_prob!r} is 0 at the first token of every row, where "
                f"the entropy is {float(uncertain.mean()):.2g} nats: log-probs of the generating "
                "path of TorchRL; score the responses again, see Scores"
            )


CERTAIN = 0.5
"""Nats of entropy above which no token has a log-prob of 0."""


class ControllerModule(TensorDictModuleBase):
    """Moves a controller by one update per call and writes what it decided into the batch.

    Call it once per rollout. Coefficients are expanded over the batch, which costs nothing.

    Args:
        controller: Holds the law and its state; a law is put into a new ``Controller``.
        in_keys: Measurement name to batch key, reduced over tokens and ranks, alike in all rows.
            None: ``("measurements", name)`` of each that the law takes.
        out_keys: Batch key to field of the law's state, ``outer__inner`` for a nested one.
            None: the decisions of ``EntropyGatedKL``.

    Raises:
        ValueError: a field is not in the state, a key is missing, or a measurement was not
            reduced to one number.

    Example:
        >>> from tensordict import TensorDict
        >>> from safe_ops.controllers import EntropyGatedKL
        >>> module = ControllerModule(EntropyGatedKL())
        >>> batch = TensorDict({"measurements": {"kl": torch.ones(2), "entropy": torch.ones(2),
        ...     "reward": torch.zeros(2)}}, [2])
        >>> module(batch)["kl_coef"].shape
        torch.Size([2])
    """

    def __init__(
        self,
        controller: Controller | ControlLaw[Any],
        *,
        in_keys: Mapping[str, NestedKey] | None = None,
        out_keys: Mapping[NestedKey, str] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(controller, Controller):
            controller = Controller(controller)
        if in_keys is None:
            in_keys = {name: ("measurements", name) for name in controller.measurements}
        if out_keys is None:
            fields = ("kl_threshold", "entropy_gate", "kl_momentum", "kl_coef")
            out_keys = {field: field for field in fields}
        known = [name for name, value in flatten_state(controller.state).items() if value.ndim == 0]
        for field in out_keys.values():
            if field not in known:
                raise ValueError(
                    f"out_keys must name fields of the state of {type(controller.law).__name__}, "
                    f"got {field!r}, known: {known}"
                )
        self.controller = controller
        self.measurement_keys = dict(in_keys)
        self.decisions = dict(out_keys)
        self.in_keys = list(self.measurement_keys.values())
        self.out_keys = list(self.decisions)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Move the controller and write its decisions."""
        measured = {
            name: one_of(key, read(tensordict, key)) for name, key in self.measurement_keys.items()
        }
        state = flatten_state(self.controller(**measured))
        for key, name in self.decisions.items():
            tensordict.set(key, state[name].expand(tensordict.batch_size))
        return tensordict


def one_of(key: NestedKey, expanded: Tensor) -> Tensor:
    """The number that an expanded measurement holds in every row, 0-d.

    In a compiled graph, which cannot look at values, rows that differ give NaN: the laws refuse it
    and count it.

    Raises:
        ValueError: there is none, or the rows differ: per-token values under the name of a mean.

    Example:
        >>> one_of("kl", torch.tensor([0.5, 0.5]))
        tensor(0.5000)
    """
    values = expanded.detach().flatten()
    alike = ((values == values[:1]) | (values.isnan() & values[:1].isnan())).all()
    if torch.compiler.is_compiling():
        return torch.where(alike, values[0], torch.nan)
    # Once per rollout a look at the values costs nothing next to the rollout.
    if values.numel() == 0 or not alike:
        raise ValueError(
            f"{key!r} must hold one number, alike in all rows, got shape {tuple(expanded.shape)}: "
            "reduce it over tokens and ranks first, see PolicyMeasurements"
        )
    return values[0]
