"""What a request conditions on, read from files: an image, a video, actions."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from worldloom import media
from worldloom.errors import WorldloomError
from worldloom.schema import GenerationRequest
from worldloom.specs import IMAGES
from worldloom_model_zoo.predict.config import PredictCheckpoint


def read_conditioning(
    request: GenerationRequest, config: PredictCheckpoint, ratio: int
) -> tuple[Tensor | None, Tensor | None]:
    """The start ``(1, 3, T0, H, W)`` and the actions ``(1, n, a)`` of a request; a text alone needs no start.

    A video start takes its last ``1 + ratio k`` frames, at most ``sampler.context_frames``. Actions count from its
    first frame; where there are only as many as new frames, the given frames get the null action's zeros before them.

    Raises:
        WorldloomError: no image or video, both, text for a model without text, actions that do not fit.
    """
    if request.prompt and not config.text.name:
        raise WorldloomError(
            "this checkpoint has no text encoder" if config.model.context_dim else "this model takes no text",
            got=request.prompt,
            do="leave --prompt out, or use a text-conditioned model",
        )
    if (request.image and request.video) or not (request.image or request.video or request.prompt):
        raise WorldloomError(
            "a start is needed: an image or a video, one of them" + (", or a text alone" if config.text.name else ""),
            got=f"image={request.image!r}, video={request.video!r}",
            do="give --image FILE or --video FILE" + (", or only --prompt TEXT" if config.text.name else ""),
        )
    size = (config.height, config.width)
    start = None
    if request.image:
        start = media.to_tensor(media.fit(media.read_image(request.image)[None], size))
    elif request.video:
        start = media.to_tensor(_last_frames(request.video, size, config.sampler.context_frames, ratio))
    actions = None
    if request.actions:
        actions = read_actions(Path(request.actions), config)
        known = start.shape[2] - 1 if start is not None else 0
        if request.frames is not None and known and actions.shape[1] == request.frames - 1 - known:
            actions = torch.cat([actions.new_zeros(1, known, actions.shape[2]), actions], dim=1)
    return start, actions


def read_views(request: GenerationRequest, config: PredictCheckpoint, ratio: int) -> Tensor:
    """The starts of all cameras of a request, ``(1, v, 3, T0, H, W)``; each as `read_conditioning` reads one.

    Raises:
        WorldloomError: a model of fewer views, text or actions that it does not take, starts of different lengths.
    """
    known = config.model.views
    if len(request.views) > known:
        raise WorldloomError(
            f"this model knows {known} views" if known else "this model knows one view only",
            got=f"{len(request.views)} views",
            do="give one start for each of its cameras, in order" if known else "give --image or --video",
        )
    if request.image or request.video or request.actions:
        raise WorldloomError(
            "the views are the start, and take no actions",
            got=f"image={request.image!r}, video={request.video!r}, actions={request.actions!r}",
            do="leave --image, --video and --actions out",
        )
    starts = []
    for path in request.views:
        picture = Path(path).suffix.lower() in IMAGES
        alone = replace(request, views=(), image=path if picture else None, video=None if picture else path)
        start, _ = read_conditioning(alone, config, ratio)
        assert start is not None
        starts.append(start)
    lengths = [start.shape[2] for start in starts]
    if len(set(lengths)) > 1:
        raise WorldloomError(
            "the views' starts have different lengths", got=f"{lengths} frames", do="cut the videos to one length"
        )
    return torch.stack(starts, dim=1)


def _last_frames(path: str, size: tuple[int, int], limit: int, ratio: int) -> np.ndarray:
    window: list[np.ndarray] = []
    for frame in media.iter_frames(path, size=size):
        window.append(frame)
        del window[:-limit]
    length = (len(window) - 1) // ratio * ratio + 1
    return np.stack(window[-length:])


def read_actions(path: Path, config: PredictCheckpoint) -> Tensor:
    """Actions ``(1, n, a)`` from .npy, .json (a list of rows, or of action names), or .csv (a header names columns).

    Raises:
        WorldloomError: a missing file, another format, rows of another size than the model's.
    """
    if not path.is_file():
        raise WorldloomError("there is no such file of actions", got=str(path))
    names = config.action_names
    try:
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
        elif path.suffix == ".json":
            rows = json.loads(path.read_text())
            if rows and isinstance(rows[0], str):
                return _one_hot(rows, config)
            array = np.asarray(rows, dtype=np.float32)
        elif path.suffix == ".csv":
            with path.open(newline="") as file:
                rows = list(csv.reader(file))
            if rows and not _is_number(rows[0][0]):
                names, rows = tuple(rows[0]), rows[1:]
            array = np.asarray(rows, dtype=np.float32)
        else:
            raise WorldloomError("actions are read from .npy, .json or .csv", got=path.name)
    except (ValueError, TypeError, IndexError) as error:
        raise WorldloomError(f"the actions cannot be read: {error}", got=str(path)) from error
    if array.ndim != 2 or not len(array) or not np.isfinite(array).all():
        raise WorldloomError(
            "actions are finite numbers (frames - 1, action_dim)", got=f"shape {array.shape} in {path}"
        )
    actions = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))[None]
    return align_actions(actions, names, config.action_names, config.model.action_dim)


def _one_hot(rows: Sequence[str], config: PredictCheckpoint) -> Tensor:
    unknown = sorted(set(rows) - set(config.action_names))
    if unknown:
        raise WorldloomError(
            "the model knows no such action", got=unknown[0], do=f"use {', '.join(config.action_names) or 'numbers'}"
        )
    index = torch.tensor([config.action_names.index(row) for row in rows])
    return torch.nn.functional.one_hot(index, len(config.action_names)).float()[None]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def align_actions(actions: Tensor, names: Sequence[str], model_names: Sequence[str], action_dim: int) -> Tensor:
    """Actions ``(b, n, k)`` in the order and size a model knows, ``(b, n, action_dim)``.

    Where both sides name their components, these are matched by name, and a component the data lacks is zero. Without
    names only an equal size fits.

    Raises:
        WorldloomError: a component the model does not know, or another size without names.
    """
    if not action_dim:
        raise WorldloomError("this model takes no actions", got=tuple(actions.shape), do="leave them out")
    if not names or not model_names or tuple(names) == tuple(model_names):
        if actions.shape[-1] != action_dim:
            raise WorldloomError(
                "the actions have another size than the model's",
                got=actions.shape[-1],
                do=f"give {action_dim} numbers a step{': ' + ', '.join(model_names) if model_names else ''}",
            )
        return actions
    unknown = [name for name in names if name not in model_names]
    if unknown or actions.shape[-1] != len(names):
        raise WorldloomError(
            "the model does not know these actions",
            got=f"{', '.join(names)} ({actions.shape[-1]} numbers a step)",
            do=f"it knows {', '.join(model_names)}; fine-tune it on data with these actions first",
        )
    aligned = actions.new_zeros(*actions.shape[:-1], action_dim)
    aligned[..., [list(model_names).index(name) for name in names]] = actions
    return aligned
