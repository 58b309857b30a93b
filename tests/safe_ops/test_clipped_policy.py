"""Against the surrogate written out token by token in floats."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from safe_ops import clipped_policy_loss, clipped_policy_terms
from tests.strategies import PROPERTY, bool_tensors, tensors

log_probs, masks = tensors(2, 3, low=-3.0, high=0.0), bool_tensors(2, 3)
clips = st.floats(0.01, 0.9)


def token_loss(log_ratio: float, advantage: float, low: float, high: float) -> float:
    """By cases: the ratio counts up to where moving it further would still look better."""
    ratio = math.exp(log_ratio)
    if advantage >= 0:
        return -min(ratio, 1 + high) * advantage
    return -max(ratio, 1 - low) * advantage


@PROPERTY
@given(log_probs, log_probs, tensors(2, 3), masks, clips, clips)
def test_clipped_policy_is_the_loop(
    log_prob: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, low: float, high: float
) -> None:
    terms = clipped_policy_terms(log_prob, old, advantage, mask=mask, clip=(low, high))
    log_ratio = log_prob - old
    expected = torch.zeros(2, 3).double()
    for b, t in mask.nonzero().tolist():
        expected[b, t] = token_loss(log_ratio[b, t].item(), advantage[b, t].item(), low, high)
    torch.testing.assert_close(terms.loss, expected, rtol=1e-12, atol=1e-12)
    loss = clipped_policy_loss(log_prob, old, advantage, mask=mask, clip=(low, high))
    torch.testing.assert_close(loss, expected.sum() / max(1, int(mask.sum())))

    ratio = log_ratio[mask].exp()
    count = ratio.numel()
    if count == 0:
        return
    torch.testing.assert_close(terms.ratio_max, ratio.max())
    torch.testing.assert_close(
        terms.effective_sample_size, ratio.sum() ** 2 / (count * (ratio**2).sum())
    )
    k3 = ratio - 1 - log_ratio[mask]  # of KL(old || new), tokens drawn from old
    torch.testing.assert_close(terms.kl_old_k3, k3.mean(), rtol=1e-9, atol=1e-12)


def by_ratio(ratio: float, advantage: float, **keywords: object) -> tuple[float, float, float]:
    """(loss, gradient, clip fraction) of one token."""
    log_prob = torch.tensor([[math.log(ratio)]], requires_grad=True)
    terms = clipped_policy_terms(
        log_prob,
        torch.zeros(1, 1),
        torch.tensor([[advantage]]),
        mask=torch.ones(1, 1).bool(),
        **keywords,
    )
    (slope,) = torch.autograd.grad(terms.loss.sum(), log_prob)
    return terms.loss.item(), slope.item(), terms.clip_fraction.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "clipped"),
    [
        (1.5, 2.0, -2.4, 0.0, 1.0),  # already much likelier and good: no further
        (1.5, -2.0, 3.0, 3.0, 0.0),  # much likelier and bad: back
        (0.5, 2.0, -1.0, -1.0, 0.0),  # much rarer and good: back
        (0.5, -2.0, 1.6, 0.0, 1.0),  # much rarer and bad: no further
        (1.1, 2.0, -2.2, -2.2, 0.0),
        (0.9, -2.0, 1.8, 1.8, 0.0),
    ],
)
def test_clipped_policy_by_hand(
    ratio: float, advantage: float, loss: float, slope: float, clipped: float
) -> None:
    assert by_ratio(ratio, advantage) == pytest.approx((loss, slope, clipped))


def test_clipped_policy_with_two_widths() -> None:
    assert by_ratio(2.0, 1.0, clip=(0.2, 0.5))[0] == pytest.approx(-1.5)
    assert by_ratio(0.1, -1.0, clip=(0.2, 0.5))[0] == pytest.approx(0.8)


def test_clipped_policy_on_policy_is_the_policy_gradient() -> None:
    log_prob = torch.tensor([[-1.0, -0.3], [-2.0, -5.0]], requires_grad=True)
    advantage = torch.tensor([[1.0, -2.0], [0.5, 100.0]])
    mask = torch.tensor([[True, True], [True, False]])
    terms = clipped_policy_terms(log_prob, log_prob.detach(), advantage, mask=mask)
    assert terms.ratio_max.item() == 1
    assert terms.effective_sample_size.item() == 1
    assert terms.clip_fraction.item() == 0
    assert terms.kl_old_k3.item() == 0
    loss = clipped_policy_loss(log_prob, log_prob.detach(), advantage, mask=mask)
    (slope,) = torch.autograd.grad(loss, log_prob)
    torch.testing.assert_close(slope, torch.tensor([[-1.0, 2.0], [-0.5, 0.0]]) / 3)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_clipped_policy_ignores_garbage_where_nothing_counts(garbage: float) -> None:
    mask = torch.tensor([[True, True, False]])

    def run(fill: float) -> list[Tensor]:
        last = torch.tensor([[fill]])
        log_prob = torch.cat([torch.tensor([[-1.0, -2.0]]), last], 1).requires_grad_()
        old = torch.cat([torch.tensor([[-1.1, -1.0]]), last], 1)
        advantage = torch.cat([torch.tensor([[1.0, 3.0]]), last], 1)
        terms = clipped_policy_terms(log_prob, old, advantage, mask=mask)
        loss = clipped_policy_loss(log_prob, old, advantage, mask=mask)
        return [loss, *terms, torch.autograd.grad(loss, log_prob)[0]]

    for found, expected in zip(run(garbage), run(0.0), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_clipped_policy_with_nothing_that_counts_is_zero() -> None:
    log_prob = torch.full((2, 3), torch.nan, requires_grad=True)
    loss = clipped_policy_loss(log_prob, log_prob, log_prob, mask=torch.zeros(2, 3).bool())
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, log_prob)[0] == 0).all()


def test_clipped_policy_differentiates_the_new_policy_alone() -> None:
    log_prob, old, advantage = (torch.ones(1, 2).mul(-x).requires_grad_() for x in (1, 2, 3))
    terms = clipped_policy_terms(log_prob, old, advantage, mask=torch.ones(1, 2).bool())
    terms.loss.sum().backward()
    assert old.grad is None
    assert advantage.grad is None
    for name in ("clip_fraction", "ratio_max", "effective_sample_size", "kl_old_k3"):
        assert not getattr(terms, name).requires_grad, name


def test_clipped_policy_terms_add_up_over_shards() -> None:
    log_prob, old, advantage = (
        torch.sin(torch.arange(12.0) * k).reshape(4, 3) for k in (1.0, 1.3, 2.1)
    )
    mask = torch.arange(3) < torch.tensor([[1], [3], [2], [3]])
    whole = clipped_policy_loss(log_prob, old, advantage, mask=mask)
    shards = [
        clipped_policy_terms(log_prob[s], old[s], advantage[s], mask=mask[s]).loss.sum()
        for s in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(shards) / mask.sum(), whole)


def test_clipped_policy_gradcheck() -> None:
    log_prob = torch.tensor([[-1.0, -0.5, -2.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-1.1, -1.5, -1.0]], dtype=torch.float64)
    advantage = torch.tensor([[1.0, 2.0, -1.0]], dtype=torch.float64)
    mask = torch.ones(1, 3).bool()
    assert torch.autograd.gradcheck(
        lambda x: clipped_policy_loss(x, old, advantage, mask=mask), log_prob
    )
