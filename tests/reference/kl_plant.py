"""The KL of a policy under the threshold penalty, as a difference equation in float64.

    KL+ = max(0, KL + d - k (s + lead + o - tau)+)
    s   = b s + (1 - b) KL         lead = h/w (s - s of w updates ago)+
    o   = max(0, o + ki (s - tau))

One run per entry of the tensors. ``delay`` 1 applies the penalty of the update before; ``momentum``
averages the penalty as an optimizer does its gradients. Nothing here uses safe_ops.
"""

import torch
from torch import Tensor


def simulate(
    decay: float | Tensor,
    gain: float | Tensor,
    *,
    start: float | Tensor,
    steps: int,
    keep: int,
    filtered_start: float | Tensor | None = None,
    drift: float | Tensor = 0.01,
    threshold: float = 0.3,
    delay: int = 0,
    ki: float | Tensor = 0.0,
    offset_start: float | Tensor = 0.0,
    horizon: float = 0.0,
    window: int = 10,
    momentum: float | Tensor = 0.0,
) -> Tensor:
    """The last ``keep`` values of the KL, [keep, ...]; s starts as KL unless given."""
    inputs = [decay, gain, start, drift, ki, momentum, offset_start]
    tensors = [torch.as_tensor(x, dtype=torch.float64) for x in inputs]
    decay, gain, kl, drift, ki, momentum, offset = torch.broadcast_tensors(*tensors)
    s = kl if filtered_start is None else torch.as_tensor(filtered_start).double().expand_as(kl)
    past = [s] * window
    # At rest the penalty balances the drift: averages and delays start there.
    averaged = waiting = drift
    kept = []
    for _ in range(steps):
        lead = horizon / window * (s - past[0]).clamp(min=0)
        past = [*past[1:], s]
        penalty = gain * (s + lead + offset - threshold).clamp(min=0)
        averaged = momentum * averaged + (1 - momentum) * penalty
        acting, waiting = (waiting, averaged) if delay else (averaged, averaged)
        kl = (kl + drift - acting).clamp(min=0)
        s = decay * s + (1 - decay) * kl
        offset = (offset + ki * (s - threshold)).clamp(min=0)
        kept = [*kept[-keep + 1 :], kl] if keep > 1 else [kl]
    return torch.stack(kept)


def swing(kls: Tensor) -> Tensor:
    """Largest less least of what ``simulate`` kept."""
    return kls.amax(0) - kls.amin(0)
