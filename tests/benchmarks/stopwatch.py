"""Where an update's time goes: functions of a running loop are wrapped, the loop is not changed."""

import functools
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch

Update = dict[str, float]


def gpu_clock() -> float:
    """Seconds, when the GPU has done what it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


class Stopwatch:
    """CPU seconds of this thread, by stage and by update, while it is entered.

    A stage's time is its own: what a stage inside it takes is counted there alone, unless the outer
    one is ``whole``. ``clock``:
    another one, such as ``gpu_clock``. ``tell`` gets every update when it is over; the time that it
    takes is no update's.
    """

    def __init__(
        self,
        tell: Callable[[Update], object],
        clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self._tell = tell
        self._clock = clock
        self._patches = ExitStack()
        self._stages = ["rest"]
        self._whole: set[str] = set()
        self._begin()

    def __enter__(self) -> "Stopwatch":
        return self

    def __exit__(self, *exception: object) -> None:
        self._patches.close()

    def stage(self, owner: object, name: str, stage: str, *, whole: bool = False) -> None:
        """Count the calls of ``owner.name`` under ``stage``."""
        self._whole |= {stage} if whole else set()
        self._wrap(owner, name, lambda: self._enter(stage), self._leave)

    def mark(self, owner: object, name: str, label: str, *, before: bool = False) -> None:
        """Note when ``owner.name`` returns, or is called, for the last time in an update."""

        def note() -> None:
            self._update[label] = self._clock() - self._start

        nothing = functools.partial(lambda: None)
        self._wrap(owner, name, *((note, nothing) if before else (nothing, note)))

    def update_ends(self, owner: object, name: str) -> None:
        """An update is over when ``owner.name`` returns."""
        self._wrap(owner, name, lambda: None, self._end)

    def _wrap(
        self, owner: Any, name: str, before: Callable[[], None], after: Callable[[], None]
    ) -> None:
        call = getattr(owner, name)

        @functools.wraps(call)
        def timed(*arguments: Any, **named: Any) -> Any:
            before()
            try:
                return call(*arguments, **named)
            finally:
                after()

        self._patches.enter_context(patch.object(owner, name, timed))

    def _begin(self) -> None:
        self._update = defaultdict(float)
        self._start = self._since = self._clock()
        self._wall = time.perf_counter()

    def _end(self) -> None:
        self._spend()
        self._update["whole"] = self._clock() - self._start
        self._update["wall"] = time.perf_counter() - self._wall
        self._tell(dict(self._update))
        self._begin()

    def _spend(self) -> None:
        now = self._clock()
        self._update[self._stages[-1]] += now - self._since
        self._since = now

    def _enter(self, stage: str) -> None:
        self._spend()
        outer = self._stages[-1]
        self._stages.append(outer if outer in self._whole else stage)

    def _leave(self) -> None:
        self._spend()
        self._stages.pop()
