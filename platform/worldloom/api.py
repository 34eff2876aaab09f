"""The routes of ``worldloom serve``. Kept apart from `serving`: it imports fastapi and pydantic at once."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import threading
from pathlib import Path
from typing import Annotated, Any

import fastapi
import pydantic
from fastapi.responses import FileResponse, JSONResponse

from worldloom import __version__
from worldloom.artifacts import atomic_write
from worldloom.errors import WorldloomError
from worldloom.schema import GenerationRequest
from worldloom.serving import Job, QueueFull, Worker

_RETRY_AFTER = "5"  # seconds
_Row = Annotated[list[float], pydantic.Field(max_length=256)]


class VideoRequest(pydantic.BaseModel):
    """Body of ``POST /v1/videos``. Image and video are base64, with or without a ``data:...;base64,`` prefix."""

    model_config = pydantic.ConfigDict(extra="forbid")

    model: str | None = pydantic.Field(None, description="One of /v1/models; may be left out where one is served.")
    prompt: str = pydantic.Field("", max_length=10_000, description="Text, for models that take it.")
    image: str | None = pydantic.Field(None, description="Start from this image.")
    video: str | None = pydantic.Field(None, description="Continue this video.")
    actions: list[_Row] | list[str] | None = pydantic.Field(
        None, max_length=8192, description="One row of numbers, or one action name, between two frames."
    )
    frames: int | None = pydantic.Field(None, ge=1, description="Length of the result, start included.")
    steps: int | None = pydantic.Field(None, ge=1, description="Sampler steps a frame.")
    seed: int = pydantic.Field(0, ge=0, lt=2**63 - 2**20, description="Equal seeds give equal bits.")
    guidance_scale: float | None = pydantic.Field(None, ge=0, le=100, description="1 is none.")
    fps: float | None = pydantic.Field(None, gt=0, le=240, description="Frames per second of the file.")


def add_routes(app: fastapi.FastAPI, worker: Worker) -> None:
    """Add the routes that the worker's models can serve."""
    config = worker.config
    creating = threading.Lock()  # so that one request cannot remove the upload that another relies on

    def job_of(video_id: str) -> Job:
        job = worker.get(video_id)
        if job is None:
            raise fastapi.HTTPException(404, "there is no such video; the server remembers the latest ones")
        return job

    @app.exception_handler(WorldloomError)
    def refuse(_: fastapi.Request, error: WorldloomError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 400)

    @app.get("/health")
    def health() -> dict[str, Any]:
        """Whether the server works, and how busy it is."""
        return {"status": "ok", "version": __version__, **worker.counts(), "queue": config.queue}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        """The models and what each can do."""
        return {"models": [_describe(name, model) for name, model in worker.models.items()]}

    @app.post("/v1/videos", status_code=202)
    def create(body: VideoRequest) -> dict[str, Any]:
        """Start a job."""
        if worker.full():  # before anything is decoded
            raise _full()
        name = body.model or (next(iter(worker.models)) if len(worker.models) == 1 else "")
        if name not in worker.models:
            raise WorldloomError("there is no such model here", got=name, do=f"use {', '.join(worker.models)}")
        if (body.frames or 0) > config.max_frames or (body.steps or 0) > config.max_steps:
            raise WorldloomError(
                f"this server makes at most {config.max_frames} frames in {config.max_steps} steps",
                got=f"frames {body.frames}, steps {body.steps}",
            )
        with creating, _Uploads(config.out / "inputs") as uploads:
            request = worker.models[name].complete(_request(body, name, uploads))
            if (request.frames or 0) > config.max_frames:
                raise WorldloomError(f"this server makes at most {config.max_frames} frames", got=request.frames)
            worker.guards.before(request.prompt)  # again when the job runs; here so that the answer says why
            job = Job(name, request)
            try:
                worker.submit(job)
            except QueueFull:
                raise _full() from None
        return worker.view(job)

    @app.get("/v1/videos/{video_id}")
    def state(video_id: str) -> dict[str, Any]:
        """How far a job is."""
        return worker.view(job_of(video_id))

    @app.get("/v1/videos/{video_id}/content")
    def content(video_id: str) -> FileResponse:
        """The video, MP4 (H.264)."""
        job = job_of(video_id)
        if job.sample is None:
            raise fastapi.HTTPException(409, f"the video is {job.status}")
        if not Path(job.sample.path).is_file():
            raise fastapi.HTTPException(410, "the file was removed")
        return FileResponse(job.sample.path, media_type="video/mp4", filename=Path(job.sample.path).name)

    @app.delete("/v1/videos/{video_id}")
    def cancel(video_id: str) -> dict[str, Any]:
        """Cancel a job: one that waits is taken out of the queue, one that runs stops at its next step."""
        job = job_of(video_id)
        if not worker.cancel(job):
            raise fastapi.HTTPException(409, f"the video is {job.status}")
        return worker.view(job)


def _full() -> fastapi.HTTPException:
    return fastapi.HTTPException(429, "the queue is full", headers={"Retry-After": _RETRY_AFTER})


def _describe(name: str, model: Any) -> dict[str, Any]:
    from worldloom.protocols import capabilities

    able = [name.lower() for name in capabilities(model)]
    facts = model.provenance()
    settings = facts.get("checkpoint") or {}
    return {
        "id": name,
        "capabilities": able,
        "sha256": (facts.get("model") or {}).get("digest"),
        "action_dim": getattr(model, "action_dim", 0),
        **{key: settings[key] for key in ("height", "width", "fps", "action_names") if key in settings},
    }


class _Uploads:
    """Files from request bodies, named by their digest for lineage; a refused request leaves none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._new: list[Path] = []

    def __enter__(self) -> _Uploads:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is not None:
            for path in self._new:
                path.unlink(missing_ok=True)

    def keep(self, data: bytes, suffix: str) -> str:
        """Write bytes; returns the path."""
        path = self._folder / f"{hashlib.sha256(data).hexdigest()}{suffix}"
        if not path.is_file():
            atomic_write(path, data)
            self._new.append(path)
        return str(path)

    def decode(self, text: str, suffix: str) -> str:
        """Write base64 text, or a ``data:`` URL of it; returns the path."""
        if text.startswith("data:"):
            text = text.partition(",")[2]
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise WorldloomError(f"not base64: {error}", do="encode the bytes of the file") from error
        return self.keep(data, suffix)


def _request(body: VideoRequest, model: str, uploads: _Uploads) -> GenerationRequest:
    image = uploads.decode(body.image, ".image") if body.image else None
    video = uploads.decode(body.video, ".video") if body.video else None
    actions = uploads.keep(json.dumps(body.actions).encode(), ".json") if body.actions is not None else None
    return GenerationRequest(
        model, body.prompt, image, video, actions, body.frames, body.seed, body.steps, body.guidance_scale, body.fps
    )
