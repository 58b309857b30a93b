"""Sampling: tokens per second against transformers' ``generate`` with LoRA in place.

    make bench                                              # all, into docs/benchmarks.md
    python -m tests.benchmarks.bench_sampling
    python -m tests.benchmarks.bench_sampling --threads 1 --clock cpu     # on a busy machine

The demo's model, prompts and sizes. All candidates run in turn in each round, in one process; the
figures are medians over the rounds. Rows never end early, so every candidate draws as many tokens.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from examples.lm_rlhf.config import smollm2_135m
from examples.lm_rlhf.models import load_policy, read_prompts, tokenize_prompts
from safe_rl.integrations.merged_linear import MergedAdapters
from safe_rl.integrations.transformers import Sampler
from safe_rl.rollouts import left_pad
from tests.benchmarks.measure import Table, write_results

NEVER = torch.tensor([-1])


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


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--output", type=Path, help="folder for sampling.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)  # as the demo does; it helps all candidates
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")

    policy = load_policy(smollm2_135m())
    model = policy.language_model
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    texts = read_prompts(smollm2_135m().prompts)
    message = smollm2_135m().system_message
    ids = tokenize_prompts(policy, texts, system_message=message, room=arguments.new_tokens)
    chosen = [ids[row % len(ids)] for row in range(arguments.rows)]
    longest = max(map(len, chosen))
    # The loop pads to one width for all its batches; a bare call pads to the longest row.
    loop_width = max(map(len, ids)) + -(max(map(len, ids)) + arguments.new_tokens) % 16
    bare = left_pad(chosen, width=longest, pad_id=policy.pad_id)
    padded = left_pad(chosen, width=loop_width, pad_id=policy.pad_id)

    def ours(sampler: Sampler, prompt: Tensor, mask: Tensor) -> Callable[[], Tensor]:
        settings = {"max_new_tokens": arguments.new_tokens, "temperature": 1.0}
        return lambda: sampler.sample(prompt, mask, eos_ids=NEVER, pad_id=0, **settings).tokens

    def theirs(prompt: Tensor, mask: Tensor) -> Callable[[], Tensor]:
        return lambda: hf_generate(model, prompt, mask, max_new_tokens=arguments.new_tokens)

    merged, unmerged = Sampler(model), Sampler(model, merged=False)
    adapters = MergedAdapters(model)

    def own_forward() -> Tensor:
        with adapters.in_place():
            return ours(unmerged, *padded)()

    candidates = {
        f"generate, LoRA, prompts of {longest}": theirs(*bare),
        f"generate, LoRA, padded to {loop_width}": theirs(*padded),
        "ours, adapters in place": ours(unmerged, *padded),
        "ours, merged, the model's own forward": own_forward,
        "ours, merged, lean decoder": ours(merged, *padded),
    }
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(arguments.rounds + 1):
        for name, run in candidates.items():
            torch.manual_seed(number)
            begin = clock()
            tokens = run()
            took = clock() - begin
            assert tokens.shape == (arguments.rows, arguments.new_tokens)
            if number:  # the first round warms up
                seconds[name].append(took)
    drawn = arguments.rows * arguments.new_tokens
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    baseline = next(iter(medians.values()))
    rows = [
        [name, f"{median:.2f}", f"{drawn / median:.0f}", f"{baseline / median:.2f}"]
        for name, median in medians.items()
    ]
    title = (
        f"Sampling, SmolLM2-135M with LoRA, {arguments.rows} x {arguments.new_tokens} tokens, "
        f"{arguments.threads} threads, {arguments.clock} clock"
    )
    table = Table(title, ["by", "s", "tokens a second", "times generate"], rows)
    write_results("sampling", [table], arguments.output)


if __name__ == "__main__":
    main()
