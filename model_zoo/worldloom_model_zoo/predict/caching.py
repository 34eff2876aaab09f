"""Encoded conditioning kept on disk by content, so that the same start or prompt is not encoded twice.

A file ``<sha256>.safetensors`` holds one tensor; its name digests everything that decides the tensor. Files are written
atomically, a damaged one counts as missing, and the longest unused go first when the folder grows over its limit.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from worldloom.artifacts import atomic_write, home
from worldloom.errors import WorldloomError

SWITCH = "WORLDLOOM_CACHE"
"""Environment variable: a folder, or ``off``. Unset: `home()` / ``cache``."""


class TensorCache:
    """Tensors by the content that they were computed from.

    Args:
        folder: where they are kept; made when the first is.
        limit_bytes: size of the folder above which the longest unused files are removed.
    """

    def __init__(self, folder: str | Path, limit_bytes: int = 2 << 30) -> None:
        if limit_bytes < 0:
            raise WorldloomError("the limit of a cache is not negative", got=limit_bytes)
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        self.hits = self.misses = 0

    def get(self, make: Callable[[], Tensor], *parts: str | Tensor) -> Tensor:
        """The tensor kept under ``parts``, else ``make()``, which is then kept. On the CPU where it comes from disk.

        Args:
            parts: everything that decides the result: names, fingerprints, the input itself.
        """
        from safetensors.torch import load, save

        file = self.folder / f"{content_key(*parts)}.safetensors"
        with contextlib.suppress(Exception):  # missing or damaged: made again
            kept = load(file.read_bytes())["tensor"]
            os.utime(file)  # the time of the last use
            self.hits += 1
            return kept
        made = make()
        self.misses += 1
        data = save({"tensor": made.detach().cpu().contiguous()})
        if len(data) <= self.limit_bytes:
            atomic_write(file, data)
            self._shrink()
        return made

    def _shrink(self) -> None:
        files = []
        for file in self.folder.glob("*.safetensors"):
            with contextlib.suppress(FileNotFoundError):  # another process shrinks too
                status = file.stat()
                files.append((status.st_mtime_ns, status.st_size, file))
        total = sum(size for _, size, _ in files)
        for _, size, file in sorted(files):
            if total <= self.limit_bytes:
                break
            file.unlink(missing_ok=True)
            total -= size


def content_key(*parts: str | Tensor) -> str:
    """sha256 (hex) of texts and of tensors' bytes, shapes and types, each told from its neighbours."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            data = part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            head = f"tensor {part.dtype} {tuple(part.shape)}"
        else:
            data, head = part.encode(), "text"
        digest.update(f"{head} {len(data)}\n".encode())
        digest.update(data)
    return digest.hexdigest()


def default_cache() -> TensorCache | None:
    """The cache that ``WORLDLOOM_CACHE`` names, else one of 2 GiB in `home()` / ``cache``; None where it is ``off``."""
    chosen = os.environ.get(SWITCH, "")
    return None if chosen.lower() == "off" else TensorCache(chosen or home() / "cache")
