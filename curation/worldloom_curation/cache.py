"""The working memory of a run, in ``DIR/.cache``: results by the digest of everything they depend on.

Every file is written atomically, so a killed run leaves whole results or none, and the next run goes on from there.
What a failing power supply damages is found when it is read, and computed again; clips, which cannot tell, are synced.
The folder can be deleted at any time; it costs the time to compute again.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.artifacts import atomic_write


def key_of(*parts: Any) -> str:
    """32 hex digits that change whenever a part does; parts are JSON-serialisable."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class Cache:
    """JSON values, array bundles and clips in one folder, by kind and key."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def path(self, kind: str, key: str, suffix: str) -> Path:
        """Where a result is, or would be."""
        return self.root / kind / key[:2] / f"{key}{suffix}"

    def load(self, kind: str, key: str) -> Any | None:
        """A JSON value; None if there is none, or if it was damaged."""
        try:
            return json.loads(self.path(kind, key, ".json").read_bytes())
        except (OSError, ValueError):
            return None

    def save(self, kind: str, key: str, value: Any) -> None:
        """Keep a JSON value."""
        atomic_write(self.path(kind, key, ".json"), json.dumps(value, separators=(",", ":")), durable=False)

    def has_signals(self, kind: str, key: str) -> bool:
        """Whether `load_signals` would find something whole."""
        return self.load_signals(kind, key) is not None

    def load_signals(self, kind: str, key: str) -> dict[str, np.ndarray] | None:
        """An array bundle; None if there is none, or if it was damaged."""
        try:
            # Read first: numpy leaves a damaged file open.
            data = io.BytesIO(self.path(kind, key, ".npz").read_bytes())
            with np.load(data, allow_pickle=False) as bundle:
                return {name: bundle[name] for name in bundle.files}
        except Exception:  # zipfile, numpy and OS errors alike mean: compute it again
            return None

    def save_signals(self, kind: str, key: str, signals: dict[str, np.ndarray]) -> None:
        """Keep an array bundle."""
        buffer = io.BytesIO()
        np.savez(buffer, **signals)  # pyright: ignore[reportArgumentType] - arrays by name, none called "file"
        atomic_write(self.path(kind, key, ".npz"), buffer.getvalue(), durable=False)
