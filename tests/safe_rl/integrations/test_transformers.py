"""What is drawn comes from the model's own distribution, ends where it should, and repeats."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from safe_rl.integrations.cached_decoding import shared_start
from safe_rl.integrations.transformers import Sampled, Sampler, draw
from safe_rl.rollouts import left_pad, response_mask
from tests.safe_rl.integrations import models

pytestmark = [
    # transformers warns of its own renaming when peft wraps a model.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]

NEVER = torch.tensor([-1])
EOS = torch.tensor([1, 7])
START = [2, 3, 4, 5, 6, 8, 9, 10, 2, 3, 5, 8]
SHARED = [[*START, *rest] for rest in ([4], [5, 5], [9, 2, 8], [6], [3, 3, 3, 3, 3], [8], [2, 4])]
APART = [[4], [5, 6, 8], [9, 2], [3, 3, 3, 3, 3, 3, 3], [5, 6, 8]]
NEOX_TARGETS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
KINDS = {
    "llama": lambda: models.llama(),
    "llama, lora": lambda: models.with_lora(models.llama()).get_base_model(),
    "llama, lora, head": lambda: models.with_lora(
        models.qwen2(), targets=["q_proj", "lm_head"]
    ).get_base_model(),
    "qwen2, lora": lambda: models.with_lora(models.qwen2()).get_base_model(),
    "gpt_neox": lambda: models.gpt_neox(),
    "gpt_neox, lora": lambda: models.with_lora(
        models.gpt_neox(), targets=NEOX_TARGETS
    ).get_base_model(),
    "mistral, lora": lambda: models.with_lora(models.mistral()).get_base_model(),
}


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest):
    return KINDS[request.param]()


def sample(sampler: Sampler, prompts: list[list[int]], seed: int = 0, **more) -> Sampled:
    prompt, mask = left_pad(prompts, width=max(map(len, prompts)) + 2, pad_id=1)
    settings = {"max_new_tokens": 12, "temperature": 0.8, "eos_ids": EOS, "pad_id": 1} | more
    generator = torch.Generator().manual_seed(seed)
    return sampler.sample(prompt, mask, generator=generator, **settings)


def valid(sampled: Sampled) -> Tensor:
    return response_mask(sampled.tokens, EOS)


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("prompts", [SHARED, APART], ids=["shared", "apart"])
def test_log_probs_equal_a_plain_forward(model, prompts: list[list[int]], merged: bool) -> None:
    sampler = Sampler(model, merged=merged)
    sampled = sample(sampler, prompts)
    mask = valid(sampled)
    # Rows end at different times, so rows are dropped on the way.
    assert len(set(mask.sum(1).tolist())) > 1
    for row, prompt in enumerate(prompts):
        response = sampled.tokens[row][mask[row]].tolist()
        expected = models.plain_log_prob(model, prompt, response, 0.8)
        error = (sampled.log_prob[row][mask[row]] - expected).abs().max()
        assert error < 1e-4


def test_after_the_end_stands_padding(model) -> None:
    sampled = sample(Sampler(model), SHARED, pad_id=0)
    after = ~valid(sampled)
    assert after.any()
    assert (sampled.tokens[after] == 0).all()
    assert (sampled.log_prob[after] == 0).all()
    assert (sampled.log_prob[~after] < 0).all()


def test_ends_do_not_change_what_is_drawn_before(model) -> None:
    sampler = Sampler(model)
    ended, endless = sample(sampler, SHARED), sample(sampler, SHARED, eos_ids=NEVER)
    assert endless.tokens.shape == (len(SHARED), 12)
    mask = response_mask(endless.tokens, EOS)
    width = ended.tokens.shape[1]
    assert width == mask.sum(1).max()
    assert torch.equal(torch.where(mask, endless.tokens, 1)[:, :width], ended.tokens)


def test_one_seed_repeats_bit_for_bit_and_another_does_not(model) -> None:
    sampler = Sampler(model)
    first, second, other = (sample(sampler, APART, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.log_prob, second.log_prob)
    assert not torch.equal(first.log_prob, other.log_prob)


def test_the_global_generator_is_used_only_where_none_is_given() -> None:
    sampler = Sampler(models.llama())
    prompt = torch.tensor([[2, 3]])
    call = {"max_new_tokens": 9, "temperature": 1.0, "eos_ids": NEVER, "pad_id": 1}
    torch.manual_seed(5)
    first = sampler.sample(prompt, prompt > 0, **call)
    torch.manual_seed(5)
    again = sampler.sample(prompt, prompt > 0, **call)
    state = torch.get_rng_state()
    given = sampler.sample(prompt, prompt > 0, generator=torch.Generator().manual_seed(5), **call)
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.tokens, given.tokens)
    assert torch.equal(torch.get_rng_state(), state)


def exact_probabilities(model, prompt: list[int], temperature: float) -> dict[tuple, float]:
    """Of every response of at most two tokens over five, by plain forwards; 1 ends."""
    found = {}
    for tokens in itertools.product(range(5), repeat=2):
        response = [1] if tokens[0] == 1 else list(tokens)
        log_prob = models.plain_log_prob(model, prompt, response, temperature)
        found[tuple(response)] = float(log_prob.sum().exp())
    assert sum(found.values()) == pytest.approx(1.0)
    return found


def p_value(counts: dict[tuple, int], expected: dict[tuple, float]) -> float:
    """Of Pearson's chi-square."""
    number = sum(counts.values())
    statistic = sum(
        (counts.get(key, 0) - number * share) ** 2 / (number * share)
        for key, share in expected.items()
    )
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2).double()))


