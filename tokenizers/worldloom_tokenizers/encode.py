"""From a dataset of clips to a dataset of latents: what world models train on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldloom import media, shards
from worldloom.errors import WorldloomError
from worldloom.protocols import VideoTokenizer
from worldloom.schema import Clip, clip_id
from worldloom.streaming import stream
from worldloom_tokenizers.checkpoint import load_tokenizer
from worldloom_tokenizers.text import TextEncoder


@dataclass(frozen=True)
class EncodeSummary:
    """What became of a dataset's clips."""

    windows: int
    """Windows encoded; each is one sample."""
    clips: int
    """Clips that gave at least one."""
    short: int
    """Clips with fewer frames than a window, left out."""
    left_out: int
    """Frames of all clips that are in no window."""


def windows(frames: int, length: int, stride: int) -> Iterator[int]:
    """First frames of the windows of ``length`` that fit into ``frames``."""
    yield from range(0, frames - length + 1, stride)


def _covered(starts: list[int], length: int) -> int:
    """Frames in at least one window; ``starts`` ascend by one stride."""
    if not starts:
        return 0
    stride = starts[1] - starts[0] if len(starts) > 1 else length
    return length + (len(starts) - 1) * min(stride, length)


def indices(tokenizer: Any, latents: torch.Tensor) -> np.ndarray:
    """Latents ``(b, c, t, h, w)`` of a discrete tokenizer -> int32 codes ``(b, codebooks, t, h, w)``."""
    return tokenizer.to_indices(latents).to("cpu", torch.int32).numpy()


def recorded_name(name: str) -> str:
    """What latents record: a catalog name as it is, of a folder the whole path, so that it is found from anywhere."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def window_of(clip: Clip, start: int, length: int, size: tuple[int, int]) -> Clip:
    """Frames ``[start, start + length)`` of a clip as a clip of its own; the parent's id stays in its metadata."""
    first = clip.start + start * clip.step
    last = clip.end if start + length == clip.frames else first + length * clip.step
    return replace(
        clip,
        id=clip.id if (start, length) == (0, clip.frames) else clip_id(clip.source_digest, first, last),
        start=first,
        end=last,
        height=size[0],
        width=size[1],
        metadata={**clip.metadata, "parent": clip.id},
    )


