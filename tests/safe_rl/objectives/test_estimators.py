"""Advantages that an objective makes itself, as TorchRL's PPO does, where the batch has none."""

import copy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.testing import assert_close
from torchrl.objectives import ClipPPOLoss, SoftUpdate, ValueEstimators
from torchrl.objectives.value import GAE
from transformers import LlamaForCausalLM

from safe_ops import soft_min
from safe_rl import (
    ActorCritic,
    CausalLMActorCritic,
    GatedKLLoss,
    PPOLoss,
    SAFELoss,
    SoftMinCritic,
    SoftMinGAE,
    SoftMinValueLoss,
    total_loss,
)
from safe_rl.rollouts import place_score
from tests.reference.gae_loop import gae_loop
from tests.safe_rl.test_actor_critic import discrete
from tests.safe_rl.test_advantages import observed
from tests.safe_rl.test_causal_lm import rollout
from tests.tiny_models import llama_config

DISCOUNT = {"gamma": 0.9, "lmbda": 0.8, "average_gae": False}
either_way = pytest.mark.parametrize("functional", [False, True])


def networks(heads: int = 2, key: str = "state_values") -> tuple[nn.Module, TensorDictModule]:
    torch.manual_seed(0)
    return discrete(), TensorDictModule(nn.Linear(3, heads), ["observation"], [key])


def frames() -> TensorDict:
    """[2, 6] steps as a collector gives them, with actions: no values and no advantages."""
    actor, _ = networks()
    torch.manual_seed(1)
    with torch.no_grad():
        batch = actor(observed())
    batch["old_log_prob"] = batch["action_log_prob"] - 0.1
    return batch


def by_hand(batch: TensorDict, states: nn.Module, following: nn.Module) -> TensorDict:
    """``batch`` with the advantages of the slow recursion, from soft-mins of two sets of heads."""
    with torch.no_grad():
        value = soft_min(states(batch["observation"]), 0.3)
        after = soft_min(following(batch["next", "observation"]), 0.3)
    expected = batch.copy()
    advantage, target = gae_loop(
        batch["next", "reward"].squeeze(-1),
        value,
        mask=torch.ones(2, 6, dtype=torch.bool),
        terminated=batch["next", "terminated"].squeeze(-1),
        truncated=batch["next", "truncated"].squeeze(-1),
        next_value=after,
        discount=0.9,
        gae_lambda=0.8,
    )
    expected["advantage"], expected["value_target"] = advantage.float(), target.float()
    return expected


# --- an actor and a critic of TorchRL -----------------------------------------------------------


@either_way
def test_what_torchrls_loss_makes_of_the_same_batch(functional):
    actor, critic = networks(heads=1)
    theirs = ClipPPOLoss(
        copy.deepcopy(actor),
        TensorDictModule(copy.deepcopy(critic.module), ["observation"], ["state_value"]),
        entropy_coeff=0.01,
        critic_coeff=0.5,
        loss_critic_type="smooth_l1",
    )
    theirs.make_value_estimator(ValueEstimators.GAE, **DISCOUNT)
    theirs.set_keys(sample_log_prob="old_log_prob")
    ours = PPOLoss(ActorCritic(actor, critic), huber_delta=1.0, functional=functional)
    ours.make_value_estimator(ValueEstimators.GAE, **DISCOUNT)
    expected, found = theirs(frames()), ours(frames())
    for mine, name in (("loss_policy", "loss_objective"), ("loss_value", "loss_critic")):
        assert_close(found[mine], expected[name], msg=mine)
    total_loss(found).backward()
    sum(v for k, v in expected.items() if k.startswith("loss_")).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    (critics,) = [g for name, g in gradients.items() if name.endswith("critic.module.weight")]
    assert_close(critics, theirs.critic_network_params["module", "weight"].grad)


@either_way
def test_the_estimator_can_be_called(functional):
    actor, critic = networks()
    loss = SAFELoss(ActorCritic(actor, critic), functional=functional)
    loss.make_value_estimator(**DISCOUNT)
    expected = by_hand(frames(), critic.module, critic.module)
    for params in (None, loss.critic_params):
        found = loss.value_estimator(frames(), params=params)
        assert_close(found["advantage"].squeeze(-1), expected["advantage"])
        assert_close(found["value_target"].squeeze(-1), expected["value_target"])