@pytest.mark.parametrize("build", [models.llama, models.gpt_neox])
def test_responses_follow_the_exact_distribution(build) -> None:
    model = build(vocabulary=5)
    prompt = [2, 3, 0]
    # Two prompts, so that one starts in padding; only the longer one is counted.
    sampled = sample(
        Sampler(model),
        [prompt, [4, 4]] * 6000,
        max_new_tokens=2,
        temperature=2.0,
        eos_ids=torch.tensor([1]),
    )
    counts: dict[tuple, int] = {}
    for first, second in sampled.tokens[::2].tolist():
        key = (1,) if first == 1 else (first, second)
        counts[key] = counts.get(key, 0) + 1
    assert p_value(counts, exact_probabilities(model, prompt, 2.0)) > 1e-3
    # The count is large enough to tell a temperature a tenth off.
    assert p_value(counts, exact_probabilities(model, prompt, 1.8)) < 1e-6


def test_pad_may_be_an_eos_and_a_length_stop_is_no_end() -> None:
    sampled = sample(Sampler(models.llama()), SHARED, pad_id=1, max_new_tokens=3)
    stopped = ~torch.isin(sampled.tokens, EOS).any(1)
    assert stopped.any()
    assert sampled.tokens.shape[1] == 3
    assert (sampled.log_prob[stopped] < 0).all()


def test_all_rows_ended_stops_at_once() -> None:
    every = torch.arange(11)
    assert sample(Sampler(models.llama()), APART, eos_ids=every).tokens.shape == (5, 1)


def test_the_sampler_follows_the_adapters(model) -> None:
    if not any("lora_" in name for name, _ in model.named_parameters()):
        pytest.skip("no adapters")
    sampler = Sampler(model)
    before = sample(sampler, APART, max_new_tokens=4, eos_ids=NEVER)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    models.move_adapters(model, 0.2)
    after = sample(sampler, APART, max_new_tokens=4, eos_ids=NEVER)
    expected = models.plain_log_prob(model, APART[1], after.tokens[1].tolist(), 0.8)
    assert (after.log_prob[1] - expected).abs().max() < 1e-4
    assert not torch.equal(before.log_prob, after.log_prob)
    model.load_state_dict(kept)
    again = sample(sampler, APART, max_new_tokens=4, eos_ids=NEVER)
    assert torch.equal(before.log_prob, again.log_prob)


@pytest.mark.parametrize("merged", [True, False])
def test_adapters_switched_off_are_left_out(merged: bool) -> None:
    peft_model = models.with_lora(models.llama())
    sampler = Sampler(peft_model.get_base_model(), merged=merged)
    with peft_model.disable_adapter():
        off = sample(sampler, APART)
    bare = sample(Sampler(models.llama()), APART)
    assert torch.equal(off.tokens, bare.tokens)
    assert not torch.equal(sample(sampler, APART).log_prob, bare.log_prob)


def test_sampling_writes_none_of_the_models_tensors(model) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    sample(Sampler(model), SHARED)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert modules == dict(model.named_modules())


@pytest.mark.slow
@pytest.mark.parametrize("build", [models.llama, models.mistral])
def test_the_base_is_bitwise_unchanged_after_a_thousand_updates(build) -> None:
    model = models.with_lora(build()).get_base_model()
    sampler = Sampler(model)
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(adapters, lr=1e-3)
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    prompt = torch.tensor([[2, 3], [4, 5]])
    for _ in range(1000):
        tokens, _ = sampler.sample(
            prompt, prompt > 0, max_new_tokens=2, temperature=1.0, eos_ids=NEVER, pad_id=1
        )
        whole = torch.cat([prompt, tokens], 1)
        loss = model(input_ids=whole, labels=whole, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    now = dict(model.named_parameters())
    assert all(torch.equal(value, now[name]) for name, value in base.items())
    sampled = sample(sampler, APART, max_new_tokens=4, eos_ids=NEVER)
    expected = models.plain_log_prob(model, APART[1], sampled.tokens[1].tolist(), 0.8)
    assert (sampled.log_prob[1] - expected).abs().max() < 1e-4


def rows_and_tokens(model) -> list[tuple[int, int]]:
    """[B, S] of every forward, seen at the embedding."""
    seen = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape)))
    return seen


@pytest.mark.parametrize("build", [models.llama, models.gpt_neox])
def test_work_is_done_once_and_only_for_rows_that_go_on(build) -> None:
    model = build()
    seen = rows_and_tokens(model)
    sampled = sample(Sampler(model), SHARED)
    lengths = valid(sampled).sum(1)
    # The shared start once, the rest of each prompt, then one token for each row that goes on.
    going = [(int((lengths > step).sum()), 1) for step in range(1, int(lengths.max()))]
    assert seen == [(1, 12), (7, 5), *going]


