"""Prints the simulated tables of docs/stability.md.

    python -m docs.figures.stability_tables

Some minutes on one core.
"""

import torch
from torch import Tensor

from safe_ops.controllers import (
    PID,
    EntropyGatedKL,
    reward_loop_gain,
    stable_gain,
    stable_gain_with_momentum,
)
from tests.benchmarks.measure import Table
from tests.reference.closed_loops import late_switches, with_adam, with_reward
from tests.reference.kl_plant import simulate, swing

DRIFT, THRESHOLD = 0.01, 0.3
SEEDS, UPDATES = 32, 1500


def gain_grid(limit: float, count: int = 400) -> Tensor:
    """Gains up to a limit, in even steps."""
    return torch.linspace(limit / count, limit, count, dtype=torch.float64)


def adam() -> Table:
    """Swing and identified gain of a policy under Adam."""
    rows = []
    for coef, beta1 in ((10, 0.9), (20, 0.9), (30, 0.9), (60, 0.9), (60, 0.0)):
        late, gain = with_adam(coef, beta1=beta1)
        limit = stable_gain_with_momentum(0.7, momentum=beta1)
        rows.append([str(coef), str(beta1), f"{gain:.2f}", f"{limit:.3g}", f"{late:.4f}"])
    columns = ["coef", "beta1", "k, read from the run", "limit", "swing, nats"]
    return Table("With Adam", columns, rows)


def large_swings() -> Table:
    """The first gain below the limit at which a start far away ends in a swing."""
    rows = []
    for delay in (0, 1):
        for decay in (0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99):
            limit = stable_gain(decay, delay=delay)
            gains = gain_grid(0.99 * limit)
            persists = torch.zeros(len(gains), dtype=torch.bool)
            for start in (0.0, THRESHOLD + 5.0):
                kls = simulate(decay, gains, start=start, steps=8000, keep=800, delay=delay)
                persists |= swing(kls) > 0.1 * DRIFT / gains
            first = f"{float(gains[persists][0]):.3g}" if persists.any() else "none"
            rows.append([str(delay), str(decay), f"{limit:.3g}", first])
    columns = ["delay", "b", "limit", "first gain at which a large swing persists"]
    return Table("Far from the rest point", columns, rows)


def lead() -> Table:
    """The first gain at which a small disturbance stops dying out, by horizon and window."""
    rows = []
    for horizon, window in ((0, 10), (5, 10), (10, 10), (20, 10), (5, 5)):
        cells = []
        for decay in (0.5, 0.7, 0.9):
            gains = gain_grid(1.05 * stable_gain(decay), 1000)
            start = THRESHOLD + 1.01 * DRIFT / gains
            kls = simulate(
                decay, gains, start=start, steps=4000, keep=400, horizon=horizon, window=window
            )
            grows = swing(kls) > 0.02 * DRIFT / gains
            cells.append(f"{float(gains[grows][0]):.2g}")
        rows.append([f"{horizon}, w = {window}", *cells])
    return Table("The lead", ["horizon", "b = 0.5", "b = 0.7", "b = 0.9"], rows)


def reward_loop() -> Table:
    """What a reward that follows the KL does to phases and threshold."""
    rows = []
    for kp in (2.0, 0.5, 0.2, 0.0):
        for noise in (0.02, 0.1, 0.3):
            law = EntropyGatedKL(coef=0.5, pid=PID(kp=kp, ki=0.01 * kp, rate_limit=0.02))
            phases, thresholds = with_reward(law, noise=noise, updates=UPDATES, seeds=SEEDS)
            late = thresholds[UPDATES // 2 :]
            ranges = late.amax(0) - late.amin(0)
            switches = late_switches(phases).float()
            # The mean absolute deviation of normal noise, and 1.2 reward per nat.
            returned = reward_loop_gain(
                kp=kp, slope=1.2, deviation=0.8 * noise, decay=0.95, window=10
            )
            quantiles = torch.tensor([0.0, 0.5, 1.0])
            rows.append(
                [
                    f"{kp:g}",
                    f"{noise:g}",
                    f"{returned:.2g}",
                    ", ".join(f"{float(x):.0f}" for x in switches.quantile(quantiles)),
                    ", ".join(f"{float(x):.2f}" for x in ranges.quantile(quantiles)),
                ]
            )
    columns = ["kp", "noise", "returned", "late switches", "late range of tau, nats"]
    return Table("A reward that follows the KL: least, median and largest", columns, rows)


def main() -> None:
    """Print them."""
    torch.set_num_threads(1)
    for table in (adam, large_swings, lead, reward_loop):
        print(table().markdown(), flush=True)


if __name__ == "__main__":
    main()
