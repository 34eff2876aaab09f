"""Datasets: a folder of WebDataset tars under one ``dataset.json``, the only format that curation and finetune share.

Layout of a dataset::

    dataset.json              what is in it; committed last, so a dataset that has one is whole
    shards/000000.tar ...     samples; key = clip id

Members of a sample, ``T`` frames (the key is everything before the first dot, as in WebDataset)::

    <id>.json                 the `Clip`
    <id>.mp4                  the video (kind "clips")
    <id>.latents.npy          float16 (c, t, h, w) (kind "latents")
    <id>.codes.npy            int32 (codebooks, t, h, w), beside latents of a discrete tokenizer
    <id>.text.npy             float16 or float32 (tokens, dim): the caption's vectors
    <id>.embedding.npy        float16 (k, d): unit vectors of k evenly spread frames
    <id>.actions.npy          float32 (T-1, a), optional
    <id>.rewards.npy          float32 (T-1,), optional
    <id>.state.npy            float32 (T, s), optional
    <id>.depth.npz            uint8 or uint16 (T, h, w), optional
    <id>.segmentation.npz     uint8 (T, h, w), optional

Shards are plain USTAR files of regular members, so ``webdataset`` reads them too (with WDS_SECURE=1, for it would load
pickles otherwise). Equal samples, written in equal order, give equal bytes.

`Dataset` reads with our own reader (`worldloom.members`), not through webdataset, because a machine that only trains
has the core dependencies alone and needs samples by number; `worldloom.streaming` reads through webdataset, and URLs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worldloom.artifacts import sync
from worldloom.errors import WorldloomError
from worldloom.members import ARRAYS, Entry, Kind, ShardSample, pack, read_members, round_up, scan_shard
from worldloom.schema import Clip, ShardRef

if TYPE_CHECKING:
    from worldloom.artifacts import Store

__all__ = [
    "ARRAYS",
    "Dataset",
    "DatasetIndex",
    "Kind",
    "ShardSample",
    "ShardWriter",
    "commit_dataset",
    "open_dataset",
    "pack",
    "read_members",
    "scan_shard",
]

FORMAT = 1


@dataclass(frozen=True)
class DatasetIndex:
    """What ``dataset.json`` says."""

    kind: Kind
    """``clips`` (video) or ``latents``."""
    id: str
    """Artifact id; ``worldloom lineage ID`` walks back from it."""
    samples: int
    """Number of samples."""
    frames: int
    """Video frames of all samples together."""
    fps: float | None
    """Frames per second; None where samples differ."""
    size: tuple[int, int] | None
    """(height, width) of the video in pixels; None where samples differ."""
    action_dim: int
    """Size of the action vector, 0 where there are no actions."""
    shards: tuple[ShardRef, ...]
    """In reading order."""
    tokenizer: Mapping[str, Any] | None = None
    """Name and fingerprint of the tokenizer that made the latents."""
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Facts about the whole dataset."""


class ShardWriter:
    """Writes samples into numbered tars, in order. A shard appears under its name only when it is whole and on disk.

    Used as a context manager: an exception discards the shard that was being written and keeps those before it.

    Args:
        root: the dataset folder; shards go to ``root/shards``.
        kind: ``clips`` samples must have a video, ``latents`` samples the array "latents".
        samples_per_shard: a shard is closed when it holds this many,
        max_bytes: or when one more sample would make it larger than this.
        first_shard: number of the first shard, to go on after committed ones.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        kind: Kind = "clips",
        samples_per_shard: int = 256,
        max_bytes: int = 1 << 30,
        *,
        first_shard: int = 0,
    ) -> None:
        if kind not in ("clips", "latents"):
            raise WorldloomError("a dataset holds clips or latents", got=kind)
        if samples_per_shard < 1 or max_bytes < 1:
            raise WorldloomError("samples_per_shard and max_bytes must be positive", got=(samples_per_shard, max_bytes))
        self.root = Path(root)
        self.kind: Kind = kind
        self.samples_per_shard, self.max_bytes = samples_per_shard, max_bytes
        self.shards: list[ShardRef] = []
        self._number = first_shard
        self._tar: tarfile.TarFile | None = None
        self._file: Any = None
        self._samples = 0
        self._keys: set[str] = set()

    def write(self, sample: ShardSample) -> None:
        """Append one sample.

        Raises:
            WorldloomError: an array of the wrong dtype, rank or length, a key written before, or no video / latents.
        """
        self.write_members(sample.clip.id, pack(sample, self.kind))

    def write_members(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append members as `pack` made them (extension -> bytes)."""
        if key in self._keys:
            raise WorldloomError("a sample with this key was already written", got=key, do="clip ids must be unique")
        total = sum(512 + round_up(len(data)) for data in members.values())
        if self._tar is not None and self._file.tell() + total + 1024 > self.max_bytes:
            self._finish_shard()
        tar = self._tar or self._open_shard()
        for extension in sorted(members):
            info = tarfile.TarInfo(f"{key}.{extension}")  # owner, group and time are zero or empty by default
            info.size, info.mode = len(members[extension]), 0o644
            tar.addfile(info, io.BytesIO(members[extension]))
        self._keys.add(key)
        self._samples += 1
        if self._samples >= self.samples_per_shard:
            self._finish_shard()

    def close(self) -> list[ShardRef]:
        """Finish the last shard; returns the shards of this writer, in order."""
        if self._tar is not None:
            self._finish_shard()
        return list(self.shards)

    def discard(self) -> None:
        """Drop the shard that is being written."""
        if self._tar is not None:
            self._tar = None
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    @property
    def _name(self) -> str:
        return f"shards/{self._number:06d}.tar"

    @property
    def _temporary(self) -> Path:
        return self.root / f"{self._name}.worldloom-tmp"

    def _open_shard(self) -> tarfile.TarFile:
        self._temporary.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._temporary, "wb+")  # noqa: SIM115 (closed with the shard)
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        self._samples = 0
        return self._tar

    def _finish_shard(self) -> None:
        assert self._tar is not None
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        digest = hashlib.sha256()
        while chunk := self._file.read(1 << 20):
            digest.update(chunk)
        self._file.close()
        self._temporary.replace(self.root / self._name)
        sync(self.root / "shards")
        self.shards.append(ShardRef(self._name, digest.hexdigest(), self._samples, size))
        self._tar, self._file = None, None
        self._number += 1


