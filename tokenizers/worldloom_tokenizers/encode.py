"""From a dataset of clips to a dataset of latents: what world models train on."""

from __future__ import annotations

import itertools
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


@torch.no_grad()
def encode_dataset(
    roots: str | Path | Sequence[str | Path],
    tokenizer: VideoTokenizer,
    out: str | Path,
    *,
    name: str = "tokenizer",
    frames: int = 33,
    stride: int | None = None,
    size: tuple[int, int] = (64, 64),
    batch_size: int = 4,
    text_encoder: TextEncoder | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EncodeSummary:
    """Encode every window of every clip; a dataset of kind ``latents`` is committed in ``out``.

    A discrete tokenizer's samples hold its codes too, ``codes``, int32 ``(codebooks, t, h, w)``. With a text encoder
    each sample holds its caption's vectors, ``text``, float16 ``(tokens, dim)``.
    Done already (same clips, tokenizer, windows and size): nothing is computed again.

    Args:
        roots: a dataset of clips, or several to be encoded into one; where the sizes of their actions differ, their
            actions are left out.
        name: the tokenizer's name or folder, for the record (a folder's whole path, so that a model trained on the
            latents finds it from anywhere); its fingerprint is recorded with it.
        frames: length T of a window, 1 + temporal_ratio * k.
        stride: distance of windows; None for windows that do not overlap.
        size: (height, width) that clips are cropped and resized to, multiples of the tokenizer's spatial ratio.
        text_encoder: encodes the captions; None leaves them out.
        progress: called with (clips done, clips in all).

    Raises:
        WorldloomError: lengths or sizes that the tokenizer cannot take, a dataset without a long enough clip, a folder
            that holds a dataset which is not an encoding.
    """
    ratio, edge = tokenizer.temporal_ratio, tokenizer.spatial_ratio
    if frames < 1 + ratio or (frames - 1) % ratio:
        raise WorldloomError(
            f"a window has 1 + {ratio}k frames", got=frames, do=f"use {max(frames // ratio, 1) * ratio + 1}"
        )
    if size[0] % edge or size[1] % edge:
        raise WorldloomError(f"height and width must be multiples of {edge}", got=size)
    if min(stride or 1, batch_size) < 1:
        raise WorldloomError("stride and batch_size must be positive", got=(stride, batch_size))
    stride = stride or frames
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
    fingerprint = tokenizer.fingerprint
    name = recorded_name(name)
    config = {"frames": frames, "stride": stride, "size": list(size), "tokenizer": name, "fingerprint": fingerprint}
    text = None
    if text_encoder is not None:
        text = {"name": text_encoder.name, "fingerprint": text_encoder.fingerprint, "tokens": text_encoder.tokens}
        config["text_encoder"] = text
    done = _done(out, source, config)
    if done is not None:
        return done

    device = next(iter(getattr(tokenizer, "parameters", lambda: iter(()))()), torch.zeros(())).device
    discrete = int(getattr(tokenizer, "codebook_size", 0)) > 0
    counts = {"windows": 0, "clips": 0, "short": 0, "left_out": 0}
    with shards.ShardWriter(out, kind="latents") as writer:
        samples = itertools.chain.from_iterable(stream(root) for root in roots)
        for done_clips, sample in enumerate(samples, start=1):
            assert sample.video is not None
            pixels = media.read_frames(sample.video, size=size)
            starts = list(windows(len(pixels), frames, stride))
            counts["clips" if starts else "short"] += 1
            words = text_encoder.encode([sample.clip.caption])[0] if text_encoder is not None else None
            counts["left_out"] += len(pixels) - _covered(starts, frames)
            for chunk in range(0, len(starts), batch_size):
                batch = starts[chunk : chunk + batch_size]
                video = media.to_tensor(np.stack([pixels[s : s + frames] for s in batch])).to(device)
                encoded = tokenizer.encode(video)
                latents = encoded.to("cpu", torch.float16).numpy()
                codes = indices(tokenizer, encoded) if discrete else None
                for row, start in enumerate(batch):
                    arrays = {"latents": latents[row]}
                    if codes is not None:
                        arrays["codes"] = codes[row]
                    if words is not None:
                        arrays["text"] = words.to("cpu", torch.float16).numpy()
                    for key in ("actions", "rewards"):
                        if key in sample.arrays and (with_actions or key != "actions"):
                            arrays[key] = sample.arrays[key][start : start + frames - 1]
                    clip = window_of(sample.clip, start, frames, size)
                    if not with_actions:
                        clip = replace(clip, action_dim=0)
                    writer.write(shards.ShardSample(clip, None, arrays))
                    counts["windows"] += 1
            if progress is not None:
                progress(done_clips, sum(map(len, datasets)))
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
        tokenizer={"name": name, "fingerprint": fingerprint, "temporal_ratio": ratio, "spatial_ratio": edge},
        metadata={
            **_common([dataset.index.metadata for dataset in datasets]),
            "encode": config,
            "source": source,
            "counts": counts,
            "text_encoder": text,
        },
        inputs=[*source.split(), f"model:{name}@{fingerprint}"],
        config=config,
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
