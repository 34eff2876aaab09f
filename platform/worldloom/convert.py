"""Pickled checkpoints to safetensors, in a process of its own: ``worldloom models convert``.

A pickle is a program. Nothing here opens one: `worldloom.unpickling` does, in a process without network, environment or
the right to write elsewhere, with limits on memory and time. What that guarantees and what not is written in
docs/explanation/safety.md.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worldloom.artifacts import atomic_file, file_digest
from worldloom.errors import WorldloomError
from worldloom.unpickling import REPORT, TENSORS

PICKLED = (".pt", ".pth", ".ckpt", ".bin", ".jit")
"""Names that pickled checkpoints end in; ``.jit`` is a TorchScript archive."""

_START = """
import json, sys
job, sys.path[:] = map(json.loads, sys.argv[1:])
from worldloom.unpickling import main
main(job)
"""
_PICKLE, _ZIP = b"\x80", b"PK\x03\x04"  # how files of torch.save begin: before and since PyTorch 1.6
_GIB = 1 << 30


@dataclass(frozen=True)
class Conversion:
    """A safetensors file made from a pickled checkpoint."""

    path: Path
    """The file."""
    tensors: int
    """Tensors in it."""
    left_out: tuple[str, ...]
    """Paths of what the checkpoint held beside these tensors: plain values, and levels that `key` passed by."""
    made: bool
    """False: the file was there already, from the same source and key."""


def convert_checkpoint(
    source: str | Path, out: str | Path, *, key: str = "", seconds: float | None = None
) -> Conversion:
    """Convert a pickled checkpoint or a TorchScript archive to a safetensors file, bit by bit the same tensors.

    The metadata of the file names its source, the sha256 of that, and `key`.

    Args:
        source: a ``.pt``, ``.pth``, ``.ckpt``, ``.bin`` or ``.jit`` file.
        out: a ``.safetensors`` file; appears whole or not at all.
        key: the level that holds the tensors, e.g. ``state_dict`` or ``state_dict/ema``; "" takes the only one.
        seconds: time limit; unset takes two minutes and one second per 10 MB.

    Raises:
        WorldloomError: not a checkpoint, damaged, needs code, no tensors or several sets of them, too slow or too
            large, or `out` holds something else.
    """
    source, out = Path(source).absolute(), Path(out).absolute()
    _check_names(source, out)
    metadata = {"source": source.name, "source_sha256": file_digest(source), "key": key}
    if out.exists():
        found = _metadata(out)
        if any(found.get(name) != value for name, value in metadata.items() if name != "source"):
            raise WorldloomError(
                "the output exists and is not this conversion", got=out, do="choose another name, or remove it"
            )
        return Conversion(out, _count(out), (), made=False)
    size = source.stat().st_size
    limit = 120 + size / 10e6 if seconds is None else seconds
    with atomic_file(out) as target:
        folder = target.parent
        job = {
            "source": str(source),
            "folder": str(folder),
            "key": key,
            "metadata": metadata,
            "memory": _GIB + 4 * size,
            "seconds": max(1, int(limit)),
        }
        report = _run(job, folder, limit)
        if "what" in report:
            raise WorldloomError(
                _printable(report["what"]),
                got=f"{source}: {_printable(report['got'])}" if report.get("got") else source,
                do=_printable(report.get("do") or ""),
            )
        made = folder / TENSORS
        if made.is_symlink() or not made.is_file():
            raise WorldloomError("the process that read the checkpoint left no file of tensors", got=source)
        made.chmod(0o644)  # safetensors makes files that only their owner can read
        tensors = _count(made)
        made.rename(target)
    return Conversion(out, tensors, tuple(_printable(name) for name in report["left_out"]), made=True)


def _check_names(source: Path, out: Path) -> None:
    if source.suffix not in PICKLED:
        raise WorldloomError(
            "this is not the name of a pickled checkpoint", got=source, do=f"give a file ending in {', '.join(PICKLED)}"
        )
    if out.suffix != ".safetensors":
        raise WorldloomError("the output is a .safetensors file", got=out, do="for example --out model.safetensors")
    if not source.is_file():
        raise WorldloomError("there is no such file", got=source, do="give the path of a checkpoint")
    with open(source, "rb") as file:
        start = file.read(4)
    if not start.startswith((_PICKLE, _ZIP)):
        raise WorldloomError(
            "this is not a PyTorch checkpoint",
            got=f"{source} begins with {start!r}",
            do="check what the file is; a few lines of text may be a Git LFS pointer to the real one",
        )


def _run(job: Mapping[str, Any], folder: Path, seconds: float) -> dict[str, Any]:
    """Start the process, wait, and return its report."""
    # The interpreter finds the same packages as this one; of the environment it gets what loading libraries needs.
    paths = [str(Path(path).absolute()) for path in sys.path]
    environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HOME": str(folder), "TMPDIR": str(folder)}
    command = [sys.executable, "-I", "-B", "-c", _START, json.dumps(job), json.dumps(paths)]
    with open(folder / "log", "wb") as log:
        try:
            done = subprocess.run(
                command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=seconds
            )
        except subprocess.TimeoutExpired as error:
            raise WorldloomError(
                f"reading the checkpoint took longer than {seconds:.0f} s and was ended", got=job["source"]
            ) from error
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        if not isinstance(report, dict):
            raise ValueError("not a report")
        return report
    except (OSError, ValueError) as error:
        with open(folder / "log", "rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 500))
            said = log.read().decode(errors="replace").strip().rpartition("\n")[2]
        raise WorldloomError(
            f"the process that read the checkpoint ended without a result: {_ending(done.returncode)}",
            got=f"{job['source']}: {_printable(said)}",
            do="the file is damaged or asks for too much; compare its digest with its source",
        ) from error


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _printable(text: object) -> str:
    """Text that came out of the file, without what a terminal would obey."""
    return "".join(char if char.isprintable() else " " for char in str(text)[:1000])


def _metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty if it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _count(path: Path) -> int:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return len(list(file.keys()))
