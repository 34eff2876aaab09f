"""Single videos to latents in a file, and latents back to videos.

A file of latents is ``<stem>.npy``, float16 ``(c, t, h, w)``, with ``<stem>.json`` beside it: the tokenizer's name and
fingerprint, the rate, and the digest of the video. Decoding with a tokenizer of another fingerprint is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldloom import media
from worldloom.artifacts import atomic_write, file_digest
from worldloom.errors import WorldloomError
from worldloom.protocols import VideoTokenizer
from worldloom.shards import open_dataset
from worldloom_tokenizers.checkpoint import load_tokenizer

_CHUNK = 8  # latent frames encoded or decoded at a time: memory does not grow with the length of a video
_FPS = 10.0


@torch.no_grad()
def encode_file(
    video: str | Path, tokenizer: VideoTokenizer, out: str | Path, *, name: str, size: tuple[int, int]
) -> tuple[Path, tuple[int, ...]]:
    """Encode the longest beginning of a video that has 1 + r k frames; returns the file and the latents' shape.

    Raises:
        WorldloomError: not a video, or a size that the tokenizer cannot take.
    """
    import io

    video, out = Path(video), Path(out)
    device = next(iter(getattr(tokenizer, "parameters", lambda: iter(()))()), torch.zeros(())).device
    frames = media.iter_frames(video, size=size)
    parts = [part[0].cpu() for part in tokenizer.stream_encode(_chunks(frames, tokenizer.temporal_ratio, device))]
    latents = torch.cat(parts, dim=1).to(torch.float16).numpy()  # (c, t, h, w)
    buffer = io.BytesIO()
    np.save(buffer, latents, allow_pickle=False)
    target = out / f"{video.stem}.npy"
    facts = {
        "tokenizer": {"name": name, "fingerprint": tokenizer.fingerprint},
        "fps": media.probe(video).fps,
        "source": {"path": str(video.absolute()), "sha256": file_digest(video)},
        "size": list(size),
        "frames": 1 + (latents.shape[1] - 1) * tokenizer.temporal_ratio,
    }
    atomic_write(target, buffer.getvalue())
    atomic_write(target.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")
    return target, latents.shape


def _chunks(frames: Any, ratio: int, device: Any) -> Any:
    """Tensors ``(1, 3, n, H, W)``: the first of 1 + r k frames, the others of r k; a remainder is left out."""
    held: list[np.ndarray] = []
    first = 1
    for frame in frames:
        held.append(frame)
        if len(held) == first + _CHUNK * ratio:
            yield media.to_tensor(np.stack(held)).to(device)
            held, first = [], 0
    whole = first + (len(held) - first) // ratio * ratio if len(held) >= first else 0
    if whole:
        yield media.to_tensor(np.stack(held[:whole])).to(device)


def decode_file(
    latents: str | Path, out: str | Path, *, name: str | None = None, fps: float | None = None, device: str = "cpu"
) -> Path:
    """Decode a .npy file of latents ``(c, t, h, w)`` to an MP4 of its name; returns that.

    Raises:
        WorldloomError: not an array of latents, no tokenizer named, or one of another fingerprint.
    """
    latents = Path(latents)
    facts = _facts(latents.with_suffix(".json"))
    recorded = facts.get("tokenizer") or {}
    tokenizer = _tokenizer(name, recorded, latents, device)
    try:
        array = np.load(latents, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise WorldloomError(f"not a file of latents: {error}", got=str(latents), do="give a .npy file") from error
    if not isinstance(array, np.ndarray) or array.ndim != 4 or array.dtype.kind != "f":
        raise WorldloomError("latents are floats (c, t, h, w)", got=f"{latents}: {getattr(array, 'shape', '')}")
    return _write(tokenizer, array, Path(out) / f"{latents.stem}.mp4", fps or facts.get("fps") or _FPS, device)


def decode_dataset(
    root: str | Path,
    out: str | Path,
    *,
    name: str | None = None,
    clips: int = 0,
    fps: float | None = None,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Decode samples of a dataset of latents to ``<clip id>.mp4``, spread evenly if not all; returns the files.

    Raises:
        WorldloomError: a dataset of clips, or a tokenizer of another fingerprint.
    """
    dataset = open_dataset(root)
    if dataset.index.kind != "latents":
        raise WorldloomError("this dataset holds clips, not latents", got=str(root), do="give an encoded dataset")
    tokenizer = _tokenizer(name, dataset.index.tokenizer or {}, Path(root), device)
    count = min(clips or len(dataset), len(dataset))
    written: list[Path] = []
    for done, number in enumerate(np.linspace(0, len(dataset) - 1, count).round(), start=1):
        sample = dataset.load(int(number))
        target = Path(out) / f"{sample.clip.id}.mp4"
        written.append(_write(tokenizer, sample.arrays["latents"], target, fps or sample.clip.fps, device))
        if progress is not None:
            progress(done, count)
    return written


@torch.no_grad()
def _write(tokenizer: VideoTokenizer, latents: np.ndarray, path: Path, fps: float, device: str) -> Path:
    whole = torch.from_numpy(np.ascontiguousarray(latents, np.float32))[None].to(device)
    if not torch.isfinite(whole).all():
        raise WorldloomError("the latents hold values that are not finite", got=str(path.stem))
    parts = (media.to_frames(part)[0] for part in tokenizer.stream_decode(whole.split(_CHUNK, dim=2)))
    media.write_video(path, (frame for part in parts for frame in part), fps)
    return path


def _facts(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _tokenizer(name: str | None, recorded: Any, where: Path, device: str) -> VideoTokenizer:
    chosen = name or recorded.get("name")
    if not chosen:
        raise WorldloomError("nothing says which tokenizer made these latents", got=str(where), do="give --tokenizer")
    tokenizer = load_tokenizer(chosen, device=device)
    if recorded.get("fingerprint") and recorded["fingerprint"] != tokenizer.fingerprint:
        raise WorldloomError(
            "the latents were made by another tokenizer",
            got=f"{chosen} has fingerprint {tokenizer.fingerprint[:12]}, the latents {recorded['fingerprint'][:12]}",
            do="give the tokenizer that encoded them",
        )
    return tokenizer
