"""Tiny causal language models of several architectures, and a plain forward to compare with."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
}


def llama(vocabulary: int = 11) -> LlamaForCausalLM:
    """Two query heads a key head, tied embeddings, a scaled rotary embedding."""
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}
    config = LlamaConfig(
        vocab_size=vocabulary,
        num_key_value_heads=2,
        rope_parameters=rope,
        tie_word_embeddings=True,
        **SIZES,
    )
    return _random(LlamaForCausalLM, config)


def qwen2(vocabulary: int = 11) -> Qwen2ForCausalLM:
    """Biases on q, k and v; one key head."""
    config = Qwen2Config(vocab_size=vocabulary, num_key_value_heads=1, **SIZES)
    return _random(Qwen2ForCausalLM, config)


def gpt_neox(vocabulary: int = 11) -> GPTNeoXForCausalLM:
    """Unlike a Llama: parallel blocks, partial rotary embedding, fused q, k, v."""
    return _random(GPTNeoXForCausalLM, GPTNeoXConfig(vocab_size=vocabulary, **SIZES))


def mistral(vocabulary: int = 11) -> MistralForCausalLM:
    """A sliding window of four tokens."""
    config = MistralConfig(vocab_size=vocabulary, num_key_value_heads=2, sliding_window=4, **SIZES)
    return _random(MistralForCausalLM, config)


def _random(kind: type, config) -> PreTrainedModel:
    torch.manual_seed(0)
    model = kind(config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        # Norm weights and biases too: at 1 and 0 they hide a missing one.
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


def with_lora(model: PreTrainedModel, *, targets: list[str] | None = None, **more) -> PeftModel:
    """LoRA whose second matrix is not zero."""
    config = LoraConfig(r=3, lora_alpha=5, target_modules=targets or PROJECTIONS, **more)
    peft_model = get_peft_model(model, config).eval()
    move_adapters(peft_model, 0.3)
    return peft_model


@torch.no_grad()
def move_adapters(model: torch.nn.Module, size: float) -> None:
    """A random step of every LoRA matrix."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.add_(torch.randn_like(parameter), alpha=size)


@torch.no_grad()
def plain_log_prob(
    model: PreTrainedModel, prompt: list[int], response: list[int], temperature: float
) -> Tensor:
    """Log-probs of one row's response, by one forward without padding or cache."""
    tokens = torch.tensor([prompt + response])
    logits = model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1]
    log_probs = (logits / temperature).double().log_softmax(-1)
    return log_probs.gather(1, torch.tensor(response)[:, None]).squeeze(1)
