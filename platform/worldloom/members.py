"""One sample as the members of a tar, and back; `worldloom.shards` is the door to it.

Ours is a stricter reader than WebDataset's: members are read by offset and never extracted, no pickle is ever loaded,
arrays are checked against what their clip says, and any other member is refused by name. Equal samples pack to equal
bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from worldloom.errors import WorldloomError
from worldloom.schema import Clip

Kind = Literal["clips", "latents"]

ARRAYS: Mapping[str, tuple[str, tuple[str, ...], int]] = {
    "latents": ("latents.npy", ("float16",), 4),
    "codes": ("codes.npy", ("int32",), 4),
    "text": ("text.npy", ("float16", "float32"), 2),
    "embedding": ("embedding.npy", ("float16",), 2),
    "actions": ("actions.npy", ("float32",), 2),
    "rewards": ("rewards.npy", ("float32",), 1),
    "state": ("state.npy", ("float32",), 2),
    "depth": ("depth.npz", ("uint8", "uint16"), 3),
    "segmentation": ("segmentation.npz", ("uint8",), 3),
}
"""Array -> its member's extension, the dtypes it may have, its number of axes."""

_EXTENSIONS = {"json", "mp4"} | {extension for extension, _, _ in ARRAYS.values()}
_KEY = re.compile(r"[A-Za-z0-9_-]{1,90}")
_MAX_MEMBER = 4 * 2**30  # bytes, packed or unpacked


@dataclass
class ShardSample:
    """One clip with its bytes and arrays."""

    clip: Clip
    """What the clip is; ``clip.id`` is the key."""
    video: bytes | None
    """MP4 bytes; None in a dataset of latents."""
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    """Any of the keys of `ARRAYS`."""


