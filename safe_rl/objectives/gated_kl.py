"""The KL penalty, with the gradient it should have; and its one-sided reading per token."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor

from safe_ops import fill_masked, kl_k1, kl_k3, kl_surrogate, masked_mean, token_kl_penalty
from safe_rl.keys import read_coefficient, read_per_token
from safe_rl.objectives.base import Objective, Reduction
from safe_rl.objectives.settings import Rule


class GatedKLLoss(Objective):
    """The penalty that the controller asks for, as a loss that is linear in the tokens.

        loss_kl = sum_t kl_coef * s_t / (B * N)        s: surrogate, N: mean response tokens

    ``kl_coef`` is f'(KL), made once per rollout by the controller with gate, threshold and lead
    in it, so the gradient is f'(KL) / N * grad KL(pi || ref) of whole sequences, with importance
    weights in later epochs. The value is that of the linear term, not f(KL).

    Where the batch holds ``kl_baseline`` [B, T], as ``KLBaseline`` writes it, the gradient has the
    same expectation and a fraction of the noise. Train with it: without, a few sequences push down
    whatever was drawn.

    Frames [N], and rows of several episodes, have no prefix to weight: they need
    ``kl_surrogate_token``.

    Args:
        network: See ``Objective``.
        surrogate: ``kl_surrogate``, or ``kl_surrogate_token`` for less variance and part of the
            gradient; ``functools.partial(kl_surrogate, decay=0.9)`` lies between.
        functional: See ``Objective``.
        reduction: See ``Objective``.

    Raises:
        ValueError: a key is missing or of the wrong shape, or the batch is of frames [N] and the
            surrogate one of sequences.

    Source: SAFE (arXiv 2602.04651); gradient: Tang & Munos (arXiv 2506.09477).

    Example:
        >>> from tensordict import TensorDict
        >>> one = torch.ones(1, 2)
        >>> batch = TensorDict({"log_prob": -one, "old_log_prob": -one, "ref_log_prob": -2 * one,
        ...     "kl_coef": torch.tensor([0.5]), "response_mask": one.bool()}, [1])
        >>> GatedKLLoss()(batch)["loss_kl"]
        tensor(0.5000)
    """

    @dataclass
    class _AcceptedKeys(Objective._AcceptedKeys):
        log_prob: NestedKey = "log_prob"
        old_log_prob: NestedKey = "old_log_prob"
        ref_log_prob: NestedKey = "ref_log_prob"
        kl_coef: NestedKey = "kl_coef"
        kl_baseline: NestedKey = "kl_baseline"
        entropy_gate: NestedKey = "entropy_gate"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    settings: ClassVar[Mapping[str, Rule]] = {"surrogate": "any"}
    reads = ("log_prob", "old_log_prob", "ref_log_prob", "kl_coef", "response_mask")
    may_read = ("response_tokens_mean", "kl_baseline", "entropy_gate")
    fresh = ("log_prob",)
    writes = (
        "loss_kl",
        "kl_k1_nats_per_token",
        "kl_k3_nats_per_token",
        "kl_coef_mean",
        "entropy_gate_mean",
    )

    def __init__(
        self,
        network: TensorDictModuleBase | None = None,
        *,
        surrogate: Callable[..., Tensor] = kl_surrogate,
        functional: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(network, functional=functional, reduction=reduction)
        self.surrogate = surrogate

    def terms(self, batch: TensorDictBase, mask: Tensor) -> dict[str, Tensor]:
        """See the class."""
        keys = self.tensor_keys
        log_prob = read_per_token(batch, keys.log_prob, mask)
        ref_log_prob = read_per_token(batch, keys.ref_log_prob, mask)
        has_baseline = batch.get(keys.kl_baseline, None) is not None
        surrogate = self.surrogate(
            log_prob,
            ref_log_prob,
            mask=mask,
            old_log_prob=read_per_token(batch, keys.old_log_prob, mask),
            baseline=read_per_token(batch, keys.kl_baseline, mask) if has_baseline else None,
        )
        coef = fill_masked(read_coefficient(batch, keys.kl_coef, mask), mask)
        # It acts through kl_coef; beside it for the log, 1 where no law writes one.
        gate = torch.ones_like(coef)
        if batch.get(keys.entropy_gate, None) is not None:
            gate = read_coefficient(batch, keys.entropy_gate, mask).to(coef)
        held = fill_masked(log_prob.detach(), mask), fill_masked(ref_log_prob.detach(), mask)
        return {
            "loss_kl": self.reduce(coef * surrogate, mask, batch),
            "kl_k1_nats_per_token": masked_mean(kl_k1(*held), mask),
            "kl_k3_nats_per_token": masked_mean(kl_k3(*held), mask),
            "kl_coef_mean": masked_mean(coef, mask),
            "entropy_gate_mean": masked_mean(gate, mask),
        }


class TokenKLLoss(Objective):
    """One-sided penalty on tokens that became much likelier than under the reference.

        loss_token_kl = token_kl_coef * mean_t g max(0, log pi_t - log ref_t - threshold)^2

    The paper's "positive log-likelihood deviations". Threshold and gate come from the controller;
    the gradient is the pathwise one of the drawn tokens.

    Args:
        network: See ``Objective``.
        token_kl_coef: Per nat^2. ``loss.token_kl_coef = 0.05`` changes it in place.
        functional: See ``Objective``.
        reduction: See ``Objective``.

    Raises:
        ValueError: a value is out of range, or a key is missing or of the wrong shape.

    Source: SAFE (arXiv 2602.04651).

    Example:
        >>> from tensordict import TensorDict
        >>> one = torch.ones(1, 2)
        >>> batch = TensorDict({"log_prob": -one, "ref_log_prob": -2 * one,
        ...     "kl_threshold": torch.tensor([0.5]), "entropy_gate": torch.tensor([2.0]),
        ...     "response_mask": one.bool()}, [1])
        >>> TokenKLLoss(token_kl_coef=1.0)(batch)["loss_token_kl"]
        tensor(0.5000)
    """

    @dataclass
    class _AcceptedKeys(Objective._AcceptedKeys):
        log_prob: NestedKey = "log_prob"
        ref_log_prob: NestedKey = "ref_log_prob"
        kl_threshold: NestedKey = "kl_threshold"
        entropy_gate: NestedKey = "entropy_gate"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    _schedulable_buffers = frozenset({"token_kl_coef"})
    settings: ClassVar[Mapping[str, Rule]] = {"token_kl_coef": "not negative"}
    token_kl_coef: Tensor
    reads = ("log_prob", "ref_log_prob", "kl_threshold", "entropy_gate", "response_mask")
    fresh = ("log_prob",)
    shaped_like = "ref_log_prob"
    writes = ("loss_token_kl", "token_kl_active_fraction")

    def __init__(
        self,
        network: TensorDictModuleBase | None = None,
        *,
        token_kl_coef: float = 0.1,
        functional: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(network, functional=functional, reduction=reduction)
        self._register_coefficient("token_kl_coef", token_kl_coef)

    def terms(self, batch: TensorDictBase, mask: Tensor) -> dict[str, Tensor]:
        """See the class."""
        keys = self.tensor_keys
        log_prob = fill_masked(read_per_token(batch, keys.log_prob, mask), mask)
        ref_log_prob = fill_masked(read_per_token(batch, keys.ref_log_prob, mask), mask)
        threshold = fill_masked(read_coefficient(batch, keys.kl_threshold, mask), mask)
        gate = fill_masked(read_coefficient(batch, keys.entropy_gate, mask), mask)
        penalty = token_kl_penalty(
            log_prob, ref_log_prob, threshold=threshold, gate=gate, coef=self.token_kl_coef
        )
        active = kl_k1(log_prob.detach(), ref_log_prob.detach()) > threshold
        return {
            "loss_token_kl": self.reduce(penalty, mask, batch),
            "token_kl_active_fraction": masked_mean(active.to(penalty.dtype), mask),
        }
