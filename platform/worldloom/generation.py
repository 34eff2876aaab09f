"""A generation request carried out and committed: the video, its sidecar, its record in the store.

``worldloom generate`` and ``worldloom serve`` both end here. In the output folder a sample is

    <model>-<12 hex>.mp4     the video, H.264, true size
    <model>-<12 hex>.gif     the same, for where videos do not play
    <model>-<12 hex>.png     a strip of its frames
    <model>-<12 hex>.json    the sidecar, written last: a sample that has one is whole

The 12 digits come from everything that decides the sample: request, bytes of the conditioning files, model,
tokenizer, sampler, code version, torch and device. An identical request finds the finished sample and computes nothing.
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
from worldloom.schema import GenerationRequest, Sample

if TYPE_CHECKING:
    from worldloom.protocols import Generates

_STRIP = 12  # frames of the strip, about
_FORMAT = 1


@dataclass(frozen=True)
class Outcome:
    """What became of a request."""

    sample: Sample
    """The committed sample."""
    reused: bool
    """True if it was there already."""
    seconds: float
    """Wall-clock time of the generation, without encoding the files; of the first run where it is reused."""


def make_sample(
    model: Generates,
    request: GenerationRequest,
    out: str | Path,
    *,
    store: Store | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Generate what `request` asks for into the folder `out` and record it as an artifact of kind "sample".

    Args:
        store: where the record goes; None for the default store.
        progress: called with (done, total) while it runs; an exception that it raises ends the work, and nothing of
            the sample is left on disk.

    Raises:
        WorldloomError: a request that the model cannot carry out.
    """
    out, store = Path(out), store or Store()
    request = model.complete(request)
    sources = {key: value for key in ("image", "video", "actions") if (value := getattr(request, key))}
    digests = {key: file_digest(value) for key, value in sources.items()}
    provenance = {**model.provenance(), "device": _device(model), "versions": _versions()}
    key = _key(request, digests, provenance)
    name = str((provenance.get("model") or {}).get("name") or "sample")
    stem = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', Path(name).name).strip('.-') or 'sample'}-{key[:12]}"
    inputs = (*_origins(store, provenance), *(f"file:{digests[k]}:{Path(v).absolute()}" for k, v in sources.items()))

    sidecar = _finished(out / f"{stem}.json", key)
    reused = sidecar is not None
    if sidecar is None:
        started = time.monotonic()
        frames = media.to_frames(model.generate(request, progress=progress))[0]
        seconds = time.monotonic() - started
        assert request.fps is not None
        out.mkdir(parents=True, exist_ok=True)
        media.write_video(out / f"{stem}.mp4", frames, request.fps)
        media.write_gif(out / f"{stem}.gif", frames, request.fps)
        strip = media.contact_sheet([frames], every=max(1, len(frames) // _STRIP))
        media.write_image(out / f"{stem}.png", strip)
        names = [f"{stem}.{kind}" for kind in ("mp4", "gif", "png")]
        sidecar = {
            "format": _FORMAT,
            "key": key,
            "video": names[0],
            "files": {item: file_digest(out / item) for item in names},
            "frames": len(frames),
            "size": list(frames.shape[1:3]),
            "fps": request.fps,
            "seed": request.seed,
            "request": dataclasses.asdict(request),
            **provenance,
            "inputs": list(inputs),
            "seconds": round(seconds, 3),
        }
    video = out / f"{stem}.mp4"
    settings = {**dataclasses.asdict(request), "sampler": provenance.get("sampler"), "device": provenance["device"]}
    # Stored again where it is reused: the same id, and it heals a store that was removed.
    artifact = store.put(
        video,
        kind="sample",
        name=stem,
        inputs=sidecar["inputs"],
        config={key: value for key, value in settings.items() if key not in ("image", "video", "actions")},
        seed=request.seed,
        metadata={"sidecar": f"{stem}.json", "frames": sidecar["frames"], "seconds": sidecar["seconds"]},
    )
    sample = Sample(artifact.id, str(video), str(out / f"{stem}.json"), request)
    if sidecar.get("id") != artifact.id:
        atomic_write(out / f"{stem}.json", json.dumps({"id": artifact.id, **sidecar}, indent=1) + "\n")
    return Outcome(sample, reused, float(sidecar["seconds"]))


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


def _key(request: GenerationRequest, digests: Mapping[str, str], provenance: Mapping[str, Any]) -> str:
    asked = {**dataclasses.asdict(request), **digests}
    asked.pop("model")  # the digest says which, whatever it is called
    decides = dict(provenance)
    for part, facts in provenance.items():
        if part in ("model", "tokenizer") and facts:
            decides[part] = facts.get("digest") or facts.get("fingerprint")
    text = json.dumps([_FORMAT, asked, decides], sort_keys=True, separators=(",", ":"))
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
    from worldloom.protocols import CAPABILITIES, Generates

    if isinstance(model, Generates):
        return model
    able = [capability.__name__ for capability in CAPABILITIES if isinstance(model, capability)]
    raise WorldloomError(
        "this model does not generate videos", got=name, do=f"it does this: {', '.join(able).lower() or 'nothing'}"
    )
