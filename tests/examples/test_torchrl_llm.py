"""The example on TorchRL's language-model stack: what one update is made of."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.lm_rlhf.config import tiny
from examples.lm_rlhf.models import load_policy
from examples.torchrl_llm import main, sampler, train
from tests.tiny_models import save_language_model

PROMPTS = ["tell me about a day", "a rainy meeting", "love", "bad day on a street"]


def lengths(prompts, texts):
    return torch.tensor([float(len(text.split())) for text in texts])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_language_model(tmp_path_factory.mktemp("llm") / "model", chat=True)


@pytest.fixture(scope="module")
def updates(model):
    config = dataclasses.replace(
        tiny(str(model)), steps=2, minibatch_size=4, system_message="love", max_new_tokens=12
    )
    return train(config, PROMPTS, lengths)


def test_the_ratio_before_an_update_is_one(updates):
    for _, losses in updates:
        assert losses["ratio_max"] == 1
        assert losses["clip_fraction"] == 0


def test_log_probs_are_those_of_a_plain_forward(updates, model):
    batch = updates[0].batch
    language_model = AutoModelForCausalLM.from_pretrained(model).eval()
    for row in batch:
        mask = row["response_mask"]
        prompt = row["tokens", "prompt"][row["prompt_mask"]]
        response = row["tokens", "response"][mask]
        with torch.no_grad():
            logits = language_model(torch.cat([prompt, response])[None]).logits[0]
        of_response = logits[len(prompt) - 1 : -1].log_softmax(-1)
        expected = of_response.gather(1, response[:, None]).squeeze(1)
        # Before the first update the policy is the reference, which is the model as published.
        for key in ("old_log_prob", "ref_log_prob"):
            assert_close(row[key][mask], expected, rtol=0, atol=1e-5)
        # The first token too, of which TorchRL's generating path says 0.
        assert row["old_log_prob"][0] < -0.01
    assert batch["measurements", "kl"][0] == 0
    assert updates[1].batch["measurements", "kl"][0] != 0


def test_prompts_are_the_models_own_template(updates, model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    expected = sorted(tokenizer(f"love {prompt}")["input_ids"] for prompt in PROMPTS)
    for batch, _ in updates:
        found = [row["tokens", "prompt"][row["prompt_mask"]].tolist() for row in batch]
        assert sorted(found) == expected


def test_masks_end_at_the_eos(updates, model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    ended = 0
    for batch, _ in updates:
        for row in batch:
            tokens, mask = row["tokens", "response"].tolist(), row["response_mask"]
            count = int(mask.sum())
            assert mask.tolist() == [True] * count + [False] * (12 - count)
            if tokenizer.eos_token_id in tokens:
                assert count == tokens.index(tokenizer.eos_token_id) + 1
                ended += 1
            else:
                assert count == 12
            # Paid on the last token, the EOS included.
            paid = row["reward"].squeeze(-1)
            assert paid.nonzero().flatten().tolist() == ([count - 1] if paid.any() else [])
            assert paid.sum() == row["score"]
            words = tokenizer.decode(tokens[:count], skip_special_tokens=True).split()
            assert row["score"] == len(words)
    assert 0 < ended < 8


def test_every_word_of_the_vocabulary_may_be_drawn(model):
    config = tiny(str(model))
    policy = load_policy(config)
    wrapper = sampler(policy, config)
    drawn = wrapper.generate_kwargs
    assert (drawn["top_k"], drawn["top_p"]) == (policy.language_model.config.vocab_size, 1.0)
    assert drawn["temperature"] == config.temperature
    assert drawn["do_sample"] is True


@pytest.mark.slow
def test_on_smollm2(capsys):
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["update 0", "update 1"]
    assert "KL 0.0000 " in lines[0]
    assert "KL 0.0000 " not in lines[1]
