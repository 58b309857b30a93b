"""Against exact sums over every sequence of an enumerable policy; equality is 1e-9 in float64."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given
from torch import Tensor

from safe_ops import (
    gated_kl_penalty,
    kl_exact,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_shaped_reward,
    kl_surrogate,
    kl_surrogate_token,
)
from tests.reference.enumerable_policy import (
    LENGTH,
    MASK,
    PREFIXES,
    SEQUENCES,
    STATES,
    TOKENS,
    VOCABULARY,
    choice_kl,
    expectation,
    gradient,
    mean_length,
    prefix_prob,
    sequence_kl,
    sequence_prob,
    table,
    token_log_prob,
)
from tests.strategies import PROPERTY, tensors

EXACT = {"rtol": 0.0, "atol": 1e-9}
tables = tensors(len(PREFIXES), VOCABULARY, low=-3.0, high=3.0)
choices = tensors(VOCABULARY, low=-3.0, high=3.0)

POLICY, OLD, REFERENCE = table(1.0), table(1.7), table(2.9)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, **EXACT)


def policy_and_log_prob(logits: Tensor, padding: float = 0.0) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    return logits, token_log_prob(logits, padding=padding)


def test_reference_policy_is_a_distribution() -> None:
    assert len(PREFIXES) == 7
    assert len(SEQUENCES) == 15
    assert max(map(len, SEQUENCES)) == LENGTH
    torch.testing.assert_close(sequence_prob(POLICY).sum().item(), 1.0)
    # The chain rule of the KL joins the two exact forms.
    chained = (prefix_prob(POLICY) * choice_kl(POLICY, REFERENCE)).sum()
    torch.testing.assert_close(sequence_kl(POLICY, REFERENCE), chained)


# --- the surrogate of the sequence KL -----------------------------------------------------------


@PROPERTY
@given(tables, tables)
@example(POLICY, REFERENCE)
def test_kl_surrogate_on_policy_is_the_sequence_kl(policy: Tensor, reference: Tensor) -> None:
    logits, log_prob = policy_and_log_prob(policy)
    surrogate = kl_surrogate(log_prob, token_log_prob(reference), mask=MASK)
    value = expectation(surrogate.sum(-1), logits)
    truth = sequence_kl(logits, reference)
    torch.testing.assert_close(value, truth, **EXACT)
    torch.testing.assert_close(gradient(value, logits), gradient(truth, logits), **EXACT)


@PROPERTY
@given(tables, tables, tables)
@example(POLICY, OLD, REFERENCE)
def test_kl_surrogate_off_policy_is_the_sequence_kl(
    policy: Tensor, old: Tensor, reference: Tensor
) -> None:
    logits, log_prob = policy_and_log_prob(policy)
    surrogate = kl_surrogate(
        log_prob, token_log_prob(reference), mask=MASK, old_log_prob=token_log_prob(old)
    )
    value = expectation(surrogate.sum(-1), old)
    truth = sequence_kl(logits, reference)
    torch.testing.assert_close(value, truth, **EXACT)
    torch.testing.assert_close(gradient(value, logits), gradient(truth, logits), **EXACT)


def test_kl_surrogate_off_policy_without_old_log_prob_is_not_the_sequence_kl() -> None:
    logits, log_prob = policy_and_log_prob(POLICY)
    surrogate = kl_surrogate(log_prob, token_log_prob(REFERENCE), mask=MASK)
    value = expectation(surrogate.sum(-1), OLD)
    truth = sequence_kl(logits, REFERENCE)
    assert not close(value, truth)
    assert not close(gradient(value, logits), gradient(truth, logits))


def test_kl_surrogate_without_the_eos_is_not_the_sequence_kl() -> None:
    ended = torch.tensor([sequence[-1] == 0 for sequence in SEQUENCES])
    last = MASK & ~torch.cat([MASK[:, 1:], torch.zeros(len(SEQUENCES), 1).bool()], 1)
    logits, log_prob = policy_and_log_prob(POLICY)
    without_eos = MASK & ~(last & ended.unsqueeze(1))
    surrogate = kl_surrogate(log_prob, token_log_prob(REFERENCE), mask=without_eos)
    value = expectation(surrogate.sum(-1), logits)
    assert not close(value, sequence_kl(logits, REFERENCE))


prefix_values = tensors(len(PREFIXES), low=-5.0, high=5.0)


@PROPERTY
@given(tables, tables, tables, prefix_values)
@example(POLICY, OLD, REFERENCE, torch.arange(7.0, dtype=torch.float64))
def test_kl_surrogate_with_any_baseline_of_the_prefix_is_the_sequence_kl(
    policy: Tensor, old: Tensor, reference: Tensor, of_prefix: Tensor
) -> None:
    logits, log_prob = policy_and_log_prob(policy)
    truth = sequence_kl(logits, reference)
    for sampler in (policy, old):
        surrogate = kl_surrogate(
            log_prob,
            token_log_prob(reference),
            mask=MASK,
            old_log_prob=token_log_prob(sampler),
            baseline=of_prefix[STATES],
        )
        value = expectation(surrogate.sum(-1), sampler)
        torch.testing.assert_close(value, truth, **EXACT)
        torch.testing.assert_close(gradient(value, logits), gradient(truth, logits), **EXACT)


def test_kl_surrogate_with_a_baseline_of_the_token_is_not_the_sequence_kl() -> None:
    logits, log_prob = policy_and_log_prob(POLICY)
    surrogate = kl_surrogate(
        log_prob, token_log_prob(REFERENCE), mask=MASK, baseline=TOKENS.double()
    )
    value = expectation(surrogate.sum(-1), logits)
    assert not close(gradient(value, logits), gradient(sequence_kl(logits, REFERENCE), logits))


@pytest.mark.parametrize("decay", [0.0, 0.6, 1.0])
def test_kl_surrogate_on_policy_weighs_by_the_decayed_kl_to_go_over_the_baseline(
    decay: float,
) -> None:
    _, log_prob = policy_and_log_prob(POLICY)
    log_prob = log_prob.detach().requires_grad_()
    ref_log_prob = token_log_prob(REFERENCE)
    baseline = table(0.3).sum(-1)[STATES]
    surrogate = kl_surrogate(log_prob, ref_log_prob, mask=MASK, baseline=baseline, decay=decay)
    (found,) = torch.autograd.grad(surrogate.sum(), log_prob)
    k1 = torch.where(MASK, log_prob.detach() - ref_log_prob, 0.0)
    for row in range(len(SEQUENCES)):
        for t in range(int(MASK[row].sum())):
            to_go = sum(decay ** (u - t) * k1[row, u] for u in range(t, LENGTH))
            torch.testing.assert_close(found[row, t], 1 + to_go - baseline[row, t], **EXACT)


def test_kl_surrogate_decay_is_checked() -> None:
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got 1.5"):
        kl_surrogate(torch.zeros(1, 1), torch.zeros(1, 1), mask=torch.ones(1, 1).bool(), decay=1.5)


def test_kl_surrogate_baseline_of_another_shape_is_shown() -> None:
    with pytest.raises(ValueError, match=r"baseline must .*\(1, 2\) and \(1, 1\)"):
        kl_surrogate(
            torch.zeros(1, 1),
            torch.zeros(1, 1),
            mask=torch.ones(1, 1).bool(),
            baseline=torch.zeros(1, 2),
        )


def test_kl_surrogate_token_with_a_baseline_of_one_has_the_gradient_of_k2() -> None:
    _, log_prob = policy_and_log_prob(POLICY)
    ref_log_prob = token_log_prob(REFERENCE)
    one = torch.ones_like(log_prob)
    surrogate = kl_surrogate_token(log_prob, ref_log_prob, mask=MASK, baseline=one)
    k2 = torch.where(MASK, kl_k2(log_prob, ref_log_prob), 0.0)
    found = torch.autograd.grad(surrogate.sum(), log_prob, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(k2.sum(), log_prob), **EXACT)


@PROPERTY
@given(tables, tables, tables)
@example(POLICY, OLD, REFERENCE)
def test_kl_surrogate_token_is_the_kl_of_the_choices_with_prefixes_held(
    policy: Tensor, old: Tensor, reference: Tensor
) -> None:
    logits, log_prob = policy_and_log_prob(policy)
    surrogate = kl_surrogate_token(
        log_prob, token_log_prob(reference), mask=MASK, old_log_prob=token_log_prob(old)
    )
    value = expectation(surrogate.sum(-1), old)
    truth = (prefix_prob(old) * choice_kl(logits, reference)).sum()
    torch.testing.assert_close(value, truth, **EXACT)
    torch.testing.assert_close(gradient(value, logits), gradient(truth, logits), **EXACT)


def test_kl_surrogate_token_on_policy_has_the_value_and_not_the_gradient() -> None:
    logits, log_prob = policy_and_log_prob(POLICY)
    surrogate = kl_surrogate_token(log_prob, token_log_prob(REFERENCE), mask=MASK)
    value = expectation(surrogate.sum(-1), logits)
    truth = sequence_kl(logits, REFERENCE)
    torch.testing.assert_close(value, truth, **EXACT)
    missed = gradient(value, logits) - gradient(truth, logits)
    # What is missing is the effect on later tokens: of the same order as the gradient, and nothing
    # where no token can follow.
    assert missed.norm() > 0.1 * gradient(truth, logits).norm()
    last_choices = torch.tensor([len(prefix) == LENGTH - 1 for prefix in PREFIXES])
    torch.testing.assert_close(missed[last_choices], torch.zeros(4, 3).double(), **EXACT)


def test_kl_surrogates_agree_on_one_choice() -> None:
    log_prob, ref, old = (torch.randn(5, 1, generator=torch.manual_seed(0)) for _ in range(3))
    mask = torch.ones(5, 1).bool()
    torch.testing.assert_close(
        kl_surrogate(log_prob, ref, mask=mask, old_log_prob=old),
        kl_surrogate_token(log_prob, ref, mask=mask, old_log_prob=old),
    )


@pytest.mark.parametrize("surrogate", [kl_surrogate, kl_surrogate_token])
@pytest.mark.parametrize("padding", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_kl_surrogate_ignores_padding(surrogate: Callable[..., Tensor], padding: float) -> None:
    def run(fill: float) -> tuple[Tensor, Tensor]:
        _, log_prob = policy_and_log_prob(POLICY, padding=fill)
        ref, old = token_log_prob(REFERENCE, padding=fill), token_log_prob(OLD, padding=fill)
        terms = surrogate(log_prob, ref, mask=MASK, old_log_prob=old)
        return terms, torch.autograd.grad(terms.sum(), log_prob)[0]

    for found, expected in zip(run(padding), run(0.0), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert (found[~MASK] == 0).all()


@pytest.mark.parametrize("surrogate", [kl_surrogate, kl_surrogate_token])
def test_kl_surrogate_is_exactly_zero_at_the_reference(surrogate: Callable[..., Tensor]) -> None:
    log_prob = token_log_prob(POLICY).float()
    assert (surrogate(log_prob, log_prob, mask=MASK, old_log_prob=log_prob) == 0).all()


def test_kl_surrogate_differentiates_the_policy_alone() -> None:
    _, log_prob = policy_and_log_prob(POLICY)
    ref, old = token_log_prob(REFERENCE), token_log_prob(OLD)
    ref.requires_grad_()
    old.requires_grad_()
    kl_surrogate(log_prob, ref, mask=MASK, old_log_prob=old).sum().backward()
    assert ref.grad is None
    assert old.grad is None


@pytest.mark.parametrize("surrogate", [kl_surrogate, kl_surrogate_token])
def test_kl_surrogate_gradcheck(surrogate: Callable[..., Tensor]) -> None:
    log_prob = token_log_prob(POLICY).requires_grad_()
    ref, old = token_log_prob(REFERENCE), token_log_prob(OLD)
    assert torch.autograd.gradcheck(
        lambda x: surrogate(x, ref, mask=MASK, old_log_prob=old), log_prob
    )


def test_kl_surrogate_weights_by_hand() -> None:
    log_prob = torch.tensor([[-1.0, -2.0, -1.0]])
    old = torch.tensor([[-1.5, -1.0, -1.0]])
    ref = torch.tensor([[-2.0, -2.5, -4.0]])
    mask = torch.tensor([[True, True, False]])
    ratios = torch.tensor([[0.5, -1.0, 0.0]]).exp()
    by_token = kl_surrogate_token(log_prob, ref, mask=mask, old_log_prob=old)
    torch.testing.assert_close(by_token, ratios * torch.tensor([[1.0, 0.5, 0.0]]))
    by_prefix = kl_surrogate(log_prob, ref, mask=mask, old_log_prob=old)
    expected = torch.tensor([[0.5, -0.5, 0.0]]).exp() * torch.tensor([[1.0, 0.5, 0.0]])
    torch.testing.assert_close(by_prefix, expected)


# --- the penalty's gradient through kl_coef -----------------------------------------------------

PENALTY = {"threshold": 0.05, "gate": 1.7, "coef": 0.1}
LEAD = 0.04


def penalty_gradient(lead: float) -> Tensor:
    """f'(KL)/N grad KL, with f' by hand: 2 g c (KL + lead - threshold)+."""
    logits = POLICY.clone().requires_grad_()
    tokens = mean_length(POLICY)
    truth = sequence_kl(logits, REFERENCE)
    excess = (truth.item() / tokens.item()) + lead - PENALTY["threshold"]
    assert excess > 0
    return 2 * PENALTY["gate"] * PENALTY["coef"] * excess / tokens * gradient(truth, logits)


def kl_coef(kl_per_token: Tensor, lead: float) -> Tensor:
    """What a controller hands to the objective: the slope of the penalty at the rollout's KL."""
    kl = kl_per_token.detach().clone().requires_grad_()
    return torch.autograd.grad(gated_kl_penalty(kl, lead=lead, **PENALTY), kl)[0]


