"""The figure of a run: a panel per question, drawn from its update records."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

Record = dict[str, Any]

# Okabe-Ito, which stays apart under the common forms of colour blindness.
_BLUE, _ORANGE, _GREEN, _SKY, _YELLOW, _PURPLE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#56B4E9",
    "#E69F00",
    "#CC79A7",
)
_PHASE_COLOURS = {
    "warm_up": "#B9C0C7",
    "climbing": _SKY,
    "converged": _GREEN,
    "plateau": _YELLOW,
}
_EVENT_LINE: dict[str, Any] = {"color": _PURPLE, "linewidth": 1.1, "linestyle": (0, (1, 1.5))}
_FEW_UPDATES = 12  # up to here each update gets a marker; a lone point would have no line


class _Theme(NamedTuple):
    background: str
    text: str
    quiet: str
    grid: str
    lines: dict[str, str]


_LIGHT = _Theme("#ffffff", "#1c2329", "#626d77", "#e4e8eb", {})
_DARK = _Theme("#14181c", "#e6eaed", "#9aa5ae", "#2c343b", {_BLUE: "#4FA8E0", _ORANGE: "#F08A45"})


@dataclass(frozen=True)
class _Line:
    key: str
    label: str
    colour: str = _BLUE
    spread: str = ""


@dataclass(frozen=True)
class _Panel:
    """A question: the main curves, with the quantity that explains them in a low axis beneath."""

    title: str
    unit: str
    main: tuple[_Line, ...]
    below: tuple[_Line, ...]
    below_title: str
    clamps: bool = False
    may_be_log: bool = False


_PANELS = (
    _Panel(
        "Reward",
        "mean of the rollout ± standard deviation",
        (_Line("reward_mean", "reward", spread="reward_std"),),
        (_Line("response_tokens_mean", "response length"),),
        "response length, tokens",
    ),
    _Panel(
        "KL to the reference policy",
        "nats per token",
        (
            _Line("kl_nats_per_token", "KL"),
            _Line("kl_threshold_nats_per_token", "threshold", _ORANGE),
        ),
        (_Line("kl_coef", "f′(KL)"), _Line("kl_reward_coef", "coefficient in the reward")),
        "KL coefficient",
        clamps=True,
    ),
    _Panel(
        "Entropy",
        "nats per token",
        (_Line("entropy_nats_per_token", "entropy"),),
        (_Line("entropy_gate", "gate"),),
        "entropy gate",
    ),
    _Panel(
        "Value loss",
        "the critic's training loss",
        (_Line("loss_value", "value loss"),),
        (_Line("explained_variance", "explained variance"),),
        "explained variance of the returns",
        may_be_log=True,
    ),
    _Panel(
        "Text",
        "perplexity of the samples under the reference",
        (_Line("ref_perplexity", "perplexity"),),
        (_Line("distinct_bigrams_fraction", "distinct bigrams"),),
        "distinct bigrams, fraction",
        may_be_log=True,
    ),
    _Panel(
        "Policy step",
        "fraction of tokens clipped",
        (_Line("clip_fraction", "clip fraction"),),
        (_Line("ratio_max", "largest ratio"),),
        "largest importance ratio",
    ),
)


def series(updates: Sequence[Record], key: str) -> list[float] | None:
    """Values of one key over the updates.

    Args:
        updates: Update records of a `RunLog`.
        key: The measurement.

    Returns:
        One float per update, NaN where the record lacks the key; None where every record does.

    Example:
        >>> series([{"a": 1.0}, {}], "a"), series([{}], "a")
        ([1.0, nan], None)
    """
    if all(update.get(key) is None for update in updates):
        return None
    return [math.nan if update.get(key) is None else float(update[key]) for update in updates]


def draw_run(
    updates: Sequence[Record],
    *,
    settings: Mapping[str, Any] | None = None,
    title: str = "",
    dark: bool = False,
    events: Sequence[Record] = (),
) -> Figure:
    """Draw the run: reward, KL and threshold, entropy and gate, value loss, text, policy step.

    Panels whose keys are absent from every record are left out. Values that are not finite leave
    a gap. Phases are a coloured strip along the top of each panel, events a dotted line through it.
    Only this `Figure` is touched, never pyplot's state.

    Args:
        updates: Update records of a `RunLog`, in order.
        settings: The run's settings; ``threshold_lower`` and ``threshold_upper``, in nats per
            token, become the clamp lines of the KL panel.
        title: Line above the panels.
        dark: Light curves on a dark ground.
        events: Event records of the log.

    Returns:
        A figure; with no update it says so.

    Example:
        >>> figure = draw_run([{"step": 0, "reward_mean": 0.5, "phase": "climbing"}])
        >>> [axes.get_label() for axes in figure.axes]
        ['phases', 'Reward']
    """
    theme = _DARK if dark else _LIGHT
    panels = [panel for panel in _PANELS if _present(updates, panel.main + panel.below)]
    rows = max(1, math.ceil(len(panels) / 2))
    columns = 2 if len(panels) > 1 else 1
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, hspace=0.02, wspace=0.02)
    figure = Figure(figsize=(5.6 * columns, 0.9 + 3.1 * rows), layout=layout)
    figure.set_facecolor(theme.background)
    if title:
        figure.suptitle(title, x=0.012, ha="left", fontsize=12, color=theme.text, weight="bold")
    if not panels:
        words = "No update was finished." if not updates else "The log holds no measurement."
        figure.text(0.5, 0.5, words, ha="center", va="center", color=theme.quiet, fontsize=13)
        return figure

    grid = figure.add_gridspec(rows, columns)
    steps = [float(update.get("step", place)) for place, update in enumerate(updates)]
    phases = [str(update.get("phase") or "") for update in updates]
    marked = sorted({float(event["step"]) for event in events})
    for place, panel in enumerate(panels):
        axes = _split(figure, grid[divmod(place, columns)], panel, updates, any(phases))
        if "phases" in axes:
            _draw_phases(axes["phases"], steps, phases)
        for name, lines in (("main", panel.main), ("below", panel.below)):
            if name in axes:
                _draw_lines(axes[name], steps, updates, lines, theme)
                for step in marked:
                    axes[name].axvline(step, **_EVENT_LINE)
        if "main" in axes:
            if panel.clamps:
                _draw_clamps(axes["main"], settings or {}, theme)
            if panel.may_be_log:
                _maybe_log(axes["main"])
        _style(axes, panel, steps, theme)
    names = [name for name in dict.fromkeys(phases) if name]
    handles: list[Artist] = [Patch(color=_phase_colour(n), label=_words(n)) for n in names]
    if marked:
        handles.append(Line2D([], [], label="event", **_EVENT_LINE))
    if handles:
        figure.legend(
            handles=handles,
            loc="outside lower left",
            ncols=len(handles),
            frameon=False,
            labelcolor=theme.quiet,
            fontsize=9,
            handlelength=1.2,
        )
    return figure


def _present(updates: Sequence[Record], lines: Sequence[_Line]) -> bool:
    return any(series(updates, line.key) is not None for line in lines)


def _split(
    figure: Figure, cell: Any, panel: _Panel, updates: Sequence[Record], phases: bool
) -> dict[str, Axes]:
    """Divide a cell of the grid into strip, main axes and low axes, as far as there is data."""
    heights = {"phases": 0.14} if phases else {}
    if _present(updates, panel.main):
        heights["main"] = 3.0
    if _present(updates, panel.below):
        heights["below"] = 1.0
    inner = cell.subgridspec(len(heights), 1, height_ratios=list(heights.values()), hspace=0.04)
    labels = {"phases": "phases", "main": panel.title, "below": panel.below_title}
    axes: dict[str, Axes] = {}
    for row, name in enumerate(heights):
        share = next(iter(axes.values()), None)
        axes[name] = figure.add_subplot(inner[row], label=labels[name], sharex=share)
    return axes


def _draw_lines(
    axes: Axes,
    steps: Sequence[float],
    updates: Sequence[Record],
    lines: Sequence[_Line],
    theme: _Theme,
) -> None:
    marker = "o" if len(steps) <= _FEW_UPDATES else ""
    drawn = 0
    for line in lines:
        values = series(updates, line.key)
        if values is None:
            continue
        y = np.where(np.isfinite(values), values, np.nan)
        colour = theme.lines.get(line.colour, line.colour)
        style = {"color": colour, "linewidth": 1.7, "marker": marker, "markersize": 3.5}
        axes.plot(steps, y, label=line.label, **style)
        drawn += 1
        spread = series(updates, line.spread) if line.spread else None
        if spread is not None:
            # A band needs width: with one update it is an error bar.
            if len(steps) == 1:
                axes.errorbar(steps, y, yerr=spread, color=colour, capsize=4, linewidth=1)
            else:
                axes.fill_between(
                    steps, y - spread, y + spread, color=colour, alpha=0.16, linewidth=0
                )
        if np.isnan(y).all():
            axes.text(0.5, 0.5, "not finite", transform=axes.transAxes, ha="center", color=_ORANGE)
    if drawn > 1:
        axes.legend(
            loc="lower right",
            bbox_to_anchor=(1.0, 1.0),
            ncols=drawn,
            frameon=False,
            fontsize=9,
            labelcolor=theme.text,
            handlelength=1.4,
            borderaxespad=0.1,
            columnspacing=1.2,
        )


def _draw_clamps(axes: Axes, settings: Mapping[str, Any], theme: _Theme) -> None:
    # The upper label stands under its line at the left, where KL begins; the lower one opposite.
    for key, words, x, side in (
        ("threshold_lower", "lower clamp", 1.0, "right"),
        ("threshold_upper", "upper clamp", 0.0, "left"),
    ):
        limit = settings.get(key)
        if not isinstance(limit, int | float) or not math.isfinite(limit):
            continue
        axes.axhline(limit, color=theme.quiet, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(
            f"{words} {limit:g}",
            (x, limit),
            xycoords=axes.get_yaxis_transform(),
            xytext=(-2, 2) if side == "right" else (3, -2),
            textcoords="offset points",
            ha=side,
            va="bottom" if side == "right" else "top",
            fontsize=8,
            color=theme.quiet,
        )


def _maybe_log(axes: Axes) -> None:
    """Use a logarithmic axis where a curve spans so much that a linear one would hide its end."""
    curves = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in curves])
    values = values[np.isfinite(values)]
    if values.size and values.min() > 0 and values.max() / values.min() > 50:
        axes.set_yscale("log")


def _draw_phases(axes: Axes, steps: Sequence[float], phases: Sequence[str]) -> None:
    for step, name in zip(steps, phases, strict=True):
        if name:
            axes.axvspan(step - 0.5, step + 0.5, color=_phase_colour(name), linewidth=0)


def _phase_colour(name: str) -> str:
    return _PHASE_COLOURS.get(name, _PURPLE)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _style(axes: dict[str, Axes], panel: _Panel, steps: Sequence[float], theme: _Theme) -> None:
    first, last = next(iter(axes)), list(axes)[-1]
    # Without a strip the unit stands where the title would.
    pad = 6 if "phases" in axes else 20
    heading = {"fontsize": 11.5, "color": theme.text, "weight": "bold"}
    axes[first].set_title(panel.title, loc="left", pad=pad, fontdict=heading)
    axes[first].set_xlim(min(steps) - 0.5, max(steps) + 0.5)
    for name, part in axes.items():
        part.set_facecolor(theme.background)
        if name == "phases":
            part.set_axis_off()
            continue
        for side in ("top", "right"):
            part.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            part.spines[side].set_color(theme.grid)
        part.grid(color=theme.grid, linewidth=0.7)
        part.set_axisbelow(True)
        part.tick_params(which="both", length=0)
        part.tick_params(colors=theme.quiet, labelsize=8.5, labelbottom=name == last)
        if name == "below":
            part.yaxis.set_major_locator(MaxNLocator(nbins=2, min_n_ticks=2))
        part.text(
            0.0,
            1.02,
            panel.unit if name == "main" else panel.below_title,
            transform=part.transAxes,
            fontsize=8.5,
            color=theme.quiet,
            va="bottom",
        )
    axes[last].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    axes[last].set_xlabel("update", fontsize=8.5, color=theme.quiet)
