"""Against exact sums over all pairs of sequences of an enumerable policy."""

import pytest
import torch
from torch import Tensor

from safe_ops import kl_baseline, kl_surrogate, kl_to_go
from tests.reference.enumerable_policy import (
    MASK,
    gradient,
    sequence_kl,
    sequence_prob,
    table,
    token_log_prob,
)

POLICY, OLD, REFERENCE = table(1.0), table(1.7), table(2.9)
ROWS = torch.cartesian_prod(torch.arange(len(MASK)), torch.arange(len(MASK)))
"""Every rollout of two sequences, [225, 2]."""


def test_kl_to_go_by_hand() -> None:
    log_prob = torch.zeros(2, 3)
    ref_log_prob = -torch.tensor([[1.0, 2.0, 4.0], [1.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert kl_to_go(log_prob, ref_log_prob, mask=mask).tolist() == [[7, 6, 4], [1, 0, 0]]
    assert kl_to_go(log_prob, ref_log_prob, mask=mask, decay=0.5).tolist() == [
        [3, 4, 4],
        [1, 0, 0],
    ]


def test_the_baseline_leaves_its_own_row_out() -> None:
    log_prob = torch.zeros(3, 2)
    ref_log_prob = -torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]])
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    found = kl_baseline(log_prob, ref_log_prob, mask=mask)
    # To go: [3, 2], [7, 4], [5, -].
    assert found.tolist() == [[1 + 6, 1 + 4], [1 + 4, 1 + 2], [1 + 5, 0]]


def test_a_row_that_reaches_further_than_all_others_has_one() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    assert kl_baseline(torch.zeros(2, 2), -torch.ones(2, 2), mask=mask)[0, 1] == 1


def test_padding_may_hold_anything() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    log_prob = torch.tensor([[0.0, torch.nan], [0.0, 0.0]])
    assert kl_baseline(log_prob, torch.zeros(2, 2), mask=mask).tolist() == [[1, 0], [1, 1]]


def test_ranks_are_added() -> None:
    log_prob, ref_log_prob = torch.zeros(4, 2), -torch.arange(8.0).reshape(4, 2)
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    whole = kl_baseline(log_prob, ref_log_prob, mask=mask)
    to_go = kl_to_go(log_prob, ref_log_prob, mask=mask)

    def other_rank(total: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        return total + to_go[2:].sum(0), count + mask[2:].sum(0)

    half = kl_baseline(log_prob[:2], ref_log_prob[:2], mask=mask[:2], sum_over_ranks=other_rank)
    torch.testing.assert_close(half, whole[:2], rtol=0, atol=0)


def pair_gradients(sampler: Tensor, *, with_baseline: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Probability of each rollout of two, the gradient of its mean surrogate, and the truth."""
    logits = POLICY.clone().requires_grad_()
    log_prob, ref_log_prob = token_log_prob(logits), token_log_prob(REFERENCE)
    old_log_prob = token_log_prob(sampler)
    chance = sequence_prob(sampler)[ROWS].prod(-1)
    gradients = []
    for pair in ROWS:
        baseline = None
        if with_baseline:
            baseline = kl_baseline(old_log_prob[pair], ref_log_prob[pair], mask=MASK[pair])
        surrogate = kl_surrogate(
            log_prob[pair],
            ref_log_prob[pair],
            mask=MASK[pair],
            old_log_prob=old_log_prob[pair],
            baseline=baseline,
        )
        gradients.append(gradient(surrogate.sum(-1).mean(), logits))
    truth = gradient(sequence_kl(logits, REFERENCE), logits)
    return chance, torch.stack(gradients), truth


@pytest.mark.parametrize("sampler", [POLICY, OLD], ids=["on-policy", "off-policy"])
def test_the_gradient_stays_unbiased(sampler: Tensor) -> None:
    chance, gradients, truth = pair_gradients(sampler, with_baseline=True)
    mean = (chance[:, None, None] * gradients).sum(0)
    torch.testing.assert_close(mean, truth, rtol=0, atol=1e-9)


def test_the_gradient_has_less_noise() -> None:
    noise = {}
    for with_baseline in (False, True):
        chance, gradients, truth = pair_gradients(POLICY, with_baseline=with_baseline)
        squares = (gradients - truth).square().sum((1, 2))
        noise[with_baseline] = float((chance * squares).sum())
    # One other row of three tokens is a poor baseline, and already a gain.
    assert noise[True] < 0.9 * noise[False]


def test_the_longer_the_sequence_the_more_noise_is_taken() -> None:
    """16 rows of 24 independent tokens, whose KL to go runs from 24 times a token's to one."""
    rows, steps, rollouts = 16, 24, 400
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.tensor([1.0, 0.0, -1.0]), torch.tensor([-0.5, 0.5, 0.0])
    policy, reference = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    mask = torch.ones(rows, steps, dtype=torch.bool)
    gradients: dict[bool, list[Tensor]] = {False: [], True: []}
    for _ in range(rollouts):
        tokens = torch.multinomial(
            policy.exp(), rows * steps, replacement=True, generator=generator
        ).reshape(rows, steps)
        score = torch.nn.functional.one_hot(tokens, 3).float() - policy.exp()
        log_prob, ref_log_prob = policy[tokens].requires_grad_(), reference[tokens]
        baseline = kl_baseline(log_prob, ref_log_prob, mask=mask)
        for given, collected in gradients.items():
            surrogate = kl_surrogate(
                log_prob, ref_log_prob, mask=mask, baseline=baseline if given else None
            )
            (weight,) = torch.autograd.grad(surrogate.sum(-1).mean(), log_prob)
            collected.append((weight.unsqueeze(-1) * score).sum((0, 1)))
    without, taken = (torch.stack(gradients[given]) for given in (False, True))
    assert taken.var(0).sum() < 0.4 * without.var(0).sum()
    error = taken.mean(0) - without.mean(0)
    assert error.norm() < 4 * (without.var(0).sum() / rollouts).sqrt()
