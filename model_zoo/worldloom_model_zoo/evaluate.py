"""How good a world model is on clips it never saw: against repeating the last frame, and against itself misled.

What is measured, on windows of ``context + horizon`` frames of the clips:

- Every figure compares 8-bit frames, as a viewer gets them, over the predicted frames only.
- PSNR is ``10 log10(255^2 / MSE)``, MSE over the pixels and channels of all predicted frames of all windows, as
  torchmetrics' ``PeakSignalNoiseRatio`` has it, for the model, the baseline and the tokenizer alike. The headline
  figures (gain, action sensitivity, curves) are of this kind.
- ``psnr_per_frame`` is the mean of every frame's own PSNR, its MSE floored at 1/12, the error of rounding, so that two
  equal frames give 58.9 dB and not infinity. Frames in which nothing moves weigh heavily in it, and favour repetition.
- SSIM (Wang et al. 2004; torchmetrics, 11-pixel Gaussian, borders reflected) is the mean over the same frames.
- The baseline repeats the last context frame.
- Action sensitivity is the PSNR with the true actions minus the PSNR with another clip's actions after the context
  (context actions stay true; noise is the same). A model that ignores its actions scores 0.
- The tokenizer's reconstruction of the true frames bounds what its latents can express.
- Flicker is the mean change of the error from frame to frame (`worldloom.compare.flicker`), the last given frame
  included; 0 where motion is exact.

On request (`suite`): Fréchet distance, action following, drift over long rollouts, physics against the simulator.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from worldloom import media
from worldloom.compare import flicker, mse, psnr, ssim
from worldloom.errors import WorldloomError
from worldloom.order import spread
from worldloom.schema import Clip
from worldloom.shards import Dataset, open_dataset

if TYPE_CHECKING:
    import torch

    from worldloom.progress import Report
    from worldloom_model_zoo.action_following import FollowingResult
    from worldloom_model_zoo.drift import DriftResult
    from worldloom_model_zoo.frechet import FrechetResult
    from worldloom_model_zoo.physics import PhysicsResult
    from worldloom_model_zoo.predict.pipeline import PredictPipeline

MODEL, BASELINE, SHUFFLED, TOKENIZER = "model", "repeat last frame", "model, shuffled actions", "tokenizer"


DERIVED = ("gain", "gain_per_frame", "action_sensitivity", "action_sensitivity_per_frame", "horizons")
MEASURES = ("frechet", "following", "drift", "physics")
_VERDICTS = ("stable", "stable_as_trained")  # of a drift, beside its fields


@dataclass(frozen=True)
class EvalConfig:
    """What is measured."""

    horizon: int = 8
    """Frames to predict."""
    context: int = 9
    """Frames given before them; 1 + temporal ratio * k."""
    clips: int = 128
    """Windows to test, spread evenly over the dataset's non-overlapping ones; 0 for all."""
    batch_size: int = 8
    """Windows at a time."""
    seed: int = 0
    """Of the noise and of which clip's actions are swapped."""
    videos: int = 12
    """Windows kept for the report."""
    steps: int | None = None
    """Sampler steps; unset takes the model's."""
    guidance_scale: float | None = None
    """Guidance; unset takes the model's."""
    reference: str = ""
    """Dataset of real clips that the following compare with and learn from, e.g. the training data; empty keeps every
    other clip of the tested one for that."""
    frechet: bool = False
    """Measure the Fréchet video distance."""
    following: bool = False
    """Measure whether actions can be read off the made videos."""
    drift: int = 0
    """Frames of the long rollouts whose drift is measured; 0 for none."""
    physics: str = ""
    """Gymnasium id of the simulator to hold the model against, or ``data`` for that of the dataset; empty for none."""
    probe_steps: int = 600
    """Gradient steps of the small networks that read actions and positions off frames."""

    def __post_init__(self) -> None:
        if self.horizon < 1 or self.context < 1 or self.batch_size < 1 or min(self.clips, self.videos, self.drift) < 0:
            raise WorldloomError("horizon, context and batch_size must be positive", got=self)


@dataclass(frozen=True)
class Window:
    """One test case: frames ``[start, start + length)`` of a sample of the dataset."""

    sample: int
    """Number of the sample in the dataset."""
    start: int
    """First frame."""
    clip: str
    """Id of the clip."""


