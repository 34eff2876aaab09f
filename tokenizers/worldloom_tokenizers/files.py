"""Single videos to latents in a file, and latents back to videos.

A file of latents is ``<stem>.npy``, float16 ``(c, t, h, w)``; a discrete tokenizer writes its codes beside it,
``<stem>.codes.npy``, int32 ``(codebooks, t, h, w)``, and either can be decoded. ``<stem>.json`` holds the tokenizer's
name and fingerprint, the rate, the number of frames and the digest of the video. Decoding with a tokenizer of another
fingerprint is refused.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldloom import media
from worldloom.artifacts import atomic_write, file_digest
from worldloom.errors import WorldloomError
from worldloom.order import spread
from worldloom.protocols import VideoTokenizer
from worldloom.shards import open_dataset
from worldloom_tokenizers.checkpoint import load_tokenizer
from worldloom_tokenizers.encode import indices, recorded_name

_CHUNK = 8  # latent frames encoded or decoded at a time: memory does not grow with the length of a video
_FPS = 10.0


@dataclass(frozen=True)
class EncodedFile:
    """What became of a video."""

    path: Path
    """The latents."""
    shape: tuple[int, ...]
    """Theirs: ``(c, t, h, w)``."""
    frames: int
    """Frames of the video that they hold; decoding gives as many."""
    padded: int
    """Times that the last frame was repeated to fill its group."""
    left_out: int
    """Frames at the end that are not encoded, for they fill no group."""


@torch.no_grad()
def encode_file(
    video: str | Path,
    tokenizer: VideoTokenizer,
    out: str | Path,
    *,
    name: str,
    size: tuple[int, int],
    pad: bool = False,
) -> EncodedFile:
    """Encode a video, or its longest beginning of 1 + r k frames; frames are streamed, memory holds the latents alone.

    Args:
        name: the tokenizer's name or folder, for the record (a folder's whole path, so that decoding finds it).
        size: (height, width) that frames are cropped and resized to.
        pad: encode the remainder too, its last frame repeated; the true number of frames is recorded and decoded.

    Raises:
        WorldloomError: not a video, or a size that the tokenizer cannot take.
    """
    video, out = Path(video), Path(out)
    device = next(iter(getattr(tokenizer, "parameters", lambda: iter(()))()), torch.zeros(())).device
    chunks = _Chunks(media.iter_frames(video, size=size), tokenizer.temporal_ratio, device, pad)
    discrete = int(getattr(tokenizer, "codebook_size", 0)) > 0
    parts: list[np.ndarray] = []
    codes: list[np.ndarray] = []
    for part in tokenizer.stream_encode(chunks):
        parts.append(part[0].to("cpu", torch.float16).numpy())
        if discrete:
            codes.append(indices(tokenizer, part)[0])
    latents = np.concatenate(parts, axis=1)  # (c, t, h, w)
    target = out / f"{video.stem}.npy"
    done = EncodedFile(target, latents.shape, chunks.frames, chunks.padded, chunks.left_out)
    if discrete:
        _save(out / f"{video.stem}.codes.npy", np.concatenate(codes, axis=1))
    _save(target, latents)
    facts = {
        "tokenizer": {"name": recorded_name(name), "fingerprint": tokenizer.fingerprint},
        "fps": media.probe(video).fps,
        "source": {"path": str(video.absolute()), "sha256": file_digest(video)},
        "size": list(size),
        "frames": done.frames,
        "padded": done.padded,
        "left_out": done.left_out,
    }
    atomic_write(target.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")
    return done


def _save(path: Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    atomic_write(path, buffer.getvalue())


class _Chunks:
    """Frames as tensors ``(1, 3, n, H, W)``, the first of 1 + r k frames, the others of r k; counts what it does."""

    def __init__(self, frames: Iterable[np.ndarray], ratio: int, device: Any, pad: bool) -> None:
        self._source, self._ratio, self._device, self._pad = frames, ratio, device, pad
        self.frames = self.padded = self.left_out = 0

    def __iter__(self) -> Iterator[Tensor]:
        frames = iter(self._source)
        first = 1
        while held := list(itertools.islice(frames, first + _CHUNK * self._ratio)):
            over = (len(held) - first) % self._ratio
            if over and self._pad:
                self.padded = self._ratio - over
                held += [held[-1]] * self.padded
            elif over:
                self.left_out = over
                held = held[:-over]
            self.frames += len(held) - self.padded
            if held:
                yield media.to_tensor(np.stack(held)).to(self._device)
            first = 0


def decode_file(
    latents: str | Path, out: str | Path, *, name: str | None = None, fps: float | None = None, device: str = "cpu"
) -> Path:
    """Decode a .npy file of latents ``(c, t, h, w)`` or codes ``(codebooks, t, h, w)`` to an MP4; returns that.

    Frames are written as they are ready; there are as many as were encoded.

    Raises:
        WorldloomError: no such array, no tokenizer named, one of another fingerprint, or values that are not finite.
    """
    latents = Path(latents)
    try:
        array = np.lib.format.open_memmap(latents, mode="r")  # never a pickle, and no more in memory than is decoded
    except (ValueError, OSError, EOFError) as error:
        raise WorldloomError(f"not a file of latents: {error}", got=str(latents), do="give a .npy file") from error
    if array.ndim != 4 or array.dtype.kind not in "fi":
        raise WorldloomError(
            "latents are floats (c, t, h, w), codes are integers (codebooks, t, h, w)",
            got=f"{latents}: {array.dtype} {array.shape}",
        )
    stem = latents.stem.removesuffix(".codes") if array.dtype.kind == "i" else latents.stem
    facts = _facts(latents.with_name(f"{stem}.json"))
    tokenizer = _tokenizer(name, facts.get("tokenizer") or {}, latents, device)
    if array.dtype.kind == "i" and not getattr(tokenizer, "codebook_size", 0):
        raise WorldloomError(
            "these are codes, and the tokenizer is continuous", got=str(latents), do="give its latents"
        )
    frames = _true_length(facts, array.shape[1], tokenizer.temporal_ratio, latents)
    return _write(tokenizer, array, Path(out) / f"{stem}.mp4", fps or facts.get("fps") or _FPS, device, frames)


def _true_length(facts: dict[str, Any], t: int, ratio: int, where: Path) -> int | None:
    """Frames that ``t`` latent frames hold, without padding, as recorded; None where nothing is."""
    frames = facts.get("frames")
    if frames is None:
        return None
    most = 1 + (t - 1) * ratio
    if not isinstance(frames, int) or not most - ratio < frames <= most:
        raise WorldloomError(
            "the record beside the latents is not theirs",
            got=f"{where}: {most - ratio + 1} to {most} frames, recorded {frames}",
            do="encode the video again, or remove the .json and give --tokenizer",
        )
    return frames


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
    for done, number in enumerate(spread(len(dataset), count), start=1):
        sample = dataset.load(number)
        target = Path(out) / f"{sample.clip.id}.mp4"
        written.append(_write(tokenizer, sample.arrays["latents"], target, fps or sample.clip.fps, device))
        if progress is not None:
            progress(done, count)
    return written


@torch.no_grad()
def _write(
    tokenizer: VideoTokenizer, array: np.ndarray, path: Path, fps: float, device: str, frames: int | None = None
) -> Path:
    """Decode latents or codes chunk by chunk to a video, of which nothing remains if one of them cannot be."""
    parts = tokenizer.stream_decode(_latent_chunks(tokenizer, array, device, path.stem))
    images = (image for part in parts for image in media.to_frames(part)[0])
    media.write_video(path, itertools.islice(images, frames), fps)
    return path


def _latent_chunks(tokenizer: Any, array: np.ndarray, device: str, where: str) -> Iterator[Tensor]:
    """``(c | codebooks, t, h, w)``, in memory or on disk -> float32 latents ``(1, c, n, h, w)``."""
    for start in range(0, array.shape[1], _CHUNK):
        part = array[None, :, start : start + _CHUNK]
        if array.dtype.kind == "i":
            yield tokenizer.from_indices(torch.from_numpy(part.astype(np.int64)).to(device))
            continue
        latents = torch.from_numpy(part.astype(np.float32))
        if not torch.isfinite(latents).all():
            raise WorldloomError(
                "the latents hold values that are not finite",
                got=f"{where}, latent frames {start} to {start + part.shape[2] - 1}",
                do="make them again; NaN or infinity cannot be decoded",
            )
        yield latents.to(device)


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
