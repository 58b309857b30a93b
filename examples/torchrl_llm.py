"""SAFE on TorchRL's stack for language models, from its environment to its collector.

    python -m examples.torchrl_llm --updates 2

A ``DatasetChatEnv`` asks, a ``TransformersWrapper`` answers, an ``LLMCollector`` gathers the turns.
Its ``postproc`` makes a rollout of ours of them: scored by policy and reference, measured, one move
of the controller, advantages. What is left of the loop is the loss and a step.
"""

import argparse
import dataclasses
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from torch import Tensor
from torch.utils.data import DataLoader
from torchrl.collectors.llm import LLMCollector
from torchrl.envs import InitTracker, Transform
from torchrl.envs.llm import DatasetChatEnv
from torchrl.modules.llm import TransformersWrapper

from examples.lm_rlhf.config import Config, smollm2_135m
from examples.lm_rlhf.models import Policy, load_policy, read_prompts
from examples.lm_rlhf.rewards import Reward, vader_reward
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
from safe_rl.rollouts import pack_rollout, place_score


class Update(NamedTuple):
    """A rollout, ready for the loss, and the losses before the step."""

    batch: TensorDictBase
    losses: TensorDictBase


class ScoreResponse(Transform):
    """Pays a response when it is given and ends the episode."""

    def __init__(self, policy: Policy, reward: Reward) -> None:
        super().__init__()
        self.tokenizer, self.reward = policy.tokenizer, reward

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        # Not ("text", "response"), in which special tokens are words.
        texts = self.tokenizer.batch_decode(
            tensordict["tokens", "response"], skip_special_tokens=True
        )
        reward = self.reward(list(tensordict["query"]), texts).unsqueeze(-1)
        next_tensordict.set("reward", reward)
        for key in ("done", "terminated"):
            next_tensordict.set(key, torch.ones_like(reward, dtype=torch.bool))
        return next_tensordict


class Rollout(TensorDictModuleBase):
    """A batch of the collector, [B, 1], as a rollout of ours, [B].

    Masks go by position, so the pad token may be the EOS: TorchRL's ``tokens != pad`` would then
    lose the EOS of every answer. Its log-probs are not read at all, since the first is always 0.
    """

    def __init__(self, *, eos_ids: Tensor, pad_id: int, width: int) -> None:
        super().__init__()
        self.eos_ids, self.pad_id, self.width = eos_ids, pad_id, width
        self.in_keys = [("tokens", "prompt"), ("tokens", "response"), ("next", "reward")]
        self.out_keys = [("tokens", "prompt"), ("tokens", "response"), "response_mask", "score"]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """A new TensorDict; what else was collected is left behind."""
        prompt, response = (
            tensordict["tokens", part].flatten(0, 1) for part in ("prompt", "response")
        )
        batch = pack_rollout(
            prompt,
            (prompt != self.pad_id).cummax(1).values,
            response,
            self.eos_ids,
            width=self.width,
            pad_id=self.pad_id,
        )
        return place_score(batch, tensordict["next", "reward"].flatten())


class WithoutAdapters(TensorDictModuleBase):
    """The network with the adapters off: the reference."""

    def __init__(self, network: TensorDictModuleBase, peft_model: PeftModel) -> None:
        super().__init__()
        self.network, self.peft_model = network, peft_model
        self.in_keys, self.out_keys = network.in_keys, network.out_keys

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """What the network writes."""
        with self.peft_model.disable_adapter():
            return self.network(tensordict)


def chat_environment(
    policy: Policy, prompts: list[str], reward: Reward, config: Config
) -> DatasetChatEnv:
    """``batch_size`` chats at a time, each of one turn, as texts of the model's own template."""
    queries: Any = [{"query": prompt} for prompt in prompts]  # a list has what a Dataset needs
    asked = DataLoader(
        queries,
        batch_size=config.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=lambda rows: {"query": [row["query"] for row in rows]},
    )
    # As texts: as tokens, prompts of unequal lengths do not stack. TorchRL has a template of its
    # own for models that it does not know.
    environment = DatasetChatEnv.from_dataloader(
        asked,
        batch_size=(config.batch_size,),
        tokenizer=policy.tokenizer,
        input_mode="text",
        system_prompt=config.system_message,
        template_kwargs={"chat_template": policy.tokenizer.chat_template},
    )
    environment.append_transform(ScoreResponse(policy, reward))
    environment.append_transform(InitTracker())
    return environment


