"""A training loader over datasets of shards: shuffled, mixed, in batches of one shape, and resumed at any batch.

The parts, each usable alone:

- `Samples` reads any sample of a dataset by number, from a folder or an fsspec URL. A read is one range of one shard.
- `worldloom.order.Plan` says which samples a batch holds: a pure function of its number.
- `Loader` reads the batches of one rank in order, in this process or in others, and knows where it is.

`open_loader` puts them together. Nothing depends on the number of processes that read, so a run may be resumed with
another. Memory holds the batches under way and, of every sample, a row of a table that lies in a file.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from worldloom.artifacts import atomic_write, home
from worldloom.errors import WorldloomError
from worldloom.members import ARRAYS, Headers, ShardSample, bad_member, load_clip, round_up, unpack
from worldloom.order import Plan
from worldloom.schema import Clip, LatentBatch, ShardRef
from worldloom.shards import DatasetIndex, read_index
from worldloom.streaming import locate

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ClipBatch", "Loader", "Samples", "collate_clips", "collate_latents", "open_loader"]

_TABLE = 1  # of the files that `Samples` keeps
_OPEN_FILES = 32  # per process and dataset
_HEADERS = 1 << 16  # bytes that are fetched at a time from a URL to read headers


# -- samples by number --------------------------------------------------------------------------------------------


class Samples:
    """The samples of a dataset by number, in reading order.

    When a dataset is opened for the first time, the headers of its shards are read, and checked like everything that is
    read from a shard, into a table; it is kept under ``$WORLDLOOM_HOME/tables``, so that later, and in worker
    processes, opening costs nothing. Opening also holds the actions against the frames of every clip.

    Args:
        root: a folder or an fsspec URL (``s3://``, ``gs://``, ``hf://``, ``https://``).

    Raises:
        WorldloomError: no dataset there, a shard that holds what a dataset may not, or a clip of T frames that does not
            have T - 1 actions.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = os.fspath(root).rstrip("/")
        fs, base = locate(self.root)
        self.index = read_index(lambda: fs.cat_file(f"{base}/dataset.json"), self.root)
        facts = [_TABLE, self.index.kind, self._ratio, [[ref.path, ref.digest] for ref in self.index.shards]]
        name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
        self._path = home() / "tables" / f"{name}.npy"
        try:
            self._open()
        except (OSError, ValueError):  # there is none yet, or it is damaged
            rows = [
                row
                for number, ref in enumerate(self.index.shards)
                for row in _scan(fs, base, self.root, number, ref, self.index, self._ratio)
            ]
            buffer = io.BytesIO()
            np.save(buffer, _pack_rows(rows), allow_pickle=False)
            atomic_write(self._path, buffer.getvalue())
            self._open()

    def __len__(self) -> int:
        return len(self.table)

    def load(self, number: int) -> ShardSample:
        """One sample.

        Raises:
            WorldloomError: it is not what it was when the table was made.
        """
        row = self.table[number]
        ref = self.index.shards[int(row["shard"])]
        where, key = f"{self.root}/{ref.path}", row["key"].decode()
        data = self._range(ref, int(row["offset"]), int(row["bytes"]))
        return unpack(where, key, _members(data, where, key), self.index.kind)

    def clip(self, number: int) -> Clip:
        """What one sample is, without its bytes."""
        row = self.table[number]
        ref = self.index.shards[int(row["shard"])]
        data = self._range(ref, int(row["json"]), int(row["json_bytes"]))
        return load_clip(f"{self.root}/{ref.path}", row["key"].decode(), data)

    def clips(self) -> Iterator[Clip]:
        """What all samples are, in reading order."""
        for number in range(len(self)):
            yield self.clip(number)

    def keys(self) -> list[str]:
        """All clip ids, in reading order."""
        return [key.decode() for key in self.table["key"]]

    def groups(self) -> list[str]:
        """The recording that each sample is a window of: samples of one group must not be split up."""
        return [group.decode() for group in self.table["group"]]

    def shapes(self) -> list[tuple[int, ...]]:
        """``(c, t, h, w)`` of latents, ``(T, height, width)`` of clips; one more number is the size of an action."""
        names = ("c", "t", "h", "w") if self.index.kind == "latents" else ("frames", "height", "width")
        columns = [self.table[name].tolist() for name in (*names, "actions")]
        return list(zip(*columns, strict=True))

    @property
    def _ratio(self) -> int:
        """Video frames per latent frame; 0 where that is not recorded."""
        return int((self.index.tokenizer or {}).get("temporal_ratio") or 0)

    def _open(self) -> None:
        # Mapped, not read: the pages are shared by all processes of the machine, and only those in use are in memory.
        self.table: np.ndarray = np.load(self._path, mmap_mode="r", allow_pickle=False)
        if len(self.table) != self.index.samples:
            raise ValueError("a table has a row for each sample")
        self._files: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()
        self._remote: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "index": self.index, "_path": self._path}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)

    def _range(self, ref: ShardRef, start: int, size: int) -> bytes:
        """Bytes of a shard."""
        if self._remote is None:
            fs, base = locate(self.root)
            self._remote = fs, base, "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))
        fs, base, local = self._remote
        try:
            if local:
                with self._lock:
                    data = os.pread(self._file(f"{base}/{ref.path}"), size, start)
            else:
                data = fs.cat_file(f"{base}/{ref.path}", start=start, end=start + size)
        except OSError as error:
            raise WorldloomError(
                "a shard cannot be read", got=f"{self.root}/{ref.path}: {error}", do="try again, or restore it"
            ) from error
        if len(data) != size:
            raise bad_member(f"{self.root}/{ref.path}", f"bytes {start} to {start + size}", "the tar ends before")
        return data

    def _file(self, path: str) -> int:
        """A descriptor of a shard; the least used of too many is closed."""
        if path not in self._files:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[path] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._files.move_to_end(path)
        return self._files[path]


