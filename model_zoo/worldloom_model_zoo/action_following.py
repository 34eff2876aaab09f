"""Do made videos do what they were told? An inverse dynamics model reads the actions back off them.

A small network (`probes`) is fitted to real clips: four frames in a row -> the action between the second and the third,
for what is done shows in how motion changes. Half of its examples are seen through the model's tokenizer, so that
softness alone does not count as disobedience. What it finds in real clips that it did not see is the most that can be
expected of made ones. A model that heeds its actions keeps them readable, also those of another clip; one that ignores
them falls to what guessing gives.

The measure is the share of actions that are read right where every action is one of a choices (chance: the share of the
commonest one), and R^2, mean over the components, where actions are numbers (chance: 0).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from worldloom import media
from worldloom.errors import WorldloomError
from worldloom_model_zoo.probes import ProbeConfig, Reader, fit_probe
from worldloom_model_zoo.starts import one_hot

if TYPE_CHECKING:
    from worldloom_model_zoo.predict.pipeline import PredictPipeline

EXAMPLES = 12_000
"""Most actions that an inverse dynamics model is fitted to."""
BEFORE, AFTER = 1, 2
"""Frames t - BEFORE to t + AFTER tell the action that leads from frame t to t + 1."""


@dataclass(frozen=True)
class FollowingResult:
    """How well actions are read off videos."""

    measure: str
    """``accuracy`` or ``R^2``."""
    score: dict[str, float]
    """Kind of video -> how well the actions it was made with are read."""
    chance: float
    """What guessing gives."""
    by_action: dict[str, dict[str, float]]
    """Action -> kind -> share read right (choices), or R^2 (numbers)."""
    actions: int
    """Actions read, of each kind."""
    fitted: int
    """Actions of real clips that the reader was fitted to."""


class InverseDynamics:
    """Frames -> the actions between them.

    Args:
        reader: the fitted probe.
        choices: True where an action is one of a choices.
        names: of the components of an action.
        fitted: actions it was fitted to.
    """

    def __init__(self, reader: Reader, choices: bool, names: Sequence[str], fitted: int) -> None:
        self.reader, self.choices, self.names, self.fitted = reader, choices, tuple(names), fitted

    @classmethod
    def fit(
        cls,
        pipeline: PredictPipeline,
        clips: Sequence[tuple[np.ndarray, np.ndarray]],
        config: ProbeConfig | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> InverseDynamics:
        """Fit to real clips: frames uint8 ``(T, H, W, 3)`` and their actions ``(T-1, a)`` in the model's order.

        Raises:
            WorldloomError: no clips.
        """
        if not clips:
            raise WorldloomError("there are no real clips with actions to learn them from", do="give --reference")
        kept, index, targets, count = [], [], [], 0
        budget = max(EXAMPLES // len(clips), 1) + BEFORE + AFTER
        for number, (frames, actions) in enumerate(clips):
            part = through_tokenizer(pipeline, frames[:budget]) if number % 2 else frames[:budget]
            windows, done = _windows(len(part))
            index.append(count + windows)
            targets.append(actions[done])
            kept.append(part)
            count += len(part)
        known = np.concatenate(targets)
        choices = one_hot(known)
        reader = fit_probe(
            np.concatenate(kept), np.concatenate(index), known.argmax(1) if choices else known, config,
            device=pipeline.device, progress=progress,
        )  # fmt: skip
        names = pipeline.config.action_names or [f"component {i}" for i in range(known.shape[1])]
        return cls(reader, choices, names, len(known))

    def __call__(self, videos: np.ndarray) -> np.ndarray:
        """uint8 ``(n, T, H, W, 3)`` -> what was done: classes ``(n, T-3)`` or numbers ``(n, T-3, a)``.

        The first is the action that leads from frame 1 to frame 2.
        """
        n, t = videos.shape[:2]
        windows, done = _windows(t)
        index = (np.arange(n)[:, None, None] * t + windows).reshape(-1, windows.shape[1])
        found = self.reader(videos.reshape(n * t, *videos.shape[2:]), index)
        return found.reshape(n, len(done), *found.shape[1:])


def _windows(frames: int) -> tuple[np.ndarray, np.ndarray]:
    """The frames that tell each readable action of a video ``(n, 4)``, and which actions these are ``(n,)``."""
    done = np.arange(BEFORE, frames - AFTER)
    return done[:, None] + np.arange(-BEFORE, AFTER + 1), done


def through_tokenizer(pipeline: PredictPipeline, frames: np.ndarray) -> np.ndarray:
    """Frames as the tokenizer gives them back, uint8 ``(T', H, W, 3)``, T' the most of 1 + r k that T holds."""
    import torch

    length = (len(frames) - 1) // pipeline.frames_per_step * pipeline.frames_per_step + 1
    with torch.no_grad():
        video = media.to_tensor(frames[None, :length]).to(pipeline.device)
        return media.to_frames(pipeline.tokenizer.decode(pipeline.tokenizer.encode(video)))[0]


@dataclass
class FollowingMeter:
    """Collects what is read off videos and what was done in them."""

    dynamics: InverseDynamics
    read: dict[str, list[np.ndarray]] = field(default_factory=dict)
    done: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def add(self, kind: str, videos: np.ndarray, actions: np.ndarray) -> None:
        """Videos uint8 ``(n, T, H, W, 3)``, and the actions that they were made with ``(n, T-1, a)``."""
        self.read.setdefault(kind, []).append(self.dynamics(videos))
        self.done.setdefault(kind, []).append(actions[:, _windows(videos.shape[1])[1]])

    def result(self) -> FollowingResult:
        """Shares read right, or R^2."""
        score: dict[str, float] = {}
        by_action: dict[str, dict[str, float]] = {}
        chance, count = 0.0, 0
        for kind in self.read:
            read, done = np.concatenate(self.read[kind]), np.concatenate(self.done[kind])
            count = int(np.prod(done.shape[:2]))
            if self.dynamics.choices:
                labels = done.argmax(-1)
                right = read == labels
                score[kind] = float(right.mean())
                present = np.bincount(labels.reshape(-1), minlength=done.shape[-1])
                chance = max(chance, float(present.max() / present.sum()))
                each = {i: float(right[labels == i].mean()) for i in np.flatnonzero(present)}
            else:
                each = _r2(read, done)
                score[kind] = float(np.mean(list(each.values()))) if each else 0.0
            for i, value in each.items():
                by_action.setdefault(self.dynamics.names[i], {})[kind] = value
        measure = "accuracy" if self.dynamics.choices else "R^2"
        return FollowingResult(measure, score, chance, by_action, count, self.dynamics.fitted)


def _r2(read: np.ndarray, done: np.ndarray) -> dict[Any, float]:
    """R^2 of each component that varies."""
    x, y = (z.reshape(-1, done.shape[-1]).astype(np.float64) for z in (read, done))
    total = np.square(y - y.mean(0)).sum(0)
    left = np.square(x - y).sum(0)
    return {i: float(1 - left[i] / total[i]) for i in range(y.shape[1]) if total[i] > 1e-9}
