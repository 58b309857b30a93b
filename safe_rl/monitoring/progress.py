"""What a person sees while a run lasts: bars on a terminal, plain lines everywhere else."""

import math
import time
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Record = dict[str, Any]

# An update may take a minute, and rich's 30 s window would then see no speed to extrapolate.
_SPEED_WINDOW_SECONDS = 600.0


class RunProgress:
    """Show a run: a bar for its updates, a bar for the current stage, a line of measurements.

    Where the output is not a terminal (a pipe, a file, CI), there is no live display: each
    `update` prints one plain line, and stages print nothing.

    Args:
        total_steps: Updates in the whole run.
        start: Updates done before this process, in a resumed run.
        console: Where to show; by default standard output.

    Raises:
        ValueError: ``total_steps`` is negative, or ``start`` is not between 0 and it.

    Example:
        >>> with RunProgress(2) as progress:  # doctest: +ELLIPSIS
        ...     progress.stage("sampling", total=16)
        ...     progress.advance(16)
        ...     progress.update({"reward_mean": 0.5, "kl_nats_per_token": 0.02})
        update 1/2  reward 0.500  KL 0.0200 nats/token  ... s
    """

    def __init__(self, total_steps: int, start: int = 0, *, console: Console | None = None) -> None:
        if total_steps < 0:
            raise ValueError(f"total_steps must not be negative, got {total_steps}")
        if not 0 <= start <= total_steps:
            raise ValueError(f"start must be between 0 and total_steps {total_steps}, got {start}")
        self._total_steps = total_steps
        self._done = start
        self._last_update = time.monotonic()
        self._console = Console() if console is None else console
        self._live: Live | None = None
        self._measurements = Text("")
        self._bars = Progress(
            TextColumn("{task.description:<14}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            speed_estimate_period=_SPEED_WINDOW_SECONDS,
        )
        self._run_bar = self._bars.add_task("run", total=total_steps, completed=start)
        self._stage_bar = self._bars.add_task("", total=None, visible=False)
        # Not console.is_terminal: FORCE_COLOR, common in CI, makes it true for a pipe.
        if self._console.file.isatty() and not self._console.is_dumb_terminal:
            self._live = Live(
                get_renderable=lambda: Group(self._bars, self._measurements),
                console=self._console,
                refresh_per_second=4,
            )

    def __enter__(self) -> "RunProgress":
        self._last_update = time.monotonic()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bars.update(self._stage_bar, visible=False)
        if self._live is not None:
            self._live.stop()

    def stage(self, name: str, total: int | None) -> None:
        """Begin a stage: its bar starts again from nothing.

        Args:
            name: What is being done: ``"sampling"``, ``"scoring"``, ``"updates"``.
            total: Calls or units that `advance` will count; None where it is not known.
        """
        # A new task, since rich's reset() takes total=None as "leave the old total".
        self._bars.remove_task(self._stage_bar)
        self._stage_bar = self._bars.add_task(name, total=total)

    def advance(self, n: int = 1) -> None:
        """Move the bar of the current stage.

        Args:
            n: Units done since the last call.
        """
        self._bars.advance(self._stage_bar, n)

    def update(self, record: Record) -> None:
        """Count one update of the policy and show its measurements.

        Args:
            record: An update record, best the one that `RunLog.write` returned, whose values have
                left the device. Keys it lacks are left out.
        """
        self._done += 1
        now = time.monotonic()
        seconds, self._last_update = now - self._last_update, now
        self._bars.update(self._run_bar, completed=self._done)
        fields = measurement_fields(record)
        if self._live is None:
            line = "  ".join([f"update {self._done}/{self._total_steps}", *fields])
            print(f"{line}  {seconds:.1f} s", file=self._console.file, flush=True)
        else:
            self._measurements = Text("  ".join(fields))

    def event(self, record: Record) -> None:
        """Show an event's line above the bars.

        Args:
            record: An event record.
        """
        line = f"  {record['detector']}: {record['reason']} -> {record['action']}"
        if self._live is None:
            print(line, file=self._console.file, flush=True)
        else:
            self._console.print(Text(line))


def measurement_fields(record: Record) -> list[str]:
    """Put an update's main measurements into words, leaving out those it lacks.

    Args:
        record: An update record of a `RunLog`.

    Returns:
        One short text per measurement, in a fixed order.

    Example:
        >>> measurement_fields({"kl_nats_per_token": 0.12, "kl_threshold_nats_per_token": 0.1})
        ['KL 0.1200 > threshold 0.1000 nats/token']
    """

    def number(key: str) -> float | None:
        return None if record.get(key) is None else float(record[key])

    fields = []
    reward, reward_std = number("reward_mean"), number("reward_std")
    if reward is not None:
        spread = "" if reward_std is None else f" ± {reward_std:.3f}"
        fields.append(f"reward {reward:.3f}{spread}")
    kl, threshold = number("kl_nats_per_token"), number("kl_threshold_nats_per_token")
    if kl is not None:
        limit = ""
        if threshold is not None:
            sign = "?" if math.isnan(kl) else ">" if kl > threshold else "≤"
            limit = f" {sign} threshold {threshold:.4f}"
        fields.append(f"KL {kl:.4f}{limit} nats/token")
    entropy, gate = number("entropy_nats_per_token"), number("entropy_gate")
    if entropy is not None:
        fields.append(f"entropy {entropy:.3f} nats/token")
    if gate is not None:
        fields.append(f"gate {gate:.2f}")
    if record.get("phase"):
        fields.append(f"phase {record['phase']}")
    if record.get("non_finite"):
        fields.append("NON-FINITE")
    return fields
