"""What `worldloom eval` measures on request, besides errors: Fréchet distance, action following, drift, physics.

Each needs real clips to compare with or to learn from, the reference: a dataset of its own (the training data, say), or
every other clip of the tested one, which then are not tested by these measures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from worldloom.errors import WorldloomError
from worldloom.order import spread
from worldloom.shards import Dataset, open_dataset
from worldloom_model_zoo.starts import StartPool

if TYPE_CHECKING:
    from worldloom.progress import Report
    from worldloom_model_zoo.evaluate import EvalConfig, Window
    from worldloom_model_zoo.predict.pipeline import PredictPipeline

REAL = "real clips"
SAME = "data"
"""As ``physics``: the simulator that the tested dataset was recorded in."""
WORLDS = 24
"""Worlds that are stepped to measure drift, at most."""
FITTED_CLIPS = 60
"""Reference clips that probes are fitted to, at most; spread evenly."""
RANGE_CLIPS, RANGE_FRAMES = 300, 6400
"""Reference clips, and frames of all of them together, that ranges are taken from, at most. Frames of one clip are
alike: the ends of a range need many clips rather than many frames."""
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Batch:
    """Test windows and what was made of them."""

    rows: range
    """Numbers of the windows."""
    truth: np.ndarray
    """uint8 ``(b, context + horizon, H, W, 3)``."""
    made: dict[str, np.ndarray]
    """The same of each kind of prediction."""
    actions: np.ndarray | None
    """``(b, context + horizon - 1, a)`` in the model's order."""
    swapped: np.ndarray | None
    """The same with another clip's after the context."""


