"""Quality: drop spans whose pictures score badly, by a measure that needs no reference and, as a rule, no weights.

- ``compression``: Wang, Sheikh and Bovik (2002), "No-reference perceptual quality assessment of JPEG compressed
  images": how strong the borders of 8 x 8 blocks are, how much changes inside them, and how often the change turns.
  About 1 (bad) to 10 (good). It looks at the stream's own pixels, and so at its own grid of blocks; what was enlarged
  or cropped after a bad encoding has another grid, which it does not see.
- ``aesthetic``: a head on CLIP's picture vectors, as LAION's aesthetic predictor: about 0 to 10. Both files are the
  user's: `clip` a folder of transformers, `head` a safetensors file of linear layers.

A measure of one's own is a class that implements `Scores` and a line in `SCORERS`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from worldloom.artifacts import file_digest
from worldloom.errors import WorldloomError
from worldloom_curation.measures import PerFrame, within
from worldloom_curation.pictures import opencv
from worldloom_curation.stage import Observer, Source, Span, Verdict

if TYPE_CHECKING:
    from worldloom_curation.pictures import Frame
    from worldloom_curation.stage import Signals


@dataclass(frozen=True)
class QualityConfig:
    """How good the pictures are."""

    measure: str = "compression"
    """What scores a frame: compression, or aesthetic."""
    threshold: float = 3.0
    """Least score; a span with less is dropped."""
    reduce: Literal["mean", "min"] = "mean"
    """How the scores of a span's frames become one. cosmos-curate takes the least."""
    rate: float = 1.0
    """Frames a second that are scored."""
    clip: Path | None = None
    """aesthetic: the folder of a CLIP model."""
    head: Path | None = None
    """aesthetic: the safetensors file of the head."""

    def __post_init__(self) -> None:
        if self.measure not in SCORERS:
            raise WorldloomError("there is no such quality measure", got=self.measure, do=f"use {', '.join(SCORERS)}")
        if self.rate <= 0:
            raise WorldloomError("quality.rate must be positive", got=self.rate)
        if self.measure == "aesthetic" and (self.clip is None or self.head is None):
            raise WorldloomError(
                "the aesthetic score needs weights", do="set quality.clip and quality.head to their paths"
            )


class Scores(Protocol):
    """Scores a frame."""

    def score(self, frame: Frame) -> float:
        """A number, higher is better; nan where there is nothing to score."""
        ...


class Compression:
    """The measure of Wang, Sheikh and Bovik."""

    def __init__(self, config: QualityConfig) -> None:
        opencv()

    def score(self, frame: Frame) -> float:
        return compression(frame.grey())


def compression(grey: np.ndarray) -> float:
    """The paper's score of a uint8 ``(h, w)`` picture of at least 16 x 16; nan for a plain one."""
    if min(grey.shape) < 16 or grey.min() == grey.max():
        return float("nan")
    measured = np.mean([_blocks(grey), _blocks(grey.T)], axis=0)
    if not measured.all():  # nothing changes at the borders, inside or ever turns: drawings of even areas
        return float("nan")
    blockiness, activity, crossings = measured
    return float(-245.9 + 261.9 * blockiness**-0.0240 * activity**0.0160 * crossings**0.0064)


