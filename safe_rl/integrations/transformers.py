"""Sampling from a causal language model of transformers."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from safe_rl.integrations.cached_decoding import CachedDecoder, ModelDecoder, read_prompts
from safe_rl.integrations.llama_decoding import LlamaDecoder, is_llama_like
from safe_rl.integrations.merged_linear import MergedAdapters
from safe_rl.integrations.sharded_decoding import ShardedDecoder, is_sharded

BLOCK = 256
"""Tokens that ``draw`` sums up in float32: relative to their probability that is off by no more
than the exponential is."""


class Sampled(NamedTuple):
    """Responses and what the sampler itself saw of their distribution."""

    tokens: Tensor
    """int64 [B, t], padded after each row's end."""
    log_prob: Tensor
    """float32 [B, t], nats at the sampling temperature; 0 after the end."""


class Engine(Protocol):
    """What draws responses: a ``Sampler``, or a server on other machines."""

    def sample(
        self,
        prompt: Tensor,
        prompt_mask: Tensor,
        *,
        max_new_tokens: int,
        temperature: float,
        eos_ids: Tensor,
        pad_id: int,
        generator: torch.Generator | None = None,
    ) -> Sampled:
        """Draw one response per prompt from the policy as it is now."""
        ...


class Sampler:
    """Draws responses from a model's own distribution, nothing cut off.

        token_t ~ softmax(logits_t / temperature)

    The model's published generation settings (top-k, top-p, penalties) are not used: a policy
    gradient needs tokens drawn from the distribution whose log-probs are re-scored. Rows that have
    ended are computed no further (in graphs on a GPU, but for those that fill up a power of two),
    and a start that all prompts share is read once. LoRA adapters are merged into weights of the
    sampler's own, at each call; the model's weights are not written.

    Merged Llama and Qwen2 models run through ``LlamaDecoder``, all others through their own
    forward. Where FSDP2 has sharded the model, all ranks sample together, each its own rows,
    adapters in place; a rank whose responses have ended goes on until those of all have.

    Args:
        language_model: In evaluation mode; it takes ``position_ids``. With peft, the model inside
            (``get_base_model()``), whose adapters act where they are on.
        merged: Merge the adapters. It costs a copy of every adapted weight (Llama and Qwen2: of all
            layers); False saves that, leaves the adapters in place and runs slower. In half
            precision the merged weights are rounded once more than adapters apart.

    Raises:
        ValueError: an adapter is no plain LoRA over a linear layer and cannot be merged.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8,
        ...     num_hidden_layers=1, num_attention_heads=1)
        >>> sampler = Sampler(LlamaForCausalLM(config).eval())
        >>> prompt = torch.tensor([[4, 5], [0, 6]])
        >>> sampled = sampler.sample(prompt, prompt > 0, max_new_tokens=3, temperature=1.0,
        ...     eos_ids=torch.tensor([7]), pad_id=0)
        >>> sampled.log_prob.shape == sampled.tokens.shape
        True
    """

    def __init__(self, language_model: PreTrainedModel, *, merged: bool = True) -> None:
        self.language_model = language_model
        self.merged = merged
        self._llama = (
            LlamaDecoder(language_model) if merged and is_llama_like(language_model) else None
        )
        self._adapters = MergedAdapters(language_model) if merged and self._llama is None else None

    @torch.no_grad()
    def sample(
        self,
        prompt: Tensor,
        prompt_mask: Tensor,
        *,
        max_new_tokens: int,
        temperature: float,
        eos_ids: Tensor,
        pad_id: int,
        generator: torch.Generator | None = None,
    ) -> Sampled:
        """Draw one response per prompt from the policy as it is now.

        Every row has a stream of random numbers of its own: what is drawn for it does not depend
        on when the others end.

        Args:
            prompt: int64 [B, P], left-padded.
            prompt_mask: bool [B, P], True on the tokens.
            max_new_tokens: T.
            temperature: Divides the logits.
            eos_ids: int64 [E], the tokens that end a response.
            pad_id: Stands after the end; it may be an EOS.
            generator: Of the draws; None is torch's global one.

        Returns:
            Tokens and log-probs, [B, t], t at most T.

        Raises:
            ValueError: the mask is not one of left padding, a number is out of range, prompt and
                response do not fit the model's context, the model is in training mode or sharded
                and its adapters to be merged, or its logits are not finite.
        """
        self._check(prompt, prompt_mask, max_new_tokens, temperature)
        # One row of random numbers per step, drawn at once. Float64: a cumulative sum in float32
        # is off by more than the rarest tokens weigh.
        device = prompt.device if generator is None else generator.device
        uniform = torch.rand(
            max_new_tokens, len(prompt), dtype=torch.float64, generator=generator, device=device
        ).to(prompt.device)
        tokens = torch.full_like(prompt[:, :1], pad_id).repeat(1, max_new_tokens)
        log_prob = torch.zeros(tokens.shape, device=prompt.device)
        row = torch.arange(len(prompt), device=prompt.device)
        eos_ids = eos_ids.to(prompt.device)
        with self._decoder() as decoder:
            logits, visible = read_prompts(decoder, prompt, prompt_mask, max_new_tokens)
            position = prompt_mask.sum(1)
            length = visible.shape[1] - max_new_tokens
            for step in range(max_new_tokens):
                distribution = (logits.float() / temperature).log_softmax(-1)
                drawn = draw(distribution, uniform[step, row])
                tokens[row, step] = drawn
                log_prob[row, step] = distribution.gather(1, drawn[:, None]).squeeze(1)
                going = ~torch.isin(drawn, eos_ids)
                left = going.nonzero().squeeze(1)
                if step + 1 == max_new_tokens or not len(left):
                    break
                if len(left) < len(row):
                    decoder.keep(left)
                    row, drawn, visible = row[left], drawn[left], visible[left]
                logits = decoder.extend(
                    drawn[:, None],
                    (position[row] + step)[:, None],
                    visible[:, : length + step + 1],
                )
        return Sampled(tokens[:, : step + 1], log_prob[:, : step + 1])

    @contextmanager
    def _decoder(self) -> Generator[CachedDecoder]:
        if self._llama is not None:
            self._llama.refresh()
            yield self._llama
        elif self._adapters is not None:
            with self._adapters.in_place():
                yield ModelDecoder(self.language_model)
        elif is_sharded(self.language_model):
            sharded = ShardedDecoder(self.language_model)
            yield sharded
            sharded.finish()
        else:
            yield ModelDecoder(self.language_model)

    def _check(
        self, prompt: Tensor, prompt_mask: Tensor, max_new_tokens: int, temperature: float
    ) -> None:
        if prompt.ndim != 2 or not prompt.numel() or prompt.shape != prompt_mask.shape:
            raise ValueError(
                "prompt and prompt_mask must be [B, P], not empty, got "
                f"{tuple(prompt.shape)} and {tuple(prompt_mask.shape)}"
            )
        if not prompt_mask[:, -1].all() or (prompt_mask[:, :-1] & ~prompt_mask[:, 1:]).any():
            raise ValueError("prompt_mask must be False, then True in each row: pad on the left")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if self.language_model.training:
            raise ValueError("language_model must be in evaluation mode: call .eval()")
        if self.merged and is_sharded(self.language_model):
            raise ValueError(
                "merged must be False for a sharded language_model: merging reads whole weights"
            )
        context = getattr(self.language_model.config, "max_position_embeddings", None)
        longest = int(prompt_mask.sum(1).max())
        if context is not None and longest + max_new_tokens > context:
            raise ValueError(
                f"prompt of {longest} tokens and {max_new_tokens} new ones do not fit the "
                f"model's context of {context} tokens"
            )


