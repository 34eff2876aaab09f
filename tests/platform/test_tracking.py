from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from worldloom import WorldloomError
from worldloom.tracking import MlflowTracker, NullTracker, Tracker, tracker


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One real sqlite store for the module: making its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('tracking') / 'mlflow.db'}"


@pytest.fixture
def client(uri: str):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@pytest.fixture
def run(uri: str):
    with tracker(uri=uri) as opened:
        opened.start("tests", "a run", {"lr": 1e-3})
        yield opened


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def test_a_run_keeps_params_metrics_and_files(uri: str, client, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<html>")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.toml").write_text("x = 1")
    params = {"steps": 60, "optimizer": {"lr": 3e-4, "betas": [0.9, 0.95]}, "odd name!": "x" * 7000}
    params |= {f"many{i}": i for i in range(230)}
    with tracker(uri=uri) as run:
        run_id = run.start("fine-tune", "first", params)
        for step in range(3):
            run.log({"loss": 1.0 / (step + 1), "psnr (dB)": 20 + step}, step)
        run.log_artifact(tmp_path / "report.html", "reports")
        run.log_artifact(tmp_path / "folder")
        run.log_figure(np.zeros((8, 8, 3), np.uint8), "samples/step-2")
        assert client.get_run(run_id).info.status == "RUNNING"
    made = client.get_run(run_id)
    assert made.info.status == "FINISHED"
    assert made.info.run_name == "first"
    assert made.data.params["optimizer.lr"] == "0.0003"
    assert made.data.params["odd name_"] == "x" * 6000
    assert made.data.params["many229"] == "229"
    history = client.get_metric_history(run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert made.data.metrics["psnr _dB_"] == 22
    root = Path(made.info.artifact_uri.removeprefix("file://"))
    assert root.is_relative_to(Path(uri.removeprefix("sqlite:///")).parent / "mlruns")
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert files == {"reports/report.html", "config.toml", "samples/step-2.png"}


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_how_a_run_ended_is_recorded(uri: str, client, error: type[BaseException], status: str) -> None:
    def broken() -> None:
        with tracker(uri=uri) as run:
            ids.append(run.start("endings", "x"))
            raise error

    ids: list[str | None] = []
    with pytest.raises(error):
        broken()
    assert client.get_run(ids[0]).info.status == status


def test_a_run_is_continued(uri: str, client) -> None:
    first = tracker(uri=uri)
    run_id = first.start("resume", "x", {"steps": 10})
    first.log({"loss": 2.0}, 1)
    first.close("KILLED")
    with tracker(uri=uri) as second:
        # MLflow refuses to change a parameter; the first value stands, a new one is added.
        assert second.start("resume", "x", {"steps": 20, "extra": 1}, run_id=run_id) == run_id
        second.log({"loss": 1.0}, 2)
    made = client.get_run(run_id)
    assert (made.info.status, made.data.params) == ("FINISHED", {"steps": "10", "extra": "1"})
    assert [point.step for point in client.get_metric_history(run_id, "loss")] == [1, 2]


def test_the_model_registry(run: Tracker, client, checkpoint: Path) -> None:
    digests = {"data": "dataset-1", "tokenizer": "a" * 64, "steps": 60}
    assert run.register_model(checkpoint, "loom-test", "candidate", digests) == "1"
    assert run.register_model(checkpoint, "loom-test", "candidate", digests | {"steps": 90}) == "2"
    assert run.register_model(checkpoint, "loom-test") == "3"
    found = run.find_model("loom-test", "candidate")
    assert found is not None
    assert (found.version, found.run_id, found.source) == ("2", run.run_id, str(checkpoint))
    assert found.tags == {"data": "dataset-1", "tokenizer": "a" * 64, "steps": "90"}
    assert client.get_model_version_by_alias("loom-test", "candidate").version == 2
    assert run.find_model("loom-test", "champion") is None
    assert run.find_model("no-such-model", "champion") is None


def test_an_alias_moves(run: Tracker, checkpoint: Path) -> None:
    for expected in ("1", "2"):
        assert run.register_model(checkpoint, "loom-moving", "champion") == expected
        found = run.find_model("loom-moving", "champion")
        assert found is not None
        assert found.version == expected


def test_mistakes(run: Tracker, uri: str, tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(WorldloomError, match="already open"):
        run.start("tests", "another")
    with pytest.raises(WorldloomError, match="no checkpoint folder"):
        run.register_model(tmp_path / "absent", "x")
    with pytest.raises(WorldloomError, match="cannot be registered"):
        run.register_model(checkpoint, "loom-test-2", "not/an alias")
    with pytest.raises(WorldloomError, match="nothing at this path"):
        run.log_artifact(tmp_path / "absent")
    closed = tracker(uri=uri)
    with pytest.raises(WorldloomError, match="no run is open"):
        closed.log({"x": 1})
    with pytest.raises(WorldloomError, match="cannot be opened"):
        closed.start("tests", "x", run_id="0" * 32)
    closed.close()


def test_a_store_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is not a database, whatever its name says")
    with pytest.raises(WorldloomError, match="tracking store cannot be opened") as error:
        tracker(uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert "WORLDLOOM_TRACKING=off" in error.value.do


def test_a_failure_to_log_costs_a_line_and_not_the_training(run: Tracker, client, capsys) -> None:
    assert run.run_id is not None
    client.delete_run(run.run_id)  # as if somebody else had: MLflow then refuses to log
    for step in range(3):
        run.log({"loss": 1.0}, step)
    err = capsys.readouterr().err
    assert err.count("warning: some metrics could not be tracked") == 1
    client.restore_run(run.run_id)


def test_off_is_off(monkeypatch: pytest.MonkeyPatch, worldloom_home: Path, checkpoint: Path) -> None:
    monkeypatch.setenv("WORLDLOOM_TRACKING", "off")
    for nothing in (tracker(), tracker(enabled=False)):
        assert isinstance(nothing, NullTracker)
        with nothing as run:
            assert run.start("a", "b", {"c": 1}) is None
            run.log({"loss": 1})
            run.log_artifact(checkpoint)
            run.log_figure(np.zeros((4, 4, 3), np.uint8), "x")
            assert run.register_model(checkpoint, "x", "y") is None
            assert run.find_model("x", "y") is None
    assert not worldloom_home.exists()


def test_the_default_is_sqlite_in_the_home(monkeypatch: pytest.MonkeyPatch, worldloom_home: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = tracker()
    assert isinstance(run, MlflowTracker)
    assert run.uri == f"sqlite:///{worldloom_home / 'mlflow.db'}"
    assert run.ui_command == f"mlflow ui --host 127.0.0.1 --backend-store-uri {run.uri}"
    assert (worldloom_home / "mlflow.db").is_file()


QUIET = """
import os, sys
os.environ.pop("MLFLOW_DISABLE_TELEMETRY", None)
calls = []
sys.addaudithook(lambda name, arguments: calls.append(name) if name.startswith("socket.") and name in
                 ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.gethostbyname") else None)
from worldloom.tracking import tracker
with tracker() as run:
    run.start("quiet", "run", {"a": 1})
    run.log({"loss": 1.0}, 1)
    os.makedirs("checkpoint")
    open("checkpoint/model.safetensors", "wb").close()
    run.register_model("checkpoint", "quiet", "champion")
import threading, time
time.sleep(0.5)
print("calls", calls)
print("threads", [t.name for t in threading.enumerate() if "elemetry" in t.name])
print("files", sorted(os.listdir(".")))
"""


def test_a_new_store_says_nothing_and_reaches_nobody(tmp_path: Path) -> None:
    # Nothing that would switch telemetry off for another reason, such as CI.
    environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "OMP_NUM_THREADS") if name in os.environ}
    environment["HOME"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", QUIET], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stderr == ""
    assert done.stdout == "calls []\nthreads []\nfiles ['.worldloom', 'checkpoint']\n"


def test_without_mlflow_one_line_says_so(tmp_path: Path) -> None:
    (tmp_path / "mlflow.py").write_text("raise ImportError('not here')")
    code = "from worldloom.tracking import tracker; print(type(tracker()).__name__)"
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "NullTracker\n"
    assert done.stderr == "tracking is off: MLflow is not installed (pip install 'worldloom[finetune]')\n"
