"""What there is to curate: the files of a folder, one file, or the episodes of recorded datasets."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from worldloom.artifacts import file_digest
from worldloom.errors import WorldloomError
from worldloom.shards import ShardSample, open_dataset
from worldloom_curation.stage import Source
from worldloom_curation.stages.probe import sentence


def discover(root: str | Path, out: str | Path | None = None) -> tuple[list[Source], list[str]]:
    """Every source under `root` in a fixed order, and the inputs of the dataset artifact.

    Files whose name, or whose folder's name, begins with a dot are left out, and so is `out`. A file that is no video
    is a source too: it gets its row in the ledger. A folder with a ``dataset.json`` is a recorded dataset, one source
    per episode.

    Raises:
        WorldloomError: nothing is there.
    """
    root = Path(root)
    if not root.exists():
        raise WorldloomError("there is nothing to curate at this path", got=root, do="give a folder or a video file")
    if root.is_file():
        found = [_file(root, root.name)]
        return found, _inputs(found)
    if (root / "dataset.json").exists():
        return _episodes(root, root.resolve().name)
    sources: list[Source] = []
    inputs: list[str] = []
    skip = Path(out).resolve() if out is not None else None
    for path, name in _walk(root, root, skip):
        if not path.is_dir():
            more = [_file(path, name)]
            sources, inputs = sources + more, inputs + _inputs(more)
        elif path.is_symlink():
            sources.append(_broken(path, name, "a link to a folder is not followed"))
        else:
            try:
                episodes, dataset = _episodes(path, name)
            except WorldloomError as error:
                episodes, dataset = [_broken(path, name, sentence(error, str(path), name))], []
            sources, inputs = sources + episodes, inputs + dataset
    if not sources:
        raise WorldloomError("the folder holds no files", got=root, do="put videos into it, or give another folder")
    return sources, inputs


def load_episode(source: Source) -> ShardSample:
    """The recorded episode behind a source.

    Raises:
        WorldloomError: it cannot be read, or it is not the episode it was.
    """
    assert source.index is not None
    sample = open_dataset(source.path).load(source.index)
    if _episode_key(sample) != source.key:
        raise WorldloomError("the recorded dataset changed during the run", got=source.path, do="run again")
    return sample


def _walk(folder: Path, root: Path, skip: Path | None) -> Iterator[tuple[Path, str]]:
    """Files, links to folders, and dataset folders, sorted by name at every level."""
    for path in sorted(folder.iterdir(), key=lambda item: item.name):
        name = path.relative_to(root).as_posix()
        if path.name.startswith(".") or path.resolve() == skip:
            continue
        if path.is_dir() and not path.is_symlink() and not (path / "dataset.json").exists():
            yield from _walk(path, root, skip)
        else:
            yield path, name


def _file(path: Path, name: str) -> Source:
    if path.exists() and not path.is_file():  # a pipe or a device: opening it could wait for ever
        return _broken(path, name, "not a regular file")
    try:
        digest = file_digest(path)
    except OSError as error:
        return _broken(path, name, f"the file cannot be read: {os.strerror(error.errno or 0)}")
    return Source(name, str(path.absolute()), digest, key=digest)


def _broken(path: Path, name: str, error: str) -> Source:
    digest = hashlib.sha256(f"{error}\n{name}".encode()).hexdigest()
    return Source(name, str(path.absolute()), digest, key=digest, error=error)


def _episodes(root: Path, name: str) -> tuple[list[Source], list[str]]:
    dataset = open_dataset(root)
    if dataset.index.kind != "clips":
        raise WorldloomError(
            "this dataset holds latents, and curation needs videos",
            got=root,
            do="give the dataset of clips it was made from",
        )
    sources = []
    for index, sample in enumerate(dataset):
        clip = sample.clip
        sources.append(
            Source(
                name=f"{name}#{clip.id}",
                path=str(root.absolute()),
                digest=clip.source_digest,
                key=_episode_key(sample),
                index=index,
                cut_from=(clip.start, clip.end, clip.step),
                facts={**clip.metadata, **({"caption": clip.caption} if clip.caption else {})},
                actions=sample.arrays.get("actions"),
            )
        )
    return sources, [dataset.index.id]


def _episode_key(sample: ShardSample) -> str:
    clip = sample.clip
    digest = hashlib.sha256(json.dumps([clip.id, clip.caption, dict(clip.metadata)], sort_keys=True).encode())
    digest.update(hashlib.sha256(sample.video or b"").digest())
    for name, array in sorted(sample.arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _inputs(files: list[Source]) -> list[str]:
    return [f"file:{source.digest}:{source.name}" for source in files if not source.error]