def loss_gradient(loss: Callable[[Tensor, Tensor, Tensor], Tensor], sampler: Tensor) -> Tensor:
    """Expected gradient of a loss of (log_prob, ref_log_prob, KL per token), a value per token."""
    logits, log_prob = policy_and_log_prob(POLICY)
    tokens = mean_length(POLICY)
    kl_per_token = sequence_kl(POLICY, REFERENCE) / tokens
    per_token = loss(log_prob, token_log_prob(REFERENCE), kl_per_token)
    return gradient(expectation(per_token.sum(-1), sampler) / tokens, logits)


def test_kl_coef_times_surrogate_has_the_gradient_of_the_penalty() -> None:
    found = loss_gradient(
        lambda log_prob, ref, kl: kl_coef(kl, LEAD) * kl_surrogate(log_prob, ref, mask=MASK),
        POLICY,
    )
    torch.testing.assert_close(found, penalty_gradient(LEAD), **EXACT)
    # The same by differentiating the penalty of the exact KL, with the mean length held.
    logits = POLICY.clone().requires_grad_()
    kl = sequence_kl(logits, REFERENCE) / mean_length(POLICY)
    torch.testing.assert_close(
        found, gradient(gated_kl_penalty(kl, lead=LEAD, **PENALTY), logits), **EXACT
    )