@either_way
def test_a_delayed_critic_values_what_follows(functional):
    actor, critic = networks()
    loss = PPOLoss(ActorCritic(actor, critic), functional=functional, delay_value=True)
    loss.make_value_estimator(**DISCOUNT)
    target = copy.deepcopy(critic.module)
    updater = SoftUpdate(loss, tau=0.25)
    with torch.no_grad():
        for parameter in loss.critic_params.values(True, True):
            parameter.add_(1.0)
        # What the module holds too, though with `functional` it need not.
        moved = copy.deepcopy(target)
        for parameter in moved.parameters():
            parameter.add_(1.0)
        for parameter in target.parameters():
            parameter.add_(0.25)
    updater.step()
    expected = by_hand(frames(), moved, target)
    given = PPOLoss(ActorCritic(actor, critic), functional=functional)(expected)
    assert_close(loss(frames()).to_dict(), given.to_dict())
    called = loss.value_estimator(
        frames(), params=loss.critic_params.detach(), target_params=loss.target_critic_params
    )
    assert_close(called["advantage"].squeeze(-1), expected["advantage"])
    # The targets are still no parameters: an updater may be made afterwards.
    for tensor in loss.target_critic_params.values(True, True):
        assert not tensor.requires_grad
    SoftUpdate(loss, tau=0.25).step()
    # Not what the critic alone would say of it.
    alone = by_hand(frames(), moved, moved)
    assert not torch.allclose(alone["advantage"], expected["advantage"], atol=0.05)


def test_a_functional_loss_values_with_the_parameters_that_it_holds():
    actor, critic = networks()
    loss = PPOLoss(ActorCritic(actor, critic), functional=True).make_value_estimator(**DISCOUNT)
    expected = loss(frames())
    critic.module.weight = nn.Parameter(torch.zeros_like(critic.module.weight))
    assert_close(loss(frames()).to_dict(), expected.to_dict())


@either_way
def test_no_gradient_goes_through_the_advantage(functional):
    actor, critic = networks()
    loss = PPOLoss(ActorCritic(actor, critic), functional=functional)
    loss.make_value_estimator(**DISCOUNT)
    loss(frames())["loss_policy"].backward()
    gradients = {name: p.grad for name, p in loss.named_parameters()}
    assert all((g is None) == ("critic" in name) for name, g in gradients.items())


def test_what_is_read_is_enough():
    loss = PPOLoss(ActorCritic(*networks()))
    assert ("next", "reward") not in loss.in_keys
    loss.make_value_estimator(**DISCOUNT)
    expected = loss(frames())
    assert len(loss.in_keys) == len(set(loss.in_keys))
    read = frames().select(*loss.in_keys, strict=False)
    assert_close(loss(read).to_dict(), expected.to_dict())
    arguments = {
        key if isinstance(key, str) else "_".join(key): read[key]
        for key in loss.in_keys
        if read.get(key, None) is not None
    }
    for value, key in zip(loss(**arguments), loss.out_keys, strict=True):
        assert_close(value, expected[key])


def test_the_batch_is_left_alone_and_its_advantages_are_taken():
    loss = PPOLoss(ActorCritic(*networks()))
    loss.make_value_estimator(**DISCOUNT)
    batch = frames()
    keys = set(batch.keys(True, True))
    made = loss(batch)
    assert set(batch.keys(True, True)) == keys
    batch["advantage"], batch["value_target"] = torch.ones(2, 6, 1), torch.zeros(2, 6, 1)
    expected = PPOLoss(loss.network)(batch)
    assert_close(loss(batch).to_dict(), expected.to_dict())
    assert not torch.allclose(made["loss_policy"], expected["loss_policy"])


def test_without_an_estimator_the_advantage_must_be_there():
    with pytest.raises(ValueError, match="batch must hold 'advantage'"):
        PPOLoss(ActorCritic(*networks()))(frames())


def test_a_value_loss_alone_makes_its_target():
    actor, critic = networks()
    loss = SoftMinValueLoss(ActorCritic(actor, critic))
    loss.make_value_estimator(**DISCOUNT)
    expected = SoftMinValueLoss(loss.network)(by_hand(frames(), critic.module, critic.module))
    assert_close(loss(frames()).to_dict(), expected.to_dict())


def test_a_loss_without_advantages_asks_for_nothing_more():
    loss = GatedKLLoss(ActorCritic(*networks()))
    before = list(loss.in_keys)
    assert loss.make_value_estimator(**DISCOUNT).in_keys == before


def test_steps_that_the_estimator_leaves_out_are_left_out():
    """``shifted`` does not see the state after a truncation inside a row."""
    loss = PPOLoss(ActorCritic(*networks()), reduction="none")
    loss.make_value_estimator(shifted=True, **DISCOUNT)
    losses = loss(frames())
    assert (losses["loss_value"] != 0).tolist() == [
        [True, True, True, True, False, True],
        [True, False, True, True, True, True],
    ]


def test_an_estimator_of_ones_own():
    actor, critic = networks(heads=1, key="state_value")
    loss = PPOLoss(ActorCritic(actor, critic))
    loss.set_keys(state_values="state_value")
    loss.make_value_estimator(GAE(gamma=0.9, lmbda=0.8, value_network=critic, time_dim=1))
    assert ("next", "reward") in loss.in_keys
    expected = by_hand(frames(), critic.module, critic.module)
    by_keys = PPOLoss(loss.network)
    by_keys.set_keys(state_values="state_value")
    assert_close(loss(frames()).to_dict(), by_keys(expected).to_dict())


