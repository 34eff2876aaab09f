"""``worldloom serve``: video generation over HTTP, as jobs.

One process, one worker thread, a bounded queue. A job's state lives in memory; its video, sidecar and record are
committed as `worldloom generate` commits them, so a restart loses the list of jobs and no video. Models come from the
registry, and only what a model implements is offered.

What a stranger may ask is bounded: size of a request, length of the queue, frames, steps, actions. With a token every
route asks for it. Without one the server binds loopback addresses only and answers requests for loopback hosts only,
which keeps web pages elsewhere (DNS rebinding) out.
"""

from __future__ import annotations

import hmac
import json
import socket
import threading
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import click

from worldloom.errors import WorldloomError, missing_extra
from worldloom.guardrails import Blocked, GuardrailConfig, Guardrails, Mode
from worldloom.schema import GenerationRequest, Sample

Status = Literal["queued", "running", "completed", "failed", "cancelled"]
_DONE = ("completed", "failed", "cancelled")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServerConfig:
    """Bounds of a server."""

    out: Path = Path("out/serve")
    """Folder of the videos."""
    token: str = ""
    """Asked for on every route, as ``Authorization: Bearer TOKEN``; empty for none."""
    queue: int = 16
    """Jobs that may wait; one more is refused with 429."""
    max_body: int = 32 * 2**20
    """Bytes of a request."""
    max_frames: int = 1025
    """Frames of a result."""
    max_steps: int = 200
    """Sampler steps."""
    keep: int = 1000
    """Finished jobs that are remembered; the videos stay."""
    guardrails: GuardrailConfig = field(default_factory=GuardrailConfig)
    """What every prompt and video is checked for."""


class Cancelled(Exception):
    """Raised inside a running job that was told to stop."""


@dataclass
class Job:
    """One request on its way."""

    model: str
    """Which of the served models."""
    request: GenerationRequest
    """What is asked for."""
    id: str = field(default_factory=lambda: f"video-{uuid.uuid4().hex}")
    """Name in the API."""
    status: Status = "queued"
    """Where it is."""
    done: int = 0
    """Units of work finished."""
    total: int = 0
    """Units of work in all; 0 until it runs."""
    error: str = ""
    """Why it failed."""
    created: float = field(default_factory=time.time)
    """Seconds since the epoch."""
    finished: float | None = None
    """Seconds since the epoch."""
    sample: Sample | None = None
    """The result."""
    findings: tuple[Mapping[str, Any], ...] = ()
    """What each guard made of it."""
    cancel: threading.Event = field(default_factory=threading.Event)
    """Set to make a running job stop at its next step."""

    def view(self) -> dict[str, Any]:
        """What the API tells about it."""
        progress = 1.0 if self.status == "completed" else self.done / self.total if self.total else 0.0
        return {
            "id": self.id,
            "model": self.model,
            "status": self.status,
            "progress": round(progress, 4),
            "error": self.error or None,
            "frames": self.request.frames,
            "fps": self.request.fps,
            "seed": self.request.seed,
            "created": round(self.created, 3),
            "finished": None if self.finished is None else round(self.finished, 3),
            "artifact": self.sample.id if self.sample else None,
            "content": f"/v1/videos/{self.id}/content" if self.sample else None,
            "guardrails": list(self.findings),
        }


class QueueFull(Exception):
    """There is no room for another job."""


