"""Semantic duplicates: of spans that show the same thing, keep one, though no pixel need be equal.

As SemDeDup does (Abbas et al. 2023, arXiv:2303.09540), and cosmos-curate: every span becomes a unit vector, the mean of
an embedder's vectors of its frames; k-means puts like vectors together; inside a cluster the spans are taken from the
one farthest from its centre to the nearest, and one is dropped if an earlier one has a cosine of at least 1 - `eps`.

Vectors lie in a temporary file and are read in blocks, so that memory holds one cluster and the centres at a time, and
k-means starts from spans spread evenly over the run, so that equal input gives equal clusters.

Letters: n spans, d numbers of a vector, k clusters.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from worldloom.errors import WorldloomError
from worldloom_curation.measures import PerFrame, within
from worldloom_curation.stage import Observer, Source, Span, Verdict

if TYPE_CHECKING:
    from worldloom.protocols import Embedder
    from worldloom_curation.pictures import Frame
    from worldloom_curation.stage import Signals

_BLOCK = 4096  # vectors in memory at once
_EDGE = 256  # short side of the frames that an embedder is given


@dataclass(frozen=True)
class SemanticDuplicatesConfig:
    """Spans that show the same thing."""

    eps: float = 0.01
    """A span is dropped at a cosine of at least 1 - this to one that is kept or was dropped before it."""
    model: str = "efficientnet-lite0"
    """The embedder: a name of the registry, or a folder with a CLIP or SigLIP model."""
    rate: float = 1.0
    """Frames a second that are embedded."""
    cluster: int = 1000
    """Spans in a cluster, about: the work grows with it, and duplicates across clusters are missed without it."""
    rounds: int = 20
    """Most rounds of k-means."""
    drop: bool = True
    """Drop them; false only names them in the ledger."""

    def __post_init__(self) -> None:
        if not 0 < self.eps < 1 or self.rate <= 0 or self.cluster < 1 or self.rounds < 1:
            raise WorldloomError(
                "semantic_duplicates: eps lies between 0 and 1; rate, cluster and rounds are positive", got=self
            )


@dataclass(frozen=True)
class _Known(SemanticDuplicatesConfig):
    embedder: str = ""
    """Fingerprint of the embedder: part of the key of every result."""


def _blocks(vectors: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    for start in range(0, len(vectors), _BLOCK):
        part = slice(start, start + _BLOCK)
        yield part, np.asarray(vectors[part], np.float32)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1, zeros where they were."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def cluster(vectors: np.ndarray, count: int, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Spherical k-means: ``(n, d)`` unit vectors -> the cluster of each ``(n,)`` and the cosine to its centre ``(n,)``.

    A cluster that loses all its members takes the vector that is farthest from its own centre.
    """
    count = min(count, len(vectors))
    centres = np.asarray(vectors[np.linspace(0, len(vectors) - 1, count).round().astype(int)], np.float32)
    which, near = np.full(len(vectors), -1), np.zeros(len(vectors), np.float32)
    for _ in range(rounds):
        sums = np.zeros_like(centres)
        before = which.copy()
        for part, block in _blocks(vectors):
            cosines = block @ centres.T
            which[part] = cosines.argmax(1)
            near[part] = cosines.max(1)
            np.add.at(sums, which[part], block)
        empty = np.setdiff1d(np.arange(count), which)
        if not len(empty) and np.array_equal(which, before):
            break
        centres = unit(sums)
        centres[empty] = vectors[np.argsort(near, kind="stable")[: len(empty)]]
    return which, near


def repeated(vectors: np.ndarray, near: np.ndarray, eps: float) -> dict[int, tuple[int, float]]:
    """Of one cluster ``(m, d)``, for every row but the first in order the (earlier row most like it, cosine).

    The order is from the farthest from the centre to the nearest. Only those at or over 1 - eps are given.
    """
    order = np.argsort(near, kind="stable")
    ordered = np.asarray(vectors[order], np.float32)
    found: dict[int, tuple[int, float]] = {}
    for start in range(0, len(ordered), _BLOCK):
        block = ordered[start : start + _BLOCK]
        cosines = block @ ordered[: start + len(block)].T
        cosines[np.arange(len(block))[:, None] + start <= np.arange(cosines.shape[1])[None]] = -1  # earlier ones only
        best = cosines.argmax(1)
        for row, column in enumerate(best):
            if cosines[row, column] >= 1 - eps:
                found[int(order[start + row])] = int(order[column]), float(cosines[row, column])
    return found


class SemanticDuplicatesStage:
    """Keeps one of every group of spans that show the same thing. Sees the whole run.

    Raises:
        WorldloomError: the embedder is not installed, or takes no frames.
    """

    name = "semantic_duplicates"
    version = 1
    scope: Literal["source", "run"] = "run"
    measured_with = ("model", "rate", "embedder")
    Config = SemanticDuplicatesConfig

    def __init__(self, config: SemanticDuplicatesConfig) -> None:
        from worldloom_curation.search import find_embedder

        self._embedder: Embedder = find_embedder(config.model, "frames")
        self.config = _Known(**asdict(config), embedder=self._embedder.fingerprint)

    def observer(self, source: Source, fps: float) -> Observer | None:
        def embed(frame: Frame) -> np.ndarray:
            return self._embedder.embed_frames(frame.colour(_EDGE)[None])[0]

        return PerFrame(embed, max(1, round(fps / self.config.rate)), kind=np.float16)

    def decide(self, spans: Sequence[Span], signals: Mapping[str, Signals]) -> list[Verdict]:
        if not spans:
            return []
        with tempfile.TemporaryFile() as file:
            vectors = self._vectors(spans, signals, file)
            count = -(-len(spans) // self.config.cluster)
            which, near = cluster(vectors, count, self.config.rounds)
            found: dict[int, tuple[int, float]] = {}
            for number in range(count):
                members = np.flatnonzero(which == number)
                for row, (other, cosine) in repeated(vectors[members], near[members], self.config.eps).items():
                    found[int(members[row])] = int(members[other]), cosine
        return [self._verdict(spans, number, found.get(number)) for number in range(len(spans))]

    def _vectors(self, spans: Sequence[Span], signals: Mapping[str, Signals], file: object) -> np.ndarray:
        width = signals[spans[0].source.key]["values"].shape[1]
        vectors = np.memmap(file, np.float32, "w+", shape=(len(spans), width))  # pyright: ignore[reportArgumentType, reportCallIssue]
        for number, span in enumerate(spans):
            vectors[number] = unit(within(signals[span.source.key], span).astype(np.float32).mean(0))
        return vectors

    def _verdict(self, spans: Sequence[Span], number: int, found: tuple[int, float] | None) -> Verdict:
        span, limit = spans[number], 1 - self.config.eps
        if found is None:
            return Verdict(span, True, "cosine", None, limit, "nothing in its cluster shows the same")
        other, cosine = spans[found[0]], found[1]
        reason = f"it shows what {other.source.name} [{other.start}, {other.end}) does, clip {other.id}"
        return Verdict(span, not self.config.drop, "cosine", cosine, limit, reason, like=other.id)
