"""One forward against a plain one on the unpadded sequence, on a small real Llama."""

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tensordict import TensorDict
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    LlamaModel,
)

from safe_ops import token_log_probs
from safe_rl import CausalLMActorCritic, PPOLoss, Scores, SoftMinCritic, total_loss
from safe_rl.objectives import SAFELoss
from safe_rl.rollouts import left_pad, pack_rollout
from tests.tiny_models import llama_config

pytestmark = [
    # transformers warns of its own renaming when peft wraps a model.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]

VOCABULARY, EOS = 20, 1
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [4, 4]]
RESPONSES = [[3, 4, 5, 1, 1, 1], [6, 7, 8, 9, 10, 11], [1, 1, 1, 1, 1, 1], [12, 1, 1, 1, 1, 1]]
LENGTHS = [4, 6, 1, 2]


def rollout(
    prompts: list[list[int]] = PROMPTS,
    responses: list[list[int]] = RESPONSES,
    *,
    prompt_width: int = 10,
    width: int = 6,
) -> TensorDict:
    """Prompt and response fill 16 places, a whole number of tiles of a matrix product."""
    return pack_rollout(
        *left_pad(prompts, width=prompt_width, pad_id=EOS),
        torch.tensor(responses),
        torch.tensor([EOS]),
        width=width,
        pad_id=EOS,
    )


@pytest.fixture
def network() -> CausalLMActorCritic:
    torch.manual_seed(0)
    language_model = LlamaForCausalLM(llama_config(VOCABULARY)).eval()
    return CausalLMActorCritic(language_model, SoftMinCritic(16))


@pytest.fixture
def adapted() -> tuple[PeftModel, CausalLMActorCritic]:
    """Adapters that already act: peft starts them at no effect."""
    torch.manual_seed(0)
    language_model = LlamaForCausalLM(llama_config(VOCABULARY))
    settings = LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    peft_model = get_peft_model(language_model, settings).eval()
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return peft_model, CausalLMActorCritic(peft_model.get_base_model(), SoftMinCritic(16))


def plain(network: CausalLMActorCritic, row: int, temperature: float = 1.0) -> dict[str, Tensor]:
    """The same of one row from transformers' own forward: no padding, no mask, no positions."""
    model = network.language_model
    tokens = PROMPTS[row] + RESPONSES[row][: LENGTHS[row]]
    output = model(torch.tensor([tokens]), output_hidden_states=True)
    first = len(PROMPTS[row]) - 1
    distribution = torch.distributions.Categorical(logits=output.logits[0, first:-1] / temperature)
    values = network.critic(output.hidden_states[-1][0, first:])
    return {
        "log_prob": distribution.log_prob(torch.tensor(tokens[first + 1 :])),
        "entropy": distribution.entropy(),
        "state_values": values[:-1],
        "bootstrap_values": values[-1],
    }


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@torch.no_grad()
def test_against_a_forward_on_the_unpadded_sequence(network, temperature):
    network.temperature = temperature
    batch = network(rollout())
    assert batch["log_prob"].shape == batch["entropy"].shape == (4, 6)
    assert batch["state_values"].shape == (4, 6, 2)
    assert batch["bootstrap_values"].shape == (4, 2)
    for row, length in enumerate(LENGTHS):
        for key, expected in plain(network, row, temperature).items():
            found = batch[row][key]
            found = found if key == "bootstrap_values" else found[:length]
            assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_value_belongs_to_the_state_before_the_token(network):
    before = network(rollout())
    for t in range(6):
        changed = rollout()
        changed["tokens", "response"][1, t] = 17
        after = network(changed)
        moved = (after["state_values"] - before["state_values"]).abs().amax((0, 2))
        assert not moved[: t + 1].any()
        assert (moved[t + 1 :] > 0).all()
        assert (after["bootstrap_values"][1] != before["bootstrap_values"][1]).all()
        assert (after["bootstrap_values"][0] == before["bootstrap_values"][0]).all()


@torch.no_grad()
def test_the_bootstrap_value_follows_the_last_valid_token(network):
    """It is what a longer response would have as the value of its next token."""
    batch = network(rollout())
    longer = [row[:n] + [5] * (6 - n) for row, n in zip(RESPONSES, LENGTHS, strict=True)]
    packed = rollout(responses=longer)
    packed["tokens", "response"] = torch.tensor(longer)
    packed["response_mask"] = torch.ones(4, 6).bool()
    for row, length in enumerate(LENGTHS):
        if length < 6:
            expected = network(packed)["state_values"][row, length]
            assert_close(batch["bootstrap_values"][row], expected, rtol=0, atol=2e-6)


