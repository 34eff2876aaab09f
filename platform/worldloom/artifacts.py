"""Content-addressed records of what was made, from what, by which code: a folder, or any fsspec URL.

Layout of a store::

    records/<kind>-<16 hex>.json    one artifact; written last, so a record that exists is whole
    objects/ab/cdef...              bytes by sha256, for artifacts that were stored with ``copy=True``

The file helpers (`atomic_write`, `atomic_file`, `atomic_dir`, `file_digest`, `tree_digest`) are what the rest of
Worldloom commits with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import difflib
import functools
import hashlib
import json
import os
import posixpath
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from worldloom.errors import WorldloomError

_CHUNK = 1 << 20
_ID = re.compile(r"[a-z][a-z0-9_-]*-[0-9a-f]{16}")
_TEMPORARY = ".worldloom-tmp"  # the end of every name that is still being written; digests leave such files out


def home() -> Path:
    """Where Worldloom keeps its own files: ``$WORLDLOOM_HOME``, else ``./.worldloom``; absolute."""
    return Path(os.environ.get("WORLDLOOM_HOME") or ".worldloom").absolute()


def file_digest(path: str | Path) -> str:
    """sha256 (hex) of a file's bytes, read in chunks."""
    with open(path, "rb") as file:
        return _stream_digest(file)


def _stream_digest(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def tree_digest(path: str | Path) -> str:
    """sha256 (hex) of a file's bytes, or of a folder's sorted ``(relative path, sha256)`` lines."""
    path = Path(path)
    if path.is_file():
        return file_digest(path)
    return _lines_digest((name, file_digest(path / name)) for name in _files_under(path))


def _lines_digest(lines: Any) -> str:
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in lines).encode()).hexdigest()


def _files_under(folder: Path) -> list[str]:
    found = (item for item in folder.rglob("*") if item.is_file())
    names = (item.relative_to(folder).as_posix() for item in found)
    return sorted(name for name in names if _TEMPORARY not in name)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}{_TEMPORARY}")


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write(path: str | Path, data: bytes | str, *, durable: bool = True) -> None:
    """Write a file so that at every instant `path` is the old whole or the new whole; makes parent folders.

    Args:
        durable: also if the power fails; without, the file may be damaged then, and writing takes a quarter as long.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a file name in a temporary sibling folder of its own; on success that file becomes `path`.

    What else is in the folder is removed, and so is everything on an error.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = _temporary(path)
    folder.mkdir()
    try:
        made = folder / path.name
        yield made
        sync(made)
        made.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sync(path.parent)


@contextlib.contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling folder to fill; on success it becomes `path`, on an error it is removed.

    Raises:
        WorldloomError: `path` already holds something.
    """
    path = Path(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise WorldloomError("the output already exists", got=path, do="choose another folder, or remove this one")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path.absolute())
    temporary.mkdir()
    try:
        yield temporary
        for item in sorted(temporary.rglob("*"), reverse=True):
            sync(item)
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(path.absolute().parent)


