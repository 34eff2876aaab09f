"""A generation request carried out and committed: the video, its sidecar, its record in the store.

``worldloom generate`` and ``worldloom serve`` both end here. In the output folder a sample is

    <model>-<12 hex>.mp4     the video, H.264, true size
    <model>-<12 hex>.gif     the same, for where videos do not play
    <model>-<12 hex>.png     a strip of its frames
    <model>-<12 hex>.json    the sidecar, written last: a sample that has one is whole

or, in a folder of its own (`worldloom.batch`), ``vision.mp4``, ``actions.json`` and ``sample_outputs.json``.

The 12 digits come from everything that decides the sample: request, bytes of the conditioning files, model,
tokenizer, sampler, guards, prompt upsampler, code version, torch and device. An identical request finds the finished
sample and computes nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worldloom import media
from worldloom.artifacts import Store, atomic_write, code_version, file_digest
from worldloom.errors import WorldloomError
from worldloom.guardrails import Finding, Guardrails
from worldloom.protocols import HasProvenance, capabilities
from worldloom.schema import GenerationRequest, Sample

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from worldloom.protocols import Generates, Upsamples

_STRIP = 12  # frames of the strip, about
_FORMAT = 2
_SHOWN = 16  # frames of a conditioning video that a prompt upsampler sees
_CONDITIONS = ("image", "video", "actions")


@dataclass(frozen=True)
class Outcome:
    """What became of a request."""

    sample: Sample
    """The committed sample."""
    reused: bool
    """True if it was there already."""
    seconds: float
    """Wall-clock time of the generation, without encoding the files; of the first run where it is reused."""
    findings: tuple[Mapping[str, Any], ...] = ()
    """What each guard made of it, as in the sidecar."""


@dataclass(frozen=True)
class Names:
    """What the files of a sample are called."""

    stem: str
    """The record's name in the store."""
    video: str
    """The video."""
    sidecar: str
    """The sidecar."""
    actions: str = "actions"
    """Actions that a model chose or found, as .npy and .json."""
    previews: bool = True
    """Whether a GIF and a strip of frames lie beside the video."""

    @classmethod
    def in_folder(cls, stem: str) -> Names:
        """The names of a sample that has a folder for itself; those of Cosmos 3."""
        return cls(stem, "vision.mp4", "sample_outputs.json", previews=False)


Describe = Callable[[GenerationRequest], Mapping[str, Any]]


def make_sample(
    model: Generates,
    request: GenerationRequest,
    out: str | Path,
    *,
    store: Store | None = None,
    progress: Callable[[int, int], None] | None = None,
    guardrails: Guardrails | None = None,
    upsampler: Upsamples | None = None,
    names: Names | None = None,
    describe: Describe | None = None,
) -> Outcome:
    """Generate what `request` asks for into the folder `out` and record it as an artifact of kind "sample".

    Args:
        store: where the record goes; None for the default store.
        progress: called with (done, total) while it runs; an exception that it raises ends the work, and nothing of
            the sample is left on disk.
        guardrails: None for those that are installed.
        upsampler: rewrites the prompt, where there is one; None leaves it as it is.
        names: of the files; None names them by model and key.
        describe: called with the completed request before the work starts, not where the sample is found finished;
            what it returns is written into the sidecar too.

    Raises:
        WorldloomError: a request that the model cannot carry out, or a prompt that could not be rewritten.
        Blocked: a guard refused the prompt or the video; nothing is left on disk.
    """
    request = model.complete(request)
    work = _Work(model, request, Path(out), store, guardrails or Guardrails(), upsampler, names)

    def make(findings: list[Finding]) -> dict[str, Any]:
        asked, rewritten = request, None
        findings += work.guards.before(request.prompt)
        if upsampler is not None and request.prompt:
            text = upsampler.upsample(request.prompt, _start(request))
            findings += work.guards.before(text)
            rewritten = {"original": request.prompt, "upsampled": text, **upsampler.identity()}
            asked = model.complete(dataclasses.replace(request, prompt=text))
        started = time.monotonic()
        frames = media.to_frames(model.generate(asked, progress=progress))[0]
        seconds = time.monotonic() - started
        checked, after = work.guards.after(frames)
        findings += after
        assert checked is not None
        return {"request": asked, "upsampling": rewritten, "frames": checked, "seconds": seconds}

    return work.run(make, describe)