def test_the_class_makes_the_estimator_over_the_critic():
    loss = PPOLoss(ActorCritic(*networks())).make_value_estimator(SoftMinGAE, discount=0.5)
    assert loss.value_estimator.value_network is loss.critic_network
    assert loss.value_estimator.discount == 0.5


def test_an_estimator_that_is_given_follows_the_keys_of_the_loss():
    actor, critic = networks()
    made = PPOLoss(ActorCritic(actor, critic))
    made.set_keys(advantage="A")
    given = copy.deepcopy(made)
    made.make_value_estimator(SoftMinGAE, value_network=critic)
    given.make_value_estimator(SoftMinGAE(value_network=critic, discount=0.99, gae_lambda=0.95))
    assert given.value_estimator.tensor_keys.advantage == "A"
    assert_close(given(frames()).to_dict(), made(frames()).to_dict())


@either_way
def test_a_copy_makes_the_same(functional):
    loss = PPOLoss(ActorCritic(*networks()), functional=functional, delay_value=True)
    loss.make_value_estimator(**DISCOUNT)
    SoftUpdate(loss, tau=0.5)
    twin = copy.deepcopy(loss)
    assert twin.value_estimator.value_network is twin.critic_network
    assert_close(twin(frames()).to_dict(), loss(frames()).to_dict())


def test_errors():
    loss = PPOLoss(ActorCritic(*networks()))
    with pytest.raises(TypeError, match="give discount or gamma"):
        loss.make_value_estimator(gamma=0.9, discount=0.9)
    message = "value_network must be a TensorDict module.*got Linear"
    with pytest.raises(ValueError, match=message):
        SoftMinGAE(value_network=nn.Linear(3, 1))


# --- a language model, whose critic reads hidden states -----------------------------------------


def language_network() -> CausalLMActorCritic:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(20)).eval()
    return CausalLMActorCritic(model, SoftMinCritic(16))


def responses() -> TensorDict:
    """Scored responses: no values and no advantages."""
    batch = place_score(rollout(), torch.tensor([1.0, -1.0, 0.5, 2.0]))
    batch["old_log_prob"] = -2.5 - torch.arange(6) / 7 * torch.ones(4, 1)
    return batch


def estimated(batch: TensorDict, network: CausalLMActorCritic, critic: nn.Module) -> TensorDict:
    """``batch`` with the advantages of the slow recursion, from the values of that critic."""
    with torch.no_grad():
        states = network.response_states(batch)[:, :-1]
        value = soft_min(critic(states), 0.3)
    expected = batch.copy()
    expected["advantage"], expected["value_target"] = (
        x.float()
        for x in gae_loop(
            batch["reward"].squeeze(-1),
            value,
            mask=batch["response_mask"],
            terminated=batch["terminated"].squeeze(-1),
            discount=0.9,
            gae_lambda=0.8,
        )
    )
    return expected


@either_way
def test_values_of_a_language_model_are_read_from_the_batch(functional):
    network = language_network()
    loss = PPOLoss(network, functional=functional).make_value_estimator(**DISCOUNT)
    assert loss.value_estimator.value_network is None
    assert {"reward", "terminated", "truncated"} <= set(loss.in_keys)
    expected = estimated(responses(), network, network.critic)
    with torch.no_grad():
        stored = network(responses()).select("state_values", "bootstrap_values")
    batch = responses().update(stored)
    found = loss.value_estimator(batch.copy())
    assert_close(found["advantage"].squeeze(-1), expected["advantage"])
    assert_close(found["value_target"].squeeze(-1), expected["value_target"])
    assert_close(loss(batch).to_dict(), PPOLoss(network)(expected).to_dict())
    # They are the rollout's, though the critic has moved.
    with torch.no_grad():
        for parameter in loss.critic_params.values(True, True):
            parameter.add_(1.0)
    assert_close(loss(batch)["loss_policy"], PPOLoss(network)(expected)["loss_policy"])


@either_way
@pytest.mark.parametrize("delay", [False, True])
def test_values_of_a_language_model_that_are_not_there_are_made(functional, delay):
    network = language_network()
    loss = PPOLoss(network, functional=functional, delay_value=delay)
    loss.make_value_estimator(**DISCOUNT)
    critic = copy.deepcopy(network.critic)
    if delay:
        updater = SoftUpdate(loss, tau=0.25)
        with torch.no_grad():
            for parameter in loss.critic_params.values(True, True):
                parameter.add_(1.0)
            for parameter in critic.parameters():
                parameter.add_(0.25)
        updater.step()
    expected = estimated(responses(), network, critic)
    found = loss(responses())
    assert_close(found.to_dict(), PPOLoss(network)(expected).to_dict(), rtol=1e-4, atol=1e-5)
    total_loss(found).backward()
    assert all(p.grad is not None for p in loss.critic_params.values(True, True))