@dataclass(frozen=True)
class Example:
    """Frames of one window, uint8 ``(T, H, W, 3)``, context included."""

    caption: str
    truth: np.ndarray
    model: np.ndarray
    baseline: np.ndarray


@dataclass(frozen=True)
class Horizon:
    """Figures of the first so many predicted frames."""

    frames: int
    psnr: float
    """dB of the mean error of the model over these frames."""
    gain: float
    """Model minus baseline, dB."""
    gain_at: float
    """The same of the last of these frames alone."""
    action_sensitivity: float | None
    """True minus shuffled actions, dB over these frames; None where there are no actions to shuffle."""


@dataclass(frozen=True)
class EvalResult:
    """What was measured; figures are means over the windows' predicted frames."""

    psnr: dict[str, float]
    """dB of the mean error, for `MODEL`, `BASELINE`, `TOKENIZER`, and `SHUFFLED` where there are actions."""
    psnr_per_frame: dict[str, float]
    """dB, mean over frames, for the same."""
    ssim: dict[str, float]
    """For the same."""
    curves: dict[str, list[float]]
    """dB of the mean error of each frame ahead, 1 to horizon, for the same."""
    windows: int
    """Test cases."""
    clips: int
    """Clips they come from."""
    frames_per_second: float
    """Predicted frames per second of wall-clock time."""
    notes: tuple[str, ...]
    """What a reader should know, one sentence each."""
    config: EvalConfig
    """What was asked."""
    model: dict[str, Any]
    """Name and digests of the model."""
    dataset: dict[str, Any]
    """Folder and id of the data."""
    per_window: list[dict[str, Any]] = field(default_factory=list)
    """Clip, first frame, and the PSNR of each kind."""
    examples: tuple[Example, ...] = ()
    """For a report; not written to JSON."""
    flicker: dict[str, float] = field(default_factory=dict)
    """Grey levels, for the same kinds as `psnr`."""
    frechet: FrechetResult | None = None
    """Where it was asked for, as the three below."""
    following: FollowingResult | None = None
    drift: DriftResult | None = None
    physics: PhysicsResult | None = None

    @property
    def horizons(self) -> list[Horizon]:
        """Figures over the first 1, 2, 4, 8, ... frames, and over all."""
        count = len(self.curves[MODEL])
        error = {kind: 255.0**2 / 10 ** (np.array(curve) / 10) for kind, curve in self.curves.items()}
        steps = [2**power for power in range(count.bit_length()) if 2**power < count]
        return [self._first(error, frames) for frames in [*steps, count]]

    def _first(self, error: dict[str, np.ndarray], frames: int) -> Horizon:
        over = {kind: float(psnr(values[:frames].mean())) for kind, values in error.items()}
        sensitivity = over[MODEL] - over[SHUFFLED] if SHUFFLED in over else None
        at = self.curves[MODEL][frames - 1] - self.curves[BASELINE][frames - 1]
        return Horizon(frames, over[MODEL], over[MODEL] - over[BASELINE], at, sensitivity)

    @property
    def gain(self) -> float:
        """Model minus baseline, dB of `psnr`."""
        return self.psnr[MODEL] - self.psnr[BASELINE]

    @property
    def gain_per_frame(self) -> float:
        """Model minus baseline, dB of `psnr_per_frame`."""
        return self.psnr_per_frame[MODEL] - self.psnr_per_frame[BASELINE]

    @property
    def action_sensitivity(self) -> float | None:
        """True minus shuffled actions, dB of `psnr`; None where there are no actions to shuffle."""
        return self.psnr[MODEL] - self.psnr[SHUFFLED] if SHUFFLED in self.psnr else None

    @property
    def action_sensitivity_per_frame(self) -> float | None:
        """The same, dB of `psnr_per_frame`."""
        return self.psnr_per_frame[MODEL] - self.psnr_per_frame[SHUFFLED] if SHUFFLED in self.psnr else None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the frames, JSON-ready."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in ("examples", *MEASURES)]
        plain = {name: getattr(self, name) for name in (*names, *DERIVED)}
        plain["horizons"] = [dataclasses.asdict(horizon) for horizon in self.horizons]
        for name in MEASURES:
            measured = getattr(self, name)
            if measured is not None:  # without frames
                bare = dataclasses.replace(measured, shown=()) if hasattr(measured, "shown") else measured
                plain[name] = {k: v for k, v in dataclasses.asdict(bare).items() if k != "shown"}
                plain[name] |= {key: getattr(measured, key) for key in _VERDICTS} if name == "drift" else {}
        return {**plain, "config": dataclasses.asdict(self.config), "notes": list(self.notes)}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> EvalResult:
        """The reverse of `to_dict`, without frames."""
        values = {key: value for key, value in plain.items() if key not in DERIVED}
        values |= {"config": EvalConfig(**plain["config"]), "notes": tuple(plain["notes"])}
        for name in set(MEASURES) & set(values):
            values[name] = _measure(name, values[name])
        return cls(**values)


