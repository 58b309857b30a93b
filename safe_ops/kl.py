"""Divergence from the reference policy: estimates, the exact value, and what to differentiate."""

import torch
from torch import Tensor

from safe_ops.masked import fill_masked


def _check_shapes(log_prob: Tensor, ref_log_prob: Tensor) -> None:
    if log_prob.shape != ref_log_prob.shape:
        raise ValueError(
            "log_prob and ref_log_prob must have one shape, got "
            f"{tuple(log_prob.shape)} and {tuple(ref_log_prob.shape)}"
        )


def kl_k1(log_prob: Tensor, ref_log_prob: Tensor) -> Tensor:
    """Unbiased estimate of KL(pi || ref) from tokens drawn from pi: the log-ratio.

        k1 = log pi - log ref

    For measuring. Never a loss: the expectation of its gradient is zero. Single values may be
    negative; a mean that stays negative points to a wrong mask or other sampling settings.

    Args:
        log_prob: [...], nats, of the drawn tokens under pi.
        ref_log_prob: The same under the reference.

    Returns:
        [...], nats per token.

    Raises:
        ValueError: the shapes differ.

    Source: Schulman, Approximating KL divergence (2020).

    Example:
        >>> kl_k1(torch.tensor([-1.0]), torch.tensor([-1.5]))
        tensor([0.5000])
    """
    _check_shapes(log_prob, ref_log_prob)
    return log_prob - ref_log_prob


def kl_k2(log_prob: Tensor, ref_log_prob: Tensor) -> Tensor:
    """Biased, low-variance estimate of KL(pi || ref): half the squared log-ratio.

        k2 = (log pi - log ref)^2 / 2

    For one on-policy choice the expectation of its gradient is grad KL(pi || ref).

    Args:
        log_prob: [...], nats, of the drawn tokens under pi.
        ref_log_prob: The same under the reference.

    Returns:
        [...], nats per token, not negative.

    Raises:
        ValueError: the shapes differ.

    Source: Schulman (2020); gradients: Tang & Munos (arXiv 2506.09477).

    Example:
        >>> kl_k2(torch.tensor([-1.0]), torch.tensor([-2.0]))
        tensor([0.5000])
    """
    return kl_k1(log_prob, ref_log_prob).square() / 2


def kl_k3(log_prob: Tensor, ref_log_prob: Tensor) -> Tensor:
    """Unbiased estimate of KL(pi || ref) that is never negative.

        k3 = exp(-r) - 1 + r        r = log pi - log ref

    For measuring. As a loss its expected gradient is that of KL(ref || pi), the other direction.

    Args:
        log_prob: [...], nats, of the drawn tokens under pi.
        ref_log_prob: The same under the reference.

    Returns:
        [...], nats per token, not negative.

    Raises:
        ValueError: the shapes differ.

    Source: Schulman (2020); gradients: Tang & Munos (arXiv 2506.09477).

    Example:
        >>> kl_k3(torch.tensor([-1.0]), torch.tensor([-1.0]))
        tensor([0.])
    """
    log_ratio = kl_k1(log_prob, ref_log_prob)
    return torch.expm1(-log_ratio) + log_ratio


