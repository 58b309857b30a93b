"""Incremental forwards of Llama-like models with few operations and launches, for sampling."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from safe_rl.integrations.decode_kernels import (
    PackedLayer,
    PackedLinear,
    attend_one,
    decode_layers,
    rms_norm,
)
from safe_rl.integrations.graphed_steps import GraphedSteps, can_record
from safe_rl.integrations.merged_linear import MergedLinear, is_mergeable
from safe_rl.integrations.packed_linear import can_pack

LLAMA_LIKE = (LlamaForCausalLM, Qwen2ForCausalLM)
"""Exactly these classes: a subclass may compute something else."""
RMS_NORMS = (LlamaRMSNorm, Qwen2RMSNorm)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
GRAPHED_LENGTHS = 64
"""The length of a cache that graphs read is a multiple: attention's mask needs whole vectors."""


class _Layer(NamedTuple):
    attention_norm: nn.Module
    query_key_value: MergedLinear
    attention_out: MergedLinear
    feed_forward_norm: nn.Module
    gate_up: MergedLinear
    activation: nn.Module
    down: MergedLinear


def is_llama_like(language_model: PreTrainedModel) -> bool:
    """Whether ``LlamaDecoder`` computes what this model computes.

    Args:
        language_model: Any; LoRA layers may be in place.

    Returns:
        True for Llama and Qwen2 models with full attention on one device, whose projections are
        plain linear layers or plain LoRA over one.

    Example:
        >>> is_llama_like(torch.nn.Linear(2, 2))
        False
    """
    if type(language_model) not in LLAMA_LIKE or hasattr(language_model, "hf_device_map"):
        return False
    layer_types = getattr(language_model.config, "layer_types", None) or []
    if any(kind != "full_attention" for kind in layer_types):
        return False
    if type(language_model.get_input_embeddings()) is not nn.Embedding:
        return False
    linear = [language_model.get_output_embeddings()]
    for layer in language_model.base_model.layers:
        linear += [getattr(layer.self_attn, name) for name in PROJECTIONS]
        linear += [getattr(layer.mlp, name) for name in FEED_FORWARD]
    return all(map(is_mergeable, linear))


