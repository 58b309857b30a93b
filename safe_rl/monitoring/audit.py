"""Whether the log of a run is whole: no line edited, added or removed.

    python -m safe_rl.monitoring.audit RUN/log.jsonl

It finds slips and losses, not a forger, who can hash the rest of the file anew: keep the last hash
that is printed here (the report shows it too) where the log's owner cannot write. A log cut at its
end is whole by itself, and shows by that hash alone. A resume cuts what came after its checkpoint,
and its record says how many lines and the hash of the last.
"""

import argparse
import hashlib
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from safe_rl.monitoring.run_log import CHAIN_START, link, split_chain


class Audit(NamedTuple):
    """A log whose lines hang together."""

    records: int
    chain: str
    """Hash of the last line, which stands for all of them."""
    unfinished: bool
    """Whether the process was killed while it wrote a further line."""


def audit_log(path: str | os.PathLike[str]) -> Audit:
    """Check every line's hash against its content and the line before.

    Args:
        path: A file written by ``RunLog``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line does not fit; the message names the file and the first such line.

    Example:
        >>> import tempfile
        >>> from safe_rl.monitoring import RunLog
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     log = RunLog(Path(folder) / "log.jsonl")
        ...     _ = log.write({"record": "run", "seed": 0})
        ...     audit_log(log.path).records
        1
    """
    path = Path(path)
    # Only b"\n" ends a line; what follows the last one was being written.
    *lines, rest = path.read_bytes().split(b"\n")
    chain = CHAIN_START
    for number, line in enumerate(lines, start=1):
        content, found = split_chain(line)
        if not found:
            raise ValueError(f"{path}, line {number} has no hash: it was edited or added")
        if link(content, chain) != line + b"\n":
            raise ValueError(
                f"{path}, line {number} does not follow from the line before: it was edited or "
                "added, or a line before it was removed"
            )
        chain = found
    return Audit(len(lines), chain, bool(rest))


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     file_sha256(file.name)[:8]
        'e3b0c442'
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@torch.no_grad()
def frozen_sha256(module: torch.nn.Module) -> str:
    """SHA-256 of the parameters that are not trained: which base, or reference, a run stands on.

    Over name, dtype, shape and bytes of each, in the order of their names. A gigabyte takes about
    a second.

    Example:
        >>> layer = torch.nn.Linear(1, 1).requires_grad_(False)
        >>> before = frozen_sha256(layer)
        >>> _ = layer.weight.add_(1)
        >>> frozen_sha256(layer) == before
        False
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        if parameter.requires_grad:
            continue
        value = parameter.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 for a whole log; else 1, with the first bad line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("log", type=Path, help="log.jsonl of a run")
    try:
        audit = audit_log(parser.parse_args(argv).log)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    unfinished = ", then an unfinished line" if audit.unfinished else ""
    print(f"whole: {audit.records} records{unfinished}; last hash {audit.chain}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
