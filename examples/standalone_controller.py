"""The KL law alone, on a simulated policy that drifts away from its reference: torch only.

    python -m examples.standalone_controller                  # a picture in the terminal
    python -m examples.standalone_controller --png loop.png   # with matplotlib

The policy chases a reward that keeps rising with its KL, and its entropy collapses half way.
Without a penalty the KL would reach 3.6 nats per token; the law holds it at its threshold.
"""

import argparse
import math

import torch

from safe_ops.controllers import PID, Controller, EntropyGatedKL

UPDATES = 240
DRIFT = 0.015
"""Nats per token that every update adds, chasing the reward."""
EFFECT = 0.1
"""Nats per token that one unit of ``kl_coef`` takes off: learning rate times |grad KL|^2."""
ROWS = ("kl", "kl_threshold", "entropy_gate", "kl_coef")


def simulate(law: EntropyGatedKL, updates: int = UPDATES) -> dict[str, list[float]]:
    """One run, a list per row: measure, move the controller, let its coefficient act."""
    controller = Controller(law)
    noise = torch.randn(2, updates, generator=torch.Generator().manual_seed(0)).tolist()
    history: dict[str, list[float]] = {name: [] for name in ROWS}
    kl = 0.0
    for t in range(updates):
        state = controller(
            kl=kl + 0.01 * noise[0][t],
            entropy=2.2 if t < updates // 2 else 0.8,
            reward=1 - math.exp(-2 * kl) + 0.2 * noise[1][t],
        )
        history["kl"].append(kl)
        for name in ROWS[1:]:
            history[name].append(float(getattr(state, name)))
        kl = max(0.0, kl + DRIFT - EFFECT * float(state.kl_coef))
    return history


def text_plot(history: dict[str, list[float]], width: int = 60) -> str:
    """One line a row, eight heights, from 0 to the row's largest value."""
    lines = []
    for name, values in history.items():
        top = max(values) or 1.0
        picked = [values[i * len(values) // width] for i in range(width)]
        bars = "".join(" ▁▂▃▄▅▆▇█"[round(8 * value / top)] for value in picked)
        lines.append(f"{name:>12} {bars} last {values[-1]:.2f}, largest {top:.2f}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Simulate and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--png", help="file to draw into, instead of the terminal")
    png = parser.parse_args(arguments).png
    law = EntropyGatedKL(coef=1.0, kl_integral=PID(ki=0.05, lower=0.0, upper=0.3), pid=PID(kp=0.5))
    history = simulate(law)
    if png is None:
        print(text_plot(history))
        return
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(ROWS), sharex=True, layout="constrained")
    for axis, (name, values) in zip(axes, history.items(), strict=True):
        axis.plot(values)
        axis.set_ylabel(name)
    figure.savefig(png)


if __name__ == "__main__":
    main()
