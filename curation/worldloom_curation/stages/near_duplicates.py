"""Near-duplicates: drop a span that shows what an earlier one shows: encoded again, resized, cropped, shifted in time.

Collected are thumbnails: `SIDE` x `SIDE` grey levels, `rate` times a second. From them, in three steps:

1. Candidates. A thumbnail's hash is the signs of its lowest cosine coefficients (the perceptual hash of Zauner 2010,
   without the median). A crop is linear in both directions, and so are the coefficients: the hashes of all crops of a
   thumbnail are two small matrix products. Whole thumbnails are looked up among crops, so that either may be the crop
   of the other. Keys are short, and every whole thumbnail is entered under each setting of its weakest bits
   (multi-probe hashing, Lv et al. 2007). The same is done with how a thumbnail differs from the span's mean, and a hit
   counts the less the more spans share its key: among the spans of one fixed camera only their movement tells.
2. Registration. For the candidates with most hits, the window of the one that looks most like the other is searched
   for, from the crop whose coefficients are most like the other's.
3. Comparison, of the aligned thumbnails. The picture: correlation of grey levels. The movement: correlation of what
   differs from the mean picture. A camera that looks at one place all day gives equal pictures with
   other movements, which are no copies; spans in which both stand still go by the picture alone.

Similarity is the lesser of the two correlations, from -1 to 1. Which of two is kept: the one with more pixels, then the
earlier one.

Letters: n samples of a span, s `SIDE`, w windows in one direction, k coefficients in one direction.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import IO, TYPE_CHECKING, Literal

import numpy as np

from worldloom.errors import WorldloomError
from worldloom_curation import pictures
from worldloom_curation.stage import Observer, Source, Span, Verdict

if TYPE_CHECKING:
    from worldloom_curation.pictures import Frame
    from worldloom_curation.stage import Signals

SIDE = 32
"""Height and width of a thumbnail."""
_GREY = 64  # short side of the picture that thumbnails are made of, which other stages use too
_SCALES = (1.0, 0.9, 0.8, 0.7)  # of a crop's side
_APART = 0.21  # most difference between the scales of the two sides
_COEFFICIENTS = 6  # in each direction
_BITS = 18  # of a key
_TABLES = 2
_WEAK = 4  # bits of a key that are tried both ways
_CROWDED = 512  # entries under one key: more say nothing (black frames, title cards)
_BLOCK = 2048  # spans whose thumbnails are indexed at once
_AT_ONCE = 64  # spans whose crops are looked up at once
_ROUGHLY = 0.4  # least correlation of the pictures' coefficients before registration
_ALIGNED = 5  # samples that are registered
_GRID = 64  # steps in which the edges of a crop are searched for
_STILL = 1.5  # grey levels: a span whose thumbnails vary less stands still


@dataclass(frozen=True)
class NearDuplicatesConfig:
    """Copies that were encoded again, resized, cropped or shifted."""

    threshold: float = 0.52
    """Least similarity (-1 to 1) of a near-copy."""
    share: float = 0.5
    """Share of a span that must be in the other one for it to be dropped."""
    rate: float = 8.0
    """Thumbnails a second, of a kilobyte each."""
    candidates: int = 16
    """Most spans that one is compared with, those with most hits first."""
    drop: bool = True
    """Drop them; false only names them in the ledger."""

    def __post_init__(self) -> None:
        if not (self.rate > 0 and self.candidates >= 1 and 0 < self.share <= 1):
            raise WorldloomError("near_duplicates: rate and candidates are positive, share lies in (0, 1]", got=self)


class Thumbnails:
    """Collects thumbnails uint8 ``(n, s, s)``, the frames ``(n,)`` they are of, and the number of a frame's pixels.

    Thumbnail k is of the frame nearest to k / `rate` seconds, so that a copy at another frame rate keeps in step.
    """

    def __init__(self, fps: float, rate: float) -> None:
        self._every = max(1.0, fps / rate)
        self._count, self._pixels = 0, 0
        self._made = bytearray()
        self._at: list[int] = []
        self._cv2 = pictures.opencv()

    def add(self, frame: Frame) -> None:
        if self._count == round(len(self._at) * self._every):
            small = frame.grey(_GREY)
            self._made += self._cv2.resize(small, (SIDE, SIDE), interpolation=self._cv2.INTER_AREA).tobytes()
            self._at.append(self._count)
            self._pixels = frame.height * frame.width
        self._count += 1

    def result(self) -> dict[str, np.ndarray]:
        return {
            "thumbnails": np.frombuffer(bytes(self._made), np.uint8).reshape(-1, SIDE, SIDE),
            "at": np.asarray(self._at, np.int32),
            "pixels": np.asarray(self._pixels),
        }


# -- crops and hashes ------------------------------------------------------------------------------------------------


def _resampling(start: float, scale: float, cells: int = SIDE) -> np.ndarray:
    """The matrix ``(cells, s)`` that cuts ``[start, start + scale)`` (of 0 to 1) out of a row and stretches it.

    Linear interpolation between the centres of cells, and outside them the last cell.
    """
    at = np.clip((start + scale * (np.arange(cells) + 0.5) / cells) * SIDE - 0.5, 0, SIDE - 1)
    low = np.minimum(at.astype(int), SIDE - 2)
    matrix = np.zeros((cells, SIDE), np.float32)
    matrix[np.arange(cells), low] = 1 - (at - low)
    matrix[np.arange(cells), low + 1] += at - low
    return matrix


def _cosines(coefficients: int) -> np.ndarray:
    """The first rows of the cosine transform DCT-II: ``(k, s)``."""
    k, n = np.arange(coefficients)[:, None], np.arange(SIDE)[None]
    return np.cos(np.pi * k * (2 * n + 1) / (2 * SIDE)).astype(np.float32)


_WINDOWS: list[tuple[float, float]] = [
    (start, scale) for scale in _SCALES for start in sorted({0.0, (1 - scale) / 2, 1 - scale})
]
"""(start, scale) of the windows in one direction; the first is the whole."""
_PAIRS = np.array(
    [
        (y, x)
        for y, x in itertools.product(range(len(_WINDOWS)), repeat=2)
        if abs(_WINDOWS[y][1] - _WINDOWS[x][1]) < _APART
    ]
)
"""The crops: a window for the rows and one for the columns, ``(c, 2)``; the first is the whole."""
_CROPPED = np.concatenate([_cosines(_COEFFICIENTS) @ _resampling(*window) for window in _WINDOWS])  # (w*k, s)
_ORDER = sorted(
    ((y, x) for y, x in itertools.product(range(_COEFFICIENTS), repeat=2) if y + x), key=lambda yx: (yx[0] + yx[1], yx)
)
"""The coefficients without the mean, the lowest first."""
_OF_TABLE = [np.arange(table, table + _TABLES * _BITS, _TABLES) % len(_ORDER) for table in range(_TABLES)]
_POWERS = 1 << np.arange(_BITS, dtype=np.int64)


def _spectra(thumbnails: np.ndarray, whole: bool) -> np.ndarray:
    """Cosine coefficients of every crop, or of the whole only: ``(n, s, s) -> (n, c, coefficients)``."""
    rows = _CROPPED[:_COEFFICIENTS] if whole else _CROPPED
    both = rows @ thumbnails.astype(np.float32) @ rows.T  # (n, w*k, w*k)
    k, w = _COEFFICIENTS, len(rows) // _COEFFICIENTS
    both = both.reshape(len(thumbnails), w, k, w, k).transpose(0, 1, 3, 2, 4)  # (n, w, w, k, k)
    y, x = (_PAIRS[:1] if whole else _PAIRS).T
    u, v = np.array(_ORDER).T
    return both[:, y, x][:, :, u, v]


def _described(thumbnails: np.ndarray, moving: bool, whole: bool) -> np.ndarray:
    """`_spectra` of the pictures, or of how they differ from their mean; nan where a span stands still."""
    spectra = _spectra(thumbnails, whole)
    if moving:
        spectra = spectra - spectra.mean(0) if _moves(thumbnails) else np.full_like(spectra, np.nan)
    return spectra


def _moves(thumbnails: np.ndarray) -> bool:
    return float(_rest(thumbnails.astype(np.float32)).std()) >= _STILL


def _keys(spectra: np.ndarray, table: int) -> np.ndarray:
    """Keys of one table: ``(..., coefficients) -> (...)``; -1 for nan."""
    keys = ((spectra[..., _OF_TABLE[table]] > 0) * _POWERS).sum(-1)
    return np.where(np.isnan(spectra[..., 0]), -1, keys)


def _probes(spectra: np.ndarray, table: int) -> np.ndarray:
    """Keys with every setting of the weakest bits: ``(n, coefficients) -> (n, 2**weak)``."""
    values = spectra[:, _OF_TABLE[table]]
    weakest = np.argsort(np.abs(values), axis=1)[:, :_WEAK]
    flips = np.array(list(itertools.product((0, 1), repeat=_WEAK)), np.int64)  # (2**weak, weak)
    keys = _keys(spectra, table)[:, None]
    return np.where(keys < 0, keys, keys ^ (flips @ _POWERS[weakest][..., None])[..., 0])


# -- comparison ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """A part of a picture: its edges, in `_GRID` ths of the picture's sides."""

    top: int
    bottom: int
    left: int
    right: int

    def cut(self, thumbnails: np.ndarray) -> np.ndarray:
        """That part, stretched to a thumbnail: ``(n, s, s) -> (n, s, s)`` float."""
        return _part(self.top, self.bottom) @ thumbnails @ _part(self.left, self.right).T

    def moved(self, step: int) -> Iterator[Window]:
        """The windows next to this one: an edge, or two opposite ones, moved by `step`."""
        for low, high in ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1)):
            for window in (
                replace(self, top=self.top + low * step, bottom=self.bottom + high * step),
                replace(self, left=self.left + low * step, right=self.right + high * step),
            ):
                edges = (window.top, window.bottom, window.left, window.right)
                if min(edges) >= 0 and max(edges) <= _GRID and window._side >= _GRID // 2:
                    yield window

    @property
    def _side(self) -> int:
        return min(self.bottom - self.top, self.right - self.left)