def kl_exact(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(pi || ref) over the whole vocabulary.

        KL = sum_v pi_v (log pi_v - log ref_v)

    A token that pi bans (logit -inf) adds nothing; one that only the reference bans makes the
    divergence infinite, as it is.

    Args:
        logits: [..., V], of pi.
        ref_logits: [..., V], of the reference.

    Returns:
        [...], nats per token, float32 (float64 for float64 logits); differentiable in both.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> kl_exact(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 0.0]))
        tensor(0.)
    """
    if logits.shape != ref_logits.shape:
        raise ValueError(
            "logits and ref_logits must have one shape, got "
            f"{tuple(logits.shape)} and {tuple(ref_logits.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(logits.dtype, ref_logits.dtype), torch.float32)
    log_p = logits.to(dtype).log_softmax(-1)
    log_q = ref_logits.to(dtype).log_softmax(-1)
    possible = log_p > -torch.inf
    log_ratio = fill_masked(log_p, possible) - fill_masked(log_q, possible)
    return (log_p.exp() * log_ratio).sum(-1)


def _log_weights(log_prob: Tensor, old_log_prob: Tensor | None) -> Tensor:
    behaviour = log_prob.detach() if old_log_prob is None else old_log_prob.detach()
    if log_prob.shape != behaviour.shape:
        raise ValueError(
            "log_prob and old_log_prob must have one shape, got "
            f"{tuple(log_prob.shape)} and {tuple(behaviour.shape)}"
        )
    return log_prob - behaviour


def kl_surrogate(
    log_prob: Tensor,
    ref_log_prob: Tensor,
    *,
    mask: Tensor,
    old_log_prob: Tensor | None = None,
    baseline: Tensor | None = None,
    decay: float = 1.0,
) -> Tensor:
    """What to put in a loss so that it has the value and gradient of the sequence KL.

        s_t = w_t k1_t - b_t (w_t - v_t)
        w_t = exp( sum_{u <= t} decay^{t-u} l_u )        l_u = log pi_u - log old_u
        v_t = w_t exp(-l_t)                              the weight without token t itself

    Summed over a sequence drawn from the old policy, its expectation is KL(pi || ref) of whole
    sequences and the expectation of its gradient is the gradient of that KL, on-policy and off.
    The weight of token t is that of its prefix: the choice at t changes every later token.

    On-policy, the gradient weighs grad log pi_t by 1 + (the KL still to come) - b_t. Without a
    baseline that weight is positive for nearly every token: a few sequences then push down
    whatever was drawn, and entropy rises. E[w_t - v_t | prefix] = 0, so any b_t that does not look
    at token t or later ones leaves value and gradient as they are and takes the noise;
    ``kl_baseline`` makes a good one. ``decay`` below 1 forgets later tokens, at the price of part
    of the gradient; 0 is ``kl_surrogate_token``.

    Args:
        log_prob: [B, T], nats, under the policy that is trained.
        ref_log_prob: [B, T], nats, under the frozen reference.
        mask: bool [B, T], True on response tokens, EOS included.
        old_log_prob: [B, T], nats, under the policy that drew the tokens; None: on-policy.
        baseline: [B, T], b_t, nats; None: 0.
        decay: In [0, 1].

    Returns:
        [B, T], nats; 0 where ``mask`` is False; differentiable in ``log_prob``.

    Raises:
        ValueError: shapes disagree, ``mask`` is not bool, ``decay`` is outside [0, 1], or
            ``log_prob`` is [N] with a ``decay`` above 0.

    Source: Tang & Munos (arXiv 2506.09477), with prefix weights for sequences; the baseline is
    that of a policy gradient, in a form that stays unbiased off-policy.

    Example:
        >>> log_prob = torch.tensor([[-1.0, -1.0]], requires_grad=True)
        >>> ref_log_prob = torch.tensor([[-1.5, -2.0]])
        >>> surrogate = kl_surrogate(log_prob, ref_log_prob, mask=torch.ones(1, 2).bool())
        >>> surrogate.detach()
        tensor([[0.5000, 1.0000]])
        >>> torch.autograd.grad(surrogate.sum(), log_prob)[0]  # 1 + the KL still to come
        tensor([[2.5000, 2.0000]])
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be in [0, 1], got {decay}")
    if decay > 0 and log_prob.ndim < 2:
        raise ValueError(
            f"log_prob must be [B, T], got {tuple(log_prob.shape)}: the KL of a sequence needs its "
            "steps in order; for single choices see kl_surrogate_token"
        )
    log_ratio = fill_masked(kl_k1(log_prob, ref_log_prob.detach()), mask)
    log_weight = fill_masked(_log_weights(log_prob, old_log_prob), mask)
    prefix = _decayed_sum(log_weight, decay)
    surrogate = prefix.exp() * log_ratio
    if baseline is not None:
        if baseline.shape != log_prob.shape:
            raise ValueError(
                "baseline must have the shape of log_prob, got "
                f"{tuple(baseline.shape)} and {tuple(log_prob.shape)}"
            )
        # w - v as v (exp(l) - 1): on-policy exactly 0, whatever the baseline.
        change = (prefix - log_weight).exp() * torch.expm1(log_weight)
        surrogate = surrogate - fill_masked(baseline.detach(), mask) * change
    return fill_masked(surrogate, mask)


