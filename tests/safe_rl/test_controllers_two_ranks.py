"""Two processes, different shards, one state."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tensordict import TensorDict

from safe_ops.controllers import EntropyGatedKL, Phase, flatten_state
from safe_rl import ControllerModule, PolicyMeasurements

UPDATES = 200


def shard(rank: int, step: int) -> TensorDict:
    """Rollout of one rank: its own numbers, and rank 1 has twice the rows."""
    rows = 2 * (rank + 1)
    generator = torch.Generator().manual_seed(1000 * step + rank)
    old, ref, entropy = torch.randn(3, rows, 5, generator=generator).unbind()
    lengths = torch.randint(1, 6, (rows, 1), generator=generator)
    return TensorDict(
        {
            "old_log_prob": -old.abs(),
            "ref_log_prob": -ref.abs() - 0.001 * step,
            "entropy": entropy.abs() + 1,
            "response_mask": torch.arange(5) < lengths,
            "score": torch.randn(rows, generator=generator) + 0.01 * step,
        },
        [rows],
    )


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    measure = PolicyMeasurements()
    control = ControllerModule(EntropyGatedKL(phases=Phase(warm_up=10, window=10)))
    for step in range(UPDATES):
        batch = shard(rank, step)
        if step == 50 and rank == 1:
            # A bad token on one rank is refused on both.
            batch["old_log_prob"][0, 0] = torch.nan
        control(measure(batch))
    torch.save(flatten_state(control.controller.state), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_hold_the_same_state(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    for name, leaf in first.items():
        assert torch.equal(leaf, second[name]), name
    assert int(first["step"]) == UPDATES - 1
    assert int(first["non_finite"]) == 1
    assert float(first["kl_coef"]) >= 0
    # The shards do differ: the state of one rank alone is another.
    alone = PolicyMeasurements()(shard(0, 0))["measurements", "kl"][0]
    both = PolicyMeasurements()(torch.cat([shard(0, 0), shard(1, 0)]))["measurements", "kl"][0]
    assert abs(alone - both) > 1e-3