@functools.lru_cache(maxsize=4096)
def _part(first: int, last: int) -> np.ndarray:
    return _resampling(first / _GRID, (last - first) / _GRID)


@dataclass(frozen=True)
class Match:
    """How much one span is like another."""

    similarity: float
    shift: int
    """Sample i of the first is sample i + shift of the second."""
    shared: int
    """Samples they have in common."""
    moves: bool
    """Whether the movement was compared, or only the picture."""


def _flat(pictures: np.ndarray) -> np.ndarray:
    """Pictures as rows of mean 0 and length 1 (or 0): ``(n, s, s) -> (n, s*s)``."""
    rows = pictures.reshape(len(pictures), -1)
    rows = rows - rows.mean(1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def _rest(pictures: np.ndarray) -> np.ndarray:
    return pictures - pictures.mean(0)


def register(whole: np.ndarray, crop: np.ndarray, start: Window) -> Window:
    """The window of `whole` that looks most like `crop`, both ``(n, s, s)`` and aligned in time, from near `start`."""
    target = _flat(crop)

    def score(window: Window) -> float:
        return float((_flat(window.cut(whole)) * target).sum(1).mean())

    best, reached = start, score(start)
    for step in (4, 2, 1):
        for _ in range(3):
            tried = {window: score(window) for window in best.moved(step)}
            window = max(tried, key=lambda window: tried[window])
            if tried[window] <= reached:
                break
            best, reached = window, tried[window]
    return best


def compare(first: np.ndarray, second: np.ndarray, least: int) -> Match:
    """Compare two spans' thumbnails, float ``(n, s, s)`` and ``(m, s, s)`` of equal windows, at their best shift.

    The correlation of movement is one number over all shared samples and pixels, each less the pixel's mean over those
    samples, so that moments in which nothing moves, of which only noise is left, hardly count.

    Args:
        least: samples that a shift must leave in common.
    """
    n, m = len(first), len(second)
    moves = max(float(_rest(pictures).std()) for pictures in (first, second)) >= _STILL
    picture = _flat(first) @ _flat(second).T
    best = Match(-1.0, 0, 0, moves)
    for shift in range(least - n, m - least + 1):
        rows = np.arange(max(0, -shift), min(n, m - shift))
        similarity = float(picture[rows, rows + shift].mean())
        if moves and similarity > best.similarity:
            one, other = _rest(first[rows]), _rest(second[rows + shift])
            scale = float(np.linalg.norm(one) * np.linalg.norm(other))
            similarity = min(similarity, float((one * other).sum()) / max(scale, 1e-6))
        if similarity > best.similarity:
            best = Match(similarity, shift, len(rows), moves)
    return best


class NearDuplicatesStage:
    """Keeps one of every group of near-copies. Sees the whole run."""

    name = "near_duplicates"
    version = 1
    scope: Literal["source", "run"] = "run"
    measured_with = ("rate",)
    Config = NearDuplicatesConfig

    def __init__(self, config: NearDuplicatesConfig) -> None:
        self.config = config

    def observer(self, source: Source, fps: float) -> Observer | None:
        return Thumbnails(fps, self.config.rate)

    def decide(self, spans: Sequence[Span], signals: Mapping[str, Signals]) -> list[Verdict]:
        if not spans:
            return []
        with tempfile.TemporaryFile() as file:
            return self._decide(spans, *_samples(spans, signals, file))

    def _decide(self, spans: Sequence[Span], taken: list[np.ndarray], pixels: list[int]) -> list[Verdict]:
        candidates = self._candidates(taken)
        verdicts: dict[int, Verdict] = {}
        kept: set[int] = set()
        for number in sorted(range(len(spans)), key=lambda i: (-pixels[i], i)):
            best: tuple[Match, int] | None = None
            for other, shift in candidates.get(number, ()):
                if other not in kept:
                    continue
                match = self._match(taken[number].astype(np.float32), taken[other].astype(np.float32), shift)
                if match is not None and (best is None or match.similarity > best[0].similarity):
                    best = match, other
            verdicts[number] = verdict = self._verdict(spans, number, best)
            if not self._copied(verdict):
                kept.add(number)
        return [verdicts[number] for number in range(len(spans))]

    def _copied(self, verdict: Verdict) -> bool:
        return verdict.value is not None and verdict.value >= self.config.threshold

    def _verdict(self, spans: Sequence[Span], number: int, best: tuple[Match, int] | None) -> Verdict:
        span, limit = spans[number], self.config.threshold
        if best is None:
            return Verdict(span, True, "similarity", 0.0, limit, "no other span looks like it")
        match, other = best
        name = f"{spans[other].source.name} [{spans[other].start}, {spans[other].end}), clip {spans[other].id}"
        what = "picture and movement are" if match.moves else "it stands still, and the picture is"
        if match.similarity >= limit:
            reason = f"{what} those of {name}" if match.moves else f"{what} that of {name}"
            return Verdict(span, not self.config.drop, "similarity", match.similarity, limit, reason, spans[other].id)
        return Verdict(span, True, "similarity", match.similarity, limit, f"most like {name}", spans[other].id)

    def _match(self, this: np.ndarray, that: np.ndarray, shift: int) -> Match | None:
        """Compare two spans' thumbnails, float ``(n, s, s)``, of which sample i and sample i + `shift` may agree."""
        least = max(1, int(np.ceil(self.config.share * len(this))))
        if least > len(that):
            return None
        start = _start(this, that, shift)
        if start is None:
            return None
        rows, shift, window, own = start
        if own:
            this = register(this[rows], that[rows + shift], window).cut(this)
        else:
            that = register(that[rows + shift], this[rows], window).cut(that)
        return compare(this, that, least)

    def _candidates(self, taken: list[np.ndarray]) -> dict[int, list[tuple[int, int]]]:
        """For every span the (other span, shift) of those with most hits."""
        every = max(1, round(self.config.rate / 2))  # crops twice a second; the whole as often as there are thumbnails
        found: dict[tuple[int, int], _Hits] = {}
        for first in range(0, len(taken), _BLOCK):
            block = range(first, min(first + _BLOCK, len(taken)))
            index = [
                _Index([taken[number] for number in block], first, table, moving)
                for table, moving in itertools.product(range(_TABLES), (False, True))
            ]
            for begin in range(0, len(taken), _AT_ONCE):
                asked = range(begin, min(begin + _AT_ONCE, len(taken)))
                for (number, other), hits in _look_up(index, taken, asked, every, self.config.candidates).items():
                    pair, turned = ((number, other), hits) if number < other else ((other, number), hits.turned())
                    found[pair] = found[pair].with_(turned) if pair in found else turned
            found = self._most(found)  # of every block anew, or they would pile up
        likely: dict[int, list[tuple[float, int, int]]] = {}
        for (number, other), hits in found.items():
            likely.setdefault(number, []).append((-hits.total, other, hits.shift))
            likely.setdefault(other, []).append((-hits.total, number, -hits.shift))
        return {
            number: [item[1:] for item in sorted(others)[: self.config.candidates]] for number, others in likely.items()
        }

    def _most(self, found: dict[tuple[int, int], _Hits]) -> dict[tuple[int, int], _Hits]:
        """The pairs that are among those with most hits of either of their spans."""
        of_span: dict[int, list[tuple[float, tuple[int, int]]]] = {}
        for pair, hits in found.items():
            for number in pair:
                of_span.setdefault(number, []).append((-hits.total, pair))
        most = {pair for pairs in of_span.values() for _, pair in sorted(pairs)[: self.config.candidates]}
        return {pair: hits for pair, hits in found.items() if pair in most}


def _start(this: np.ndarray, that: np.ndarray, shift: int) -> tuple[np.ndarray, int, Window, bool] | None:
    """Where registration begins: (samples of this, shift, window, whether the window is of this and not of that).

    The crop, of either, that looks most like the other by its cosine coefficients; None where none does.
    """
    best: tuple[float, tuple[np.ndarray, int, Window, bool] | None] = (_ROUGHLY, None)
    for near in (shift, shift - 1, shift + 1):
        rows = np.arange(max(0, -near), min(len(this), len(that) - near))
        if not len(rows):
            continue
        rows = rows[np.linspace(0, len(rows) - 1, min(_ALIGNED, len(rows))).round().astype(int)]
        for own in (True, False):
            whole, cropped = (that[rows + near], this[rows]) if own else (this[rows], that[rows + near])
            crops, plain = _unit(_spectra(cropped, whole=False)), _unit(_spectra(whole, whole=True))
            scores = (crops * plain).sum(2).mean(0)
            crop = int(scores.argmax())
            if scores[crop] > best[0]:
                edges = [(start, start + scale) for start, scale in (_WINDOWS[at] for at in _PAIRS[crop])]
                window = Window(*(round(_GRID * edge) for pair in edges for edge in pair))
                best = float(scores[crop]), (rows, near, window, own)
    return best[1]


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-6)


