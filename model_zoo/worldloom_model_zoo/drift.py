"""Drift: what becomes of a world that is stepped for a long time, held against real frames.

Worlds are started from real clips and stepped with actions that really occurred (spans of recorded actions, joined).
Statistics of every frame are compared with their range over real frames, the central 99 % of them:

- brightness, mean of the pixels, and contrast, their standard deviation, in grey levels;
- sharpness: mean magnitude of the brightness gradient, grey levels a pixel; blur lowers it, noise raises it;
- colourfulness: mean absolute difference of the colour channels from their mean;
- clipped: share of pixel values at 0 or 255;
- motion: mean absolute change from the frame before, in grey levels;
- distance: of EfficientNet-Lite0 features to those of the nearest real frame. Real frames are held against frames of
  other clips. Left out, with a note, where the encoder's weights are not installed.

A model in the latents of a tokenizer was trained on frames as that tokenizer shows them, and can show no others. So the
range of the same real frames through the tokenizer, the training range, is reported beside that of the frames.

A statistic is inside if at least `INSIDE` of the frames of the last stretch lie in its range. A world that freezes in
front of a plain wall can be inside in all of them: so variety, how much the frames of different worlds differ relative
to frames of different real clips, is reported beside them; near 0 all worlds have become one.

Letters: n worlds, t frames, H W pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from worldloom import media
from worldloom.errors import WorldloomError
from worldloom_model_zoo.frechet import FrameFeatures

if TYPE_CHECKING:
    from worldloom.progress import Report
    from worldloom_model_zoo.predict.pipeline import PredictPipeline

INSIDE = 0.95
"""Share of frames in range from which on a statistic counts as inside; real frames have 0.99."""
ALIKE = 0.3
"""Variety below which worlds are said to have become one; two halves of real clips have about 1."""
STRETCHES = 5
CURVE = 100
"""Points of a curve, at most."""
NEIGHBOURS = 600
"""Real frames, about, among which the nearest is sought, and that variety is relative to."""
_LOOKS = 10  # frames of each stretch and world that are encoded for their distance, and compared for variety


@dataclass(frozen=True)
class Statistic:
    """One statistic along a rollout."""

    low: float
    """Lower end of the range of real frames."""
    high: float
    """Upper end."""
    real: float
    """Mean over real frames."""
    means: list[float]
    """Mean over the worlds and frames of each stretch."""
    inside: list[float]
    """Share of the frames of each stretch that lie in the range."""
    curve: list[tuple[int, float]]
    """(frame, mean over the worlds)."""
    trained: tuple[float, float]
    """The range of the real frames as the model's tokenizer shows them."""
    inside_trained: list[float]
    """Share of the frames of each stretch that lie in it."""

    @property
    def stable(self) -> bool:
        """True if the last stretch is inside the range of real frames."""
        return self.inside[-1] >= INSIDE

    @property
    def stable_as_trained(self) -> bool:
        """True if the last stretch is inside the range of real frames as the model's tokenizer shows them."""
        return self.inside_trained[-1] >= INSIDE


@dataclass(frozen=True)
class DriftResult:
    """Long rollouts against real frames."""

    frames: int
    """Frames of a rollout after its start."""
    worlds: int
    """Rollouts."""
    stretches: list[tuple[int, int]]
    """First and last frame of each stretch, counted from 1."""
    statistics: dict[str, Statistic]
    variety: list[float]
    """Mean difference between worlds at one time over that between frames of different real clips, for each stretch."""
    real_frames: int
    """Frames that the ranges come from."""
    frames_per_second: float
    """Generated frames of all worlds per second."""
    notes: tuple[str, ...] = ()
    shown: tuple[np.ndarray, ...] = field(default=(), compare=False)
    """Some rollouts uint8 ``(t, H, W, 3)`` for a report; not written to JSON."""

    @property
    def stable(self) -> bool:
        """True if every statistic is inside its range in the last stretch."""
        return all(statistic.stable for statistic in self.statistics.values())

    @property
    def stable_as_trained(self) -> bool:
        """True if every statistic is inside its training range in the last stretch."""
        return all(statistic.stable_as_trained for statistic in self.statistics.values())

    @property
    def alike(self) -> bool:
        """True if the worlds of the last stretch differ by less than `ALIKE` of what real clips do."""
        return bool(self.variety) and self.variety[-1] < ALIKE

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> DriftResult:
        """The reverse of ``dataclasses.asdict`` without frames."""
        statistics = {
            name: Statistic(
                **{**values, "curve": [tuple(at) for at in values["curve"]], "trained": tuple(values["trained"])}
            )
            for name, values in plain["statistics"].items()
        }
        stretches = [(first, last) for first, last in plain["stretches"]]
        return cls(**{**plain, "statistics": statistics, "stretches": stretches, "notes": tuple(plain["notes"])})


