"""A controller in a TensorDict pipeline, and the measurements that it needs."""

import torch
import torch.distributed as dist
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from safe_ops import masked_sum
from safe_ops.controllers import Controller
from safe_rl.keys import RESPONSE_MASK, read, read_per_token


class PolicyMeasurements(TensorDictModuleBase):
    """KL, entropy and reward of a rollout, as the controllers take them: one number each.

        kl      = sum over all response tokens of log pi - log ref, by their number
        entropy = the same mean of the entropy            reward = mean score of the sequences

    Sums and counts are added over all ranks first, so every rank gets the same numbers, whatever
    the lengths of its responses. Reads ``old_log_prob``, ``ref_log_prob``, ``entropy``,
    ``response_mask`` [B, T] and ``score`` [B]; writes ``("measurements", "kl" | "entropy" |
    "reward")``, expanded to [B]. Nats per token.

    Raises:
        ValueError: a key is missing or of the wrong shape.

    Example:
        >>> from tensordict import TensorDict
        >>> one = torch.ones(1, 2)
        >>> batch = TensorDict({"old_log_prob": -one, "ref_log_prob": -2 * one, "entropy": one,
        ...     "response_mask": one.bool(), "score": torch.tensor([0.5])}, [1])
        >>> PolicyMeasurements()(batch)["measurements", "kl"]
        tensor([1.])
    """

    in_keys = ["old_log_prob", "ref_log_prob", "entropy", RESPONSE_MASK, "score"]  # noqa: RUF012
    out_keys = [  # noqa: RUF012
        ("measurements", "kl"),
        ("measurements", "entropy"),
        ("measurements", "reward"),
    ]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the measurements."""
        mask = read(tensordict, RESPONSE_MASK)
        old, ref, entropy = (
            read_per_token(tensordict, key, mask).double()
            for key in ("old_log_prob", "ref_log_prob", "entropy")
        )
        score = read(tensordict, "score").double()
        sums = torch.stack(
            [
                masked_sum(old - ref, mask),
                masked_sum(entropy, mask),
                mask.sum().double(),
                score.sum(),
                torch.full_like(score.sum(), score.numel()),
            ]
        )
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        kl, entropy_sum, tokens, score_sum, rows = sums.unbind()
        means = {
            "kl": kl / tokens.clamp_min(1),
            "entropy": entropy_sum / tokens.clamp_min(1),
            "reward": score_sum / rows.clamp_min(1),
        }
        for name, value in means.items():
            tensordict.set(("measurements", name), value.float().expand(tensordict.batch_size))
        return tensordict


class ControllerModule(TensorDictModuleBase):
    """Moves a controller by one update per call and writes what it decided into the batch.

    Call it once per rollout. Coefficients are expanded over the batch, which costs nothing.

    Args:
        controller: Holds the law and its state.
        in_keys: Measurement name to batch key, reduced over ranks and alike in all rows.
        out_keys: Batch key to field of the law's state.

    Raises:
        ValueError: a key is missing.

    Example:
        >>> from tensordict import TensorDict
        >>> from safe_ops.controllers import EntropyGatedKL
        >>> module = ControllerModule(Controller(EntropyGatedKL()))
        >>> batch = TensorDict({"measurements": {"kl": torch.ones(2), "entropy": torch.ones(2),
        ...     "reward": torch.zeros(2)}}, [2])
        >>> module(batch)["kl_coef"].shape
        torch.Size([2])
    """

    def __init__(
        self,
        controller: Controller,
        *,
        in_keys: dict[str, NestedKey] | None = None,
        out_keys: dict[NestedKey, str] | None = None,
    ) -> None:
        super().__init__()
        names = ("kl", "entropy", "reward")
        self.measurement_keys = in_keys or {name: ("measurements", name) for name in names}
        fields = ("kl_threshold", "entropy_gate", "kl_momentum", "kl_coef")
        self.decisions = out_keys or {field: field for field in fields}
        self.controller = controller
        self.in_keys = list(self.measurement_keys.values())
        self.out_keys = list(self.decisions)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Move the controller and write its decisions."""
        state = self.controller(
            **{name: one_of(read(tensordict, key)) for name, key in self.measurement_keys.items()}
        )
        for key, name in self.decisions.items():
            tensordict.set(key, getattr(state, name).expand(tensordict.batch_size))
        return tensordict


def one_of(expanded: Tensor) -> Tensor:
    """The number that an expanded measurement holds in every row, 0-d."""
    return expanded.flatten()[0]
