"""Measurements, controller, advantages and objective as one TorchRL pipeline."""

import pytest
import torch
from tensordict import LazyStackedTensorDict, TensorDict, lazy_stack
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import nn
from torch.testing import assert_close
from torchrl.collectors import Collector
from torchrl.modules import OneHotCategorical, ProbabilisticActor
from torchrl.testing.mocking_classes import DiscreteActionVecMockEnv
from transformers import LlamaForCausalLM

from safe_ops import kl_surrogate_token
from safe_ops.controllers import EntropyGatedKL
from safe_rl import (
    ActorCritic,
    CausalLMActorCritic,
    ClippedPolicyLoss,
    ControllerModule,
    KLBaseline,
    KLReward,
    PolicyMeasurements,
    SAFELoss,
    Scores,
    SoftMinCritic,
    SoftMinGAE,
    total_loss,
)
from tests.safe_rl.objectives.batches import TinyNetwork, make_batch
from tests.safe_rl.test_causal_lm import LENGTHS, PROMPTS, rollout
from tests.tiny_models import llama_config

DECISIONS = ("kl_threshold", "entropy_gate", "kl_momentum", "kl_coef")


def scored() -> TensorDict:
    batch = make_batch(fresh=False)
    batch["entropy"] = torch.ones(4, 5, dtype=torch.float64)
    batch["score"] = torch.ones(4, dtype=torch.float64)
    batch["ref_log_prob"] = batch["ref_log_prob"] - 1
    return batch.exclude("kl_coef", "kl_threshold", "entropy_gate", "response_tokens_mean")


def test_a_sequential_ends_in_the_objective():
    law = EntropyGatedKL(coef=1.0)
    network = TinyNetwork()
    pipeline = TensorDictSequential(PolicyMeasurements(), ControllerModule(law), SAFELoss(network))
    losses = pipeline(scored())
    by_hand = ControllerModule(law)(PolicyMeasurements()(scored()))
    assert by_hand["kl_coef"][0] > 0
    assert_close(losses.to_dict(), SAFELoss(network)(by_hand).to_dict())
    total_loss(losses).backward()
    assert network.logits.grad.any()
    # What the pipeline asks for is what nothing in it writes.
    assert "kl_coef" not in pipeline.in_keys
    assert {"old_log_prob", "ref_log_prob", "score", "response_mask"} <= set(pipeline.in_keys)


def test_its_state_is_in_the_pipelines_state_dict():
    first, second = (
        TensorDictSequential(PolicyMeasurements(), ControllerModule(EntropyGatedKL(coef=1.0)))
        for _ in range(2)
    )
    first(scored())
    second.load_state_dict(first.state_dict())
    assert_close(first(scored()).to_dict(), second(scored()).to_dict(), rtol=0, atol=0)


def test_in_the_postproc_of_a_collector():
    """One update of the law a rollout, whatever the number of epochs and minibatches later."""
    torch.manual_seed(0)
    environment = DiscreteActionVecMockEnv()
    size = environment.observation_spec["observation"].shape[-1]
    actions = environment.action_spec.shape[-1]
    net = TensorDictModule(nn.Linear(size, actions), ["observation"], ["logits"])
    actor = ProbabilisticActor(
        net, ["logits"], distribution_class=OneHotCategorical, return_log_prob=True
    )
    critic = TensorDictModule(nn.Linear(size, 2), ["observation"], ["state_values"])
    network = ActorCritic(actor, critic)
    reference = ActorCritic(
        ProbabilisticActor(
            TensorDictModule(nn.Linear(size, actions), ["observation"], ["logits"]),
            ["logits"],
            distribution_class=OneHotCategorical,
        )
    )
    controller = ControllerModule(EntropyGatedKL(coef=1.0, threshold=0.1))
    postproc = TensorDictSequential(
        Scores(network, {"log_prob": "old_log_prob", "entropy": "entropy"}),
        Scores(reference, {"log_prob": "ref_log_prob"}),
        TensorDictModule(lambda reward: reward.mean().expand(reward.shape),
                         [("next", "reward")], ["score"]),
        PolicyMeasurements(),
        controller,
        SoftMinGAE(value_network=critic, time_dim=0),
    )  # fmt: skip
    collector = Collector(
        environment,
        actor,
        frames_per_batch=20,
        total_frames=60,
        postproc=postproc,
        auto_register_policy_transforms=False,
    )
    loss = SAFELoss(network, surrogate=kl_surrogate_token)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for update, batch in enumerate(collector, start=1):
        assert controller.controller.state.step == update
        for key in (*DECISIONS, "advantage", "value_target", "ref_log_prob"):
            assert batch[key].shape[:1] == (20,)
        assert_close(batch["old_log_prob"], batch["action_log_prob"])
        for minibatch in batch.split(10):
            optimizer.zero_grad()
            total_loss(loss(minibatch)).backward()
            optimizer.step()
    assert update == 3
    assert controller.controller.state.step == 3
    collector.shutdown()


