"""Incremental forwards of a causal language model of transformers over its key-value cache."""

import inspect
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

SHARING_PAYS = 64
"""Tokens saved; reading the shared start in a pass of its own costs about half as many."""


class CachedDecoder(Protocol):
    """What the sampling loop asks of a model."""

    @property
    def can_share(self) -> bool:
        """Whether a row may continue a cache that was filled once for all rows."""
        ...

    def start(self, rows: int, length: int) -> None:
        """Empty the cache; make room for ``length`` tokens in each of ``rows`` rows."""
        ...

    def extend(self, tokens: Tensor, position: Tensor, visible: Tensor) -> Tensor:
        """Read more tokens.

        Args:
            tokens: int64 [B, S].
            position: int64 [B, S], each token's place in its text.
            visible: bool [B, L], the cached and new tokens that are no padding; L counts both.

        Returns:
            Logits after the last token, [B, V].
        """
        ...

    def repeat(self, rows: int) -> None:
        """Let ``rows`` rows continue the one row of the cache."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Drop every row but these, int64."""
        ...


class ModelDecoder:
    """Any causal language model, through its own forward and cache.

    Args:
        language_model: It takes ``position_ids`` and ``past_key_values``.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8,
        ...     num_hidden_layers=1, num_attention_heads=1)
        >>> decoder = ModelDecoder(LlamaForCausalLM(config))
        >>> decoder.start(1, 3)
        >>> ids = torch.tensor([[4, 5, 6]])
        >>> decoder.extend(ids, torch.tensor([[0, 1, 2]]), ids > 0).shape
        torch.Size([1, 8])
    """

    def __init__(self, language_model: PreTrainedModel) -> None:
        self.language_model = language_model
        # Logits of the whole prompt are many and not needed, where a model can leave them out.
        signature = inspect.signature(language_model.forward)
        self._last_only = "logits_to_keep" in signature.parameters
        self.cache = DynamicCache(config=language_model.config)

    @property
    def can_share(self) -> bool:
        """Not with sliding windows or recurrent states, which count the padding in between."""
        return all(type(layer) is DynamicLayer for layer in self.cache.layers)

    def start(self, rows: int, length: int) -> None:
        """Empty the cache, which grows by itself."""
        self.cache = DynamicCache(config=self.language_model.config)

    def extend(self, tokens: Tensor, position: Tensor, visible: Tensor) -> Tensor:
        """Read more tokens; the logits after the last, [B, V]."""
        # An index, not the number 1: the model's own slice is not contiguous, and for such an input
        # a CPU's linear layer copies the whole head once per row. At 3B, bfloat16 and 4 rows that
        # took 2.3 GiB and 38 s of CPU where the product takes 0.06.
        length = tokens.shape[1]
        last = torch.arange(length - 1, length, device=tokens.device)
        result = self.language_model(
            input_ids=tokens,
            attention_mask=visible.long(),
            position_ids=position,
            past_key_values=self.cache,
            use_cache=True,
            **({"logits_to_keep": last} if self._last_only else {}),
        )
        return result.logits[:, -1]

    def repeat(self, rows: int) -> None:
        """Let ``rows`` rows continue the one row of the cache."""
        self.cache.batch_repeat_interleave(rows)

    def keep(self, rows: Tensor) -> None:
        """Drop every row but these."""
        self.cache.batch_select_indices(rows)


def shared_start(prompt: Tensor, prompt_mask: Tensor) -> int:
    """How many tokens all prompts begin with, at least one left over in each.

    Args:
        prompt: int64 [B, P], left-padded.
        prompt_mask: bool [B, P].

    Example:
        >>> prompt = torch.tensor([[0, 5, 6, 7], [5, 6, 8, 9]])
        >>> shared_start(prompt, prompt > 0)
        2
    """
    lengths = prompt_mask.sum(1)
    place = torch.arange(int(lengths.min()) - 1, device=prompt.device)
    starts = prompt.gather(1, prompt.shape[1] - lengths[:, None] + place)
    return int((starts == starts[:1]).all(0).long().cumprod(0).sum())


def read_prompts(
    decoder: CachedDecoder, prompt: Tensor, prompt_mask: Tensor, max_new_tokens: int
) -> tuple[Tensor, Tensor]:
    """Fill an empty cache with prompts; a start that all of them share is read once.

    The cache holds the shared start, then the rest of each prompt, left-padded, then the response.

    Args:
        decoder: Of the model.
        prompt: int64 [B, P], left-padded.
        prompt_mask: bool [B, P].
        max_new_tokens: T, the room to leave.

    Returns:
        (logits after each prompt [B, V], places of the cache that are no padding, bool [B, L + T]).

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8,
        ...     num_hidden_layers=1, num_attention_heads=1)
        >>> prompt = torch.tensor([[0, 5, 6], [5, 6, 7]])
        >>> logits, visible = read_prompts(
        ...     ModelDecoder(LlamaForCausalLM(config)), prompt, prompt > 0, 1)
        >>> logits.shape, visible[0]
        (torch.Size([2, 8]), tensor([False,  True,  True,  True]))
    """
    rows, lengths = len(prompt), prompt_mask.sum(1)
    shared = shared_start(prompt, prompt_mask) if decoder.can_share else 0
    if (rows - 1) * shared < SHARING_PAYS:
        shared = 0
    width = int(lengths.max()) - shared
    rest = torch.arange(width, device=prompt.device) >= width - (lengths[:, None] - shared)
    visible = torch.cat([rest.new_ones(rows, shared), rest], 1)
    decoder.start(rows, shared + width + max_new_tokens)
    if shared:
        first = int(prompt.shape[1] - lengths[0])
        place = torch.arange(shared, device=prompt.device)[None]
        decoder.extend(prompt[:1, first : first + shared], place, visible[:1, :shared])
        decoder.repeat(rows)
    position = shared + (rest.cumsum(1) - 1).clamp_min(0)
    logits = decoder.extend(prompt[:, prompt.shape[1] - width :], position, visible)
    return logits, torch.cat([visible, visible.new_ones(rows, max_new_tokens)], 1)
