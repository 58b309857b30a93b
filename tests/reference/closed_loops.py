"""Laws of safe_ops at work on small policies: what the tests and docs/stability.md simulate."""

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from safe_ops.controllers import EMA, EntropyGatedKL

REFERENCE = torch.sin(torch.arange(16, dtype=torch.float64) * 1.7)
REWARD = torch.cos(torch.arange(16, dtype=torch.float64) * 2.3)


def without_reward(
    law: EntropyGatedKL,
    effect: float,
    *,
    start: float,
    drift: float = 0.01,
    delay: int = 0,
    updates: int = 300,
    seen: float | None = None,
) -> list[float]:
    """KLs at the largest gate (entropy 0): each falls by effect times the coefficient.

    Before them the law has met the KL ``seen`` a hundred times: a filter of few values is a fast
    one, for which the gain may be too large.
    """
    state, kl, kls, waiting = law.init(), start, [], drift / effect
    if seen is not None:
        for _ in range(100):
            state = law.update(state, kl=seen, entropy=0.0, reward=0.0)
    for _ in range(updates):
        state = law.update(state, kl=kl, entropy=0.0, reward=0.0)
        coef = float(state.kl_coef)
        acting, waiting = (waiting, coef) if delay else (coef, coef)
        kl = max(0.0, kl + drift - effect * acting)
        kls.append(kl)
    return kls


def with_reward(
    law: EntropyGatedKL, *, noise: float, updates: int, seeds: int
) -> tuple[Tensor, Tensor]:
    """Phases and thresholds, [updates, seeds], where the reward is 1 - exp(-4 KL) and noise.

    Drift .01 and k = .8 coef; the reward rises by 1.2 per nat around .3 nats.
    """
    generator = torch.Generator().manual_seed(0)
    noises = noise * torch.randn(updates, seeds, generator=generator)
    state = tree_map(lambda leaf: leaf.expand(seeds, *leaf.shape), law.init())
    step = torch.func.vmap(
        lambda state, kl, reward: law.update(state, kl=kl, entropy=1.9, reward=reward)
    )
    kl, phases, thresholds = torch.zeros(seeds), [], []
    for x in noises:
        state = step(state, kl, 1 - torch.exp(-4 * kl) + x)
        kl = (kl + 0.01 - 0.4 * state.kl_coef).clamp(min=0)
        phases.append(state.phase)
        thresholds.append(state.kl_threshold)
    return torch.stack(phases), torch.stack(thresholds)


def late_switches(phases: Tensor) -> Tensor:
    """Changes of phase in the last half, by seed."""
    late = phases[len(phases) // 2 :]
    return (late[1:] != late[:-1]).sum(0)


def with_adam(
    coef: float, *, beta1: float, decay: float = 0.7, threshold: float = 0.3
) -> tuple[float, float]:
    """A policy over 16 choices under Adam and the penalty: the late swing of its exact KL, and k.

    k is read from the run: 2 coef lr sum (d KL / d theta)^2 / (sqrt(v) + eps), its late median.
    """
    learning_rate, beta2, eps = 0.01, 0.999, 1e-8
    logits = REFERENCE.clone().requires_grad_()
    adam = torch.optim.Adam([logits], lr=learning_rate, betas=(beta1, beta2), eps=eps)
    law = EMA(decay=decay)
    state, kls, gains = law.init(), [], []
    for _ in range(500):
        log_prob = logits.log_softmax(0)
        kl = (log_prob.exp() * (log_prob - REFERENCE.log_softmax(0))).sum()
        [kl_gradient] = torch.autograd.grad(kl, logits, retain_graph=True)
        [reward_gradient] = torch.autograd.grad(log_prob.exp() @ REWARD, logits)
        state = law.update(state, value=kl)
        slope = 2 * coef * max(0.0, float(state.value) - threshold)
        logits.grad = slope * kl_gradient - reward_gradient
        adam.step()
        record = adam.state[logits]
        spread = (record["exp_avg_sq"] / (1 - beta2 ** float(record["step"]))).sqrt() + eps
        kls.append(float(kl.detach()))
        gains.append(float(2 * coef * learning_rate * (kl_gradient.square() / spread).sum()))
    late = torch.tensor(kls[-150:])
    return float(late.max() - late.min()), float(torch.tensor(gains[-150:]).median())
