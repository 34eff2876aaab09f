"""Training data: a batch is a pure function of (seed, step, rank, micro-batch), so that a run can resume anywhere.

Letters: n samples, c latent channels, t latent frames, T video frames, h w latent size, a action size.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from worldloom.errors import WorldloomError
from worldloom.schema import Clip, LatentBatch


@lru_cache(maxsize=4)
def order(samples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of epoch `epoch`: a permutation of ``range(samples)``, a pure function of its arguments."""
    return np.random.default_rng(np.random.SeedSequence([seed, epoch])).permutation(samples)


def rows(samples: int, seed: int, position: int, count: int) -> list[tuple[int, int]]:
    """``(epoch, sample)`` at places ``[position, position + count)`` of the endless stream of shuffled epochs."""
    places = (divmod(place, samples) for place in range(position, position + count))
    return [(epoch, int(order(samples, seed, epoch)[offset])) for epoch, offset in places]


@dataclass(frozen=True)
class Stream(Sampler[list[tuple[int, int]]]):
    """The batches that one rank takes, from optimizer step `start` to `stop`.

    Micro-batch m of step s on rank r takes ``batch`` consecutive places of the stream, beginning at
    ``((s * accumulate + m) * world + r) * batch``: no sample is skipped or repeated within an epoch, for any start.
    """

    samples: int
    seed: int
    batch: int
    start: int
    stop: int
    accumulate: int = 1
    rank: int = 0
    world: int = 1

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for micro in range(self.start * self.accumulate, self.stop * self.accumulate):
            yield rows(self.samples, self.seed, (micro * self.world + self.rank) * self.batch, self.batch)


def noise_seed(*parts: int) -> int:
    """A 63-bit seed from non-negative integers, e.g. (seed, step, rank, micro-batch)."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def held_out(clip: str, fraction: float) -> bool:
    """Whether the clip with this id belongs to validation; independent of every other clip."""
    return int.from_bytes(hashlib.sha256(clip.encode()).digest()[:8], "big") < fraction * 2**64


def split(groups: Sequence[str], fraction: float) -> tuple[list[int], list[int]]:
    """Indices (training, validation) of samples, by the id each belongs to.

    Where the hash leaves one side empty, that side gets the group nearest to it, if there are two groups at all.
    """
    if fraction <= 0 or len(set(groups)) < 2:
        return list(range(len(groups))), []
    chosen = {group for group in groups if held_out(group, fraction)}
    by_hash = sorted(set(groups), key=lambda group: hashlib.sha256(group.encode()).digest())
    if not chosen:
        chosen = {by_hash[0]}
    elif len(chosen) == len(by_hash):
        chosen.remove(by_hash[-1])
    train = [i for i, group in enumerate(groups) if group not in chosen]
    return train, [i for i, group in enumerate(groups) if group in chosen]


class Items(Protocol):
    """Samples addressed by (epoch, index); the epoch seeds whatever is random about a sample."""

    def __len__(self) -> int: ...
    def item(self, epoch: int, index: int) -> Any: ...
    def collate(self, items: Sequence[Any]) -> Any: ...


class _Addressed(Dataset[Any]):
    """`Items` as a torch dataset whose keys are (epoch, index)."""

    def __init__(self, items: Items) -> None:
        self.items = items

    def __getitem__(self, key: tuple[int, int]) -> Any:
        return self.items.item(*key)


class Packed:
    """A batch that Lightning moves between devices as a whole, instead of taking its dataclass to pieces."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def to(self, *args: Any, **kwargs: Any) -> Packed:
        """As ``Tensor.to``."""
        return Packed(self.content.to(*args, **kwargs))


@dataclass(frozen=True)
class _Collate:
    items: Items

    def __call__(self, chosen: Sequence[Any]) -> Packed:
        return Packed(self.items.collate(chosen))


def loader(items: Items, stream: Stream, workers: int) -> DataLoader[Any]:
    """A loader whose batch order does not depend on the number of workers."""
    return DataLoader(
        _Addressed(items),
        batch_sampler=stream,
        num_workers=workers,
        collate_fn=_Collate(items),
        multiprocessing_context="forkserver" if workers else None,
    )


def fixed_batches(items: Items, batch: int, count: int) -> list[Any]:
    """The first `count` batches in storage order, always the same: what a validation measures."""
    wanted = list(range(min(len(items), batch * count)))
    return [items.collate([items.item(0, i) for i in wanted[k : k + batch]]) for k in range(0, len(wanted), batch)]


