"""From alarms to actions: the same decision on every rank, an event for each, resumable."""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from safe_ops.controllers import Controller, flatten_state
from safe_rl.checkpoints import Stateful
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
    """The state of some parts when the run was last known to be well, to go back to.

    It is itself a part of the checkpoint, so one file holds both states and a resumed run goes back
    to where an uninterrupted one would. Copies are on the CPU: with adapters and Adam three times
    the adapters' size, in memory and again in the checkpoint.

    Args:
        parts: By name; not the random generators, nor the order of the data: a run that goes back
            must not meet the same rollouts again.

    Example:
        >>> layer = torch.nn.Linear(1, 1, bias=False)
        >>> good = LastGood({"layer": layer})
        >>> good.keep(0)
        >>> before = layer.weight.item()
        >>> _ = layer.weight.data.fill_(float("nan"))
        >>> good.restore(), layer.weight.item() == before
        (0, True)
    """

    def __init__(self, parts: Mapping[str, Stateful]) -> None:
        self._parts = dict(parts)
        self._step = -1
        self._states: dict[str, Any] = {}

    def keep(self, step: int) -> None:
        """Copy the state of every part, after ``step`` updates."""
        self._states = {name: _on_cpu(part.state_dict()) for name, part in self._parts.items()}
        self._step = step

    def restore(self) -> int:
        """Give every part that state back; returns the number of updates it is from.

        Raises:
            RuntimeError: Nothing was kept.
        """
        if self._step < 0:
            raise RuntimeError("nothing was kept: call keep() before the first update")
        for name, part in self._parts.items():
            # A part may go on working in the tensors that it is given.
            part.load_state_dict(copy.deepcopy(self._states[name]))
        return self._step

    def state_dict(self) -> dict[str, Any]:
        """What was kept."""
        return {"step": self._step, "states": self._states}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take it back."""
        self._step, self._states = state_dict["step"], dict(state_dict["states"])


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_cpu(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(inner) for inner in value)
    return copy.deepcopy(value)
