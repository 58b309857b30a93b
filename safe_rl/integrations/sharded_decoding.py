"""Incremental forwards of a model that FSDP2 has sharded: all ranks make equally many."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from safe_rl.integrations.cached_decoding import ModelDecoder


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 gathers weights of this module, or of one within, from other ranks.

    Example:
        >>> is_sharded(torch.nn.Linear(1, 1))
        False
    """
    return any(isinstance(inner, FSDPModule) for inner in module.modules())


class ShardedDecoder(ModelDecoder):
    """A ``ModelDecoder`` whose forwards wait for those of the other ranks.

    Every forward gathers weights from all ranks, so a rank that needs no more of them must go on
    for the others. Before each forward the ranks agree that there is one, by a message of a number:

        extend    this rank needs one
        finish    this rank needs none: it runs one token, without a cache, until none needs any

    How many forwards a rank needs, and of what shapes, is its own affair.

    Args:
        language_model: Sharded with ``fully_shard``; all ranks of the process group have a part.
    """

    def extend(self, tokens: Tensor, position: Tensor, visible: Tensor) -> Tensor:
        """Read more tokens; the logits after the last, [B, V]."""
        self._any_rank(True)
        return super().extend(tokens, position, visible)

    def finish(self) -> None:
        """Every rank calls it after its last ``extend``; returns on all of them together."""
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.language_model.device)
        while self._any_rank(False):
            self.language_model(input_ids=token, use_cache=False)

    def _any_rank(self, needs: bool) -> bool:
        count = torch.tensor(int(needs), device=self.language_model.device)
        dist.all_reduce(count)
        return int(count) > 0