@dataclass(frozen=True)
class _Hits:
    """What the look-up of one span's crops among the whole thumbnails of another gave."""

    total: float
    """Sum of the hits' weights."""
    count: float
    """That of the shift with most."""
    shift: int
    """Sample i of the first span is sample i + shift of the second."""

    def turned(self) -> _Hits:
        """Seen from the second span."""
        return replace(self, shift=-self.shift)

    def with_(self, more: _Hits) -> _Hits:
        """Together with those of another look-up."""
        best = max(self, more, key=lambda hits: hits.count)
        return replace(best, total=self.total + more.total)


class _Index:
    """The whole thumbnails of a block of spans, or (`moving`) how they differ from the span's mean, by key."""

    def __init__(self, block: Sequence[np.ndarray], first: int, table: int, moving: bool) -> None:
        self.table, self.moving = table, moving
        keys = np.concatenate(
            [_probes(_described(thumbnails, moving, whole=True)[:, 0], table) for thumbnails in block]
        )
        sizes = [len(thumbnails) for thumbnails in block]
        order = np.argsort(keys.ravel(), kind="stable")
        order = order[np.searchsorted(keys.ravel()[order], 0) :]
        entry = order // keys.shape[1]
        self._keys = keys.ravel()[order]
        self._span = np.repeat(np.arange(first, first + len(block)), sizes)[entry]
        self._sample = np.concatenate([np.arange(size) for size in sizes])[entry]

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Every hit of keys ``(q,)``: number of the key, span, sample, weight: 1 / the hits of that key.

        So what looks like many spans, as the pictures of one fixed camera do, says little of each of them. Keys that
        hit a crowd hit nothing.
        """
        low, high = (np.searchsorted(self._keys, keys, side) for side in ("left", "right"))
        counts = np.where(high - low <= _CROWDED, high - low, 0)
        asked = np.repeat(np.arange(len(keys)), counts)
        at = np.arange(len(asked)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(low, counts)
        return asked, self._span[at], self._sample[at], np.repeat(1 / np.maximum(counts, 1), counts)


def _look_up(
    index: Sequence[_Index], taken: list[np.ndarray], asked: range, every: int, most: int
) -> dict[tuple[int, int], _Hits]:
    """For every span of `asked`, the `most` others with most hits of its crops: (span, other) -> the hits."""
    sizes = [len(taken[one][::every]) for one in asked]
    number = np.repeat(np.arange(asked.start, asked.stop), sizes)
    sample = np.concatenate([np.arange(size) * every for size in sizes])
    spectra = {
        moving: np.concatenate([_described(taken[one], moving, whole=False)[::every] for one in asked])
        for moving in (False, True)
    }
    columns: list[list[np.ndarray]] = []
    weights: list[np.ndarray] = []
    for table in index:
        query, other, at, weight = table.find(_keys(spectra[table.moving], table.table).ravel())
        row = query // len(_PAIRS)
        strange = number[row] != other
        columns.append([column[strange] for column in (number[row], other, at - sample[row])])
        weights.append(weight[strange])
    hits, which = np.unique(np.concatenate(columns, axis=1), axis=1, return_inverse=True)
    found: dict[tuple[int, int], _Hits] = {}
    if not hits.size:
        return found
    counts = np.bincount(which.ravel(), np.concatenate(weights))
    starts = np.flatnonzero(np.r_[True, (np.diff(hits[:2], axis=1) != 0).any(0)])  # of each (span, other)
    totals = np.add.reduceat(counts, starts)
    ends = np.r_[starts[1:], len(counts)]
    order = np.lexsort((hits[1, starts], -totals, hits[0, starts]))  # by span, then by hits
    rank = np.arange(len(order)) - np.searchsorted(hits[0, starts][order], hits[0, starts][order])
    for pair in order[rank < most]:
        best = starts[pair] + int(np.argmax(counts[starts[pair] : ends[pair]]))
        this, other, shift = (int(value) for value in hits[:, best])
        found[this, other] = _Hits(float(totals[pair]), float(counts[best]), shift)
    return found


def _samples(
    spans: Sequence[Span], signals: Mapping[str, Signals], file: IO[bytes]
) -> tuple[list[np.ndarray], list[int]]:
    """The thumbnails within each span (at least one), kept in a file, and the pixels of its frames."""
    sizes: list[int] = []
    pixels: list[int] = []
    for span in spans:
        found = signals[span.source.key]
        first, last = (int(edge) for edge in np.searchsorted(found["at"], (span.start, span.end)))
        first = min(first, max(0, last - 1))
        thumbnails = found["thumbnails"][first : max(last, first + 1)]
        file.write(thumbnails.tobytes())
        sizes.append(len(thumbnails))
        pixels.append(int(found["pixels"]))
    file.flush()
    every = np.memmap(file, np.uint8, "r", shape=(sum(sizes), SIDE, SIDE))
    return np.split(every, np.cumsum(sizes)[:-1]), pixels
