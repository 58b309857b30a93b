"""The example loop as it is, and what each rank holds along the way written to a folder.

torchrun --nproc-per-node 2 -m tests.examples.watched_train FOLDER --output RUN ...
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from examples.lm_rlhf import train as example


def watch(folder: Path) -> None:
    """Write the states at each checkpoint, and the first minibatch with its gradients."""
    rank = os.environ["RANK"]
    save_checkpoint, minibatches, clip = example.save_checkpoint, example.minibatches, example.clip

    def save(path: Path, step: int, parts: dict[str, Any], *, write: bool) -> None:
        save_checkpoint(path, step, parts, write=write)
        # The random states are of all ranks already.
        states = {name: part.state_dict() for name, part in parts.items() if name != "random"}
        torch.save(states, folder / f"rank{rank}_step{step}.pt")

    def cut(batch: TensorDict, **settings: Any) -> Iterator[TensorDict]:
        for piece in minibatches(batch, **settings):
            if not (folder / f"rank{rank}_piece.pt").exists():
                torch.save(piece.to_dict(), folder / f"rank{rank}_piece.pt")
            yield piece

    def clipped(parameters: list[nn.Parameter], limit: float) -> Tensor:
        path = folder / f"rank{rank}_gradients{len(parameters)}.pt"
        if not path.exists():
            torch.save([parameter.grad for parameter in parameters], path)
        return clip(parameters, limit)

    example.save_checkpoint, example.minibatches, example.clip = save, cut, clipped


if __name__ == "__main__":
    watched = Path(sys.argv[1])
    watched.mkdir(parents=True, exist_ok=True)
    watch(watched)
    sys.exit(example.main(sys.argv[2:]))
