"""What the recipes that train on clips share: decoded frames, windows of them, pictures and PSNR."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldloom.errors import WorldloomError
from worldloom.order import spread
from worldloom.progress import progress
from worldloom_finetune import data
from worldloom_finetune.config import FinetuneConfig
from worldloom_tokenizers.codec import VideoCodec


def refuse_lora(config: FinetuneConfig) -> None:
    """Refuse adapters, which these recipes do not train."""
    if config.lora.rank:
        raise WorldloomError("a tokenizer is trained whole", got=f"lora.rank = {config.lora.rank}", do="use 0")


def open_bank(request: Any, config: FinetuneConfig) -> tuple[data.Joined, data.FrameBank]:
    """The datasets of clips that a request names, separated by commas, and their frames, decoded once.

    Raises:
        WorldloomError: a dataset that holds something else.
    """
    from worldloom.shards import open_dataset

    parts = [open_dataset(root) for root in request.data.split(",")]
    for part in parts:
        if part.index.kind != "clips":
            raise WorldloomError("a tokenizer is trained on clips", got=f"{part.root} holds {part.index.kind}")
    dataset = data.Joined(parts)
    with progress("decoding clips", quiet=request.quiet) as shown:
        bank = data.FrameBank.open(dataset, config.data.size, Path(request.out) / "cache", shown)
    return dataset, bank


def open_windows(
    bank: data.FrameBank, config: FinetuneConfig, tokenizer: VideoCodec
) -> tuple[data.ClipItems, data.ClipItems]:
    """Windows for training and for validation, of a length and a size that the tokenizer takes.

    Raises:
        WorldloomError: no clip is long enough, or the length or the size does not fit.
    """
    ratio, edge = tokenizer.temporal_ratio, tokenizer.spatial_ratio
    length = config.data.frames or 1 + 2 * ratio
    if (length - 1) % ratio:
        raise WorldloomError(f"data.frames must be 1 + {ratio} k", got=length)
    train, val = data.split([clip.id for clip in bank.clips], config.data.val_fraction)
    seed, stride, crop = config.trainer.seed, config.data.stride, config.data.crop
    training = data.ClipItems(bank, train, length, seed, jitter=True, stride=stride, crop=crop)
    if not len(training):
        raise WorldloomError(
            "no clip is long enough for a training window",
            got=f"data.frames = {length}, the longest clip has {max((shape[0] for shape in bank.shapes), default=0)}",
            do="lower data.frames",
        )
    size = training.item(0, 0).shape[1:3]
    if size[0] % edge or size[1] % edge:
        raise WorldloomError(
            f"height and width of the frames must be multiples of {edge}", got=size, do="set data.size or data.crop"
        )
    return training, data.ClipItems(bank, val, length, seed, jitter=False, crop=crop)


def contact_sheet(items: data.ClipItems, device: torch.device, again: Callable[[Tensor], Tensor]) -> np.ndarray:
    """Three windows, each above what ``again`` makes of it: uint8 ``(h, w, 3)``."""
    from worldloom import media

    rows: list[np.ndarray] = []
    for index in spread(len(items), 3):
        frames = items.item(0, index)
        made = again(items.collate([frames]).to(device)).clamp(-1, 1)
        rows += [frames, media.to_frames(made.cpu())[0]]
    return media.contact_sheet(rows)


def psnr(made: Tensor, video: Tensor) -> list[float]:
    """PSNR in dB (peak-to-peak 2) of every frame of videos ``(b, 3, T, H, W)``."""
    error = (made - video).square().mean(dim=(1, 3, 4))
    return (10 * torch.log10(4 / error.clamp_min(1e-12))).flatten().tolist()