def sampler(policy: Policy, config: Config) -> TransformersWrapper:
    """Draws from the whole distribution, which is what the responses are scored with."""
    return TransformersWrapper(
        policy.language_model,
        tokenizer=policy.tokenizer,
        input_mode="text",
        generate=True,
        pad_output=True,
        return_log_probs=False,
        generate_kwargs={
            "do_sample": True,
            "temperature": config.temperature,
            "top_p": 1.0,
            "top_k": policy.language_model.config.vocab_size,
            "max_new_tokens": config.max_new_tokens,
            "eos_token_id": policy.eos_ids.tolist(),
            "pad_token_id": policy.pad_id,
        },
    )


def rollout(policy: Policy, config: Config) -> Rollout:
    """For responses of that policy."""
    return Rollout(eos_ids=policy.eos_ids, pad_id=policy.pad_id, width=config.max_new_tokens)


def train(config: Config, prompts: list[str], reward: Reward) -> list[Update]:
    """One step a rollout, ``config.steps`` times."""
    torch.manual_seed(config.seed)
    policy = load_policy(config)
    hidden_size = policy.language_model.config.hidden_size
    critic = SoftMinCritic(hidden_size, num_heads=config.critic_heads)
    network = CausalLMActorCritic(policy.language_model, critic, temperature=config.temperature)
    loss = SAFELoss(network, clip=config.clip, entropy_coef=config.entropy_coef)
    optimizer = torch.optim.Adam(
        [
            {"params": [p for p in policy.language_model.parameters() if p.requires_grad]},
            {"params": critic.parameters(), "lr": config.critic_learning_rate},
        ],
        lr=config.policy_learning_rate,
    )
    names = ("entropy", "state_values", "bootstrap_values")
    prepare = TensorDictSequential(
        rollout(policy, config),
        Scores(network, {"log_prob": "old_log_prob", **{name: name for name in names}}),
        Scores(WithoutAdapters(network, policy.peft_model), {"log_prob": "ref_log_prob"}),
        PolicyMeasurements(),
        ControllerModule(config.kl_law),
        KLBaseline(),
        SoftMinGAE(),
    )
    updates = []
    collector = LLMCollector(
        chat_environment(policy, prompts, reward, config),
        policy=sampler(policy, config),
        dialog_turns_per_batch=config.batch_size,
        total_dialog_turns=config.batch_size * config.steps,
        reset_at_each_iter=True,
        postproc=prepare,
    )
    for batch in collector:
        losses = loss(batch)
        optimizer.zero_grad()
        total_loss(losses).backward()
        optimizer.step()
        updates.append(Update(batch, losses.detach()))
    collector.shutdown()
    return updates


def main(argv: list[str] | None = None) -> None:
    """Train and print one line an update."""
    config = dataclasses.replace(smollm2_135m(), batch_size=4, minibatch_size=4, max_new_tokens=16)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=config.model, help="causal-LM folder or hub id")
    parser.add_argument("--updates", type=int, default=2)
    options = parser.parse_args(argv)
    config = dataclasses.replace(config, model=options.model, steps=options.updates)
    for step, (batch, losses) in enumerate(
        train(config, read_prompts(config.prompts), vader_reward())
    ):
        kl, entropy, mean = (batch["measurements", k][0] for k in ("kl", "entropy", "reward"))
        print(
            f"update {step}: reward {mean:.3f}, KL {kl:.4f} and entropy {entropy:.2f} nats per "
            f"token, {batch['response_mask'].sum()} tokens, loss {total_loss(losses):.4f}"
        )


if __name__ == "__main__":
    main()
