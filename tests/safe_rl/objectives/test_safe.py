"""The sums: SAFE and PPO."""

import pytest
import torch
from tensordict import TensorDict
from torch.testing import assert_close

from safe_rl import (
    ClippedPolicyLoss,
    GatedKLLoss,
    PPOLoss,
    SAFELoss,
    SoftMinValueLoss,
    TokenKLLoss,
    total_loss,
)
from tests.safe_rl.objectives.batches import TinyNetwork, make_batch

SUMS = {
    "safe": (SAFELoss(), [ClippedPolicyLoss(), SoftMinValueLoss(), GatedKLLoss()]),
    "safe with all": (
        SAFELoss(value_clip=0.2, token_kl_coef=0.3),
        [
            ClippedPolicyLoss(),
            SoftMinValueLoss(clip=0.2),
            GatedKLLoss(),
            TokenKLLoss(token_kl_coef=0.3),
        ],
    ),
    "ppo": (PPOLoss(), [ClippedPolicyLoss(), SoftMinValueLoss(huber_delta=None)]),
}
every_sum = pytest.mark.parametrize(("loss", "parts"), SUMS.values(), ids=SUMS)


@every_sum
def test_a_sum_is_its_parts(loss, parts):
    batch = make_batch()
    expected = {key: value for part in parts for key, value in part(batch).items()}
    assert_close(loss(batch).to_dict(), expected, rtol=0, atol=0)


@every_sum
def test_one_forward_of_the_network(loss, parts):
    network = TinyNetwork()
    type(loss)(network)(make_batch(fresh=False))
    assert network.calls == 1


def test_ppo_has_no_kl_in_the_loss():
    batch = make_batch().exclude("ref_log_prob", "kl_coef")
    assert "loss_kl" not in set(PPOLoss()(batch).keys())


def test_gradients_of_the_sum_are_those_of_the_parts():
    batch = make_batch(fresh=False)
    together, apart = TinyNetwork(), TinyNetwork()
    total_loss(SAFELoss(together)(batch)).backward()
    for part in (ClippedPolicyLoss, SoftMinValueLoss, GatedKLLoss):
        total_loss(part(apart)(batch)).backward()
    for got, expected in zip(together.parameters(), apart.parameters(), strict=True):
        assert_close(got.grad, expected.grad)


def test_coefficients_of_the_parts_are_set_on_the_sum():
    loss, batch = SAFELoss(), make_batch()
    before = loss(batch)
    loss.entropy_coef = 0.0
    loss.value_coef = 1.0
    assert loss.entropy_coef == 0
    after = loss(batch)
    assert after["loss_entropy"] == 0
    assert_close(after["loss_value"], 2 * before["loss_value"])


def test_keys_are_set_in_the_parts():
    loss, batch = SAFELoss(), make_batch()
    expected = total_loss(loss(batch))
    loss.set_keys(ref_log_prob="reference")
    assert_close(total_loss(loss(batch.rename_key_("ref_log_prob", "reference"))), expected)
    assert "reference" in loss.in_keys
    loss.set_keys(ref_log_prob=None)
    assert "ref_log_prob" in loss.in_keys


def test_an_adam_step_lowers_each_loss():
    network = TinyNetwork()
    loss, batch = SAFELoss(network), make_batch(fresh=False)
    with torch.no_grad():
        batch["old_log_prob"] = network(batch.copy())["log_prob"]
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    values = []
    for _ in range(10):
        value = total_loss(loss(batch))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values == sorted(values, reverse=True)


def test_diagnostics_do_not_reach_the_gradient():
    """TorchRL's `losses.mean(reduce=True)` has their values in it, and a factor, but no more."""
    batch = make_batch(fresh=False)
    gradients = []
    for reduce in (total_loss, lambda losses: losses.mean(reduce=True)):
        network = TinyNetwork()
        losses = SAFELoss(network)(batch)
        reduce(losses).backward()
        gradients.append([p.grad for p in network.parameters()])
    assert losses.mean(reduce=True) != total_loss(losses) / len(losses.keys())
    for got, averaged in zip(*gradients, strict=True):
        assert_close(averaged * len(losses.keys()), got)
    assert_close(total_loss(losses), total_loss(losses))
    with pytest.raises(ValueError, match=r"must hold loss_\* entries, got \['kl'\]"):
        total_loss(TensorDict({"kl": torch.zeros(())}, []))
