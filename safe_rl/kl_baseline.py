"""The baseline of the KL loss, from the whole rollout."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from tensordict import TensorDictBase
from tensordict.nn import dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torch.nn import functional as F

from safe_ops import kl_baseline
from safe_rl.controllers import sum_over_ranks
from safe_rl.keys import RESPONSE_MASK, KeyedModule, padded, read_mask, read_per_token


def sum_places_over_ranks(*values: Tensor) -> tuple[Tensor, ...]:
    """[T] each, added over all ranks place by place; T may differ from rank to rank.

    Example:
        >>> sum_places_over_ranks(torch.ones(2))
        (tensor([1., 1.], dtype=torch.float64),)
    """
    width = values[0].shape[0]
    widest = width
    if dist.is_available() and dist.is_initialized():
        most = torch.tensor(width, device=values[0].device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        widest = int(most)
    sums = sum_over_ranks(*(F.pad(value, (0, widest - width)) for value in values))
    return tuple(total[:width] for total in sums)


class KLBaseline(KeyedModule):
    """Writes what ``GatedKLLoss`` subtracts from the KL still to come: less noise, same gradient.

        kl_baseline_t = 1 + mean_{other rows that reach t} sum_{u >= t} decay^{u-t} k1_u

    Over the rows of all ranks, so call it on the whole rollout, before it is cut into minibatches.
    Every rank may pad to a width of its own.

    Reads ``old_log_prob``, ``ref_log_prob``, ``response_mask`` [B, T]; writes ``kl_baseline``
    [B, T], nats.

    Args:
        decay: That of the loss's surrogate.

    Raises:
        ValueError: a key is missing or of the wrong shape, or ``decay`` is outside [0, 1].

    Example:
        >>> from tensordict import TensorDict
        >>> old = torch.tensor([[-1.0], [-1.0]])
        >>> batch = TensorDict({"old_log_prob": old, "ref_log_prob": old - torch.tensor([[1.0],
        ...     [2.0]]), "response_mask": torch.ones(2, 1).bool()}, [2])
        >>> KLBaseline()(batch)["kl_baseline"].squeeze()
        tensor([3., 2.])
    """

    @dataclass
    class _AcceptedKeys:
        old_log_prob: NestedKey = "old_log_prob"
        ref_log_prob: NestedKey = "ref_log_prob"
        response_mask: NestedKey = RESPONSE_MASK
        kl_baseline: NestedKey = "kl_baseline"

    default_keys = _AcceptedKeys

    def __init__(self, *, decay: float = 1.0) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be in [0, 1], got {decay}")
        super().__init__()
        self.decay = decay

    def _set_in_out_keys(self) -> None:
        keys = self.tensor_keys
        self.in_keys = [keys.old_log_prob, keys.ref_log_prob, keys.response_mask]
        self.out_keys = [keys.kl_baseline]

    @dispatch
    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the baseline."""
        keys = self.tensor_keys
        tensordict = padded(tensordict, mask=keys.response_mask)
        mask = read_mask(tensordict, keys.response_mask, like=keys.old_log_prob)
        baseline = kl_baseline(
            read_per_token(tensordict, keys.old_log_prob, mask),
            read_per_token(tensordict, keys.ref_log_prob, mask),
            mask=mask,
            decay=self.decay,
            sum_over_ranks=sum_places_over_ranks,
        )
        return tensordict.set(keys.kl_baseline, baseline)
