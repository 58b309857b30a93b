"""Small real models on disk: a Llama with random weights, its tokenizer, and a classifier."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

TEXT = ["tell me about a good day", "a bad meeting on a rainy street", "happy love great terrible"]


def tokenizer() -> PreTrainedTokenizerFast:
    """Words of ``TEXT``; pad is EOS, as in many published models."""
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "<eos>"])
    words.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    )


def llama_config(vocabulary: int) -> LlamaConfig:
    """Two layers of 16."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
        initializer_range=0.3,
    )


def save_language_model(folder: Path, *, chat: bool = False) -> Path:
    """A causal language model and its tokenizer; ``chat`` gives it a template."""
    torch.manual_seed(0)
    words = tokenizer()
    if chat:
        words.chat_template = "{% for turn in messages %}{{ turn.content }} {% endfor %}"
    LlamaForCausalLM(llama_config(len(words))).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def save_reward_model(folder: Path, *, outputs: int = 1, broken: bool = False) -> Path:
    """A sequence classifier; ``broken`` makes it answer nan."""
    torch.manual_seed(1)
    words = tokenizer()
    config = llama_config(len(words))
    config.num_labels = outputs
    model = LlamaForSequenceClassification(config)
    if broken:
        torch.nn.init.constant_(model.score.weight, torch.nan)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
