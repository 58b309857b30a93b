"""Actor and critic over one causal language model: one forward gives all that a loss needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn

from safe_ops import TokenLogProbs, linear_log_probs, token_log_probs
from safe_rl.image_positions import (
    PATCHES,
    as_the_model_takes_them,
    positions_are_the_models,
)
from safe_rl.keys import RESPONSE_MASK, KeyedModule, read


class CausalLMActorCritic(KeyedModule):
    """Re-scores stored responses: log-prob, entropy and every critic head's value, in one forward.

        h = backbone(prompt + response)                      [B, P + T, H]
        log_prob_t, entropy_t = head(h_{P-1+t})              of response token t
        state_values_t        = critic(h_{P-1+t}.detach())   the state *before* token t

    Old, new and reference log-probs all come from this one function, at one padded width and in
    evaluation mode; then the importance ratio before the first update is exactly 1. The critic
    reads the hidden states without sending gradients into the policy.

    Where the head is a plain ``nn.Linear`` its product goes through ``linear_log_probs``: no
    logits in memory, and a padded place costs nothing. Any other head (adapted, quantised, sharded
    on its own) is called, and its logits are made, as are those that a model caps (Gemma 2).

    Reads ``("tokens", "prompt")`` int64 [B, P] (left-padded), ``("tokens", "response")`` int64
    [B, T] (right-padded), ``prompt_mask`` bool [B, P], ``response_mask`` bool [B, T], and what
    ``model_inputs`` names: images, for a model that takes them.
    ``set_keys(response_mask=...)``, here or on the loss around it, reads the mask elsewhere.
    Writes ``log_prob``, ``entropy`` [B, T] (nats, float32, at the sampling temperature; 0 where
    ``response_mask`` is False),
    ``state_values`` [B, T, K] and ``bootstrap_values`` [B, K], the values after the last token.

    Args:
        language_model: A causal language model in the manner of transformers: its backbone, under
            ``base_model_prefix``, returns ``last_hidden_state``, and ``get_output_embeddings()``
            is the head. Adapters stay in place, unmerged.
        critic: [..., H] -> [..., K].
        temperature: Of the sampling.
        model_inputs: More arguments of the backbone's forward, each with its key in the batch, [B,
            ...] each: ``{"pixel_values": "pixel_values"}``. A model with positions in three
            dimensions (Qwen2-VL) makes them itself and takes ``pixel_values`` [B, N, D],
            ``image_grid_thw`` [B, 3] or [B, I, 3], and ``mm_token_type_ids`` [B, P], which without
            videos are read off the prompt. ``"position_ids"`` among them ([B, P + T], or [B, 3, P +
            T]) takes the place of any.

    Raises:
        ValueError: the model has no head or no backbone, or makes positions in three dimensions
            outside its backbone, or is a ``PeftModel``, whose base model
            is what is meant; its logits are not those of its head, nor of the head and the scale or
            the cap in its config, as with Cohere, Granite and Gemma 2; ``temperature`` is not
            positive; a batch has no prompt token, or a mask has not the shape of its tokens.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from tensordict import TensorDict
        >>> from safe_rl import SoftMinCritic
        >>> config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8,
        ...     num_hidden_layers=1, num_attention_heads=1)
        >>> network = CausalLMActorCritic(LlamaForCausalLM(config), SoftMinCritic(8))
        >>> ids = torch.zeros(2, 3, dtype=torch.int64)
        >>> batch = TensorDict({"tokens": {"prompt": ids, "response": ids},
        ...     "prompt_mask": ids == 0, "response_mask": ids == 0}, [2])
        >>> network(batch)["state_values"].shape
        torch.Size([2, 3, 2])
    """

    @dataclass
    class _AcceptedKeys:
        response_mask: NestedKey = RESPONSE_MASK

    default_keys = _AcceptedKeys

    def __init__(
        self,
        language_model: nn.Module,
        critic: nn.Module,
        *,
        temperature: float = 1.0,
        model_inputs: Mapping[str, NestedKey] | None = None,
    ) -> None:
        self.model_inputs = dict(model_inputs or {})
        super().__init__()
        if hasattr(language_model, "get_base_model"):
            raise ValueError(
                f"language_model is a {type(language_model).__name__}: give its get_base_model(), "
                "in which the adapters act"
            )
        prefix = getattr(language_model, "base_model_prefix", None)
        backbone = getattr(language_model, prefix, None) if isinstance(prefix, str) else None
        if not isinstance(backbone, nn.Module):
            raise ValueError(
                "language_model must name its backbone in base_model_prefix, as causal language "
                f"models of transformers do, got {type(language_model).__name__}"
            )
        head = getattr(language_model, "get_output_embeddings", lambda: None)()
        if not isinstance(head, nn.Module):
            raise ValueError(
                f"language_model must have a head, got {type(language_model).__name__}"
            )
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self._scale, self._cap = _after_head(language_model, head)
        # The backbone and the head are parts of the model: held beside it in a tuple, they are not
        # registered a second time.
        self._backbone_and_head = (backbone, head)
        self.language_model = language_model
        self.critic = critic
        self.temperature = temperature
        names = self.model_inputs.keys()
        self._own_positions = positions_are_the_models(language_model, backbone, names)
        self._packs_patches = hasattr(backbone, "get_rope_index") and not PATCHES.keys().isdisjoint(
            names
        )

    def _set_in_out_keys(self) -> None:
        self.in_keys = [
            ("tokens", "prompt"),
            ("tokens", "response"),
            "prompt_mask",
            self.tensor_keys.response_mask,
            *self.model_inputs.values(),
        ]
        self.out_keys = ["log_prob", "entropy", "state_values", "bootstrap_values"]

    def response_states(self, batch: TensorDictBase) -> Tensor:
        """Hidden states before each response token and after the last place, [B, T + 1, H]."""
        prompt, response = (read(batch, ("tokens", part)) for part in ("prompt", "response"))
        masks = []
        mask_key = self.tensor_keys.response_mask
        for tokens, key in ((prompt, "prompt_mask"), (response, mask_key)):
            mask = read(batch, key)
            if mask.shape != tokens.shape or mask.dtype != torch.bool:
                raise ValueError(
                    f"{key!r} must be bool and have the shape of its tokens {tuple(tokens.shape)}, "
                    f"got {mask.dtype} {tuple(mask.shape)}"
                )
            masks.append(mask)
        if prompt.shape[1] == 0:
            raise ValueError(
                "('tokens', 'prompt') must have at least one token a row, "
                f"got {tuple(prompt.shape)}: the first response token needs a state before it"
            )
        attention_mask = torch.cat(masks, 1)
        backbone, _ = self._backbone_and_head
        given = {name: read(batch, key) for name, key in self.model_inputs.items()}
        if self._packs_patches:
            given = as_the_model_takes_them(backbone.config, given, prompt, response)
        # Of text alone no model makes its own, and what it then takes counts the padding.
        if not (self._own_positions and any(sizes in given for sizes in PATCHES)):
            counted = (attention_mask.cumsum(1) - 1).clamp_min(0)
            positions = given.get("position_ids", counted)
            # Models want the three dimensions before the rows.
            given["position_ids"] = positions.movedim(1, 0) if positions.ndim == 3 else positions
        hidden = backbone(
            input_ids=torch.cat([prompt, response], 1),
            attention_mask=attention_mask.long(),
            use_cache=False,
            **given,
        ).last_hidden_state
        return hidden[:, prompt.shape[1] - 1 :]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write ``log_prob``, ``entropy``, ``state_values`` and ``bootstrap_values``."""
        states = self.response_states(tensordict)
        log_prob, entropy = self._head_log_probs(states[:, :-1], tensordict)
        values = self.critic(states.detach())
        last = tensordict[self.tensor_keys.response_mask].sum(1)
        rows = torch.arange(last.shape[0], device=last.device)
        tensordict.set("log_prob", log_prob)
        tensordict.set("entropy", entropy)
        tensordict.set("state_values", values[:, :-1])
        tensordict.set("bootstrap_values", values[rows, last])
        return tensordict

    def _head_log_probs(self, states: Tensor, batch: TensorDictBase) -> TokenLogProbs:
        _, head = self._backbone_and_head
        temperature = self.temperature / self._scale
        tokens, mask = batch["tokens", "response"], batch[self.tensor_keys.response_mask]
        if type(head) is nn.Linear and self._cap is None:
            return linear_log_probs(
                states, head.weight, tokens, bias=head.bias, mask=mask, temperature=temperature
            )
        scored = token_log_probs(_capped(head(states), self._cap), tokens, temperature=temperature)
        return TokenLogProbs(*(torch.where(mask, x, 0.0) for x in scored))