_COLUMNS = {
    "shard": "<u4",
    "offset": "<i8",
    "bytes": "<i8",
    "json": "<i8",
    "json_bytes": "<i8",
    "frames": "<i4",
    "height": "<i4",
    "width": "<i4",
    "actions": "<i4",
    **dict.fromkeys("cthw", "<i4"),
}


def _pack_rows(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Rows as one array of fixed-size records."""
    texts = {name: max((len(row[name]) for row in rows), default=1) for name in ("key", "group")}
    dtype = np.dtype([*_COLUMNS.items(), *((name, f"S{size}") for name, size in texts.items())])
    table = np.zeros(len(rows), dtype)
    for name in table.dtype.names or ():
        table[name] = [row[name] for row in rows]
    return table


def _scan(
    fs: Any, base: str, root: str, number: int, ref: ShardRef, index: DatasetIndex, ratio: int
) -> Iterator[dict[str, Any]]:
    """A row for each sample of a shard; reads headers, the clips, and the shapes of arrays."""
    where = f"{root}/{ref.path}"
    headers = Headers(where, index.kind)
    at, found = 0, []
    try:
        with fs.open(f"{base}/{ref.path}", "rb", block_size=_HEADERS) as file:
            while True:
                file.seek(at)
                block = file.read(512)
                if block == bytes(512):
                    break
                info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                key, extension = headers.add(info)
                if at + 512 + round_up(info.size) > ref.bytes:
                    raise bad_member(where, info.name, "the tar is cut off, or the member is too large")
                if headers.samples > len(found):
                    row = dict.fromkeys(_COLUMNS, 0) | {"key": key.encode(), "shard": number, "offset": at}
                    found.append((row, {}))
                row, shapes = found[-1]
                if extension == "json":
                    clip = load_clip(where, key, file.read(info.size))
                    row |= {"json": at + 512, "json_bytes": info.size, "frames": clip.frames}
                    row |= {"height": clip.height, "width": clip.width, "actions": clip.action_dim}
                    row["group"] = str(clip.metadata.get("parent", clip.id)).encode()
                elif extension in ("latents.npy", "actions.npy"):
                    shapes[extension] = _npy_shape(file.read(min(info.size, 512)), where, info.name)
                at += 512 + round_up(info.size)
                row["bytes"] = at - row["offset"]
            if file.read(512) != bytes(512):
                raise WorldloomError("not a whole tar shard", got=f"{where}: no end mark", do="restore it")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise WorldloomError(
            "not a whole tar shard", got=f"{where}: {error}", do="restore it, or make it again"
        ) from error
    headers.end()
    if len(found) != ref.samples:
        raise WorldloomError(
            "a shard does not hold the samples that dataset.json records",
            got=f"{where}: {len(found)} instead of {ref.samples}",
            do="restore the dataset, or make it again",
        )
    for row, shapes in found:
        _align(row, shapes, ratio)
        yield row


def _align(row: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], ratio: int) -> None:
    """Hold actions and latents against the frames of their clip; puts the latents' shape into the row."""
    key, frames = row["key"].decode(), row["frames"]
    given = shapes.get("actions.npy")
    if (given is None) != (row["actions"] == 0) or (given is not None and given != (frames - 1, row["actions"])):
        raise WorldloomError(
            "a clip of T frames has T - 1 actions, of the size that it says",
            got=f"{key}: {frames} frames, actions {given or 'missing'}, action_dim {row['actions']}",
            do="make the dataset again from recordings whose actions fit",
        )
    latents = shapes.get("latents.npy")
    if latents is None:
        return
    if len(latents) != 4 or (ratio and frames != 1 + ratio * (latents[1] - 1)):
        raise WorldloomError(
            f"latents (c, t, h, w) stand for 1 + {ratio or 'k'} (t - 1) frames",
            got=f"{key}: latents {latents}, {frames} frames",
            do="encode the clips again",
        )
    row.update(zip("cthw", latents, strict=True))


def _npy_shape(head: bytes, where: str, name: str) -> tuple[int, ...]:
    try:
        file = io.BytesIO(head)
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        return tuple(int(n) for n in read(file)[0])
    except (ValueError, KeyError, SyntaxError) as error:
        raise bad_member(where, name, str(error)) from error


_KNOWN = {"json", "mp4", *(extension for extension, _, _ in ARRAYS.values())}


def _members(data: bytes, where: str, key: str) -> dict[str, Any]:
    """The members in a stretch of a plain USTAR tar, headers included (POSIX.1-1988: name at 0, octal size at 124)."""
    members, at, prefix = {}, 0, f"{key}.".encode()
    while at < len(data):
        name = data[at : at + 100].partition(b"\0")[0]
        extension = name[len(prefix) :].decode("ascii", "replace")
        size = data[at + 124 : at + 136].strip(b" \0")
        if not name.startswith(prefix) or extension not in _KNOWN or not size.isdigit():
            raise bad_member(where, name.decode("utf-8", "replace"), f"it lies where the clip {key} was")
        end = at + 512 + int(size, 8)
        # Arrays are copied when they are made; what is taken out here is only looked at.
        members[extension] = memoryview(data)[at + 512 : end] if extension.endswith(".npy") else data[at + 512 : end]
        at = at + 512 + round_up(end - at - 512)
    if at != len(data) or "json" not in members:
        raise bad_member(where, f"{key}.json", "the shard changed since its table was made")
    return members


# -- batches ------------------------------------------------------------------------------------------------------


class Fetch(Protocol):
    """Gives a sample for training; the epoch seeds whatever is random about it."""

    def __call__(self, epoch: int, index: int, /) -> Any: ...


class Loader:
    """The batches of one rank, in the order of a plan; iterating goes on from where it was.

    Args:
        fetch: gives one sample; it and what it returns are sent between processes where there are workers.
        plan: what each batch holds.
        collate: makes a batch of samples.
        rank: which process this is,
        world: of how many.
        workers: processes that read ahead, started afresh (not forked: a decoder with threads does not survive that).
        batches: how many to give in all iterations together; None for no end.
        prefetch: batches that each worker reads ahead.
    """

    def __init__(
        self,
        fetch: Fetch,
        plan: Plan,
        collate: Callable[[list[Any]], Any] = list,
        *,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        batches: int | None = None,
        prefetch: int = 2,
    ) -> None:
        if not 0 <= rank < world or workers < 0 or prefetch < 1:
            raise WorldloomError(
                "rank must be below world, workers 0 or more and prefetch 1 or more",
                got=f"rank {rank} of {world}, workers {workers}, prefetch {prefetch}",
            )
        self.fetch, self.plan, self.collate = fetch, plan, collate
        self.rank, self.world, self.workers, self.batches, self.prefetch = rank, world, workers, batches, prefetch
        self.start = 0
        """Batches of all ranks together that came before this loader's first."""
        self.taken = 0
        """Batches that this loader gave."""

    def __len__(self) -> int:
        if self.batches is None:
            raise TypeError("this loader has no end; give batches=")
        return self.batches - self.taken

    def __iter__(self) -> Iterator[Any]:
        from torch.utils.data import DataLoader

        methods = multiprocessing.get_all_start_methods()
        method = "forkserver" if "forkserver" in methods else "spawn"
        loader: Any = DataLoader(
            _Addressed(self.fetch),  # type: ignore[arg-type]
            batch_sampler=_Numbers(self),  # type: ignore[arg-type]
            num_workers=self.workers,
            collate_fn=self.collate,
            multiprocessing_context=method if self.workers else None,
            prefetch_factor=self.prefetch if self.workers else None,
        )
        for batch in loader:
            self.taken += 1
            yield batch

    def numbers(self) -> Iterator[int]:
        """Places in the plan of the batches that are still to come."""
        taken = self.taken
        while self.batches is None or taken < self.batches:
            yield self.start + taken * self.world + self.rank
            taken += 1

    def state_dict(self, taken: int | None = None) -> dict[str, Any]:
        """Where the loader is, as plain JSON; equal on every rank after equal numbers of batches.

        Args:
            taken: batches that have been used, where that is not as many as were given: a trainer may hold the next.
        """
        done = self.start + (self.taken if taken is None else taken) * self.world
        return {"format": 1, "plan": self.plan.digest, "batch": self.plan.size, "batches": done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another loader was, whatever its number of workers and of ranks.

        Raises:
            WorldloomError: that one had other samples, shapes, weights, another seed or size of batches.
        """
        if state.get("format") != 1 or not isinstance(state.get("batches"), int) or state["batches"] < 0:
            raise WorldloomError("this is no state of a loader", got=dict(state))
        if state.get("plan") != self.plan.digest:
            raise WorldloomError(
                "the loader's state belongs to other data: samples, shapes, weights, seed or batch size differ",
                got=f"state: plan {state.get('plan')} in batches of {state.get('batch')}; "
                f"here: plan {self.plan.digest} in batches of {self.plan.size}",
                do="give the datasets and settings that it was saved with, or start at the beginning",
            )
        self.start, self.taken = state["batches"], 0


class _Addressed:
    """What a DataLoader wants of a dataset; keys are (epoch, index)."""

    def __init__(self, fetch: Fetch) -> None:
        self.fetch = fetch

    def __getitem__(self, key: tuple[int, int]) -> Any:
        return self.fetch(*key)


class _Numbers:
    """What a DataLoader wants of a batch sampler."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return map(self.loader.plan.batch, self.loader.numbers())


# -- datasets together --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClipBatch:
    """A batch of decoded clips."""

    frames: Tensor
    """uint8 ``(b, T, h, w, 3)``; `worldloom.media.to_tensor` makes it float."""
    actions: Tensor | None
    """float32 ``(b, T - 1, a)``; None where the data carries none."""
    clip_ids: tuple[str, ...]
    """One id per row."""


def collate_clips(samples: Sequence[ShardSample]) -> ClipBatch:
    """Decode clips of one length and size into a batch.

    Raises:
        WorldloomError: a video that does not hold as many frames as its clip says.
    """
    import torch

    from worldloom import media

    out: np.ndarray | None = None
    for row, sample in enumerate(samples):
        assert sample.video is not None, "a dataset of clips"
        frames = media.read_frames(sample.video)
        if len(frames) != sample.clip.frames:
            raise WorldloomError(
                "a video does not hold the frames that its clip says, so its actions do not fit",
                got=f"{sample.clip.id}: {len(frames)} instead of {sample.clip.frames}",
                do="make the dataset again",
            )
        if out is None:
            out = np.empty((len(samples), *frames.shape), np.uint8)
        out[row] = frames
    assert out is not None, "a batch has samples"
    return ClipBatch(torch.from_numpy(out), _stacked(samples, "actions"), tuple(s.clip.id for s in samples))


def collate_latents(samples: Sequence[ShardSample]) -> LatentBatch:
    """Stack samples of one shape into a batch: latents, actions and text as float32."""
    latents = _stacked(samples, "latents")
    assert latents is not None, "a dataset of latents"
    return LatentBatch(
        latents, _stacked(samples, "actions"), _stacked(samples, "text"), tuple(s.clip.id for s in samples)
    )


def _stacked(samples: Sequence[ShardSample], name: str) -> Tensor | None:
    """One array of all samples, float32; None unless all have it."""
    import torch

    arrays = [sample.arrays[name] for sample in samples if name in sample.arrays]
    # torch converts half precision faster than numpy does.
    return torch.from_numpy(np.stack(arrays)).float() if len(arrays) == len(samples) else None


@dataclass(frozen=True)
class _Numbered:
    """Samples of several datasets under one numbering."""

    parts: Sequence[Samples]

    def __call__(self, epoch: int, index: int) -> ShardSample:
        del epoch  # nothing about a stored sample is random
        for part in self.parts:
            if index < len(part):
                return part.load(index)
            index -= len(part)
        raise AssertionError("a plan numbers the samples that there are")


def open_loader(
    roots: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    batch: int,
    *,
    seed: int = 0,
    weights: Sequence[float] | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    batches: int | None = None,
) -> Loader:
    """A loader of one dataset or of several together; every batch holds samples of one shape.

    Args:
        roots: datasets of one kind, folders or fsspec URLs.
        batch: samples of a batch.
        seed: of the order.
        weights: how often each dataset is drawn from, in any unit; None draws each sample equally often.
        collate: makes a batch of a list of `ShardSample`; None gives a `LatentBatch`, or a `ClipBatch` of clips.
        rank, world, workers, batches: as for `Loader`.

    Raises:
        WorldloomError: a dataset that cannot be read, datasets of different kinds, or weights that do not fit them.
    """
    given = [roots] if isinstance(roots, (str, os.PathLike)) else list(roots)
    parts = [Samples(root) for root in given]
    kinds = sorted({part.index.kind for part in parts})
    if len(kinds) != 1:
        raise WorldloomError("datasets that are read together must be of one kind", got=kinds or given)
    if weights is not None and len(weights) != len(parts):
        raise WorldloomError("there must be one weight for each dataset", got=f"{list(weights)} for {len(parts)}")
    plan = Plan(
        sum(map(len, parts)),
        batch,
        seed,
        shapes=[shape for part in parts for shape in part.shapes()],
        parts=np.repeat(np.arange(len(parts)), [len(part) for part in parts]),
        weights=weights,
    )
    default = collate_latents if kinds == ["latents"] else collate_clips
    return Loader(_Numbered(parts), plan, collate or default, rank=rank, world=world, workers=workers, batches=batches)
