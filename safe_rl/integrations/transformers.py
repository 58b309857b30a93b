"""Sampling from a causal language model of transformers."""

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel


@torch.no_grad()
def sample_responses(
    language_model: PreTrainedModel,
    prompt: Tensor,
    prompt_mask: Tensor,
    *,
    max_new_tokens: int,
    temperature: float,
    eos_ids: Tensor,
    pad_id: int,
) -> Tensor:
    """Draw one response per prompt from the model's own distribution, nothing cut off.

    The model's published generation settings (top-k, top-p, penalties) are not used: a policy
    gradient needs tokens drawn from the distribution whose log-probs are re-scored.

    Args:
        language_model: In evaluation mode; adapters act where they are on.
        prompt: int64 [B, P], left-padded.
        prompt_mask: bool [B, P].
        max_new_tokens: T.
        temperature: Divides the logits.
        eos_ids: int64 [E], the tokens that end a response.
        pad_id: Stands after the end.

    Returns:
        int64 [B, t], t at most T, padded after each row's end.

    Raises:
        ValueError: prompt and response together do not fit the model's context.
    """
    context = getattr(language_model.config, "max_position_embeddings", None)
    if context is not None and prompt.shape[1] + max_new_tokens > context:
        raise ValueError(
            f"prompt of {prompt.shape[1]} tokens and {max_new_tokens} new ones do not fit the "
            f"model's context of {context} tokens"
        )
    settings = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_ids.tolist(),
        pad_token_id=pad_id,
    )
    # generate() fills what a call leaves open from the model's published settings: they are put
    # aside for the call.
    published, language_model.generation_config = language_model.generation_config, settings
    try:
        tokens = language_model.generate(
            prompt, attention_mask=prompt_mask.long(), generation_config=settings
        )
    finally:
        language_model.generation_config = published
    return tokens[:, prompt.shape[1] :]
