"""What a run holds in memory, from the sizes of its model, before anything is built.

    python -m examples.lm_rlhf.memory --config qwen2_5_3b --batch-size 4 --minibatch-size 1

Formulas and measurements are in docs/memory.md.
"""

import argparse
import dataclasses
import sys

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig

from examples.lm_rlhf.architectures import read_architecture
from examples.lm_rlhf.config import CONFIGS, Config
from safe_rl.integrations.llama_decoding import GRAPHED_LENGTHS

GIB = 2**30
TILE_BYTES = 16 * 2**20
"""Of logits that ``safe_ops.linear_log_probs`` works on at a time on a CPU."""
GPU_TILE = 8192, 16_384
"""Rows and entries of the vocabulary on a GPU, at most; in half precision their slopes are held."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What of a Llama-like architecture decides its memory."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    head_size: int
    tied: bool
    biases: tuple[str, ...]
    """Projections with a bias."""

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear layer of a block."""
        query, key = self.heads * self.head_size, self.key_heads * self.head_size
        return {
            "q_proj": (self.hidden, query),
            "k_proj": (self.hidden, key),
            "v_proj": (self.hidden, key),
            "o_proj": (query, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def layer_parameters(self) -> int:
        """Of one block: projections, biases, two norms."""
        table = self.projections
        biases = sum(table[name][1] for name in self.biases)
        return sum(i * o for i, o in table.values()) + biases + 2 * self.hidden

    @property
    def embedding_parameters(self) -> int:
        """Embedding, head and the last norm."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden + self.hidden

    @property
    def parameters(self) -> int:
        """Of the base model."""
        return self.layers * self.layer_parameters + self.embedding_parameters


def read_sizes(architecture: PreTrainedConfig) -> Sizes:
    """Sizes of a Llama or Qwen2 model.

    Raises:
        ValueError: it is another kind of model, whose layers these formulas do not describe.

    Example:
        >>> read_sizes(read_architecture("Qwen/Qwen2.5-3B")).parameters
        3085938688
    """
    kind = architecture.model_type
    if kind == "qwen2":
        biases: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    elif kind == "llama":
        attention = ("q_proj", "k_proj", "v_proj", "o_proj") if architecture.attention_bias else ()
        mlp = ("gate_proj", "up_proj", "down_proj") if architecture.mlp_bias else ()
        biases = attention + mlp
    else:
        raise ValueError(f"the memory model knows llama and qwen2 models, got {kind!r}")
    heads = architecture.num_attention_heads
    head_size = getattr(architecture, "head_dim", None) or architecture.hidden_size // heads
    return Sizes(
        vocabulary=architecture.vocab_size,
        hidden=architecture.hidden_size,
        intermediate=architecture.intermediate_size,
        layers=architecture.num_hidden_layers,
        heads=heads,
        key_heads=architecture.num_key_value_heads,
        head_size=head_size,
        tied=architecture.tie_word_embeddings,
        biases=biases,
    )


def adapter_parameters(sizes: Sizes, config: Config) -> int:
    """Of LoRA: rank · (in + out) for every adapted projection."""
    widths = sum(sum(sizes.projections[name]) for name in config.lora_targets)
    return sizes.layers * config.lora_rank * widths


def critic_parameters(sizes: Sizes, config: Config) -> int:
    """Of ``SoftMinCritic``: a norm, then hidden → hidden / 4 → 1 for each head."""
    inner = max(1, sizes.hidden // 4)
    head = sizes.hidden * inner + inner + inner + 1
    return 2 * sizes.hidden + (config.critic_heads if config.algorithm == "safe" else 1) * head


def activation_bytes(sizes: Sizes, config: Config, *, rows: int, length: int) -> int:
    """What the backbone keeps for the backward, in transformers' SDPA attention without dropout.

    A frozen linear layer keeps nothing. Per token and layer, with d bytes a base value:

        norms        2 · (4 H + 4)          the input, in float32, and its inverse root
        adapters     4 · (in of each)       the float32 copy of the input; see below
                     4 · rank each          between A and B
        attention    4 · d · heads · head size + 4 · heads + d · length      q, k, v, out; mask
        MLP          3 · d · I              gate before and after its activation, up

    Keys and values are counted at all heads: transformers repeats them, but for a single one. In a
    float32 model the adapters read the base's own tensors: one for q, k and v, one for gate and
    up, attention's output for o, the product for down.

    Args:
        sizes: Of the model.
        config: Settings.
        rows: Sequences in a minibatch.
        length: Prompt and response, tokens, padding counts.

    Returns:
        Bytes.
    """
    d = base_bytes(config)
    kept_heads = 2 * sizes.heads + 2 * (sizes.heads if sizes.key_heads > 1 else 1)
    inputs = {name: sizes.projections[name][0] for name in config.lora_targets}
    if d == 4:
        groups = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
        inputs = {groups.get(name, name): width for name, width in inputs.items()}
        inputs.pop("o_proj", None)
    per_token = (
        2 * (4 * sizes.hidden + 4)
        + 4 * sum(inputs.values())
        + 4 * config.lora_rank * len(config.lora_targets)
        + d * kept_heads * sizes.head_size
        + 4 * sizes.heads
        + d * length
        + 3 * d * sizes.intermediate
    )
    return rows * length * (sizes.layers * per_token + 2 * d * sizes.head_size)


def base_bytes(config: Config) -> int:
    """Of one frozen weight."""
    return {"float32": 4, "bfloat16": 2}[config.dtype]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one process; ``held`` all the time, of the others one at a time."""

    held: dict[str, int]
    sampling: dict[str, int]
    forward: dict[str, int]
    step: dict[str, int]

    @property
    def peak(self) -> int:
        """Held, and the largest of what comes and goes.

        In the backward activations go as gradients come, so that together they stay below the
        larger of the two, but for one layer.
        """
        passing = (self.sampling, self.forward, self.step)
        return sum(self.held.values()) + max(sum(parts.values()) for parts in passing)


def memory(
    config: Config,
    sizes: Sizes,
    *,
    prompt_width: int,
    gpus: int = 0,
    sharded: bool = False,
) -> Memory:
    """What one process of a run holds. Python and its libraries are not in it.

    Args:
        config: Settings.
        sizes: Of the model.
        prompt_width: Tokens, padding included.
        gpus: 0: everything on the CPU. Else of how many this is one: the minibatch and the rollout
            are divided.
        sharded: The layers, with their adapters, gradients and Adam, are divided over the GPUs
            too, and gathered one at a time, the next while one computes.

    Raises:
        ValueError: the GPUs do not divide the minibatch, or there is nothing to shard over.
    """
    if prompt_width < 1 or gpus < 0:
        raise ValueError(
            f"prompt_width must be positive and gpus not negative, got {prompt_width}, {gpus}"
        )
    ranks = max(1, gpus)
    if config.minibatch_size % ranks:
        raise ValueError(
            f"minibatch_size must be a multiple of the {ranks} GPUs, got {config.minibatch_size}"
        )
    if sharded and ranks == 1:
        raise ValueError(f"sharding needs at least 2 GPUs, got {gpus}")
    d, over = base_bytes(config), ranks if sharded else 1
    adapters = adapter_parameters(sizes, config)
    critic = critic_parameters(sizes, config)
    trained = adapters // over + critic
    length = prompt_width + config.max_new_tokens
    rows, batch = config.minibatch_size // ranks, config.batch_size // ranks
    tokens = rows * config.max_new_tokens
    tile = min(tokens, GPU_TILE[0]) * GPU_TILE[1] * d if gpus else TILE_BYTES
    # A gathered layer in both precisions, twice.
    gathered = 2 * (d * sizes.layer_parameters + 4 * adapters // sizes.layers)
    # In float32 on a CPU the head is packed too.
    head = sizes.vocabulary * sizes.hidden if config.dtype == "float32" and not gpus else 0
    token = 2 * sizes.layers * sizes.key_heads * sizes.head_size * d
    graphed = config.merged_sampling and gpus
    places = length + (-length % GRAPHED_LENGTHS if graphed else 0)
    cache = {"key-value cache": batch * places * token}
    held = {
        "layers": d * sizes.layers * sizes.layer_parameters // over,
        "embedding, head": d * sizes.embedding_parameters,
        "gathered layers": gathered if sharded else 0,
        "reference (adapters off)": 0,
        "merged copy for sampling": (
            d * (sizes.layers * sizes.layer_parameters + head) if config.merged_sampling else 0
        ),
        # Merged sampling keeps it for the next rollout.
        **(cache if config.merged_sampling else {}),
        "adapters": 4 * adapters // over,
        "critic and target critic": 8 * critic,
        "Adam": 8 * trained,
        "copy of the trust region": 4 * adapters // over if config.trust_region_limit else 0,
        # DistributedDataParallel reduces gradients in buckets of its own.
        "gradient buckets": 4 * (critic if sharded else trained) if ranks > 1 else 0,
    }
    sampling = {
        **({} if config.merged_sampling else cache),
        # Logits, their float32 log-probs and probabilities.
        "logits of a step": batch * sizes.vocabulary * (d + 4 + 4),
    }
    forward = {
        "activations": activation_bytes(sizes, config, rows=rows, length=length),
        # Hidden states and their gradient in float32, and a tile of logits.
        "head": tokens * sizes.hidden * (d + 4) + tile,
    }
    step = {
        "gradients": 4 * trained,
        # On a GPU all square roots at once, on a CPU one parameter's.
        "square roots of Adam": 4 * trained if gpus else 0,
    }
    return Memory(held=held, sampling=sampling, forward=forward, step=step)


def table(columns: dict[str, Memory]) -> Table:
    """One row a part, one column a run, in GiB; Markdown."""
    rows = Table("part, GiB", box=MARKDOWN)
    for name in columns:
        rows.add_column(name, justify="right")

    def add(label: str, values: list[int]) -> None:
        rows.add_row(label, *(f"{value / GIB:.3f}" for value in values))

    for group in ("held", "sampling", "forward", "step"):
        for part in getattr(next(iter(columns.values())), group):
            values = [getattr(column, group)[part] for column in columns.values()]
            if any(values) or part.startswith("reference"):
                add(part if group == "held" else f"{group}: {part}", values)
    add("peak", [column.peak for column in columns.values()])
    return rows


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line about what was wrong with the input."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", choices=CONFIGS, default="smollm2_135m")
    parser.add_argument("--model", help="another causal LM: folder or hub id")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--minibatch-size", type=int)
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--lora-rank", type=int)
    parser.add_argument("--prompt-width", type=int, default=32, help="tokens of a padded prompt")
    parser.add_argument("--gpus", type=int, default=0, help="0: all on the CPU")
    parser.add_argument("--sharded", action="store_true", help="layers divided over the GPUs")
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    config = CONFIGS[given.pop("config")]()
    names = ("prompt_width", "gpus", "sharded")
    options = {name: given.pop(name) for name in names}
    try:
        config = dataclasses.replace(config, **given)
        sizes = read_sizes(read_architecture(config.model))
        columns = {
            algorithm: memory(dataclasses.replace(config, algorithm=algorithm), sizes, **options)
            for algorithm in ("safe", "ppo")
        }
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Console().print(table(columns))
    return 0


if __name__ == "__main__":
    sys.exit(main())