def test_kl_coef_times_surrogate_has_the_gradient_of_the_penalty_after_a_policy_change() -> None:
    old = token_log_prob(OLD)
    found = loss_gradient(
        lambda log_prob, ref, kl: (
            kl_coef(kl, LEAD) * kl_surrogate(log_prob, ref, mask=MASK, old_log_prob=old)
        ),
        OLD,
    )
    torch.testing.assert_close(found, penalty_gradient(LEAD), **EXACT)


def float_penalty(log_prob: Tensor, ref: Tensor, kl: Tensor) -> Tensor:
    """The reference code's: a number made with .item(), whatever it is worth."""
    return torch.full_like(ref, gated_kl_penalty(kl, lead=LEAD, **PENALTY).item())


def bare_k1(log_prob: Tensor, ref: Tensor, kl: Tensor) -> Tensor:
    return kl_coef(kl, LEAD) * MASK * kl_k1(log_prob, ref)


def lead_left_out(log_prob: Tensor, ref: Tensor, kl: Tensor) -> Tensor:
    return kl_coef(kl, 0.0) * kl_surrogate(log_prob, ref, mask=MASK)


def weight_per_token(log_prob: Tensor, ref: Tensor, kl: Tensor) -> Tensor:
    return kl_coef(kl, LEAD) * kl_surrogate_token(log_prob, ref, mask=MASK)


