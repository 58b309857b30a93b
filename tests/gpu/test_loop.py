"""Sampling and the example's loop on a GPU."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples.lm_rlhf.config import tiny
from examples.lm_rlhf.train import train
from safe_rl.integrations.transformers import Sampler
from safe_rl.rollouts import left_pad
from tests.safe_rl.integrations import models
from tests.tiny_models import save_language_model, save_reward_model

# transformers warns of its own renaming when peft wraps a model.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.mark.parametrize("merged", [True, False])
def test_drawn_log_probs_are_those_of_a_plain_forward(
    gpu: torch.device, merged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, recorded = torch.cuda.make_graphed_callables, []

    def spy(step, inputs: tuple[Tensor, ...], **more):
        recorded.append(len(inputs[1]))
        return record(step, inputs, **more)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", spy)
    model = models.with_lora(models.llama()).get_base_model().to(gpu)
    sampler = Sampler(model, merged=merged)
    prompts = [[4, 5], [5, 6, 8], [9, 2, 4, 4], [3], [8, 8], [5, 2, 2]]
    # The second time with other weights, the third with a larger cache and fewer rows.
    for rows, new_tokens in ((6, 30), (6, 30), (4, 58)):
        models.move_adapters(model, 0.1)
        prompt, mask = left_pad(prompts[:rows], width=6, pad_id=1)
        prompt, mask = prompt.to(gpu), mask.to(gpu)
        eos = torch.tensor([1], device=gpu)
        sampled = sampler.sample(
            prompt, mask, max_new_tokens=new_tokens, temperature=0.8, eos_ids=eos, pad_id=1
        )
        expected = plain_log_prob(model, prompt, mask, sampled.tokens, temperature=0.8)
        counts = (sampled.tokens == 1).cumsum(1) - (sampled.tokens == 1).long() == 0
        assert counts.sum() > 3 * rows
        torch.testing.assert_close(sampled.log_prob[counts], expected[counts], rtol=0, atol=1e-4)
    # A graph for 6 rows at most, or for 4, 2 and 1; again where the cache has grown.
    assert (0 < len(recorded) <= 7) if merged else not recorded


@torch.no_grad()
def plain_log_prob(model, prompt: Tensor, mask: Tensor, response: Tensor, *, temperature: float):
    """By one forward."""
    tokens = torch.cat([prompt, response], 1)
    visible = torch.cat([mask, torch.ones_like(response).bool()], 1)
    logits = model(
        input_ids=tokens,
        attention_mask=visible.long(),
        position_ids=(visible.cumsum(1) - 1).clamp_min(0),
    ).logits[:, prompt.shape[1] - 1 : -1]
    found = (logits.float() / temperature).log_softmax(-1)
    return found.gather(-1, response.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("algorithm", ["safe", "ppo"])
def test_the_example_runs_and_goes_on(gpu: torch.device, algorithm: str, tmp_path: Path) -> None:
    config = dataclasses.replace(
        tiny(str(save_language_model(tmp_path / "policy"))),
        reward_model=str(save_reward_model(tmp_path / "reward")),
        algorithm=algorithm,
    )
    (tmp_path / "prompts.txt").write_text("tell me about a day\na good meeting\n")
    config = dataclasses.replace(config, prompts=tmp_path / "prompts.txt")
    output = tmp_path / "run"
    train(dataclasses.replace(config, steps=2), output, resume=False)
    train(config, output, resume=True)
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    updates = [line for line in lines if line.get("record") == "update"]
    assert [update["step"] for update in updates] == [0, 1, 2, 3]
    for update in updates:
        assert update["ratio_first"] == pytest.approx(1.0, abs=1e-4)
        assert update["non_finite"] == 0
    assert updates[0]["kl_nats_per_token"] == pytest.approx(0.0, abs=1e-4)
    assert updates[-1]["kl_nats_per_token"] != updates[0]["kl_nats_per_token"]
