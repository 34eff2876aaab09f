"""Training data: what recipes train on, as items that `worldloom.loader` reads in the order of `worldloom.order`.

Letters: n samples, c latent channels, t latent frames, T video frames, h w latent size, a action size.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from worldloom.errors import WorldloomError
from worldloom.loader import Loader, Samples, collate_latents
from worldloom.order import Plan
from worldloom.schema import Clip, LatentBatch
from worldloom.shards import DatasetIndex, ShardSample, read_index
from worldloom.streaming import locate
from worldloom_finetune.config import DataConfig


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

    shapes: Sequence[Hashable] | None
    """A label of each item; a batch holds items of one label. None where all can be stacked."""
    parts: Sequence[int] | None
    """The number of the dataset that each item belongs to, in the order they were given in; None for one dataset."""

    def __len__(self) -> int: ...
    def item(self, epoch: int, index: int) -> Any: ...
    def collate(self, items: Sequence[Any]) -> Any: ...


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


def loader(
    items: Items, config: DataConfig, seed: int, *, rank: int = 0, world: int = 1, batches: int | None = None
) -> Loader:
    """The training batches of one rank, each a `Packed`; see `worldloom.loader.Loader`."""
    plan = Plan(
        len(items), config.batch_size, seed, shapes=items.shapes, parts=items.parts, weights=config.weights or None
    )
    return Loader(
        items.item,
        plan,
        _Collate(items),
        rank=rank,
        world=world,
        workers=config.num_workers,
        batches=batches,
    )


def fixed_batches(items: Items, batch: int, count: int) -> list[Any]:
    """The first `count` batches in storage order, always the same: what a validation measures.

    Each holds items of one shape; the last of a shape may be smaller.
    """
    chosen: list[list[int]] = []
    filling: dict[Hashable, list[int]] = {}
    for index in range(len(items)):
        shape = items.shapes[index] if items.shapes is not None else None
        if len(filling.get(shape, [])) in (0, batch):
            filling[shape] = []
            chosen.append(filling[shape])
        filling[shape].append(index)
        if len(chosen) > count:
            break
    return [items.collate([items.item(0, i) for i in indices]) for indices in chosen[:count]]


# -- latents ------------------------------------------------------------------------------------------------------


class LatentItems:
    """Encoded clips of one split, cut at their end.

    A window always begins at latent frame 0: the tokenizer is causal and encodes the first frame alone, so a
    sequence that began later would be one that the tokenizer never makes. Latent frame i >= 1 spans
    ``actions[ratio * (i - 1) : ratio * i]``.

    Args:
        read: gives sample i of the dataset.
        indices: the samples of this split.
        frames: latent frames to keep.
        ratio: video frames per latent frame.
        hold: keep samples in memory once read.
        shapes: ``(c, t, h, w, ...)`` of every sample of the dataset; None where they have one.
        parts: the dataset that each sample of the dataset comes from, by number.
    """

    def __init__(
        self,
        read: Callable[[int], ShardSample],
        indices: Sequence[int],
        frames: int,
        ratio: int,
        *,
        hold: bool,
        shapes: Sequence[tuple[int, ...]] | None = None,
        parts: Sequence[int] | None = None,
    ) -> None:
        self._read, self._indices, self._frames, self._ratio = read, list(indices), frames, ratio
        self.shapes = None if shapes is None else [shapes[i][2:4] for i in self._indices]
        self.parts = None if parts is None else [parts[i] for i in self._indices]
        self._held: list[ShardSample] | None = None
        if hold:
            self._held = [self._cut(i) for i in self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def item(self, epoch: int, index: int) -> ShardSample:
        del epoch  # nothing about a sample is random
        return self._held[index] if self._held is not None else self._cut(self._indices[index])

    def _cut(self, index: int) -> ShardSample:
        sample = self._read(index)
        arrays = {"latents": np.ascontiguousarray(sample.arrays["latents"][:, : self._frames])}
        if "actions" in sample.arrays:
            actions = sample.arrays["actions"][: self._ratio * (self._frames - 1)]
            arrays["actions"] = np.ascontiguousarray(actions, dtype=np.float32)
        if "text" in sample.arrays:
            arrays["text"] = sample.arrays["text"]
        return ShardSample(sample.clip, None, arrays)

    def collate(self, items: Sequence[ShardSample]) -> LatentBatch:
        """Stack samples into a batch: latents, actions and text as float32."""
        return collate_latents(items)


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


def kind_of(roots: Sequence[str]) -> str:
    """``clips`` or ``latents``: what all datasets (folders or URLs) hold.

    Raises:
        WorldloomError: a dataset that cannot be read, or datasets of both kinds.
    """
    kinds = {}
    for root in roots:
        fs, base = locate(root.rstrip("/"))
        kinds[root] = read_index(partial(fs.cat_file, f"{base}/dataset.json"), root).kind
    if len(set(kinds.values())) > 1:
        raise WorldloomError(
            "clips and latents cannot be trained on together", got=kinds, do="encode the clips first, or leave them out"
        )
    return next(iter(kinds.values()))


def open_latents(roots: Sequence[str], encoded: Path) -> tuple[Joined, list[int]]:
    """The latents to train on, and the number of the root that each sample comes from.

    Args:
        roots: datasets of latents, folders or URLs, or of clips,
        encoded: which were encoded into this one.
    """
    if kind_of(roots) == "latents":
        joined = Joined([Samples(root) for root in roots])
        return joined, joined.parts_of_samples()
    joined = Joined([Samples(encoded)])
    if len(roots) == 1:
        return joined, [0] * len(joined)
    origin = {clip.id: number for number, root in enumerate(roots) for clip in Samples(root).clips()}
    return joined, [origin.get(group, 0) for group in joined.groups()]


# -- several datasets ---------------------------------------------------------------------------------------------


class Joined:
    """Several datasets of one kind read as one, in the given order.

    Raises:
        WorldloomError: latents of different tokenizers, or actions of different sizes.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)
        self.index: DatasetIndex = self._join([part.index for part in self.parts])

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

    def load(self, number: int) -> ShardSample:
        """One sample, by its number in reading order."""
        for part in self.parts:
            if number < len(part):
                return part.load(number)
            number -= len(part)
        raise AssertionError("samples are numbered up to the length")

    def clips(self) -> Iterator[Clip]:
        """What the samples are, in reading order."""
        for part in self.parts:
            yield from part.clips()

    def groups(self) -> list[str]:
        """The recording that each sample is a window of; of parts that are `Samples`."""
        return [group for part in self.parts for group in part.groups()]

    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of each sample; of parts that are `Samples`."""
        return [shape for part in self.parts for shape in part.shapes()]

    def parts_of_samples(self) -> list[int]:
        """The number of the part that each sample belongs to."""
        return [number for number, part in enumerate(self.parts) for _ in range(len(part))]

    def _join(self, indices: Sequence[DatasetIndex]) -> DatasetIndex:
        first, *others = indices
        if not others:
            return first
        if first.kind == "latents":
            prints = sorted({str((index.tokenizer or {}).get("fingerprint"))[:12] for index in indices})
            sizes = sorted({index.action_dim for index in indices})
            if len(prints) > 1 or len(sizes) > 1:
                raise WorldloomError(
                    "latents that are trained on together must be of one tokenizer, with actions of one size",
                    got=f"tokenizers {', '.join(prints)}; actions of {', '.join(map(str, sizes))} numbers",
                    do="give the clips as --data: they are encoded together, and different actions left out",
                )

        def common(values: Sequence[Any]) -> Any:
            return values[0] if all(value == values[0] for value in values) else None

        return DatasetIndex(
            kind=first.kind,
            id=self.id,
            samples=sum(index.samples for index in indices),
            frames=sum(index.frames for index in indices),
            fps=common([index.fps for index in indices]),
            size=common([index.size for index in indices]),
            action_dim=common([index.action_dim for index in indices]) or 0,
            shards=tuple(ref for index in indices for ref in index.shards),
            tokenizer=first.tokenizer,
            metadata={
                key: value for key, value in first.metadata.items() if all(o.metadata.get(key) == value for o in others)
            },
        )


# -- clips --------------------------------------------------------------------------------------------------------


class FrameBank:
    """All decoded frames of a clips dataset in one memory-mapped file, so that they are decoded once.

    The file is a cache: it is made again when the dataset or the size changes.

    Args:
        pixels: uint8, all clips one behind the other.
        shapes: (frames, height, width) of each clip.
        clips: what they are.
        parts: the number of the dataset that each belongs to.
    """

    def __init__(
        self,
        pixels: np.ndarray,
        shapes: Sequence[tuple[int, int, int]],
        clips: Sequence[Clip],
        parts: Sequence[int],
    ) -> None:
        self.pixels, self.shapes, self.clips, self.parts = pixels, list(shapes), list(clips), list(parts)
        self.starts = np.cumsum([0, *(t * h * w * 3 for t, h, w in self.shapes)]).tolist()

    def frames(self, clip: int) -> np.ndarray:
        """uint8 ``(t, h, w, 3)``, read only as it is looked at."""
        return self.pixels[self.starts[clip] : self.starts[clip + 1]].reshape(*self.shapes[clip], 3)

    @classmethod
    def open(
        cls, dataset: Joined, size: tuple[int, int] | None, cache: Path, progress: Callable[[int, int], None]
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
        return cls(np.memmap(path, np.uint8, mode="r"), shapes, list(dataset.clips()), dataset.parts_of_samples())


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
        self.shapes = None  # all are cut to one
        self.parts = [bank.parts[clip] for clip, _ in self.windows]

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
