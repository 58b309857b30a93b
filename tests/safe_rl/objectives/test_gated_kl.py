"""The gradient of the penalty, against autograd through the exact KL of an enumerable policy."""

import itertools

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.testing import assert_close

from safe_ops import fill_masked, gated_kl_penalty, kl_surrogate_token
from safe_ops.controllers import Controller, EntropyGatedKL
from safe_rl import ControllerModule, GatedKLLoss, PolicyMeasurements, TokenKLLoss
from tests.safe_rl.objectives.batches import make_batch

EOS, VOCABULARY, STEPS = 0, 3, 3
TOLERANCE = {"rtol": 0, "atol": 1e-9}


def sequences() -> list[tuple[int, ...]]:
    """All of them: up to the EOS, or three tokens without one."""
    ended = [
        (*body, EOS) for length in range(STEPS) for body in itertools.product((1, 2), repeat=length)
    ]
    return ended + list(itertools.product((1, 2), repeat=STEPS))


PREFIXES = [body for n in range(STEPS) for body in itertools.product((1, 2), repeat=n)]


def logits(seed: int, scale: float = 1.0) -> Tensor:
    """A policy: logits for each prefix."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(len(PREFIXES), VOCABULARY, generator=generator, dtype=torch.float64)


def token_table(policy: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob of each token of each sequence, [S, STEPS], and the mask."""
    log_probs = policy.log_softmax(-1)
    table, mask = [], torch.zeros(len(sequences()), STEPS, dtype=torch.bool)
    for row, sequence in enumerate(sequences()):
        mask[row, : len(sequence)] = True
        tokens = [
            log_probs[PREFIXES.index(sequence[:t]), token] for t, token in enumerate(sequence)
        ]
        table.append(torch.stack(tokens + [policy.new_zeros(())] * (STEPS - len(sequence))))
    return torch.stack(table), mask


def exact_kl(policy: Tensor, reference: Tensor) -> Tensor:
    """KL of whole sequences in nats, by its definition: no weights, no estimate."""
    log_p, _ = token_table(policy)
    log_q, _ = token_table(reference)
    return (log_p.sum(1).exp() * (log_p - log_q).sum(1)).sum()


def expected_loss(
    policy: Tensor, old: Tensor, reference: Tensor, coef: Tensor, tokens_mean: Tensor, **arguments
) -> Tensor:
    """The loss's expectation under the old policy: each row weighs as often as it is drawn."""
    log_prob, mask = token_table(policy)
    old_log_prob, _ = token_table(old)
    ref_log_prob, _ = token_table(reference)
    rows = len(mask)
    drawn = old_log_prob.sum(1).exp().detach()
    batch = TensorDict(
        {
            "log_prob": log_prob,
            "old_log_prob": old_log_prob.detach(),
            "ref_log_prob": ref_log_prob.detach(),
            "response_mask": mask,
            "response_tokens_mean": tokens_mean.expand(rows),
            "kl_coef": rows * drawn * coef,
        },
        [rows],
    )
    return GatedKLLoss(**arguments)(batch)["loss_kl"]


def bare_k1(log_prob, ref_log_prob, *, mask, old_log_prob, baseline):
    return fill_masked(log_prob - ref_log_prob, mask)


THRESHOLD, GATE, LEAD = 0.05, 1.3, 0.04


def scenario(off_policy: bool):
    """Policy, old policy, reference, mean length; the penalty of the KL per token and f'."""
    policy, reference = logits(1).requires_grad_(), logits(2)
    old = logits(3) if off_policy else policy.detach()
    log_old, mask = token_table(old)
    tokens_mean = (log_old.sum(1).exp() * mask.sum(1)).sum()
    kl = (exact_kl(policy, reference) / tokens_mean).detach().requires_grad_()
    penalty = gated_kl_penalty(kl, threshold=THRESHOLD, gate=GATE, lead=LEAD)
    (slope,) = torch.autograd.grad(penalty, kl)
    return policy, old, reference, tokens_mean, penalty.detach(), slope


def test_the_enumeration_is_complete():
    log_prob, _ = token_table(logits(1))
    assert_close(log_prob.sum(1).exp().sum(), torch.tensor(1.0, dtype=torch.float64), **TOLERANCE)


@pytest.mark.parametrize("off_policy", [False, True])
def test_gradient_is_that_of_the_penalty_on_the_exact_kl(off_policy):
    policy, old, reference, tokens_mean, _, slope = scenario(off_policy)
    penalty = gated_kl_penalty(
        exact_kl(policy, reference) / tokens_mean, threshold=THRESHOLD, gate=GATE, lead=LEAD
    )
    (expected,) = torch.autograd.grad(penalty, policy)
    assert expected.abs().max() > 0.01
    loss = expected_loss(policy, old, reference, slope, tokens_mean)
    (gradient,) = torch.autograd.grad(loss, policy)
    assert_close(gradient, expected, **TOLERANCE)
    assert_close(loss.detach(), slope * exact_kl(policy, reference).detach() / tokens_mean)


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("mistake", ["penalty for its slope", "bare k1", "weight of one token"])
def test_the_usual_mistakes_have_another_gradient(mistake, off_policy):
    policy, old, reference, tokens_mean, penalty, slope = scenario(off_policy)
    right = expected_loss(policy, old, reference, slope, tokens_mean)
    (expected,) = torch.autograd.grad(right, policy)
    coef = penalty if mistake == "penalty for its slope" else slope
    surrogates = {"bare k1": bare_k1, "weight of one token": kl_surrogate_token}
    wrong = expected_loss(
        policy,
        old,
        reference,
        coef,
        tokens_mean,
        **({"surrogate": surrogates[mistake]} if mistake in surrogates else {}),
    )
    (gradient,) = torch.autograd.grad(wrong, policy)
    assert (gradient - expected).abs().max() > 0.1 * expected.abs().max()
    if mistake == "bare k1" and not off_policy:
        # Its expected gradient is zero: the penalty would be inert.
        assert_close(gradient, torch.zeros_like(gradient), **TOLERANCE)