@pytest.mark.parametrize("nested", [False, True])
def test_the_loop_step_is_one_call(nested):
    """Measure, decide and lose in one module, with keys of one's own."""
    measure, loss = PolicyMeasurements(), SAFELoss()
    batch = make_batch().exclude("kl_coef", "kl_threshold", "entropy_gate")
    batch["score"] = torch.ones(4, dtype=torch.float64)
    expected = TensorDictSequential(measure, ControllerModule(EntropyGatedKL()), loss)(
        batch.clone()
    )
    out_keys = {("control", key) if nested else key: key for key in DECISIONS}
    measure, loss = PolicyMeasurements(), SAFELoss()
    if nested:
        loss.set_keys(**{key: ("control", key) for key in ("kl_coef", "entropy_gate")})
        measure.set_keys(kl=("m", "kl"))
    controller = ControllerModule(
        EntropyGatedKL(),
        in_keys={
            "kl": ("m", "kl") if nested else ("measurements", "kl"),
            "entropy": ("measurements", "entropy"),
            "reward": ("measurements", "reward"),
        },
        out_keys=out_keys,
    )
    found = TensorDictSequential(measure, controller, loss)(batch)
    assert_close(found.to_dict(), expected.to_dict(), rtol=0, atol=0)


def test_ragged_prompts_and_responses_of_a_language_model():
    """Lazily stacked rows, unpadded, give what the packed batch gives: value and gradient."""
    gradients, losses = [], []
    packed = rollout(prompt_width=5)
    rows = []
    for row, prompt, length in zip(packed.unbind(0), PROMPTS, LENGTHS, strict=True):
        rows.append(
            TensorDict(
                {
                    "tokens": {
                        "prompt": torch.tensor(prompt),
                        "response": row["tokens", "response"][:length],
                    },
                    "prompt_mask": torch.ones(len(prompt), dtype=torch.bool),
                    "response_mask": torch.ones(length, dtype=torch.bool),
                },
                [],
            )
        )
    for batch in (packed.exclude("response_tokens_mean"), lazy_stack(rows)):
        torch.manual_seed(0)
        model = LlamaForCausalLM(llama_config(20)).eval()
        network = CausalLMActorCritic(model, SoftMinCritic(16))
        loss = ClippedPolicyLoss(network)
        given = []
        for row, length in zip(batch.unbind(0), LENGTHS, strict=True):
            width = row["response_mask"].shape[0]
            place = torch.arange(width) / 7
            extra = {"old_log_prob": -2 - place, "advantage": 1 + place * length}
            given.append(row.copy().update(extra))
        result = loss(lazy_stack(given))
        losses.append(result.detach().to_dict())
        total_loss(result).backward()
        gradients.append(model.get_output_embeddings().weight.grad)
    assert_close(losses[1], losses[0])
    assert_close(gradients[1], gradients[0])
    assert gradients[0].any()


# --- ragged rows --------------------------------------------------------------------------------