class LlamaDecoder:
    """A Llama-like model for sampling: merged and fused weights, one static cache.

        h += W_o attention(rope(W_q n(h)), rope(W_k n(h)), W_v n(h))      n: RMS norm
        h += W_down (act(W_gate n'(h)) * W_up n'(h))

    q, k, v are one product, gate and up another; adapters are merged; the query heads of one key
    head are rows of one attention. Keys and values are written in place. Rotary angles and
    embedding are the model's own; the layers' weights are copies (425 MB for SmolLM2-135M in
    float32), brought up to date by ``refresh``. In float32 on a CPU with a C compiler a layer of a
    new token is one call of C, and the head is a copy too (113 MB). On a GPU a step of one token is
    a CUDA graph over the whole cache, recorded anew when weights have moved or the cache must grow.

    Args:
        language_model: One that ``is_llama_like`` accepts.

    Raises:
        ValueError: it does not accept it.

    Example:
        >>> config = LlamaForCausalLM.config_class(vocab_size=8, hidden_size=8,
        ...     intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> decoder = LlamaDecoder(LlamaForCausalLM(config))
        >>> decoder.refresh()
        >>> decoder.start(1, 3)
        >>> ids = torch.tensor([[4, 5, 6]])
        >>> with torch.no_grad():
        ...     decoder.extend(ids, torch.tensor([[0, 1, 2]]), ids > 0).shape
        torch.Size([1, 8])
    """

    can_share = True

    def __init__(self, language_model: PreTrainedModel) -> None:
        if not is_llama_like(language_model):
            raise ValueError(
                "language_model must be a Llama or Qwen2 model with full attention and plain "
                f"linear layers, got {type(language_model).__name__}"
            )
        backbone = language_model.base_model
        attention = backbone.layers[0].self_attn
        self._head_size = attention.head_dim
        self._groups = attention.num_key_value_groups
        self._scaling = attention.scaling
        self._language_model = language_model
        self._rotary = backbone.rotary_emb
        self._norm = backbone.norm
        self._own_head: nn.Module | None = None
        self._take_vocabulary()
        self._layers = [_fuse(layer) for layer in backbone.layers]
        self._read: list[tuple[int, torch.dtype]] = []
        self._steps = GraphedSteps(most=0)

    def _take_vocabulary(self) -> None:
        """Embedding and head, which a model exchanges when its vocabulary grows."""
        self._embed = self._language_model.get_input_embeddings()
        head, before = self._language_model.get_output_embeddings(), self._own_head
        if head is before:
            return
        # The head is the largest matrix: copied only where an adapter changes it or it is packed.
        plain = type(head) is nn.Linear and not can_pack(head.weight)
        self._own_head, self._head = head, head if plain else MergedLinear([head])

    def refresh(self) -> None:
        """Take over the model's present weights, adapters merged."""
        self._take_vocabulary()
        for layer in self._layers:
            for part in layer:
                if isinstance(part, MergedLinear):
                    part.refresh()
        if isinstance(self._head, MergedLinear):
            self._head.refresh()

    def start(self, rows: int, length: int) -> None:
        """Empty the cache; it holds ``length`` tokens in each of ``rows`` rows."""
        self._filled = 0
        mixed = self._layers[0].query_key_value
        graphed = can_record(mixed.weight)
        read = self._addresses() if graphed else []
        if graphed and read == self._read and self._can_go_on(rows, length):
            # Graphs read all of it, and 0 * NaN reaches what is seen.
            self._cache.zero_()
            return
        self._key_heads = mixed.out_features // self._head_size // (self._groups + 2)
        # A row of a layer is [heads, length, head size], keys and values apart.
        length += -length % GRAPHED_LENGTHS if graphed else 0
        # The old ones go before the new ones are made.
        self._steps, self._cache = GraphedSteps(most=rows), mixed.weight.new_empty(0)
        self._read = read
        self._cache = mixed.weight.new_zeros(
            len(self._layers), 2, rows, self._key_heads, length, self._head_size
        )

    def _can_go_on(self, rows: int, length: int) -> bool:
        """Whether the cache has room, and may be written here."""
        writable = self._cache.is_inference() == torch.is_inference_mode_enabled()
        return writable and rows <= self._cache.shape[2] and length <= self._cache.shape[4]

    def _addresses(self) -> list[tuple[int, torch.dtype]]:
        """Where all lies that a graph reads, and as what."""
        parts = [part for layer in self._layers for part in layer]
        modules = [self._embed, self._norm, self._head, *parts]
        return [
            (tensor.data_ptr(), tensor.dtype)
            for module in modules
            if isinstance(module, nn.Module)
            for tensor in (*module.parameters(), *module.buffers())
        ]

    def extend(self, tokens: Tensor, position: Tensor, visible: Tensor) -> Tensor:
        """Read more tokens; the logits after the last, [B, V]."""
        start, end = self._filled, visible.shape[1]
        self._filled = end
        place = torch.arange(start, end, device=tokens.device)
        # Outside of graphs: some models' angles depend on the longest position of all.
        cos, sin = self._rotary(self._embed.weight, position_ids=position)
        half = self._head_size // 2
        # rope(x) = x * cos + [-x2, x1] * sin = x * cos + [x2, x1] * [-sin, sin]
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        if tokens.shape[1] > 1 or not can_record(tokens):
            return self._forward(place, tokens, cos, sin, visible)
        later = visible.new_zeros(len(visible), self._cache.shape[4] - end)
        visible = torch.cat([visible, later], 1)
        return self._steps(self._forward, place, tokens, cos, sin, visible)

    def _forward(
        self, place: Tensor, tokens: Tensor, cos: Tensor, sin: Tensor, visible: Tensor
    ) -> Tensor:
        """``extend`` at these places of the cache; ``visible`` may count later ones, False."""
        rows, seen = visible.shape
        hidden = self._embed(tokens)
        if tokens.shape[1] == 1 and self._has_kernels and all(map(_is_packed, self._layers)):
            self._step(hidden[:, 0], cos, sin, visible)
            return self._head(self._normed(self._norm, hidden[:, -1]))
        attend = self._attention(place, cos, sin, visible)
        cached = self._cache[:, :, :rows, :, :seen].unbind()
        for cache, layer in zip(cached, self._layers, strict=True):
            normed = self._normed(layer.attention_norm, hidden)
            hidden = hidden + layer.attention_out(attend(layer.query_key_value(normed), cache))
            normed = self._normed(layer.feed_forward_norm, hidden)
            gate, up = layer.gate_up(normed).chunk(2, -1)
            hidden = hidden + layer.down(layer.activation(gate) * up)
        return self._head(self._normed(self._norm, hidden[:, -1]))

    def _step(self, hidden: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> None:
        """Every layer for one token a row, ``hidden`` in place."""
        rows, seen = visible.shape
        decode_layers(
            [_where(layer) for layer in self._layers],
            hidden,
            cos[:, 0].contiguous(),
            sin[:, 0].contiguous(),
            self._cache[:, :, :rows, :, :seen],
            visible.contiguous(),
            heads=self._groups * self._key_heads,
            scale=self._scaling,
        )

    @property
    def _has_kernels(self) -> bool:
        # All layers are packed or none is; a kernel has no gradient.
        return self._layers[0].query_key_value.packed and not torch.is_grad_enabled()

    def _normed(self, norm: Any, hidden: Tensor) -> Tensor:
        dtypes = {norm.weight.dtype, hidden.dtype}
        if self._has_kernels and type(norm) in RMS_NORMS and dtypes == {torch.float32}:
            return rms_norm(hidden, norm.weight, norm.variance_epsilon)
        return norm(hidden)

    def _attention(
        self, place: Tensor, cos: Tensor, sin: Tensor, visible: Tensor
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """(queries, keys and values of the new tokens, a layer's cache) -> what they see."""
        batch, steps = cos.shape[:2]
        if steps == 1 and self._has_kernels:
            cos, sin = cos[:, 0].contiguous(), sin[:, 0].contiguous()
            visible = visible.contiguous()
            return lambda mixed, cache: attend_one(
                mixed[:, 0], cos, sin, cache, visible, scale=self._scaling
            ).unsqueeze(1)
        bias = self._attention_bias(visible, place, cos.dtype)
        half = self._head_size // 2
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)

        def attend(mixed: Tensor, cache: Tensor) -> Tensor:
            heads = mixed.view(*mixed.shape[:2], -1, self._head_size)
            turned, value = heads.split(
                [(self._groups + 1) * self._key_heads, self._key_heads], dim=2
            )
            swapped = torch.cat([turned[..., half:], turned[..., :half]], -1)
            turned = torch.addcmul(turned * cos, swapped, sin)
            query, key = turned.split([self._groups * self._key_heads, self._key_heads], dim=2)
            cache[0].index_copy_(2, place, key.transpose(1, 2))
            cache[1].index_copy_(2, place, value.transpose(1, 2))
            # [B, S, heads, D] -> [B, key heads, groups * S, D]
            query = query.view(batch, steps, self._key_heads, self._groups, -1)
            query = query.permute(0, 2, 3, 1, 4).flatten(2, 3)
            seen = F.scaled_dot_product_attention(
                query, cache[0], cache[1], attn_mask=bias, scale=self._scaling
            )
            seen = seen.view(batch, self._key_heads, self._groups, steps, -1)
            return seen.permute(0, 3, 1, 2, 4).reshape(batch, steps, -1)

        return attend

    def repeat(self, rows: int) -> None:
        """Let the first ``rows`` rows continue what the first one holds."""
        filled = self._cache[:, :, :rows, :, : self._filled]
        filled[:, :, 1:] = filled[:, :, :1]

    def keep(self, rows: Tensor) -> None:
        """Drop every row but these."""
        # Rows only move up, and one after the other, so nothing is overwritten before it is read.
        filled = self._cache[:, :, :, :, : self._filled]
        for to, held in enumerate(rows.tolist()):
            if to != held:
                filled[:, :, to] = filled[:, :, held]

    def _attention_bias(self, visible: Tensor, place: Tensor, dtype: torch.dtype) -> Tensor:
        """0 where a token may look and -inf elsewhere, [B, 1, groups * S, L]."""
        looked_at, asking = torch.arange(visible.shape[1], device=place.device), place[:, None]
        # Padding looks at itself: a row of -inf would be NaN, and 0 * NaN reaches other tokens.
        allowed = (visible[:, None] & (looked_at <= asking)) | (looked_at == asking)
        bias = torch.zeros(allowed.shape, dtype=dtype, device=visible.device)
        bias.masked_fill_(~allowed, -torch.inf)
        return bias.repeat(1, self._groups, 1).unsqueeze(1)


def _fuse(layer: Any) -> _Layer:
    attention, feed_forward = layer.self_attn, layer.mlp
    return _Layer(
        attention_norm=layer.input_layernorm,
        query_key_value=MergedLinear([attention.q_proj, attention.k_proj, attention.v_proj]),
        attention_out=MergedLinear([attention.o_proj]),
        feed_forward_norm=layer.post_attention_layernorm,
        gate_up=MergedLinear([feed_forward.gate_proj, feed_forward.up_proj]),
        activation=feed_forward.act_fn,
        down=MergedLinear([feed_forward.down_proj]),
    )


def _is_packed(layer: _Layer) -> bool:
    """Whether ``decode_layers`` computes what it computes."""
    norms = layer.attention_norm, layer.feed_forward_norm
    linear = layer.query_key_value, layer.attention_out, layer.gate_up, layer.down
    return (
        all(x.packed for x in linear)
        and type(layer.activation) is SiLUActivation
        and all(type(n) in RMS_NORMS and n.weight.dtype == torch.float32 for n in norms)
    )


def _where(layer: _Layer) -> PackedLayer:
    """Where its weights are now."""
    norms: tuple[Any, ...] = (layer.attention_norm, layer.feed_forward_norm)
    linear = layer.query_key_value, layer.attention_out, layer.gate_up, layer.down
    return PackedLayer(
        *(n.weight.data_ptr() for n in norms),
        *(n.variance_epsilon for n in norms),
        *(
            PackedLinear(
                x.weight.data_ptr(), None if x.bias is None else x.bias.data_ptr(), x.out_features
            )
            for x in linear
        ),
    )
