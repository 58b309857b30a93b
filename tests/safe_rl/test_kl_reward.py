"""The KL taken off the reward, for PPO."""

import pytest
import torch
from tensordict import TensorDict
from torch.testing import assert_close

from safe_rl import KLReward
from tests.safe_rl.objectives.batches import make_batch


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
