"""The example loop where something goes wrong, and what each rank decides written to a folder.

torchrun --nproc-per-node 2 -m tests.examples.guarded_train SCENARIO FOLDER --output RUN ...
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.lm_rlhf import train as example
from examples.lm_rlhf.config import CONFIGS, smollm2_135m
from safe_ops.controllers import flatten_state
from safe_rl.monitoring.detectors import Alarm
from safe_rl.monitoring.monitor import Monitor

RANK = int(os.environ.get("RANK", "0"))
STEPS_OF_AN_UPDATE = 4
# Four optimizer steps an update: half of the second's and of the third's.
POISONED = {5, 6, 10, 11}
LADDER = Monitor(
    non_finite=Alarm(limit=0.25, release=0.01, patience=1, again=1),
    actions={"non_finite": ("lower_learning_rate", "roll_back")},
)
SCENARIOS: dict[str, dict[str, Any]] = {
    "poison": {"monitor": LADDER, "policy_learning_rate": 0.02, "trust_region_limit": None},
    "trust_region": {"policy_learning_rate": 0.05, "trust_region_limit": 0.01},
}


def poison_one_rank(finite: list[bool]) -> None:
    """Rank 1 has a loss that is not finite; its gradient is, so that no other rank meets it."""
    add = example.total_loss

    def poisoned(losses: Any) -> Tensor:
        loss = add(losses)
        if RANK == 1 and len(finite) + 1 in POISONED:
            loss = loss + torch.nan
        finite.append(bool(loss.isfinite()))
        return loss

    example.total_loss = poisoned


def watch(folder: Path, finite: list[bool]) -> None:
    """Write what this rank decided, and what it holds, after each update."""
    seen: list[dict[str, Any]] = []

    class Watched(example.Guard):
        def __init__(self, config: Any, *, adapters: list[nn.Parameter], **parts: Any) -> None:
            super().__init__(config, adapters=adapters, **parts)
            self._adapters = adapters

        def observe(self, step: int, **measured: Any) -> list[dict[str, Any]]:
            record = {key: float(value) for key, value in self.record().items()}
            events = super().observe(step, **measured)
            seen.append(
                {
                    "record": record,
                    "events": [event | {"seen": float(event["seen"])} for event in events],
                    "rates": [group["lr"] for group in self._optimizer.param_groups],
                    "threshold": self._controller.law.threshold,
                    "own_losses_finite": finite[-STEPS_OF_AN_UPDATE:],
                    "adapters": [parameter.detach().clone() for parameter in self._adapters],
                    "controller": flatten_state(self._controller.state),
                }
            )
            torch.save(seen, folder / f"rank{RANK}_decisions.pt")
            return events

    example.Guard = Watched


if __name__ == "__main__":
    scenario, watched = sys.argv[1], Path(sys.argv[2])
    watched.mkdir(parents=True, exist_ok=True)
    settings = SCENARIOS[scenario]
    CONFIGS["smollm2_135m"] = lambda: dataclasses.replace(smollm2_135m(), **settings)
    losses_finite: list[bool] = []
    if scenario == "poison":
        poison_one_rank(losses_finite)
    watch(watched, losses_finite)
    sys.exit(example.main(sys.argv[3:]))
