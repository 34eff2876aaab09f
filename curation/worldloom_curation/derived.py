"""Datasets that stages derive from the clips, each in a folder of the stage's name beside them: latents."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from worldloom.errors import WorldloomError
from worldloom.shards import DatasetIndex, commit_dataset
from worldloom_curation.stage import Derives

if TYPE_CHECKING:
    from worldloom.artifacts import Store
    from worldloom_curation.packing import Packed
    from worldloom_curation.pipeline import Run


def _made_by_a_stage(folder: Path) -> bool:
    """Whether a folder holds a dataset that a stage of an earlier run has derived."""
    try:
        return bool(json.loads((folder / "dataset.json").read_bytes())["metadata"].get("stage"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def check_derived(this: Run) -> None:
    """Refuse to put a derived dataset in the place of one that is not ours."""
    for stage in this.stages:
        folder = this.out / stage.name
        if isinstance(stage, Derives) and (folder / "dataset.json").exists() and not _made_by_a_stage(folder):
            raise WorldloomError(
                f"the stage {stage.name} would put its dataset in the place of another",
                got=folder,
                do="move that dataset, or leave the stage out",
            )


def replace_derived(this: Run, packed: Packed) -> None:
    """Shards of derived datasets in the place of the old; those of stages that are no longer asked go."""
    for folder in this.out.iterdir():
        if _made_by_a_stage(folder):
            (folder / "dataset.json").unlink()
            shutil.rmtree(folder)
    for name, shards in packed.derived.items():
        shutil.rmtree(this.out / name / "shards", ignore_errors=True)
        if shards:
            (this.out / name).mkdir(exist_ok=True)
            (this.out / ".cache" / "next" / name / "shards").replace(this.out / name / "shards")


def commit_derived(this: Run, clips: DatasetIndex, packed: Packed, store: Store | None) -> dict[str, str]:
    """Commit the derived datasets; returns their ids by the stage's name.

    Raises:
        WorldloomError: no clip gave a sample of one.
    """
    found: dict[str, str] = {}
    for stage in this.stages:
        if not isinstance(stage, Derives):
            continue
        if not packed.derived[stage.name]:
            raise WorldloomError(
                f"no clip gave a sample of {stage.name}: the clips are written, its dataset is not",
                got=f"{clips.samples} clips",
                do=f"worldloom curate explain CLIP --out {this.out} says why",
            )
        index = commit_dataset(
            this.out / stage.name,
            packed.derived[stage.name],
            kind="latents",
            tokenizer=stage.tokenizer,
            inputs=[clips.id, *stage.inputs],
            config=stage.facts(),
            metadata={**clips.metadata, **stage.facts(), "source": clips.id, "stage": stage.name},
            store=store,
        )
        found[stage.name] = index.id
    return found
