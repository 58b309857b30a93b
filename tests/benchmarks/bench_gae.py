"""How many times faster than a Python loop over T the advantages are, TorchRL's beside ours.

    make bench                                              # all, into docs/benchmarks.md
    python -m tests.benchmarks.bench_gae

float32, one thread, CPU time, implementations interleaved, medians. "loop" does all that ours does
(ends, cuts, holes in the mask, value targets), one step after the other; "bare loop" is what one
writes where every step counts; "lean loop" has the one-step errors and the factors made before it,
so that only ``adv = delta[:, t] + decay[:, t] * adv`` is left. TorchRL knows no holes, so its two
work on the same tensors without.

| case | terminated | truncated | mask |
|---|---|---|---|
| no terminations | none | not given | all count |
| responses | the last that counts | not given | right padding, 40 % |
| ends | 1 % of the steps | not given | 10 % holes |
| general | 1 % of the steps | 1 % of the steps | 10 % holes |
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchrl.objectives.value.functional import (
    generalized_advantage_estimate as torchrl_loop,
)
from torchrl.objectives.value.functional import (
    vec_generalized_advantage_estimate as torchrl_vectorised,
)

from safe_ops import generalized_advantage_estimate
from tests.benchmarks.measure import Table, interleaved_seconds, write_results

SIZES = {(64, 1024): 30, (256, 4096): 7}
"""[B, T] to rounds."""
DISCOUNT, GAE_LAMBDA = 0.99, 0.95


def loop(
    reward: Tensor,
    value: Tensor,
    *,
    mask: Tensor,
    terminated: Tensor,
    truncated: Tensor | None,
    bootstrap_value: Tensor,
) -> tuple[Tensor, Tensor]:
    """Everything, step by step."""
    stop = terminated if truncated is None else terminated | truncated
    advantage = torch.zeros_like(reward)
    next_value, next_advantage = bootstrap_value, torch.zeros_like(bootstrap_value)
    for t in reversed(range(reward.shape[1])):
        delta = reward[:, t] + DISCOUNT * next_value * ~terminated[:, t] - value[:, t]
        current = delta + DISCOUNT * GAE_LAMBDA * next_advantage * ~stop[:, t]
        advantage[:, t] = torch.where(mask[:, t], current, 0.0)
        next_advantage = torch.where(mask[:, t], current, next_advantage)
        next_value = torch.where(mask[:, t], value[:, t], next_value)
    return advantage, torch.where(mask, advantage + value, 0.0)


def bare_loop(
    reward: Tensor, value: Tensor, *, terminated: Tensor, bootstrap_value: Tensor
) -> tuple[Tensor, Tensor]:
    """Without masks and truncations."""
    advantage = torch.empty_like(reward)
    next_value, current = bootstrap_value, torch.zeros_like(bootstrap_value)
    for t in reversed(range(reward.shape[1])):
        alive = ~terminated[:, t]
        delta = reward[:, t] + DISCOUNT * next_value * alive - value[:, t]
        current = delta + DISCOUNT * GAE_LAMBDA * alive * current
        advantage[:, t] = current
        next_value = value[:, t]
    return advantage, advantage + value


def lean_loop(
    reward: Tensor, value: Tensor, *, terminated: Tensor, bootstrap_value: Tensor
) -> tuple[Tensor, Tensor]:
    """The least that a loop can do: everything else at once, before it."""
    following = torch.cat([value[:, 1:], bootstrap_value.unsqueeze(1)], 1)
    alive = DISCOUNT * ~terminated
    delta = reward + alive * following - value
    decay = GAE_LAMBDA * alive
    advantage = torch.empty_like(reward)
    current = torch.zeros_like(bootstrap_value)
    for t in reversed(range(reward.shape[1])):
        current = delta[:, t] + decay[:, t] * current
        advantage[:, t] = current
    return advantage, advantage + value


def case(
    name: str, batch: int, steps: int, *, device: str = "cpu"
) -> dict[str, Callable[[], tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def sometimes(share: float) -> Tensor:
        return torch.rand(batch, steps, generator=generator) < share

    reward, value = normal(batch, steps).to(device), normal(batch, steps).to(device)
    bootstrap = normal(batch).to(device)
    ends = sometimes(0.0 if name == "no terminations" else 0.01)
    mask = sometimes(1.1 if name == "no terminations" else 0.9)
    if name == "responses":
        lengths = torch.randint(steps // 5, steps, (batch, 1), generator=generator)
        mask, ends = torch.arange(steps) < lengths, torch.arange(steps) == lengths - 1
    mask, ends = mask.to(device), ends.to(device)
    cuts = sometimes(0.01).to(device) if name == "general" else None
    done = ends if cuts is None else ends | cuts
    arguments = {
        "mask": mask,
        "terminated": ends,
        "truncated": cuts,
        "bootstrap_value": bootstrap,
    }
    following = torch.cat([value[:, 1:], bootstrap.unsqueeze(1)], 1)
    columns = [x.unsqueeze(-1) for x in (value, following, reward, done, ends)]
    return {
        "ours": lambda: generalized_advantage_estimate(
            reward, value, **arguments, discount=DISCOUNT, gae_lambda=GAE_LAMBDA
        ),
        "loop": lambda: loop(reward, value, **arguments),
        "bare loop": lambda: bare_loop(reward, value, terminated=ends, bootstrap_value=bootstrap),
        "lean loop": lambda: lean_loop(reward, value, terminated=ends, bootstrap_value=bootstrap),
        "TorchRL loop": lambda: torchrl_loop(DISCOUNT, GAE_LAMBDA, *columns),
        "TorchRL vectorised": lambda: torchrl_vectorised(DISCOUNT, GAE_LAMBDA, *columns),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for gae.json")
    given = parser.parse_args()
    rows = []
    for (batch, steps), rounds in SIZES.items():
        for name in ("no terminations", "responses", "ends", "general"):
            calls = case(name, batch, steps)
            torch.testing.assert_close(tuple(calls["ours"]()), calls["loop"](), atol=1e-4, rtol=0)
            seconds = interleaved_seconds(calls, rounds=rounds)
            rows += [
                [
                    f"[{batch}, {steps}]",
                    name,
                    implementation,
                    f"{1e3 * spent:.2f}",
                    f"{seconds['loop'] / spent:.1f}",
                    f"{seconds['bare loop'] / spent:.1f}",
                    f"{seconds['lean loop'] / spent:.1f}",
                ]
                for implementation, spent in seconds.items()
            ]
    columns = ["[B, T]", "case", "by", "ms"]
    columns += ["times faster than the loop", "than the bare loop", "than the lean loop"]
    write_results("gae", [Table("Advantages, CPU time of one thread", columns, rows)], given.output)


if __name__ == "__main__":
    main()