class LargestTensor(TorchDispatchMode):
    """How many numbers the largest tensor holds that an operation returns, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.numbers = max(self.numbers, *made, 0)
        return result


@pytest.mark.parametrize("build", [models.llama, models.qwen2, models.gpt_neox])
def test_the_head_is_never_copied_for_each_row(build) -> None:
    # Frozen, as below adapters: torch copies no weight that is trained.
    model = build(vocabulary=512).requires_grad_(False)
    with LargestTensor() as largest:
        sample(Sampler(model, merged=False), SHARED, max_new_tokens=2)
    assert largest.numbers == 512 * models.SIZES["hidden_size"]  # the head itself, transposed


def test_a_sliding_window_shares_nothing() -> None:
    model = models.mistral()
    seen = rows_and_tokens(model)
    sample(Sampler(model), SHARED, max_new_tokens=1)
    assert seen == [(7, 17)]


def test_shared_start_leaves_a_token_in_each_row() -> None:
    same = torch.tensor([[5, 6, 7], [5, 6, 7]])
    assert shared_start(same, same > 0) == 2
    prompt, mask = left_pad([[5, 6], [5, 6, 7], [5, 6, 8]], width=4, pad_id=5)
    assert shared_start(prompt, mask) == 1
    prompt, mask = left_pad([[4, 6, 7], [5, 6, 7]], width=3, pad_id=5)
    assert shared_start(prompt, mask) == 0


def test_draw_never_takes_an_impossible_token() -> None:
    distribution = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).log_softmax(-1)
    largest = torch.nextafter(torch.tensor([1.0]).double(), torch.tensor([0.0]).double())
    assert draw(distribution, torch.zeros(1, dtype=torch.float64)).tolist() == [1]
    assert draw(distribution, largest).tolist() == [2]


@pytest.mark.parametrize("size", [3, 256, 300, 512, 513])
def test_draw_has_the_frequencies_of_the_distribution(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    distribution = (2 * torch.randn(1, size, generator=generator)).log_softmax(-1)
    uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    drawn = draw(distribution.expand(20_000, -1), uniform)
    found = torch.bincount(drawn, minlength=size) / 20_000
    assert (drawn.diff() >= 0).all()
    # One at most is missed at each of a token's two ends.
    assert (found - distribution[0].exp()).abs().max() <= 1e-4 + 1e-6


def test_a_row_of_nothing_is_refused() -> None:
    distribution = torch.tensor([[0.0, -torch.inf], [-torch.inf, -torch.inf]])
    with pytest.raises(ValueError, match=r"in rows \[1\]"):
        draw(distribution, torch.tensor([0.5, 0.5], dtype=torch.float64))


def test_merged_sampling_under_autocast(model) -> None:
    sampler = Sampler(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sampled = sample(sampler, APART, max_new_tokens=3)
    assert sampled.tokens.shape == (len(APART), 3)
    assert (sampled.log_prob <= 0).all()


def test_logits_that_are_nan_are_named() -> None:
    model = models.llama()
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    with pytest.raises(ValueError, match=r"logits must be finite, got nan or inf in rows \[0, 1"):
        sample(Sampler(model), APART)


def test_layers_are_put_back_after_an_error() -> None:
    model = models.with_lora(models.mistral()).get_base_model()
    modules = dict(model.named_modules())
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    with pytest.raises(ValueError, match="logits must be finite"):
        sample(Sampler(model), APART)
    assert modules == dict(model.named_modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"prompt": torch.zeros(0, 2).long()},
            r"prompt and prompt_mask must be \[B, P\], not empt",
        ),
        ({"prompt": torch.zeros(2, 3).long()}, r"got \(2, 3\) and \(2, 2\)"),
        ({"prompt_mask": torch.tensor([[True, True], [True, False]])}, "pad on the left"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"max_new_tokens": 63}, "prompt of 2 tokens and 63 new ones .* context of 64 tokens"),
    ],
)
def test_errors_name_the_argument(change: dict, message: str) -> None:
    ids = torch.tensor([[2, 3], [4, 5]])
    settings = {"max_new_tokens": 2, "temperature": 1.0, "eos_ids": EOS, "pad_id": 1}
    arguments = {"prompt": ids, "prompt_mask": ids > 0, **settings, **change}
    with pytest.raises(ValueError, match=message):
        Sampler(models.llama()).sample(**arguments)


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="evaluation mode"):
        sample(Sampler(models.llama().train()), APART)


def test_an_adapter_that_cannot_be_merged_is_named_and_runs_unmerged() -> None:
    model = models.with_lora(models.llama(), targets=["q_proj"], use_dora=True).get_base_model()
    with pytest.raises(ValueError, match=r"q_proj is no plain LoRA .* merged=False"):
        Sampler(model)
    sampled = sample(Sampler(model, merged=False), APART, max_new_tokens=3, eos_ids=NEVER)
    expected = models.plain_log_prob(model, APART[1], sampled.tokens[1].tolist(), 0.8)
    assert (sampled.log_prob[1] - expected).abs().max() < 1e-4
