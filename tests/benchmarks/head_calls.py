"""Inputs of a language model's head, and our and the naive calls on them."""

from collections.abc import Callable

import torch
from torch import Tensor

from safe_ops import kl_exact, linear_kl, linear_log_probs, linear_loss, token_log_probs

SHAPES = {"S": (2048, 576, 49_152), "M": (1024, 896, 151_936), "L": (512, 2048, 151_936)}
"""Tokens, H, V: the heads of SmolLM2-135M, Qwen2.5-0.5B and Qwen2.5-3B."""
ENTROPY_COEF = 0.01
"""So that both results have a gradient."""
CLIP = 0.2

Results = tuple[Tensor, ...]


class HeadProblem:
    """Hidden states, head, tokens and what a loss of them needs, for one shape and dtype."""

    def __init__(
        self, tokens: int, width: int, vocabulary: int, dtype: torch.dtype, *, device: str = "cpu"
    ) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            self.hidden = torch.randn(tokens, width).to(dtype).requires_grad_()
            weight = torch.randn(vocabulary, width).mul_(width**-0.5)
            self.weight = weight.to(dtype).requires_grad_()
            self.ref_hidden = torch.randn(tokens, width).to(dtype)
            self.tokens = torch.randint(vocabulary, (tokens,))
            self.half = torch.rand(tokens).argsort() < tokens // 2
            self.slopes = torch.randn(tokens)

    def gradients(self, *results: Tensor) -> Results:
        """Of a loss of per-token results: the first with random slopes, entropies with one."""
        loss = results[0].float() @ self.slopes
        for entropy in results[1:]:
            loss = loss + ENTROPY_COEF * entropy.sum()
        return torch.autograd.grad(loss, (self.hidden, self.weight))

    def ours(self, mask: Tensor | None = None) -> Results:
        return linear_log_probs(self.hidden, self.weight, self.tokens, mask=mask)

    def naive(self) -> Results:
        return token_log_probs(self.hidden @ self.weight.t(), self.tokens)

    def kl(self) -> Results:
        return (linear_kl(self.hidden, self.weight, self.ref_hidden, self.weight.detach()),)

    def naive_kl(self) -> Results:
        logits = self.hidden @ self.weight.t()
        return (kl_exact(logits, self.ref_hidden @ self.weight.detach().t()),)

    def half_masked(self) -> Results:
        return self.gradients(*self.ours(self.half))

    def frozen_head(self) -> Results:
        results = linear_log_probs(self.hidden, self.weight.detach(), self.tokens)
        loss = results[0] @ self.slopes + ENTROPY_COEF * results[1].sum()
        return torch.autograd.grad(loss, (self.hidden,))

    def fused(self) -> Results:
        """A clipped policy loss with its entropy bonus."""

        def token_loss(log_prob: Tensor, entropy: Tensor, index: Tensor) -> Tensor:
            ratio = (log_prob - log_prob.detach()).exp()
            slopes = self.slopes[index]
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            return -torch.minimum(ratio * slopes, clipped * slopes) - ENTROPY_COEF * entropy

        loss = linear_loss(self.hidden, self.weight, self.tokens, token_loss)
        return torch.autograd.grad(loss, (self.hidden, self.weight))

    def products(self) -> dict[str, Callable[[], Tensor]]:
        """The three bare matrix products, each into fresh memory, as autograd makes them."""
        hidden, weight = self.hidden.detach(), self.weight.detach()
        slopes = hidden.new_empty(hidden.shape[0], weight.shape[0]).normal_()
        return {
            "mm": lambda: hidden @ weight.t(),
            "dH": lambda: slopes @ weight,
            "dW": lambda: slopes.t() @ hidden,
        }
