"""What there is to curate: the files of a folder, one file, or the episodes of datasets, ours or a robot's."""

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
from worldloom_curation import episode_folders
from worldloom_curation.episodes import EpisodeConfig, broken
from worldloom_curation.lerobot import layout
from worldloom_curation.remote import is_url, local_copy
from worldloom_curation.stage import Source
from worldloom_curation.stages.probe import sentence


def discover(
    root: str | Path, out: str | Path | None = None, config: EpisodeConfig | None = None
) -> tuple[list[Source], list[str]]:
    """Every source under `root` in a fixed order, and the inputs of the dataset artifact.

    Files whose name, or whose folder's name, begins with a dot are left out, and so is `out`. A file that is no video
    is a source too: it gets its row in the ledger. A folder with a ``dataset.json`` is a recorded dataset, one source
    per episode; one with a LeRobot ``meta/info.json`` gives a source per episode and camera; videos with actions beside
    them are episodes by the rules of `episode_folders`.

    Args:
        root: a path, or a URL that ``config.allow`` allows; what is there is fetched into ``out/.cache/remote``.

    Raises:
        WorldloomError: nothing is there.
    """
    config = config or EpisodeConfig()
    if is_url(str(root)):
        root = local_copy(str(root), Path(out or ".") / ".cache" / "remote", config)
    root = Path(root)
    if not root.exists():
        raise WorldloomError("there is nothing to curate at this path", got=root, do="give a folder or a video file")
    if root.is_file():
        found = [_file(root, root.name)]
        return found, _inputs(found)
    if _is_dataset(root):
        return _dataset(root, root.resolve().name, config, 0)
    sources: list[Source] = []
    inputs: list[str] = []
    skip = Path(out).resolve() if out is not None else None
    for number, (path, name, belongings) in enumerate(_walk(root, root, skip)):
        if path.is_symlink() and path.is_dir():
            sources.append(broken(path, name, "a link to a folder is not followed"))
            continue
        try:
            if path.is_dir():
                more, used = _dataset(path, name, config, number)
            elif belongings:
                more, used = episode_folders.file_sources(path, name, number)
            else:
                more = [_file(path, name)]
                used = _inputs(more)
        except WorldloomError as error:
            more, used = [broken(path, name, sentence(error, str(path), name))], []
        sources += more
        inputs += used
    if not sources:
        raise WorldloomError("the folder holds no files", got=root, do="put videos into it, or give another folder")
    return sources, inputs


def load_episode(source: Source) -> ShardSample:
    """The recorded episode behind a source.

    Raises:
        WorldloomError: it cannot be read, or it is not the episode it was.
    """
    assert source.exact, "an episode of one of our own datasets"
    assert source.index is not None
    sample = open_dataset(source.path).load(source.index)
    if _episode_key(sample) != source.key:
        raise WorldloomError("the recorded dataset changed during the run", got=source.path, do="run again")
    return sample


def _walk(folder: Path, root: Path, skip: Path | None) -> Iterator[tuple[Path, str, list[Path]]]:
    """Files, links to folders, and dataset folders, sorted by name at every level.

    Each comes with its name and, a video with actions, with the files that belong to it, which do not come themselves.
    """
    paths = sorted(folder.iterdir(), key=lambda item: item.name)
    paths = [path for path in paths if not path.name.startswith(".") and path.resolve() != skip]
    episodes = episode_folders.companions([path for path in paths if path.is_file()])
    belong = {file for files in episodes.values() for file in files}
    for path in paths:
        if path in belong:
            continue
        if path.is_dir() and not path.is_symlink() and not _is_dataset(path):
            yield from _walk(path, root, skip)
        else:
            yield path, path.relative_to(root).as_posix(), episodes.get(path, [])


def _is_dataset(folder: Path) -> bool:
    """Whether a folder is one thing: a dataset of ours, a LeRobot dataset, or an episode."""
    return (
        (folder / "dataset.json").exists()
        or layout.is_lerobot(folder)
        or any((folder / f"actions{ext}").is_file() for ext in episode_folders.FORMATS)
    )


def _dataset(folder: Path, name: str, config: EpisodeConfig, number: int) -> tuple[list[Source], list[str]]:
    if (folder / "dataset.json").exists():
        return _episodes(folder, name)
    if layout.is_lerobot(folder):
        from worldloom_curation.lerobot.read import read_sources

        return read_sources(folder, name, config)
    return episode_folders.folder_sources(folder, name, config, number)


def _file(path: Path, name: str) -> Source:
    if path.exists() and not path.is_file():  # a pipe or a device: opening it could wait for ever
        return broken(path, name, "not a regular file")
    try:
        digest = file_digest(path)
    except OSError as error:
        return broken(path, name, f"the file cannot be read: {os.strerror(error.errno or 0)}")
    return Source(name, str(path.absolute()), digest, key=digest)


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
                arrays={"state": sample.arrays["state"]} if "state" in sample.arrays else {},
                exact=True,
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
