"""Small batches and networks that every test of an objective starts from."""

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from safe_ops import token_log_probs

LENGTHS = (5, 1, 3, 4)
VOCABULARY, STEPS = 4, 5


def ragged_mask(lengths: tuple[int, ...] = LENGTHS, steps: int = STEPS) -> Tensor:
    return torch.arange(steps) < torch.tensor(lengths).unsqueeze(-1)


def make_batch(*, fresh: bool = True, dtype: torch.dtype = torch.float64) -> TensorDict:
    """A rollout of four responses; ``fresh`` adds what a network would write."""
    generator = torch.Generator().manual_seed(0)
    mask = ragged_mask()
    shape = mask.shape

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    batch = TensorDict(
        {
            "tokens": {"response": torch.randint(VOCABULARY, shape, generator=generator)},
            "response_mask": mask,
            "response_tokens_mean": (mask.sum() / len(mask)).to(dtype).expand(len(mask)),
            "old_log_prob": -1.4 + 0.1 * normal(*shape),
            "ref_log_prob": -1.5 + 0.2 * normal(*shape),
            "advantage": normal(*shape, 1),
            "value_target": normal(*shape, 1),
            "old_state_values": 0.1 * normal(*shape, 2),
            "kl_coef": torch.tensor(0.7, dtype=dtype).expand(len(mask)),
            "kl_baseline": 1 + 0.3 * normal(*shape),
            "kl_threshold": torch.tensor(0.1, dtype=dtype).expand(len(mask)),
            "entropy_gate": torch.tensor(1.5, dtype=dtype).expand(len(mask)),
        },
        [len(mask)],
    )
    if fresh:
        batch["log_prob"] = -1.4 + 0.1 * normal(*shape)
        batch["entropy"] = normal(*shape).abs()
        batch["state_values"] = normal(*shape, 2)
    return batch


class TinyNetwork(TensorDictModuleBase):
    """Logits by position and critic heads by position; counts its forwards."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        logits = torch.randn(STEPS, VOCABULARY, generator=generator, dtype=dtype)
        values = torch.randn(STEPS, 2, generator=generator, dtype=dtype)
        self.logits, self.values = nn.Parameter(logits), nn.Parameter(values)
        self.calls = 0
        self.in_keys = [("tokens", "response")]
        self.out_keys = ["log_prob", "entropy", "state_values"]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.calls += 1
        tokens = tensordict["tokens", "response"]
        rows = tokens.shape[0]
        scored = token_log_probs(self.logits.expand(rows, -1, -1), tokens)
        tensordict["log_prob"], tensordict["entropy"] = scored
        tensordict["state_values"] = self.values.expand(rows, -1, -1)
        return tensordict
