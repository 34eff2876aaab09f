"""Overlay text: drop spans with subtitles, captions, logos and time stamps burnt in.

Text is looked for by PP-OCR's detector (package ``rapidocr``, Apache-2.0), in every third frame. Two signs tell an
overlay from text that belongs to the scene: it stays where it is while the picture moves (a box that overlaps itself by
at least `overlap` through `frames` looks in a row), and it sits in a corner. The rules and figures are cosmos-curate's.
A fixed camera that looks at a sign is therefore dropped too; raise `frames` for such material.

Letters: n boxes. A box is (left, top, right, bottom) in fractions of the picture's sides.
"""

from __future__ import annotations

import functools
import importlib.util
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from worldloom.errors import WorldloomError, missing_extra
from worldloom_curation.stage import Observer, Source, Span, Verdict

if TYPE_CHECKING:
    from worldloom_curation.pictures import Frame
    from worldloom_curation.stage import Signals

_LOCK = threading.Lock()


@dataclass(frozen=True)
class OverlayTextConfig:
    """Text that was laid over the picture."""

    every: int = 3
    """Every how many frames one is looked at."""
    overlap: float = 0.9
    """Intersection over union from which on a box is where it was."""
    frames: int = 3
    """Looks in a row through which a box must stay to be an overlay."""
    corner: float = 0.2
    """How far a corner reaches, as a fraction of the picture's sides."""
    corner_share: float = 0.1
    """Share of the frames with text in which there may be text in a corner."""
    score: float = 0.6
    """Least score of a box (0 to 1)."""
    largest: float = 0.5
    """Share of the picture from which on a box is no text: stripes and gratings are taken for it."""
    side: int = 480
    """Short side at which text is looked for, in pixels; larger finds smaller text and costs more."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.frames < 2 or self.side < 32 or not 0 < self.overlap <= 1:
            raise WorldloomError(
                "overlay_text: every >= 1, frames >= 2, side >= 32, and overlap lies in (0, 1]", got=self
            )


class TextBoxes:
    """Collects ``boxes`` (n, 4), ``scores`` (n,), the frames ``at`` (n,) that they are in, and ``every``."""

    def __init__(self, every: int, side: int) -> None:
        self._every, self._side = every, side
        self._count = 0
        self._boxes: list[np.ndarray] = []
        self._scores: list[float] = []
        self._at: list[int] = []
        text_detector(side)

    def add(self, frame: Frame) -> None:
        if self._count % self._every == 0:
            boxes, scores = find_text(frame.colour(self._side), self._side)
            self._boxes += list(boxes)
            self._scores += list(scores)
            self._at += [self._count] * len(boxes)
        self._count += 1

    def result(self) -> dict[str, np.ndarray]:
        return {
            "boxes": np.asarray(self._boxes, np.float32).reshape(-1, 4),
            "scores": np.asarray(self._scores, np.float32),
            "at": np.asarray(self._at, np.int32),
            "every": np.asarray(self._every),
        }


def find_text(picture: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes ``(n, 4)`` and scores ``(n,)`` of the text in uint8 ``(h, w, 3)``; a smaller picture is enlarged first."""
    detector = text_detector(side)
    with _LOCK:
        found = detector(np.ascontiguousarray(picture[..., ::-1]), use_det=True, use_cls=False, use_rec=False)
    if found.boxes is None or not len(found.boxes):
        return np.zeros((0, 4), np.float32), np.zeros(0, np.float32)
    corners = np.asarray(found.boxes, np.float32) / np.array(picture.shape[1::-1], np.float32)  # (n, 4, 2)
    boxes = np.concatenate([corners.min(1), corners.max(1)], axis=1)
    return boxes, np.asarray(found.scores, np.float32)


@functools.lru_cache(maxsize=1)
def text_detector(side: int) -> Any:
    """The detector.

    Raises:
        WorldloomError: rapidocr is not installed.
    """
    if importlib.util.find_spec("rapidocr") is None or importlib.util.find_spec("onnxruntime") is None:
        raise missing_extra("rapidocr", "curation-models")
    from rapidocr import RapidOCR

    return RapidOCR(
        params={
            "Global.log_level": "critical",
            "Det.limit_side_len": side,
            "Det.limit_type": "min",
            # One thread a worker, as everywhere in a scan.
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
    )


def overlaps(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes: ``(n, 4), (m, 4) -> (n, m)``."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = np.prod(np.maximum(high - low, 0), axis=2)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (first, second)]
    return shared / np.maximum(areas[0][:, None] + areas[1][None] - shared, 1e-12)


def longest_stay(looks: Sequence[np.ndarray], overlap: float) -> int:
    """Most looks in a row through which a box stays where it was.

    Args:
        looks: the boxes ``(n, 4)`` of every look in order, also of those that found none.
    """
    longest = 0
    before, stays = np.zeros((0, 4)), np.zeros(0, int)
    for boxes in looks:
        lengths = np.ones(len(boxes), int)
        if len(boxes) and len(before):
            same = overlaps(boxes, before) >= overlap
            lengths += np.where(same, stays[None], 0).max(1)
        before, stays = boxes, lengths
        longest = max([longest, *lengths.tolist()])
    return longest


class OverlayTextStage:
    """Keeps spans without burnt-in text."""

    name = "overlay_text"
    version = 1
    scope: Literal["source", "run"] = "source"
    measured_with = ("every", "side")
    Config = OverlayTextConfig

    def __init__(self, config: OverlayTextConfig) -> None:
        self.config = config

    def observer(self, source: Source, fps: float) -> Observer | None:
        return TextBoxes(self.config.every, self.config.side)

    def decide(self, spans: Sequence[Span], signals: Mapping[str, Signals]) -> list[Verdict]:
        return [self._verdict(span, list(self._looks(span, signals[span.source.key]))) for span in spans]

    def _looks(self, span: Span, signals: Signals) -> Iterator[np.ndarray]:
        every, at = int(signals["every"]), signals["at"]
        boxes = signals["boxes"]
        areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
        good = (signals["scores"] >= self.config.score) & (areas < self.config.largest)
        for frame in range(-(-span.start // every) * every, span.end, every):
            yield boxes[(at == frame) & good]

    def _verdict(self, span: Span, looks: list[np.ndarray]) -> Verdict:
        limit = float(self.config.frames)
        stay = longest_stay(looks, self.config.overlap)
        if stay >= limit:
            reason = f"text stays in its place through {stay} of {len(looks)} looks"
            return Verdict(span, False, "still text looks", float(stay), limit, reason)
        texts = [boxes for boxes in looks if len(boxes)]
        share = float(np.mean([self._in_corner(boxes) for boxes in texts])) if texts else 0.0
        # One look with text is no share of anything.
        if len(texts) >= limit and share > self.config.corner_share:
            reason = f"there is text in a corner in {100 * share:.0f} % of the frames with text"
            return Verdict(span, False, "corner text share", share, self.config.corner_share, reason)
        reason = f"no text stays in its place; text in {len(texts)} of {len(looks)} looks" if texts else "no text"
        return Verdict(span, True, "still text looks", float(stay), limit, reason)

    def _in_corner(self, boxes: np.ndarray) -> bool:
        x, y = (boxes[:, :2] + boxes[:, 2:]).T / 2
        reach = self.config.corner
        return bool((((x < reach) | (x > 1 - reach)) & ((y < reach) | (y > 1 - reach))).any())