def _measure(name: str, plain: dict[str, Any]) -> Any:
    """A result of a measure from its JSON."""
    from worldloom_model_zoo.action_following import FollowingResult
    from worldloom_model_zoo.drift import DriftResult
    from worldloom_model_zoo.frechet import FrechetResult
    from worldloom_model_zoo.physics import PhysicsResult

    readers: dict[str, Callable[[dict[str, Any]], Any]] = {
        "frechet": lambda found: FrechetResult(**{**found, "notes": tuple(found["notes"])}),
        "following": lambda found: FollowingResult(**found),
        "drift": lambda found: DriftResult.from_dict({k: v for k, v in found.items() if k not in _VERDICTS}),
        "physics": PhysicsResult.from_dict,
    }
    return readers[name](plain)


# -- measuring -------------------------------------------------------------------------------------------------------


def evaluate(
    pipeline: PredictPipeline,
    dataset: Dataset | str | Path,
    config: EvalConfig | None = None,
    *,
    select: Callable[[Clip], bool] | None = None,
    progress: Report | None = None,
) -> EvalResult:
    """Measure a pipeline on a dataset of clips.

    Args:
        select: which clips are tested, e.g. those that training held out; None for all.
        progress: called with (done, in all), and of other work than the windows with what it is.

    Raises:
        WorldloomError: lengths that the tokenizer cannot take, no clip long enough, actions the model does not know,
            an optional package missing, or a measure that cannot be taken of this model on this data.
    """
    import torch

    from worldloom_model_zoo.suite import Batch, Suite

    config = config or EvalConfig()
    dataset = dataset if isinstance(dataset, Dataset) else open_dataset(dataset)
    _check(pipeline, dataset, config)
    windows = plan(dataset, config, select)
    actions, notes = _actions(pipeline, dataset, windows, config)
    swapped = None
    if actions is not None:
        order, note = derangement([window.clip for window in windows], config.seed)
        if order is None:
            notes.append("Action sensitivity needs two test windows; there is one.")
        else:
            swapped = actions.clone()
            swapped[:, config.context - 1 :] = actions[order, config.context - 1 :]
            notes += [note] if note else []
    given = {"steps": config.steps, "guidance_scale": config.guidance_scale}
    sampler = dataclasses.replace(pipeline.sampler, **{k: v for k, v in given.items() if v is not None})

    suite = Suite(pipeline, dataset, windows, config, actions, progress)
    tally = _Tally()
    shown = set(spread(len(windows), config.videos))
    examples: list[Example] = []
    length, sampling = config.context + config.horizon, 0.0
    for first, truth in _batches(dataset, windows, length, pipeline, config.batch_size):
        rows = slice(first, first + len(truth))
        video = media.to_tensor(truth).to(pipeline.device)
        start = video[:, :, : config.context]

        def predict(chosen: torch.Tensor | None, start: Any = start, first: int = first) -> np.ndarray:
            # Row i of a batch draws from seed + i, so a window's noise does not depend on the size of a batch.
            made = pipeline.generate_video(start, chosen, length, seed=config.seed + first, sampler=sampler)
            return media.to_frames(made)

        began = time.monotonic()
        made = predict(None if actions is None else actions[rows])
        sampling += time.monotonic() - began
        frames = {MODEL: made, BASELINE: _repeat_last(truth, config.context)}
        if swapped is not None:
            frames[SHUFFLED] = predict(swapped[rows])
        with torch.no_grad():
            frames[TOKENIZER] = media.to_frames(pipeline.tokenizer.decode(pipeline.tokenizer.encode(video)))
        tally.add(truth, frames, config.context)
        rows_of = [None if given is None else given[rows].numpy() for given in (actions, swapped)]
        suite.add(Batch(range(first, first + len(truth)), truth, frames, *rows_of))
        for row in sorted(shown & set(range(first, first + len(truth)))):
            i, window = row - first, windows[row]
            one = tally.of_window(row)
            caption = f"{window.clip[:12]} @ {window.start}: model {one[MODEL]:.1f} dB, repeat {one[BASELINE]:.1f} dB"
            examples.append(Example(caption, truth[i], frames[MODEL][i], frames[BASELINE][i]))
        if progress is not None:
            progress(first + len(truth), len(windows))

    if exact := tally.exact(BASELINE):
        notes.append(f"{exact:.1%} of the predicted frames equal the last context frame and give the baseline 58.9 dB.")
    measured = suite.results()
    return EvalResult(
        psnr=tally.psnr(),
        psnr_per_frame=tally.psnr_per_frame(),
        ssim=tally.ssim(),
        curves=tally.curves(),
        windows=len(windows),
        clips=len({window.clip for window in windows}),
        frames_per_second=len(windows) * config.horizon / max(sampling, 1e-9),
        notes=(*notes, *suite.notes),
        config=config,
        model=identity(pipeline),
        dataset={"path": str(dataset.root), "id": dataset.index.id, "samples": len(dataset)},
        per_window=[{"clip": w.clip, "start": w.start, **tally.of_window(i)} for i, w in enumerate(windows)],
        examples=tuple(examples),
        flicker=tally.flicker(),
        **measured,
    )


