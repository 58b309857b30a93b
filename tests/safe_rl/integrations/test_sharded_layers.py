"""Layers divided over two ranks: what each holds, samples, learns, saves and takes back."""

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from transformers import PreTrainedModel

from safe_rl.causal_lm import CausalLMActorCritic
from safe_rl.checkpoints import (
    OptimizerState,
    TrainableParameters,
    load_checkpoint,
    save_checkpoint,
)
from safe_rl.integrations.sharded_layers import shard_layers
from safe_rl.integrations.transformers import Sampler
from safe_rl.monitoring.interventions import LastGood
from safe_rl.sharded_tensors import divided_like, whole
from safe_rl.trust_region import PolicyTrustRegion
from tests.safe_rl.integrations import models
from tests.safe_rl.integrations.test_transformers import (
    APART,
    EOS,
    NEOX_TARGETS,
    NEVER,
    SHARED,
    sample,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


def half_precision() -> PreTrainedModel:
    """A frozen base in bfloat16 under float32 adapters, of sizes that two ranks cannot halve."""
    return models.with_lora(models.qwen2().bfloat16()).get_base_model()


KINDS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: models.with_lora(models.llama()).get_base_model(),
    "gpt_neox": lambda: models.with_lora(models.gpt_neox(), targets=NEOX_TARGETS).get_base_model(),
    "qwen2, half precision": half_precision,
}
# Rank 0 reads the start that its prompts share in a forward of its own, rank 1 does not; then one
# rank goes on for as long as it may, and the other ends at the first token.
ALL = torch.arange(11)
ROLLOUTS = {
    "both end": (EOS, EOS),
    "the first goes on": (NEVER, ALL),
    "the second goes on": (ALL, NEVER),
}
LIMIT = 1e-3


def tokens_of(rank: int) -> Tensor:
    return torch.randint(2, 11, (2, 6 + rank), generator=torch.Generator().manual_seed(rank))


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def loss_of(model: PreTrainedModel, ranks: list[int]) -> Tensor:
    losses = [
        model(input_ids=tokens_of(r), use_cache=False).logits.float().square().mean() for r in ranks
    ]
    return torch.stack(losses).mean()


def distance(parameters: list[nn.Parameter], start: list[Tensor]) -> Tensor:
    """Stands for a KL: alike on all ranks, and quadratic in the step."""
    moved = (whole(p.detach()) - s for p, s in zip(parameters, start, strict=True))
    return torch.stack([change.square().sum() for change in moved]).sum()


def course(
    model: PreTrainedModel, ranks: list[int], folder: Path, *, write: bool
) -> dict[str, Any]:
    """A few updates as the loop of the example makes them, a checkpoint, and the way back."""
    parameters = trained(model)
    start = [whole(p.detach()).clone() for p in parameters]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    parts = {"adapters": TrainableParameters(model), "optimizer": OptimizerState(optimizer)}
    region = PolicyTrustRegion(parameters, limit=LIMIT)
    good = LastGood(parts, folder, write=write)
    seen: dict[str, Any] = {"norms": []}

    def update() -> None:
        loss_of(model, ranks).backward()
        norm = nn.utils.clip_grad_norm_(parameters, 0.01)
        seen["norms"].append(float(whole(norm)))
        optimizer.step()
        optimizer.zero_grad()

    update()
    region.set()
    before = [whole(p.detach()).clone() for p in parameters]
    update()
    seen["trusted"] = region.hold(lambda: distance(parameters, before))
    save_checkpoint(folder / "checkpoint.pt", 2, parts, write=write)
    good.keep(2)
    if dist.is_initialized():
        dist.barrier()
    seen["saved"] = states(parts)
    update()
    seen["moved"] = distance(parameters, start)
    good.restore()
    seen["restored"] = states(parts)
    update()
    seen["after"] = states(parts)
    return seen


def states(parts: dict[str, Any]) -> dict[str, Any]:
    held = {name: part.state_dict() for name, part in parts.items()}
    clones = {name: value.clone() for name, value in held["adapters"].items()}
    moments = {
        i: {k: v.clone() for k, v in values.items()}
        for i, values in held["optimizer"]["state"].items()
    }
    return {"adapters": clones, "moments": moments}


def taken_up(model: PreTrainedModel, checkpoint: Path) -> dict[str, Any]:
    """A new process with what the first left."""
    models.move_adapters(model, 0.5)
    optimizer = torch.optim.Adam(trained(model), lr=0.05)
    parts = {"adapters": TrainableParameters(model), "optimizer": OptimizerState(optimizer)}
    assert load_checkpoint(checkpoint, parts) == 2
    return states(parts)