def frame_statistics(frames: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of each frame of a video uint8 ``(t, H, W, 3)``, each ``(t,)``; the first frame's motion is NaN."""
    x = frames.astype(np.float32)
    luma = x.mean(-1)
    down, right = np.diff(luma, axis=1)[:, :, :-1], np.diff(luma, axis=2)[:, :-1]
    motion = np.full(len(frames), np.nan, np.float32)
    motion[1:] = np.abs(np.diff(x, axis=0)).mean((1, 2, 3))
    return {
        "brightness": luma.mean((1, 2)),
        "contrast": x.std((1, 2, 3)),
        "sharpness": np.hypot(down, right).mean((1, 2)),
        "colourfulness": np.abs(x - luma[..., None]).mean((1, 2, 3)),
        "clipped": np.isin(frames, (0, 255)).mean((1, 2, 3)),
        "motion": motion,
    }


def measure_drift(
    pipeline: PredictPipeline,
    starts: Sequence[tuple[np.ndarray, np.ndarray | None]],
    reference: Sequence[np.ndarray],
    recorded: Sequence[np.ndarray],
    frames: int,
    *,
    seed: int = 0,
    shown: int = 4,
    distance: bool = True,
    progress: Report | None = None,
) -> DriftResult:
    """Step worlds for ``frames`` frames and hold them against real ones.

    Args:
        starts: of each world uint8 ``(T, H, W, 3)``, and its actions ``(T-1, a)`` in the model's order or None.
        reference: spans of real clips uint8 ``(t, H, W, 3)``, two or more, from all parts of their clips. The ranges
            are taken over all of their frames.
        recorded: actions of real clips ``(t-1, a)`` in the model's order, from which those of the rollout are made;
            empty for a model without actions.
        seed: of the noise and the actions.
        shown: rollouts kept for the report.
        distance: measure the distance to the nearest real frame, which takes most of the time besides stepping.

    Raises:
        WorldloomError: fewer frames than a step has, fewer than two real clips.
    """
    import time

    import torch

    ratio = pipeline.frames_per_step
    steps = -(-frames // ratio)
    if frames < STRETCHES * ratio or len(reference) < 2 or not starts:
        raise WorldloomError(
            f"drift needs at least {STRETCHES * ratio} frames and two real clips", got=(frames, len(reference))
        )
    random = np.random.default_rng(seed)
    video = media.to_tensor(np.stack([start for start, _ in starts]))
    known = [actions for _, actions in starts if actions is not None]
    given = torch.from_numpy(np.stack(known)) if len(known) == len(starts) and video.shape[2] > 1 else None
    actions = None
    if recorded:
        rows = [_joined(recorded, steps * ratio, random) for _ in starts]
        actions = torch.from_numpy(np.stack(rows))
    else:
        actions = torch.zeros(len(starts), steps * ratio, pipeline.action_dim)
    parts = [media.to_frames(pipeline.reset(video, given, seed=seed))[:, -1:]]
    began = time.monotonic()
    for step in range(steps):
        parts.append(media.to_frames(pipeline.step(actions[:, step * ratio : (step + 1) * ratio])))
        if progress is not None:
            progress(step + 1, steps, "drift")
    seconds = time.monotonic() - began
    made = np.concatenate(parts, axis=1)[:, : frames + 1]  # (n, 1 + frames, H, W, 3)

    every = max(1, frames // (STRETCHES * _LOOKS))
    notes: list[str] = []
    tables = [frame_statistics(clip) for clip in reference]
    rolled = [frame_statistics(world) for world in made]
    ranges = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    seen = _through_tokenizer(pipeline, reference)
    seen_tables = [frame_statistics(clip) for clip in seen]
    trained = {name: np.concatenate([table[name] for table in seen_tables]) for name in ranges}
    values = {name: np.stack([table[name][1:] for table in rolled]) for name in ranges}  # (n, frames)
    try:
        if distance:
            features = FrameFeatures(pipeline.device)
            ranges["distance"], trained["distance"], values["distance"] = _distances(
                features, reference, seen, made[:, 1:], every
            )
    except WorldloomError as error:
        notes.append(f"The distance to real frames was not measured: {error.what}.")
    edges = np.linspace(0, frames, STRETCHES + 1).round().astype(int)
    spans = [(int(first), int(last)) for first, last in itertools.pairwise(edges)]
    statistics = {name: _statistic(ranges[name], trained[name], values[name], spans, name) for name in ranges}
    apart = _between(_thinned(reference))
    variety = [
        _between([world[1 + first : 1 + last : every] for world in made], at_once=True) / max(apart, 1e-9)
        for first, last in spans
    ]
    return DriftResult(
        frames=frames,
        worlds=len(starts),
        stretches=[(first + 1, last) for first, last in spans],
        statistics=statistics,
        variety=variety if len(starts) > 1 else [],
        real_frames=sum(map(len, reference)),
        frames_per_second=len(starts) * steps * ratio / max(seconds, 1e-9),
        notes=tuple(notes),
        shown=tuple(made[:shown]),
    )


def _through_tokenizer(pipeline: PredictPipeline, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Clips as the model's tokenizer shows them, cut to a length that it takes."""
    import torch

    tokenizer = pipeline.tokenizer
    ratio = tokenizer.temporal_ratio
    seen = []
    with torch.inference_mode():
        for clip in clips:
            video = media.to_tensor(clip[: 1 + (len(clip) - 1) // ratio * ratio]).to(pipeline.device)
            seen.append(media.to_frames(tokenizer.decode(tokenizer.encode(video)))[0])
    return seen


def _statistic(
    real: np.ndarray, trained: np.ndarray, made: np.ndarray, spans: Sequence[tuple[int, int]], name: str
) -> Statistic:
    """`made` ``(n, frames)``; what was not measured of a frame is NaN."""

    def range_of(values: np.ndarray) -> tuple[float, float]:
        low, high = (float(x) for x in np.quantile(values[np.isfinite(values)], (0.005, 0.995)))
        return (0.0 if name == "distance" else low), high  # nearer is not worse

    def shares(low: float, high: float) -> list[float]:
        inside = np.where(np.isfinite(made), (made >= low - 1e-6) & (made <= high + 1e-6), np.nan)
        return [float(np.nanmean(inside[:, first:last])) for first, last in spans]

    low, high = range_of(real)
    measured = np.flatnonzero(np.isfinite(made).all(0))
    picked = measured[:: max(1, -(-len(measured) // CURVE))]
    return Statistic(
        low,
        high,
        float(np.nanmean(real)),
        [float(np.nanmean(made[:, first:last])) for first, last in spans],
        shares(low, high),
        [(int(frame) + 1, float(made[:, frame].mean())) for frame in picked],
        range_of(trained),
        shares(*range_of(trained)),
    )


def _distances(
    features: FrameFeatures, real: Sequence[np.ndarray], seen: Sequence[np.ndarray], made: np.ndarray, every: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distance to the nearest real frame of other clips: of real frames, of those a tokenizer shows, of made ones."""
    thin, thin_seen = _thinned(real), _thinned(seen)
    owner, owner_seen = (np.repeat(np.arange(len(clips)), [len(clip) for clip in clips]) for clips in (thin, thin_seen))
    known = features(np.concatenate(thin))
    between, between_seen = _pairwise(known, known), _pairwise(features(np.concatenate(thin_seen)), known)
    between[owner[:, None] == owner] = np.inf
    between_seen[owner_seen[:, None] == owner] = np.inf
    n, t = made.shape[:2]
    at = np.arange(0, t, every)
    found = np.full((n, t), np.nan)
    found[:, at] = _pairwise(features(made[:, at].reshape(-1, *made.shape[2:])), known).min(1).reshape(n, len(at))
    return between.min(1), between_seen.min(1), found


def _pairwise(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distances ``(n, m)``."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    squared = np.square(a).sum(1)[:, None] + np.square(b).sum(1) - 2 * a @ b.T
    return np.sqrt(squared.clip(0))


def _between(groups: Sequence[np.ndarray], *, at_once: bool = False) -> float:
    """Mean root-mean-square difference, in grey levels, of frames of different groups, seen at a coarse size.

    `at_once` compares frames of one place in their groups alone.
    """
    small = [_coarse(group).reshape(len(group), -1) for group in groups]
    owner = np.repeat(np.arange(len(small)), [len(group) for group in small])
    place = np.concatenate([np.arange(len(group)) for group in small])
    x = np.concatenate(small)
    distances = _pairwise(x, x) / np.sqrt(x.shape[1])
    compared = (owner[:, None] != owner) & ((place[:, None] == place) | (not at_once))
    return float(distances[compared].mean()) if compared.any() else 0.0


def _coarse(frames: np.ndarray) -> np.ndarray:
    """Means over blocks, about 16 on each side: ``(t, h, w, 3)``."""
    block_h, block_w = (max(1, side // 16) for side in frames.shape[1:3])
    h, w = frames.shape[1] // block_h, frames.shape[2] // block_w
    cut = frames[:, : h * block_h, : w * block_w].astype(np.float32)
    return cut.reshape(len(frames), h, block_h, w, block_w, 3).mean((2, 4))


def _thinned(clips: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Every so many frames of each clip, so that about `NEIGHBOURS` are left."""
    every = max(1, -(-sum(map(len, clips)) // NEIGHBOURS))
    return [clip[::every] for clip in clips]


def _joined(recorded: Sequence[np.ndarray], length: int, random: np.random.Generator) -> np.ndarray:
    """Actions ``(length, a)``: spans of real ones, joined."""
    parts: list[np.ndarray] = []
    count = 0
    while count < length:
        clip = recorded[int(random.integers(len(recorded)))]
        part = clip[int(random.integers(max(len(clip) // 2, 1))) :]
        parts.append(part)
        count += len(part)
    return np.concatenate(parts)[:length].astype(np.float32)
