"""The loss loop on two processes, whole on each or sharded over them: one process's numbers."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from transformers import LlamaForCausalLM

from safe_ops.controllers import EntropyGatedKL, flatten_state
from safe_rl import (
    CausalLMActorCritic,
    ControllerModule,
    KLBaseline,
    PolicyMeasurements,
    SAFELoss,
    Scores,
    SoftMinCritic,
    SoftMinGAE,
    total_loss,
)
from safe_rl.integrations.transformers import Sampler
from safe_rl.rollouts import left_pad, pack_rollout, place_score
from tests.tiny_models import llama_config

pytestmark = pytest.mark.slow

UPDATES = 3
SEEDS = {False: 18, True: 2}
"""Of untied and of tied embeddings."""
# Two rows a rank; rank 0 has 9 response tokens, rank 1 has 3, and each pads to its own longest.
# 1 is the EOS, and the padding.
PROMPTS = [[3, 4], [5, 6, 7], [8], [9, 3, 2, 4]]
RESPONSES = [[5, 2, 9, 4, 1], [3, 3, 6, 1], [7, 1], [1]]
SCORES = [0.5, -1.0, 2.0, 0.25]


class Parts(NamedTuple):
    network: CausalLMActorCritic
    reference: CausalLMActorCritic
    loss: nn.Module
    optimizer: torch.optim.Optimizer


def parts(*, tied: bool) -> tuple[CausalLMActorCritic, CausalLMActorCritic]:
    """Policy and reference, the same on every rank; float64, where Adam hides no difference."""
    torch.manual_seed(SEEDS[tied])  # with a KL above the threshold
    config = llama_config(16)
    config.tie_word_embeddings = tied
    models = [LlamaForCausalLM(config) for _ in range(2)]
    networks = [
        CausalLMActorCritic(model, SoftMinCritic(config.hidden_size)).double().eval()
        for model in models
    ]
    policy, reference = networks
    return policy, reference.requires_grad_(False)


def rollout(rows: slice) -> TensorDict:
    prompts, responses = PROMPTS[rows], RESPONSES[rows]
    prompt, prompt_mask = left_pad(prompts, width=max(map(len, prompts)), pad_id=1)
    width = max(map(len, responses))
    response = torch.tensor([row + [1] * (width - len(row)) for row in responses])
    eos = torch.tensor([1])
    batch = pack_rollout(prompt, prompt_mask, response, eos, width=width, pad_id=1)
    return place_score(batch, torch.tensor(SCORES[rows], dtype=torch.float64))


def optimizer_of(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(network.parameters(), lr=0.01)


def plain(*, tied: bool) -> Parts:
    network, reference = parts(tied=tied)
    return Parts(network, reference, SAFELoss(network), optimizer_of(network))


def replicated() -> Parts:
    """Whole on every rank: the objective is what is called with a backward, so it is wrapped."""
    made = plain(tied=False)
    return made._replace(loss=DistributedDataParallel(made.loss))


def shard_parts(network: CausalLMActorCritic, *, tied: bool) -> None:
    """Each decoder layer; what is left of the backbone; the head; the critic."""
    model = network.language_model
    for layer in model.model.layers:
        fully_shard(layer)
    if tied:
        # One weight belongs to one group.
        fully_shard([model.model.embed_tokens, model.lm_head])
    else:
        fully_shard(model.lm_head)
    fully_shard(model.model)
    fully_shard(network.critic)


def sharded(*, tied: bool) -> Parts:
    """FSDP2, part by part."""
    network, reference = parts(tied=tied)
    shard_parts(network, tied=tied)
    shard_parts(reference, tied=tied)
    return Parts(network, reference, SAFELoss(network), optimizer_of(network))


def sharded_as_one() -> Parts:
    """As accelerate's plugin shards a module that is no language model: layers, then all the rest.

    The head is then whole while the network runs, and ``linear_log_probs`` reads its weight.
    """
    network, reference = parts(tied=False)
    for layer in network.language_model.model.layers:
        fully_shard(layer)
    fully_shard(network)
    return Parts(network, reference, SAFELoss(network), optimizer_of(network))


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def updates(made: Parts, rows: slice) -> Iterator[dict[str, Any]]:
    """The loop; what is held after each update."""
    network, reference, loss, optimizer = made
    control = ControllerModule(EntropyGatedKL())
    names = ("entropy", "state_values", "bootstrap_values")
    prepare = TensorDictSequential(
        Scores(network, {"log_prob": "old_log_prob", **{name: name for name in names}}),
        Scores(reference, {"log_prob": "ref_log_prob"}),
        PolicyMeasurements(),
        control,
        KLBaseline(),
        SoftMinGAE(),
    )
    for _ in range(UPDATES):
        batch = prepare(rollout(rows))
        total_loss(loss(batch)).backward()
        gradients = {name: whole(p.grad) for name, p in network.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        yield {
            "gradients": gradients,
            "parameters": {name: whole(p) for name, p in network.named_parameters()},
            "controller": flatten_state(control.controller.state),
            "sharded": sum(isinstance(p, DTensor) for p in network.parameters()),
            "kl_coef": batch["kl_coef"],
        }


WAYS: dict[str, Callable[[], Parts]] = {
    "replicated": replicated,
    "sharded": lambda: sharded(tied=False),
    "sharded_tied": lambda: sharded(tied=True),
    "sharded_as_one": sharded_as_one,
}


def refusals() -> dict[str, str]:
    """What sharding does not go with, in the words of the error."""
    found = {}
    network, _ = parts(tied=False)
    try:
        fully_shard(SAFELoss(network))
    except TypeError as error:
        found["objective"] = str(error)
    adapters = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(LlamaForCausalLM(llama_config(16)), adapters).eval()
    language_model = adapted.get_base_model()
    for layer in language_model.model.layers:
        fully_shard(layer)
    prompt, mask = left_pad(PROMPTS, width=4, pad_id=1)
    try:
        Sampler(language_model, merged=True).sample(
            prompt, mask, max_new_tokens=2, temperature=1.0, eos_ids=torch.tensor([1]), pad_id=1
        )
    except ValueError as error:
        found["merged"] = str(error)
    return found


def work(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, make in WAYS.items():
        held = list(updates(make(), slice(2 * rank, 2 * rank + 2)))
        torch.save(held, f"{folder}/{name}{rank}.pt")
    torch.save(refusals(), f"{folder}/refusals{rank}.pt")
    # What holds the group, in cycles of references, goes first (docs/distributed.md).
    gc.collect()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_ranks")
    torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_equal_one_process(way: str, folder: Path) -> None:
    ranks = [torch.load(folder / f"{way}{rank}.pt") for rank in (0, 1)]
    expected = list(updates(plain(tied=way == "sharded_tied"), slice(0, 4)))
    for step, one in enumerate(expected):
        assert max(gradient.abs().max() for gradient in one["gradients"].values()) > 1e-2
        # The penalty acts.
        assert (one["kl_coef"] > 0).all()
        for found in (rank[step] for rank in ranks):
            for what in ("gradients", "parameters"):
                assert_close(found[what], one[what], rtol=0, atol=1e-6)
            assert_close(found["controller"], one["controller"], rtol=0, atol=1e-6)
            of = len(one["parameters"])
            assert found["sharded"] == (0 if way == "replicated" else of)
        for name, leaf in ranks[0][step]["controller"].items():
            assert torch.equal(leaf, ranks[1][step]["controller"][name]), name
    moved = (expected[-1]["parameters"][name] - p for name, p in expected[0]["parameters"].items())
    assert all((change.abs() > 1e-3).any() for change in moved)


def test_the_network_is_sharded_and_not_the_objective(folder: Path) -> None:
    for rank in (0, 1):
        found = torch.load(folder / f"refusals{rank}.pt")
        assert "named_parameters() got an unexpected keyword" in found["objective"]


def test_merged_adapters_need_whole_weights(folder: Path) -> None:
    for rank in (0, 1):
        found = torch.load(folder / f"refusals{rank}.pt")
        assert "merged must be False for a sharded language_model" in found["merged"]