@torch.no_grad()
def _after_head(language_model: nn.Module, head: nn.Module) -> tuple[float, float | None]:
    """Scale and cap that the model's own forward, on a few tokens, gives the logits of its head.

    A model on the meta device has no numbers to compare: neither.
    """
    weight = next(language_model.parameters())
    if weight.is_meta:
        return 1.0, None
    modes = [(module, module.training) for module in language_model.modules()]
    language_model.eval()
    try:
        tokens = torch.arange(4, device=weight.device).unsqueeze(0)  # one may be the padding: zeros
        output = language_model(input_ids=tokens, output_hidden_states=True, use_cache=False)
        if output.hidden_states is None:
            # FSDP2 changes the class of modules, by whose name transformers knows what to return.
            raise ValueError(
                f"language_model must return hidden states, got none from a "
                f"{type(language_model).__name__}: if it is sharded, do so after this is built"
            )
        of_head = head(output.hidden_states[-1])
    finally:
        for module, training in modes:
            module.training = training
    logits = output.logits
    rounding = 8 * torch.finfo(logits.dtype).eps * logits.abs().max()
    config: Any = getattr(language_model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    # Gemma 2 caps, Cohere multiplies, Granite divides. The plain ones come last: small logits are
    # those of a large cap too, until they grow.
    for scale, cap in (
        (1.0, getattr(config, "final_logit_softcapping", None)),
        (getattr(config, "logit_scale", 1.0), None),
        (1 / getattr(config, "logits_scaling", 1.0), None),
        (1.0, None),
    ):
        if (
            scale > 0
            and of_head.shape == logits.shape
            and (_capped(scale * of_head, cap) - logits).abs().max() <= rounding
        ):
            return float(scale), cap
    raise ValueError(
        "language_model must have the logits of its head, got a "
        f"{type(language_model).__name__}, which changes them afterwards by more than the scale or "
        "the cap in its config: tokens would be sampled from another distribution than scored with"
    )


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)