def pack(sample: ShardSample, kind: Kind = "clips") -> dict[str, bytes]:
    """A sample as members: extension -> bytes. Checks what `ShardWriter.write` promises."""
    clip = sample.clip
    if not _KEY.fullmatch(clip.id):
        raise WorldloomError("a clip id may hold letters, digits, _ and - only", got=clip.id)
    if (sample.video is None) == (kind == "clips") or ("latents" in sample.arrays) == (kind == "clips"):
        raise WorldloomError("a clip has a video and no latents, a latents sample the reverse", got=clip.id)
    _check_codes(clip, sample.arrays)
    try:
        text = json.dumps(dataclasses.asdict(clip), sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise WorldloomError("a clip's metadata must be plain JSON", got=f"{clip.id}: {error}") from error
    members = {"json": text.encode()}
    if sample.video is not None:
        members["mp4"] = bytes(sample.video)
    for name, array in sample.arrays.items():
        _check_array(clip, name, array)
        extension = ARRAYS[name][0]
        members[extension] = _dump_npy(array) if extension.endswith(".npy") else _dump_npz(array)
    return members


@dataclass(frozen=True)
class Entry:
    """Where the members of one sample lie in its tar."""

    path: Path
    key: str
    members: Mapping[str, tuple[int, int]]
    """Extension -> (offset, size)."""

    def read(self, file: Any, kind: Kind) -> ShardSample:
        members = {extension: self.member(file, extension) for extension in self.members}
        return unpack(self.path, self.key, members, kind)

    def read_clip(self, file: Any) -> Clip:
        return load_clip(self.path, self.key, self.member(file, "json"))

    def member(self, file: Any, extension: str) -> bytes:
        """One member's bytes."""
        offset, size = self.members[extension]
        file.seek(offset)
        data = file.read(size)
        if len(data) != size:
            raise bad_member(self.path, f"{self.key}.{extension}", "the tar ends inside it")
        return data


_DAMAGED = (ValueError, KeyError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What an array's bytes may raise that are not what they should be (of a zip, encryption and methods it lacks too)."""


def unpack(where: str | Path, key: str, members: Mapping[str, bytes], kind: Kind) -> ShardSample:
    """The sample that `pack` made these members (extension -> bytes) of.

    Args:
        where: the tar they come from, for messages.

    Raises:
        WorldloomError: a member whose bytes are not what they should be, or an array that does not fit its clip.
    """
    clip = load_clip(where, key, members["json"])
    arrays: dict[str, np.ndarray] = {}
    for name, (extension, _, _) in ARRAYS.items():
        if extension in members:
            data = members[extension]
            try:
                arrays[name] = _load_npy(data) if extension.endswith(".npy") else _load_npz(data)
            except _DAMAGED as error:
                raise bad_member(where, f"{key}.{extension}", str(error)) from error
            _check_array(clip, name, arrays[name])
    _check_codes(clip, arrays)
    return ShardSample(clip, members["mp4"] if kind == "clips" else None, arrays)


class Headers:
    """What the headers of a shard must keep to, told one by one in order: `add` for each, then `end`.

    Args:
        where: the tar, for messages.
    """

    def __init__(self, where: str | Path, kind: Kind) -> None:
        self.samples = 0
        self._where = where
        self._required = {"json", "mp4"} if kind == "clips" else {"json", "latents.npy"}
        self._keys: set[str] = set()
        self._key = ""
        self._extensions: set[str] = set()

    def add(self, info: tarfile.TarInfo) -> tuple[str, str]:
        """The key and the extension of a member.

        Raises:
            WorldloomError: no regular file, one that has no place in a dataset, or a sample that is not whole.
        """
        key, _, extension = info.name.partition(".")
        if not info.isreg() or info.issparse():
            raise bad_member(self._where, info.name, "it is not a regular file")
        if not _KEY.fullmatch(key) or extension not in _EXTENSIONS:
            raise bad_member(self._where, info.name, "no such member belongs into a dataset")
        if not 0 <= info.size <= _MAX_MEMBER:
            raise bad_member(self._where, info.name, "the tar is cut off, or the member is too large")
        if key != self._key:
            self.end()
            if key in self._keys:
                raise bad_member(self._where, info.name, "the members of a sample must lie together")
            self._keys.add(key)
            self._key, self._extensions = key, set()
            self.samples += 1
        if extension in self._extensions:
            raise bad_member(self._where, info.name, "it appears twice")
        self._extensions.add(extension)
        return key, extension

    def end(self) -> None:
        """After the last header of a sample."""
        if self._key and (missing := self._required - self._extensions):
            raise bad_member(self._where, f"{self._key}.{min(missing)}", "it is missing")


def scan_shard(path: str | os.PathLike[str], kind: Kind = "clips") -> list[Entry]:
    """The samples of a tar and where their members lie; reads headers only.

    Raises:
        WorldloomError: not a whole tar, a member that is no regular file, or one that has no place in a dataset.
    """
    path = Path(path)
    entries: list[Entry] = []
    members: dict[str, tuple[int, int]] = {}
    headers = Headers(path, kind)
    size = path.stat().st_size
    try:
        with tarfile.open(path, mode="r:") as tar:
            for info in tar:
                key, extension = headers.add(info)
                if info.offset_data + info.size > size:
                    raise bad_member(path, info.name, "the tar is cut off, or the member is too large")
                if headers.samples > len(entries):
                    members = {}
                    entries.append(Entry(path, key, members))
                members[extension] = (info.offset_data, info.size)
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        raise WorldloomError(
            "not a whole tar shard", got=f"{path}: {error}", do="restore it, or make it again"
        ) from error
    _check_end(path, entries, size)
    headers.end()
    return entries


def read_members(path: str | os.PathLike[str], kind: Kind = "clips") -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, members) of a tar in order, as `ShardWriter.write_members` takes them: for moving samples between tars."""
    entries = scan_shard(path, kind)
    with open(path, "rb") as file:
        for entry in entries:
            yield entry.key, {extension: entry.member(file, extension) for extension in entry.members}


def _check_end(path: Path, entries: list[Entry], size: int) -> None:
    """Python's tarfile takes a tar that stops at a header for a whole one; a whole one ends in two empty blocks."""
    last = max((offset + round_up(n) for entry in entries for offset, n in entry.members.values()), default=0)
    with open(path, "rb") as file:
        file.seek(last)
        if size < last + 1024 or any(file.read(1024)):
            raise WorldloomError("not a whole tar shard", got=f"{path}: no end mark", do="restore it, or make it again")


def load_clip(where: str | Path, key: str, data: bytes) -> Clip:
    """The clip in a sample's json member.

    Raises:
        WorldloomError: it is damaged, or describes another clip than `key`.
    """
    try:
        clip = Clip(**json.loads(data))
    except (ValueError, TypeError) as error:
        raise bad_member(where, f"{key}.json", str(error)) from error
    if clip.id != key:
        raise bad_member(where, f"{key}.json", f"it describes the clip {clip.id!r}")
    return clip


def _check_array(clip: Clip, name: str, array: np.ndarray) -> None:
    if name not in ARRAYS:
        raise WorldloomError("no array of this name belongs into a dataset", got=name, do=f"known: {', '.join(ARRAYS)}")
    _, dtypes, axes = ARRAYS[name]
    if array.ndim != axes or not any(array.dtype == dtype for dtype in dtypes):  # dtype.name takes longer than reading
        raise WorldloomError(
            f"{name} must be {' or '.join(dtypes)} with {axes} axes", got=f"{clip.id}: {array.dtype} {array.shape}"
        )
    length = dict.fromkeys(("actions", "rewards"), clip.frames - 1)
    length |= dict.fromkeys(("state", "depth", "segmentation"), clip.frames)
    if name in length and len(array) != length[name]:
        raise WorldloomError(
            f"{name} must have {length[name]} rows for {clip.frames} frames", got=f"{clip.id}: {array.shape}"
        )
    if name == "actions" and array.shape[1] != clip.action_dim:
        raise WorldloomError("actions do not have clip.action_dim columns", got=f"{clip.id}: {array.shape}")


def _check_codes(clip: Clip, arrays: Mapping[str, np.ndarray]) -> None:
    """Codes are those of the latents beside them: one for each of their vectors and codebooks."""
    if "codes" in arrays and ("latents" not in arrays or arrays["codes"].shape[1:] != arrays["latents"].shape[1:]):
        shapes = {name: arrays[name].shape for name in ("codes", "latents") if name in arrays}
        raise WorldloomError("codes (codebooks, t, h, w) go with latents of that t, h, w", got=f"{clip.id}: {shapes}")


def _dump_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _load_npy(data: bytes | memoryview) -> np.ndarray:
    """Parse NPY 1.0/2.0 by hand: numpy's reader allocates what the header claims before it looks at the data."""
    if data[:8] not in (b"\x93NUMPY\x01\x00", b"\x93NUMPY\x02\x00"):
        raise ValueError(f"it does not begin like NPY 1.0 or 2.0: {bytes(data[:8])!r}")
    start = 10 if data[6] == 1 else 12
    offset = start + int.from_bytes(data[8:start], "little")
    shape, fortran, dtype = _npy_header(bytes(data[:offset]))
    count = math.prod(shape)
    if count * dtype.itemsize != len(data) - offset:
        raise ValueError(f"the header says {shape} of {dtype}, the data has {len(data) - offset} bytes")
    # A copy: the caller may write into it, and it does not hold the member's bytes.
    return np.frombuffer(data, dtype, count, offset).reshape(shape, order="F" if fortran else "C").copy()


@functools.lru_cache(maxsize=256)  # numpy compiles each header as Python; those of a dataset are few
def _npy_header(head: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether in Fortran's order, dtype) of the beginning of an NPY file."""
    buffer = io.BytesIO(head)
    reader = np.lib.format.read_array_header_1_0 if head[6] == 1 else np.lib.format.read_array_header_2_0
    np.lib.format.read_magic(buffer)
    try:
        shape, fortran, dtype = reader(buffer)
    except Exception as error:  # it parses Python, and raises whatever that raises: SyntaxError, TokenError, TypeError
        raise ValueError(f"its header cannot be read: {error}") from error
    if dtype.hasobject or dtype.fields is not None:
        raise ValueError(f"dtype {dtype} is not plain numbers; pickled objects are never loaded")
    return shape, fortran, dtype


def _dump_npz(array: np.ndarray) -> bytes:
    """One array "data" in a zip, as ``np.load`` reads it, with a fixed time stamp."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        info = zipfile.ZipInfo("data.npy")  # its time is 1980-01-01 by default
        info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
        archive.writestr(info, _dump_npy(array), compresslevel=1)
    return buffer.getvalue()


def _load_npz(data: bytes) -> np.ndarray:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        if names != ["data.npy"]:
            raise ValueError(f"it must hold data.npy alone, not {names[:3]}")
        if archive.getinfo("data.npy").file_size > _MAX_MEMBER:
            raise ValueError("the array is too large")
        return _load_npy(archive.read("data.npy"))


def bad_member(where: str | Path, member: str, why: str) -> WorldloomError:
    return WorldloomError(
        "a shard holds what a dataset may not", got=f"{where}: {member!r}: {why}", do="do not trust it"
    )


def round_up(size: int) -> int:
    return -(-size // 512) * 512
