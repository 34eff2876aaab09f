"""Building blocks of filters: an observer of numbers per frame, and the cutting of marked frames out of a span."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from worldloom_curation.stage import Span, Verdict

if TYPE_CHECKING:
    from worldloom_curation.pictures import Frame
    from worldloom_curation.stage import Signals

Measure = Callable[["Frame"], "float | np.ndarray"]
"""Measures one frame."""


class PerFrame:
    """Collects what a measure says of every `every`-th frame: array ``values``, a row for each frame measured.

    Args:
        measure: gives a number, or an array of always the same shape.
        every: 1 for every frame.
        kind: of the numbers that are stored.
    """

    def __init__(self, measure: Measure, every: int = 1, kind: type[np.generic] = np.float32) -> None:
        self._measure, self._every, self._kind = measure, every, kind
        self._count = 0
        self._rows = bytearray()
        self._shape: tuple[int, ...] = ()

    def add(self, frame: Frame) -> None:
        if self._count % self._every == 0:
            row = np.asarray(self._measure(frame)).astype(self._kind)
            self._rows += row.tobytes()
            self._shape = row.shape
        self._count += 1

    def result(self) -> dict[str, np.ndarray]:
        values = np.frombuffer(bytes(self._rows), self._kind).reshape(-1, *self._shape)
        return {"values": values, "every": np.asarray(self._every)}


def within(signals: Signals, span: Span, name: str = "values") -> np.ndarray:
    """The rows that a `PerFrame` collected within a span; where none was, the one before it.

    Every frame of the span counts, also those that its `step` leaves out.
    """
    every, values = int(signals["every"]), signals[name]
    first = -(-span.start // every)
    last = -(-span.end // every)
    if first >= last:
        first = min(max(0, span.start // every), len(values) - 1)
        last = first + 1
    return values[first:last]


def runs(marked: np.ndarray, least: int) -> list[tuple[int, int]]:
    """``[start, end)`` of the runs of at least `least` true values of ``(t,)``, in order."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marked, [False]]).astype(np.int8)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2) if end - start >= least]


def cut_out(
    span: Span,
    bad: list[tuple[int, int]],
    least: int,
    multiple: int,
    verdict: Callable[[Span, bool], Verdict],
    short: Callable[[Span], Verdict],
) -> list[Verdict]:
    """Cut runs of frames out of a span; every frame of it is in exactly one verdict.

    Args:
        bad: ``[start, end)`` of the runs, in frames of the source, in order.
        least: frames of the shortest clip that is kept.
        multiple: what is kept has 1 + k * this frames; what that leaves over is cut off its end.
        verdict: makes the verdict of a part, given whether it is kept.
        short: makes the verdict of a part that is too short.
    """
    if not bad:
        return [verdict(span, True)]
    edges = [span.start, *itertools.chain.from_iterable(bad), span.end]
    verdicts: list[Verdict] = []
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        if start >= end:
            continue
        part = replace(span, start=start, end=end)
        if number % 2:
            verdicts.append(verdict(part, False))
            continue
        count = 1 + (part.frames - 1) // multiple * multiple
        if count < least:
            verdicts.append(short(part))
            continue
        stop = start + (count - 1) * span.step + 1
        stop = end if end - stop < span.step else stop  # what thinning skips belongs to the clip
        verdicts.append(verdict(replace(part, end=stop), True))
        if stop < end:
            verdicts.append(short(replace(part, start=stop)))
    return verdicts
