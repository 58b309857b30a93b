"""Against softmax written out in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from safe_ops import token_log_probs
from tests.strategies import PROPERTY, log_uniform, tensors

V = 5


def naive(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Both from the probabilities, token by token, in float64; 0 log 0 = 0."""
    log_prob = torch.empty(tokens.shape, dtype=torch.float64)
    entropy = torch.empty(tokens.shape, dtype=torch.float64)
    rows = zip(logits.reshape(-1, logits.shape[-1]).tolist(), tokens.flatten(), strict=True)
    for i, (row, token) in enumerate(rows):
        top = max(row)
        weights = [math.exp((logit - top) / temperature) for logit in row]
        total = math.fsum(weights)
        probs = [weight / total for weight in weights]
        chosen = probs[int(token)]
        log_prob.view(-1)[i] = math.log(chosen) if chosen > 0 else -math.inf
        entropy.view(-1)[i] = -sum(p * math.log(p) for p in probs if p > 0)
    return log_prob, entropy


logits_strategy = tensors(2, 3, V, low=-20.0, high=20.0)
tokens_strategy = st.lists(st.integers(0, V - 1), min_size=6, max_size=6).map(
    lambda flat: torch.tensor(flat).reshape(2, 3)
)


@PROPERTY
@given(logits_strategy, tokens_strategy, log_uniform(0.1, 10.0))
def test_log_probs_are_the_naive_ones(logits: Tensor, tokens: Tensor, temperature: float) -> None:
    found = token_log_probs(logits, tokens, temperature=temperature)
    log_prob, entropy = naive(logits, tokens, temperature)
    torch.testing.assert_close(found.log_prob, log_prob, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.entropy, entropy, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@PROPERTY
@given(data=st.data())
def test_log_probs_are_computed_in_float32(dtype: torch.dtype, data: st.DataObject) -> None:
    logits = data.draw(logits_strategy).to(dtype)
    tokens = data.draw(tokens_strategy)
    found = token_log_probs(logits, tokens)
    assert found.log_prob.dtype == found.entropy.dtype == torch.float32
    # The truth for the rounded logits: nothing further is lost in the lower dtype. 1.5e-5 is a few
    # units in the last place of a log-prob of 40.
    log_prob, entropy = naive(logits.double(), tokens)
    torch.testing.assert_close(found.log_prob, log_prob.float(), rtol=0, atol=1.5e-5)
    torch.testing.assert_close(found.entropy, entropy.float(), rtol=0, atol=2e-6)


def test_log_probs_of_a_large_bfloat16_vocabulary() -> None:
    logits = torch.sin(torch.arange(4 * 50_000.0)).mul(5).reshape(4, 50_000).bfloat16()
    tokens = torch.tensor([0, 17, 49_999, 25_000])
    found = token_log_probs(logits, tokens)
    log_prob, entropy = naive(logits.double(), tokens)
    torch.testing.assert_close(found.log_prob, log_prob.float(), rtol=0, atol=2e-5)
    torch.testing.assert_close(found.entropy, entropy.float(), rtol=0, atol=2e-5)
    # What a log-softmax in bfloat16 would have given.
    wrong = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    assert (wrong.double() - log_prob).abs().max() > 1e-3


def test_log_probs_by_hand() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0]])
    found = token_log_probs(logits, torch.tensor([1]))
    torch.testing.assert_close(found.log_prob, torch.tensor([-math.log(4.0)]))
    mean_surprise = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    torch.testing.assert_close(found.entropy, torch.tensor([mean_surprise]))
    # The entropy is of the distribution, not the surprise at the token that was drawn.
    assert found.entropy.item() != pytest.approx(-found.log_prob.item())


def test_log_probs_with_banned_tokens() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0], [1.0, -torch.inf, -torch.inf]])
    logits.requires_grad_()
    found = token_log_probs(logits, torch.tensor([0, 0]))
    torch.testing.assert_close(found.log_prob.tolist(), [-math.log(2.0), 0.0])
    torch.testing.assert_close(found.entropy.tolist(), [math.log(2.0), 0.0])
    (slope,) = torch.autograd.grad(found.log_prob.sum() + found.entropy.sum(), logits)
    assert slope.isfinite().all()
    assert (slope[logits == -torch.inf] == 0).all()
    banned = token_log_probs(logits, torch.tensor([1, 1])).log_prob
    assert (banned == -torch.inf).all()


def test_log_probs_at_a_temperature_with_banned_tokens() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0]], requires_grad=True)
    found = token_log_probs(logits, torch.tensor([2]), temperature=0.5)
    log_prob, entropy = naive(logits.detach(), torch.tensor([2]), 0.5)
    torch.testing.assert_close(found.log_prob, log_prob.float())
    torch.testing.assert_close(found.entropy, entropy.float())
    assert torch.autograd.grad(found.entropy.sum(), logits)[0].isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_gradcheck(temperature: float) -> None:
    logits = torch.sin(torch.arange(12.0, dtype=torch.float64)).reshape(2, 2, 3).requires_grad_()
    tokens = torch.tensor([[0, 2], [1, 1]])
    assert torch.autograd.gradcheck(
        lambda x: tuple(token_log_probs(x, tokens, temperature=temperature)), logits
    )


def test_log_probs_do_not_depend_on_a_shift_of_the_logits() -> None:
    logits = torch.sin(torch.arange(12.0, dtype=torch.float64)).reshape(4, 3)
    tokens = torch.tensor([0, 2, 1, 1])
    for a, b in zip(
        token_log_probs(logits, tokens), token_log_probs(logits + 100, tokens), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_entropy_of_large_float32_logits() -> None:
    logits = torch.tensor([[1.0, 0.5, -0.3, -2.0]]) + 1000
    tokens = torch.tensor([1])
    found = token_log_probs(logits, tokens)
    log_prob, entropy = naive(logits.double(), tokens)
    torch.testing.assert_close(found.log_prob, log_prob.float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.entropy, entropy.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (0,), (0, 7), (3, 0), (1, 1), (3, 5, 7)])
def test_log_probs_weird_shapes(shape: tuple[int, ...]) -> None:
    found = token_log_probs(torch.zeros(*shape, 11), torch.zeros(shape, dtype=torch.int64))
    assert found.log_prob.shape == found.entropy.shape == shape
    torch.testing.assert_close(found.entropy, torch.full(shape, math.log(11.0)))