class Worker:
    """Runs jobs one by one on a thread of its own. All of its state is guarded by one lock."""

    def __init__(self, models: Mapping[str, Any], config: ServerConfig) -> None:
        self.models, self.config = models, config
        self.guards = Guardrails(config.guardrails)
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._running: Job | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="worldloom-worker", daemon=True)

    def start(self) -> None:
        """Begin to take jobs."""
        self._thread.start()

    def stop(self) -> None:
        """Cancel what waits and runs, and wait for the thread; nothing is left half done."""
        with self._changed:
            self._stopping = True
            while self._waiting:
                self._end(self._waiting.popleft(), "cancelled")
            if self._running is not None:
                self._running.cancel.set()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, job: Job) -> None:
        """Put a job into the queue.

        Raises:
            QueueFull: as many wait as may.
        """
        with self._changed:
            if len(self._waiting) >= self.config.queue or self._stopping:
                raise QueueFull
            self._waiting.append(job)
            self._jobs[job.id] = job
            self._forget()
            self._changed.notify_all()

    def full(self) -> bool:
        """Whether the next `submit` would be refused."""
        with self._changed:
            return len(self._waiting) >= self.config.queue

    def get(self, job_id: str) -> Job | None:
        """A job that is remembered."""
        with self._changed:
            return self._jobs.get(job_id)

    def view(self, job: Job) -> dict[str, Any]:
        """A consistent look at a job, with its place in the queue."""
        with self._changed:
            ahead = self._waiting.index(job) if job in self._waiting else None
            return {**job.view(), "ahead": ahead}

    def counts(self) -> dict[str, int]:
        """How many jobs wait and run."""
        with self._changed:
            return {"queued": len(self._waiting), "running": int(self._running is not None)}

    def cancel(self, job: Job) -> bool:
        """Take a job out of the queue, or tell it to stop at its next step; False if it is over already."""
        with self._changed:
            if job.status in _DONE:
                return False
            job.cancel.set()
            if job.status == "queued":
                self._waiting.remove(job)
                self._end(job, "cancelled")
            return True

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    return
                job = self._running = self._waiting.popleft()
                job.status = "running"
            status, error = self._run(job)
            with self._changed:
                self._running = None
                self._end(job, status, error)

    def _run(self, job: Job) -> tuple[Status, str]:
        from worldloom.generation import make_sample

        def progress(done: int, total: int) -> None:
            job.done, job.total = done, total
            if job.cancel.is_set():
                raise Cancelled

        try:
            model, out = self.models[job.model], self.config.out
            outcome = make_sample(model, job.request, out, progress=progress, guardrails=self.guards)
            job.sample, job.findings = outcome.sample, outcome.findings
        except Cancelled:
            return "cancelled", ""
        except Blocked as error:
            job.findings = tuple(finding.view() for finding in error.findings)
            return "failed", str(error)
        except WorldloomError as error:
            return "failed", str(error)
        # Whatever goes wrong in one job, the next ones are served; the server's log has the traceback.
        except Exception as error:
            import traceback

            traceback.print_exc()
            return "failed", f"internal error: {type(error).__name__}"
        return "completed", ""

    def _end(self, job: Job, status: Status, error: str = "") -> None:
        job.status, job.error, job.finished = status, error, time.time()

    def _forget(self) -> None:
        over = [key for key, job in self._jobs.items() if job.status in _DONE]
        for key in over[: max(0, len(over) - self.config.keep)]:
            del self._jobs[key]


# -- the application -------------------------------------------------------------------------------------------------

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Gate:
    """ASGI middleware before everything else: token, host, size of the body."""

    def __init__(self, app: Any, config: ServerConfig) -> None:
        self.app, self.config = app, config

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {key.lower(): value for key, value in scope["headers"]}
        if scope["type"] != "http":
            return
        if self.config.token:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self.config.token.encode()):
                await _answer(send, 401, "a token is needed", {b"www-authenticate": b"Bearer"})
                return
        elif _host(headers.get(b"host", b"").decode("latin-1")) not in _LOOPBACK:
            await _answer(send, 403, "without a token this server answers to loopback host names only")
            return
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if scope["method"] == "POST" and kind != b"application/json":
            # Also what makes a browser ask first before another site's page may post here.
            await _answer(send, 415, "send application/json")
            return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.config.max_body:
            await _answer(send, 413, f"a request may have {self.config.max_body} bytes")
            return
        body = await self._body(receive)
        if body is None:
            await _answer(send, 413, f"a request may have {self.config.max_body} bytes")
            return
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    async def _body(self, receive: Receive) -> bytes | None:
        """The whole body, None if it is too large, whatever its headers said."""
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return b"".join(parts)
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.config.max_body:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)