@torch.no_grad()
def test_what_stands_in_the_padding_does_not_matter(network):
    clean, dirty = rollout(), rollout()
    dirty["tokens", "prompt"][~dirty["prompt_mask"]] = 7
    dirty["tokens", "response"][~dirty["response_mask"]] = 9
    mask = clean["response_mask"]
    network(clean), network(dirty)
    for key in ("log_prob", "entropy", "state_values"):
        assert_close(dirty[key][mask], clean[key][mask], rtol=0, atol=0)
    assert_close(dirty["bootstrap_values"], clean["bootstrap_values"], rtol=0, atol=0)


@torch.no_grad()
def test_half_precision_gives_float32(network):
    network.language_model.to(torch.bfloat16)
    batch = network(rollout())
    assert {batch[key].dtype for key in network.out_keys} == {torch.float32}


class OwnHead(nn.Linear):
    """A head with a forward of its own, as adapted and quantised ones have."""


def test_any_other_head_gives_the_same_and_is_called(network):
    head = network.language_model.lm_head
    other = OwnHead(head.in_features, head.out_features, bias=False)
    other.weight = head.weight
    called = []
    other.register_forward_hook(lambda *_: called.append(True))
    model = copy.deepcopy(network.language_model)
    model.lm_head = other
    mine, theirs = network(rollout()), CausalLMActorCritic(model, network.critic)(rollout())
    assert called
    for key in ("log_prob", "entropy"):
        assert_close(mine[key], theirs[key], rtol=0, atol=2e-6)
        assert not mine[key][~mine["response_mask"]].any()
        assert not theirs[key][~theirs["response_mask"]].any()
    (gradient,) = torch.autograd.grad(mine["log_prob"].sum() + mine["entropy"].sum(), head.weight)
    (expected,) = torch.autograd.grad(
        theirs["log_prob"].sum() + theirs["entropy"].sum(), other.weight
    )
    assert_close(gradient, expected, rtol=0, atol=1e-5)


# --- the ratio is 1 -----------------------------------------------------------------------------


def pieces_of(network: CausalLMActorCritic, batch: TensorDict, order: list[int], size: int):
    scored = [network(batch[rows]) for rows in torch.tensor(order).split(size)]
    return torch.cat(scored)[torch.tensor(order).argsort()]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]])