@pytest.mark.parametrize("wrong", [float_penalty, bare_k1, lead_left_out, weight_per_token])
def test_comparison_catches(wrong: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    truth = penalty_gradient(LEAD)
    error = loss_gradient(wrong, POLICY) - truth
    assert error.norm() > 0.05 * truth.norm()
    if wrong in (float_penalty, bare_k1):  # no control at all, not merely too little
        torch.testing.assert_close(error, -truth, **EXACT)


# --- estimates of one choice --------------------------------------------------------------------


def estimate_of_choice(
    estimate: Callable[[Tensor, Tensor], Tensor], policy: Tensor, reference: Tensor
) -> tuple[Tensor, Tensor]:
    """Expected value and expected gradient over the tokens of one choice."""
    logits = policy.clone().requires_grad_()
    per_token = estimate(logits.log_softmax(-1), reference.log_softmax(-1))
    value = (policy.softmax(-1) * per_token).sum()
    return value.detach(), gradient(value, logits)


@PROPERTY
@given(choices, choices)
def test_k1_measures_and_does_not_train(policy: Tensor, reference: Tensor) -> None:
    value, slope = estimate_of_choice(kl_k1, policy, reference)
    torch.testing.assert_close(value, choice_kl(policy, reference), **EXACT)
    torch.testing.assert_close(slope, torch.zeros(VOCABULARY).double(), **EXACT)


@PROPERTY
@given(choices, choices)
def test_k2_has_the_gradient_of_the_kl(policy: Tensor, reference: Tensor) -> None:
    logits = policy.clone().requires_grad_()
    _, slope = estimate_of_choice(kl_k2, policy, reference)
    torch.testing.assert_close(slope, gradient(choice_kl(logits, reference), logits), **EXACT)


@PROPERTY
@given(choices, choices)
def test_k3_measures_and_has_the_gradient_of_the_other_direction(
    policy: Tensor, reference: Tensor
) -> None:
    logits = policy.clone().requires_grad_()
    value, slope = estimate_of_choice(kl_k3, policy, reference)
    torch.testing.assert_close(value, choice_kl(policy, reference), **EXACT)
    torch.testing.assert_close(slope, gradient(choice_kl(reference, logits), logits), **EXACT)


@PROPERTY
@given(tensors(4, low=-20.0, high=0.0), tensors(4, low=-20.0, high=0.0))
def test_k2_and_k3_are_never_negative(log_prob: Tensor, ref: Tensor) -> None:
    assert (kl_k2(log_prob, ref) >= 0).all()
    assert (kl_k3(log_prob, ref) >= 0).all()


def test_k3_of_a_small_ratio_keeps_its_digits_in_float32() -> None:
    # exp(-r) - 1 + r written out is 0 or 1e-7 here; the truth is r^2 / 2.
    ratio = torch.tensor([1e-2])
    truth = (torch.exp(-ratio.double()) - 1 + ratio.double()).float()
    torch.testing.assert_close(kl_k3(ratio, torch.zeros(1)), truth, rtol=1e-4, atol=0)


def test_estimates_by_hand() -> None:
    log_prob, ref = torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -1.0])
    torch.testing.assert_close(kl_k1(log_prob, ref), torch.tensor([1.0, -2.0]))
    torch.testing.assert_close(kl_k2(log_prob, ref), torch.tensor([0.5, 2.0]))
    # e^-1 - 1 + 1 and e^2 - 1 - 2
    torch.testing.assert_close(kl_k3(log_prob, ref), torch.tensor([0.36787944, 4.3890561]))


