"""The samples of a dataset in one pass, through the ``webdataset`` library: for data that lies behind a URL.

The library reads the tars, groups members into samples, splits shards among workers and shuffles. It would let much
pass that has no place in a dataset, so every header is checked before the library sees it (`_CheckedTar`), and members
are decoded by `worldloom.members`, never by the library. Its secure mode (WDS_SECURE) is on as well.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import itertools
import os
import random
import tarfile
from collections.abc import Iterator
from typing import Any

from worldloom.errors import WorldloomError, missing_extra
from worldloom.members import Headers, Kind, ShardSample, bad_member, round_up, unpack
from worldloom.schema import ShardRef
from worldloom.shards import DatasetIndex, read_index

__all__ = ["locate", "stream"]


def stream(
    root: str | os.PathLike[str],
    *,
    shuffle: int = 0,
    seed: int = 0,
    epochs: int | None = 1,
    rank: int = 0,
    world: int = 1,
) -> Iterator[ShardSample]:
    """The samples of a dataset, read once from end to end; holds `shuffle` samples, and one more, in memory.

    A shard belongs to one rank, and to one DataLoader worker of it. An epoch of all of them together has every sample
    once; ranks have unequal numbers of samples where shards do not divide evenly. Equal arguments give equal order.

    A shard's size, digest and sample count are held against ``dataset.json`` as it is read, so one that was changed is
    refused before its last sample, not before its first.

    Args:
        root: the dataset: a folder or an fsspec URL (``s3://``, ``gs://``, ``hf://``, ``https://``).
        shuffle: samples to draw from at random, in a random order of shards; 0 for the order of the dataset.
        seed: of the shuffling; each epoch has another order.
        epochs: passes over the dataset; None for no end.
        rank: which process this is,
        world: of how many.

    Raises:
        WorldloomError: webdataset is not installed, no dataset there, more ranks than shards; while reading, a shard
            that is damaged, that is not the recorded one, or that holds what a dataset may not.
    """
    if shuffle < 0 or (epochs is not None and epochs < 1) or not 0 <= rank < world:
        raise WorldloomError(
            "shuffle must be 0 or more, epochs 1 or more, and rank below world",
            got=f"shuffle {shuffle}, epochs {epochs}, rank {rank} of {world}",
        )
    _webdataset()
    root = os.fspath(root).rstrip("/")
    fs, base = locate(root)
    index = read_index(lambda: fs.cat_file(f"{base}/dataset.json"), root)
    if world > len(index.shards):
        raise WorldloomError(
            "every rank needs a shard of its own",
            got=f"{len(index.shards)} shards for {world} ranks",
            do="make the dataset with fewer samples in a shard, or use fewer ranks",
        )
    return _read(root, index, shuffle, seed, epochs, rank, world)


def _read(
    root: str, index: DatasetIndex, shuffle: int, seed: int, epochs: int | None, rank: int, world: int
) -> Iterator[ShardSample]:
    wds = _webdataset()
    tars = wds.tariterators
    for epoch in itertools.count() if epochs is None else range(epochs):
        rng = random.Random(f"{seed} {epoch}")
        shards = list(index.shards)
        if shuffle:
            rng.shuffle(shards)  # equally on every rank, which then takes its share
        pipeline = wds.DataPipeline(
            functools.partial(iter, shards[rank::world]),
            wds.split_by_worker,
            functools.partial(_open_shards, root=root, kind=index.kind),
            tars.tar_file_expander,
            tars.group_by_keys,
            wds.shuffle(shuffle, initial=shuffle, rng=rng) if shuffle else None,
        )
        try:
            for members in pipeline:
                yield unpack(members["__url__"], members["__key__"], members, index.kind)
        except WorldloomError as error:
            # webdataset adds its own objects to the arguments of an error that passes through it.
            raise WorldloomError(error.what, got=error.got, do=error.do) from error.__cause__
        except (OSError, EOFError, tarfile.TarError) as error:
            raise WorldloomError(
                "a shard cannot be read", got=f"{root}: {error}", do="try again, or restore it"
            ) from error


def _open_shards(shards: Iterator[ShardRef], root: str, kind: Kind) -> Iterator[dict[str, Any]]:
    """A stage of the pipeline, in place of webdataset's ``url_opener``, which opens other URLs and checks nothing."""
    fs, base = locate(root)
    for ref in shards:
        with fs.open(f"{base}/{ref.path}", "rb") as file:
            yield {"url": f"{root}/{ref.path}", "stream": _CheckedTar(file, f"{root}/{ref.path}", ref, kind)}


class _CheckedTar:
    """A plain USTAR tar as a file to read from front to back, each header checked before it is handed on.

    webdataset itself would skip links, ungroup scattered samples, unpack compressed tars and take one that stops at a
    header for a whole one.
    """

    def __init__(self, file: Any, where: str, ref: ShardRef, kind: Kind) -> None:
        self._file, self._where, self._ref = file, where, ref
        self._headers = Headers(where, kind)
        self._digest = hashlib.sha256()
        self._read = 0
        self._left = 0  # bytes of the member, padding included, up to the next header
        self._ended = False

    def read(self, size: int) -> bytes:
        """The next bytes, no more than `size` (512 or more) and never past a header."""
        if self._left:
            data = self._take(min(size, self._left))
            if not data:
                raise self._not_whole("it ends inside a member")
            self._left -= len(data)
            return data
        if self._ended:
            return b""
        block = self._take(512)
        if block == bytes(512):
            self._finish()
            return block
        if len(block) < 512:
            raise self._not_whole("no end mark")
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.TarError as error:
            raise self._not_whole(str(error)) from error
        self._headers.add(info)
        self._left = round_up(info.size)
        if self._read + self._left > self._ref.bytes:
            raise bad_member(self._where, info.name, "the tar is cut off, or the member is too large")
        return block

    def _take(self, size: int) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        self._read += len(data)
        return data

    def _finish(self) -> None:
        if self._take(512) != bytes(512):
            raise self._not_whole("no end mark")
        while self._read <= self._ref.bytes and self._take(1 << 20):
            pass
        self._headers.end()
        if self._headers.samples != self._ref.samples:
            raise WorldloomError(
                "a shard does not hold the samples that dataset.json records",
                got=f"{self._where}: {self._headers.samples} instead of {self._ref.samples}",
                do="restore the dataset, or make it again",
            )
        if (self._read, self._digest.hexdigest()) != (self._ref.bytes, self._ref.digest):
            raise WorldloomError(
                "a shard does not have the digest that dataset.json records",
                got=self._where,
                do="restore the dataset, or make it again",
            )
        self._ended = True

    def _not_whole(self, why: str) -> WorldloomError:
        return WorldloomError("not a whole tar shard", got=f"{self._where}: {why}", do="restore it, or make it again")


def _webdataset() -> Any:
    try:
        library: Any = importlib.import_module("webdataset")
    except ImportError as error:
        raise missing_extra("webdataset", "curation") from error
    # What WDS_SECURE=1 sets; the variable itself is looked at only when the library is imported for the first time.
    library.utils.enforce_security = True
    return library


def locate(root: str) -> tuple[Any, str]:
    """The file system of a root, and the path in it; to be called where it is used, for some do not survive a fork."""
    import fsspec

    try:
        fs, base = fsspec.url_to_fs(root)
    except (ImportError, ValueError) as error:
        raise WorldloomError(
            f"the dataset cannot be opened: {error}", got=root, do="give a folder, or install that protocol"
        ) from error
    return fs, str(base).rstrip("/")
