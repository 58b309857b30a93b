"""An autoregressive policy so small that every expectation over its sequences is a finite sum.

Three tokens, EOS among them, at most three of them a sequence: 7 prefixes that ask for a choice and
15 sequences. A policy is a table of logits, [7, 3], one row per prefix. Nothing here uses safe_ops.
"""

import itertools

import torch
from torch import Tensor

EOS = 0
VOCABULARY = 3
LENGTH = 3

PREFIXES: list[tuple[int, ...]] = [
    prefix
    for length in range(LENGTH)
    for prefix in itertools.product(range(1, VOCABULARY), repeat=length)
]
"""The states: nothing ended yet, room for one more token."""

SEQUENCES: list[tuple[int, ...]] = [
    (*prefix, token)
    for prefix in PREFIXES
    for token in range(VOCABULARY)
    if token == EOS or len(prefix) == LENGTH - 1
]
"""Those that ended with EOS, and those cut at the length limit."""

_LENGTHS = torch.tensor([len(sequence) for sequence in SEQUENCES])

MASK: Tensor = torch.arange(LENGTH) < _LENGTHS.unsqueeze(1)
"""bool [S, T], by position: padding is the EOS id too."""

TOKENS: Tensor = torch.tensor(
    [list(sequence) + [EOS] * (LENGTH - len(sequence)) for sequence in SEQUENCES]
)
"""int64 [S, T], right-padded with EOS."""

STATES: Tensor = torch.tensor(
    [
        [PREFIXES.index(sequence[:t]) if t < len(sequence) else 0 for t in range(LENGTH)]
        for sequence in SEQUENCES
    ]
)
"""int64 [S, T], the row of the table that each token was drawn from."""


def table(frequency: float, *, scale: float = 1.5) -> Tensor:
    """A fixed irregular table, [7, 3] float64; another frequency is another policy."""
    count = len(PREFIXES) * VOCABULARY
    angles = torch.arange(1, count + 1, dtype=torch.float64) * frequency
    return scale * torch.sin(angles).reshape(len(PREFIXES), VOCABULARY)


def token_log_prob(logits: Tensor, *, padding: float = 0.0) -> Tensor:
    """Log-probability of every token of every sequence, [S, T]; ``padding`` behind the end."""
    log_probs = logits - logits.exp().sum(-1, keepdim=True).log()
    return torch.where(MASK, log_probs[STATES, TOKENS], torch.tensor(padding, dtype=logits.dtype))


def sequence_prob(logits: Tensor) -> Tensor:
    """Probability of every sequence, [S]; sums to 1."""
    return token_log_prob(logits).sum(-1).exp()


def expectation(per_sequence: Tensor, sampler: Tensor) -> Tensor:
    """Mean of [S] over the sequences that ``sampler``, a table, draws. The draw is not
    differentiated: this is what averaging a loss over infinitely many rollouts gives."""
    return (sequence_prob(sampler).detach() * per_sequence).sum()


def mean_length(sampler: Tensor) -> Tensor:
    """Expected number of tokens, 0-d, detached."""
    return expectation(MASK.sum(-1).to(sampler.dtype), sampler)


def sequence_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL of whole sequences by its definition, 0-d, nats; differentiable also through the draw."""
    prob, ref_prob = sequence_prob(logits), sequence_prob(ref_logits)
    return (prob * (prob.log() - ref_prob.log())).sum()


def choice_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL of the single choice at every prefix, [7], nats."""
    prob, ref_prob = logits.softmax(-1), ref_logits.softmax(-1)
    return (prob * (prob.log() - ref_prob.log())).sum(-1)


def prefix_prob(sampler: Tensor) -> Tensor:
    """Probability that a sequence passes through every prefix, [7], detached."""
    prob = sampler.detach().softmax(-1)
    reached = []
    for prefix in PREFIXES:
        chance = torch.ones((), dtype=sampler.dtype)
        for t, token in enumerate(prefix):
            chance = chance * prob[PREFIXES.index(prefix[:t]), token]
        reached.append(chance)
    return torch.stack(reached)


def gradient(value: Tensor, logits: Tensor) -> Tensor:
    """Gradient in the table, zeros where the value does not depend on it."""
    if not value.requires_grad:
        return torch.zeros_like(logits)
    (found,) = torch.autograd.grad(value, logits, allow_unused=True, retain_graph=True)
    return torch.zeros_like(logits) if found is None else found