def plan(dataset: Dataset, config: EvalConfig, select: Callable[[Clip], bool] | None = None) -> list[Window]:
    """The windows to test, in reading order: non-overlapping ones of every clip, thinned evenly to ``config.clips``.

    Raises:
        WorldloomError: no clip is long enough.
    """
    length = config.context + config.horizon
    found: list[Window] = []
    longest = 0
    for number, clip in enumerate(dataset.clips()):
        if select is None or select(clip):
            longest = max(longest, clip.frames)
            found += [Window(number, start, clip.id) for start in range(0, clip.frames - length + 1, length)]
    if not found:
        raise WorldloomError(
            f"no clip has the {length} frames of a test window",
            got=f"{dataset.root}: the longest has {longest}" if longest else f"{dataset.root}: no clip was selected",
            do="give longer clips, or lower the horizon or the context",
        )
    if config.clips and len(found) > config.clips:
        found = [found[i] for i in spread(len(found), config.clips)]
    return found


def derangement(clips: Sequence[str], seed: int) -> tuple[list[int] | None, str]:
    """For each window the one whose actions it gets: never itself, and a window of another clip where that can be.

    The windows are laid out clip by clip, clips and windows in a seeded order, and shifted by the longest clip: an
    index then always lands in another clip, unless one clip has more than half of all windows.

    Returns:
        The order (None for a single window), and a note where a clip had to lend to itself.
    """
    count = len(clips)
    if count < 2:
        return None, ""
    random = np.random.default_rng(seed)
    names = sorted(set(clips))
    rank = dict(zip(names, random.permutation(len(names)), strict=True))
    inside = random.permutation(count)
    layout = sorted(range(count), key=lambda i: (rank[clips[i]], inside[i]))
    most = max(clips.count(name) for name in names)
    shift = most if most < count else 1
    order = [0] * count
    for place, index in enumerate(layout):
        order[index] = layout[(place + shift) % count]
    own = sum(clips[i] == clips[j] for i, j in enumerate(order))
    return order, f"{own} of {count} windows got shuffled actions from elsewhere in their own clip." if own else ""


def _check(pipeline: PredictPipeline, dataset: Dataset, config: EvalConfig) -> None:
    if dataset.index.kind != "clips":
        raise WorldloomError(
            "evaluation compares pixels", got=f"{dataset.root} holds latents", do="give the dataset of clips"
        )
    ratio = pipeline.frames_per_step
    if (config.context - 1) % ratio or config.horizon % ratio:
        raise WorldloomError(
            f"context must be 1 + {ratio}k frames and horizon {ratio}k",
            got=f"context {config.context}, horizon {config.horizon}",
            do=f"use context {max((config.context - 1) // ratio, 0) * ratio + 1}, horizon "
            f"{max(config.horizon // ratio, 1) * ratio}",
        )


