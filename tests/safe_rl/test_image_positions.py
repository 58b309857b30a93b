"""Models whose positions have three dimensions, scored as their own forward scores."""

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from safe_rl import CausalLMActorCritic, PPOLoss, SoftMinCritic, total_loss
from safe_rl.image_positions import as_the_model_takes_them
from safe_rl.rollouts import left_pad, pack_rollout
from tests.tiny_models import llama_config

VOCABULARY, EOS, IMAGE, VIDEO, START, END = 20, 1, 19, 18, 17, 16
INPUTS = {"pixel_values": "pixel_values", "image_grid_thw": "image_grid_thw"}
# Sizes in patches, 2 x 2 of which are one token. The second row has two images, the third none.
GRIDS = [[(1, 4, 4)], [(1, 2, 4), (1, 4, 2)], [], [(1, 6, 2)]]
TEXTS = [[5, 6, 7], [8], [9, 4, 11, 12], [3, 3]]


def prompt(row: int) -> list[int]:
    tokens = []
    for t, h, w in GRIDS[row]:
        tokens += [START, *[IMAGE] * (t * h * w // 4), END]
    return tokens + TEXTS[row]


TEXT = {
    **{"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32},
    **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
    **{"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS, "initializer_range": 0.3},
    # Low, so that one place more or less is seen.
    "rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [1, 1, 2]},
}
TOKENS = {
    **{"image_token_id": IMAGE, "video_token_id": VIDEO},
    **{"vision_start_token_id": START, "vision_end_token_id": END},
}
PATCH = {"patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 1, "num_heads": 2}


def qwen2() -> Qwen2VLForConditionalGeneration:
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "mlp_ratio": 2, **PATCH}
    config = Qwen2VLConfig(text_config=TEXT, vision_config=vision, **TOKENS)
    return Qwen2VLForConditionalGeneration(config)


def qwen2_5() -> Qwen2_5_VLForConditionalGeneration:
    vision = {"depth": 1, "hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 16}
    vision |= {"window_size": 8, "fullatt_block_indexes": [0], **PATCH}
    config = Qwen2_5_VLConfig(text_config=TEXT, vision_config=vision, **TOKENS)
    return Qwen2_5_VLForConditionalGeneration(config)


Model = Qwen2VLForConditionalGeneration | Qwen2_5_VLForConditionalGeneration


@pytest.fixture(params=[qwen2, qwen2_5])
def model(request: pytest.FixtureRequest) -> Model:
    torch.manual_seed(0)
    return request.param().eval()


def images() -> dict[str, Tensor]:
    """Row by row: two sizes a row, 0 for no image, and patches that no image has."""
    grid = torch.tensor([[*row, *[(0, 0, 0)] * (2 - len(row))] for row in GRIDS])
    generator = torch.Generator().manual_seed(0)
    return {"image_grid_thw": grid, "pixel_values": torch.randn(4, 18, 12, generator=generator)}


def of_row(row: int) -> dict[str, Tensor]:
    """As the model's own processor gives them."""
    count = sum(t * h * w for t, h, w in GRIDS[row])
    if not count:
        return {}
    return {
        "image_grid_thw": torch.tensor(GRIDS[row]),
        "pixel_values": images()["pixel_values"][row, :count],
    }


def types(tokens: Tensor) -> Tensor:
    return (tokens == IMAGE).int()


@torch.no_grad()
def own_log_probs(model: Model, row: int, response: list[int]) -> Tensor:
    """From the logits of the model's forward on one row, unpadded."""
    tokens = torch.tensor([prompt(row) + response])
    logits = model(input_ids=tokens, mm_token_type_ids=types(tokens), **of_row(row)).logits
    first = len(prompt(row)) - 1
    log_prob = logits[0, first:-1].log_softmax(-1)
    return log_prob.gather(1, torch.tensor(response).unsqueeze(1)).squeeze(1)


@torch.no_grad()
def rollout(model: Model) -> TensorDict:
    """Answers that ``generate`` has drawn, of the rows one by one."""
    torch.manual_seed(2)
    answers = []
    for row in range(4):
        ids = torch.tensor([prompt(row)])
        tokens = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=types(ids),
            do_sample=True,
            top_k=VOCABULARY,
            max_new_tokens=6,
            suppress_tokens=[IMAGE, VIDEO],
            **of_row(row),
        )
        answer = tokens[0, ids.shape[1] :].tolist()
        answers.append(answer + [EOS] * (6 - len(answer)))
    batch = pack_rollout(
        *left_pad([prompt(row) for row in range(4)], width=14, pad_id=EOS),
        torch.tensor(answers),
        torch.tensor([EOS]),
        width=6,
        pad_id=EOS,
    )
    return batch.update(images())


def actor_critic(model: Model, **inputs: str) -> CausalLMActorCritic:
    torch.manual_seed(1)
    return CausalLMActorCritic(model, SoftMinCritic(16), model_inputs={**INPUTS, **inputs})


def answer(batch: TensorDict, row: int) -> list[int]:
    return batch["tokens", "response"][row][batch["response_mask"][row]].tolist()


@torch.no_grad()
def test_scores_are_those_of_the_models_own_forward(model):
    batch = rollout(model)
    # The model has just generated, and remembers where.
    batch = actor_critic(model)(batch)
    for row in range(4):
        expected = own_log_probs(model, row, answer(batch, row))
        found = batch["log_prob"][row, : len(expected)]
        assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_scores_are_those_that_generate_drew_from(model):
    """Greedy, so that the scores of each step belong to the tokens."""
    row = 1
    ids = torch.tensor([prompt(row)])
    drawn = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=types(ids),
        do_sample=False,
        min_new_tokens=6,
        max_new_tokens=6,
        suppress_tokens=[IMAGE, VIDEO],
        output_logits=True,
        return_dict_in_generate=True,
        **of_row(row),
    )
    response = drawn.sequences[:, ids.shape[1] :]
    logits = torch.stack(drawn.logits, 1)
    expected = logits.log_softmax(-1).gather(2, response.unsqueeze(2)).squeeze(2)
    batch = rollout(model)[row : row + 1]
    batch["tokens", "response"] = response
    batch["response_mask"] = torch.ones(1, 6, dtype=torch.bool)
    assert_close(actor_critic(model)(batch)["log_prob"], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_positions_that_are_given(model):
    batch = rollout(model)
    tokens = torch.cat([batch["tokens", "prompt"], batch["tokens", "response"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["response_mask"]], 1)
    positions, _ = model.model.get_rope_index(
        tokens,
        types(tokens),
        image_grid_thw=torch.tensor([size for row in GRIDS for size in row]),
        attention_mask=attention.long(),
    )
    expected = actor_critic(model)(batch.copy())["log_prob"]
    given = batch.copy()
    given["positions"] = positions.movedim(0, 1)
    network = actor_critic(model, position_ids="positions")
    assert_close(network(given.copy())["log_prob"], expected)
    counted = (attention.cumsum(1) - 1).clamp_min(0)
    for other in (counted, counted.unsqueeze(1).expand(-1, 3, -1)):
        given["positions"] = other
        assert (network(given.copy())["log_prob"] - expected).abs().max() > 1e-3


@torch.no_grad()
def test_minibatches_take_their_own_images(model):
    batch = rollout(model)
    network = actor_critic(model)
    whole = network(batch.copy())["log_prob"]
    order = torch.tensor([3, 1, 0, 2])
    pieces = torch.cat([network(batch[rows].copy())["log_prob"] for rows in order.split(2)])
    assert_close(pieces, whole[order], rtol=1e-5, atol=1e-5)


def test_a_loss_reaches_the_eyes(model):
    batch = rollout(model)
    network = actor_critic(model)
    with torch.no_grad():
        scored = network(batch.copy())
    batch["old_log_prob"] = scored["log_prob"]
    batch["advantage"] = torch.ones(4, 6, 1)
    batch["value_target"] = torch.zeros(4, 6, 1)
    losses = PPOLoss(network)(batch)
    assert losses["ratio_max"] == 1
    total_loss(losses).backward()
    assert model.model.visual.patch_embed.proj.weight.grad.any()


@torch.no_grad()
def test_the_types_of_the_tokens_may_be_given(model):
    batch = rollout(model)
    expected = actor_critic(model)(batch.copy())["log_prob"]
    batch["types"] = types(batch["tokens", "prompt"])
    network = actor_critic(model, mm_token_type_ids="types")
    assert_close(network(batch.copy())["log_prob"], expected, rtol=0, atol=0)
    batch["types"] = torch.zeros(4, 20, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"shape of the prompt's tokens \(4, 14\), got \(4, 20\)"):
        network(batch)


def test_text_alone_counts_its_tokens(model):
    """A minibatch without images, and a network that is told of none."""
    batch = rollout(model)
    expected = own_log_probs(model, 2, answer(batch, 2))
    networks = CausalLMActorCritic(model, SoftMinCritic(16)), actor_critic(model)
    told, not_told = (network(batch[2:3].copy())["log_prob"] for network in networks)
    assert_close(told[0, : len(expected)], expected, rtol=1e-5, atol=1e-5)
    assert_close(told, not_told, rtol=0, atol=0)


def test_a_model_that_makes_no_positions_is_refused():
    config = llama_config(VOCABULARY)
    config.rope_parameters = {**config.rope_parameters, "mrope_section": [1, 1, 2]}
    model = LlamaForCausalLM(config)
    message = "a LlamaForCausalLM, whose positions of images have three dimensions.*position_ids"
    with pytest.raises(ValueError, match=message):
        CausalLMActorCritic(model, SoftMinCritic(16), model_inputs=INPUTS)
    CausalLMActorCritic(model, SoftMinCritic(16))
    given = {**INPUTS, "position_ids": "positions"}
    CausalLMActorCritic(model, SoftMinCritic(16), model_inputs=given)


def test_bad_images_are_named():
    ids = torch.zeros(2, 3, dtype=torch.int64)
    sizes = torch.tensor([[1, 2, 2], [1, 2, 4]])
    given = {"pixel_values": torch.zeros(2, 6, 1), "image_grid_thw": sizes}
    with pytest.raises(ValueError, match=r"'pixel_values' must have the patches.*\[4, 8\].*got 6"):
        as_the_model_takes_them(None, given, ids, ids)
    given["pixel_values"] = torch.zeros(12, 1)
    with pytest.raises(
        ValueError, match=r"'pixel_values' \[B, N, D\], got \(2, 1, 3\) and \(12, 1\)"
    ):
        as_the_model_takes_them(None, given, ids, ids)
    with pytest.raises(ValueError, match="must name mm_token_type_ids where it names videos"):
        as_the_model_takes_them(None, {"video_grid_thw": sizes}, ids, ids)
