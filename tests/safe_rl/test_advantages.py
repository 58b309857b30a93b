import copy

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torch.testing import assert_close
from torchrl.objectives import ValueEstimators
from torchrl.objectives.value import GAE

from safe_ops import masked_whiten, soft_min
from safe_rl import (
    ActorCritic,
    ClippedPolicyLoss,
    PPOLoss,
    SAFELoss,
    SoftMinGAE,
    SoftMinValueLoss,
)
from safe_rl.advantages import whiten_over_ranks
from tests.reference.gae_loop import gae_loop
from tests.safe_rl.objectives.batches import make_batch, ragged_mask
from tests.safe_rl.test_actor_critic import continuous


def rollout(*, truncated: bool = False) -> TensorDict:
    """Ragged rows; the score on the last token, where the row ends."""
    generator = torch.Generator().manual_seed(0)
    mask = ragged_mask()
    last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    values = torch.randn(*mask.shape, 2, generator=generator, dtype=torch.float64)
    score = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=torch.float64)
    return TensorDict(
        {
            "response_mask": mask,
            "state_values": values,
            "reward": (last * score.unsqueeze(-1)).unsqueeze(-1),
            "terminated": (last & (not truncated)).unsqueeze(-1),
            "truncated": (last & truncated).unsqueeze(-1),
        },
        [len(mask)],
    )


