"""The example loop as it is, and what each rank holds along the way and at its end, in a folder.

torchrun --nproc-per-node 2 -m tests.examples.watched_train FOLDER --output RUN ...
"""

import gc
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from examples.lm_rlhf import train as example
from safe_rl.sharded_tensors import whole


def watch(folder: Path) -> None:
    """Write states and folder at each checkpoint, first minibatch, gradients, parts, the end."""
    rank = os.environ["RANK"]
    save_checkpoint, minibatches, clip = example.save_checkpoint, example.minibatches, example.clip
    shard_layers = example.shard_layers

    def save(path: Path, step: int, parts: dict[str, Any], *, write: bool) -> None:
        save_checkpoint(path, step, parts, write=write)
        # The random states are of all ranks already.
        states = {name: part.state_dict() for name, part in parts.items() if name != "random"}
        torch.save(states, folder / f"rank{rank}_step{step}.pt")
        if write:
            shutil.copytree(path.parent, folder / f"run_step{step}")

    def cut(batch: TensorDict, **settings: Any) -> Iterator[TensorDict]:
        for piece in minibatches(batch, **settings):
            if not (folder / f"rank{rank}_piece.pt").exists():
                torch.save(piece.to_dict(), folder / f"rank{rank}_piece.pt")
            yield piece

    def clipped(parameters: list[nn.Parameter], limit: float) -> Tensor:
        path = folder / f"rank{rank}_gradients{len(parameters)}.pt"
        if not path.exists():
            torch.save([whole(parameter.grad) for parameter in parameters], path)
        return clip(parameters, limit)

    def sharded(language_model: PreTrainedModel, accelerator: Accelerator) -> None:
        shard_layers(language_model, accelerator)
        parts = {
            name: (p.to_local().numel() if isinstance(p, DTensor) else p.numel(), p.numel())
            for name, p in language_model.named_parameters()
        }
        torch.save(parts, folder / f"rank{rank}_parts.pt")

    end_training = Accelerator.end_training

    def ended(accelerator: Accelerator) -> None:
        wrapped = sum(type(held) is DistributedDataParallel for held in gc.get_objects())
        torch.save(wrapped, folder / f"rank{rank}_wrapped_at_end.pt")
        end_training(accelerator)

    Accelerator.end_training = ended
    example.save_checkpoint, example.minibatches, example.clip = save, cut, clipped
    example.shard_layers = sharded


if __name__ == "__main__":
    watched = Path(sys.argv[1])
    watched.mkdir(parents=True, exist_ok=True)
    watch(watched)
    sys.exit(example.main(sys.argv[2:]))