class Reference:
    """Real clips at the model's size, with their actions in its order.

    Args:
        source: the reference dataset; None takes every other clip of the tested one.
    """

    def __init__(self, pipeline: PredictPipeline, tested: Dataset, source: Dataset | None) -> None:
        self.pipeline = pipeline
        self.pool = StartPool(source or tested, (pipeline.config.height, pipeline.config.width))
        numbers = list(self.pool.samples())
        self.own = source is None
        self.numbers = numbers[1::2] if self.own else numbers
        if not self.numbers:
            raise WorldloomError(
                "there are no real clips to compare with", got=f"{len(numbers)} clip", do="give --reference"
            )

    def tests(self, sample: int) -> bool:
        """True if a clip of the tested dataset is not among the reference."""
        return not self.own or sample % 2 == 0

    def clips(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Frames uint8 ``(T, H, W, 3)`` and actions ``(T-1, a)`` of some clips, spread evenly."""
        for which in spread(len(self.numbers), FITTED_CLIPS):
            clip = self.pool.whole(self.numbers[which])
            actions = None
            if clip.actions is not None and self.pipeline.action_dim:
                given = torch.from_numpy(clip.actions)[None]
                actions = self.pipeline.align(given, self.pool.action_names)[0].numpy()
            yield clip.frames, actions

    def pieces(self, clips: int, frames: int) -> Iterator[np.ndarray]:
        """A span of each of at most ``clips`` clips, ``frames`` frames together: uint8 ``(t, H, W, 3)``.

        Where in its clip a span lies is spread evenly from the first frame to the last, for clips may change as they
        go on: an agent that explores at first, say, stands before a wall later.
        """
        picked = spread(len(self.numbers), clips)
        for place, number in enumerate(self.numbers[which] for which in picked):
            total = self.pool.lengths[number]
            length = min(total, frames // len(picked))
            at = round((total - length) * (place * _GOLDEN % 1))  # multiples of it, modulo 1, fill [0, 1) evenly
            yield self.pool.at(number, at, length).frames

    def spans(self, length: int, count: int) -> Iterator[np.ndarray]:
        """At most ``count`` non-overlapping spans of ``length`` frames, spread evenly over all clips."""
        lengths = self.pool.lengths
        found = [(n, at) for n in self.numbers for at in range(0, lengths[n] - length + 1, length)]
        for which in spread(len(found), count):
            number, at = found[which]
            yield self.pool.at(number, at, length).frames


class Suite:
    """The measures that a configuration asks for; empty if it asks for none.

    Raises:
        WorldloomError: one that cannot be taken: no actions, no reference, an optional package missing.
    """

    def __init__(
        self,
        pipeline: PredictPipeline,
        dataset: Dataset,
        windows: Sequence[Window],
        config: EvalConfig,
        actions: torch.Tensor | None,
        progress: Report | None,
    ) -> None:
        self.pipeline, self.dataset, self.windows, self.config = pipeline, dataset, windows, config
        self.actions, self.progress = actions, progress
        self.notes: list[str] = []
        self.frechet = self.following = None
        if not (config.frechet or config.following or config.drift):
            return
        source = open_dataset(config.reference) if config.reference else None
        self.reference = Reference(pipeline, dataset, source)
        if self.reference.own:
            self.notes.append(
                "Without a reference dataset, every other clip was kept as real clips to compare with: Fréchet "
                "distance, action following and drift are of the others."
            )
        if config.frechet:
            from worldloom_model_zoo.frechet import FrameFeatures, FrechetMeter

            if config.horizon < 2 or sum(self.reference.tests(window.sample) for window in windows) < 2:
                raise WorldloomError("the Fréchet distance needs two windows of two frames or more", got=len(windows))
            self.frechet = FrechetMeter(FrameFeatures(pipeline.device))
        if config.following:
            self.following = self._follow()

    def _follow(self) -> Any:
        from worldloom_model_zoo.action_following import AFTER, BEFORE, FollowingMeter, InverseDynamics
        from worldloom_model_zoo.probes import ProbeConfig

        if self.actions is None:
            raise WorldloomError(
                "action following needs a model and a dataset with actions",
                got=f"{self.pipeline.action_dim} of the model, {self.dataset.index.action_dim} of the dataset",
            )
        if self.config.horizon < BEFORE + AFTER + 1:
            raise WorldloomError(
                f"actions are read off {BEFORE + AFTER + 1} frames in a row", got=self.config.horizon,
                do="raise the horizon",
            )  # fmt: skip
        clips = [(frames, actions) for frames, actions in self.reference.clips() if actions is not None]
        probe = ProbeConfig(steps=self.config.probe_steps, seed=self.config.seed)
        return FollowingMeter(InverseDynamics.fit(self.pipeline, clips, probe, self._named("action reader")))

    def add(self, batch: Batch) -> None:
        """Take in a batch of predictions."""
        from worldloom_model_zoo.evaluate import BASELINE, SHUFFLED

        if self.frechet is None and self.following is None:
            return
        kept = [i for i, row in enumerate(batch.rows) if self.reference.tests(self.windows[row].sample)]
        if not kept:
            return
        context = self.config.context
        videos = {REAL: batch.truth[kept, context:]}
        videos |= {kind: made[kept, context:] for kind, made in batch.made.items()}
        for kind, made in videos.items():
            if self.frechet is not None and kind != SHUFFLED:
                self.frechet.add(kind, made)
            given = batch.swapped if kind == SHUFFLED else batch.actions
            if self.following is not None and given is not None and kind != BASELINE:
                self.following.add(kind, made, given[kept, context:])

    def results(self) -> dict[str, Any]:
        """Fields of an `EvalResult`: those that were asked for."""
        found: dict[str, Any] = {}
        if self.frechet is not None:
            from worldloom_model_zoo.frechet import video_features

            count = sum(map(len, self.frechet.made[REAL]))
            spans = list(self.reference.spans(self.config.horizon, max(count, 2)))
            if len(spans) < 2:
                raise WorldloomError("the reference clips are shorter than the horizon", do="give longer ones")
            real = np.concatenate([video_features(self.frechet.features, span[None]) for span in spans])
            found["frechet"] = self.frechet.result(real, self.config.horizon)
        if self.following is not None:
            found["following"] = self.following.result()
        if self.config.drift:
            found["drift"] = self._drift()
        if self.config.physics:
            found["physics"] = self._physics()
        return found

    def _drift(self) -> Any:
        from worldloom_model_zoo.drift import measure_drift

        chosen = [i for i, window in enumerate(self.windows) if self.reference.tests(window.sample)]
        pool = StartPool(self.dataset, self.reference.pool.size)
        context = self.config.context
        starts = []
        for i in (chosen[which] for which in spread(len(chosen), WORLDS)):
            frames = pool.at(self.windows[i].sample, self.windows[i].start, context).frames
            starts.append((frames, None if self.actions is None else self.actions[i, : context - 1].numpy()))
        recorded = [actions for _, actions in self.reference.clips() if actions is not None and len(actions)]
        if self.pipeline.action_dim and not recorded:
            raise WorldloomError("drift steps the model with recorded actions, and the reference carries none")
        return measure_drift(
            self.pipeline, starts, list(self.reference.pieces(RANGE_CLIPS, RANGE_FRAMES)), recorded, self.config.drift,
            seed=self.config.seed, progress=self.progress,
        )  # fmt: skip

    def _physics(self) -> Any:
        from worldloom_model_zoo.physics import PhysicsConfig, measure_physics
        from worldloom_model_zoo.probes import ProbeConfig

        facts = self.dataset.clip(0).metadata
        env_id = self.config.physics
        if env_id == SAME:
            env_id = str(facts.get("env_id") or "")
            if not env_id:
                raise WorldloomError(
                    "the dataset does not say which simulator it was recorded in", do="give it: --physics ENV_ID"
                )
        skip: Any = facts.get("frame_skip") if facts.get("env_id") == env_id else None
        probe = ProbeConfig(steps=self.config.probe_steps, seed=self.config.seed)
        config = PhysicsConfig(horizon=self.config.horizon, frame_skip=skip, probe=probe)
        return measure_physics(self.pipeline, env_id, config, progress=self.progress)

    def _named(self, name: str) -> Any:
        """Progress of a part."""
        if self.progress is None:
            return None
        shown = self.progress
        return lambda done, total: shown(done, total, name)


def reference_id(path: str | Path) -> str:
    """Id of a reference dataset; empty for none."""
    return open_dataset(path).index.id if path else ""
