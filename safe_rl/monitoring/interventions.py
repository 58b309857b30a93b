"""From alarms to actions: the same decision on every rank, an event for each, resumable."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from safe_ops.controllers import Controller, flatten_state
from safe_rl.checkpoints import Stateful, read_checkpoint, save_checkpoint
from safe_rl.monitoring.monitor import REASONS, Action, Monitor

Record = dict[str, Any]


def finite_on_all_ranks(*values: Tensor) -> bool:
    """Whether every number is finite, on every rank: the same answer on all of them.

    For a loss and its gradient's norm before an optimizer step. One message, the minimum over
    ranks, and one synchronisation with the device, whatever the number of values. Without a process
    group the answer is this process's.

    Args:
        values: On one device; any shape.

    Example:
        >>> finite_on_all_ranks(torch.tensor(1.0), torch.tensor(float("nan")))
        False
    """
    finite = torch.stack([torch.isfinite(value.detach()).all() for value in values]).all().int()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    return bool(finite)


def event(
    step: int, detector: str, *, seen: float | Tensor, limit: float, action: str, reason: str
) -> Record:
    """A log record of something that was noticed, and what was done about it.

    Example:
        >>> event(3, "kl_runaway", seen=4.0, limit=3.0, action="stop", reason="KL 4")["record"]
        'event'
    """
    return {
        "record": "event",
        "step": step,
        "detector": detector,
        "seen": seen,
        "limit": limit,
        "action": action,
        "reason": reason,
    }


class Interventions:
    """Decides once per update, from measurements that are alike on all ranks.

    It keeps the monitor's state and the two factors that its actions change. It does not touch
    optimizer, controller or parameters: the loop does, see `examples/lm_rlhf`. Save it with the run
    (``state_dict``), so that a resumed run decides as an uninterrupted one.

    Args:
        monitor: Detectors and actions.

    Example:
        >>> watch = Interventions(Monitor())
        >>> for step in range(3):
        ...     events = watch.observe(step, reward=0.0, entropy=2.0, kl=1.0, kl_threshold=0.3,
        ...         value_loss=0.1, skipped=0.0)
        >>> events[0]["detector"], events[0]["action"], watch.threshold_scale
        ('kl_runaway', 'tighten_threshold', 0.7)
    """

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
        self.controller = Controller(monitor)
        self.learning_rate_scale = 1.0
        """What the learning rates are multiplied with."""
        self.threshold_scale = 1.0
        """What the controller's threshold is multiplied with."""
        self.healthy = True
        """Whether the last update was free of alarms and of signs of one."""

    def observe(self, step: int, **measured: float | Tensor) -> list[Record]:
        """Take in an update's measurements, see ``Monitor.update``; one synchronisation.

        Returns:
            An event per alarm. The factors are already changed; "roll_back" and "stop" are the
            caller's to carry out, and ``rolled_back`` is then to be called.
        """
        before = self._alarms()
        self.controller(**measured)
        after = self._alarms()
        events = []
        for name, now in after.items():
            if now.raised == before[name].raised:
                continue
            ladder: tuple[Action, ...] = self.monitor.actions.get(name) or ("log",)
            action = ladder[min(now.raised, len(ladder)) - 1]
            reason = REASONS[name].format(seen=now.seen, limit=now.limit)
            events.append(
                event(step, name, seen=now.seen, limit=now.limit, action=action, reason=reason)
            )
        actions = {found["action"] for found in events}
        # Once per update, however many alarms ask for it: they mostly have one cause.
        if "lower_learning_rate" in actions:
            self.learning_rate_scale *= self.monitor.learning_rate_factor
        if "tighten_threshold" in actions:
            self.threshold_scale *= self.monitor.threshold_factor
        self.healthy = not any(now.active or now.beyond for now in after.values())
        return events

    def rolled_back(self) -> None:
        """The parameters are those of an earlier update: the alarms of the later ones are over."""
        calm = self.monitor.after_roll_back(self.controller.state)
        self.controller.load_state_dict(flatten_state(calm))

    def state_dict(self) -> dict[str, Any]:
        """The detectors' state and the factors."""
        return {
            "monitor": self.controller.state_dict(),
            "learning_rate_scale": self.learning_rate_scale,
            "threshold_scale": self.threshold_scale,
            "healthy": self.healthy,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take them back."""
        self.controller.load_state_dict(state_dict["monitor"])
        self.learning_rate_scale = state_dict["learning_rate_scale"]
        self.threshold_scale = state_dict["threshold_scale"]
        self.healthy = state_dict["healthy"]

    def _alarms(self) -> dict[str, "_Alarm"]:
        """Each alarm in plain numbers, fetched together."""
        alarms = self.monitor.alarms(self.controller.state)
        states = [state for _, state in alarms.values()]
        values = [torch.stack([s.seen.double(), s.raised, s.active, s.beyond]) for s in states]
        rows = torch.stack(values).tolist()
        return {
            name: _Alarm(law.limit, seen, int(raised), bool(active), bool(beyond))
            for (name, (law, _)), (seen, raised, active, beyond) in zip(
                alarms.items(), rows, strict=True
            )
        }


class _Alarm(NamedTuple):
    limit: float
    seen: float
    raised: int
    active: bool
    beyond: bool


class LastGood:
    """The state of some parts when the run was last known to be well, on disk, to go back to.

    It is itself a part of the checkpoint, which only says which file it is: a resumed run goes back
    to where an uninterrupted one would. The older file is there until the next checkpoint is
    written, so at every moment the one that the checkpoint names exists:

        good.keep(step); save_checkpoint(..., {"last_good": good, ...}); good.drop_older()

    With adapters and Adam a file is three times the adapters' size. It is in memory only in a
    roll-back.

    Args:
        parts: By name; not the random generators, nor the order of the data: a run that goes back
            must not meet the same rollouts again.
        folder: Where the files are, beside the checkpoint. Every rank reads them.
        write: False on all ranks but one: they write and drop nothing.

    Example:
        >>> import tempfile
        >>> layer = torch.nn.Linear(1, 1, bias=False)
        >>> before = layer.weight.item()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     good = LastGood({"layer": layer}, folder)
        ...     good.keep(0)
        ...     _ = layer.weight.data.fill_(float("nan"))
        ...     good.restore(), layer.weight.item() == before
        (0, True)
    """

    def __init__(
        self, parts: Mapping[str, Stateful], folder: str | os.PathLike[str], *, write: bool = True
    ) -> None:
        self._parts = dict(parts)
        self._folder = Path(folder)
        self._write = write
        self._step = -1

    @property
    def path(self) -> Path:
        """The file of the state that was kept."""
        return self._file(self._step)

    def keep(self, step: int) -> None:
        """Write the state of every part, after ``step`` updates, whole or not at all."""
        self._step = step
        save_checkpoint(self.path, step, self._parts, write=self._write)

    def drop_older(self) -> None:
        """Delete all other files: call it once the checkpoint names the present one."""
        if self._write:
            # With what a process left behind that was killed while it wrote.
            for file in self._folder.glob("*last_good_*.pt*"):
                if file != self.path:
                    file.unlink()

    def restore(self) -> int:
        """Give every part that state back; returns the number of updates it is from.

        Raises:
            RuntimeError: Nothing was kept.
            FileNotFoundError: The file is gone.
            ValueError: The file is cut, or is not of these parts and this update.
        """
        if self._step < 0:
            raise RuntimeError("nothing was kept: call keep() before the first update")
        step, states = read_checkpoint(self.path)
        if step != self._step or set(states) != set(self._parts):
            raise ValueError(
                f"{self.path} must hold {sorted(self._parts)} after {self._step} updates, "
                f"got {sorted(states)} after {step}"
            )
        for name, part in self._parts.items():
            part.load_state_dict(states.pop(name))
        return step

    def state_dict(self) -> dict[str, Any]:
        """Which file it is."""
        return {"step": self._step}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take it back.

        Raises:
            ValueError: The file is not there.
        """
        step = state_dict["step"]
        if step >= 0 and not self._file(step).is_file():
            raise ValueError(
                f"{self._file(step)} is missing, the state to go back to: it must lie there"
            )
        self._step = step

    def _file(self, step: int) -> Path:
        return self._folder / f"last_good_{step:08d}.pt"