class WindowEncoder:
    """Encodes clips window by window, and makes a sample of each window.

    Args:
        name: the tokenizer's name or folder, for the record (a folder's whole path, so that a model trained on the
            latents finds it from anywhere); its fingerprint is recorded with it.
        frames: length T of a window, 1 + temporal_ratio * k.
        stride: distance of windows; None for windows that do not overlap.
        size: (height, width) that clips are cropped and resized to, multiples of the tokenizer's spatial ratio; None
            for each clip's own, cropped to such multiples.
        batch_size: windows that are encoded at once.
        text: the captions' encoder as latents record it; None without one.

    Raises:
        WorldloomError: lengths or sizes that the tokenizer cannot take.
    """

    def __init__(
        self,
        tokenizer: VideoTokenizer,
        *,
        name: str = "tokenizer",
        frames: int = 33,
        stride: int | None = None,
        size: tuple[int, int] | None = (64, 64),
        batch_size: int = 4,
        text: Mapping[str, Any] | None = None,
    ) -> None:
        ratio, edge = tokenizer.temporal_ratio, tokenizer.spatial_ratio
        if frames < 1 + ratio or (frames - 1) % ratio:
            raise WorldloomError(
                f"a window has 1 + {ratio}k frames", got=frames, do=f"use {max(frames // ratio, 1) * ratio + 1}"
            )
        if size is not None and (size[0] % edge or size[1] % edge or min(size) < edge):
            raise WorldloomError(f"height and width must be multiples of {edge}", got=size)
        if min(stride or 1, batch_size) < 1:
            raise WorldloomError("stride and batch_size must be positive", got=(stride, batch_size))
        self.frames, self.stride = frames, stride or frames
        self.fingerprint = tokenizer.fingerprint
        self._tokenizer, self._size, self._batch_size = tokenizer, size, batch_size
        self._device = next(iter(getattr(tokenizer, "parameters", lambda: iter(()))()), torch.zeros(())).device
        self._discrete = int(getattr(tokenizer, "codebook_size", 0)) > 0
        self.config = {
            "frames": frames,
            "stride": self.stride,
            "size": None if size is None else list(size),
            "tokenizer": recorded_name(name),
            "fingerprint": self.fingerprint,
        }
        if text is not None:
            self.config["text_encoder"] = dict(text)

    @property
    def reference(self) -> dict[str, Any]:
        """The tokenizer as ``dataset.json`` records it."""
        facts = {"temporal_ratio": self._tokenizer.temporal_ratio, "spatial_ratio": self._tokenizer.spatial_ratio}
        return {"name": self.config["tokenizer"], "fingerprint": self.fingerprint, **facts}

    @torch.no_grad()
    def encode(self, clip: Clip, video: bytes) -> dict[str, np.ndarray]:
        """All n windows of a clip: ``starts`` int64 ``(n,)``, and if there are any ``latents`` float16
        ``(n, c, t, h, w)`` and, of a discrete tokenizer, ``codes`` int32 ``(n, codebooks, t, h, w)``."""
        pixels = media.read_frames(video, size=self._size_of(clip))
        starts = list(windows(len(pixels), self.frames, self.stride))
        latents, codes = [], []
        for chunk in range(0, len(starts), self._batch_size):
            batch = np.stack([pixels[s : s + self.frames] for s in starts[chunk : chunk + self._batch_size]])
            encoded = self._tokenizer.encode(media.to_tensor(batch).to(self._device))
            latents.append(encoded.to("cpu", torch.float16).numpy())
            if self._discrete:
                codes.append(indices(self._tokenizer, encoded))
        made = {"starts": np.array(starts, np.int64)}
        made |= {key: np.concatenate(parts) for key, parts in (("latents", latents), ("codes", codes)) if parts}
        return made

    def samples(self, sample: shards.ShardSample, made: Mapping[str, np.ndarray]) -> Iterator[shards.ShardSample]:
        """A sample for each window that `encode` made of a clip, with the part of its actions, and its text."""
        clip = sample.clip
        for row, start in enumerate(made["starts"].tolist()):
            arrays = {key: made[key][row] for key in ("latents", "codes") if key in made}
            if "text" in sample.arrays:
                arrays["text"] = sample.arrays["text"]
            for key in ("actions", "rewards"):
                if key in sample.arrays:
                    arrays[key] = sample.arrays[key][start : start + self.frames - 1]
            yield shards.ShardSample(window_of(clip, start, self.frames, self._size_of(clip)), None, arrays)

    def _size_of(self, clip: Clip) -> tuple[int, int]:
        if self._size is not None:
            return self._size
        edge = self._tokenizer.spatial_ratio
        size = clip.height // edge * edge, clip.width // edge * edge
        if not min(size):
            raise WorldloomError(
                f"the clip is too small for the tokenizer, whose latents have {edge} pixels on a side",
                got=f"{clip.width}x{clip.height}",
                do="name a size that clips are resized to",
            )
        return size


def latent_encoder(
    tokenizer: str, *, frames: int, stride: int | None, size: tuple[int, int] | None, device: str = "cpu"
) -> WindowEncoder:
    """A `WindowEncoder` of a tokenizer by name or from a folder; what the registry's ``encoders`` call ``latents``."""
    return WindowEncoder(load_tokenizer(tokenizer, device), name=tokenizer, frames=frames, stride=stride, size=size)