def kl_surrogate_token(
    log_prob: Tensor,
    ref_log_prob: Tensor,
    *,
    mask: Tensor,
    old_log_prob: Tensor | None = None,
    baseline: Tensor | None = None,
) -> Tensor:
    """Like ``kl_surrogate`` with a weight per token: less variance, part of the gradient.

        s_t = w_t k1_t - b_t (w_t - 1)        w_t = exp(log pi_t - log old_t)

    Its gradient is that of the KL of each choice with the prefixes held as they were drawn; the
    effect of a choice on later tokens is missing. On-policy its value is right. With a baseline
    of 1 its gradient on-policy is that of k2.

    Args:
        log_prob: [B, T] or [N], nats, under the policy that is trained.
        ref_log_prob: [B, T], nats, under the frozen reference.
        mask: bool [B, T], True on response tokens, EOS included.
        old_log_prob: [B, T], nats, under the policy that drew the tokens; None: on-policy.
        baseline: [B, T], b_t, nats; None: 0.

    Returns:
        [B, T], nats; 0 where ``mask`` is False; differentiable in ``log_prob``.

    Raises:
        ValueError: shapes disagree or ``mask`` is not bool.

    Source: Tang & Munos (arXiv 2506.09477).

    Example:
        >>> log_prob = torch.tensor([[-1.0]], requires_grad=True)
        >>> kl_surrogate_token(log_prob, log_prob.detach(), mask=torch.ones(1, 1).bool())
        tensor([[0.]], grad_fn=<WhereBackward0>)
    """
    return kl_surrogate(
        log_prob, ref_log_prob, mask=mask, old_log_prob=old_log_prob, baseline=baseline, decay=0.0
    )


def _decayed_sum(x: Tensor, decay: float) -> Tensor:
    """sum_{u <= t} decay^{t-u} x_u along the last dimension."""
    if decay == 0:
        return x
    if decay == 1:
        return x.cumsum(-1)
    age = torch.arange(x.shape[-1], device=x.device)
    age = age.unsqueeze(-1) - age
    kernel = torch.where(age >= 0, decay ** age.clamp_min(0).to(x.dtype), 0.0)
    return x @ kernel.mT


def kl_shaped_reward(
    reward: Tensor, log_prob: Tensor, ref_log_prob: Tensor, *, mask: Tensor, coef: float | Tensor
) -> Tensor:
    """Reward with the KL in it, as PPO for language models has it.

        r'_t = r_t - coef * k1_t

    The policy gradient of this reward has the whole sequence gradient of the KL. Use it or a KL
    loss, never both.

    Args:
        reward: [B, T], per token.
        log_prob: [B, T], nats, under the policy that drew the tokens.
        ref_log_prob: [B, T], nats, under the reference.
        mask: bool [B, T], True on response tokens.
        coef: In reward units per nat.

    Returns:
        [B, T], detached; 0 where ``mask`` is False.

    Raises:
        ValueError: shapes disagree or ``mask`` is not bool.

    Source: Ziegler et al. (arXiv 1909.08593).

    Example:
        >>> one = torch.ones(1, 1)
        >>> kl_shaped_reward(one, -one, -2 * one, mask=one.bool(), coef=0.1)
        tensor([[0.9000]])
    """
    shaped = fill_masked(reward, mask) - coef * fill_masked(kl_k1(log_prob, ref_log_prob), mask)
    return fill_masked(shaped, mask).detach()