@torch.no_grad()
def test_the_ratio_is_exactly_one_over_minibatch_size_and_order(network, size, order):
    # Responses of 8: a product of a number of rows that 4 does not divide rounds some in another
    # way, and a piece of one row has as many rows in the head as its response has places.
    whole = network(rollout(prompt_width=8, width=8))
    pieces = pieces_of(network, rollout(prompt_width=8, width=8), order, size)
    ratio = (pieces["log_prob"] - whole["log_prob"]).exp()
    assert (ratio == 1).all()
    # The critic reads one place more of each response: no whole tiles, which some CPUs round apart.
    assert_close(pieces["state_values"], whole["state_values"], rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_ratio_is_exactly_one_over_right_padding(network):
    short = network(rollout())
    long = network(rollout(width=22))
    mask = short["response_mask"]
    assert (long["log_prob"][:, :6][mask] == short["log_prob"][mask]).all()


@pytest.mark.parametrize("prompt_width", [5, 7, 18, 26])
@torch.no_grad()
def test_another_left_padding_agrees_to_rounding(network, prompt_width):
    expected, found = network(rollout()), network(rollout(prompt_width=prompt_width))
    mask = expected["response_mask"]
    for key in ("log_prob", "entropy", "state_values"):
        assert_close(found[key][mask], expected[key][mask], rtol=0, atol=2e-6)


# --- gradients ----------------------------------------------------------------------------------


def test_the_critic_sends_no_gradient_into_the_policy(network):
    batch = network(rollout())
    (batch["state_values"].sum() + batch["bootstrap_values"].sum()).backward()
    assert all(p.grad is None for p in network.language_model.parameters())
    assert all(p.grad.any() for p in network.critic.parameters())


def test_the_policy_sends_no_gradient_into_the_critic(network):
    network(rollout())["log_prob"].sum().backward()
    assert all(p.grad is None for p in network.critic.parameters())
    assert all(p.grad.any() for p in network.language_model.parameters())


def test_every_adapter_gets_a_gradient_and_the_base_none(adapted):
    peft_model, network = adapted
    batch = rollout()
    generator = torch.Generator().manual_seed(0)
    scored = network(batch.clone()).detach()
    batch["old_log_prob"] = scored["log_prob"]
    batch["ref_log_prob"] = scored["log_prob"] - 0.1
    for key in ("advantage", "value_target"):
        batch[key] = torch.randn(4, 6, 1, generator=generator)
    batch["kl_coef"] = torch.ones(4)
    total_loss(SAFELoss(network)(batch)).backward()
    trained = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 3 * 2  # A and B, of three projections, in two layers
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    frozen = [p for p in peft_model.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen)


# --- adapters, state ----------------------------------------------------------------------------


@torch.no_grad()
def test_the_reference_is_the_model_with_its_adapters_off(adapted):
    peft_model, network = adapted
    torch.manual_seed(0)
    base = CausalLMActorCritic(LlamaForCausalLM(llama_config(VOCABULARY)).eval(), network.critic)
    on = network(rollout())
    with peft_model.disable_adapter():
        off = network(rollout())
    again = network(rollout())
    assert (off["log_prob"] == base(rollout())["log_prob"]).all()
    assert (on["log_prob"] == again["log_prob"]).all()
    assert (on["log_prob"] - off["log_prob"]).abs().max() > 1e-3


def test_the_language_model_is_held_once(network):
    state = network.state_dict()
    names = [*network.language_model.state_dict()]
    critic = [*network.critic.state_dict()]
    assert sorted(state) == sorted(
        [f"language_model.{n}" for n in names] + [f"critic.{n}" for n in critic]
    )
    parameters = list(network.parameters())
    assert len(parameters) == len(set(parameters)) == len(list(network.parameters()))
    assert len({name.split(".")[0] for name, _ in network.named_parameters()}) == 2


@torch.no_grad()
def test_a_copy_is_independent(network):
    other = copy.deepcopy(network)
    expected = network(rollout())["log_prob"]
    other.language_model.lm_head.weight.zero_()
    other.language_model.model.norm.weight.fill_(2.0)
    assert (network(rollout())["log_prob"] == expected).all()
    batch = other(rollout())
    uniform = -torch.tensor(float(VOCABULARY)).log() * batch["response_mask"]
    assert_close(batch["log_prob"], uniform)


# --- errors -------------------------------------------------------------------------------------


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(llama_config(VOCABULARY))


def adapted_llama() -> PeftModel:
    return get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Linear(2, 2), "must name its backbone in base_model_prefix.*got Linear"),
        (lambda: LlamaModel(llama_config(VOCABULARY)), "base_model_prefix.*got LlamaModel"),
        (adapted_llama, r"is a PeftModel: give its get_base_model\(\)"),
    ],
)
def test_what_is_no_causal_language_model_is_named(model: Callable[[], nn.Module], message: str):
    with pytest.raises(ValueError, match=message):
        CausalLMActorCritic(model(), SoftMinCritic(16))


def test_a_model_without_a_head_is_named():
    model = llama()
    model.lm_head = None
    with pytest.raises(ValueError, match="must have a head, got LlamaForCausalLM"):
        CausalLMActorCritic(model, SoftMinCritic(16))


