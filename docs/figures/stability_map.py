"""Draws stability_map.png: where the simulated KL loop settles, over the derived limits.

    python -m docs.figures.stability_map

A minute on one core. Needs matplotlib.
"""

from pathlib import Path

import torch
from torch import Tensor

from safe_ops.controllers import (
    global_gain,
    smooth_gain,
    stable_gain,
    stable_gain_with_momentum,
)
from tests.reference.kl_plant import simulate, swing

PICTURE = Path(__file__).with_name("stability_map.png")
DRIFT, THRESHOLD = 0.01, 0.3
LABELS = ("settles from every start", "small disturbances only", "swings for ever")


def verdict(decay: Tensor, gain: Tensor, *, ki: Tensor | float = 0.0, **loop: object) -> Tensor:
    """0, 1 or 2, an index of LABELS, for every pair; from 0, from 5 nats and next to the rest."""
    offset = DRIFT / gain
    integral = torch.as_tensor(ki) > 0
    rest = THRESHOLD + torch.where(integral, 0.0, offset)
    common = {"steps": 4000, "keep": 400, "drift": DRIFT, "ki": ki, **loop}

    def swings(start: Tensor | float, offset_start: Tensor | float = 0.0) -> Tensor:
        kls = simulate(decay, gain, start=start, offset_start=offset_start, **common)
        return swing(kls) > 0.02 * DRIFT / gain

    # Small: well inside the active side of the ramp, which is d / k wide.
    small = swings(rest + 0.01 * offset, torch.where(integral, offset, 0.0))
    large = swings(0.0) | swings(THRESHOLD + 5.0)
    return small.long() + (large | small).long()


def main() -> None:
    """Draw the four maps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    colours = ListedColormap(["#d7eadb", "#fbe3b0", "#e9b9b4"])
    decays = torch.linspace(0.0, 0.99, 100, dtype=torch.float64)
    gains = torch.logspace(-2, 2.6, 140, dtype=torch.float64).unsqueeze(1)
    kis = torch.linspace(0.0, 0.6, 100, dtype=torch.float64)
    b = torch.tensor(0.7, dtype=torch.float64)
    panels = {
        "no delay": (decays, verdict(decays, gains)),
        "penalty one update late": (decays, verdict(decays, gains, delay=1)),
        "integral action, b = 0.7": (kis, verdict(b, gains, ki=kis)),
        "averaged gradients, b = 0.7": (decays, verdict(b, gains, momentum=decays)),
    }
    lines = {
        "no delay": {
            "stable_gain": [stable_gain(x) for x in decays.tolist()],
            "global_gain": [global_gain(x) for x in decays.tolist()],
            "smooth_gain": [smooth_gain(x) for x in decays.tolist()],
        },
        "penalty one update late": {
            "stable_gain": [stable_gain(x, delay=1) for x in decays.tolist()],
            "smooth_gain": [smooth_gain(x, delay=1) for x in decays.tolist()],
        },
        "integral action, b = 0.7": {
            "stable_gain": [stable_gain(0.7, ki=x) or 1e-2 for x in kis.tolist()],
        },
        "averaged gradients, b = 0.7": {
            "stable_gain_with_momentum": [
                stable_gain_with_momentum(0.7, momentum=x) for x in decays.tolist()
            ],
        },
    }
    names = ("decay b of the KL filter",) * 2 + ("ki", "momentum m (Adam: beta1)")
    styles = {"stable_gain": "-", "stable_gain_with_momentum": "-", "global_gain": "--"}
    figure, axes = plt.subplots(2, 2, figsize=(10, 8), layout="constrained")
    for axis, (title, (x, found)), name in zip(axes.flat, panels.items(), names, strict=True):
        axis.pcolormesh(x, gains[:, 0], found, cmap=colours, vmin=0, vmax=2, shading="nearest")
        for label, limit in lines[title].items():
            axis.plot(x, limit, styles.get(label, ":"), color="black", label=label)
        axis.set(yscale="log", ylim=(1e-2, 400), title=title, xlabel=name, ylabel="gain k")
        axis.legend(loc="lower left", fontsize=8)
    patches = [Patch(color=colours(i), label=label) for i, label in enumerate(LABELS)]
    figure.legend(handles=patches, loc="outside lower center", ncols=3)
    figure.savefig(PICTURE, dpi=110, metadata={"Software": None})
    for title, (_, found) in panels.items():
        print(title, torch.bincount(found.flatten(), minlength=3).tolist())


if __name__ == "__main__":
    main()
