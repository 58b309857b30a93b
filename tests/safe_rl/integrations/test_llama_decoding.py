"""Which models the lean decoder takes, and that it computes what they compute."""

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from safe_rl.integrations import graphed_steps, llama_decoding
from safe_rl.integrations.cached_decoding import CachedDecoder, ModelDecoder
from safe_rl.integrations.llama_decoding import LlamaDecoder, is_llama_like
from tests.safe_rl.integrations import models

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


@pytest.mark.parametrize("build", [models.llama, models.qwen2])
def test_llama_and_qwen2_are_taken_with_and_without_lora(build) -> None:
    assert is_llama_like(build())
    assert is_llama_like(models.with_lora(build()).get_base_model())


def test_what_differs_is_left_to_the_general_path() -> None:
    sliding = Qwen2Config(
        vocab_size=11,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=0,
        **models.SIZES,
    )
    dora = models.with_lora(models.llama(), targets=["q_proj"], use_dora=True)
    for model in (
        Qwen2ForCausalLM(sliding),
        models.mistral(),
        models.gpt_neox(),
        dora.get_base_model(),
        torch.nn.Linear(2, 2),
    ):
        assert not is_llama_like(model)

    class Changed(type(models.llama())):
        pass

    assert not is_llama_like(Changed(models.llama().config))
    with pytest.raises(ValueError, match=r"full attention .* got Mistral"):
        LlamaDecoder(models.mistral())


@pytest.mark.parametrize("build", [models.llama, models.qwen2])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 0.3)]
)
def test_logits_equal_the_models_own(build, dtype: torch.dtype, tolerance: float) -> None:
    # Rotary angles are float32 in transformers: float64 does not come closer than they.
    model = build().to(dtype)
    lean, own = LlamaDecoder(model), ModelDecoder(model)
    lean.refresh()
    tokens = torch.tensor([[1, 1, 4, 5, 6, 8, 2], [3, 9, 2, 4, 10, 0, 5]])
    visible = torch.ones(2, 7, dtype=torch.bool)
    visible[0, :2] = False
    position = (visible.cumsum(1) - 1).clamp_min(0)
    for decoder in (lean, own):
        decoder.start(2, 7)
    for begin, end in ((0, 4), (4, 5), (5, 7)):
        piece = slice(begin, end)
        with torch.no_grad():
            got, expected = (
                decoder.extend(tokens[:, piece], position[:, piece], visible[:, :end])
                for decoder in (lean, own)
            )
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


@pytest.mark.filterwarnings("ignore:The new embeddings will be initialized")
@pytest.mark.parametrize("build", [models.llama, models.qwen2])  # tied, and with a head of its own
@pytest.mark.parametrize("sampled", [False, True])
def test_a_vocabulary_that_has_grown(build, sampled: bool) -> None:
    model = build()
    decoder = LlamaDecoder(model)
    if sampled:
        decoder.refresh()
    model.resize_token_embeddings(75)
    decoder.refresh()
    decoder.start(1, 2)
    tokens, places = torch.tensor([[70, 5]]), torch.tensor([[0, 1]])
    with torch.no_grad():
        got = decoder.extend(tokens, places, places >= 0)
        expected = model(tokens).logits[:, -1]
    assert got.shape == (1, 75)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_padding_that_holds_nan_reaches_no_other_token() -> None:
    """A padded place is not seen, whatever its embedding."""
    model = models.llama()
    decoder = LlamaDecoder(model)
    decoder.refresh()
    visible = torch.tensor([[False, True, True]])
    position = torch.tensor([[0, 0, 1]])
    logits = []
    for pad in (0, 9):
        decoder.start(1, 3)
        with torch.no_grad():
            logits.append(decoder.extend(torch.tensor([[pad, 4, 5]]), position, visible))
    assert torch.isfinite(logits[0]).all()
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0)


@pytest.mark.parametrize("kept", [[0, 2], [1], [2, 3], [0, 1, 2, 3]])
def test_rows_that_are_kept_go_on_as_before(kept: list[int]) -> None:
    decoder = LlamaDecoder(models.llama())
    decoder.refresh()
    start = torch.tensor([[2, 3], [4, 5], [6, 8], [9, 10]])
    logits = []
    for rows in (list(range(4)), kept):
        decoder.start(4, 3)
        visible = torch.ones(4, 3, dtype=torch.bool)
        with torch.no_grad():
            decoder.extend(start, torch.tensor([[0, 1]] * 4), visible[:, :2])
            decoder.keep(torch.tensor(rows))
            new = torch.tensor([[1], [2], [3], [4]])[rows]
            logits.append(decoder.extend(new, torch.full((len(rows), 1), 2), visible[rows]))
    torch.testing.assert_close(logits[1], logits[0][kept], rtol=1e-5, atol=1e-5)


