"""Several pessimistic critics on one hidden state."""

import torch
from torch import Tensor, nn

from safe_ops import soft_min
from safe_rl.keys import at_least_float32


class SoftMinCritic(nn.Module):
    """K value heads on hidden states; their soft-min is the pessimistic value.

        values_k = w2_k . GELU(W1_k LayerNorm(h))        value = soft_min(values, temperature)

    The heads' layers are stacked, so that K heads are as many operations as one. Heads start near
    0 and differ, since their first layers do. Keep the parameters in float32: in
    bfloat16 a value has three digits, whatever it is cast to afterwards.

    Args:
        hidden_size: H.
        num_heads: K; one is an ordinary critic.
        temperature: Of the soft-min, in reward units.

    Raises:
        ValueError: a size is not positive, or ``temperature`` is not.

    Source: SAFE (arXiv 2602.04651), double soft-min critic.

    Example:
        >>> SoftMinCritic(8)(torch.zeros(2, 3, 8)).shape
        torch.Size([2, 3, 2])
    """

    def __init__(self, hidden_size: int, *, num_heads: int = 2, temperature: float = 0.3) -> None:
        super().__init__()
        if hidden_size < 1 or num_heads < 1:
            raise ValueError(
                f"hidden_size and num_heads must be positive, got {hidden_size}, {num_heads}"
            )
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        self.temperature = temperature
        inner = max(1, hidden_size // 4)
        self.norm = nn.LayerNorm(hidden_size)
        self.first = nn.Linear(hidden_size, num_heads * inner)
        self.last_weight = nn.Parameter(torch.randn(num_heads, inner) * 0.1 / inner**0.5)
        self.last_bias = nn.Parameter(torch.zeros(num_heads))

    def forward(self, hidden: Tensor) -> Tensor:
        """Values of all heads, [..., H] -> [..., K], at least float32."""
        first = self.first(self.norm(hidden.to(self.norm.weight.dtype)))
        inner = nn.functional.gelu(first).unflatten(-1, self.last_weight.shape)
        return at_least_float32((inner * self.last_weight).sum(-1) + self.last_bias)

    def value(self, hidden: Tensor) -> Tensor:
        """Soft-min of the heads, [..., H] -> [...]."""
        return soft_min(self(hidden), self.temperature)