class Dataset:
    """A committed dataset, read sample by sample in shard order, or by number or key through an offset index.

    Holds no open file, so it can be pickled and used after a fork.
    """

    def __init__(self, root: str | os.PathLike[str], index: DatasetIndex) -> None:
        self.root, self.index = Path(root), index
        self._offsets: dict[int, list[Entry]] = {}
        self._keys: dict[str, int] | None = None

    def __len__(self) -> int:
        return self.index.samples

    def __iter__(self) -> Iterator[ShardSample]:
        for shard in range(len(self.index.shards)):
            yield from self.iter_shard(shard)

    def iter_shard(self, shard: int) -> Iterator[ShardSample]:
        """The samples of one shard, in order."""
        entries = self._entries(shard)
        with open(self._path(shard), "rb") as file:
            for entry in entries:
                yield entry.read(file, self.index.kind)

    def load(self, which: int | str) -> ShardSample:
        """One sample, by its number in reading order (negative counts from the end) or by clip id.

        Raises:
            WorldloomError: no such sample, or one whose bytes are not what they should be.
        """
        entry, shard = self._find(which)
        with open(self._path(shard), "rb") as file:
            return entry.read(file, self.index.kind)

    def clip(self, which: int | str) -> Clip:
        """What one sample is, without its bytes."""
        entry, shard = self._find(which)
        with open(self._path(shard), "rb") as file:
            return entry.read_clip(file)

    def sizes(self, which: int | str) -> dict[str, int]:
        """Bytes of each member of one sample, by extension; reads none of them."""
        entry, _ = self._find(which)
        return {extension: size for extension, (_, size) in entry.members.items()}

    def keys(self) -> list[str]:
        """All clip ids, in reading order."""
        return [entry.key for shard in range(len(self.index.shards)) for entry in self._entries(shard)]

    def clips(self) -> Iterator[Clip]:
        """What all samples are, in reading order, without their bytes."""
        for shard in range(len(self.index.shards)):
            with open(self._path(shard), "rb") as file:
                for entry in self._entries(shard):
                    yield entry.read_clip(file)

    def verify(self) -> list[str]:
        """What is wrong with the shards on disk, one sentence each: missing, another digest, another sample count."""
        from worldloom.artifacts import file_digest

        problems = []
        for number, ref in enumerate(self.index.shards):
            if not self._path(number).is_file():
                problems.append(f"{ref.path} is missing")
            elif file_digest(self._path(number)) != ref.digest:
                problems.append(f"{ref.path} does not have the digest that dataset.json records")
        return problems

    def _path(self, shard: int) -> Path:
        return self.root / self.index.shards[shard].path

    def _entries(self, shard: int) -> list[Entry]:
        if shard not in self._offsets:
            entries = scan_shard(self._path(shard), self.index.kind)
            expected = self.index.shards[shard].samples
            if len(entries) != expected:
                raise WorldloomError(
                    "a shard does not hold the samples that dataset.json records",
                    got=f"{self._path(shard)}: {len(entries)} instead of {expected}",
                    do="restore the dataset, or make it again",
                )
            self._offsets[shard] = entries
        return self._offsets[shard]

    def _find(self, which: int | str) -> tuple[Entry, int]:
        if isinstance(which, str):
            if self._keys is None:
                self._keys = {key: number for number, key in enumerate(self.keys())}
            if which not in self._keys:
                raise WorldloomError(f"the dataset {self.root} has no such clip", got=which)
            which = self._keys[which]
        number = which + len(self) if which < 0 else which
        if not 0 <= number < len(self):
            raise WorldloomError(f"the dataset {self.root} has {len(self)} samples", got=which)
        for shard, ref in enumerate(self.index.shards):
            if number < ref.samples:
                return self._entries(shard)[number], shard
            number -= ref.samples
        raise AssertionError("open_dataset checked that the shards' samples add up")


