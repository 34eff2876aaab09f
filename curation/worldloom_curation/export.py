"""`curate export`: a dataset as plain files, for programs that know nothing of shards."""

from __future__ import annotations

import json
from pathlib import Path

from worldloom.artifacts import atomic_write
from worldloom.shards import Dataset, pack


def export(dataset: Dataset, folder: str | Path) -> None:
    """Write every sample's members into `folder`: ``ID.mp4``, ``ID.json`` (indented), ``ID.actions.npy``, ...

    A file that is already there with the same bytes is left alone, so an interrupted export goes on.
    """
    folder = Path(folder)
    for sample in dataset:
        for extension, data in pack(sample, dataset.index.kind).items():
            content = (
                (json.dumps(json.loads(data), indent=1, sort_keys=True) + "\n").encode()
                if extension == "json"
                else data
            )
            path = folder / f"{sample.clip.id}.{extension}"
            if not path.exists() or path.read_bytes() != content:
                atomic_write(path, content)