def by_hand(
    batch: TensorDict, discount: float, gae_lambda: float, bootstrap: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The sum that the recursion stands for, one row and one token at a time."""
    values = -0.3 * torch.log(torch.exp(-batch["state_values"] / 0.3).mean(-1))
    advantage, target = torch.zeros_like(values), torch.zeros_like(values)
    for row, length in enumerate(batch["response_mask"].sum(1).tolist()):
        after = 0.0 if bootstrap is None else float(bootstrap[row])
        v = [*values[row, :length].tolist(), after]
        reward = batch["reward"][row, :, 0].tolist()
        error = [reward[t] + discount * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            advantage[row, t] = sum(
                (discount * gae_lambda) ** (s - t) * error[s] for s in range(t, length)
            )
            target[row, t] = advantage[row, t] + v[t]
    return advantage, target


@pytest.mark.parametrize(("discount", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0), (1.0, 1)])
def test_against_the_sum(discount, gae_lambda):
    batch = rollout()
    advantage, target = by_hand(batch, discount, gae_lambda)
    result = SoftMinGAE(discount=discount, gae_lambda=gae_lambda, average_gae=False)(batch.clone())
    assert result["advantage"].shape == result["value_target"].shape == (4, 5, 1)
    assert_close(result["advantage"].squeeze(-1), advantage)
    assert_close(result["value_target"].squeeze(-1), target)
    assert_close(result["state_value"].squeeze(-1), soft_min(batch["state_values"], 0.3))


def test_a_partial_rollout_bootstraps_from_the_soft_min():
    batch = rollout(truncated=True)
    batch["bootstrap_values"] = torch.tensor([[1.0, 3.0]]).double().expand(4, 2)
    bootstrap = soft_min(batch["bootstrap_values"], 0.3)
    advantage, target = by_hand(batch, 0.9, 0.8, bootstrap)
    result = SoftMinGAE(discount=0.9, gae_lambda=0.8, average_gae=False)(batch)
    assert_close(result["advantage"].squeeze(-1), advantage)
    assert_close(result["value_target"].squeeze(-1), target)


def test_a_scored_row_does_not_bootstrap():
    with_values, without = rollout(), rollout()
    with_values["bootstrap_values"] = torch.full((4, 2), 100.0, dtype=torch.float64)
    estimate = SoftMinGAE()
    assert_close(estimate(with_values)["advantage"], estimate(without)["advantage"])


def test_truncated_without_a_value_is_refused():
    with pytest.raises(ValueError, match=r"needs 'bootstrap_values' or \('next', 'state_values'\)"):
        SoftMinGAE()(rollout(truncated=True))


def test_constant_critic_reaches_the_truth():
    """Scored length stops are terminal: the target stays at the score, whatever V is."""
    batch = rollout()
    batch["state_values"] = torch.full_like(batch["state_values"], 24.0)
    target = SoftMinGAE(gae_lambda=1.0)(batch)["value_target"].squeeze(-1)
    score = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=torch.float64).unsqueeze(-1)
    assert_close(target, torch.where(batch["response_mask"], score, 0.0))


def test_whitened_over_the_tokens_that_count():
    batch = rollout()
    mask = batch["response_mask"]
    plain = SoftMinGAE(average_gae=False)(batch.clone())["advantage"].squeeze(-1)
    white = SoftMinGAE()(batch)["advantage"].squeeze(-1)
    assert_close(white[mask].mean(), torch.tensor(0.0, dtype=torch.float64))
    assert_close(white[mask].var(correction=0), torch.tensor(1.0, dtype=torch.float64))
    assert_close(white, masked_whiten(plain, mask))
    assert not white[~mask].any()


def test_whitening_of_one_rank_is_that_of_the_op():
    mask = ragged_mask()
    for x in (torch.randn(4, 5), torch.ones(4, 5), torch.zeros(4, 5)):
        assert_close(whiten_over_ranks(x, mask), masked_whiten(x, mask))
    nothing = torch.zeros(4, 5, dtype=torch.bool)
    assert not whiten_over_ranks(torch.randn(4, 5), nothing).any()


def test_padding_may_hold_anything():
    clean, dirty = rollout(), rollout()
    padding = ~dirty["response_mask"]
    for key in ("reward", "state_values"):
        dirty[key][padding] = torch.nan
    for key in ("terminated", "truncated"):
        dirty[key][padding] = True
    dirty["bootstrap_values"] = torch.zeros(4, 2)
    clean["bootstrap_values"] = torch.zeros(4, 2)
    for key in ("advantage", "value_target"):
        assert_close(SoftMinGAE()(dirty)[key], SoftMinGAE()(clean)[key], rtol=0, atol=0)


def test_nothing_is_differentiated():
    batch = rollout()
    batch["state_values"].requires_grad_()
    result = SoftMinGAE()(batch)
    assert not any(result[key].requires_grad for key in SoftMinGAE().out_keys)


def environment() -> TensorDict:
    """Two rows of several episodes, as TorchRL's collectors lay them out, [B, T]."""
    generator = torch.Generator().manual_seed(3)
    terminated, truncated = torch.zeros(2, 6, 1).bool(), torch.zeros(2, 6, 1).bool()
    terminated[0, 2], truncated[0, 4], truncated[:, 5], truncated[1, 1] = True, True, True, True
    value = torch.randn(2, 6, 1, generator=generator)
    return TensorDict(
        {
            "state_value": value,
            "response_mask": torch.ones(2, 6).bool(),
            "next": {
                "reward": torch.randn(2, 6, 1, generator=generator),
                "terminated": terminated,
                "truncated": truncated,
                "done": terminated | truncated,
                "state_value": torch.randn(2, 6, 1, generator=generator),
            },
        },
        [2, 6],
    )


def test_torchrls_gae_in_its_own_layout():
    expected = GAE(gamma=0.9, lmbda=0.8, value_network=None)(environment(), time_dim=1)
    estimate = SoftMinGAE(discount=0.9, gae_lambda=0.8, average_gae=False)
    estimate.set_keys(
        state_values="state_value",
        next_state_values=("next", "state_value"),
        reward=("next", "reward"),
        terminated=("next", "terminated"),
        truncated=("next", "truncated"),
    )
    result = estimate(environment())
    assert_close(result["advantage"], expected["advantage"])
    assert_close(result["value_target"], expected["value_target"])


def test_it_is_a_torchrl_value_estimator():
    estimate = SoftMinGAE()
    assert PPOLoss().make_value_estimator(estimate).value_estimator is estimate
    with pytest.raises(KeyError, match="rewards is not an accepted"):
        estimate.set_keys(rewards="x")


def critic(heads: int, out: str = "state_values") -> TensorDictModule:
    torch.manual_seed(0)
    return TensorDictModule(nn.Linear(3, heads), ["observation"], [out])


def observed(rows: int = 2, steps: int = 6) -> TensorDict:
    """What a collector gives: no values, no mask; the state after the row is under "next"."""
    batch = environment().exclude("state_value", "response_mask", ("next", "state_value"))
    states = torch.randn(rows, steps + 1, 3, generator=torch.Generator().manual_seed(1))
    batch["observation"], batch["next", "observation"] = states[:, :-1], states[:, 1:].clone()
    # After an end inside the row the next state is not that of the row.
    inside = batch["next", "done"].clone()
    inside[:, -1] = False
    batch["next", "observation"] = torch.where(inside, 9.0, batch["next", "observation"])
    return batch


def test_a_value_network_takes_the_place_of_torchrls():
    theirs = GAE(gamma=0.9, lmbda=0.8, value_network=critic(1, "state_value"), average_gae=False)(
        observed(), time_dim=1
    )
    network = critic(1)
    ours = SoftMinGAE(value_network=network, discount=0.9, gae_lambda=0.8, average_gae=False)
    batch = ours(observed())
    assert_close(batch["advantage"], theirs["advantage"])
    assert_close(batch["value_target"], theirs["value_target"])
    assert_close(batch["state_values"], theirs["state_value"])
    assert_close(batch["next", "state_values"], theirs["next", "state_value"])
    assert not list(ours.parameters())
    assert_close(ours.value_estimate(observed()), theirs["value_target"])
    left_alone = observed()
    ours.value_estimate(left_alone)
    assert "advantage" not in set(left_alone.keys())


def test_a_value_network_is_pessimistic_over_its_heads():
    network = critic(3)
    batch = SoftMinGAE(value_network=network, average_gae=False)(observed())
    heads = network.module(observed()["observation"])
    assert_close(batch["state_value"].squeeze(-1), soft_min(heads, 0.3))
    assert batch["state_values"].shape == (2, 6, 3)
    with pytest.raises(ValueError, match="value_network must write 'state_values'"):
        SoftMinGAE(value_network=critic(3, "values"))(observed())


def test_target_parameters_are_those_of_what_follows():
    network = critic(2)
    target = TensorDict.from_module(network).data.clone().apply(lambda p: p + 1.0)
    estimate = SoftMinGAE(value_network=network, average_gae=False, discount=0.9)
    moved = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(1.0)
    expected = observed()
    expected["state_values"] = network.module(expected["observation"]).detach()
    after = moved.module(expected["next", "observation"]).detach()
    expected["next", "state_values"] = after
    by_values = SoftMinGAE(average_gae=False, discount=0.9)
    by_values.set_keys(
        reward=("next", "reward"),
        terminated=("next", "terminated"),
        truncated=("next", "truncated"),
    )
    expected = by_values(expected)
    own = TensorDict.from_module(network)
    for params in (None, own):
        found = estimate(observed(), params=params, target_params=target)
        assert_close(found["advantage"], expected["advantage"])
    both = estimate(observed(), params=target)
    assert_close(both["next", "state_values"], after)
    assert_close(both["state_values"], moved.module(observed()["observation"]).detach())


def test_shifted_is_one_forward_with_the_same_result_where_nothing_is_cut_inside():
    calls = []

    class Counting(nn.Linear):
        def forward(self, x):
            calls.append(x.shape[1])
            return super().forward(x)

    network = critic(2)
    counting = TensorDictModule(Counting(3, 2), ["observation"], ["state_values"])
    counting.module.load_state_dict(network.module.state_dict())
    batch = observed()
    batch["next", "truncated"][:, :-1] = False
    batch["next", "observation"][:, :-1] = batch["observation"][:, 1:]
    arguments = {"discount": 0.9, "gae_lambda": 0.8}
    expected = SoftMinGAE(value_network=network, **arguments)(batch.clone())
    found = SoftMinGAE(value_network=counting, shifted=True, **arguments)(batch.clone())
    assert calls == [7]
    assert found["shifted_valid"].all()
    for key in ("advantage", "value_target", "state_value"):
        assert_close(found[key], expected[key])


def test_shifted_leaves_out_a_step_whose_next_state_it_does_not_see():
    network = critic(1)
    batch = observed()
    cut = batch["next", "truncated"].squeeze(-1).clone()
    assert cut[0].tolist() == [False, False, False, False, True, True]
    found = SoftMinGAE(
        value_network=network, discount=0.9, gae_lambda=0.8, average_gae=False, shifted=True
    )(batch.clone())
    assert found["shifted_valid"].tolist() == [
        [True, True, True, True, False, True],
        [True, False, True, True, True, True],
    ]
    # By the sum, piece by piece: the one before it ends, with the value of the state it reached.
    states = torch.cat([batch["observation"], batch["next", "observation"][:, -1:]], 1)
    values = network.module(states).detach().squeeze(-1)
    for row, pieces in enumerate(([(0, 4), (5, 6)], [(0, 1), (2, 6)])):
        for first, last in pieces:
            piece = slice(first, last)
            expected, _ = gae_loop(
                batch["next", "reward"][row : row + 1, piece, 0],
                values[row : row + 1, piece],
                mask=torch.ones(1, last - first, dtype=torch.bool),
                terminated=batch["next", "terminated"][row : row + 1, piece, 0],
                bootstrap_value=values[row : row + 1, last],
                discount=0.9,
                gae_lambda=0.8,
            )
            assert_close(found["advantage"][row, piece, 0].double(), expected[0])
    assert not found["advantage"].squeeze(-1)[~found["shifted_valid"]].any()
    # The objectives leave it out too.
    found["log_prob"] = found["old_log_prob"] = found["entropy"] = torch.zeros(2, 6)
    loss = ClippedPolicyLoss(entropy_coef=0.0, reduction="sum")
    assert_close(loss(found)["loss_policy"], -found["advantage"].sum())
    assert not loss.mask_of(found)[0, 4]


def test_a_target_per_head_is_what_that_head_alone_would_estimate():
    batch = rollout()
    together = SoftMinGAE(per_head_targets=True, discount=0.9)(batch.clone())
    assert together["value_target"].shape == (4, 5, 2)
    assert_close(together["advantage"], SoftMinGAE(discount=0.9)(batch.clone())["advantage"])
    for head in range(2):
        alone = batch.clone()
        alone["state_values"] = batch["state_values"][..., head : head + 1]
        expected = SoftMinGAE(discount=0.9)(alone)["value_target"].squeeze(-1)
        assert_close(together["value_target"][..., head], expected)
    loss = SoftMinValueLoss()
    by_hand = [
        loss(together.copy().set("value_target", together["value_target"][..., k : k + 1])
             .set("state_values", together["state_values"][..., k : k + 1]))["loss_value"]
        for k in range(2)
    ]  # fmt: skip
    assert_close(loss(together)["loss_value"], sum(by_hand) / 2)


def test_a_head_bootstraps_from_itself():
    batch = rollout(truncated=True)
    batch["bootstrap_values"] = torch.tensor([[1.0, 3.0]]).double().expand(4, 2)
    together = SoftMinGAE(per_head_targets=True)(batch.clone())["value_target"]
    for head in range(2):
        alone = batch.clone()
        for key in ("state_values", "bootstrap_values"):
            alone[key] = batch[key][..., head : head + 1]
        assert_close(together[..., head : head + 1], SoftMinGAE()(alone)["value_target"])


def test_time_may_be_any_dimension():
    arguments = {"value_network": critic(2), "discount": 0.9}
    expected = SoftMinGAE(**arguments)(observed())
    turned = observed().transpose(0, 1).contiguous()
    by_argument = SoftMinGAE(**arguments)(turned.clone(), time_dim=0)
    by_constructor = SoftMinGAE(time_dim=-2, **arguments)(turned.clone())
    named = turned.clone()
    named.names = ["time", None]
    by_name = SoftMinGAE(shifted=False, **arguments)(named)
    for found in (by_argument, by_constructor, by_name):
        for key in ("advantage", "value_target", "state_value"):
            assert_close(found[key].transpose(0, 1), expected[key])
    one = SoftMinGAE(average_gae=False, **arguments)
    row = one(observed()[0], time_dim=0)
    assert_close(row["advantage"], one(observed())["advantage"][0])
    with pytest.raises(ValueError, match=r"time_dim must be a dimension of the mask \(2, 6\)"):
        one(observed(), time_dim=2)


def test_the_batches_of_language_collectors_have_a_dimension_of_one():
    batch = rollout()
    expected = SoftMinGAE()(batch.clone())
    nested = TensorDict({k: v.unsqueeze(1) for k, v in batch.items()}, [4, 1])
    found = SoftMinGAE(per_head_targets=True)(nested)
    assert_close(found["advantage"].squeeze(1), expected["advantage"])
    assert found["value_target"].shape == (4, 1, 5, 2)


def test_an_ambiguous_layout_is_refused():
    """Where TorchRL takes the last dimension of the batch for time, whatever it is."""
    estimate = SoftMinGAE(value_network=critic(2))
    with pytest.raises(ValueError, match=r"which dimension of \(12,\) is time\?"):
        estimate(observed().reshape(-1))
    rows = rollout().exclude("response_mask")
    message = (
        r"batch must hold 'response_mask'.*'reward' is \(4, 5, 1\) in a batch \[4\].*Give "
        r"'response_mask' \[4, 5\]; or, where every step counts, batch_size=\[4, 5\], or time_dim=1"
    )
    with pytest.raises(ValueError, match=message):
        SoftMinGAE()(rows)
    # A loss has no time to be told.
    message = r"'old_log_prob' is \(4, 5\) in a batch \[4\].*batch_size=\[4, 5\]$"
    with pytest.raises(ValueError, match=message):
        ClippedPolicyLoss()(make_batch().exclude("response_mask"))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("time_dim", [1, -1])
def test_a_time_that_is_given_says_that_every_step_counts(time_dim, shifted):
    """[B, T, 1] in a batch [B], where TorchRL's GAE wants a time_dim too."""
    arguments = {"value_network": critic(2), "discount": 0.9, "shifted": shifted}
    expected = SoftMinGAE(**arguments)(observed())
    rows = TensorDict(observed().to_dict(), [2])
    for estimate, given in (
        (SoftMinGAE(**arguments), time_dim),
        (SoftMinGAE(time_dim=time_dim, **arguments), None),
    ):
        found = estimate(rows.copy(), time_dim=given)
        assert found.batch_size == (2,)
        for key in estimate.out_keys:
            assert_close(found[key], expected[key])
    # A mask says more than the time.
    rows["response_mask"] = torch.arange(6) < torch.tensor([[6], [4]])
    rows["next", "done"][1, 3] = rows["next", "truncated"][1, 3] = True
    masked = SoftMinGAE(**arguments)(rows, time_dim=time_dim)
    assert not masked["advantage"][1, 4:].any()


def test_rows_of_one_step():
    one = TensorDict({k: v[:, :1] for k, v in rollout().items() if k != "response_mask"}, [4])
    one["terminated"] = torch.ones(4, 1, 1, dtype=torch.bool)
    found = SoftMinGAE(average_gae=False)(one, time_dim=1)
    value = soft_min(one["state_values"], 0.3)
    assert_close(found["advantage"].squeeze(-1), one["reward"].squeeze(-1) - value)


def test_done_stands_in_for_truncated():
    estimate = SoftMinGAE(value_network=critic(2))
    expected = estimate(observed())
    found = estimate(observed().exclude(("next", "truncated")))
    assert_close(found["advantage"], expected["advantage"])
    with pytest.raises(ValueError, match=r"batch must hold \('next', 'truncated'\)"):
        estimate(observed().exclude(("next", "truncated"), ("next", "done")))


def test_shifted_is_of_one_network_with_one_set_of_parameters():
    with pytest.raises(ValueError, match="shifted must come with a value_network"):
        SoftMinGAE(shifted=True)
    network = critic(1)
    target = TensorDict.from_module(network).data.clone()
    with pytest.raises(ValueError, match="shifted is one forward"):
        SoftMinGAE(value_network=network, shifted=True)(observed(), target_params=target)


def test_the_objective_makes_its_estimator():
    loss = SAFELoss(ActorCritic(continuous(), critic(2)))
    loss.make_value_estimator(ValueEstimators.GAE, gamma=0.9, lmbda=0.8, average_gae=False)
    estimate = loss.value_estimator
    assert (estimate.discount, estimate.gae_lambda) == (0.9, 0.8)
    assert estimate.value_network is loss.network.critic
    loss.set_keys(advantage="a", state_values="v", response_mask="m")
    assert estimate.tensor_keys.advantage == "a"
    assert (estimate.tensor_keys.state_values, estimate.tensor_keys.response_mask) == ("v", "m")
    assert estimate.tensor_keys.reward == ("next", "reward")
    default = SAFELoss(ActorCritic(continuous(), critic(2))).value_estimator
    assert (default.discount, default.gae_lambda) == (0.99, 0.95)
    assert isinstance(PPOLoss().make_value_estimator("gae").value_estimator, SoftMinGAE)
    assert isinstance(PPOLoss().make_value_estimator(SoftMinGAE).value_estimator, SoftMinGAE)
    with pytest.raises(NotImplementedError, match="PPOLoss makes advantages with"):
        PPOLoss().make_value_estimator(ValueEstimators.TDLambda)
    with pytest.raises(TypeError, match="lamda"):
        PPOLoss().make_value_estimator(lamda=0.5)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("own_keys", [False, True])
def test_what_is_written_is_what_out_keys_say(shifted, own_keys):
    network = critic(2, "v" if own_keys else "state_values")
    estimate = SoftMinGAE(value_network=network, shifted=shifted)
    if own_keys:
        estimate.set_keys(state_values="v", value="pessimistic", advantage=("gae", "a"))
        assert ("next", "v") in estimate.out_keys
    batch = observed()
    before = set(batch.keys(True, True))
    found = estimate(batch)
    assert set(found.keys(True, True)) - before == set(estimate.out_keys)
    assert len(estimate.out_keys) == len(set(estimate.out_keys)) == 5 + shifted
    given = observed()
    called = estimate(**{
        key if isinstance(key, str) else "_".join(key): given[key]
        for key in estimate.in_keys
        if given.get(key, None) is not None
    })  # fmt: skip
    for value, key in zip(called, estimate.out_keys, strict=True):
        assert_close(value, found[key])


def test_what_is_written_without_a_network():
    batch = rollout()
    before = set(batch.keys(True, True))
    estimate = SoftMinGAE()
    assert set(estimate(batch).keys(True, True)) - before == set(estimate.out_keys)


def test_the_values_that_follow_are_called_as_the_values_are():
    estimate = SoftMinGAE()
    estimate.set_keys(state_values="v")
    assert estimate.tensor_keys.next_state_values == ("next", "v")
    estimate.set_keys(state_values=("critic", "v"))
    assert estimate.tensor_keys.next_state_values == ("next", "critic", "v")
    estimate.set_keys(state_values="v", next_state_values="after")
    assert estimate.tensor_keys.next_state_values == "after"
    # A loss hands on what it has.
    estimate.set_keys(state_values="v", advantage="a")
    assert estimate.tensor_keys.next_state_values == "after"


def test_heads_are_not_overwritten_by_their_soft_min():
    estimate = SoftMinGAE(value_network=critic(2, "state_value"))
    estimate.set_keys(state_values="state_value")
    message = r"two keys where there are 2 heads, got 'state_value' for both.*set_keys\(value="
    with pytest.raises(ValueError, match=message):
        estimate(observed())
    one = SoftMinGAE(value_network=critic(1, "state_value"))
    one.set_keys(state_values="state_value")
    found = one(observed())
    assert_close(found["state_value"], critic(1).module(observed()["observation"]).detach())
    assert one.out_keys.count("state_value") == 1


def test_dispatch():
    batch = rollout()
    arguments = {key: batch[key] for key in SoftMinGAE().in_keys[:-3]}
    value, advantage, target = SoftMinGAE()(**arguments)
    result = SoftMinGAE()(batch)
    assert_close(value, result["state_value"])
    assert_close(advantage, result["advantage"])
    assert_close(target, result["value_target"])


@pytest.mark.parametrize(
    "key", ["state_values", "reward", "terminated", "truncated", "response_mask"]
)
def test_missing_keys(key):
    with pytest.raises(ValueError, match=f"batch must hold '{key}'"):
        SoftMinGAE()(rollout().exclude(key))


def test_a_mask_that_lost_the_eos_is_refused():
    """`token != pad` with pad == EOS: the row ends, and is paid, where nothing counts."""
    batch = rollout()
    last = batch["terminated"].squeeze(-1)
    batch["response_mask"] = batch["response_mask"] & ~last
    # The row of one token has none left, and nothing to say.
    message = r"3 rows end where 'response_mask' is False.*token != pad"
    with pytest.raises(ValueError, match=message):
        SoftMinGAE()(batch)
    batch["terminated"][1:] = False
    with pytest.raises(ValueError, match="1 rows end"):
        SoftMinGAE()(batch)
    batch["terminated"][:] = False
    SoftMinGAE()(batch)


def test_errors():
    with pytest.raises(ValueError, match="temperature must be positive"):
        SoftMinGAE(temperature=0.0)
    with pytest.raises(ValueError, match=r"discount must be in \[0, 1\], got 1.5"):
        SoftMinGAE(discount=1.5)
    with pytest.raises(ValueError, match=r"gae_lambda must be in \[0, 1\], got -0.1"):
        SoftMinGAE(gae_lambda=-0.1)
    batch = rollout()
    batch["reward"] = torch.zeros(4, 3, 1)
    with pytest.raises(ValueError, match=r"'reward' .* got \(4, 3\) and mask \(4, 5\)"):
        SoftMinGAE()(batch)