SIZES = {
    **{"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16},
    **{"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
    "pad_token_id": 0,
}


def test_a_model_that_changes_the_logits_of_its_head_is_refused():
    torch.manual_seed(0)
    language_model = CohereForCausalLM(CohereConfig(logit_scale=0.3, **SIZES)).train()
    language_model.config.logit_scale = 0.4
    with pytest.raises(ValueError, match="logits of its head, got a CohereForCausalLM"):
        CausalLMActorCritic(language_model, SoftMinCritic(16))
    assert all(module.training for module in language_model.modules())


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (CohereForCausalLM, CohereConfig(logit_scale=0.3, **SIZES)),
        (GraniteForCausalLM, GraniteConfig(logits_scaling=0.2, **SIZES)),
        (Gemma2ForCausalLM, Gemma2Config(head_dim=8, final_logit_softcapping=0.05, **SIZES)),
    ],
)
def test_logits_that_are_scaled_or_capped_are_scored_as_they_are_sampled(model, config):
    torch.manual_seed(0)
    language_model = model(config).eval()
    batch = rollout()
    network = CausalLMActorCritic(language_model, SoftMinCritic(16), temperature=0.7)
    scored = network(batch)
    tokens = torch.cat((batch["tokens", "prompt"], batch["tokens", "response"]), 1)
    mask = torch.cat((batch["prompt_mask"], batch["response_mask"]), 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = language_model(tokens, attention_mask=mask, position_ids=positions).logits
    response = batch["tokens", "response"]
    logits = logits[:, -response.shape[1] - 1 : -1]
    expected = token_log_probs(logits, response, temperature=0.7)
    counts = batch["response_mask"]
    torch.testing.assert_close(scored["log_prob"][counts], expected.log_prob[counts])
    torch.testing.assert_close(scored["entropy"][counts], expected.entropy[counts])
    network._scale, network._cap = 1.0, None
    plain = network(batch.exclude("log_prob"))["log_prob"]
    assert (plain - expected.log_prob)[counts].abs().max() > 1e-3


def test_on_the_meta_device_the_head_is_not_looked_at():
    with torch.device("meta"):
        model = Gemma2ForCausalLM(Gemma2Config(head_dim=8, **SIZES))
    CausalLMActorCritic(model, SoftMinCritic(16))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match=f"temperature must be positive, got {temperature}"):
        CausalLMActorCritic(llama(), SoftMinCritic(16), temperature=temperature)


def without_prompt(batch: TensorDict) -> None:
    batch["tokens", "prompt"] = torch.zeros(4, 0, dtype=torch.int64)
    batch["prompt_mask"] = torch.zeros(4, 0, dtype=torch.bool)


def short_mask(batch: TensorDict) -> None:
    batch["response_mask"] = torch.ones(4, 5).bool()


def float_mask(batch: TensorDict) -> None:
    batch["prompt_mask"] = batch["prompt_mask"].float()


def no_response(batch: TensorDict) -> None:
    del batch["tokens", "response"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_prompt, r"'prompt'\) must have at least one token a row, got \(4, 0\)"),
        (short_mask, r"'response_mask' must be bool .* \(4, 6\), got torch.bool \(4, 5\)"),
        (float_mask, r"'prompt_mask' must be bool .* \(4, 10\), got torch.float32 \(4, 10\)"),
        (no_response, r"must hold \('tokens', 'response'\), got"),
    ],
)
def test_a_bad_batch_is_named(network, spoil: Callable[[TensorDict], None], message: str):
    batch = rollout()
    spoil(batch)
    with pytest.raises(ValueError, match=message):
        network(batch)


# --- keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("functional", [False, True])
def test_the_network_reads_the_mask_that_the_loss_reads(network, functional):
    batch = rollout()
    batch["old_log_prob"] = -2 - torch.arange(6) / 7 * torch.ones(4, 1)
    batch["advantage"], batch["value_target"] = torch.ones(4, 6, 1), torch.zeros(4, 6, 1)
    expected = PPOLoss(network)(batch)
    loss = PPOLoss(network, functional=functional)
    loss.set_keys(response_mask=("masks", "response"))
    moved = batch.rename_key_("response_mask", ("masks", "response"))
    assert_close(loss(moved).to_dict(), expected.to_dict())
    assert ("masks", "response") in loss.in_keys
    assert "response_mask" not in loss.in_keys
    assert loss.in_keys.count(("masks", "response")) == 1
    read = moved.select(*loss.in_keys, strict=False)
    assert_close(loss(read).to_dict(), expected.to_dict())
    loss.set_keys(response_mask=None)
    assert "response_mask" in network.in_keys
    with pytest.raises(ValueError, match="'response_mask'"):
        loss(moved)


def test_scores_of_a_network_follow_its_mask(network):
    scores = Scores(network, {"log_prob": "old_log_prob"})
    expected = scores(rollout())["old_log_prob"]
    network.set_keys(response_mask="counts")
    assert "counts" in scores.in_keys
    moved = rollout().rename_key_("response_mask", "counts")
    assert_close(scores(moved)["old_log_prob"], expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="must hold 'counts'"):
        network(rollout())
    with pytest.raises(ValueError, match="mask is not an accepted"):
        network.set_keys(mask="x")
