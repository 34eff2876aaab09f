"""Sources behind a URL: fetched, within an allowlist, into a folder of this machine, and curated from there.

Nothing is read from a URL unless `EpisodeConfig.allow` has a prefix of it. Redirections are not followed, for they
could lead past that list. A file that was fetched is fetched again when its size, its date or its tag changes.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from worldloom.artifacts import atomic_file, atomic_write
from worldloom.errors import WorldloomError
from worldloom_curation.episodes import EpisodeConfig

SCHEMES = frozenset({"s3", "gs", "hf", "http", "https", "memory"})
"""What may be allowed at all. ``file://`` is this machine, and needs no permission."""

_MARKS = (
    "ETag",
    "etag",
    "e_tag",
    "LastModified",
    "last_modified",
    "mtime",
    "updated",
    "created",
    "blob_id",
    "mimetype",
)


def is_url(source: str) -> bool:
    """Whether this names something behind a protocol."""
    return "://" in source


def local_copy(url: str, folder: Path, config: EpisodeConfig) -> Path:
    """A file or folder of this machine with what is at a URL.

    Args:
        folder: where copies are kept; gets a folder for each URL.

    Raises:
        WorldloomError: the URL is not allowed, nothing is there, it is too large, or its protocol is not installed.
    """
    scheme, rest = url.split("://", 1)
    if scheme == "file":
        return Path(unquote(urlsplit(url).path))
    if "::" in url or scheme not in SCHEMES:
        raise WorldloomError(
            "no source can be read by this protocol", got=url, do=f"use one of: {', '.join(sorted(SCHEMES))}"
        )
    if not any(_under(url, prefix) for prefix in config.allow):
        raise WorldloomError(
            "this URL may not be read",
            got=url,
            do=f"allow it: --set 'sources.allow=[\"{url}\"]', or in the file for --config",
        )
    fs, root = _filesystem(url)
    listed = _listing(fs, root, url)
    total = sum(int(entry.get("size") or 0) for entry in listed.values())
    limit = config.max_gib * 2**30
    if total > limit:
        raise WorldloomError(
            "more is at this URL than may be fetched",
            got=f"{total / 2**30:.1f} GiB",
            do=f"raise sources.max_gib ({config.max_gib:g})",
        )
    copy = folder / hashlib.sha256(url.encode()).hexdigest()[:16]
    files = copy / (posixpath.basename(rest.rstrip("/")) or "root")
    single = root in listed
    known = _known(copy)
    marks: dict[str, str] = {}
    left = limit
    for path, entry in sorted(listed.items()):
        relative = files.name if single else _relative(path, root)
        target = copy / relative if single else files / relative
        marks[relative] = json.dumps([entry.get("size"), *(str(entry.get(mark, "")) for mark in _MARKS)])
        if known.get(relative) != marks[relative] or not target.is_file():
            _fetch(fs, path, target, left)
            atomic_write(copy / "fetched.json", json.dumps({**known, **marks}, indent=1))
        left -= target.stat().st_size
    _remove_others(copy, files, set(marks), single)
    atomic_write(copy / "fetched.json", json.dumps(marks, indent=1))
    return files


def _under(url: str, prefix: str) -> bool:
    """Whether a URL is `prefix`, or lies under it: ``s3://a/b`` allows ``s3://a/b/c`` and not ``s3://a/bc``."""
    one, other = urlsplit(url), urlsplit(prefix)
    if (one.scheme, one.netloc) != (other.scheme, other.netloc) or not other.scheme:
        return False
    path, allowed = unquote(one.path), unquote(other.path).rstrip("/")
    if ".." in path.split("/"):
        return False
    return path == allowed or path.startswith(allowed + "/")


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    options = {"allow_redirects": False} if url.startswith("http") else {}
    try:
        fs, root = fsspec.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise WorldloomError(f"the URL cannot be opened: {error}", got=url, do="install that protocol") from error
    return fs, str(root).rstrip("/")


def _listing(fs: Any, root: str, url: str) -> dict[str, dict[str, Any]]:
    """The files under a root, or the root itself, with what the file system says of each."""
    try:
        if fs.isfile(root):
            return {root: dict(fs.info(root))}
        found: dict[str, dict[str, Any]] = fs.find(root, detail=True)
    except Exception as error:  # every file system has errors of its own
        raise WorldloomError("the URL cannot be read", got=f"{url}: {error}") from error
    files = {
        path.rstrip("/"): entry
        for path, entry in found.items()
        if entry.get("type") == "file" and path.startswith(root + "/") and not _hidden(_relative(path, root))
    }
    if not files:
        raise WorldloomError("nothing is at this URL", got=url, do="give the URL of a file or a folder")
    return files


def _relative(path: str, root: str) -> str:
    relative = unquote(urlunsplit(("", "", urlsplit(path).path, "", ""))) if "://" in path else path
    base = unquote(urlsplit(root).path) if "://" in root else root
    relative = relative.removeprefix(base).lstrip("/")
    if not relative or any(part in ("", ".", "..") for part in relative.split("/")) or "\\" in relative:
        raise WorldloomError("a file behind a URL has a name that is no path", got=path)
    return relative


def _hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in relative.split("/"))


def _known(copy: Path) -> dict[str, str]:
    try:
        return dict(json.loads((copy / "fetched.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def _fetch(fs: Any, path: str, target: Path, limit: float) -> None:
    """One file, whole or not at all; at most `limit` bytes, whatever the listing said."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as made:
        try:
            with fs.open(path, "rb") as source, open(made, "wb") as copy:
                while chunk := source.read(1 << 20):
                    limit -= len(chunk)
                    if limit < 0:
                        raise WorldloomError(
                            "more is at this URL than may be fetched", got=path, do="raise sources.max_gib"
                        )
                    copy.write(chunk)
        except WorldloomError:
            raise
        except Exception as error:  # every file system has errors of its own
            raise WorldloomError("the file cannot be fetched", got=f"{path}: {error}", do="run again") from error


def _remove_others(copy: Path, files: Path, kept: set[str], single: bool) -> None:
    """What is no longer at the URL is not curated any more."""
    if single or not files.is_dir():
        return
    for file in [item for item in files.rglob("*") if item.is_file()]:
        if file.relative_to(files).as_posix() not in kept:
            file.unlink()
    for folder in sorted((item for item in files.rglob("*") if item.is_dir()), reverse=True):
        if not any(folder.iterdir()):
            shutil.rmtree(folder)
