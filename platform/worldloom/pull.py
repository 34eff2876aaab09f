"""Published weights from the Hugging Face Hub, pinned: ``worldloom models pull``.

Only safetensors and JSON files are taken: nothing that could run code. The first pull writes ``worldloom.lock.json``
with the commit and the sha256 and size of every file; later ones give exactly these bytes, without the network where
they are there, or an error.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol

from worldloom.artifacts import atomic_write, file_digest, home
from worldloom.convert import PICKLED
from worldloom.errors import WorldloomError, missing_extra

LOCK = "worldloom.lock.json"
_TAKEN = (".safetensors", ".json")
_URL = re.compile(r"hf://(?P<org>[\w.-]+)/(?P<name>[\w.-]+?)(?:@(?P<revision>[\w./-]+))?/?", re.ASCII)


class Hub(Protocol):
    """What is needed of `huggingface_hub.HfApi`."""

    def model_info(self, repo_id: str, *, revision: str | None, files_metadata: bool) -> Any:
        """An object with ``sha``, and ``siblings`` with ``rfilename``, ``size`` and ``lfs``."""
        ...

    def snapshot_download(
        self, repo_id: str, *, revision: str | None, allow_patterns: list[str], local_dir: str
    ) -> Any: ...


@dataclass(frozen=True)
class LockedFile:
    """One file of a lock."""

    sha256: str
    """Of its bytes, hex."""
    bytes: int
    """Its size."""


@dataclass(frozen=True)
class Pulled:
    """A folder of published files."""

    folder: Path
    """Where they are."""
    repository: str
    """On the Hub: organisation/name."""
    revision: str
    """The branch, tag or commit that was asked for; empty for the default branch."""
    commit: str
    """The commit that it meant when it was first pulled."""
    files: Mapping[str, LockedFile]
    """Path in the folder -> digest and size."""
    state: Literal["downloaded", "completed", "there already"] = "downloaded"
    """``completed``: files that were missing were downloaded again."""


def parse(url: str) -> tuple[str, str]:
    """Repository and revision ("" for the default branch) of ``hf://ORG/NAME[@REVISION]``.

    Raises:
        WorldloomError: another kind of URL.
    """
    found = _URL.fullmatch(url)
    if found is None or ".." in url:
        raise WorldloomError(
            "this is not the URL of a repository on the Hugging Face Hub",
            got=url,
            do="give hf://ORG/NAME or hf://ORG/NAME@REVISION",
        )
    return f"{found['org']}/{found['name']}", found["revision"] or ""


def pull(
    url: str,
    out: str | Path | None = None,
    *,
    include: Sequence[str] = (),
    update: bool = False,
    hub: Hub | None = None,
) -> Pulled:
    """Download the safetensors and JSON files of a repository, or check that they are there unchanged.

    Args:
        url: ``hf://ORG/NAME`` or ``hf://ORG/NAME@REVISION``.
        out: the folder; None for one under `artifacts.home`, named by repository and revision.
        include: patterns of which a file's path must match one; () for all. The first pull decides.
        update: forget the lock and take what the revision holds now.
        hub: `huggingface_hub.HfApi()` where it is None.

    Raises:
        WorldloomError: a wrong URL, no network, a gated or unknown repository or revision, no safetensors files in it,
            or a file whose digest is not the one that was pulled before or that the Hub declares.
    """
    repository, revision = parse(url)
    folder = Path(out) if out is not None else _default_folder(repository, revision)
    lock = None if update else _read_lock(folder, repository, revision)
    if lock is not None and not _missing(lock):
        _verify(lock)
        return Pulled(lock.folder, repository, revision, lock.commit, lock.files, "there already")
    client = hub if hub is not None else _client()
    if lock is not None:
        _verify(lock, absent=_missing(lock))
        _download(client, lock.repository, lock.commit, _missing(lock), folder)
        _verify(lock)
        return Pulled(lock.folder, repository, revision, lock.commit, lock.files, "completed")
    return _first(client, url, repository, revision, folder, include)


def _first(hub: Hub, url: str, repository: str, revision: str, folder: Path, include: Sequence[str]) -> Pulled:
    with _translated(repository, revision):
        info = hub.model_info(repository, revision=revision or None, files_metadata=True)
    held = {str(file.rfilename): file for file in info.siblings or ()}
    chosen = sorted(name for name in held if name.endswith(_TAKEN) and (not include or _matches(name, include)))
    if not any(name.endswith(".safetensors") for name in chosen):
        raise _nothing(url, held, include)
    for name in chosen:
        _check_inside(name)
    _download(hub, repository, info.sha, chosen, folder)
    files = {name: _lock_file(folder / name) for name in chosen}
    for name, file in files.items():
        declared = _declared(held[name])
        if declared and declared != file.sha256:
            raise WorldloomError(
                "a downloaded file is not the one that the Hub declares",
                got=f"{folder / name}: sha256 {file.sha256[:12]}, declared {declared[:12]}",
                do="remove it and pull again",
            )
    pulled = Pulled(folder, repository, revision, str(info.sha), files)
    record = {"repository": repository, "revision": revision, "commit": pulled.commit}
    lines = {name: asdict(file) for name, file in files.items()}
    atomic_write(folder / LOCK, json.dumps(record | {"files": lines}, indent=1) + "\n")
    return pulled


def _default_folder(repository: str, revision: str) -> Path:
    return home() / "hub" / (f"{repository}@{revision.replace('/', '--')}" if revision else repository)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _check_inside(name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or path.name == LOCK:
        raise WorldloomError("the repository names a file outside its folder", got=name, do="do not trust it")


def _lock_file(path: Path) -> LockedFile:
    if not path.is_file() or path.is_symlink():
        raise WorldloomError("a file was not downloaded", got=path, do="pull again")
    return LockedFile(file_digest(path), path.stat().st_size)


def _declared(sibling: Any) -> str:
    """The sha256 that the Hub gives for a large file; empty for a small one."""
    lfs = getattr(sibling, "lfs", None)
    found = lfs.get("sha256") if isinstance(lfs, Mapping) else getattr(lfs, "sha256", None)
    return str(found or "")


# -- the lock --------------------------------------------------------------------------------------------------------


def _read_lock(folder: Path, repository: str, revision: str) -> Pulled | None:
    file = folder / LOCK
    if not file.is_file():
        if folder.is_dir() and any(folder.glob("*.safetensors")):
            raise WorldloomError(
                "the folder holds weights that were not pulled into it", got=folder, do="give another --out"
            )
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        files = {str(name): LockedFile(**line) for name, line in record["files"].items()}
        found = Pulled(folder, record["repository"], record["revision"], record["commit"], files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WorldloomError("the lock file cannot be read", got=file, do="pull with --update") from error
    if (found.repository, found.revision) != (repository, revision):
        raise WorldloomError(
            "the folder was pulled from elsewhere",
            got=f"{folder}: {found.repository} @ {found.revision or 'default branch'}",
            do="give another --out",
        )
    for name in files:
        _check_inside(name)
    return found


def _missing(lock: Pulled) -> list[str]:
    return [name for name in lock.files if not (lock.folder / name).is_file()]


def _verify(lock: Pulled, absent: Sequence[str] = ()) -> None:
    """Refuse files that are not those of the lock."""
    for name, file in lock.files.items():
        if name in absent:
            continue
        if (found := _lock_file(lock.folder / name)) != file:
            raise WorldloomError(
                "a file is not the one that was pulled before",
                got=f"{lock.folder / name}: sha256 {found.sha256[:12]}, locked {file.sha256[:12]}",
                do="remove it and pull again for the locked one; with --update what the repository holds now is taken",
            )


# -- the Hub ---------------------------------------------------------------------------------------------------------


def _client() -> Hub:
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise missing_extra("huggingface_hub", "hub") from error
    return HfApi(library_name="worldloom")


def _download(hub: Hub, repository: str, commit: str, names: Sequence[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with _translated(repository, commit):
        hub.snapshot_download(
            repository, revision=commit, allow_patterns=[glob.escape(name) for name in names], local_dir=str(folder)
        )


@contextmanager
def _translated(repository: str, revision: str) -> Iterator[None]:
    """Raise errors of huggingface_hub as ours."""
    try:
        yield
    except Exception as error:
        place = f"hf://{repository}" + (f"@{revision}" if revision else "")
        what, do = _explained(error)
        if not what:
            raise
        raise WorldloomError(what, got=place, do=do) from error


_UNREACHABLE = {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError", "TimeoutError", "TransportError"}


def _explained(error: Exception) -> tuple[str, str]:
    """What happened and what to do; empty for a bug. By name: its HTTP library differs from version to version."""
    names = {parent.__name__ for parent in type(error).__mro__}
    line = str(error).strip().partition("\n")[0][:200]
    if "GatedRepoError" in names:
        return (
            "the repository is gated: its licence has to be accepted first",
            "accept it on the repository's page, then log in with hf auth login",
        )
    if "RevisionNotFoundError" in names:
        return "the repository has no such revision", "give a branch, tag or commit of it"
    if "RepositoryNotFoundError" in names:
        return "there is no such repository, or it is private", "check the name; log in with hf auth login"
    if names & _UNREACHABLE:
        return "the Hub cannot be reached", "check the network; what was pulled before is used without it"
    if "HTTPError" in names:
        return f"the Hub refused: {line}", "try again later"
    if isinstance(error, OSError):
        return f"the files cannot be written: {line}", "check the disk's space and rights"
    return "", ""


def _nothing(url: str, held: Mapping[str, Any], include: Sequence[str]) -> WorldloomError:
    """The error for a repository without safetensors."""
    if include and any(name.endswith(".safetensors") for name in held):
        return WorldloomError("no safetensors file matches", got=f"{url}: {', '.join(include)}", do="widen --include")
    pickles = [name for name in held if name.endswith(PICKLED)]
    if pickles:
        return WorldloomError(
            "this revision holds pickled checkpoints only, which are not pulled: loading one can run any code",
            got=f"{url}: {', '.join(sorted(pickles)[:3])}",
            do="pull a revision with safetensors, as @diffusers/base/post-trained of Cosmos-Predict2.5, or download "
            "the file yourself and run worldloom models convert",
        )
    return WorldloomError("the repository holds no safetensors", got=url, do="give a repository of a model's weights")
