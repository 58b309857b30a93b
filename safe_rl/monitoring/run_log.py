"""The log of a run: one strict JSON document per line, appended once per update."""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Record = dict[str, Any]

LOG_NAME = "log.jsonl"
"""The log inside a run's folder. It holds no wall-clock quantity: see `RunLog.truncate_to`."""
TIMING_NAME = "timing.jsonl"
"""Seconds per step go here, since they differ between two otherwise equal runs."""

CHAIN_START = "0" * 64
"""What the first line's hash goes on from."""

# The hash stands last in its line, at a known distance from the line's end.
_CHAIN = re.compile(rb', "chain": "([0-9a-f]{64})"}\Z')
_CHAIN_BYTES = len(', "chain": ""}') + 64

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RunLog:
    """Append-only JSONL: a line per record, complete on disk before `write` returns.

    Records are dicts with a ``"record"`` key that names their kind:

        {"record": "run", "seed": 0, "settings": {...}, "versions": {...}}        first line
        {"record": "update", "step": 0, "reward_mean": 0.2, ...}                  one per update
        {"record": "samples", "step": 0, "samples": [{"prompt", "response", "reward"}, ...]}
        {"record": "resume", "updates_done": 1, "records_dropped": 3, ...}           has no step

    Rules one may rely on:

    - Each line is strict JSON in ASCII. JSON has no NaN or infinity, so a number that is not finite
      is the string ``"NaN"``, ``"Infinity"`` or ``"-Infinity"``. `read` turns these back into
      floats where they are a record's own values, not inside its lists and dicts, where text lives.
    - A line ends in a newline. A last line without one was being written when the process was
      killed: `read` leaves it out, and the next `write` or `truncate_to` removes it. A malformed
      line anywhere else is an error.
    - The file is open only during a `write`, so there is nothing to close.
    - Each line ends in ``"chain"``: SHA-256 over the hash of the line before and this line without
      its own. A line that was edited, added or removed shows, see `safe_rl.monitoring.audit`.
      `read` leaves the hash out.

    Args:
        path: The file, for example ``run/log.jsonl``. It is created, with its folder, by the first
            `write`; an existing file is continued.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> log = RunLog(Path(folder.name) / "log.jsonl")
        >>> log.write({"record": "update", "step": 0, "reward_mean": torch.tensor(0.5)})
        {'record': 'update', 'step': 0, 'reward_mean': 0.5}
        >>> RunLog.read(log.path)
        [{'record': 'update', 'step': 0, 'reward_mean': 0.5}]
        >>> folder.cleanup()
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"RunLog({str(self.path)!r})"

    def write(self, record: Record) -> Record:
        """Append one record, in one write that has left the process when this returns.

        Tensors become numbers here and nowhere else: one transfer per device and dtype, whatever
        the number of keys, so keep measurements as tensors until this call.

        Args:
            record: JSON values and 0-d tensors, nested in dicts, lists and tuples. ``"record"`` is
                a string; ``"step"``, where present, an int; ``"chain"`` is the log's own.

        Returns:
            The record with plain Python values (NaN and infinity as floats), to show elsewhere
            without a second synchronisation.

        Raises:
            ValueError: A value cannot be written; the message names its key. Nothing is written.
            OSError: The line did not fit on the disk.
        """
        if not isinstance(record.get("record"), str):
            raise ValueError(f'record must have a string under "record", got {record!r}')
        step = record.get("step", 0)
        if not isinstance(step, int) or isinstance(step, bool):
            raise ValueError(f"step must be an int, got {step!r}")
        if "chain" in record:
            raise ValueError(f"chain is written by the log itself, got {record['chain']!r}")
        plain = _plain(record, "", _fetch(dict(_tensors(record, ""))))
        content = json.dumps(_strict(plain), allow_nan=False).encode("ascii")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Unbuffered: one system call, after which a kill of this process cannot lose the line.
        with open(self.path, "ab+", buffering=0) as file:
            _cut_unfinished_line(file)
            line = link(content, _last_chain(file))
            written = file.write(line)
        if written != len(line):
            raise OSError(f"{self.path}: {written} of {len(line)} bytes written; is the disk full?")
        return plain

    @staticmethod
    def read(path: str | os.PathLike[str]) -> list[Record]:
        """Read all finished records, in order; the file is not changed.

        Args:
            path: A file written by `write`.

        Returns:
            The records; an empty list for an empty file.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: A finished line is not a record; the message gives the file and the line.
        """
        return [record for _, record in _lines(Path(path))]

    def last_chain(self) -> str:
        """Hash of the last finished line, which stands for the whole log; empty without one.

        Raises:
            FileNotFoundError: There is no such file.
        """
        finished = self.path.read_bytes().rpartition(b"\n")[0]
        return split_chain(finished.rpartition(b"\n")[2])[1]

    def after(self, step: int) -> tuple[int, str]:
        """What `truncate_to` would drop: how many records, and the hash of the last of them.

        A resume writes both into the log before it drops them, in a record without a step: what was
        cut back leaves a trace, and a hash that was noted of the longer log is found again.

        Args:
            step: First step to drop, counted from 0.

        Returns:
            Count and hash; 0 and an empty text where nothing would go or there is no file.

        Raises:
            ValueError: ``step`` is negative, or the log has a malformed line.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     log = RunLog(Path(folder) / "log.jsonl")
            ...     for step in range(3):
            ...         _ = log.write({"record": "update", "step": step})
            ...     count, chain = log.after(1)
            ...     count, chain == log.last_chain()
            (2, True)
        """
        _check_step(step)
        if not self.path.exists():
            return 0, ""
        lines = [line for line, record in _lines(self.path) if _is_of(record, step)]
        return len(lines), split_chain(lines[-1])[1] if lines else ""

    def truncate_to(self, step: int) -> int:
        """Drop every record of ``step`` and later, so that a resumed run continues the log.

        A checkpoint taken after s updates resumes with step s. After ``truncate_to(s)`` the log is
        what it was when steps 0 .. s-1 were done, so the stopped and resumed log equals the log of
        an uninterrupted run byte for byte, as long as the records themselves do. Records without a
        step, like the header, stay. The new file replaces the old one atomically.

        Args:
            step: First step to drop, counted from 0.

        Returns:
            How many finished records were dropped; 0 where there is no file yet.

        Raises:
            ValueError: ``step`` is negative, or the log has a malformed line (it is left as it is).
        """
        _check_step(step)
        if not self.path.exists():
            return 0
        kept: list[bytes] = []
        dropped, chain = 0, CHAIN_START
        for line, record in _lines(self.path):
            if _is_of(record, step):
                dropped += 1
                continue
            # What stays behind a dropped line hangs on the line before that.
            kept.append(link(split_chain(line)[0], chain) if dropped else line)
            chain = split_chain(kept[-1])[1]
        content = b"".join(kept)
        if len(content) != self.path.stat().st_size:
            replace_file(self.path, content)
        return dropped


def link(content: bytes, before: str) -> bytes:
    """A line of a log: the JSON object with its hash in it.

        chain = SHA-256(chain of the line before, then the object without its chain)

    Args:
        content: A JSON object, not empty.
        before: Hash of the line before; ``CHAIN_START`` for the first.

    Example:
        >>> link(b'{"record": "run"}', CHAIN_START)[:29]
        b'{"record": "run", "chain": "b'
    """
    chain = hashlib.sha256(before.encode("ascii") + content).hexdigest()
    return content[:-1] + b', "chain": "' + chain.encode("ascii") + b'"}\n'


def split_chain(line: bytes) -> tuple[bytes, str]:
    """Undo `link`: the JSON object and its hash; an empty hash where the line has none.

    Example:
        >>> split_chain(b'{"record": "run"}\\n')
        (b'{"record": "run"}', '')
    """
    line = line.removesuffix(b"\n")
    found = _CHAIN.search(line)
    return (line[: found.start()] + b"}", found[1].decode("ascii")) if found else (line, "")


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a whole file so that a reader, or a crash, sees the old content or the new, no mixture.

    Args:
        path: The file; ``path + ".tmp"`` beside it is used on the way.
        content: All of it.

    Raises:
        OSError: The file could not be written; the old one is untouched.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     replace_file(Path(folder) / "a.txt", b"new")
        ...     os.listdir(folder)
        ['a.txt']
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_step(step: int) -> None:
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}")


def _is_of(record: Record, step: int) -> bool:
    """Whether it is of ``step`` or later; a record without a step is of none."""
    return record.get("step", -1) >= step


def _lines(path: Path) -> Iterator[tuple[bytes, Record]]:
    """Yield each finished line with the record it holds."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not strict JSON")

    # Only b"\n" ends a line; splitlines() would also split at characters inside a text.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line, parse_constant=refuse)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: {error}. Only a last line without a newline may be "
                f"unfinished; remove or repair this one. It reads {line[:80]!r}"
            ) from error
        if not isinstance(record, dict) or not isinstance(record.get("record"), str):
            raise ValueError(
                f'{path}, line {number}: expected an object with a string under "record", '
                f"got {line[:80]!r}"
            )
        if not isinstance(record.get("step", 0), int):
            raise ValueError(f"{path}, line {number}: step must be an int, got {record['step']!r}")
        yield (
            line + b"\n",
            {
                key: _NON_FINITE.get(value, value) if isinstance(value, str) else value
                for key, value in record.items()
                if key != "chain"
            },
        )


