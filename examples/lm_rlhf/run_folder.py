"""The folder of a run: begun once, or taken up again with the same settings."""

import dataclasses
import math
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from examples.lm_rlhf.config import Config
from safe_rl.checkpoints import Stateful, load_checkpoint
from safe_rl.monitoring.audit import audit_log
from safe_rl.monitoring.run_log import LOG_NAME, TIMING_NAME, RunLog

CHECKPOINT_NAME = "checkpoint.pt"
PACKAGES = (
    "safe-rl-toolkit",
    "torch",
    "tensordict",
    "torchrl",
    "transformers",
    "peft",
    "accelerate",
    "vaderSentiment",
    "gguf",
    "vllm",
)


class RunFolder:
    """Log, timing and checkpoint of one run.

    Args:
        path: A folder that does not exist yet or is empty; or, to resume, one with a checkpoint of
            a run with the same settings.
        config: Settings.
        resume: Which of the two.

    Raises:
        ValueError: The folder does not fit, or a line of its log was edited; nothing in it has
            been changed.
    """

    def __init__(self, path: Path, config: Config, *, resume: bool) -> None:
        self.path = path
        self.log = RunLog(path / LOG_NAME)
        self.timing = RunLog(path / TIMING_NAME)
        self.checkpoint = path / CHECKPOINT_NAME
        self._settings = run_settings(config)
        self._steps = config.steps
        if resume:
            self._check_same_settings()
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(f"output {path} holds something already: use --resume or another")

    def begin(self, hashes: Mapping[str, str], *, processes: int) -> None:
        """Make the folder and write the first line of the log.

        Args:
            hashes: SHA-256 of what the settings only name: prompts, weights, reward model.
            processes: How many ranks the run has.
        """
        self.log.write(
            {
                "record": "run",
                "settings": self._settings,
                "versions": versions(),
                "processes": processes,
                "hashes": dict(hashes),
            }
        )

    def load(self, parts: Mapping[str, Stateful], hashes: Mapping[str, str]) -> int:
        """Give every part its state back; returns the number of updates done.

        Raises:
            ValueError: prompts, weights or reward model are not those that the run began with.
        """
        begun = RunLog.read(self.log.path)[0]["hashes"]
        changed = sorted(name for name in hashes if hashes[name] != begun.get(name))
        if changed:
            raise ValueError(
                f"output {self.path} is a run with other content of: {', '.join(changed)}"
            )
        return load_checkpoint(self.checkpoint, parts)

    def take_up(self, step: int, *, processes: int) -> None:
        """Drop from the logs what came after the checkpoint; a line says by whom, and what went.

        Other versions than before do not stop a run, which may have to outlive a machine: they are
        named in the line. It has no ``step``, so that a later resume does not drop it, and it is
        written first: a kill between the two leaves it there twice, and never away.

        Args:
            step: Updates done.
            processes: How many ranks go on.
        """
        earlier = [r for r in RunLog.read(self.log.path) if r["record"] in ("run", "resume")]
        before, now = earlier[-1]["versions"], versions()
        changed = {
            name: f"{before.get(name)} -> {now.get(name)}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        }
        dropped, last = self.log.after(step)
        self.log.write(
            {
                "record": "resume",
                "updates_done": step,
                "steps": self._steps,
                "processes": processes,
                "versions": now,
                "changed_versions": changed,
                "records_dropped": dropped,
                "last_dropped_chain": last,
            }
        )
        self.log.truncate_to(step)
        self.timing.truncate_to(step)

    def _check_same_settings(self) -> None:
        if not self.checkpoint.is_file():
            raise ValueError(f"output {self.path} holds no checkpoint to resume from")
        audit_log(self.log.path)
        saved, asked = flat(RunLog.read(self.log.path)[0]["settings"]), flat(self._settings)
        changed = sorted(k for k in asked if k != "steps" and asked[k] != saved.get(k))
        if changed:
            differences = ", ".join(f"{k}: {saved.get(k)!r} -> {asked[k]!r}" for k in changed)
            raise ValueError(f"output {self.path} is a run with other settings ({differences})")


def versions() -> dict[str, str | None]:
    """Of Python and ``PACKAGES``; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def run_settings(config: Config) -> dict[str, object]:
    """The settings as strict JSON holds them: infinities are strings."""
    law = config.kl_law
    settings = dataclasses.asdict(config) | {
        "threshold_lower": law.threshold_lower,
        "threshold_upper": law.threshold_upper,
    }
    return plain(settings)


def plain(value: Any) -> Any:
    """Settings without what JSON lacks."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    table: dict[str, Any] = {}
    for key, value in settings.items():
        inner = flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        table.update(inner)
    return table
