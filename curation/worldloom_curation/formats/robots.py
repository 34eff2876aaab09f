"""LeRobot v3.0; the writer is `worldloom_curation.lerobot.write`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from worldloom.shards import Dataset
from worldloom_curation.export import ExportOptions, Progress
from worldloom_curation.lerobot.write import WriteOptions, clips_of_camera, write_lerobot


def write(dataset: Dataset, folder: Path, options: ExportOptions, progress: Progress) -> dict[str, Any]:
    """Write the clips, or those of one camera, as episodes."""
    counts = write_lerobot(dataset, folder, WriteOptions(options.camera), progress)
    return {**counts, "expected": clips_of_camera(dataset, options.camera)}
