"""Sampling by vLLM: its engine holds the base weights and gets the adapters anew."""

import itertools
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from torch import Tensor

from safe_rl.integrations.transformers import Sampled

if TYPE_CHECKING:
    from vllm import LLM

_numbers = itertools.count(1)
"""Of adapters. An engine of vLLM keeps what it has seen by number and place: none comes twice."""


class VLLMEngine:
    """Draws responses with vLLM from a policy of frozen weights and LoRA adapters.

    An ``Engine``, as ``Sampler`` is. Every call writes the adapters to a folder and has vLLM load
    them, so that the engine draws from the policy as it is; what is written is the adapters alone
    (at 3B and rank 128 .9 GiB in float32). Top-k, top-p and penalties are off. The log-probs are
    vLLM's own at the sampling temperature; score the tokens again for the importance ratio.

    Args:
        peft_model: The policy.
        llm: Of the same base weights, made with ``enable_lora=True``, a ``max_lora_rank`` of at
            least the adapters' rank, and ``logprobs_mode="processed_logprobs"``.
        folder: For the adapters, of this engine alone; made if it is not there. The last two sets
            are kept.

    Raises:
        ValueError: ``llm`` takes no adapters, or reports log-probs of another distribution.

    Example:
        >>> from vllm import LLM  # doctest: +SKIP
        >>> llm = LLM("Qwen/Qwen2.5-3B", enable_lora=True, max_lora_rank=128,
        ...     logprobs_mode="processed_logprobs")  # doctest: +SKIP
        >>> engine = VLLMEngine(peft_model, llm, Path("adapters"))  # doctest: +SKIP

    Source: vLLM, "LoRA adapters" (LoRARequest).
    """

    def __init__(self, peft_model: PeftModel, llm: "LLM", folder: Path) -> None:
        config = llm.llm_engine.vllm_config
        if config.lora_config is None:
            raise ValueError("llm must take adapters: make it with enable_lora=True")
        mode = config.model_config.logprobs_mode
        if mode != "processed_logprobs":
            raise ValueError(
                "llm must report log-probs at the sampling temperature: make it with "
                f'logprobs_mode="processed_logprobs", got {mode!r}'
            )
        self._peft_model = peft_model
        self._llm = llm
        self._folder = folder
        self._written: list[Path] = []

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

        Args:
            prompt: int64 [B, P], left-padded.
            prompt_mask: bool [B, P], True on the tokens.
            max_new_tokens: T.
            temperature: Divides the logits; positive.
            eos_ids: int64 [E], the tokens that end a response.
            pad_id: Stands after the end.
            generator: Gives each row the seed of its draws; None is torch's global one.

        Returns:
            Tokens and log-probs, [B, t], t at most T, on the prompt's device.

        Raises:
            ValueError: ``temperature`` is not positive.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        device = "cpu" if generator is None else generator.device
        seeds = torch.randint(2**31, (len(prompt),), generator=generator, device=device)
        rows = [
            row[keep].tolist() for row, keep in zip(prompt.cpu(), prompt_mask.cpu(), strict=True)
        ]
        outputs = self._llm.generate(
            [TokensPrompt(prompt_token_ids=row) for row in rows],
            [
                SamplingParams(
                    temperature=temperature,
                    max_tokens=max_new_tokens,
                    seed=seed,
                    logprobs=0,
                    stop_token_ids=eos_ids.tolist(),
                    detokenize=False,
                )
                for seed in seeds.tolist()
            ],
            lora_request=self._write_adapters(),
            use_tqdm=False,
        )
        drawn = [output.outputs[0] for output in outputs]
        width = max(len(one.token_ids) for one in drawn)
        tokens = torch.full((len(drawn), width), pad_id)
        log_prob = torch.zeros(len(drawn), width)
        for row, one in enumerate(drawn):
            length = len(one.token_ids)
            tokens[row, :length] = torch.tensor(one.token_ids)
            log_prob[row, :length] = torch.tensor(
                [
                    seen[token].logprob
                    for seen, token in zip(one.logprobs, one.token_ids, strict=True)
                ]
            )
        return Sampled(tokens.to(prompt.device), log_prob.to(prompt.device))

    def _write_adapters(self):
        """A request for the adapters as they are; vLLM knows adapters by their number."""
        from vllm.lora.request import LoRARequest

        number = next(_numbers)
        folder = self._folder / str(number)
        # Embeddings are frozen; peft would ask the hub whether they are.
        self._peft_model.save_pretrained(folder, save_embedding_layers=False)
        self._written.append(folder)
        if len(self._written) > 2:
            shutil.rmtree(self._written.pop(0))
        return LoRARequest(f"policy-{number}", number, str(folder))
