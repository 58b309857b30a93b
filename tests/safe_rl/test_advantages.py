import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.testing import assert_close
from torchrl.objectives.value import GAE

from safe_ops import masked_whiten, soft_min
from safe_rl import KLReward, PPOLoss, SoftMinGAE
from safe_rl.advantages import whiten_over_ranks
from tests.safe_rl.objectives.batches import make_batch, ragged_mask


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


def test_dispatch():
    batch = rollout()
    arguments = {key: batch[key] for key in SoftMinGAE().in_keys[:-2]}
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


def shaped_batch() -> TensorDict:
    batch = make_batch()
    batch["reward"] = torch.ones(4, 5, 1, dtype=torch.float64)
    batch["kl_reward_coef"] = torch.tensor([0.1, 0.2, 0.0, 1.0], dtype=torch.float64)
    return batch


def test_kl_reward_by_hand():
    batch = shaped_batch()
    mask, coef = batch["response_mask"], batch["kl_reward_coef"].unsqueeze(-1)
    expected = (1 - coef * (batch["old_log_prob"] - batch["ref_log_prob"])) * mask
    assert_close(KLReward()(batch.clone())["reward"], expected.unsqueeze(-1))
    elsewhere = KLReward()
    elsewhere.set_keys(shaped_reward="shaped")
    result = elsewhere(batch.clone())
    assert_close(result["shaped"], expected.unsqueeze(-1))
    assert_close(result["reward"], batch["reward"])
    assert_close(elsewhere(**{key: batch[key] for key in elsewhere.in_keys}), result["shaped"])


def test_kl_reward_ignores_padding():
    batch = shaped_batch()
    expected = KLReward()(batch.clone())["reward"]
    padding = ~batch["response_mask"]
    for key in ("old_log_prob", "reward"):
        batch[key][padding] = torch.nan
    assert_close(KLReward()(batch)["reward"], expected, rtol=0, atol=0)


@pytest.mark.parametrize("key", KLReward().in_keys)
def test_kl_reward_missing_keys(key):
    with pytest.raises(ValueError, match=f"batch must hold '{key}'"):
        KLReward()(shaped_batch().exclude(key))
