"""Embeddings: vectors of a few frames of every kept clip, stored with it, for search and for clustering.

The frames lie evenly over the clip, as `worldloom_curation.search` takes them: a dataset with vectors of the model that
is searched by is not embedded again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from worldloom.errors import WorldloomError
from worldloom_curation.search import FRAMES, find_embedder, spread
from worldloom_curation.stage import Observer, Source, Span, Verdict

if TYPE_CHECKING:
    from worldloom.protocols import Embedder
    from worldloom.schema import Clip
    from worldloom_curation.stage import Signals


@dataclass(frozen=True)
class EmbeddingsConfig:
    """Vectors of frames."""

    model: str = "efficientnet-lite0"
    """The embedder: a name of the registry, or a folder with a CLIP or SigLIP model."""
    frames: int = FRAMES
    """Frames of a clip, evenly spread."""

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise WorldloomError("embeddings.frames must be at least 1", got=self.frames)


@dataclass(frozen=True)
class _Known(EmbeddingsConfig):
    embedder: str = ""
    """Fingerprint of the embedder: part of the key of every result."""


class EmbeddingsStage:
    """Adds ``embedding``, float16 ``(frames, d)`` of length 1, to every clip; drops nothing.

    Raises:
        WorldloomError: the embedder is not installed, or takes no frames.
    """

    name = "embeddings"
    version = 1
    scope: Literal["source", "run"] = "source"
    measured_with = ()
    reads_caption = False
    Config = EmbeddingsConfig

    def __init__(self, config: EmbeddingsConfig) -> None:
        self._embedder: Embedder = find_embedder(config.model, "frames")
        self.config = _Known(**asdict(config), embedder=self._embedder.fingerprint)

    def observer(self, source: Source, fps: float) -> Observer | None:
        return None

    def decide(self, spans: Sequence[Span], signals: Mapping[str, Signals]) -> list[Verdict]:
        reason = f"vectors of {self.config.frames} frames go with it"
        return [Verdict(span, True, reason=reason) for span in spans]

    def add(self, clip: Clip, video: bytes) -> dict[str, np.ndarray]:
        _, frames = spread(video, self.config.frames)
        return {"embedding": self._embedder.embed_frames(frames).astype(np.float16)}

    def facts(self) -> dict[str, Any]:
        known = self.config
        return {"embedder": {"name": known.model, "fingerprint": known.embedder, "frames": known.frames}}