def _cut_unfinished_line(file: Any) -> None:
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        return
    file.seek(end - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)


def _last_chain(file: Any) -> str:
    """Hash of the last line, without reading the file; an unchained log is gone on with anew."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - _CHAIN_BYTES - 1))
    return split_chain(file.read())[1] or CHAIN_START


def _children(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, child in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{path or 'record'}: keys must be strings, got {key!r}")
            yield f"{path}.{key}" if path else key, child
    elif isinstance(value, list | tuple):
        for position, child in enumerate(value):
            yield f"{path}[{position}]", child


def _tensors(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.ndim:
            raise ValueError(f"{path} must be a 0-d tensor, got shape {list(value.shape)}")
        yield path, value
    for child_path, child in _children(value, path):
        yield from _tensors(child, child_path)


def _fetch(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Bring all tensors to the CPU: a stack and a transfer for each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for path, tensor in tensors.items():
        groups.setdefault((tensor.device, tensor.dtype), []).append(path)
    values: dict[str, Any] = {}
    for paths in groups.values():
        stacked = torch.stack([tensors[path].detach() for path in paths])
        values.update(zip(paths, stacked.tolist(), strict=True))
    return values


def _plain(value: Any, path: str, fetched: dict[str, Any]) -> Any:
    if isinstance(value, Tensor):
        value = fetched[path]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        children = zip(value, _children(value, path), strict=True)
        return {key: _plain(child, where, fetched) for key, (where, child) in children}
    if isinstance(value, list | tuple):
        return [_plain(child, where, fetched) for where, child in _children(value, path)]
    raise ValueError(
        f"{path} is a {type(value).__name__}, which JSON cannot hold; write str({path}) or a number"
    )


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _strict(child) for key, child in value.items()}
    if isinstance(value, list):
        return [_strict(child) for child in value]
    return value