def commit_dataset(
    root: str | os.PathLike[str],
    shards: Sequence[ShardRef],
    *,
    kind: Kind = "clips",
    tokenizer: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
    inputs: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
    seed: int | None = None,
    name: str = "",
    store: Store | None = None,
) -> DatasetIndex:
    """Record ``root/shards`` as an artifact (kind "dataset" or "latents"), then write ``dataset.json`` atomically.

    Frames, rate, size and action size come from the clips in the shards. Tars under ``shards`` that are not among
    ``shards`` are left over from an earlier run and are removed first.

    Args:
        inputs: artifact ids or ``file:<sha256>:<path>`` entries of what the dataset was made from.
        metadata: facts about the whole dataset, JSON-serialisable; not part of the id.
        store: where the record goes; None for the default store.

    Raises:
        WorldloomError: no samples, a shard that is not there, or clips whose action sizes differ.
    """
    from worldloom.artifacts import Store, atomic_write

    root = Path(root)
    if not sum(shard.samples for shard in shards):
        raise WorldloomError("the dataset would hold no sample", got=root, do="nothing passed; look at the ledger")
    named = {Path(shard.path).name for shard in shards}
    for file in (root / "shards").iterdir():
        if file.name not in named and (file.suffix == ".tar" or file.name.endswith(".worldloom-tmp")):
            file.unlink()
    draft = DatasetIndex(kind, "", sum(s.samples for s in shards), 0, None, None, 0, tuple(shards))
    frames, rates, sizes, action_dims = 0, set(), set(), set()
    for clip in Dataset(root, draft).clips():
        frames += clip.frames
        rates.add(clip.fps)
        sizes.add((clip.height, clip.width))
        action_dims.add(clip.action_dim)
    if len(action_dims) != 1:
        raise WorldloomError(
            "the clips of one dataset must have one action size",
            got=sorted(action_dims),
            do="make one dataset for each",
        )
    artifact = (store or Store()).put(
        root / "shards",
        kind="dataset" if kind == "clips" else "latents",
        name=name or root.resolve().name,
        inputs=inputs,
        config=config,
        seed=seed,
        metadata={**(metadata or {}), "samples": draft.samples, "frames": frames},
    )
    index = dataclasses.replace(
        draft,
        id=artifact.id,
        frames=frames,
        fps=rates.pop() if len(rates) == 1 else None,
        size=sizes.pop() if len(sizes) == 1 else None,
        action_dim=action_dims.pop(),
        tokenizer=tokenizer,
        metadata=dict(metadata or {}),
    )
    content = {"format": FORMAT, **dataclasses.asdict(index)}
    atomic_write(root / "dataset.json", json.dumps(content, indent=1, sort_keys=True) + "\n")
    return index


def open_dataset(root: str | os.PathLike[str]) -> Dataset:
    """Open a committed dataset.

    Raises:
        WorldloomError: no ``dataset.json``, one of another format, or shards that are not there.
    """
    root = Path(root)
    index = read_index((root / "dataset.json").read_bytes, root)
    for ref in index.shards:
        if not (root / ref.path).is_file():
            raise WorldloomError("a shard of the dataset is missing", got=root / ref.path, do="restore it")
    return Dataset(root, index)


def read_index(read: Callable[[], bytes], root: str | Path) -> DatasetIndex:
    """What ``dataset.json`` says.

    Args:
        read: gives its bytes.
        root: where the dataset lies, for messages.

    Raises:
        WorldloomError: it is not there, damaged, or of another format.
    """
    file = f"{root}/dataset.json"
    try:
        content = json.loads(read())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise WorldloomError(
            "this folder is not a finished dataset: it has no dataset.json",
            got=root,
            do="run the command that makes it (worldloom curate run or record) again; it resumes",
        ) from error
    except (OSError, ValueError) as error:
        raise WorldloomError(
            "dataset.json cannot be read", got=f"{file}: {error}", do="make the dataset again"
        ) from error
    try:
        if content.pop("format") != FORMAT:
            raise WorldloomError("the dataset has a format that this version does not read", got=file)
        content["shards"] = tuple(ShardRef(**ref) for ref in content["shards"])
        content["size"] = tuple(content["size"]) if content["size"] else None
        index = DatasetIndex(**content)
        for ref in index.shards:
            if not re.fullmatch(r"shards/[A-Za-z0-9_-]+\.tar", ref.path):
                raise ValueError(f"shard path {ref.path!r}")
        if index.kind not in ("clips", "latents") or index.samples != sum(ref.samples for ref in index.shards):
            raise ValueError("kind or sample count")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WorldloomError("dataset.json is damaged", got=f"{file}: {error}", do="make the dataset again") from error
    return index