def _blocks(grey: np.ndarray) -> tuple[float, float, float]:
    """(blockiness, activity, zero crossings) along the rows."""
    width = grey.shape[1]
    change = np.diff(grey.astype(np.int16), axis=1)
    size = np.abs(change)
    borders = size[:, 7 : 8 * (width // 8) - 1 : 8]
    blockiness = float(borders.mean())
    activity = (8 * float(size.mean()) - blockiness) / 7
    crossings = float((np.sign(change[:, :-1]) * np.sign(change[:, 1:]) < 0).mean())
    return blockiness, activity, crossings


class Aesthetic:
    """A stack of linear layers on the unit vector that CLIP makes of a picture."""

    def __init__(self, config: QualityConfig) -> None:
        from worldloom.weights import read_weights
        from worldloom_curation.search import find_embedder

        assert config.clip is not None, "the config has checked it"
        assert config.head is not None, "the config has checked it"
        self._embedder = find_embedder(str(config.clip), "frames")
        weights = read_weights(config.head.parent, name=config.head.name)
        self._layers = [
            (weights[f"{name}.weight"].numpy(), weights[f"{name}.bias"].numpy()) for name in _layers(weights)
        ]
        widths = [self._layers[0][0].shape[1], *(weight.shape[0] for weight, _ in self._layers)]
        if widths[-1] != 1 or any(w.shape[1] != n for (w, _), n in zip(self._layers, widths, strict=False)):
            raise WorldloomError("the head's layers do not follow each other down to one number", got=config.head)

    def score(self, frame: Frame) -> float:
        vector = self._embedder.embed_frames(frame.rgb()[None])[0]
        if len(vector) != self._layers[0][0].shape[1]:
            raise WorldloomError(
                "the head is for vectors of another size",
                got=f"{self._layers[0][0].shape[1]}, and the model's have {len(vector)}",
                do="give the CLIP model that the head was trained on",
            )
        for weight, bias in self._layers:
            vector = weight @ vector + bias
        return float(vector[0])


def _layers(weights: Mapping[str, object]) -> list[str]:
    """The names of the linear layers, by the numbers in them."""
    names = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    if not names or {f"{name}.bias" for name in names} | {f"{name}.weight" for name in names} != set(weights):
        raise WorldloomError("the head holds something else than linear layers", got=sorted(weights)[:5])
    return sorted(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])


SCORERS: dict[str, Callable[[QualityConfig], Scores]] = {"compression": Compression, "aesthetic": Aesthetic}


@dataclass(frozen=True)
class _Known:
    """What the results depend on: the config, with the digest of the weights in the place of their paths."""

    measure: str
    threshold: float
    reduce: str
    rate: float
    weights: str


class QualityStage:
    """Keeps spans of good quality."""

    name = "quality"
    version = 1
    scope: Literal["source", "run"] = "source"
    measured_with = ("measure", "rate", "weights")
    Config = QualityConfig

    def __init__(self, config: QualityConfig) -> None:
        digest = _digest(config.clip, config.head)
        self.config = _Known(config.measure, config.threshold, config.reduce, config.rate, digest)
        self._given = config
        self._scorer: Scores | None = None

    def observer(self, source: Source, fps: float) -> Observer | None:
        # A model is loaded once for all the sources of a worker.
        self._scorer = self._scorer or SCORERS[self.config.measure](self._given)
        return PerFrame(self._scorer.score, max(1, round(fps / self.config.rate)))

    def decide(self, spans: Sequence[Span], signals: Mapping[str, Signals]) -> list[Verdict]:
        verdicts: list[Verdict] = []
        limit, measure = self.config.threshold, f"{self.config.measure} score"
        for span in spans:
            scores = within(signals[span.source.key], span).astype(np.float64)
            scores = scores[~np.isnan(scores)]
            if not len(scores):
                verdicts.append(Verdict(span, True, reason="its pictures are too plain to score"))
                continue
            value = float(scores.min() if self.config.reduce == "min" else scores.mean())
            noted = replace(span, notes={**span.notes, f"{self.config.measure}_score": round(value, 4)})
            reason = "good enough" if value >= limit else "not good enough"
            verdicts.append(Verdict(noted, value >= limit, measure, value, limit, reason))
        return verdicts


def _digest(*paths: Path | None) -> str:
    """Of the safetensors files at some paths; empty for none."""
    files = [
        file
        for path in paths
        if path is not None
        for file in ([path] if path.is_file() else sorted(path.glob("*.safetensors")))
    ]
    return hashlib.sha256("".join(file_digest(file) for file in files).encode()).hexdigest() if files else ""