# -- latents ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LatentItem:
    """One encoded clip, cut at its end."""

    latents: np.ndarray
    """float16 ``(c, t, h, w)``."""
    actions: np.ndarray | None
    """float32 ``(ratio * (t - 1), a)``: latent frame i >= 1 spans ``actions[ratio * (i - 1) : ratio * i]``."""
    clip: str
    text: np.ndarray | None = None
    """float16 ``(tokens, dim)``: vectors of the caption."""


class LatentItems:
    """Encoded clips of one split.

    A window always begins at latent frame 0: the tokenizer is causal and encodes the first frame alone, so a
    sequence that began later would be one that the tokenizer never makes.

    Args:
        read: gives sample i of the dataset.
        indices: the samples of this split.
        frames: latent frames to keep.
        ratio: video frames per latent frame.
        hold: keep samples in memory once read.
    """

    def __init__(
        self, read: Callable[[int], Any], indices: Sequence[int], frames: int, ratio: int, *, hold: bool
    ) -> None:
        self._read, self._indices, self._frames, self._ratio = read, list(indices), frames, ratio
        self._held: list[LatentItem] | None = None
        if hold:
            self._held = [self._cut(i) for i in self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def item(self, epoch: int, index: int) -> LatentItem:
        del epoch  # nothing about a sample is random
        return self._held[index] if self._held is not None else self._cut(self._indices[index])

    def _cut(self, index: int) -> LatentItem:
        sample = self._read(index)
        latents = np.ascontiguousarray(sample.arrays["latents"][:, : self._frames])
        actions = sample.arrays.get("actions")
        if actions is not None:
            actions = np.ascontiguousarray(actions[: self._ratio * (self._frames - 1)], dtype=np.float32)
        return LatentItem(latents, actions, sample.clip.id, sample.arrays.get("text"))

    def collate(self, items: Sequence[LatentItem]) -> LatentBatch:
        """Stack samples into a batch: latents and actions as float32."""
        latents = torch.from_numpy(np.stack([item.latents for item in items])).float()
        with_actions = [item.actions for item in items if item.actions is not None]
        actions = torch.from_numpy(np.stack(with_actions)) if len(with_actions) == len(items) else None
        with_text = [item.text for item in items if item.text is not None]
        text = torch.from_numpy(np.stack(with_text)).float() if len(with_text) == len(items) else None
        return LatentBatch(latents, actions, text, tuple(item.clip for item in items))


def window_length(frames: int, ratio: int, shortest: int, what: str) -> int:
    """Latent frames of a window of `frames` video frames (0: all of the shortest sample).

    Raises:
        WorldloomError: `frames` is not 1 + k * ratio, or longer than every sample.
    """
    if frames == 0:
        return shortest
    if frames < 1 or (frames - 1) % ratio:
        raise WorldloomError(
            f"data.frames must be 1 + {ratio} k for this tokenizer",
            got=frames,
            do=f"use {1 + (frames // ratio) * ratio}",
        )
    if 1 + (frames - 1) // ratio > shortest:
        raise WorldloomError(
            f"{what} is shorter than data.frames",
            got=f"{frames} frames asked for, {1 + (shortest - 1) * ratio} there",
            do="lower data.frames, or encode longer clips",
        )
    return 1 + (frames - 1) // ratio


# -- clips --------------------------------------------------------------------------------------------------------


class Joined:
    """Several datasets of clips read as one, in the given order."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)

    @property
    def ids(self) -> tuple[str, ...]:
        """The artifact ids of the parts."""
        return tuple(part.index.id for part in self.parts)

    @property
    def id(self) -> str:
        """The id of a single dataset, or one made from those of all."""
        if len(self.parts) == 1:
            return self.ids[0]
        return "joined-" + hashlib.sha256(" ".join(self.ids).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[Any]:
        for part in self.parts:
            yield from part

    def clips(self) -> Iterator[Clip]:
        """What the samples are, in reading order."""
        for part in self.parts:
            yield from part.clips()


def spread(total: int, count: int) -> list[int]:
    """At most `count` indices, evenly spread over ``range(total)``."""
    return [int(i) for i in np.linspace(0, total - 1, min(count, total)).round()] if total else []


class FrameBank:
    """All decoded frames of a clips dataset in one memory-mapped file, so that they are decoded once.

    The file is a cache: it is made again when the dataset or the size changes.

    Args:
        pixels: uint8, all clips one behind the other.
        shapes: (frames, height, width) of each clip.
        clips: what they are.
    """

    def __init__(self, pixels: np.ndarray, shapes: Sequence[tuple[int, int, int]], clips: Sequence[Clip]) -> None:
        self.pixels, self.shapes, self.clips = pixels, list(shapes), list(clips)
        self.starts = np.cumsum([0, *(t * h * w * 3 for t, h, w in self.shapes)]).tolist()

    def frames(self, clip: int) -> np.ndarray:
        """uint8 ``(t, h, w, 3)``, read only as it is looked at."""
        return self.pixels[self.starts[clip] : self.starts[clip + 1]].reshape(*self.shapes[clip], 3)

    @classmethod
    def open(
        cls, dataset: Any, size: tuple[int, int] | None, cache: Path, progress: Callable[[int, int], None]
    ) -> FrameBank:
        """Decode `dataset` (or reuse `cache`) with frames fitted to `size` (height, width)."""
        import json

        from worldloom import media
        from worldloom.artifacts import atomic_write

        key = f"{dataset.id}-{'x'.join(map(str, size)) if size else 'own'}"
        path, record = cache / f"{key}.u8", cache / f"{key}.json"
        if not (path.is_file() and record.is_file()):
            cache.mkdir(parents=True, exist_ok=True)
            shapes, temporary = [], cache / f".{key}.{os.getpid()}.part"  # every rank of torchrun may come here
            with open(temporary, "wb") as file:
                for i, sample in enumerate(dataset):
                    frames = media.read_frames(sample.video, size=size)
                    shapes.append(frames.shape[:3])
                    file.write(frames.tobytes())
                    progress(i + 1, len(dataset))
            temporary.replace(path)
            atomic_write(record, json.dumps(shapes))
        shapes = [tuple(shape) for shape in json.loads(record.read_text())]
        return cls(np.memmap(path, np.uint8, mode="r"), shapes, list(dataset.clips()))


class ClipItems:
    """Windows of `length` frames cut from clips; in each epoch a window is shifted by a random offset of its own.

    Args:
        bank: the frames.
        indices: clips of this split.
        length: frames of a window.
        seed: seeds the shifts and crops.
        jitter: shift windows (training), or leave them in place (validation).
        stride: frames between the starts of windows; 0 takes `length`.
        crop: (height, width) to cut from the frames, at a random place where there is jitter, else from the centre.

    Raises:
        WorldloomError: clips of different sizes without a crop, or a crop that is larger than a clip.
    """

    def __init__(
        self,
        bank: FrameBank,
        indices: Sequence[int],
        length: int,
        seed: int,
        *,
        jitter: bool,
        stride: int = 0,
        crop: tuple[int, int] | None = None,
    ) -> None:
        self._bank, self.length, self._seed, self._jitter, self._crop = bank, length, seed, jitter, crop
        sizes = {bank.shapes[clip][1:] for clip in indices}
        if crop is None and len(sizes) > 1:
            raise WorldloomError(
                "the clips have different sizes",
                got=" and ".join(map(str, sorted(sizes)[:2])),
                do="set data.size, e.g. --set data.size=[64,64], or data.crop",
            )
        if crop is not None and any(size[0] < crop[0] or size[1] < crop[1] for size in sizes):
            raise WorldloomError("data.crop is larger than a clip", got=f"{crop}, the smallest clip has {min(sizes)}")
        step = stride or length
        self.windows = [
            (clip, start) for clip in indices for start in range(0, bank.shapes[clip][0] - length + 1, step)
        ]

    def __len__(self) -> int:
        return len(self.windows)

    def item(self, epoch: int, index: int) -> np.ndarray:
        """uint8 ``(T, h, w, 3)``."""
        clip, start = self.windows[index]
        frames = self._bank.frames(clip)
        if self._jitter:
            shift = noise_seed(self._seed, 1, epoch, index) % self.length
            start = min(start + shift, len(frames) - self.length)
        window = frames[start : start + self.length]
        if self._crop is None:
            return np.asarray(window)
        room = [have - want for have, want in zip(window.shape[1:3], self._crop, strict=True)]
        if self._jitter:
            y, x = (noise_seed(self._seed, 2 + axis, epoch, index) % (free + 1) for axis, free in enumerate(room))
        else:
            y, x = (free // 2 for free in room)
        return np.asarray(window[:, y : y + self._crop[0], x : x + self._crop[1]])

    def collate(self, items: Sequence[np.ndarray]) -> torch.Tensor:
        """``(b, 3, T, h, w)`` float in [-1, 1]."""
        from worldloom import media

        return media.to_tensor(np.stack(items))
