"""Does text change the world? A classifier that real clips taught names what generated ones show.

Each dataset is one kind of world. The classifier is held to real clips first: what it makes of those that it never
saw bounds what the generated ones can reach. It learns every clip three times, as it is, blurred, and through the
model's tokenizer, so that it goes by what is shown and not by how sharp it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from worldloom import media
from worldloom.errors import WorldloomError
from worldloom.order import spread
from worldloom.shards import Dataset, open_dataset

if TYPE_CHECKING:
    import torch

    from worldloom_model_zoo.predict.pipeline import PredictPipeline


@dataclass(frozen=True)
class PromptConfig:
    """What is measured."""

    samples: int = 10
    """Videos generated for each world; its captions take turns."""
    frames: int = 17
    """Frames of a video, generated or real, 1 + ratio k."""
    clips: int = 40
    """Real clips of each world that teach the classifier, at most."""
    seed: int = 0
    """Of the noise."""


@dataclass(frozen=True)
class PromptResult:
    """What was measured."""

    worlds: tuple[str, ...]
    """Names of the datasets' folders, in the order of the rows below."""
    real: float
    """Share of real clips, of every fourth that was kept from the classifier, that it names."""
    generated: float
    """Share of generated videos that it takes for the world they were prompted with."""
    per_world: dict[str, float]
    """The same of each world."""
    confusion: list[list[int]]
    """Rows: prompted; columns: taken for."""
    prompts: dict[str, list[str]]
    """The captions that were used."""
    videos: tuple[np.ndarray, ...] = ()
    """The first generated video of each world, uint8 ``(T, H, W, 3)``."""


def measure(
    pipeline: PredictPipeline,
    datasets: Sequence[str | Path],
    config: PromptConfig | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> PromptResult:
    """Prompt a model with the captions of each dataset and let the classifier say which dataset it shows.

    Args:
        datasets: clips with captions, one dataset for each world, two at least.
        progress: called with (videos done, videos in all).

    Raises:
        WorldloomError: fewer than two datasets, one without captions or with too few clips, a model without text.
    """
    import torch

    from worldloom_tokenizers import load_semantic

    config = config or PromptConfig()
    if len(datasets) < 2:
        raise WorldloomError("prompts are told apart between worlds", got=datasets, do="give two datasets or more")
    opened = [open_dataset(root) for root in datasets]
    captions = [_captions(dataset) for dataset in opened]
    pipeline.encode_text([words[0] for words in captions])  # refuses a model without text before anything is computed
    encoder = load_semantic("efficientnet-lite0", device=str(pipeline.device))
    size = (pipeline.config.height, pipeline.config.width)

    def features(frames: np.ndarray) -> torch.Tensor:
        with torch.no_grad():
            return encoder.embed(media.to_tensor(frames[:: max(1, len(frames) // 4)]).to(pipeline.device))[0].cpu()

    taught, labels, kept, answers = [], [], [], []
    for number, dataset in enumerate(opened):
        for i, frames in enumerate(_real(dataset, config, size)):
            if i % 4 == 0:
                kept.append(features(frames))
                answers.append(number)
                continue
            video = media.to_tensor(frames).to(pipeline.device)
            with torch.no_grad():
                again = pipeline.tokenizer.decode(pipeline.tokenizer.encode(video))
            taught += [features(frames), features(_blurred(frames)), features(media.to_frames(again)[0])]
            labels += [number] * 3
    classify = _classifier(torch.stack(taught), torch.tensor(labels), len(opened))
    named = classify(torch.stack(kept))
    real = float((named == torch.tensor(answers)).float().mean())

    confusion = [[0] * len(opened) for _ in opened]
    videos = []
    for number, words in enumerate(captions):
        for i in range(config.samples):
            text = [words[i % len(words)]]
            seed = config.seed + number * config.samples + i
            made = media.to_frames(pipeline.generate_video(None, None, config.frames, text=text, seed=seed))[0]
            confusion[number][int(classify(features(made)[None]))] += 1
            if i == 0:
                videos.append(made)
            if progress is not None:
                progress(number * config.samples + i + 1, len(opened) * config.samples)
    names = tuple(Path(root).name for root in datasets)
    hits = {name: confusion[i][i] / config.samples for i, name in enumerate(names)}
    overall = sum(confusion[i][i] for i in range(len(opened))) / (len(opened) * config.samples)
    prompts = dict(zip(names, captions, strict=True))
    return PromptResult(names, real, overall, hits, confusion, prompts, tuple(videos))


def _captions(dataset: Dataset) -> list[str]:
    found = sorted({clip.caption for clip in dataset.clips() if clip.caption})
    if not found:
        raise WorldloomError("no clip of this dataset has a caption", got=str(dataset.root), do="caption it first")
    return found


def _real(dataset: Dataset, config: PromptConfig, size: tuple[int, int]) -> list[np.ndarray]:
    """Beginnings of clips, spread over the dataset."""
    whole = [i for i, clip in enumerate(dataset.clips()) if clip.frames >= config.frames]
    if len(whole) < 4:
        raise WorldloomError(
            f"a classifier needs at least 4 clips of {config.frames} frames of each world",
            got=f"{dataset.root}: {len(whole)}",
        )
    chosen = [whole[i] for i in spread(len(whole), config.clips)]
    found = []
    for index in chosen:
        video = dataset.load(index).video
        assert video is not None
        found.append(media.read_frames(video, size=size)[: config.frames])
    return found


def _blurred(frames: np.ndarray) -> np.ndarray:
    """At a quarter of the resolution."""
    height, width = frames.shape[1:3]
    return np.stack([media.resize(media.resize(frame, (height // 4, width // 4)), (height, width)) for frame in frames])


def _classifier(x: torch.Tensor, labels: torch.Tensor, classes: int) -> Callable[[torch.Tensor], Any]:
    """Multinomial logistic regression with a little weight decay on standardised features ``(n, d)``."""
    import torch

    mean, std = x.mean(0), x.std(0).clamp_min(1e-3)
    weight = torch.zeros(x.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")
    inputs = (x - mean) / std

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = torch.nn.functional.cross_entropy(inputs @ weight + bias, labels) + 1e-3 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)  # pyright: ignore[reportArgumentType]
    return lambda y: ((y - mean) / std @ weight.detach() + bias.detach()).argmax(dim=1)
