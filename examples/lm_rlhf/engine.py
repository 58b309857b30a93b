"""What draws the responses: the example's own sampler, or vLLM in the same process."""

import atexit
import shutil
import tempfile
from pathlib import Path

from peft import LoraConfig

from examples.lm_rlhf.config import Config
from examples.lm_rlhf.models import PACKAGED_SMOLLM2, Policy
from safe_rl.integrations.transformers import Engine, Sampler

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Room for adapters that vLLM can make."""


def make_engine(config: Config, policy: Policy, *, longest: int, processes: int) -> Engine:
    """The engine that the config asks for.

    Args:
        config: ``vllm`` and ``merged_sampling`` decide.
        policy: Whose adapters are drawn from.
        longest: Tokens of a prompt and its response.
        processes: Of the run.

    Raises:
        ValueError: vLLM is asked for and is not installed, the run has several processes, or the
            adapters have more ranks than it takes.
    """
    if config.vllm is None:
        return Sampler(policy.language_model, merged=config.merged_sampling)
    if processes > 1:
        raise ValueError(
            f"vllm samples in one process, got {processes}: for more, see docs/distributed.md"
        )
    try:
        from vllm import LLM
    except ImportError as error:
        raise ValueError(f"vllm must be installed to sample with it: {error}") from error
    from safe_rl.integrations.vllm import VLLMEngine

    [lora] = policy.peft_model.peft_config.values()
    assert isinstance(lora, LoraConfig)
    if lora.r > VLLM_RANKS[-1]:
        raise ValueError(f"lora_rank must be at most {VLLM_RANKS[-1]} with vllm, got {lora.r}")
    # What vLLM reads is of no use after the run.
    folder = Path(tempfile.mkdtemp(prefix="vllm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    llm = LLM(
        str(base_weights(config, policy, folder / "base")),
        skip_tokenizer_init=True,
        dtype=config.dtype,
        seed=config.seed,
        max_model_len=longest,
        max_num_seqs=config.batch_size,
        gpu_memory_utilization=config.vllm,
        enable_lora=True,
        max_lora_rank=min(rank for rank in VLLM_RANKS if rank >= lora.r),
        logprobs_mode="processed_logprobs",
    )
    return VLLMEngine(policy.peft_model, llm, folder / "adapters")


def base_weights(config: Config, policy: Policy, folder: Path) -> Path | str:
    """Where vLLM reads the frozen weights: the model's own place, else they are written here."""
    if not config.random_weights and config.model != PACKAGED_SMOLLM2:
        return config.model
    weights = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in policy.language_model.state_dict().items()
        if ".lora_" not in name
    }
    policy.language_model.save_pretrained(folder, state_dict=weights)
    return folder
