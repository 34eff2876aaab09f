"""Plain files, for programs that know nothing of shards; `worldloom_curation.episode_folders` reads them back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from worldloom.shards import Dataset, pack
from worldloom_curation.export import ExportOptions, Progress, write_if_new


def write(dataset: Dataset, folder: Path, options: ExportOptions, progress: Progress) -> dict[str, Any]:
    """Write every sample's members into `folder`: ``ID.mp4``, ``ID.json`` (indented), ``ID.actions.npy``, ..."""
    files = 0
    for number, sample in enumerate(dataset, start=1):
        for extension, data in pack(sample, dataset.index.kind).items():
            text = extension == "json"
            content = (json.dumps(json.loads(data), indent=1, sort_keys=True) + "\n").encode() if text else data
            write_if_new(folder / f"{sample.clip.id}.{extension}", content)
            files += 1
        progress(number, len(dataset), sample.clip.id)
    return {"clips": len(dataset), "files": files}
