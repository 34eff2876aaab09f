"""Motion vectors: drop spans with little motion by the vectors that the encoder stored; cosmos-curate's motion filter.

Twice a second the magnitudes of the vectors are averaged over the picture, by the area of their blocks, and divided by
its height + width. A span is dropped if the mean over its frames is under `global_mean`, or if in some patch of about
256 x 256 pixels it is under `patch`: a part of the picture that never moves. A smaller picture is one patch.

A vector points to the frame that the encoder chose to refer to, in H.264 often several frames away, and its length is
taken as it is, so values of different encoders differ by such factors.

H.264, MPEG-1, 2 and 4 and their kin export vectors; VP9, AV1, HEVC, MJPEG and all-intra streams do not.
For those, and for episodes of our own datasets, optical flow between two frames in a row is measured in the same unit.
Reading vectors takes a second decoding (without colours) beside that of the scan; flow alone is cheaper, and
``source = "flow"`` takes it for all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from worldloom.errors import WorldloomError
from worldloom_curation.stage import Observer, Source, Span, Verdict
from worldloom_curation.stages.camera import make_flow

if TYPE_CHECKING:
    from worldloom_curation.pictures import Frame
    from worldloom_curation.stage import Signals

_EXPORT = 1 << 28  # AV_CODEC_FLAG2_EXPORT_MVS
_PEEK = 32  # frames among which one must have vectors
_SIDE = 144  # short side of the frames that flow is measured on
_PATCH = 256


@dataclass(frozen=True)
class MotionVectorsConfig:
    """How much must move. The figures are cosmos-curate's."""

    global_mean: float = 0.00098
    """Least mean magnitude, in heights + widths a frame."""
    patch: float = 1e-6
    """Least mean magnitude in every patch; 0 lets parts of the picture stand still."""
    rate: float = 2.0
    """Times a second that motion is measured."""
    source: Literal["vectors", "flow"] = "vectors"
    """The stored vectors where there are any, or flow for all."""

    def __post_init__(self) -> None:
        if self.rate <= 0 or self.global_mean < 0 or self.patch < 0:
            raise WorldloomError("motion_vectors: rate is positive, thresholds are not negative", got=self)


