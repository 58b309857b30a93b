"""Sampling: tokens per second against transformers' ``generate`` with LoRA in place.

    make bench                                              # all, into docs/benchmarks.md
    python -m tests.benchmarks.bench_sampling
    python -m tests.benchmarks.bench_sampling --threads 1 --clock cpu     # on a busy machine

The demo's model, prompts and sizes; rows never end early, so every candidate draws as many tokens.
All candidates run in turn in each round, in a process that flushes denormals as the demo does;
`generate` also in a process as torch starts it, before and after them. Medians over the rounds.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedModel

from examples.lm_rlhf.config import Config, smollm2_135m
from examples.lm_rlhf.models import load_policy, read_prompts, tokenize_prompts
from safe_rl.integrations.merged_linear import MergedAdapters
from safe_rl.integrations.packed_linear import pack, packed_linear
from safe_rl.integrations.transformers import Sampler
from safe_rl.rollouts import left_pad
from tests.benchmarks.measure import Table, json_of_fresh_process, write_results

PRODUCTS = {
    "queries, keys, values": (960, 576),
    "gate, up": (3072, 576),
    "down": (576, 1536),
    "head": (49152, 576),
}
"""[outputs, inputs] of SmolLM2-135M."""
BEYOND_CACHES = 2**26
"""Numbers, of all copies of a weight together."""


@torch.no_grad()
def hf_generate(
    language_model: PreTrainedModel, prompt: Tensor, prompt_mask: Tensor, *, max_new_tokens: int
) -> Tensor:
    """The baseline: ``generate`` with plain sampling, nothing cut off, adapters in place."""
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens
    )
    # generate() fills what a call leaves open from the model's published settings.
    published, language_model.generation_config = language_model.generation_config, settings
    try:
        tokens = language_model.generate(
            prompt, attention_mask=prompt_mask.long(), generation_config=settings
        )
    finally:
        language_model.generation_config = published
    return tokens[:, prompt.shape[1] :]


class Candidates:
    """The demo's model, with adapters that act, and a batch of its prompts."""

    def __init__(
        self, rows: int, new_tokens: int, *, config: Config | None = None, device: str = "cpu"
    ) -> None:
        config = config or smollm2_135m()
        policy = load_policy(config)
        self.new_tokens = new_tokens
        self.model = policy.language_model.to(device)
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        ids = tokenize_prompts(
            policy,
            read_prompts(config.prompts),
            system_message=config.system_message,
            room=new_tokens,
        )
        # The loop pads to one width for all its batches.
        width = max(map(len, ids)) + -(max(map(len, ids)) + new_tokens) % 16
        chosen = [ids[row % len(ids)] for row in range(rows)]
        padded = left_pad(chosen, width=width, pad_id=policy.pad_id)
        self.prompt, self.mask = (x.to(device) for x in padded)
        self.never = torch.tensor([-1], device=device)

    def generate(self) -> Tensor:
        return hf_generate(self.model, self.prompt, self.mask, max_new_tokens=self.new_tokens)

    def sample(self, sampler: Sampler) -> Tensor:
        return sampler.sample(
            self.prompt,
            self.mask,
            max_new_tokens=self.new_tokens,
            temperature=1.0,
            eos_ids=self.never,
            pad_id=0,
        ).tokens

    @torch.no_grad()
    def products(self) -> Tensor:
        """Torch's matrix products alone, merged: of the padded prompts, then of each new token."""
        head = self.model.get_output_embeddings()
        layers = [m.weight for n, m in self.model.named_modules() if n.endswith("base_layer")]
        rows, width = self.prompt.shape
        for tokens in [rows * width] + [rows] * (self.new_tokens - 1):
            inputs = {w.shape[1]: w.new_ones(tokens, w.shape[1]) for w in layers}
            for weight in layers:
                inputs[weight.shape[1]] @ weight.t()
            result = head.weight.new_ones(rows, head.weight.shape[1]) @ head.weight.t()
        return result

    def all(self) -> dict[str, Callable[[], Tensor]]:
        merged, unmerged = Sampler(self.model), Sampler(self.model, merged=False)
        adapters = MergedAdapters(self.model)

        def own_forward() -> Tensor:
            with adapters.in_place():
                return self.sample(unmerged)

        return {
            "generate, LoRA in place": self.generate,
            "ours, LoRA in place": lambda: self.sample(unmerged),
            "ours, merged, the model's own forward": own_forward,
            "ours, merged, lean decoder": lambda: self.sample(merged),
            "torch's matrix products alone, merged": self.products,
        }


def timed(
    calls: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of every call in every round, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            torch.manual_seed(turn)
            begin = clock()
            call()
            if turn:
                seconds[name].append(clock() - begin)
    return seconds


@torch.no_grad()
def one_by_one(rows: int, rounds: int, clock: Callable[[], float]) -> Table:
    """A step's products, of few rows, with weights that come from memory."""
    found = []
    for name, (outputs, inputs) in PRODUCTS.items():
        x = torch.randn(rows, inputs)
        weights = [torch.randn(outputs, inputs) for _ in range(BEYOND_CACHES // (outputs * inputs))]
        packed = [pack(weight) for weight in weights]
        calls = {
            "torch": lambda x=x, weights=weights: [F.linear(x, w) for w in weights],
            "packed": lambda x=x, packed=packed, width=outputs: [
                packed_linear(x, p, width=width) for p in packed
            ],
        }
        seconds = timed(calls, rounds, clock)
        each = [statistics.median(seconds[by]) / len(weights) for by in calls]
        cells = (f"{1e6 * x:.0f} ({2e-9 * rows * outputs * inputs / x:.0f})" for x in each)
        found.append([f"{name}: {inputs} to {outputs}", *cells])
    title = f"A product of {rows} rows, µs (GFLOP/s)"
    return Table(title, ["product", "torch", "packed"], found)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--output", type=Path, help="folder for sampling.json")
    parser.add_argument("--as-torch-starts", action="store_true", help="generate alone, as JSON")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    clock = time.perf_counter if given.clock == "wall" else time.process_time
    if given.as_torch_starts:
        candidates = Candidates(given.rows, given.new_tokens)
        found = timed({"": candidates.generate}, given.rounds, clock)
        print(json.dumps(found[""]))
        return

    def as_torch_starts() -> list[float]:
        options = ["rounds", "threads", "rows", "new_tokens", "clock"]
        arguments = [f"--{name.replace('_', '-')}={getattr(given, name)}" for name in options]
        return json_of_fresh_process(__spec__.name, "--as-torch-starts", *arguments)

    first = as_torch_starts()
    # Before the first parallel work, whose threads inherit it.
    torch.set_flush_denormal(True)
    seconds = timed(Candidates(given.rows, given.new_tokens).all(), given.rounds, clock)
    seconds = {"generate, LoRA in place, denormals": first + as_torch_starts()} | seconds
    drawn = given.rows * given.new_tokens
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    plain, flushed = list(medians.values())[:2]
    rows = [
        [name, f"{x:.2f}", f"{drawn / x:.0f}", f"{plain / x:.2f}", f"{flushed / x:.2f}"]
        for name, x in medians.items()
    ]
    title = (
        f"Sampling, SmolLM2-135M with LoRA, {given.rows} x {given.new_tokens} tokens, "
        f"{given.threads} thread{'s' if given.threads > 1 else ''}, {given.clock} clock"
    )
    columns = ["by", "s", "tokens a second", "times generate", "times generate, flushed"]
    tables = [Table(title, columns, rows), one_by_one(given.rows, given.rounds, clock)]
    write_results("sampling", tables, given.output)


if __name__ == "__main__":
    main()