def _host(header: str) -> str:
    return header.rpartition("]")[0].lstrip("[") if header.startswith("[") else header.partition(":")[0].lower()


async def _answer(send: Send, status: int, detail: str, extra: Mapping[bytes, bytes] | None = None) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = {b"content-type": b"application/json", b"content-length": str(len(body)).encode(), **(extra or {})}
    await send({"type": "http.response.start", "status": status, "headers": list(headers.items())})
    await send({"type": "http.response.body", "body": body})


def create_app(models: Mapping[str, Any], config: ServerConfig) -> Any:
    """The FastAPI application; the worker starts and stops with it.

    Args:
        models: name -> model that implements `worldloom.protocols.Generates`.
    """
    try:
        import fastapi
    except ImportError as error:
        raise missing_extra("fastapi", "serve") from error
    from contextlib import asynccontextmanager

    from worldloom import __version__
    from worldloom.api import add_routes
    from worldloom.generation import require_generates

    worker = Worker({name: require_generates(model, name) for name, model in models.items()}, config)

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            worker.stop()

    # No /docs page: it would load scripts from elsewhere. The schema stays.
    app = fastapi.FastAPI(
        title="Worldloom", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        openapi_url="/v1/openapi.json",
    )  # fmt: skip
    app.add_middleware(Gate, config=config)
    app.state.worker = worker
    add_routes(app, worker)
    return app


@click.command()
@click.argument("model", nargs=-1, required=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address; another one needs --token.")
@click.option("--port", default=8000, show_default=True, help="0 takes a free one.")
@click.option("--token", default="", envvar="WORLDLOOM_TOKEN", help="Asked for on every route.  [env: WORLDLOOM_TOKEN]")
@click.option("--queue", default=16, show_default=True, help="Jobs that may wait.")
@click.option(
    "--guardrails",
    type=click.Choice(["on", "off", "require"]),
    default="on",
    show_default=True,
    help="Checks before and after: those installed, none, or all or no start.",
)
@click.option("--blocklist", type=click.Path(exists=True, dir_okay=False), help="More words to refuse in a prompt.")
@click.option("--out", default="out/serve", show_default=True, type=click.Path(file_okay=False), help="Folder.")
@click.option("--device", default="cpu", show_default=True, help="Where the models run, e.g. cuda.")
def serve(
    model: tuple[str, ...],
    host: str,
    port: int,
    token: str,
    queue: int,
    guardrails: Mode,
    blocklist: str | None,
    out: str,
    device: str,
) -> None:
    """Serve MODEL (one or more: catalog names, checkpoint folders, artifact ids) over HTTP."""
    from worldloom.loading import load_model

    if host not in _LOOPBACK and not token:
        raise WorldloomError(
            "another address than loopback needs a token", got=host, do="set WORLDLOOM_TOKEN, or give --token"
        )
    if queue < 1:
        raise WorldloomError("the queue holds at least one job", got=queue)
    try:
        import uvicorn
    except ImportError as error:
        raise missing_extra("uvicorn", "serve") from error
    names = [Path(name).name for name in model]
    if len(set(names)) != len(names):
        raise WorldloomError("two models have the same name", got=", ".join(names), do="rename a folder")
    loaded = {name: load_model(path, device=device) for name, path in zip(names, model, strict=True)}
    guards = GuardrailConfig(guardrails, None if blocklist is None else Path(blocklist))
    app = create_app(loaded, ServerConfig(Path(out), token, queue, guardrails=guards))
    listener = _listen(host, port)
    address, taken = listener.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    # Flushed: who starts the server from a program waits for this line.
    click.echo(f"serving {', '.join(names)} at http://{shown}:{taken}  (videos in {out}; Ctrl-C stops)", err=True)
    settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, server_header=False)
    try:
        uvicorn.Server(settings).run(sockets=[listener])
    except KeyboardInterrupt:
        click.echo("stopped", err=True)


def _listen(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        raise WorldloomError(
            f"the server cannot listen there: {error}", got=f"{host}:{port}", do="choose another --port"
        ) from error
    return listener