def make_actions(
    model: Any,
    request: GenerationRequest,
    out: str | Path,
    *,
    horizon: int | None,
    store: Store | None = None,
    guardrails: Guardrails | None = None,
    names: Names | None = None,
    describe: Describe | None = None,
) -> Outcome:
    """Find the actions of a video (inverse dynamics), or choose ``horizon`` actions from a start (a policy).

    Args:
        model: implements `InfersActions`, or `Acts` where a horizon is given.
        request: ``video`` is what is looked at, or the start, which may be an ``image`` too; ``frames`` limits the
            frames of the video that are read, from its first.
        horizon: number of actions a policy chooses; None for inverse dynamics.

    Raises:
        WorldloomError: a model that does not do this, a missing start, or what the model itself refuses.
        Blocked: a guard refused the instruction or the foreseen video.
    """
    source = request.video or request.image
    if source is None or (horizon is None and request.video is None):
        wanted = "a video" if horizon is None else "a start: an image or a video"
        raise WorldloomError(f"{'inverse dynamics' if horizon is None else 'a policy'} needs {wanted}", got=source)
    task = "inverse_dynamics" if horizon is None else "policy"
    work = _Work(model, request, Path(out), store, guardrails or Guardrails(), None, names, (task, horizon))

    def make(findings: list[Finding]) -> dict[str, Any]:
        findings += work.guards.before(request.prompt)
        size = native_size(model)
        if request.image:
            image = media.read_image(request.image)[None]
            start = media.to_tensor(image if size is None else media.fit(image, size))
        else:
            start = media.to_tensor(media.read_frames(source, end=request.frames, size=size))
        started = time.monotonic()
        if horizon is None:
            actions, video = model.infer_actions(start, seed=request.seed), None
        else:
            actions, video = model.act(start, request.prompt, horizon, seed=request.seed)
        seconds = time.monotonic() - started
        frames, after = work.guards.after(None if video is None else media.to_frames(video)[0])
        findings += after
        rows = actions.detach().to("cpu").float().numpy()[0]
        return {"request": request, "frames": frames, "actions": rows, "seconds": seconds}

    return work.run(make, describe)


