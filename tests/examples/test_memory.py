"""The memory model, against what small real models hold."""

import dataclasses

import pytest
import torch
from tensordict import TensorDict
from transformers import GPTNeoXConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from examples.lm_rlhf import memory as model
from examples.lm_rlhf.architectures import random_model, read_architecture
from examples.lm_rlhf.config import ALL_PROJECTIONS, Config, qwen2_5_3b, smollm2_135m
from examples.lm_rlhf.models import with_adapters
from safe_ops import linear_log_probs
from safe_rl import SoftMinCritic
from safe_rl.causal_lm import CausalLMActorCritic
from safe_rl.integrations.cached_decoding import ModelDecoder, read_prompts
from safe_rl.integrations.llama_decoding import LlamaDecoder
from safe_rl.integrations.merged_linear import MergedLinear

SIZES = {"vocab_size": 31, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 4}
ARCHITECTURES = {
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2, num_hidden_layers=3),
    "llama": LlamaConfig(
        **SIZES, num_key_value_heads=1, num_hidden_layers=2, tie_word_embeddings=True
    ),
    "llama with biases": LlamaConfig(
        **SIZES,
        num_key_value_heads=2,
        num_hidden_layers=1,
        attention_bias=True,
        mlp_bias=True,
        head_dim=10,
    ),
}
ROWS, PROMPT, RESPONSE = 2, 5, 6


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> PreTrainedConfig:
    return ARCHITECTURES[request.param]


def settings(**given: object) -> Config:
    small = {"batch_size": 4, "minibatch_size": 2, "lora_rank": 3, "max_new_tokens": RESPONSE}
    return dataclasses.replace(qwen2_5_3b(), **small | given)


def build(architecture: PreTrainedConfig, config: Config) -> PreTrainedModel:
    base = random_model(architecture, getattr(torch, config.dtype))
    return with_adapters(base, config).get_base_model()


def batch() -> TensorDict:
    torch.manual_seed(0)
    mask = torch.ones(ROWS, PROMPT + RESPONSE).bool()
    mask[0, :2] = False
    tokens = torch.randint(0, 31, mask.shape)
    return TensorDict(
        {
            "tokens": {"prompt": tokens[:, :PROMPT], "response": tokens[:, PROMPT:]},
            "prompt_mask": mask[:, :PROMPT],
            "response_mask": mask[:, PROMPT:],
        },
        [ROWS],
    )


def bytes_kept(network: torch.nn.Module, forward) -> int:
    """Storage that autograd keeps, each once, without parameters and buffers."""
    held = [*network.parameters(), *network.buffers()]
    own = {tensor.untyped_storage().data_ptr() for tensor in held}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    assert result.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("targets", [ALL_PROJECTIONS, ("q_proj", "v_proj")], ids=len)
def test_weights_adapters_and_critic_have_the_bytes_of_a_real_model(
    architecture: PreTrainedConfig, targets: tuple[str, ...]
) -> None:
    config = settings(lora_targets=targets)
    sizes = model.read_sizes(architecture)
    network = build(architecture, config)
    held = model.memory(config, sizes, prompt_width=PROMPT).held
    assert held["layers"] + held["embedding, head"] == size(
        p for p in network.parameters() if not p.requires_grad
    )
    assert held["adapters"] == size(p for p in network.parameters() if p.requires_grad)
    critic = SoftMinCritic(sizes.hidden, num_heads=config.critic_heads)
    assert held["critic and target critic"] == 2 * size(critic.parameters())
    ppo = model.critic_parameters(sizes, dataclasses.replace(config, algorithm="ppo"))
    assert 4 * ppo == size(SoftMinCritic(sizes.hidden, num_heads=1).parameters())


