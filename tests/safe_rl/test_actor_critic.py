"""TorchRL's actors and critics under our objectives, next to TorchRL's own loss."""

import copy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    CompositeDistribution,
    NormalParamExtractor,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    set_composite_lp_aggregate,
)
from torch import nn
from torch.distributions import Categorical, Normal
from torch.testing import assert_close
from torchrl.modules import IndependentNormal, OneHotCategorical, ProbabilisticActor, TanhNormal
from torchrl.objectives import ClipPPOLoss, SoftUpdate

from safe_rl import (
    ActorCritic,
    ClippedPolicyLoss,
    PPOLoss,
    SAFELoss,
    Scores,
    SoftMinValueLoss,
    total_loss,
)
from tests.safe_rl.objectives.test_every_objective import OBJECTIVES

FRAMES, OBSERVED = 12, 3


def discrete():
    net = TensorDictModule(nn.Linear(OBSERVED, 2), ["observation"], ["logits"])
    return ProbabilisticActor(
        net, ["logits"], distribution_class=OneHotCategorical, return_log_prob=True
    )


def continuous(kind=IndependentNormal):
    net = nn.Sequential(nn.Linear(OBSERVED, 4), NormalParamExtractor())
    return ProbabilisticActor(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        ["loc", "scale"],
        distribution_class=kind,
        return_log_prob=True,
    )


class Parameters(nn.Module):
    """Of a choice of three and of two independent torques."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(OBSERVED, 7)

    def forward(self, observation):
        logits, loc, scale = self.net(observation).split((3, 2, 2), -1)
        return logits, loc, scale.exp()


def composite():
    keys = [
        ("params", "choice", "logits"),
        ("params", "torque", "loc"),
        ("params", "torque", "scale"),
    ]
    return ProbabilisticTensorDictSequential(
        TensorDictModule(Parameters(), ["observation"], keys),
        ProbabilisticTensorDictModule(
            in_keys=["params"],
            out_keys=["choice", "torque"],
            distribution_class=CompositeDistribution,
            distribution_kwargs={"distribution_map": {"choice": Categorical, "torque": Normal}},
            return_log_prob=True,
        ),
    )


ACTORS = {"discrete": discrete, "continuous": continuous, "composite": composite}
every = pytest.mark.parametrize("make_actor", ACTORS.values(), ids=ACTORS)


@pytest.fixture(autouse=True, params=[False, True], ids=["apart", "added up"])
def _composite_log_prob(request):
    """TorchRL's global flag: a log-prob for each part of a composite, or one of all."""
    with set_composite_lp_aggregate(request.param):
        yield


def networks(make_actor, heads=2):
    torch.manual_seed(0)
    actor = make_actor().double()
    critic = nn.Linear(OBSERVED, heads).double()
    return actor, TensorDictModule(critic, ["observation"], ["state_values"])


