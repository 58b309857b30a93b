"""The engine against the installed vLLM (its build for a CPU), on a tiny model."""

import dataclasses
import os
from pathlib import Path

# Before vllm is imported: one process, and a cache of keys and values for a tiny model.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM

from examples.lm_rlhf.config import tiny
from examples.lm_rlhf.engine import base_weights
from examples.lm_rlhf.models import Policy, with_adapters
from examples.lm_rlhf.train import train
from safe_rl.integrations.vllm import VLLMEngine
from safe_rl.monitoring import RunLog
from tests.tiny_models import tokenizer

# What vLLM warns of itself, at import and at start.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

VOCABULARY, EOS, PAD = 64, 1, 0
SETTINGS = {"max_new_tokens": 8, "eos_ids": torch.tensor([EOS]), "pad_id": PAD}


def config() -> LlamaConfig:
    # vLLM's attention on a CPU takes heads of 32.
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[PeftModel, Path]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(config()).eval()
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"])
    return get_peft_model(model, lora).eval(), folder


def make_llm(folder: Path, **given: object) -> LLM:
    settings = {
        "skip_tokenizer_init": True,
        "enable_lora": True,
        "max_lora_rank": 8,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 64,
        "logprobs_mode": "processed_logprobs",
    }
    return LLM(str(folder), **{**settings, **given})


@pytest.fixture(scope="module")
def engine(policy, tmp_path_factory: pytest.TempPathFactory) -> VLLMEngine:
    peft_model, folder = policy
    return VLLMEngine(peft_model, make_llm(folder), tmp_path_factory.mktemp("adapters"))


def shake(peft_model: PeftModel, seed: int) -> None:
    """Other adapters: a policy that has moved."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)


def prompts() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    tokens = torch.randint(2, VOCABULARY, (12, 6))
    mask = torch.arange(6) >= torch.arange(12).unsqueeze(1) % 4
    return torch.where(mask, tokens, PAD), mask


def scored(peft_model: PeftModel, prompt, mask, tokens, temperature) -> Tensor:
    """Log-probs of the tokens by a plain forward."""
    ids = torch.cat((prompt, tokens), 1)
    full = torch.cat((mask, torch.ones_like(tokens, dtype=torch.bool)), 1)
    positions = (full.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = peft_model(ids, attention_mask=full, position_ids=positions).logits
    log_probs = (logits[:, prompt.shape[1] - 1 : -1] / temperature).log_softmax(-1)
    return log_probs.gather(2, tokens.unsqueeze(2)).squeeze(2)


def is_response(tokens: Tensor) -> Tensor:
    """Up to the first EOS, which counts."""
    ended = (tokens == EOS).cumsum(1)
    return (ended - (tokens == EOS).long()) == 0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_it_draws_from_the_policy_as_it_is(policy, engine, temperature) -> None:
    peft_model, _ = policy
    prompt, mask = prompts()
    for seed in (2, 3):
        shake(peft_model, seed)
        sampled = engine.sample(prompt, mask, temperature=temperature, **SETTINGS)
        expected = scored(peft_model, prompt, mask, sampled.tokens, temperature)
        counts = is_response(sampled.tokens)
        expected = torch.where(counts, expected, 0.0)
        torch.testing.assert_close(sampled.log_prob, expected, rtol=0, atol=1e-4)
        assert bool((sampled.tokens[~counts] == PAD).all())
    # The adapters matter.
    with peft_model.disable_adapter():
        base = scored(peft_model, prompt, mask, sampled.tokens, temperature)
    assert float((base - expected)[counts].abs().max()) > 0.1


def test_the_generator_decides_what_is_drawn(policy, engine) -> None:
    prompt, mask = prompts()
    first, again, other = (
        engine.sample(
            prompt,
            mask,
            temperature=1.0,
            generator=torch.Generator().manual_seed(seed),
            **SETTINGS,
        ).tokens
        for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_frequencies_are_the_policys(policy, engine) -> None:
    peft_model, _ = policy
    shake(peft_model, 4)
    prompt = torch.tensor([[5, 9, 17]]).repeat(3000, 1)
    mask = torch.ones_like(prompt, dtype=torch.bool)
    drawn = engine.sample(
        prompt, mask, temperature=1.0, **{**SETTINGS, "max_new_tokens": 1}
    ).tokens.flatten()
    with torch.no_grad():
        expected = peft_model(prompt[:1]).logits[0, -1].softmax(-1)
    seen = torch.bincount(drawn, minlength=VOCABULARY) / len(drawn)
    # Five standard errors of each frequency.
    assert bool(((seen - expected).abs() <= 5 * (expected / len(drawn)).sqrt() + 1e-3).all())


def test_only_the_last_adapters_are_kept(engine) -> None:
    prompt, mask = prompts()
    for _ in range(3):
        engine.sample(prompt, mask, temperature=1.0, **SETTINGS)
    assert len(list(engine._folder.iterdir())) == 2


def test_what_it_cannot_do_is_refused(policy, engine, tmp_path) -> None:
    peft_model, folder = policy
    prompt, mask = prompts()
    with pytest.raises(ValueError, match=r"temperature must be positive, got 0.0"):
        engine.sample(prompt, mask, temperature=0.0, **SETTINGS)
    with pytest.raises(ValueError, match="enable_lora=True"):
        VLLMEngine(peft_model, make_llm(folder, enable_lora=False), tmp_path)
    with pytest.raises(ValueError, match=r"processed_logprobs.*raw_logprobs"):
        VLLMEngine(peft_model, make_llm(folder, logprobs_mode="raw_logprobs"), tmp_path)


def test_the_example_samples_with_it(tmp_path, monkeypatch) -> None:
    words = tokenizer()
    words.save_pretrained(tmp_path / "model")
    model = config()
    model.vocab_size = len(words)
    LlamaForCausalLM(model).save_pretrained(tmp_path / "model")
    drawn = []
    sample = VLLMEngine.sample
    monkeypatch.setattr(
        VLLMEngine, "sample", lambda *given, **named: drawn.append(1) or sample(*given, **named)
    )
    settings = dataclasses.replace(tiny(str(tmp_path / "model")), vllm=0.3, steps=2)
    train(settings, tmp_path / "run", resume=False)
    log = RunLog.read(tmp_path / "run" / "log.jsonl")
    updates = [record for record in log if record["record"] == "update"]
    assert len(updates) == len(drawn) == 2
    # The reference is the policy before the first update, and scores are those of the loop.
    assert updates[0]["kl_nats_per_token"] == pytest.approx(0.0, abs=1e-5)
    assert abs(updates[1]["kl_nats_per_token"]) > 1e-5


def test_weights_in_no_folder_are_written_for_it(tmp_path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(config()).eval()
    ids = torch.arange(2, 10)[None]
    expected = model(ids).logits
    settings = dataclasses.replace(tiny("any"), random_weights=True)
    policy = Policy(with_adapters(model, settings), tokenizer(), torch.tensor([EOS]), PAD)
    shake(policy.peft_model, 7)
    folder = base_weights(settings, policy, tmp_path / "base")
    torch.testing.assert_close(LlamaForCausalLM.from_pretrained(folder)(ids).logits, expected)