def test_adam_holds_two_numbers_a_trained_parameter(architecture: PreTrainedConfig) -> None:
    config = settings()
    sizes = model.read_sizes(architecture)
    network, critic = build(architecture, config), SoftMinCritic(sizes.hidden)
    trained = [p for p in network.parameters() if p.requires_grad] + list(critic.parameters())
    optimizer = torch.optim.Adam(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    counted = model.memory(config, sizes, prompt_width=PROMPT)
    assert counted.held["Adam"] == size(value for value in state if value.ndim)
    assert counted.step["gradients"] == size(parameter.grad for parameter in trained)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_activations_have_the_bytes_that_autograd_keeps(
    architecture: PreTrainedConfig, dtype: str
) -> None:
    config = settings(dtype=dtype)
    network = build(architecture, config)
    actor = CausalLMActorCritic(network, SoftMinCritic(24))
    kept = bytes_kept(network, lambda: actor.response_states(batch()))
    counted = model.activation_bytes(
        model.read_sizes(architecture), config, rows=ROWS, length=PROMPT + RESPONSE
    )
    assert counted == kept


def test_the_head_keeps_no_more_than_its_hidden_states() -> None:
    config, vocabulary = settings(), 50_000
    sizes = dataclasses.replace(model.read_sizes(ARCHITECTURES["qwen2"]), vocabulary=vocabulary)
    weight = torch.randn(vocabulary, sizes.hidden, dtype=torch.bfloat16)
    hidden = torch.randn(ROWS, RESPONSE, sizes.hidden, dtype=torch.bfloat16, requires_grad=True)
    tokens = torch.zeros(ROWS, RESPONSE, dtype=torch.int64)
    kept = bytes_kept(
        torch.nn.ParameterList([weight]), lambda: linear_log_probs(hidden, weight, tokens).log_prob
    )
    head = model.memory(config, sizes, prompt_width=PROMPT).forward["head"]
    # Of scalars a token it keeps six.
    per_token = 6 * 8
    assert hidden.nbytes <= kept <= hidden.nbytes + ROWS * RESPONSE * per_token
    assert kept < head < vocabulary * sizes.hidden * 2 + model.TILE_BYTES


def test_the_cache_has_the_bytes_of_a_real_one(architecture: PreTrainedConfig) -> None:
    config = settings()
    decoder = ModelDecoder(build(architecture, config))
    rows, length = config.batch_size, PROMPT + RESPONSE
    prompt = torch.arange(rows * length).view(rows, length) % 31
    with torch.no_grad():
        read_prompts(decoder, prompt, torch.ones_like(prompt).bool(), 1)
    real = size(x for layer in decoder.cache.layers for x in (layer.keys, layer.values))
    counted = model.memory(config, model.read_sizes(architecture), prompt_width=PROMPT).sampling
    assert counted["key-value cache"] == real


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_merged_sampling_costs_a_copy_of_the_layers(dtype: str) -> None:
    """In float32 of the head too, where it is packed."""
    config = settings(merged_sampling=True, dtype=dtype)
    architecture = ARCHITECTURES["qwen2"]
    decoder = LlamaDecoder(build(architecture, config))
    decoder.refresh()
    parts = [part for layer in decoder._layers for part in layer] + [decoder._head]
    copies = [part for part in parts if isinstance(part, MergedLinear)]
    assert len(copies) == 4 * len(decoder._layers) + (dtype == "float32")
    sizes = model.read_sizes(architecture)
    counted = model.memory(config, sizes, prompt_width=PROMPT).held["merged copy for sampling"]
    # The biases are the model's own, and so are the norms.
    vectors = 2 * sizes.hidden + sum(sizes.projections[name][1] for name in sizes.biases)
    bytes_each = 4 if dtype == "float32" else 2
    numbers = sum(copy.in_features * copy.out_features for copy in copies)
    assert counted == bytes_each * (numbers + sizes.layers * vectors)
    # Packed, the last panel of a small matrix is filled up.
    own, more = size([copy.weight for copy in copies]), dtype == "float32"
    assert bytes_each * numbers <= own <= bytes_each * numbers * (2 if more else 1)
    apart = model.memory(settings(), sizes, prompt_width=PROMPT)
    assert apart.held["merged copy for sampling"] == 0
    # The cache stays for the next rollout.
    with torch.no_grad():
        decoder.start(config.batch_size, PROMPT + RESPONSE)
    held = model.memory(config, sizes, prompt_width=PROMPT).held
    assert held["key-value cache"] == decoder._cache.nbytes
    assert "key-value cache" not in apart.held


def test_the_peak_is_what_is_held_and_the_largest_of_what_passes() -> None:
    parts = model.Memory(held={"a": 5, "b": 6}, sampling={"c": 1}, forward={"d": 2}, step={"e": 1})
    assert parts.peak == 13
    assert dataclasses.replace(parts, sampling={"c": 3, "d": 1}).peak == 15
    assert dataclasses.replace(parts, step={"e": 7}).peak == 18


def test_what_is_switched_off_costs_nothing() -> None:
    sizes = model.read_sizes(read_architecture("Qwen/Qwen2.5-3B"))
    config = qwen2_5_3b()
    whole = model.memory(config, sizes, prompt_width=32).held
    bare = dataclasses.replace(config, trust_region_limit=None)
    assert whole["copy of the trust region"] == whole["adapters"]
    assert model.memory(bare, sizes, prompt_width=32).held["copy of the trust region"] == 0


def test_gpus_divide_rows_and_shards_divide_weights() -> None:
    config, sizes = qwen2_5_3b(), model.read_sizes(read_architecture("Qwen/Qwen2.5-3B"))
    one = model.memory(config, sizes, prompt_width=32, gpus=1)
    whole = model.memory(config, sizes, prompt_width=32, gpus=8)
    shard = model.memory(config, sizes, prompt_width=32, gpus=8, sharded=True)
    assert one.forward["activations"] == 8 * whole.forward["activations"]
    assert one.held["layers"] == whole.held["layers"]
    for part in ("layers", "adapters", "copy of the trust region"):
        assert shard.held[part] == whole.held[part] // 8
    # Embedding and head, which here are one, and the critic are held by each.
    for part in ("embedding, head", "critic and target critic"):
        assert shard.held[part] == whole.held[part]
    critic = whole.held["critic and target critic"] // 2
    assert shard.held["gradient buckets"] == critic
    assert shard.held["Adam"] == (whole.held["Adam"] - 2 * critic) // 8 + 2 * critic
    assert whole.held["gradient buckets"] == whole.step["gradients"]
    assert shard.peak < whole.peak < one.peak + whole.held["gradient buckets"]
    # Two layers of 36, whole, with their adapters in float32.
    layers = 8 * (shard.held["layers"] + shard.held["adapters"])
    assert shard.held["gathered layers"] == pytest.approx(2 * layers / 36, rel=1e-6)


def test_other_architectures_and_uneven_gpus_are_refused() -> None:
    with pytest.raises(ValueError, match="llama and qwen2 models, got 'gpt_neox'"):
        model.read_sizes(GPTNeoXConfig())
    sizes = model.read_sizes(ARCHITECTURES["llama"])
    with pytest.raises(ValueError, match="multiple of the 3 GPUs, got 8"):
        model.memory(qwen2_5_3b(), sizes, prompt_width=32, gpus=3)
    with pytest.raises(ValueError, match="at least 2 GPUs, got 1"):
        model.memory(qwen2_5_3b(), sizes, prompt_width=32, gpus=1, sharded=True)
    with pytest.raises(ValueError, match="prompt_width must be positive"):
        model.memory(qwen2_5_3b(), sizes, prompt_width=0)


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--batch-size", "4", "--minibatch-size", "1", "--max-new-tokens", "32"]
    assert model.main(["--config", "qwen2_5_3b", *small]) == 0
    rows = {
        cells[1].strip(): cells[2:4]
        for cells in (line.split("|") for line in capsys.readouterr().out.splitlines())
        if len(cells) > 3
    }
    # 3,085,938,688 parameters of two bytes, 239,468,544 of four.
    weights = float(rows["layers"][0]) + float(rows["embedding, head"][0])
    assert weights == pytest.approx(5.748, abs=1e-3)
    assert float(rows["adapters"][0]) == pytest.approx(0.892, abs=5e-4)
    assert float(rows["peak"][0]) > float(rows["peak"][1])  # PPO has one critic head less
    assert "merged copy for sampling" not in rows


def test_the_command_names_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert model.main(["--minibatch-size", "3"]) == 2
    assert "minibatch_size must divide batch_size" in capsys.readouterr().err


def test_the_demo_merges_and_the_3b_does_not() -> None:
    assert smollm2_135m().merged_sampling
    assert not qwen2_5_3b().merged_sampling
