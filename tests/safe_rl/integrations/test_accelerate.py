"""What each rank keeps and what all agree on: one process, and two that talk over gloo."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from safe_rl.checkpoints import RandomStates, load_checkpoint, save_checkpoint
from safe_rl.integrations.accelerate import PerRank, any_rank, mean_over_ranks, shard


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def draw(generator: torch.Generator) -> list[float]:
    return torch.rand(3, generator=generator).tolist()


# --- one process --------------------------------------------------------------------------------


def test_one_process_has_all_rows(accelerator):
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
    assert shard(accelerator, rows) == rows
    assert shard(accelerator, []) == []


@pytest.mark.parametrize("asked", [True, False])
def test_one_process_asks_itself(accelerator, asked):
    assert any_rank(accelerator, asked) is asked


def test_the_mean_of_one_process_is_what_it_has(accelerator):
    loss = torch.tensor(2.0, requires_grad=True)
    values = {"loss": loss, "count": torch.tensor(3), "half": torch.tensor(0.5).bfloat16()}
    mean = mean_over_ranks(accelerator, values)
    assert {key: value.item() for key, value in mean.items()} == {
        "loss": 2.0,
        "count": 3.0,
        "half": 0.5,
    }
    assert list(mean) == ["loss", "count", "half"]
    assert not any(value.requires_grad for value in mean.values())
    assert all(value.dtype == torch.float32 for value in mean.values())


def test_per_rank_restores_the_draws(accelerator, tmp_path: Path):
    order = torch.Generator().manual_seed(3)
    part = PerRank(accelerator, RandomStates(order=order))
    save_checkpoint(tmp_path / "checkpoint.pt", 1, {"random": part})
    expected = draw(order)
    load_checkpoint(tmp_path / "checkpoint.pt", {"random": part})
    assert draw(order) == expected


def test_another_number_of_processes_is_refused(accelerator):
    part = PerRank(accelerator, RandomStates())
    before = torch.random.get_rng_state()
    state = part.state_dict()["ranks"] * 2
    message = "saved by 2 processes and has 1 now: resume it with as many"
    with pytest.raises(ValueError, match=message):
        part.load_state_dict({"ranks": state})
    assert (torch.random.get_rng_state() == before).all()


# --- two processes ------------------------------------------------------------------------------


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def on_rank(rank: int, port: int, folder: str) -> None:
    """What two ranks see; each writes it to a file."""
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    accelerator = Accelerator(cpu=True)
    order = torch.Generator().manual_seed(10 + rank)
    part = PerRank(accelerator, RandomStates(order=order))
    checkpoint = Path(folder) / "checkpoint.pt"
    save_checkpoint(checkpoint, 5, {"random": part}, write=accelerator.is_main_process)
    drawn, own = draw(order), torch.rand(1).item()
    accelerator.wait_for_everyone()
    step = load_checkpoint(checkpoint, {"random": part})
    values: dict[str, Tensor] = {
        "loss": torch.tensor(1.0 + 2 * rank, requires_grad=True),
        "ratio": torch.tensor(float(rank)),
    }
    torch.save(
        {
            "processes": accelerator.num_processes,
            "rows": shard(accelerator, list("abcdef")),
            "odd": refusal(lambda: shard(accelerator, [1, 2, 3])),
            "none asked": any_rank(accelerator, False),
            "one asked": any_rank(accelerator, rank == 1),
            "mean": {k: v.item() for k, v in mean_over_ranks(accelerator, values).items()},
            "step": step,
            "drawn": drawn,
            "drawn again": draw(order),
            "own": own,
            "own again": torch.rand(1).item(),
            "ranks": len(part.state_dict()["ranks"]),
            "one saved": refusal(lambda: part.load_state_dict({"ranks": [{}]})),
        },
        f"{folder}/rank{rank}.pt",
    )
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks(tmp_path: Path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    torch.multiprocessing.spawn(on_rank, args=(port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert (first["rows"], second["rows"]) == (list("abc"), list("def"))
    for seen in (first, second):
        assert seen["processes"] == 2
        assert seen["odd"] == "3 rows cannot be shared equally by 2 processes"
        assert seen["none asked"] is False
        assert seen["one asked"] is True
        assert seen["mean"] == {"loss": 2.0, "ratio": 0.5}
        assert seen["step"] == 5
        assert seen["drawn again"] == seen["drawn"]
        assert seen["own again"] == seen["own"]
        assert seen["ranks"] == 2
        assert "saved by 1 processes and has 2 now" in seen["one saved"]
    assert first["drawn"] != second["drawn"]
    alone = PerRank(Accelerator(cpu=True), RandomStates(order=torch.Generator()))
    with pytest.raises(ValueError, match=r"part 'random' .* saved by 2 processes and has 1 now"):
        load_checkpoint(tmp_path / "checkpoint.pt", {"random": alone})
