"""Pulling from the Hub: what is taken, that it stays what it was, and what is said when it cannot be had."""

from __future__ import annotations

import hashlib
import json
import types
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from worldloom import pull as module
from worldloom.cli import main
from worldloom.errors import WorldloomError
from worldloom.pull import LOCK, parse, pull

URL = "hf://loom/tiny"
FILES = {
    "transformer/config.json": b'{"a": 1}',
    "transformer/model.safetensors": b"weights",
    "vae/model.safetensors": b"others",
    "model_index.json": b"{}",
    "README.md": b"# card",
    "run_me.py": b"print('no')",
    "old.pt": b"pickle",
}


class LocalHub:
    """A repository in memory, with the two calls of `huggingface_hub.HfApi` that are used."""

    def __init__(self, files: dict[str, bytes], commit: str = "c0ffee") -> None:
        self.files, self.commit, self.calls = files, commit, 0
        self.declared: dict[str, str] = {}
        self.fails: Exception | None = None

    def model_info(self, repo_id: str, *, revision: str | None, files_metadata: bool) -> Any:
        self._called()
        assert repo_id == "loom/tiny"
        assert files_metadata
        siblings = []
        for name, data in self.files.items():
            digest = self.declared.get(name, hashlib.sha256(data).hexdigest())
            lfs = {"sha256": digest} if name.endswith(".safetensors") else None
            siblings.append(types.SimpleNamespace(rfilename=name, size=len(data), lfs=lfs))
        return types.SimpleNamespace(sha=self.commit, siblings=siblings)

    def snapshot_download(
        self, repo_id: str, *, revision: str | None, allow_patterns: list[str], local_dir: str
    ) -> str:
        self._called()
        assert revision == self.commit
        for name, data in self.files.items():
            if any(fnmatchcase(name, pattern) for pattern in allow_patterns):
                target = Path(local_dir, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
        return local_dir

    def _called(self) -> None:
        self.calls += 1
        if self.fails is not None:
            raise self.fails


@pytest.fixture
def hub() -> LocalHub:
    return LocalHub(dict(FILES))


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_safetensors_and_json_are_taken_and_locked(hub: LocalHub, tmp_path: Path) -> None:
    done = pull(URL, tmp_path, hub=hub)
    taken = {"transformer/config.json", "transformer/model.safetensors", "vae/model.safetensors", "model_index.json"}
    assert names(tmp_path) == taken | {LOCK}
    assert done.state == "downloaded"
    record = json.loads((tmp_path / LOCK).read_text())
    assert (record["repository"], record["revision"], record["commit"]) == ("loom/tiny", "", "c0ffee")
    assert record["files"]["vae/model.safetensors"] == {"sha256": hashlib.sha256(b"others").hexdigest(), "bytes": 6}
    assert set(record["files"]) == taken


def test_pulling_again_needs_no_network(hub: LocalHub, tmp_path: Path) -> None:
    first = pull(URL, tmp_path, hub=hub)
    hub.fails = ConnectionError("no network")
    again = pull(URL, tmp_path, hub=hub)
    assert (again.files, again.commit, again.state) == (first.files, first.commit, "there already")
    assert hub.calls == 2


def test_only_what_is_included_is_taken(hub: LocalHub, tmp_path: Path) -> None:
    pull(URL, tmp_path, include=["transformer/*"], hub=hub)
    assert names(tmp_path) == {"transformer/config.json", "transformer/model.safetensors", LOCK}
    with pytest.raises(WorldloomError, match="no safetensors file matches"):
        pull(URL, tmp_path / "other", include=["text/*"], hub=hub)


def test_a_changed_file_is_refused(hub: LocalHub, tmp_path: Path) -> None:
    pull(URL, tmp_path, hub=hub)
    (tmp_path / "transformer/model.safetensors").write_bytes(b"wEights")
    with pytest.raises(WorldloomError, match="not the one that was pulled before") as caught:
        pull(URL, tmp_path, hub=hub)
    assert "transformer/model.safetensors" in str(caught.value)
    (tmp_path / "transformer/model.safetensors").unlink()
    assert pull(URL, tmp_path, hub=hub).state == "completed"
    assert (tmp_path / "transformer/model.safetensors").read_bytes() == b"weights"


def test_a_repository_that_changed_under_its_commit_is_refused(hub: LocalHub, tmp_path: Path) -> None:
    pull(URL, tmp_path, hub=hub)
    (tmp_path / "vae/model.safetensors").unlink()
    hub.files["vae/model.safetensors"] = b"forged"
    with pytest.raises(WorldloomError, match="not the one that was pulled before"):
        pull(URL, tmp_path, hub=hub)
    with pytest.raises(WorldloomError, match="not the one that was pulled before"):
        pull(URL, tmp_path, hub=hub)


def test_a_moved_branch_is_followed_on_request_only(hub: LocalHub, tmp_path: Path) -> None:
    pull(URL, tmp_path, hub=hub)
    hub.commit, hub.files["transformer/model.safetensors"] = "decade", b"newer"
    assert pull(URL, tmp_path, hub=hub).commit == "c0ffee"
    assert (tmp_path / "transformer/model.safetensors").read_bytes() == b"weights"
    assert pull(URL, tmp_path, update=True, hub=hub).commit == "decade"
    assert (tmp_path / "transformer/model.safetensors").read_bytes() == b"newer"
    assert pull(URL, tmp_path, hub=hub).state == "there already"


def test_bytes_that_the_hub_does_not_declare_are_refused_and_not_locked(hub: LocalHub, tmp_path: Path) -> None:
    hub.declared["vae/model.safetensors"] = "0" * 64
    with pytest.raises(WorldloomError, match="not the one that the Hub declares"):
        pull(URL, tmp_path, hub=hub)
    assert not (tmp_path / LOCK).exists()


def test_a_repository_of_pickles_says_what_to_do(tmp_path: Path) -> None:
    hub = LocalHub({"base/model.pt": b"pickle", "config.json": b"{}"})
    with pytest.raises(WorldloomError, match="pickled checkpoints only") as caught:
        pull(URL, tmp_path / "x", hub=hub)
    assert "base/model.pt" in str(caught.value)
    assert "models convert" in str(caught.value)
    assert not (tmp_path / "x").exists()
    with pytest.raises(WorldloomError, match="holds no safetensors"):
        pull(URL, tmp_path / "x", hub=LocalHub({"config.json": b"{}"}))


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", LOCK])
def test_names_that_leave_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(WorldloomError, match="outside its folder"):
        pull(URL, tmp_path / "x", hub=LocalHub({name: b"1", "model.safetensors": b"2"}))
    assert not (tmp_path / "x").exists()


def hub_errors() -> list[tuple[Exception, str]]:
    errors = pytest.importorskip("huggingface_hub.errors")
    http = pytest.importorskip("httpx2")
    response = http.Response(403, request=http.Request("GET", "https://localhost"))
    return [
        (errors.GatedRepoError("gated", response=response), "gated"),
        (errors.RepositoryNotFoundError("none", response=response), "no such repository"),
        (errors.RevisionNotFoundError("none", response=response), "no such revision"),
        (errors.HfHubHTTPError("500 oh", response=response), "the Hub refused: 500 oh"),
        (errors.OfflineModeIsEnabled("offline"), "cannot be reached"),
        (errors.LocalEntryNotFoundError("offline"), "cannot be reached"),
        (http.ConnectError("refused"), "cannot be reached"),
        (http.ReadTimeout("slow"), "cannot be reached"),
        (OSError(28, "No space left on device"), "cannot be written.*No space left"),
    ]


def test_errors_of_the_hub_say_what_to_do(tmp_path: Path) -> None:
    for error, message in hub_errors():
        hub = LocalHub(dict(FILES))
        hub.fails = error
        with pytest.raises(WorldloomError, match=message) as caught:
            pull(f"{URL}@v1", tmp_path, hub=hub)
        assert "hf://loom/tiny@v1" in str(caught.value)
        assert caught.value.do
    hub.fails = ZeroDivisionError()  # a bug stays one
    with pytest.raises(ZeroDivisionError):
        pull(URL, tmp_path, hub=hub)


def test_urls_name_a_repository_and_a_revision() -> None:
    assert parse("hf://nvidia/Cosmos-Predict2.5-2B") == ("nvidia/Cosmos-Predict2.5-2B", "")
    assert parse("hf://nvidia/Cosmos-Predict2.5-2B@diffusers/base/post-trained") == (
        "nvidia/Cosmos-Predict2.5-2B",
        "diffusers/base/post-trained",
    )
    for wrong in ("nvidia/x", "hf://nvidia", "hf://a/b/c", "s3://a/b", "hf://../x", "hf://a/b@../c", "hf://a/b@"):
        with pytest.raises(WorldloomError, match="not the URL"):
            parse(wrong)


def test_a_folder_belongs_to_one_pull(hub: LocalHub, tmp_path: Path) -> None:
    pull(URL, tmp_path / "a", hub=hub)
    with pytest.raises(WorldloomError, match="pulled from elsewhere"):
        pull(f"{URL}@v2", tmp_path / "a", hub=hub)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.safetensors").write_bytes(b"1")
    with pytest.raises(WorldloomError, match="not pulled into it"):
        pull(URL, tmp_path / "b", hub=hub)
    (tmp_path / "a" / LOCK).write_text("{")
    with pytest.raises(WorldloomError, match="lock file cannot be read"):
        pull(URL, tmp_path / "a", hub=hub)


def test_the_command(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLDLOOM_HOME", str(tmp_path))
    monkeypatch.setattr(module, "_client", lambda: hub)
    done = CliRunner().invoke(main, ["models", "pull", f"{URL}@a/b"])
    assert done.exit_code == 0, done.output
    assert "loom/tiny at c0ffee: 4 files" in done.output
    assert str(tmp_path / "hub" / "loom" / "tiny@a--b") in done.output
    assert "there already" in CliRunner().invoke(main, ["models", "pull", f"{URL}@a/b"]).output