def _actions(
    pipeline: PredictPipeline, dataset: Dataset, windows: Sequence[Window], config: EvalConfig
) -> tuple[torch.Tensor | None, list[str]]:
    """Aligned actions of all windows ``(n, context + horizon - 1, a)``, or None and why."""
    import torch

    if not dataset.index.action_dim:
        return None, ["The dataset carries no actions: the model ran with the null action."]
    if not pipeline.action_dim:
        return None, ["The model takes no actions; those of the dataset were left out."]
    length, rows = config.context + config.horizon - 1, []
    sample, number = None, -1
    for window in windows:
        if window.sample != number:
            sample, number = dataset.load(window.sample), window.sample
        assert sample is not None
        if "actions" not in sample.arrays:
            return None, ["Some clips carry no actions: the model ran with the null action."]
        names = sample.clip.metadata.get("action_names") or dataset.index.metadata.get("action_names") or ()
        part = torch.from_numpy(sample.arrays["actions"][window.start : window.start + length])[None]
        rows.append(pipeline.align(part, tuple(str(name) for name in names)))
    return torch.cat(rows), []


def _batches(
    dataset: Dataset, windows: Sequence[Window], length: int, pipeline: PredictPipeline, batch_size: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first window, frames ``(b, T, H, W, 3)``) of successive batches."""
    size = (pipeline.config.height, pipeline.config.width)
    held: list[np.ndarray] = []
    pixels, number, first = None, -1, 0
    for window in windows:
        if window.sample != number:
            video = dataset.load(window.sample).video
            assert video is not None
            pixels, number = media.read_frames(video, size=size), window.sample
        assert pixels is not None
        part = pixels[window.start : window.start + length]
        if len(part) != length:
            raise WorldloomError(
                "a clip has fewer frames than its record says", got=window.clip, do="make the dataset again"
            )
        held.append(part)
        if len(held) == batch_size:
            yield first, np.stack(held)
            first, held = first + len(held), []
    if held:
        yield first, np.stack(held)


def _repeat_last(truth: np.ndarray, context: int) -> np.ndarray:
    repeated = truth.copy()
    repeated[:, context:] = truth[:, context - 1 : context]
    return repeated


class _Tally:
    """Errors of every kind of prediction, frame by frame."""

    def __init__(self) -> None:
        self._mse: dict[str, list[np.ndarray]] = {}
        self._similarity: dict[str, list[np.ndarray]] = {}
        self._flicker: dict[str, list[np.ndarray]] = {}

    def add(self, truth: np.ndarray, made: dict[str, np.ndarray], context: int) -> None:
        """A batch: uint8 ``(b, context + horizon, H, W, 3)``; frames after the context count."""
        for kind, frames in made.items():
            self._mse.setdefault(kind, []).extend(mse(frames[:, context:], truth[:, context:]))
            self._similarity.setdefault(kind, []).extend(ssim(frames[:, context:], truth[:, context:]))
            self._flicker.setdefault(kind, []).extend(flicker(frames[:, context - 1 :], truth[:, context - 1 :]))

    def of_window(self, row: int) -> dict[str, float]:
        """PSNR of the mean error of one window."""
        return {kind: float(psnr(errors[row].mean())) for kind, errors in self._mse.items()}

    def psnr(self) -> dict[str, float]:
        return {kind: float(psnr(np.stack(errors).mean())) for kind, errors in self._mse.items()}

    def psnr_per_frame(self) -> dict[str, float]:
        return {kind: float(psnr(np.stack(errors)).mean()) for kind, errors in self._mse.items()}

    def curves(self) -> dict[str, list[float]]:
        return {kind: psnr(np.stack(errors).mean(axis=0)).tolist() for kind, errors in self._mse.items()}

    def ssim(self) -> dict[str, float]:
        return {kind: float(np.mean(values)) for kind, values in self._similarity.items()}

    def flicker(self) -> dict[str, float]:
        return {kind: float(np.mean(values)) for kind, values in self._flicker.items()}

    def exact(self, kind: str) -> float:
        """Share of frames without any error."""
        return float((np.stack(self._mse[kind]) == 0).mean())


def identity(pipeline: PredictPipeline) -> dict[str, Any]:
    """Names and digests of what is measured."""
    facts = pipeline.provenance()
    return {"model": facts["model"], "tokenizer": facts["tokenizer"], "sampler": facts["sampler"]}
