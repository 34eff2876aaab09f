"""`curate export`: a dataset of clips in the formats of other programs.

Every format writes a file whole or not at all, and goes on where an interrupted export stopped. In the folder
``.worldloom-export.json`` says what is being written there, and in the end how much was; a folder that holds something
else is refused. That every clip was written is checked before it says so.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from worldloom.artifacts import atomic_write
from worldloom.errors import WorldloomError
from worldloom.shards import Dataset

MANIFEST = ".worldloom-export.json"

FORMATS: Mapping[str, tuple[str, str]] = {
    "plain": ("worldloom_curation.formats.plain:write", "ID.mp4, ID.json, and an episode's arrays as they are"),
    "webdataset": (
        "worldloom_curation.formats.bins:write",
        "a dataset of ours for each resolution, aspect and duration",
    ),
    "lerobot": ("worldloom_curation.formats.robots:write", "a LeRobot v3.0 dataset"),
    "cosmos-curate": ("worldloom_curation.formats.cosmos:write_curated", "cosmos-curate's clips/ and metas/v0/"),
    "cosmos-shards": ("worldloom_curation.formats.cosmos:write_shards", "cosmos-curate's v0/resolution_*/... tars"),
    "cosmos3": ("worldloom_curation.formats.cosmos:write_jsonl", "videos/ and the JSONL that Cosmos 3 trains on"),
    "cosmos-predict2.5": ("worldloom_curation.formats.cosmos:write_prompts", "videos/ID.mp4 and metas/ID.txt"),
}
"""Format -> (where its writer is, what it makes)."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class ExportOptions:
    """What a format may ask."""

    camera: str = ""
    """lerobot: only clips of this camera; empty for all."""
    caption_model: str = "worldloom"
    """cosmos-curate, cosmos-shards: a window's caption is called ``<this>_caption``."""
    clips_per_tar: int = 256
    """webdataset, cosmos-shards: most clips in one tar."""
    tar_mb: int = 1024
    """webdataset, cosmos-shards: most MiB in one tar."""


def export(
    dataset: Dataset,
    folder: str | Path,
    format: str = "plain",
    options: ExportOptions | None = None,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Write a dataset into a folder; returns what was written: ``clips`` and whatever else the format counts.

    Raises:
        WorldloomError: no such format, a dataset of latents, a folder that holds something else, or clips that the
            format cannot hold.
    """
    if format not in FORMATS:
        raise WorldloomError("there is no such export format", got=format, do=f"choose of: {', '.join(FORMATS)}")
    if dataset.index.kind != "clips":
        raise WorldloomError("this dataset holds latents, not videos", got=dataset.root, do="give one of clips")
    folder, options = Path(folder), options or ExportOptions()
    if folder.resolve() == dataset.root.resolve():
        raise WorldloomError("the output folder is the dataset", got=folder, do="give another --out")
    what = {"format": format, "dataset": dataset.index.id, "options": asdict(options)}
    _begin(folder, what)
    module, _, name = FORMATS[format][0].partition(":")
    counts: dict[str, Any] = getattr(importlib.import_module(module), name)(dataset, folder, options, progress)
    expected = counts.pop("expected", len(dataset))
    assert counts["clips"] == expected, f"{counts['clips']} clips were written of {expected}"
    shutil.rmtree(folder / ".worldloom", ignore_errors=True)
    atomic_write(folder / MANIFEST, json.dumps({**what, "written": counts}, indent=1) + "\n")
    return counts


def _begin(folder: Path, what: Mapping[str, Any]) -> None:
    """Take hold of a folder, new or of an export of the same, and sweep up what a killed one was writing."""
    try:
        before = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        before = None
    except (OSError, ValueError) as error:
        raise WorldloomError("the output folder cannot be read", got=f"{folder}: {error}") from error
    if before is None and folder.exists() and any(folder.iterdir()):
        raise WorldloomError("the output folder holds something else", got=folder, do="give a new or empty folder")
    if before is not None and {key: before.get(key) for key in what} != dict(what):
        changed = [key for key in what if before.get(key) != what[key]]
        raise WorldloomError(
            f"the output folder holds an export with another {', '.join(changed)}", got=folder, do="give a new folder"
        )
    atomic_write(folder / MANIFEST, json.dumps(what, indent=1) + "\n")
    for torn in list(folder.rglob("*.worldloom-tmp")):
        shutil.rmtree(torn) if torn.is_dir() else torn.unlink(missing_ok=True)


def write_if_new(path: Path, data: bytes) -> None:
    """Write a file, unless it is there with the same bytes."""
    if not path.exists() or path.stat().st_size != len(data) or path.read_bytes() != data:
        atomic_write(path, data)
