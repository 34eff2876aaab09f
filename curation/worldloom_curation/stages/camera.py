"""Camera: says how the camera moves: static, pan, tilt, zoom, roll, each with its direction; drops what is asked for.

Between two small grey frames a tenth of a second apart the optical flow is taken (DIS, Kroeger et al. 2016, of OpenCV),
and one movement of the whole picture is fitted to it where there is texture: shift, scale and turn, the four parameters
of a similarity. Pixels that disagree lose their weight (iteratively reweighted least squares), so that things that move
by themselves do not count as long as they are the lesser part. A span gets the labels whose median speed is over the
threshold and steady, the fastest first; where movement goes back and forth it is shaky.

A camera that turns right shows things going left: the labels are of the camera. Travelling sideways looks like panning.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from worldloom.errors import WorldloomError
from worldloom_curation import pictures
from worldloom_curation.stage import Observer, Source, Span, Verdict

if TYPE_CHECKING:
    from worldloom_curation.pictures import Frame
    from worldloom_curation.stage import Signals

_DIRECTIONS = (
    ("pan left", "pan right"),  # things go right (positive) or left
    ("tilt up", "tilt down"),  # things go down (positive) or up
    ("zoom in", "zoom out"),
    ("roll left", "roll right"),  # things turn clockwise (positive) or the other way
)
LABELS = ("static", *(label for pair in _DIRECTIONS for label in pair), "shaky")
_GRID = 4  # pixels between the points that the movement is fitted to
_TEXTURE = 4.0  # grey levels: least change across a point
_ROUNDS = 6
_STEADY = 1.5  # a direction's speed over its median absolute deviation


@dataclass(frozen=True)
class CameraConfig:
    """How the camera moves."""

    drop: tuple[str, ...] = ()
    """Labels to drop, e.g. ["shaky", "static"]; none by default: the stage only labels."""
    shift: float = 0.03
    """Speed from which on it pans or tilts, in picture widths a second."""
    scale: float = 0.03
    """Speed from which on it zooms, as growth a second."""
    turn: float = 0.03
    """Speed from which on it rolls, in radians a second."""
    shaky: float = 0.15
    """Speed that changes from moment to moment, from which on it is shaky, in picture widths a second."""
    rate: float = 3.0
    """Times a second that movement is measured."""
    side: int = 144
    """Short side of the frames, in pixels."""

    def __post_init__(self) -> None:
        if unknown := [label for label in self.drop if label not in LABELS]:
            raise WorldloomError("there is no such camera label", got=unknown[0], do=f"use {', '.join(LABELS)}")
        if min(self.shift, self.scale, self.turn, self.shaky, self.rate) <= 0 or self.side < 32:
            raise WorldloomError("camera: thresholds and rate are positive, side is at least 32", got=self)


class Movements:
    """Collects `rate` times a second the camera's ``movement`` and the frames ``at`` which it was measured.

    A row is (right, down, growth, clockwise turn) a second: shifts of things in picture widths, growth of their sizes,
    radians.
    """

    def __init__(self, fps: float, rate: float, side: int) -> None:
        self._gap = max(1, round(0.1 * fps))
        self._every = max(float(self._gap), fps / rate)
        self._fps, self._side = fps, side
        self._count = 0
        self._before: deque[np.ndarray] = deque(maxlen=self._gap)
        self._rows: list[np.ndarray] = []
        self._at: list[int] = []
        self._flow = make_flow()

    def add(self, frame: Frame) -> None:
        next_at = self._gap + round(len(self._at) * self._every)
        if self._count >= next_at - self._gap:
            grey = frame.grey(self._side)
            if self._count == next_at:
                flow = self._flow(self._before[0], grey)
                self._rows.append(movement(flow, self._before[0]) * (self._fps / self._gap))
                self._at.append(self._count)
            self._before.append(grey)
        self._count += 1

    def result(self) -> dict[str, np.ndarray]:
        return {
            "movement": np.asarray(self._rows, np.float32).reshape(-1, 4),
            "at": np.asarray(self._at, np.int32),
            "gap": np.asarray(self._gap),
        }


def make_flow() -> Any:
    """A function of two uint8 ``(h, w)`` that gives the flow ``(h, w, 2)``: (right, down) in pixels.

    At half of the size and without variational refinement, which takes two thirds of the time and smears the flow of a
    thing that moves over the background beside it.
    """
    cv2: Any = pictures.opencv()
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
    dis.setFinestScale(1)
    dis.setVariationalRefinementIterations(0)
    return lambda first, second: dis.calc(first, second, None)


def movement(flow: np.ndarray, grey: np.ndarray) -> np.ndarray:
    """The one movement of a picture: (right, down, growth, clockwise turn); shifts in widths, of the picture's centre.

    Args:
        flow: ``(h, w, 2)`` in pixels.
        grey: the first of the two pictures, uint8 ``(h, w)``.
    """
    height, width = grey.shape
    y, x = np.mgrid[_GRID : height - _GRID : _GRID, _GRID : width - _GRID : _GRID]
    level = grey.astype(np.int16)
    across = np.abs(level[y, x + 2] - level[y, x - 2]), np.abs(level[y + 2, x] - level[y - 2, x])
    seen = np.maximum(*across) >= _TEXTURE
    if seen.sum() < 8:
        return np.zeros(4)
    u, v = (flow[..., axis][y, x][seen].astype(np.float64) / width for axis in (0, 1))
    x, y = (x[seen] - (width - 1) / 2) / width, (y[seen] - (height - 1) / 2) / width
    zero, one = np.zeros_like(x), np.ones_like(x)
    # u = right + growth x - turn y, v = down + growth y + turn x
    matrix = np.concatenate([np.stack([one, zero, x, -y], 1), np.stack([zero, one, y, x], 1)])
    target = np.concatenate([u, v])
    found = np.array([np.median(u), np.median(v), 0.0, 0.0])
    for _ in range(_ROUNDS):
        off = np.hypot(*(target - matrix @ found).reshape(2, -1))
        # Weights of Geman and McClure; what the flow itself is unsure of, a tenth of a pixel, is no disagreement.
        scale = max(1.5 * float(np.median(off)), 0.1 / width)
        weights = np.tile((1 + (off / scale) ** 2) ** -2.0, 2)
        root = np.sqrt(weights)
        found = np.linalg.lstsq(matrix * root[:, None], target * root, rcond=None)[0]
    return found


class CameraStage:
    """Labels every span; drops those with a label that is to be dropped."""

    name = "camera"
    version = 1
    scope: Literal["source", "run"] = "source"
    measured_with = ("rate", "side")
    Config = CameraConfig

    def __init__(self, config: CameraConfig) -> None:
        self.config = config

    def observer(self, source: Source, fps: float) -> Observer | None:
        return Movements(fps, self.config.rate, self.config.side)

    def decide(self, spans: Sequence[Span], signals: Mapping[str, Signals]) -> list[Verdict]:
        return [self._verdict(span, signals[span.source.key]) for span in spans]

    def _verdict(self, span: Span, signals: Signals) -> Verdict:
        # Both frames of every comparison inside the span.
        inside = (signals["at"] >= span.start + int(signals["gap"])) & (signals["at"] < span.end)
        rows = signals["movement"][inside].astype(np.float64)
        if not len(rows):
            return Verdict(replace(span, notes={**span.notes, "camera": []}), True, reason="too short to tell")
        labels, speed = self._labels(rows)
        noted = replace(span, notes={**span.notes, "camera": labels})
        unwanted = [label for label in labels if label in self.config.drop]
        reason = ", ".join(labels)
        return Verdict(noted, not unwanted, "camera speed", speed, self.config.shift, reason)

    def _labels(self, rows: np.ndarray) -> tuple[list[str], float]:
        """Labels, the fastest first, and the speed of the picture's centre."""
        limits = np.array([self.config.shift, self.config.shift, self.config.scale, self.config.turn])
        median = np.median(rows, axis=0)
        over = np.abs(median) / limits
        steady = np.abs(median) >= _STEADY * np.median(np.abs(rows - median), axis=0)
        labels = [_DIRECTIONS[i][int(median[i] < 0)] for i in np.argsort(-over) if over[i] >= 1 and steady[i]]
        # What a steady movement leaves: half the change from one moment to the next, as a movement that speeds up or
        # slows down changes little at a time.
        jumps = np.hypot(*np.diff(rows[:, :2], axis=0).T) / 2
        if len(jumps) and float(np.median(jumps)) >= self.config.shaky:
            labels.append("shaky")
        return labels or ["static"], float(np.hypot(*median[:2]))