def sampled(model: PreTrainedModel, rank: int) -> dict[str, Tensor]:
    prompts = (SHARED, APART)[rank]
    sampler = Sampler(model, merged=False)
    return {
        name: sample(sampler, prompts, eos_ids=eos[rank]).tokens for name, eos in ROLLOUTS.items()
    }


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def held_here(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Of each weight: entries on this rank, entries in all."""
    return {
        name: (p.to_local().numel() if isinstance(p, DTensor) else p.numel(), p.numel())
        for name, p in model.named_parameters()
    }


def on_rank(rank: int, port: int, folder: str) -> None:
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
    # A rank that waits in vain is to fail, not to hang.
    patience = InitProcessGroupKwargs(timeout=timedelta(minutes=1))
    accelerator = Accelerator(cpu=True, kwargs_handlers=[patience])
    for kind, make in KINDS.items():
        own = Path(folder) / kind
        model = make()
        shard_layers(model, accelerator)
        found: dict[str, Any] = {"held": held_here(model), "sampled": sampled(model, rank)}
        found["merged"] = refusal(lambda sharded=model: sample(Sampler(sharded), APART))
        found["late"] = refusal(lambda sharded=model: CausalLMActorCritic(sharded, nn.Identity()))
        found["course"] = course(model, [rank], own, write=rank == 0)
        second = make()
        shard_layers(second, accelerator)
        found["taken up"] = taken_up(second, own / "checkpoint.pt")
        torch.save(found, own / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded_layers")
    for kind in KINDS:
        (folder / kind).mkdir()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    torch.multiprocessing.spawn(on_rank, args=(port, str(folder)), nprocs=2)
    return folder


def found(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [torch.load(folder / kind / f"rank{r}.pt", weights_only=False) for r in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_divided_and_the_rest_is_whole(folder: Path, kind: str) -> None:
    first, second = (rank["held"] for rank in found(folder, kind))
    divided = [name for name in first if ".layers." in name]
    assert any("lora_A" in name for name in divided)
    for name, (here, of) in first.items():
        there = second[name][0]
        assert here + there == of if name in divided else here == there == of, name
    here, of = (sum(first[name][i] for name in divided) for i in (0, 1))
    assert 0.5 * of <= here < 0.6 * of


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ends", ROLLOUTS)
def test_each_rank_draws_what_it_would_alone(folder: Path, kind: str, ends: str) -> None:
    model = KINDS[kind]()
    lengths = []
    for rank, seen in enumerate(found(folder, kind)):
        alone = sampled(model, rank)[ends]
        assert torch.equal(seen["sampled"][ends], alone)
        lengths.append(alone.shape[1])
    assert lengths[0] != lengths[1] or ends == "both end"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_updates_trust_region_and_roll_back_are_those_of_one_process(
    folder: Path, kind: str, tmp_path: Path
) -> None:
    expected = course(KINDS[kind](), [0, 1], tmp_path, write=True)
    assert 0 < expected["trusted"].scale < 1
    assert expected["moved"] > 1e-3
    for rank in found(folder, kind):
        assert_close(rank["course"], expected, rtol=1e-5, atol=1e-6)
        assert_close(rank["course"]["restored"], rank["course"]["saved"], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_whole_and_is_taken_up_by_any_number_of_ranks(
    folder: Path, kind: str
) -> None:
    ranks = found(folder, kind)
    alone = taken_up(KINDS[kind](), folder / kind / "checkpoint.pt")
    for rank in ranks:
        assert_close(rank["taken up"], rank["course"]["saved"], rtol=0, atol=0)
        assert_close(alone, rank["course"]["saved"], rtol=0, atol=0)


@pytest.mark.slow
def test_what_reads_whole_weights_is_refused(folder: Path) -> None:
    for rank in found(folder, "llama"):
        assert rank["merged"].startswith("merged must be False for a sharded language_model")
        assert "if it is sharded, do so after this is built" in rank["late"]


# --- one process --------------------------------------------------------------------------------


def test_one_process_has_nothing_to_divide() -> None:
    with pytest.raises(ValueError, match="at least 2 processes, got 1: start them with torchrun"):
        shard_layers(KINDS["llama"](), Accelerator(cpu=True))


@pytest.fixture
def as_one_of_two(monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    """Refusals come before anything is sent."""
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(type(accelerator), "num_processes", 2)
    return accelerator


def test_adapters_outside_of_the_layers_are_refused(as_one_of_two: Accelerator) -> None:
    model = models.with_lora(models.qwen2(), targets=["q_proj", "lm_head"]).get_base_model()
    with pytest.raises(ValueError, match=r"of the layers may be trained, got lm_head\.lora_A"):
        shard_layers(model, as_one_of_two)


def test_a_model_that_names_no_layers_is_refused(as_one_of_two: Accelerator) -> None:
    model = models.llama()
    model._no_split_modules = None
    with pytest.raises(ValueError, match=r"_no_split_modules, got \[\] in LlamaForCausalLM"):
        shard_layers(model, as_one_of_two)


def test_plain_tensors_pass_and_shapes_must_agree() -> None:
    tensor = torch.ones(2, 3)
    assert whole(tensor) is tensor
    assert divided_like(tensor, torch.zeros(2, 3)) is tensor
    with pytest.raises(ValueError, match=r"shape of model \(3,\), got \(2, 3\)"):
        divided_like(tensor, torch.zeros(3))
