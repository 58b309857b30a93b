"""An update is measured before it is accepted; what is accepted keeps to the limit."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.testing import assert_close

from safe_rl.trust_region import SLACK, PolicyTrustRegion, policy_kl


def region(limit=0.1, value=0.0):
    weight = torch.nn.Parameter(torch.tensor([value, 2 * value]))
    trust = PolicyTrustRegion([weight], limit=limit)
    trust.set()
    return weight, trust


def moved(weight, *, to):
    with torch.no_grad():
        weight.copy_(torch.tensor(to))


def softmax_kl(logits, new):
    """KL(softmax(logits) || softmax(new)), exact."""
    old = logits.log_softmax(-1)
    return (old.exp() * (old - new.log_softmax(-1))).sum()


def test_an_update_within_the_limit_is_untouched_and_measured_once():
    weight, trust = region(limit=0.1)
    moved(weight, to=[0.1234567, -7.7])
    calls = []
    step = trust.hold(lambda: calls.append(1) or torch.tensor(0.0625))
    assert step == (0.0625, 0.0625, 1.0)
    assert torch.equal(weight, torch.tensor([0.1234567, -7.7]))
    assert len(calls) == 1


def test_the_kl_of_a_shortened_update_is_the_limit():
    """A real policy: a softmax of three logits, its exact KL."""
    logits = torch.tensor([0.3, -0.2, 1.0])
    weight = torch.nn.Parameter(logits.clone())
    trust = PolicyTrustRegion([weight], limit=0.01)
    trust.set()
    moved(weight, to=[2.3, -1.2, 1.5])
    direction = weight.detach() - logits
    step = trust.hold(lambda: softmax_kl(logits, weight.detach()))
    assert step.proposed_kl > 0.3
    assert 0.009 < step.kl <= SLACK * 0.01
    assert float(softmax_kl(logits, weight.detach())) == step.kl
    assert_close(weight.detach(), logits + step.scale * direction)


@settings(max_examples=40, deadline=None)
@given(
    change=st.lists(st.floats(-30, 30, width=32), min_size=3, max_size=3),
    limit=st.floats(1e-4, 1.0),
)
def test_nothing_is_accepted_beyond_the_slack(change, limit):
    logits = torch.tensor([0.3, -0.2, 1.0])
    weight = torch.nn.Parameter(logits.clone())
    trust = PolicyTrustRegion([weight], limit=limit)
    trust.set()
    moved(weight, to=(logits + torch.tensor(change)).tolist())
    step = trust.hold(lambda: softmax_kl(logits, weight.detach()))
    assert float(softmax_kl(logits, weight.detach())) <= SLACK * limit
    assert 0 <= step.scale <= 1


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_an_update_that_cannot_be_measured_is_taken_back_bit_for_bit(kl):
    weight, trust = region(value=0.1)
    before = weight.detach().clone()
    moved(weight, to=[math.nan, 1e30])
    calls = []
    step = trust.hold(lambda: calls.append(1) or torch.tensor(kl))
    assert torch.equal(weight, before)
    assert (step.kl, step.scale) == (0.0, 0.0)
    assert len(calls) == 1


def test_an_update_that_shortening_does_not_help_is_taken_back():
    weight, trust = region(value=0.1)
    before = weight.detach().clone()
    moved(weight, to=[5.0, 6.0])
    calls = []
    step = trust.hold(lambda: calls.append(1) or torch.tensor(3.0))
    assert torch.equal(weight, before)
    assert step == (3.0, 0.0, 0.0)
    assert len(calls) == 4


def test_each_update_starts_from_the_one_before():
    weight, trust = region(limit=0.25)
    for _ in range(2):
        start = weight.detach().clone()
        trust.set()
        moved(weight, to=(start + 1.0).tolist())
        trust.hold(lambda start=start: (weight.detach() - start).square().mean())
        assert_close(weight.detach(), start + 0.5)


def test_the_measured_kl_is_that_of_the_two_policies():
    """Its expectation over the old policy's tokens is the exact KL: summed over all of them."""
    old, new = torch.tensor([0.3, -0.2, 1.0]), torch.tensor([0.1, 0.4, 0.5])
    log_old, log_new = old.log_softmax(-1).double(), new.log_softmax(-1).double()
    per_token = [
        policy_kl(log_old[None, t : t + 1], log_new[None, t : t + 1], mask=torch.ones(1, 1).bool())
        for t in range(3)
    ]
    expected = sum(p * k for p, k in zip(log_old.exp(), per_token, strict=True))
    assert_close(expected.float(), softmax_kl(old, new))


def test_the_measured_kl_reads_no_padding_and_weighs_tokens_alike():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    old = torch.zeros(2, 3)
    new = torch.tensor([[0.1, 0.2, 0.3], [0.4, math.nan, math.inf]])
    per_token = [math.exp(r) - 1 - r for r in (0.1, 0.2, 0.3, 0.4)]
    assert float(policy_kl(old, new, mask=mask)) == pytest.approx(sum(per_token) / 4, rel=1e-5)
    new[0, 1] = math.nan
    assert policy_kl(old, new, mask=mask).isnan()


def test_what_is_wrong_is_said():
    weight = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="limit must be positive and finite, got 0"):
        PolicyTrustRegion([weight], limit=0)
    with pytest.raises(ValueError, match="parameters must hold at least one"):
        PolicyTrustRegion([], limit=0.1)
    with pytest.raises(RuntimeError, match=r"call set\(\) before the update"):
        PolicyTrustRegion([weight], limit=0.1).hold(lambda: torch.tensor(0.0))