def frames(actor) -> TensorDict:
    """Drawn by the actor, then scored with an actor that has moved a little."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch = TensorDict({"observation": normal(FRAMES, OBSERVED)}, [FRAMES])
    with torch.no_grad():
        batch = actor(batch)
        for parameter in actor.parameters():
            parameter.add_(0.2 * normal(*parameter.shape))
    batch["advantage"], batch["value_target"] = normal(FRAMES, 1), normal(FRAMES, 1)
    return batch


def log_prob_keys(batch):
    return [key for key in list(batch.keys()) if key.endswith("log_prob")]


def with_old_log_prob(batch):
    parts = [batch[key].flatten(1).sum(-1) if batch[key].ndim > 1 else batch[key]
             for key in log_prob_keys(batch)]  # fmt: skip
    return batch.copy().set("old_log_prob", sum(parts))


@every
def test_value_and_gradient_are_those_of_torchrls_loss(make_actor):
    # TorchRL's loss takes the log-prob of each part; ours is called as the flag is.
    with set_composite_lp_aggregate(False):
        actor, critic = networks(make_actor, heads=1)
        batch = frames(actor)
        theirs = ClipPPOLoss(
            copy.deepcopy(actor),
            TensorDictModule(copy.deepcopy(critic.module), ["observation"], ["state_value"]),
            clip_epsilon=0.2,
            entropy_coeff=0.03,
            critic_coeff=0.5,
            loss_critic_type="smooth_l1",
        )
        if make_actor is composite:
            theirs.set_keys(action=["choice", "torque"], sample_log_prob=log_prob_keys(batch))
        expected = theirs(batch)
    ours = PPOLoss(ActorCritic(actor, critic), entropy_coef=0.03, huber_delta=1.0)
    found = ours(with_old_log_prob(batch))
    for mine, name in (
        ("loss_policy", "loss_objective"),
        ("loss_entropy", "loss_entropy"),
        ("loss_value", "loss_critic"),
    ):
        assert_close(found[mine], expected[name].to(found[mine]).reshape(()), msg=mine)
    total = sum(value for key, value in found.items() if key.startswith("loss_"))
    total.backward()
    sum(v for k, v in expected.items() if k.startswith("loss_")).backward()
    params = list(theirs.actor_network_params.values(True, True))
    assert len(params) == len(list(actor.parameters()))
    for got, reference in zip(actor.parameters(), params, strict=True):
        assert got.grad.any()
        assert_close(got.grad, reference.grad)


def rows_of_steps(actor) -> TensorDict:
    """[2, 6], with what every objective reads beside the network's."""
    batch = with_old_log_prob(frames(actor)).reshape(2, 6)
    generator = torch.Generator().manual_seed(5)
    batch["ref_log_prob"] = batch["old_log_prob"] - torch.rand(2, 6, generator=generator).double()
    batch["old_state_values"] = torch.randn(2, 6, 2, generator=generator).double()
    for key, value in {"kl_coef": 0.7, "kl_threshold": 0.1, "entropy_gate": 1.5}.items():
        batch[key] = torch.full((2, 6), value, dtype=torch.float64)
    return batch


@every
@pytest.mark.parametrize("make", OBJECTIVES.values(), ids=OBJECTIVES)
def test_every_objective_takes_every_actor(make, make_actor):
    """The network in the loss gives what it writes into the batch gives, and a gradient."""
    actor, critic = networks(make_actor)
    network, batch = ActorCritic(actor, critic), rows_of_steps(actor)
    loss = make(network)
    losses = loss(batch)
    assert list(losses.keys()) == loss.out_keys
    assert_close(losses.to_dict(), make()(network(batch.copy())).to_dict(), rtol=0, atol=0)
    assert_close(loss(batch.select(*loss.in_keys, strict=False)).to_dict(), losses.to_dict())
    total_loss(losses).backward()
    for module, trained in ((actor, "log_prob"), (critic, "state_values")):
        moved = any(p.grad is not None and p.grad.any() for p in module.parameters())
        assert moved is (trained in loss.fresh)


@every
def test_the_ratio_before_the_first_update_is_one(make_actor):
    actor, critic = networks(make_actor)
    network = ActorCritic(actor, critic)
    batch = Scores(network, {"log_prob": "old_log_prob"})(frames(actor))
    assert not batch["old_log_prob"].requires_grad
    assert "state_values" not in set(batch.keys())
    result = PPOLoss(network)(batch)
    assert result["ratio_max"] == 1
    assert result["kl_old_k3_nats_per_token"] == 0


@every
def test_what_is_read_is_enough(make_actor):
    actor, critic = networks(make_actor)
    loss = PPOLoss(ActorCritic(actor, critic))
    batch = with_old_log_prob(frames(actor))
    result = loss(batch)
    assert_close(loss(batch.select(*loss.in_keys, strict=False)).to_dict(), result.to_dict())
    called = loss(**{
        key if isinstance(key, str) else "_".join(key): batch[key]
        for key in loss.in_keys
        if key in batch.keys(True)
    })  # fmt: skip
    for value, expected in zip(called, result.values(), strict=True):
        assert_close(value, expected)


def test_entropy_without_a_formula_is_sampled():
    actor, _ = networks(lambda: continuous(TanhNormal))
    batch = frames(actor)
    torch.manual_seed(0)
    entropy = ActorCritic(actor, entropy_samples=4000)(batch)["entropy"]
    # By quadrature over the torque of the first dimension and the second alike.
    distribution = actor.get_dist(batch)
    grid = torch.linspace(-1 + 1e-5, 1 - 1e-5, 4001, dtype=torch.float64)
    base = Normal(batch["loc"][0], batch["scale"][0])
    density = base.log_prob(grid.atanh().unsqueeze(-1)) - torch.log1p(-grid.square()).unsqueeze(-1)
    exact = torch.trapezoid(-density.exp() * density, grid.unsqueeze(-1), dim=0).sum()
    assert distribution.batch_shape == (FRAMES,)
    assert entropy[0].item() == pytest.approx(exact.item(), abs=0.1)
    assert entropy.requires_grad