def patches(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of patches of a picture."""
    return max(1, height // _PATCH), max(1, width // _PATCH)


def of_vectors(vectors: np.ndarray, height: int, width: int) -> np.ndarray:
    """Mean magnitude of the picture, then of each patch, in heights + widths: ``(1 + patches,)``.

    A block that refers to two frames counts with the mean of both; where there is no vector, nothing moves.

    Args:
        vectors: the structured array that PyAV makes of a frame's ``MOTION_VECTORS``.
    """
    rows, columns = patches(height, width)
    scale = np.maximum(vectors["motion_scale"], 1)
    size = np.hypot(vectors["motion_x"] / scale, vectors["motion_y"] / scale) / (height + width)
    area = vectors["w"].astype(np.float64) * vectors["h"]
    y, x = (np.clip(vectors[name].astype(int), 0, most - 1) for name, most in (("dst_y", height), ("dst_x", width)))
    where = y * rows // height * columns + x * columns // width
    count = rows * columns
    moved, covered = np.bincount(where, size * area, count), np.bincount(where, area, count)
    whole = float(moved.sum() / max(covered.sum(), height * width))
    return np.array([whole, *(moved / np.maximum(covered, height * width / count))])


def of_flow(flow: np.ndarray, height: int, width: int) -> np.ndarray:
    """The same of optical flow ``(h, w, 2)`` in pixels of a smaller picture."""
    rows, columns = patches(height, width)
    size = np.hypot(flow[..., 0], flow[..., 1]) / sum(flow.shape[:2])
    parts = [part.mean() for row in np.array_split(size, rows) for part in np.array_split(row, columns, axis=1)]
    return np.array([size.mean(), *parts])


def stored_vectors(source: Source) -> Iterator[np.ndarray | None] | None:
    """The vectors of every frame of a file, None for a frame without; None where the file has none.

    Raises:
        WorldloomError: while iterating, as `worldloom.media.iter_frames`.
    """
    if source.exact:
        return None

    def frames() -> Iterator[np.ndarray | None]:
        from worldloom.decoding import Reader
        from worldloom.media import DEFAULT_LIMITS

        first, last = source.window or (0, None)
        with Reader(source.path, DEFAULT_LIMITS) as reader:
            reader.stream.codec_context.flags2 |= _EXPORT
            for index, frame in reader.frames_from(first):
                if last is not None and index >= last:
                    return
                if index >= first:
                    found: Any = frame.side_data.get("MOTION_VECTORS")
                    yield None if found is None or not len(found) else found.to_ndarray()

    every = frames()
    head = list(itertools.islice(every, _PEEK))
    return itertools.chain(head, every) if any(vectors is not None for vectors in head) else None


class Motions:
    """Collects ``motion`` (n, 1 + patches), the frames ``at`` (n,), and whether it is of ``vectors``."""

    def __init__(self, source: Source, fps: float, config: MotionVectorsConfig) -> None:
        self._vectors = stored_vectors(source) if config.source == "vectors" else None
        self._stored = self._vectors is not None
        self._every = max(1.0, fps / config.rate)
        self._flow, self._before = make_flow(), None
        self._count, self._due = 0, 0.0
        self._rows: list[np.ndarray] = []
        self._at: list[int] = []

    def add(self, frame: Frame) -> None:
        measured = self._by_vectors(frame) if self._vectors is not None else self._by_flow(frame)
        if measured is not None:
            self._rows.append(measured)
            self._at.append(self._count)
            self._due += self._every
        self._count += 1

    def result(self) -> dict[str, np.ndarray]:
        return {
            "motion": np.asarray(self._rows, np.float32).reshape(len(self._rows), -1),
            "at": np.asarray(self._at, np.int32),
            "vectors": np.asarray(self._stored),
        }

    def _by_vectors(self, frame: Frame) -> np.ndarray | None:
        """None before its time is due, and for keyframes, whose turn passes to the next frame."""
        assert self._vectors is not None
        vectors = next(self._vectors, None)
        if vectors is None or self._count < round(self._due):
            return None
        return of_vectors(vectors, frame.height, frame.width)

    def _by_flow(self, frame: Frame) -> np.ndarray | None:
        due = max(1, round(self._due))
        if self._count < due - 1:
            return None
        grey, before = frame.grey(_SIDE), self._before
        self._before = grey
        if before is None or self._count < due:
            return None
        return of_flow(self._flow(before, grey), frame.height, frame.width)


class MotionVectorsStage:
    """Keeps spans that move, everywhere."""

    name = "motion_vectors"
    version = 1
    scope: Literal["source", "run"] = "source"
    measured_with = ("rate", "source")
    Config = MotionVectorsConfig

    def __init__(self, config: MotionVectorsConfig) -> None:
        self.config = config

    def observer(self, source: Source, fps: float) -> Observer | None:
        return Motions(source, fps, self.config)

    def decide(self, spans: Sequence[Span], signals: Mapping[str, Signals]) -> list[Verdict]:
        return [self._verdict(span, signals[span.source.key]) for span in spans]

    def _verdict(self, span: Span, signals: Signals) -> Verdict:
        inside = (signals["at"] > span.start) & (signals["at"] < span.end)  # the first frame's motion is from before it
        rows = signals["motion"][inside].astype(np.float64)
        if not len(rows):
            return Verdict(span, True, reason="too short to tell")
        mean = rows.mean(0)
        whole, least = float(mean[0]), float(mean[1:].min())
        score = {"global_mean": whole, "per_patch_min_256": least}
        noted = replace(span, notes={**span.notes, "motion_score": score})
        by = "its motion vectors" if bool(signals["vectors"]) else "optical flow"
        if whole >= self.config.global_mean and least < self.config.patch:
            reason = f"a part of the picture stands still by {by}"
            return Verdict(noted, False, "least motion of a patch", least, self.config.patch, reason)
        kept = whole >= self.config.global_mean
        reason = f"it {'moves' if kept else 'hardly moves'} by {by}"
        return Verdict(noted, kept, "mean motion", whole, self.config.global_mean, reason)
