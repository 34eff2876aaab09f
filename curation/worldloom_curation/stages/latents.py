"""Latents: every kept clip, as it is stored, encoded window by window into ``DIR/latents`` for the training of models.

It is what `worldloom tokenize encode DIR` gives; as a stage it is cached clip by clip, and a run with a few more videos
encodes those. The tokenizer is one of the registry's ``encoders``, for curation imports no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from worldloom.errors import WorldloomError
from worldloom_curation.stage import Observer, Source, Span, Verdict

if TYPE_CHECKING:
    from worldloom.schema import Clip
    from worldloom.shards import ShardSample
    from worldloom_curation.stage import Signals


@dataclass(frozen=True)
class LatentsConfig:
    """Which latents."""

    tokenizer: str = "loom-cv-nano"
    """A video tokenizer: a name of the registry, or a folder."""
    frames: int = 33
    """Frames of a window: 1, and a multiple of the tokenizer's temporal ratio."""
    stride: int = 0
    """Frames from one window to the next; 0 for windows that do not overlap."""
    size: tuple[int, int] = (0, 0)
    """(height, width) that clips are cropped and resized to; 0, 0 for their own, cut to what the tokenizer takes."""
    device: str = "cpu"
    """Where the tokenizer runs: cpu, or cuda."""

    def __post_init__(self) -> None:
        if self.stride < 0 or min(self.size) < 0 or (not all(self.size) and any(self.size)):
            raise WorldloomError("latents: stride and size are 0 or positive", got=(self.stride, self.size))


@dataclass(frozen=True)
class _Known(LatentsConfig):
    fingerprint: str = ""
    """Of the tokenizer: part of the key of every result."""


class LatentsStage:
    """Makes the dataset ``DIR/latents``; drops nothing. A clip shorter than a window is in none.

    Raises:
        WorldloomError: an unknown tokenizer, or a window or a size that it cannot take.
    """

    name = "latents"
    version = 1
    scope: Literal["source", "run"] = "source"
    measured_with = ()
    reads_caption = False
    Config = LatentsConfig

    def __init__(self, config: LatentsConfig) -> None:
        from worldloom import registry

        self._encoder: Any = registry.load("encoders", "latents")(
            config.tokenizer,
            frames=config.frames,
            stride=config.stride or None,
            size=config.size if all(config.size) else None,
            device=config.device,
        )
        self.config = _Known(**asdict(config), fingerprint=self._encoder.fingerprint)

    def observer(self, source: Source, fps: float) -> Observer | None:
        return None

    def decide(self, spans: Sequence[Span], signals: Mapping[str, Signals]) -> list[Verdict]:
        least = self.config.frames
        reasons = (f"shorter than a window of {least} frames: it gives no latents", "it is encoded")
        return [
            Verdict(span, True, "frames", float(span.frames), float(least), reasons[span.frames >= least])
            for span in spans
        ]

    def add(self, clip: Clip, video: bytes) -> dict[str, np.ndarray]:
        return self._encoder.encode(clip, video)

    def derive(self, sample: ShardSample, made: Mapping[str, np.ndarray]) -> Iterator[ShardSample]:
        return self._encoder.samples(sample, made)

    def facts(self) -> dict[str, Any]:
        return {"encode": self._encoder.config}

    @property
    def tokenizer(self) -> Mapping[str, Any]:
        return self._encoder.reference

    @property
    def inputs(self) -> Sequence[str]:
        return [f"model:{self.tokenizer['name']}@{self.config.fingerprint}"]