class _Work:
    """One sample on its way to disk: its key, its names, its inputs."""

    def __init__(
        self,
        model: Any,
        request: GenerationRequest,
        out: Path,
        store: Store | None,
        guards: Guardrails,
        upsampler: Upsamples | None,
        names: Names | None,
        task: tuple[str, int | None] | None = None,
    ) -> None:
        assert isinstance(model, HasProvenance), type(model)
        self.request, self.out, self.guards = request, out, guards
        self.store = store or Store()
        sources = {key: value for key in _CONDITIONS if (value := getattr(request, key))}
        sources |= {f"view {number}": path for number, path in enumerate(request.views)}
        digests = {key: _digest_of(value) for key, value in sources.items()}
        self.provenance = {**model.provenance(), "device": _device(model), "versions": _versions()}
        rewrites = dict(upsampler.identity()) if upsampler is not None and request.prompt else None
        self.key = _key(request, digests, self.provenance, [guards.identity(), rewrites, task])
        self.inputs = (
            *_origins(self.store, self.provenance),
            *(f"file:{digests[key]}:{Path(path).absolute()}" for key, path in sources.items()),
        )
        self.names = names or _named(self.provenance, self.key)

    def run(self, make: Callable[[list[Finding]], dict[str, Any]], describe: Describe | None) -> Outcome:
        """Find the sample finished, or make it and write it; then see that it is recorded."""
        path = self.out / self.names.sidecar
        sidecar = _finished(path, self.key)
        reused = sidecar is not None
        if sidecar is None:
            notes = {} if describe is None else dict(describe(self.request))
            # The sidecar goes first: without one, nothing of what is left here passes for a sample.
            path.unlink(missing_ok=True)
            findings: list[Finding] = []
            sidecar = self._write(make(findings), findings, notes)
        files = list(sidecar["files"])
        asked = dataclasses.replace(self.request, prompt=sidecar["request"]["prompt"])
        settings = {**dataclasses.asdict(asked), "sampler": self.provenance.get("sampler")}
        settings["device"] = self.provenance["device"]
        # Stored again where it is reused: the same id, and it heals a store that was removed.
        artifact = self.store.put(
            self.out / files[0],
            kind="sample",
            name=self.names.stem,
            inputs=sidecar["inputs"],
            config={key: value for key, value in settings.items() if key not in (*_CONDITIONS, "views")},
            seed=asked.seed,
            metadata={
                "sidecar": self.names.sidecar,
                "frames": sidecar.get("frames", 0),
                "seconds": sidecar["seconds"],
            },
        )
        if sidecar.get("id") != artifact.id:
            atomic_write(path, json.dumps({"id": artifact.id, **sidecar}, indent=1) + "\n")
        sample = Sample(artifact.id, str(self.out / files[0]), str(path), asked)
        return Outcome(sample, reused, float(sidecar["seconds"]), tuple(sidecar["guardrails"]["checks"]))

    def _write(self, made: dict[str, Any], findings: list[Finding], notes: Mapping[str, Any]) -> dict[str, Any]:
        """Write the files; gives the sidecar, which is the caller's to write."""
        frames: np.ndarray | None = made["frames"]
        actions: np.ndarray | None = made.get("actions")
        asked: GenerationRequest = made["request"]
        self.out.mkdir(parents=True, exist_ok=True)
        files: list[str] = []
        facts: dict[str, Any] = {}
        if frames is not None:
            fps = asked.fps or _fps(self.provenance)
            files += self._write_video(frames, fps)
            facts |= {"video": files[0], "frames": len(frames), "size": list(frames.shape[1:3]), "fps": fps}
        if actions is not None:
            files += self._write_actions(actions)
            facts |= {"actions": files[-1], "actions_shape": list(actions.shape)}
        upsampling = made.get("upsampling")
        if not self.names.previews:  # Cosmos 3's own account of a sample
            content = {} if actions is None else {"action": actions.tolist()}
            notes = {**notes, "outputs": [{"content": content, "files": files}]}
        return {
            "format": _FORMAT,
            "key": self.key,
            **facts,
            "files": {item: file_digest(self.out / item) for item in files},
            "seed": asked.seed,
            "request": dataclasses.asdict(asked),
            **({"upsampling": upsampling} if upsampling else {}),
            "guardrails": {"mode": self.guards.config.mode, "checks": [finding.view() for finding in findings]},
            **self.provenance,
            "inputs": list(self.inputs),
            "seconds": round(made["seconds"], 3),
            **notes,
        }

    def _write_video(self, frames: np.ndarray, fps: float) -> list[str]:
        video = self.names.video
        media.write_video(self.out / video, frames, fps)
        if not self.names.previews:
            return [video]
        gif, strip = str(Path(video).with_suffix(".gif")), str(Path(video).with_suffix(".png"))
        media.write_gif(self.out / gif, frames, fps)
        media.write_image(self.out / strip, media.contact_sheet([frames], every=max(1, len(frames) // _STRIP)))
        return [video, gif, strip]

    def _write_actions(self, actions: np.ndarray) -> list[str]:
        import io

        import numpy as np

        buffer = io.BytesIO()
        np.save(buffer, actions.astype(np.float32), allow_pickle=False)
        atomic_write(self.out / f"{self.names.actions}.npy", buffer.getvalue())
        atomic_write(self.out / f"{self.names.actions}.json", json.dumps(actions.tolist()) + "\n")
        return [f"{self.names.actions}.npy", f"{self.names.actions}.json"]


def native_size(model: Any) -> tuple[int, int] | None:
    """(height, width) that a model was trained at, in pixels; None where it does not say."""
    settings = model.provenance().get("checkpoint") or {} if isinstance(model, HasProvenance) else {}
    return (int(settings["height"]), int(settings["width"])) if {"height", "width"} <= set(settings) else None


def _fps(provenance: Mapping[str, Any]) -> float:
    return float((provenance.get("checkpoint") or {}).get("fps", 10.0))


def _start(request: GenerationRequest) -> Tensor | None:
    """What a video begins with, for an upsampler to look at: ``(1, 3, T, H, W)``."""
    if request.image:
        return media.to_tensor(media.read_image(request.image)[None])
    if request.video:
        return media.to_tensor(media.read_frames(request.video, end=_SHOWN))
    return None


def _digest_of(path: str) -> str:
    if not Path(path).is_file():
        raise WorldloomError("there is no such file", got=path, do="check the path")
    return file_digest(path)


def _named(provenance: Mapping[str, Any], key: str) -> Names:
    name = str((provenance.get("model") or {}).get("name") or "sample")
    stem = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', Path(name).name).strip('.-') or 'sample'}-{key[:12]}"
    return Names(stem, f"{stem}.mp4", f"{stem}.json", f"{stem}.actions")


def model_origin(store: Store, model: Mapping[str, Any]) -> str:
    """The input that stands for a model: the id of the artifact that holds its weights, else a leaf with its digest.

    Args:
        model: ``name`` and ``digest``, the sha256 (hex) of its weights' file.
    """
    digest = str(model["digest"])
    for kind in ("model", "adapter"):
        for artifact in reversed(store.find(kind)):
            if any(entry.sha256 == digest for entry in artifact.files.values()):
                return artifact.id
    return f"model:{model['name']}@{digest}"


def _origins(store: Store, provenance: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    if provenance.get("model"):
        found.append(model_origin(store, provenance["model"]))
    tokenizer = provenance.get("tokenizer")
    if tokenizer:
        found.append(f"model:{tokenizer['name']}@{tokenizer['fingerprint']}")
    return found


def _key(request: GenerationRequest, digests: Mapping[str, str], provenance: Mapping[str, Any], more: list[Any]) -> str:
    asked = {**dataclasses.asdict(request), **digests}
    asked.pop("model")  # the digest says which, whatever it is called
    asked.pop("views")  # their digests say it
    decides = dict(provenance)
    for part, facts in provenance.items():
        if part in ("model", "tokenizer") and facts:
            decides[part] = facts.get("digest") or facts.get("fingerprint")
    text = json.dumps([_FORMAT, asked, decides, *more], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _finished(path: Path, key: str) -> dict[str, Any] | None:
    """The sidecar of a whole sample that is this very one; None if it has to be made."""
    try:
        sidecar = json.loads(path.read_text(encoding="utf-8"))
        intact = sidecar["key"] == key and all(
            file_digest(path.parent / name) == digest for name, digest in sidecar["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return sidecar if intact else None


def _device(model: Any) -> str:
    return str(getattr(getattr(model, "device", None), "type", "cpu"))


def _versions() -> dict[str, str]:
    import platform

    import torch

    return {"worldloom": code_version(), "torch": torch.__version__, "python": platform.python_version()}


def require_generates(model: Any, name: str) -> Generates:
    """The model as something that makes videos.

    Raises:
        WorldloomError: it cannot; says what it can do.
    """
    if "Generates" in capabilities(model):
        return model
    raise WorldloomError("this model does not generate videos", got=name, do=f"it does this: {_abilities(model)}")


def require_acts(model: Any, name: str, mode: str) -> Any:
    """The model as something that gives actions, for mode ``inverse_dynamics`` or ``policy``.

    Raises:
        WorldloomError: it cannot; says what it can do.
    """
    wanted, words = ("InfersActions", "infer actions") if mode == "inverse_dynamics" else ("Acts", "choose actions")
    if wanted in capabilities(model) and isinstance(model, HasProvenance):
        return model
    raise WorldloomError(
        f"this model does not {words}", got=f"model_mode {mode} with {name}", do=f"it does this: {_abilities(model)}"
    )


def _abilities(model: Any) -> str:
    return ", ".join(capabilities(model)).lower() or "nothing"
