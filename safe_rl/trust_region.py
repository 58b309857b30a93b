"""The trust region of a policy update: measured before it is accepted, shortened or taken back."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from safe_ops import kl_k3, masked_sum
from safe_ops.controllers import trust_region_scale
from safe_rl.controllers import sum_over_ranks

SLACK = 1.1
"""A shortened update is accepted up to this multiple of the limit: √ approaches it from above."""
_SHORTENINGS = 3


def policy_kl(old_log_prob: Tensor, log_prob: Tensor, *, mask: Tensor) -> Tensor:
    """KL(old || new) of one rollout, nats per token, over all ranks: the k3 estimate.

        mean over response tokens of  exp(r) - 1 - r        r = log new - log old

    Never negative, and unbiased for tokens that the old policy drew.

    Args:
        old_log_prob: [B, T], of the policy that drew the tokens.
        log_prob: [B, T], of the proposed one.
        mask: bool [B, T]; what is masked may hold anything.

    Returns:
        0-d, float32; not finite where a token's is not.

    Example:
        >>> one = torch.ones(1, 2)
        >>> policy_kl(-one, -one, mask=one.bool())
        tensor(0.)
    """
    total, tokens = sum_over_ranks(masked_sum(kl_k3(old_log_prob, log_prob), mask), mask.sum())
    return (total / tokens).float()


class TrustedStep(NamedTuple):
    """What became of a proposed update."""

    proposed_kl: float
    """KL(old || new) of the whole update, nats per token."""
    kl: float
    """Of what was accepted; 0 for an update that was taken back."""
    scale: float
    """Share of the parameter change that was accepted."""


class PolicyTrustRegion:
    """Bounds KL(old || new) of an update, however many optimizer steps made it.

        set()           before the first step: the parameters are copied
        hold(measure)   after the last: over the limit, new = old + scale (new - old)

    with ``trust_region_scale``; then it is measured again, and shortened again, until its KL is
    within ``SLACK`` of the limit. After three times, or where the KL is not finite, the whole
    update is taken back. So what is accepted has been measured, and a policy whose log-probs are
    NaN is never sampled from.

    The optimizer's own state is left as the steps made it. A copy of the parameters is held, and
    nothing of it has to be saved with the run. Ranks that measure the same number do the same.

    Args:
        parameters: Those of the policy that are trained: of adapters, 20 MB for SmolLM2-135M.
        limit: Nats per token.

    Raises:
        ValueError: ``limit`` is not positive and finite, or there is no parameter.

    Source: SAFE (arXiv 2602.04651), preview.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> region = PolicyTrustRegion([weight], limit=0.25)
        >>> region.set()
        >>> _ = weight.data.fill_(1.0)
        >>> region.hold(lambda: weight.detach().square().sum())
        TrustedStep(proposed_kl=1.0, kl=0.25, scale=0.5)
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, limit: float) -> None:
        self._parameters = list(parameters)
        if not self._parameters:
            raise ValueError("parameters must hold at least one, got none")
        if not 0 < limit < math.inf:
            raise ValueError(f"limit must be positive and finite, got {limit}")
        self.limit = limit
        self._before: list[Tensor] = []

    @torch.no_grad()
    def set(self) -> None:
        """Copy the parameters: from here on the update counts."""
        if not self._before:
            self._before = [torch.empty_like(parameter) for parameter in self._parameters]
        for held, parameter in zip(self._before, self._parameters, strict=True):
            held.copy_(parameter)

    @torch.no_grad()
    def hold(self, measure: Callable[[], Tensor]) -> TrustedStep:
        """Accept the update, shorten it or take it back.

        Args:
            measure: KL(old || new) with the parameters as they are, 0-d, alike on all ranks, like
                ``policy_kl`` of one more forward. Called once for an update within the limit, and
                once more for each shortening; each call is waited for.

        Raises:
            RuntimeError: ``set`` was not called.
        """
        if not self._before:
            raise RuntimeError("there is nothing to go back to: call set() before the update")
        kl = proposed = float(measure())
        scale = 1.0
        for _ in range(_SHORTENINGS):
            if kl <= self.limit * (SLACK if scale < 1 else 1.0):
                return TrustedStep(proposed, kl, scale)
            if not math.isfinite(kl):
                break
            shorter = float(trust_region_scale(torch.tensor(kl), self.limit))
            self._retreat(shorter)
            scale *= shorter
            kl = float(measure())
        if kl <= self.limit * SLACK and scale < 1:
            return TrustedStep(proposed, kl, scale)
        for held, parameter in zip(self._before, self._parameters, strict=True):
            parameter.copy_(held)
        return TrustedStep(proposed, 0.0, 0.0)

    def _retreat(self, scale: float) -> None:
        for held, parameter in zip(self._before, self._parameters, strict=True):
            parameter.copy_(torch.lerp(held, parameter, scale))