@functools.cache
def code_version() -> str:
    """``worldloom 0.1.0+git.<sha>[.dirty]`` in a checkout, else ``worldloom 0.1.0``."""
    from worldloom import __version__

    version = f"worldloom {__version__}"
    here = Path(__file__).resolve()

    def git(*command: str) -> str:
        # No optional locks: asking must not disturb a commit that somebody else is making.
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(here.parent), *command],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # else: installed inside some other project's checkout
        dirty = ".dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
        return f"{version}+git.{git('rev-parse', '--short=12', 'HEAD')}{dirty}"
    except (OSError, subprocess.SubprocessError):
        return version


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact."""

    sha256: str
    """Hex digest of its bytes."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Artifact:
    """A record of something made."""

    id: str
    """``<kind>-<16 hex>``: equal content, inputs, config and seed give an equal id."""
    kind: str
    """``dataset``, ``latents``, ``tokenizer``, ``model``, ``sample``, ``report``, ..."""
    name: str
    """For people; not part of the id."""
    digest: str
    """`tree_digest` of the content."""
    inputs: tuple[str, ...]
    """Ids of what it was made from, or ``file:<sha256>:<path>`` / ``model:<name>@<sha256>`` for what has no record."""
    files: Mapping[str, FileEntry]
    """Relative path -> entry."""
    location: str
    """Absolute path of the file or folder as it was stored."""
    code_version: str
    """`code_version()` of the code that made it."""
    config: Mapping[str, Any]
    """The effective config."""
    seed: int | None
    """The seed, where there was one."""
    metadata: Mapping[str, Any]
    """Measured facts; not part of the id."""
    created: str
    """UTC, ISO 8601; not part of the id."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files.values())

    def path(self, name: str) -> Path:
        """Where the file `name` was when it was stored."""
        whole = Path(self.location)
        alone = len(self.files) == 1 and whole.name == name and not whole.is_dir()
        return whole if alone else whole / name


class Store:
    """Artifacts in a folder or at an fsspec URL (``s3://``, ``gs://``, ``hf://``, ``memory://``).

    Args:
        root: folder or URL; None for `home()` / ``store``.
    """

    def __init__(self, root: str | Path | None = None) -> None:
        import fsspec

        self.root = str(root) if root is not None else str(home() / "store")
        try:
            fs, base = fsspec.url_to_fs(self.root)
        except (ImportError, ValueError) as error:
            raise WorldloomError(
                f"the store cannot be opened: {error}", got=self.root, do="give a folder, or install that protocol"
            ) from error
        self._fs: Any = fs
        self._base = str(base).rstrip("/")
        self._local = "file" in (fs.protocol if isinstance(fs.protocol, (tuple, list)) else (fs.protocol,))

    def put(
        self,
        path: str | Path,
        *,
        kind: str,
        name: str = "",
        inputs: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
        seed: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        copy: bool = False,
    ) -> Artifact:
        """Record a local file or folder; nothing is written next to it.

        Args:
            copy: also keep the bytes, by digest.

        Returns:
            The record. Storing the same thing again returns the same id, and keeps the first `created`.

        Raises:
            WorldloomError: nothing there, an empty folder, or a kind that is not a plain word.
        """
        path = Path(path).absolute()
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", kind):
            raise WorldloomError("an artifact's kind is one lower-case word", got=kind, do="for example: dataset")
        if path.is_file():
            sources = {path.name: path}
        elif path.is_dir():
            sources = {item: path / item for item in _files_under(path)}
        else:
            raise WorldloomError("there is nothing at this path", got=path, do="give an existing file or folder")
        if not sources:
            raise WorldloomError("the folder is empty", got=path, do="give a folder that holds files")
        files = {item: FileEntry(file_digest(at), at.stat().st_size) for item, at in sources.items()}
        lines = [(item, entry.sha256) for item, entry in files.items()]
        settings = dict(config or {})
        identity = json.dumps([kind, lines, list(inputs), settings, seed], sort_keys=True, separators=(",", ":"))
        artifact = Artifact(
            id=f"{kind}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}",
            kind=kind,
            name=name,
            digest=lines[0][1] if path.is_file() else _lines_digest(lines),
            inputs=tuple(inputs),
            files=files,
            location=str(path),
            code_version=code_version(),
            config=json.loads(json.dumps(settings)),
            seed=seed,
            metadata=json.loads(json.dumps(dict(metadata or {}))),
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )
        if copy:
            for item, entry in files.items():
                self._put_object(sources[item], entry)
        record = self._record(artifact.id)
        if self._fs.exists(record):
            artifact = dataclasses.replace(artifact, created=self._read(artifact.id).created)
        self._write(record, json.dumps(dataclasses.asdict(artifact), indent=1, sort_keys=True).encode())
        return artifact

    def __contains__(self, artifact_id: str) -> bool:
        """Whether there is a record of exactly this id."""
        return bool(_ID.fullmatch(artifact_id)) and bool(self._fs.exists(self._record(artifact_id)))

    def get(self, id_or_prefix: str) -> Artifact:
        """The record of an id, or of any unique beginning of one (with or without its kind).

        Raises:
            WorldloomError: unknown (names near ids) or ambiguous (names them).
        """
        return self._read(self._resolve(id_or_prefix))

    def _resolve(self, wanted: str) -> str:
        ids = self._ids()
        if wanted in ids:
            return wanted
        matches = [
            key for key in ids if wanted and (key.startswith(wanted) or key.rpartition("-")[2].startswith(wanted))
        ]
        if len(matches) == 1:
            return matches[0]
        if matches:
            shown = ", ".join(matches[:5]) + (", ..." if len(matches) > 5 else "")
            raise WorldloomError(f"{len(matches)} artifacts begin like that", got=wanted, do=f"write more of: {shown}")
        near = difflib.get_close_matches(wanted, ids, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the store holds {len(ids)} artifacts"
        raise WorldloomError(f"no artifact of that id in {self.root}", got=wanted, do=hint)

    def _ids(self) -> list[str]:
        try:
            listing = self._fs.ls(f"{self._base}/records", detail=False, refresh=True)
        except FileNotFoundError:
            return []
        names = (posixpath.basename(str(item).rstrip("/")) for item in listing)
        return sorted(name.removesuffix(".json") for name in names if name.endswith(".json") and name[0] != ".")

    def find(self, kind: str | None = None) -> list[Artifact]:
        """All records, or those of one kind, oldest first."""
        ids = [key for key in self._ids() if kind is None or key.rpartition("-")[0] == kind]
        return sorted((self._read(key) for key in ids), key=lambda artifact: (artifact.created, artifact.id))

    def holding(self, sha256: str, kind: str) -> str | None:
        """The id of the newest artifact of a kind that holds a file with these bytes."""
        found = [a.id for a in self.find(kind) if any(entry.sha256 == sha256 for entry in a.files.values())]
        return found[-1] if found else None

    def fetch(self, id_or_prefix: str, dest: str | Path) -> Path:
        """Bring an artifact's files into the folder `dest`, each checked and atomic; files already there are kept.

        Returns:
            `dest`.

        Raises:
            WorldloomError: a file is neither stored nor unchanged at its location.
        """
        artifact, dest = self.get(id_or_prefix), Path(dest)
        for name, entry in artifact.files.items():
            target = dest / _safe(name)
            if target.is_file() and file_digest(target) == entry.sha256:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = _temporary(target)
            try:
                if self._fs.exists(self._object(entry)):
                    self._fs.get_file(self._object(entry), str(temporary))
                elif artifact.path(name).is_file():
                    shutil.copyfile(artifact.path(name), temporary)
                if not temporary.is_file() or file_digest(temporary) != entry.sha256:
                    raise WorldloomError(
                        f"the bytes of {name} are gone or have changed",
                        got=artifact.id,
                        do="make it again, or store it with copy=True",
                    )
                sync(temporary)
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)
            sync(target.parent)
        return dest

    def verify(self, id_or_prefix: str) -> list[str]:
        """The files whose bytes, at the location or among the stored objects, are not those of the record."""
        artifact = self.get(id_or_prefix)
        wrong: list[str] = []
        for name, entry in artifact.files.items():
            here, kept = artifact.path(name), self._fs.exists(self._object(entry))
            if here.is_file():
                intact = file_digest(here) == entry.sha256
            else:
                intact = kept  # moved away since, but the store has the bytes
            if kept:
                with self._fs.open(self._object(entry), "rb") as file:
                    intact = intact and _stream_digest(file) == entry.sha256
            if not intact:
                wrong.append(name)
        return wrong

    def _object(self, entry: FileEntry) -> str:
        return f"{self._base}/objects/{entry.sha256[:2]}/{entry.sha256[2:]}"

    def _record(self, key: str) -> str:
        return f"{self._base}/records/{key}.json"

    def _put_object(self, source: Path, entry: FileEntry) -> None:
        target = self._object(entry)
        if not self._local:
            # An object store shows an upload only when it is complete; comparing bytes would cost a download.
            if not self._fs.exists(target) or self._fs.size(target) != entry.size:
                self._fs.makedirs(posixpath.dirname(target), exist_ok=True)
                self._fs.put_file(str(source), target)
            return
        if Path(target).is_file() and file_digest(target) == entry.sha256:
            return
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(Path(target))
        try:
            shutil.copyfile(source, temporary)
            if file_digest(temporary) != entry.sha256:
                raise WorldloomError(
                    "the file changed while it was being stored", got=source, do="store it when nothing writes to it"
                )
            sync(temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        sync(Path(target).parent)

    def _write(self, target: str, data: bytes) -> None:
        if self._local:
            atomic_write(target, data)
        else:
            self._fs.makedirs(posixpath.dirname(target), exist_ok=True)
            self._fs.pipe_file(target, data)

    def _read(self, key: str) -> Artifact:
        try:
            fields = json.loads(self._fs.cat_file(self._record(key)))
            fields["inputs"] = tuple(fields["inputs"])
            fields["files"] = {item: FileEntry(**entry) for item, entry in fields["files"].items()}
            return Artifact(**fields)
        except (ValueError, TypeError, KeyError) as error:
            raise WorldloomError(
                f"the record of {key} is damaged: {error}",
                got=self._record(key),
                do="remove it and store the thing again",
            ) from error


def _safe(name: str) -> PurePosixPath:
    """A record may come from elsewhere: its paths must stay inside the folder they are restored to."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise WorldloomError("the record names a file outside its folder", got=name, do="do not trust this store")
    return path