def responses() -> TensorDict:
    """Scored, with what every module of the chain reads; the second response has no token."""
    batch = scored()
    batch["response_mask"][1] = False
    mask = batch["response_mask"]
    last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    generator = torch.Generator().manual_seed(4)
    batch["reward"] = torch.randn(4, 5, 1, generator=generator).double() * last.unsqueeze(-1)
    batch["terminated"] = last.unsqueeze(-1)
    batch["truncated"] = torch.zeros(4, 5, 1, dtype=torch.bool)
    batch["kl_reward_coef"] = torch.full((4,), 0.1, dtype=torch.float64)
    batch["state_values"] = torch.randn(4, 5, 2, generator=generator).double()
    batch["old_log_prob"] = batch["old_log_prob"] * mask
    return batch.exclude("advantage", "value_target", "kl_baseline", "old_state_values")


def ragged(batch: TensorDict) -> TensorDict:
    """Each row as long as it is, and a text for each."""
    rows = []
    for row, place in zip(batch.unbind(0), range(4), strict=True):
        length = int(row["response_mask"].sum())
        cut = {
            key: value[:length] if value.ndim and value.shape[0] == 5 else value
            for key, value in row.items(True, True)
        }
        rows.append(TensorDict(cut, []).set("text", f"row {place}"))
    return lazy_stack(rows)


def links() -> dict[str, TensorDictModuleBase]:
    """What stands before the loss, in order; each reads what those before it write."""
    return {
        "scores": Scores(TinyNetwork(), {"entropy": "entropy", "log_prob": "old_log_prob"}),
        "measurements": PolicyMeasurements(),
        "controller": ControllerModule(EntropyGatedKL(coef=1.0)),
        "baseline": KLBaseline(),
        "reward": KLReward(),
        "advantages": SoftMinGAE(discount=0.9),
    }


def compared(found: TensorDict, expected: TensorDict) -> None:
    """What is written, where a token counts: the network scores padding too, as token 0."""
    mask = expected["response_mask"]
    assert_close(found["response_mask"], mask)
    for key, value in expected.items(True, True):
        if value.ndim > 1 and value.shape[:2] == mask.shape and value.dtype != torch.bool:
            assert_close(found[key][mask], value[mask], msg=str(key))
        elif value.ndim == 1:
            assert_close(found[key], value, msg=str(key))


@pytest.mark.parametrize("name", [name for name in links() if name != "controller"])
def test_each_module_takes_ragged_rows(name):
    batch = responses()
    given = ragged(batch)
    found = links()[name](given)
    assert not isinstance(found, LazyStackedTensorDict)
    compared(found, links()[name](batch))
    assert list(found["text"]) == [f"row {place}" for place in range(4)]
    # The rows that were given are left as they were.
    assert set(given.keys(True, True)) == set(ragged(responses()).keys(True, True))


def test_the_chain_takes_ragged_rows_and_one_of_no_token():
    networks, losses = [TinyNetwork(), TinyNetwork()], []
    for network, batch in zip(networks, (responses(), ragged(responses())), strict=True):
        chain = TensorDictSequential(*links().values(), SAFELoss(network, token_kl_coef=0.1))
        losses.append(chain(batch))
        total_loss(losses[-1]).backward()
    assert_close(losses[1].to_dict(), losses[0].to_dict())
    assert losses[0]["loss_kl"] != 0
    for dense, padded in zip(*(network.parameters() for network in networks), strict=True):
        assert_close(padded.grad, dense.grad)
        assert dense.grad.any()


def test_rows_of_one_length_are_written_in_place():
    batch = responses()
    rows = lazy_stack(list(batch.exclude("tokens").unbind(0)))
    found = SoftMinGAE()(rows)
    assert found is rows
    assert_close(rows["advantage"], SoftMinGAE()(batch)["advantage"])