def test_no_gradient_flows_into_the_action():
    actor, _ = networks(continuous)
    batch = frames(actor)
    batch["action"] = batch["action"].detach().requires_grad_()
    ActorCritic(actor)(batch)["log_prob"].sum().backward()
    assert batch["action"].grad is None


def test_an_actor_alone_under_the_clipped_loss():
    actor, _ = networks(discrete)
    loss = ClippedPolicyLoss(ActorCritic(actor))
    batch = frames(actor)
    loss.set_keys(old_log_prob=log_prob_keys(batch)[0])
    result = loss(batch)
    assert 0 < result["entropy_new_nats_per_token"] < torch.tensor(2.0).log()
    with pytest.raises(ValueError, match="network must write 'state_values'"):
        PPOLoss(ActorCritic(actor))(frames(actor))


def test_a_critic_with_another_key():
    actor, _ = networks(discrete)
    critic = TensorDictModule(nn.Linear(OBSERVED, 1).double(), ["observation"], ["state_value"])
    loss = SoftMinValueLoss(ActorCritic(actor, critic))
    loss.set_keys(state_values="state_value")
    loss(frames(actor))["loss_value"].backward()
    assert critic.module.weight.grad.any()
    assert all(p.grad is None for p in actor.parameters())


def test_the_keys_of_the_actor_critic_can_be_set():
    actor, critic = networks(discrete)
    network = ActorCritic(actor, critic)
    network.set_keys(log_prob=("fresh", "log_prob"), action="taken")
    assert "taken" in network.in_keys
    batch = frames(actor).rename_key_("action", "taken")
    assert network(batch)["fresh", "log_prob"].shape == (FRAMES,)
    with pytest.raises(ValueError, match="log_probs is not an accepted"):
        network.set_keys(log_probs="x")


@pytest.mark.parametrize("functional", [False, True])
def test_the_target_critic_follows_with_soft_update(functional):
    actor, critic = networks(discrete)
    loss = SAFELoss(ActorCritic(actor, critic), functional=functional, delay_value=True)
    updater = SoftUpdate(loss, tau=0.25)
    weight = loss.critic_params["module", "weight"]
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1.0)
    assert_close(loss.target_critic_params["module", "weight"], before)
    updater.step()
    assert_close(loss.target_critic_params["module", "weight"], before + 0.25)
    names = [name for name, _ in loss.named_parameters()]
    assert not any("target" in name for name in names)
    assert len(names) == 4
    saved = loss.state_dict()
    assert sum("target_critic_params" in name and "weight" in name for name in saved) == 1
    other = SAFELoss(ActorCritic(*networks(discrete)), functional=functional, delay_value=True)
    other.load_state_dict(saved)
    SoftUpdate(other, tau=0.5)
    estimator = loss.make_value_estimator(gamma=0.9).value_estimator
    assert estimator.value_network is loss.critic_network


def test_without_a_delay_the_target_is_the_critic_itself():
    actor, critic = networks(discrete)
    loss = SAFELoss(ActorCritic(actor, critic))
    target = loss.target_critic_params["module", "weight"]
    assert not target.requires_grad
    assert target.data_ptr() == critic.module.weight.data_ptr()
    with pytest.raises(RuntimeError, match="Did not find any target parameters"):
        SoftUpdate(loss, tau=0.1)
    with pytest.raises(ValueError, match="network must have a critic, got ActorCritic"):
        SoftMinValueLoss(ActorCritic(actor), delay_value=True)


def test_errors():
    actor, critic = networks(discrete)
    with pytest.raises(ValueError, match=r"actor must have get_dist.*got Linear"):
        ActorCritic(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="entropy_samples must be positive, got 0"):
        ActorCritic(actor, entropy_samples=0)
    with pytest.raises(ValueError, match=r"network must write 'log_probs', it writes \['log_prob'"):
        Scores(ActorCritic(actor, critic), {"log_probs": "x"})
    with pytest.raises(ValueError, match="batch must hold 'action'"):
        ActorCritic(actor, critic)(frames(actor).exclude("action"))