def draw(distribution: Tensor, uniform: Tensor) -> Tensor:
    """One token a row by inversion: the first whose cumulative probability exceeds ``uniform``.

    Args:
        distribution: Log-probs, [B, V].
        uniform: float64 [B], in [0, 1).

    Returns:
        int64 [B]; never a token of probability 0.

    Raises:
        ValueError: a row is not finite.

    Example:
        >>> even = torch.full((2, 4), 0.25).log()
        >>> draw(even, torch.tensor([0.0, 0.6], dtype=torch.float64))
        tensor([0, 2])
    """
    probabilities, size = distribution.exp(), distribution.shape[1]
    whole = size - size % BLOCK
    weights = torch.cat(
        [
            probabilities[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1),
            probabilities[:, whole:].sum(-1, keepdim=True),
        ],
        1,
    )
    total = weights.sum(-1)
    good = total.isfinite() & (total > 0)
    if not good.all():
        rows = (~good).nonzero().squeeze(1).tolist()
        raise ValueError(f"logits must be finite, got nan or inf in rows {rows}")
    # First a block of tokens, then one of its tokens: V float64 numbers a row are not summed up.
    block, uniform = invert(weights, uniform)
    places = block.unsqueeze(1) * BLOCK + torch.arange(BLOCK, device=block.device)
    chosen = probabilities.gather(1, places.clamp(max=size - 1)).masked_fill(places >= size, 0.0)
    token, _ = invert(chosen, uniform)
    return block * BLOCK + token


def invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The first place a row where the cumulative weight exceeds ``uniform`` of the whole.

    Args:
        weights: [B, N], not negative, not all 0 in a row.
        uniform: float64 [B], in [0, 1].

    Returns:
        (int64 [B], never a place of weight 0; how far into its weight, float64 [B] in [0, 1]).

    Example:
        >>> invert(torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([0.625], dtype=torch.float64))
        (tensor([2]), tensor([0.5000], dtype=torch.float64))
    """
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    # Below the total by more than it rounds, so that the last place of all is not a refuge.
    target = uniform.unsqueeze(1) * cumulative[:, -1:] * (1 - 1e-15)
    place = torch.searchsorted(cumulative, target, right=True)
    weight = weights.gather(1, place)
    rest = (target - cumulative.gather(1, place) + weight) / weight
    return place.squeeze(1), rest.squeeze(1).clamp(0, 1)