def test_below_the_threshold_nothing_is_felt():
    policy, old, reference, tokens_mean, *_ = scenario(False)
    loss = expected_loss(policy, old, reference, torch.zeros(()), tokens_mean)
    assert not torch.autograd.grad(loss, policy)[0].any()


def law_batch(kl: float) -> TensorDict:
    """A rollout whose measured KL is ``kl`` nats per token."""
    batch = make_batch()
    batch["score"] = torch.zeros(len(batch), dtype=torch.float64)
    batch["ref_log_prob"] = batch["old_log_prob"] - kl
    return batch


def gradient_after_a_rising_kl(horizon: float) -> Tensor:
    law = EntropyGatedKL(horizon=horizon)
    controlled = ControllerModule(Controller(law), out_keys={"kl_coef": "kl_coef"})
    measure = PolicyMeasurements()
    batch = make_batch()
    for kl in (0.4, 0.5, 0.6, 0.7):
        batch = controlled(measure(law_batch(kl)))
    log_prob = batch["log_prob"].requires_grad_()
    return torch.autograd.grad(GatedKLLoss()(batch)["loss_kl"], log_prob)[0]


def test_momentum_changes_the_gradient():
    without, ahead = gradient_after_a_rising_kl(0.0), gradient_after_a_rising_kl(10.0)
    assert without.any()
    assert (ahead.abs() > 1.2 * without.abs())[without != 0].all()
    still = gradient_after_a_rising_kl(5.0)
    assert ((without.abs() < still.abs()) & (still.abs() < ahead.abs()))[without != 0].all()


@pytest.mark.parametrize("shape", [(), (4,), (4, 1), (4, 5), (4, 5, 1)])
def test_a_coefficient_of_any_shape(shape):
    batch = make_batch()
    expected = GatedKLLoss()(batch)["loss_kl"]
    given = {key: value for key, value in batch.items() if key != "kl_coef"}
    given["kl_coef"] = torch.full(shape, 0.7, dtype=torch.float64)
    loss = GatedKLLoss()(TensorDict(given, []))["loss_kl"]
    assert_close(loss, expected)


def test_measured_kl_by_hand():
    batch = make_batch()
    mask = batch["response_mask"]
    log_ratio = (batch["log_prob"] - batch["ref_log_prob"])[mask]
    result = GatedKLLoss()(batch)
    assert_close(result["kl_k1_nats_per_token"], log_ratio.mean())
    assert_close(result["kl_k3_nats_per_token"], ((-log_ratio).exp() - 1 + log_ratio).mean())


def test_frames_have_no_sequence_kl():
    frames = make_batch().select(*GatedKLLoss().in_keys).exclude("response_tokens_mean")[0]
    with pytest.raises(ValueError, match=r"must be \[B, T\], got \(5,\).*kl_surrogate_token"):
        GatedKLLoss()(frames)
    assert GatedKLLoss(surrogate=kl_surrogate_token)(frames)["loss_kl"] != 0


def test_what_acts_is_beside_the_loss():
    batch = make_batch()
    result = GatedKLLoss()(batch)
    assert_close(result["kl_coef_mean"].item(), 0.7)
    assert_close(result["entropy_gate_mean"].item(), 1.5)
    assert GatedKLLoss()(batch.exclude("entropy_gate"))["entropy_gate_mean"] == 1


def test_token_kl_by_hand():
    batch = make_batch()
    mask = batch["response_mask"]
    batch["kl_threshold"] = torch.full((4,), 0.5, dtype=torch.float64)
    batch["ref_log_prob"] = torch.full((4, 5), -3.0, dtype=torch.float64)
    # Over the threshold by .5 in the first row, under it or at it elsewhere.
    batch["log_prob"] = torch.tensor([[-2.0], [-2.5], [-3.0], [-9.0]]).double().repeat(1, 5)
    log_prob = batch["log_prob"].requires_grad_()
    result = TokenKLLoss(token_kl_coef=0.2)(batch)
    share = mask[0].sum() / mask.sum()
    assert_close(result["loss_token_kl"].item(), (1.5 * 0.2 * 0.25 * share).item())
    assert_close(result["token_kl_active_fraction"].item(), share.item())
    (gradient,) = torch.autograd.grad(result["loss_token_kl"], log_prob)
    assert (gradient[0] > 0).all()
    assert not gradient[1:].any()


def test_token_kl_coefficient():
    with pytest.raises(ValueError, match="token_kl_coef must not be negative"):
        TokenKLLoss(token_kl_coef=-1.0)
    loss, batch = TokenKLLoss(), make_batch()
    before = loss(batch)["loss_token_kl"]
    loss.token_kl_coef = 0.2
    assert_close(loss(batch)["loss_token_kl"], 2 * before)
