"""A run on one device or many with accelerate: what each rank keeps, and what all agree on."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from safe_rl.checkpoints import Stateful


class PerRank:
    """A part whose state differs from rank to rank, like a random generator, in one checkpoint.

    ``state_dict`` gathers the states of all ranks, so every rank must call it; loading takes this
    rank's own.

    Args:
        accelerator: Of the run.
        part: Saved and loaded on every rank.

    Raises:
        ValueError: on loading, when the state was saved by another number of processes.

    Example:
        >>> from safe_rl.checkpoints import RandomStates
        >>> part = PerRank(Accelerator(cpu=True), RandomStates())
        >>> len(part.state_dict()["ranks"])
        1
    """

    def __init__(self, accelerator: Accelerator, part: Stateful) -> None:
        self._accelerator = accelerator
        self._part = part

    def state_dict(self) -> dict[str, Any]:
        """The states of all ranks, in their order."""
        return {"ranks": gather_object([self._part.state_dict()])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this rank's state back."""
        states, processes = state_dict["ranks"], self._accelerator.num_processes
        if len(states) != processes:
            raise ValueError(
                f"the run was saved by {len(states)} processes and has {processes} now: "
                "resume it with as many"
            )
        self._part.load_state_dict(states[self._accelerator.process_index])


def shard(accelerator: Accelerator, rows: list[Any]) -> list[Any]:
    """This rank's rows: an equal share, in order.

    Args:
        accelerator: Of the run.
        rows: Alike on all ranks; a multiple of their number.

    Raises:
        ValueError: the rows cannot be shared equally.

    Example:
        >>> shard(Accelerator(cpu=True), [1, 2])
        [1, 2]
    """
    processes = accelerator.num_processes
    if len(rows) % processes:
        raise ValueError(f"{len(rows)} rows cannot be shared equally by {processes} processes")
    share = len(rows) // processes
    return rows[accelerator.process_index * share :][:share]


def any_rank(accelerator: Accelerator, asked: bool) -> bool:
    """Whether it holds on any rank; alike on all of them, so that they stop together.

    Example:
        >>> any_rank(Accelerator(cpu=True), False)
        False
    """
    count = torch.tensor(int(asked), device=accelerator.device)
    return int(accelerator.reduce(count, reduction="sum")) > 0


def mean_over_ranks(accelerator: Accelerator, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean of each 0-d value over ranks that hold equally many rows, in one message.

    Example:
        >>> mean_over_ranks(Accelerator(cpu=True), {"loss": torch.tensor(2.0)})
        {'loss': tensor(2.)}
    """
    stacked = torch.stack([value.detach().float() for value in values.values()])
    mean = accelerator.reduce(stacked, reduction="mean")
    return dict(zip(values, mean.unbind(), strict=True))