def encode_dataset(
    roots: str | Path | Sequence[str | Path],
    tokenizer: VideoTokenizer,
    out: str | Path,
    *,
    name: str = "tokenizer",
    frames: int = 33,
    stride: int | None = None,
    size: tuple[int, int] | None = (64, 64),
    batch_size: int = 4,
    text_encoder: TextEncoder | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EncodeSummary:
    """Encode every window of every clip; a dataset of kind ``latents`` is committed in ``out``.

    A discrete tokenizer's samples hold its codes too, ``codes``, int32 ``(codebooks, t, h, w)``. With a text encoder
    each sample holds its caption's vectors, ``text``, float16 ``(tokens, dim)``; they are the clip's own, where it has
    some of that encoder. Without one there are none.
    Done already (same clips, tokenizer, windows and size): nothing is computed again.

    Args:
        roots: a dataset of clips, or several to be encoded into one; where the sizes of their actions differ, their
            actions are left out.
        name, frames, stride, size, batch_size: of `WindowEncoder`.
        text_encoder: encodes the captions; None leaves them out.
        progress: called with (clips done, clips in all).

    Raises:
        WorldloomError: lengths or sizes that the tokenizer cannot take, a dataset without a long enough clip, a folder
            that holds a dataset which is not an encoding.
    """
    text = None
    if text_encoder is not None:
        text = {"name": text_encoder.name, "fingerprint": text_encoder.fingerprint, "tokens": text_encoder.tokens}
    encoder = WindowEncoder(
        tokenizer, name=name, frames=frames, stride=stride, size=size, batch_size=batch_size, text=text
    )
    roots = [roots] if isinstance(roots, (str, Path)) else list(roots)
    datasets = [shards.open_dataset(root) for root in roots]
    for root, dataset in zip(roots, datasets, strict=True):
        if dataset.index.kind != "clips":
            raise WorldloomError("this dataset holds latents already", got=str(root), do="give the dataset of clips")
        if not len(dataset):
            raise WorldloomError("the dataset is empty", got=str(root), do="give one with clips")
    source = " ".join(dataset.index.id for dataset in datasets)
    with_actions = len({dataset.index.action_dim for dataset in datasets}) == 1
    out = Path(out)
    done = _done(out, source, encoder.config)
    if done is not None:
        return done

    counts = {"windows": 0, "clips": 0, "short": 0, "left_out": 0}
    total = sum(map(len, datasets))
    with shards.ShardWriter(out, kind="latents") as writer:
        given = ((dataset, sample) for dataset in datasets for sample in stream(dataset.root))
        for done_clips, (dataset, sample) in enumerate(given, start=1):
            assert sample.video is not None
            made = encoder.encode(sample.clip, sample.video)
            if text_encoder is None:
                sample.arrays.pop("text", None)
            elif dataset.index.metadata.get("text_encoder") != text or "text" not in sample.arrays:
                words = text_encoder.encode([sample.clip.caption])[0]
                sample.arrays["text"] = words.to("cpu", torch.float16).numpy()
            if not with_actions:
                sample.arrays.pop("actions", None)
                sample.clip = replace(sample.clip, action_dim=0)
            for window in encoder.samples(sample, made):
                writer.write(window)
            starts = made["starts"].tolist()
            counts["windows"] += len(starts)
            counts["clips" if starts else "short"] += 1
            counts["left_out"] += sample.clip.frames - _covered(starts, frames)
            if progress is not None:
                progress(done_clips, total)
        if not counts["windows"]:
            raise WorldloomError(
                "no clip is long enough for a window",
                got=f"{counts['short']} clips, all under {frames} frames",
                do="set a shorter window (frames), or curate longer clips",
            )
        refs = writer.close()
    shards.commit_dataset(
        out,
        refs,
        kind="latents",
        tokenizer=encoder.reference,
        metadata={
            **_common([dataset.index.metadata for dataset in datasets]),
            "encode": encoder.config,
            "source": source,
            "counts": counts,
            "text_encoder": text,
        },
        inputs=[*source.split(), f"model:{encoder.config['tokenizer']}@{encoder.fingerprint}"],
        config=encoder.config,
    )
    return EncodeSummary(**counts)


def _common(facts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all agree on."""
    first, *others = facts
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}


def _done(out: Path, source: str, config: dict) -> EncodeSummary | None:
    """What an earlier run committed in ``out``, if it is exactly this one's result."""
    if not (out / "dataset.json").exists():
        return None
    try:
        index = json.loads((out / "dataset.json").read_text())
        metadata = index["metadata"]
        ours = index["kind"] == "latents" and "encode" in metadata
    except (OSError, ValueError, KeyError, TypeError):
        ours, metadata = False, {}
    if not ours:  # the clips themselves, perhaps
        raise WorldloomError(
            "the output folder holds another dataset", got=str(out), do="choose a folder of its own for the latents"
        )
    if metadata.get("source") == source and metadata["encode"] == config:
        try:
            if not shards.open_dataset(out).verify():
                return EncodeSummary(**metadata["counts"])
        except (WorldloomError, TypeError):
            pass  # a shard is gone, or an older version counted otherwise: encode again
    (out / "dataset.json").unlink()  # it names shards that are about to be replaced
    return None
