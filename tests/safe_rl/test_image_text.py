"""A model that reads an image and a prompt: scored as its own forward scores, and updated once."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tensordict import TensorDict
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

from safe_ops.controllers import EntropyGatedKL
from safe_rl import (
    CausalLMActorCritic,
    ControllerModule,
    KLBaseline,
    PolicyMeasurements,
    SAFELoss,
    SoftMinCritic,
    SoftMinGAE,
    total_loss,
)
from safe_rl.rollouts import left_pad, minibatches, pack_rollout, place_score
from tests.tiny_models import llama_config

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

VOCABULARY, EOS, IMAGE = 20, 1, 19
PROMPTS = [[IMAGE] * 5 + [5, 6, 7], [IMAGE] * 5 + [8], [IMAGE] * 5 + [9, 4], [IMAGE] * 5 + [3, 3]]
INPUTS = {"pixel_values": "pixel_values"}


@pytest.fixture
def policy() -> PeftModel:
    """Two layers over images of 2 x 2 patches and a class token; its adapters act already."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=llama_config(VOCABULARY),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = LlavaForConditionalGeneration(config)
    adapters = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    peft_model = get_peft_model(model, adapters).eval()
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return peft_model


def actor_critic(policy: PeftModel) -> CausalLMActorCritic:
    torch.manual_seed(1)
    return CausalLMActorCritic(policy.get_base_model(), SoftMinCritic(16), model_inputs=INPUTS)


def rollout(policy: PeftModel) -> TensorDict:
    """Images, and responses that the model itself has drawn to them and their prompts."""
    torch.manual_seed(2)
    images = torch.randn(4, 3, 8, 8)
    prompt, prompt_mask = left_pad(PROMPTS, width=10, pad_id=EOS)
    tokens = policy.generate(
        input_ids=prompt,
        attention_mask=prompt_mask.long(),
        pixel_values=images,
        do_sample=True,
        max_new_tokens=6,
        pad_token_id=EOS,
        # A response with an image's token would need an image more.
        suppress_tokens=[IMAGE],
    )
    response = tokens[:, prompt.shape[1] :]
    batch = pack_rollout(prompt, prompt_mask, response, torch.tensor([EOS]), width=6, pad_id=EOS)
    batch["pixel_values"] = images
    return batch


@torch.no_grad()
def test_scores_are_those_of_the_models_own_forward(policy):
    network, batch = actor_critic(policy), rollout(policy)
    assert "pixel_values" in network.in_keys
    network(batch)
    for row, prompt in enumerate(PROMPTS):
        length = int(batch["response_mask"][row].sum())
        tokens = torch.tensor([prompt + batch["tokens", "response"][row, :length].tolist()])
        logits = policy(input_ids=tokens, pixel_values=batch["pixel_values"][row : row + 1]).logits
        expected = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = expected.gather(1, tokens[0, len(prompt) :].unsqueeze(1)).squeeze(1)
        assert_close(batch["log_prob"][row, :length], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_image_counts_and_must_be_there(policy):
    network, batch = actor_critic(policy), rollout(policy)
    before = network(batch.copy())["log_prob"]
    batch["pixel_values"] = batch["pixel_values"].flip(0)
    assert ((network(batch.copy())["log_prob"] - before).abs() > 1e-4).any(1).all()
    del batch["pixel_values"]
    with pytest.raises(ValueError, match="must hold 'pixel_values'"):
        network(batch)


def test_positions_of_its_own_take_the_place_of_ours(policy):
    inputs = {**INPUTS, "position_ids": "positions"}
    own = CausalLMActorCritic(policy.get_base_model(), SoftMinCritic(16), model_inputs=inputs)
    batch = rollout(policy)
    mask = torch.cat([batch["prompt_mask"], batch["response_mask"]], 1)
    batch["positions"] = (mask.cumsum(1) - 1).clamp_min(0)
    expected = actor_critic(policy)(batch.copy())["log_prob"]
    assert torch.equal(own(batch.copy())["log_prob"], expected)
    batch["positions"] = batch["positions"] * 3
    assert not torch.allclose(own(batch)["log_prob"], expected)


def test_one_whole_update(policy):
    network = actor_critic(policy)
    batch = rollout(policy)
    lengths = batch["response_mask"].sum(1)
    place_score(batch, lengths / 6)
    with torch.no_grad():
        scored = network(batch.copy())
        with policy.disable_adapter():
            reference = network(batch.copy())
    for key in ("entropy", "state_values", "bootstrap_values"):
        batch[key] = scored[key]
    batch["old_log_prob"], batch["ref_log_prob"] = scored["log_prob"], reference["log_prob"]
    law = EntropyGatedKL(threshold=0.01, threshold_lower=0.01, coef=1.0)
    batch = KLBaseline()(ControllerModule(law)(PolicyMeasurements()(batch)))
    batch = SoftMinGAE(average_gae=True)(batch)
    loss = SAFELoss(network)
    trained = [p for p in network.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    ratios: list[Tensor] = []
    for piece in minibatches(batch, size=2, generator=torch.Generator().manual_seed(0)):
        losses = loss(piece)
        ratios.append(losses["ratio_max"])
        optimizer.zero_grad()
        total_loss(losses).backward()
        optimizer.step()
    # Five places an image: two are no whole tiles of a product, which some CPUs round apart.
    assert ratios[0].item() == pytest.approx(1, abs=1e-5)
    assert all((p != b).any() for p, b in zip(trained, before, strict=True))
    after = network(batch.copy()).detach()
    assert after["log_prob"].isfinite().all()
    assert not torch.allclose(after["log_prob"], batch["old_log_prob"])
