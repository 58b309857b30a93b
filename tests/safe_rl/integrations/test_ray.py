"""TorchRL's language-model collector as two actors of a local Ray, on a tiny model."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import ray
import torch
from tensordict import TensorDict
from torchrl.collectors.llm import RayLLMCollector
from torchrl.envs.llm import DatasetChatEnv
from torchrl.modules.llm import TransformersWrapper

from examples.lm_rlhf.config import Config, tiny
from examples.lm_rlhf.models import load_policy
from examples.torchrl_llm import chat_environment, rollout, sampler
from safe_rl import CausalLMActorCritic, Scores, SoftMinCritic
from tests.tiny_models import save_language_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
PROMPTS = ["tell me about a day", "a rainy meeting", "love", "bad day on a street"]


def lengths(prompts, texts):
    return torch.tensor([float(len(text.split())) for text in texts])


def environment(config: Config) -> DatasetChatEnv:
    return chat_environment(load_policy(config), PROMPTS, lengths, config)


def policy_of_worker(config: Config, seed: int) -> TransformersWrapper:
    torch.manual_seed(seed)
    return sampler(load_policy(config), config)


@pytest.fixture
def local_ray() -> Iterator[None]:
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}},
    )
    yield
    ray.shutdown()


def test_two_workers(local_ray, tmp_path):
    model = save_language_model(tmp_path / "model", chat=True)
    config = dataclasses.replace(tiny(str(model)), minibatch_size=4, system_message="love")
    policy = load_policy(config)
    collectors = [
        RayLLMCollector(
            partial(environment, config),
            policy_factory=partial(policy_of_worker, config, seed),
            dialog_turns_per_batch=config.batch_size,
            reset_at_each_iter=True,
            postproc=rollout(policy, config),
            remote_config={"num_cpus": 1},
        )
        for seed in (0, 1)
    ]
    network = CausalLMActorCritic(policy.language_model, SoftMinCritic(16))
    score = Scores(network, {"log_prob": "old_log_prob", "entropy": "entropy"})
    for _ in range(2):
        pieces = [collector.next() for collector in collectors]
        for piece in pieces:
            assert isinstance(piece, TensorDict)
            assert piece.batch_size == (4,)
        responses = [piece["tokens", "response"] for piece in pieces]
        assert (responses[0] != responses[1]).any()
        batch = score(torch.cat(pieces))
        # The workers draw from the policy that they were given: about 17 words, none certain.
        assert batch["old_log_prob"][batch["response_mask"]].mean() < -1
    # Sent to the workers, a policy that is certain of every word is what they answer with.
    with torch.no_grad():
        policy.language_model.lm_head.weight.mul_(1e3)
    weights = TensorDict.from_module(sampler(policy, config)).data
    for collector in collectors:
        collector.update_policy_weights_(weights)
    batch = score(torch.cat([collector.next() for collector in collectors]))
    # Thousands below, were they another policy's; a near tie may leave a second choice.
    assert batch["old_log_prob"][batch["response_mask"]].min() > -2
    for collector in collectors:
        collector.shutdown()