def test_trajectories_of_unequal_lengths():
    """[T] each, as an environment's: the lengths are the mask, and its dimension the time."""
    lengths, rows = (3, 1, 5), []
    generator = torch.Generator().manual_seed(0)
    for length in lengths:
        end = (torch.arange(length) == length - 1).unsqueeze(-1)
        rows.append(
            TensorDict(
                {
                    "observation": torch.randn(length, 3, generator=generator),
                    "next": {
                        "observation": torch.randn(length, 3, generator=generator),
                        "reward": torch.randn(length, 1, generator=generator),
                        "terminated": end,
                        "truncated": end & False,
                    },
                },
                [length],
                names=["time"],
            )
        )
    torch.manual_seed(0)
    critic = TensorDictModule(nn.Linear(3, 2), ["observation"], ["state_values"])
    estimate = SoftMinGAE(value_network=critic, average_gae=False)
    found = estimate(lazy_stack(rows))
    assert found.batch_size == (3, 5)
    assert found.names == [None, "time"]
    assert found["response_mask"].sum(1).tolist() == list(lengths)
    for row, expected, length in zip(found, rows, lengths, strict=True):
        assert_close(row["advantage"][:length], estimate(expected)["advantage"])


def test_a_batch_of_no_steps_is_empty_everywhere():
    """All responses cut to nothing: no error, losses of 0, and a law that holds."""
    batch = responses()
    empty = TensorDict(
        {
            key: value[:, :0] if value.ndim > 1 and value.shape[1] == 5 else value
            for key, value in batch.items(True, True)
            if key != ("tokens", "response")
        },
        [4],
    )
    for key in ("entropy", "log_prob"):
        empty[key] = torch.zeros(4, 0, dtype=torch.float64)
    modules = links()
    modules.pop("scores")
    found = TensorDictSequential(*modules.values())(empty)
    shapes = {"advantage": (4, 0, 1), "value_target": (4, 0, 1), "kl_baseline": (4, 0)}
    assert {key: found[key].shape for key in shapes} == shapes
    # Of nothing there is no mean: NaN, at which the law holds, and counts it.
    state = modules["controller"].controller.state
    assert (state.step, state.non_finite) == (0, 1)
    per_head = SoftMinGAE(per_head_targets=True)(found.copy())
    assert per_head["value_target"].shape == (4, 0, 2)
    found["old_state_values"] = found["state_values"]
    found["kl_coef"] = torch.ones(4)
    losses = SAFELoss(value_clip=0.2, token_kl_coef=0.1)(found)
    assert all(value.isfinite() for value in losses.values())
    assert total_loss(losses) == 0
    assert losses["ratio_max"] == 0


@pytest.mark.parametrize("shifted", [False, True])
def test_no_step_of_an_environment(shifted):
    torch.manual_seed(0)
    critic = TensorDictModule(nn.Linear(3, 2), ["observation"], ["state_values"])
    flags = torch.zeros(2, 0, 1, dtype=torch.bool)
    states = {"observation": torch.zeros(2, 0, 3)}
    ends = {"reward": torch.zeros(2, 0, 1), "terminated": flags, "truncated": flags}
    batch = TensorDict({**states, "next": {**states, **ends}}, [2, 0])
    estimate = SoftMinGAE(value_network=critic, shifted=shifted)
    found = estimate(batch)
    assert {found[key].shape[:2] for key in estimate.out_keys} == {(2, 0)}
    assert found["state_values"].shape == (2, 0, 2)


def test_no_token_of_a_language_model():
    batch = rollout()
    batch["tokens", "response"] = batch["tokens", "response"][:, :0]
    batch["response_mask"] = batch["response_mask"][:, :0]
    torch.manual_seed(0)
    network = CausalLMActorCritic(LlamaForCausalLM(llama_config(20)).eval(), SoftMinCritic(16))
    found = network(batch)
    assert found["log_prob"].shape == found["entropy"].shape == (4, 0)
    assert found["state_values"].shape == (4, 0, 2)
    # The state after the prompt has a value all the same.
    assert found["bootstrap_values"].shape == (4, 2)
