"""Experiment tracking and the model registry: MLflow on a local sqlite file, a remote server by URI, or nothing.

Offline by construction: the default store is ``<home>/mlflow.db`` with artifacts in ``<home>/mlruns``
(`artifacts.home`), and MLflow's usage telemetry is switched off. ``WORLDLOOM_TRACKING=off`` switches tracking off
everywhere.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from worldloom.artifacts import home
from worldloom.errors import WorldloomError

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Self

_BATCH = 100  # MLflow takes at most this many parameters in one request
_PARAM_LENGTH = 6000  # and at most this many characters in one value


@dataclass(frozen=True)
class RegisteredModel:
    """One version of a model in the registry."""

    name: str
    """Name in the registry."""
    version: str
    """Version number, counted from 1."""
    source: str
    """The checkpoint folder, or an artifact URI on a remote server."""
    run_id: str | None
    """The run that made it."""
    tags: Mapping[str, str]
    """Digests of data, tokenizer and base model, and what else was given."""


class Tracker(Protocol):
    """Where a run's parameters, metrics and files go. A context manager: leaving it closes the run."""

    @property
    def run_id(self) -> str | None:
        """Id of the open run; None before `start`, and always when tracking is off."""
        ...

    @property
    def uri(self) -> str | None:
        """Where it is written; None when tracking is off."""
        ...

    @property
    def ui_command(self) -> str | None:
        """The shell command that shows it in a browser, on this machine only."""
        ...

    def start(
        self, experiment: str, run_name: str, params: Mapping[str, Any] | None = None, *, run_id: str | None = None
    ) -> str | None:
        """Open a run and log its (nested) parameters; `run_id` continues an earlier run instead. Returns the id."""
        ...

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log metrics at a step."""
        ...

    def log_artifact(self, path: str | Path, name: str = "") -> None:
        """Copy a file, or a folder's content, into the run under the folder `name`."""
        ...

    def log_figure(self, frame: np.ndarray, name: str) -> None:
        """Log a uint8 picture ``(h, w, 3)`` as ``<name>.png``."""
        ...

    def register_model(
        self, path: str | Path, name: str, alias: str | None = None, tags: Mapping[str, Any] | None = None
    ) -> str | None:
        """Add a checkpoint folder to the model registry as a new version of `name`; returns the version."""
        ...

    def find_model(self, name: str, alias: str) -> RegisteredModel | None:
        """The version that an alias points to, if any."""
        ...

    def close(self, status: str = "FINISHED") -> None:
        """End the run: ``FINISHED``, ``FAILED`` or ``KILLED``. A second call does nothing."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None: ...


def tracker(enabled: bool = True, uri: str | None = None) -> Tracker:
    """The tracker to use.

    Args:
        enabled: False for none.
        uri: an MLflow tracking URI; None for ``$MLFLOW_TRACKING_URI``, else the local sqlite file.

    Without MLflow installed, says so in one line on stderr and tracks nothing.
    """
    if not enabled or os.environ.get("WORLDLOOM_TRACKING", "").lower() in ("off", "0", "false", "no"):
        return NullTracker()
    # MLflow reports its use to its makers unless told not to; it decides while it is imported.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        import mlflow  # noqa: F401
    except ImportError:
        print("tracking is off: MLflow is not installed (pip install 'worldloom[finetune]')", file=sys.stderr)
        return NullTracker()
    return MlflowTracker(uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}")


class NullTracker:
    """Tracks nothing."""

    run_id: str | None = None
    uri: str | None = None
    ui_command: str | None = None

    def start(
        self, experiment: str, run_name: str, params: Mapping[str, Any] | None = None, *, run_id: str | None = None
    ) -> str | None:
        return None

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None: ...
    def log_artifact(self, path: str | Path, name: str = "") -> None: ...
    def log_figure(self, frame: np.ndarray, name: str) -> None: ...

    def register_model(
        self, path: str | Path, name: str, alias: str | None = None, tags: Mapping[str, Any] | None = None
    ) -> str | None:
        return None

    def find_model(self, name: str, alias: str) -> RegisteredModel | None:
        return None

    def close(self, status: str = "FINISHED") -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None: ...


class MlflowTracker:
    """Tracks with MLflow's client, without touching MLflow's process-wide state.

    A failure to log (a server gone for a moment) costs one line on stderr, not the training; a failure to start a run
    or to register a model is an error.

    Raises:
        WorldloomError: the store at `uri` cannot be opened.
    """

    def __init__(self, uri: str) -> None:
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        # A new sqlite file is announced table by table; those two loggers only, and warnings still show.
        for chatty in ("mlflow.store.db.utils", "alembic"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        self._uri, self._run, self._warned = uri, None, set[str]()
        self._failures = (MlflowException, OSError)
        self._local = uri.startswith("sqlite:")
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).absolute().parent.mkdir(parents=True, exist_ok=True)
        try:
            self._client: Any = MlflowClient(tracking_uri=uri, registry_uri=uri)
            self._client.search_experiments(max_results=1)  # opens the store, so that a bad URI fails here
        except Exception as error:
            raise WorldloomError(
                f"the tracking store cannot be opened: {str(error).splitlines()[0]}",
                got=uri,
                do="mend the URI, or set WORLDLOOM_TRACKING=off",
            ) from error

    @property
    def run_id(self) -> str | None:
        return self._run

    @property
    def uri(self) -> str:
        return self._uri

    @property
    def ui_command(self) -> str:
        return f"mlflow ui --host 127.0.0.1 --backend-store-uri {self._uri}" if self._local else f"open {self._uri}"

    def start(
        self, experiment: str, run_name: str, params: Mapping[str, Any] | None = None, *, run_id: str | None = None
    ) -> str | None:
        if self._run is not None:
            raise WorldloomError("a run is already open", got=self._run, do="close it first")
        try:
            if run_id is not None:
                self._run = str(self._client.get_run(run_id).info.run_id)
                self._client.update_run(self._run, status="RUNNING")
            else:
                run = self._client.create_run(self._experiment(experiment), run_name=run_name)
                self._run = str(run.info.run_id)
            self._log_params(params or {})
        except self._failures as error:
            raise WorldloomError(
                f"the run cannot be opened: {error}", got=run_id or experiment, do="or set WORLDLOOM_TRACKING=off"
            ) from error
        return self._run

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        # A local store's artifacts go beside its database, wherever the process runs.
        folder = (
            Path(self._uri.removeprefix("sqlite:///")).absolute().parent / "mlruns" / re.sub(r"[^\w.-]+", "-", name)
        )
        return self._client.create_experiment(name, artifact_location=folder.as_uri() if self._local else None)

    def _log_params(self, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        assert self._run is not None
        known = self._client.get_run(self._run).data.params  # a continued run keeps its own: MLflow forbids changes
        rows = [Param(key, value[:_PARAM_LENGTH]) for key, value in _flat(params).items() if key not in known]
        for i in range(0, len(rows), _BATCH):
            self._client.log_batch(self._run, params=rows[i : i + _BATCH])

    def log(self, metrics: Mapping[str, float], step: int = 0) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        rows = [Metric(_word(key), float(value), now, int(step)) for key, value in metrics.items()]
        self._try("metrics", lambda run: self._client.log_batch(run, metrics=rows))

    def log_artifact(self, path: str | Path, name: str = "") -> None:
        path = Path(path)
        if not path.exists():
            raise WorldloomError("there is nothing at this path", got=path, do="give an existing file or folder")
        copy = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        self._try("artifacts", lambda run: copy(run, str(path), name or None))

    def log_figure(self, frame: np.ndarray, name: str) -> None:
        from worldloom.report import png

        folder, _, stem = name.rpartition("/")
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / f"{stem}.png"
            file.write_bytes(png(frame))
            self.log_artifact(file, folder)

    def _try(self, what: str, action: Any) -> None:
        if self._run is None:
            raise WorldloomError("no run is open", do="call start first")
        try:
            action(self._run)
        except self._failures as error:
            if what not in self._warned:
                self._warned.add(what)
                print(f"warning: some {what} could not be tracked: {error}", file=sys.stderr)

    def register_model(
        self, path: str | Path, name: str, alias: str | None = None, tags: Mapping[str, Any] | None = None
    ) -> str | None:
        path = Path(path).absolute()
        if not path.is_dir():
            raise WorldloomError("there is no checkpoint folder at this path", got=path, do="give the saved folder")
        try:
            if not self._client.search_registered_models(filter_string=f"name = '{name}'"):
                self._client.create_registered_model(name)
            source = str(path)
            if not self._local:  # a server cannot read our disk: send it the files
                if self._run is None:
                    raise WorldloomError("a remote registry takes models of a run only", do="call start first")
                self._client.log_artifacts(self._run, source, "checkpoint")
                source = f"{self._client.get_run(self._run).info.artifact_uri}/checkpoint"
            text = {key: str(value) for key, value in (tags or {}).items()}
            version = str(self._client.create_model_version(name, source, self._run, tags=text).version)
            if alias is not None:
                self._client.set_registered_model_alias(name, alias, version)
        except self._failures as error:
            raise WorldloomError(f"the model cannot be registered: {error}", got=f"{name} from {path}") from error
        return version

    def find_model(self, name: str, alias: str) -> RegisteredModel | None:
        from mlflow.exceptions import MlflowException

        try:
            found = self._client.get_model_version_by_alias(name, alias)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise WorldloomError(f"the model registry did not answer: {error}", got=f"{name}@{alias}") from error
        return RegisteredModel(name, str(found.version), found.source, found.run_id, dict(found.tags))

    def close(self, status: str = "FINISHED") -> None:
        if self._run is not None:
            self._try("run status", lambda run: self._client.set_terminated(run, status))
            self._run = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        stopped = kind is not None and issubclass(kind, (KeyboardInterrupt, SystemExit))
        self.close("FINISHED" if kind is None else "KILLED" if stopped else "FAILED")


def _word(key: str) -> str:
    """A name MLflow accepts."""
    return re.sub(r"[^\w./ :-]", "_", key)


def _flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested parameters under dotted names."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        name = _word(f"{prefix}{key}")
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{name}."))
        else:
            flat[name] = str(value)
    return flat