# --- the exact divergence -----------------------------------------------------------------------


@PROPERTY
@given(tables, tables)
def test_kl_exact_is_the_sum_over_the_vocabulary(policy: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(kl_exact(policy, reference), choice_kl(policy, reference), **EXACT)


def test_kl_exact_gradcheck() -> None:
    policy, reference = POLICY.clone().requires_grad_(), REFERENCE.clone().requires_grad_()
    assert torch.autograd.gradcheck(kl_exact, (policy, reference))


def test_kl_exact_with_banned_tokens() -> None:
    half = torch.tensor([0.0, 0.0, -torch.inf], requires_grad=True)
    third = torch.zeros(3)
    divergence = kl_exact(half, third)
    torch.testing.assert_close(divergence.item(), 0.4054651, rtol=1e-6, atol=0)  # log 3/2
    (slope,) = torch.autograd.grad(divergence, half)
    assert slope.isfinite().all()
    assert kl_exact(half, half).item() == 0
    assert kl_exact(third, half).item() == torch.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kl_exact_computes_in_float32(dtype: torch.dtype) -> None:
    policy, reference = POLICY.to(dtype), REFERENCE.to(dtype)
    found = kl_exact(policy, reference)
    assert found.dtype == torch.float32
    truth = choice_kl(policy.double(), reference.double()).float()
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-6)


# --- the KL in the reward -----------------------------------------------------------------------


def test_kl_shaped_reward_by_hand_and_detached() -> None:
    reward = torch.tensor([[0.0, 1.0, torch.nan]])
    log_prob = torch.tensor([[-1.0, -2.0, torch.nan]], requires_grad=True)
    ref = torch.tensor([[-1.5, -1.0, torch.nan]])
    mask = torch.tensor([[True, True, False]])
    shaped = kl_shaped_reward(reward, log_prob, ref, mask=mask, coef=torch.tensor(0.2))
    torch.testing.assert_close(shaped, torch.tensor([[-0.1, 1.2, 0.0]]))
    assert not shaped.requires_grad


def test_policy_gradient_of_the_shaped_reward_is_that_of_the_sequence_kl() -> None:
    logits, log_prob = policy_and_log_prob(POLICY)
    shaped = kl_shaped_reward(
        torch.zeros_like(log_prob), log_prob, token_log_prob(REFERENCE), mask=MASK, coef=0.3
    )
    to_go = shaped.flip(-1).cumsum(-1).flip(-1)
    objective = expectation((to_go * log_prob * MASK).sum(-1), logits)
    truth = -0.3 * sequence_kl(logits, REFERENCE)
    torch.testing.assert_close(gradient(objective, logits), gradient(truth, logits), **EXACT)
