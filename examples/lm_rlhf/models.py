"""Policies: SmolLM2 out of a published package, a folder or hub id, or random weights."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from examples.lm_rlhf.architectures import (
    PACKAGED_SMOLLM2,
    packaged_smollm2,
    random_model,
    read_architecture,
)
from examples.lm_rlhf.config import Config
from examples.lm_rlhf.rewards import first_line


@dataclass
class Policy:
    """A language model with adapters, whose reference is itself with the adapters off."""

    peft_model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    eos_ids: Tensor
    pad_id: int

    @property
    def language_model(self) -> PreTrainedModel:
        """The causal language model with the adapters in place."""
        return self.peft_model.get_base_model()


def load_policy(config: Config) -> Policy:
    """Load the model, freeze it and put the adapters in.

    Raises:
        ValueError: the model does not load; the message names it.
    """
    try:
        tokenizer, model = _load(config)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ValueError(f"model {config.model!r} does not load: {first_line(error)}") from error
    peft_model = with_adapters(model, config)
    eos = model.generation_config.eos_token_id if model.generation_config else None
    eos = eos if eos is not None else tokenizer.eos_token_id
    if eos is None:
        raise ValueError(f"model {config.model!r} has no end-of-sequence token")
    eos_ids = torch.tensor([eos] if isinstance(eos, int) else eos)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else int(eos_ids[0])
    return Policy(peft_model, tokenizer, eos_ids, pad_id)


def with_adapters(model: PreTrainedModel, config: Config) -> PeftModel:
    """The model, frozen, with LoRA adapters in place and in evaluation mode."""
    adapters = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=list(config.lora_targets),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # A name that transformers has changed and peft still reads; nothing a user can act on.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        peft_model = get_peft_model(model, adapters)
    # Dropout off throughout: with it the importance ratio differs from 1 before any update.
    return peft_model.eval()


def _load(config: Config) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    dtype = getattr(torch, config.dtype)
    if config.random_weights:
        return _random(config, dtype)
    if config.model != PACKAGED_SMOLLM2:
        tokenizer = AutoTokenizer.from_pretrained(config.model)
        return tokenizer, AutoModelForCausalLM.from_pretrained(config.model, dtype=dtype)
    folder, file = packaged_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    return tokenizer, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, gguf_file=file)


def _random(config: Config, dtype: torch.dtype) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Random weights know no language: any real tokenizer does whose ids they have rows for."""
    architecture = read_architecture(config.model)
    folder, file = packaged_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    if architecture.vocab_size < len(tokenizer):
        raise ValueError(
            f"random weights are used with the tokenizer of {PACKAGED_SMOLLM2}, whose "
            f"{len(tokenizer)} ids do not fit a vocabulary of {architecture.vocab_size}"
        )
    architecture.eos_token_id = tokenizer.eos_token_id
    return tokenizer, random_model(architecture, dtype)


def read_prompts(path: Path) -> list[str]:
    """One prompt a line, or in a ``.jsonl`` file one object with a ``prompt`` a line.

    Raises:
        ValueError: the file is missing, empty, not text, or a line is malformed.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts file {path} cannot be read: {first_line(error)}") from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"prompts file {path} is empty: it needs one prompt a line")
    if path.suffix != ".jsonl":
        for number, line in numbered:
            if not line.isprintable():
                raise ValueError(f"prompts file {path}, line {number} is not plain text")
        return [line for _, line in numbered]
    prompts = []
    for number, line in numbered:
        try:
            prompt = json.loads(line)["prompt"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f'prompts file {path}, line {number} must be an object with a "prompt"'
            ) from error
        if not (isinstance(prompt, str) and prompt.strip()):
            raise ValueError(f"prompts file {path}, line {number}: prompt must be text")
        prompts.append(prompt)
    return prompts


def tokenize_prompts(
    policy: Policy, prompts: list[str], *, system_message: str | None, room: int
) -> list[list[int]]:
    """Token ids of each prompt, as a chat turn where the model has a chat template.

    Args:
        policy: Whose tokenizer is used.
        prompts: Texts.
        system_message: First turn of the chat; None: the template's own, if it has any.
        room: New tokens that must fit behind the prompt.

    Raises:
        ValueError: a prompt and its response do not fit the model's context, or there is a
            system message and no chat template.
    """
    tokenizer = policy.tokenizer
    if system_message is not None and not tokenizer.chat_template:
        raise ValueError(
            f"system_message {system_message!r} needs a model with a chat template, and this one "
            "has none: leave it out"
        )
    system = [] if system_message is None else [{"role": "system", "content": system_message}]
    context = getattr(policy.language_model.config, "max_position_embeddings", None)
    ids = []
    for number, prompt in enumerate(prompts, 1):
        if tokenizer.chat_template:
            chat = [*system, {"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            tokens = tokenizer(prompt)["input_ids"]
        if context is not None and len(tokens) + room > context:
            raise ValueError(
                f"prompt {number} has {len(tokens)} tokens; with {room} new ones it exceeds the "
                f"model's context of {context}: {prompt[:40]!r}…"
            )
        ids.append(tokens)
    return ids