class Replayed:
    """What a CUDA graph promises, without a GPU: inputs and results in memory of its own.

    ``tests/gpu`` has the graphs themselves.
    """

    made = 0

    def __init__(self, step, inputs: tuple[Tensor, ...], pool: object) -> None:
        type(self).made += 1
        self.step, self.inputs = step, inputs
        self.result = step(*inputs).clone()

    def __call__(self, *inputs: Tensor) -> Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            assert own.shape == given.shape
            own.copy_(given)
        return self.result.copy_(self.step(*self.inputs))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[Replayed]:
    monkeypatch.setattr(Replayed, "made", 0)
    for module in (llama_decoding, graphed_steps):
        monkeypatch.setattr(module, "can_record", lambda x: not torch.is_grad_enabled())
    monkeypatch.setattr(LlamaDecoder, "_has_kernels", False)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", Replayed)
    return Replayed


def responses(decoder: CachedDecoder, prompt: Tensor, steps: int) -> list[Tensor]:
    """Logits of each step; a row ends at every other one."""
    rows, length = prompt.shape
    decoder.start(rows, length + steps)
    visible = torch.ones(rows, length + steps, dtype=torch.bool)
    visible[0, 0] = False
    position = (visible.cumsum(1) - 1).clamp_min(0)
    found = [decoder.extend(prompt, position[:, :length], visible[:, :length])]
    for step in range(length, length + steps):
        if step % 2 and len(visible) > 1:
            left = torch.arange(1, len(visible))
            decoder.keep(left)
            visible, position = visible[left], position[left]
        tokens = found[-1][-len(visible) :].argmax(1, keepdim=True)
        found.append(decoder.extend(tokens, position[:, [step]], visible[:, : step + 1]))
    return found


@torch.no_grad()
def test_steps_as_graphs_give_the_models_own_logits(graphs: type[Replayed]) -> None:
    model = models.with_lora(models.qwen2()).get_base_model()
    lean, own = LlamaDecoder(model), ModelDecoder(model)
    prompts = torch.tensor([[1, 4, 5], [3, 9, 2], [7, 7, 1], [2, 2, 6], [8, 0, 4], [6, 5, 3]])

    def compare(rows: int, steps: int) -> int:
        """How many graphs it takes."""
        before = graphs.made
        models.move_adapters(model, 0.1)
        lean.refresh()
        pairs = zip(*(responses(d, prompts[:rows], steps) for d in (lean, own)), strict=True)
        for got, expected in pairs:
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
        return graphs.made - before

    assert compare(6, 8) == 3  # of 6, 4 and 2 rows
    assert compare(3, 2) == compare(6, 7) == 0
    assert compare(3, 4) == 1  # of 1 row
    # A longer text needs a larger cache.
    assert compare(2, 65) == 1
    # A weight that moves is read where it is.
    model.base_model.norm.weight.data = model.base_model.norm.weight.data * 2
    assert compare(2, 3) == 1


@torch.no_grad()
def test_what_a_diverged_model_left_in_the_cache_is_not_seen(graphs: type[Replayed]) -> None:
    model = models.llama()
    decoder = LlamaDecoder(model)
    decoder.refresh()
    prompt = torch.tensor([[2, 3, 4], [5, 6, 8]])
    expected = responses(decoder, prompt, 3)
    model.base_model.layers[0].input_layernorm.weight.fill_(torch.nan)
    assert responses(decoder, prompt, 8)[-1].isnan().all()
    model.load_state_dict(models.llama().state_dict())
    for got, before in zip(responses(decoder, prompt, 3), expected, strict=True):
        assert torch.equal(got, before)


def test_graphs_of_inference_mode_are_not_used_outside_of_it(graphs: type[Replayed]) -> None:
    decoder = LlamaDecoder(models.llama())
    decoder.refresh()
    prompt = torch.tensor([[2, 3, 4], [5, 6, 8]])
    with torch.inference_mode():
        expected = responses(decoder, prompt, 3)
    with torch.no_grad():
        found = responses(decoder, prompt, 3)
        made = graphs.made
        again = responses(decoder, prompt, 3)
    assert graphs.made == made
    for a, b, c in zip(expected, found, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_a_decoder_is_copied_after_use_and_freed_when_nothing_refers_to_it() -> None:
    decoder = LlamaDecoder(models.llama())
    decoder.refresh()
    prompt = torch.tensor([[2, 3, 4], [5, 6, 8]])
    with torch.no_grad():
        expected = responses(decoder, prompt, 3)
        again = copy.deepcopy(decoder)
        for a, b in zip(responses(again, prompt, 3), expected, strict=True):
            assert torch.equal(a, b)
    watched = weakref.ref(decoder)
    gc.disable()
    try:
        del decoder
        assert watched() is None
    finally:
        gc.enable()
