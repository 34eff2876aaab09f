"""Recipe "preview-decoder": a small decoder of a tokenizer's latents, distilled from the tokenizer on clips."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from worldloom import config as configs
from worldloom.errors import WorldloomError
from worldloom.order import spread
from worldloom_finetune import data
from worldloom_finetune.clips import contact_sheet, open_bank, open_windows, psnr, refuse_lora
from worldloom_finetune.config import FinetuneConfig
from worldloom_finetune.export import rounded
from worldloom_finetune.noise import normal
from worldloom_finetune.reconstruction import FrameLossConfig, finite, frame_loss, perceptual_distance
from worldloom_tokenizers.checkpoint import load_tokenizer
from worldloom_tokenizers.codec import VideoCodec
from worldloom_tokenizers.config import PreviewConfig
from worldloom_tokenizers.preview import PreviewCheckpoint, PreviewDecoder, Teacher

_FIRST_WINDOWS = 64  # windows from which the linear map starts
_HELD_OUT_WINDOWS = 128  # held-out windows that the figures are of
_SIZES = ("latent_channels", "temporal_ratio", "spatial_ratio")


@dataclass(frozen=True)
class PreviewObjective(FrameLossConfig):
    """What a preview decoder is trained for; a weight of 0 switches its term off."""

    target: Literal["teacher", "frames"] = "teacher"
    """What its frames should be: those that the tokenizer decodes from the same latents, or those that were encoded."""
    latent_noise: float = 0.05
    """Standard deviation of noise added to the latents: previews are mostly of latents that a model made."""


@dataclass(frozen=True)
class PreviewTraining(FinetuneConfig):
    """Configuration of the recipe "preview-decoder"."""

    objective: PreviewObjective = field(default_factory=PreviewObjective)
    """What the loss is made of."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `PreviewConfig` that differ from its defaults, apart from those that the tokenizer decides."""


class PreviewJob:
    """See `worldloom_finetune.module.Job`. The tokenizer is frozen and no part of the trained module."""

    config_class: ClassVar[type[PreviewTraining]] = PreviewTraining
    kind: ClassVar[str] = "preview"

    def __init__(
        self,
        config: PreviewTraining,
        model: PreviewDecoder,
        teacher: VideoCodec,
        train: data.ClipItems,
        val: data.ClipItems,
        digests: Mapping[str, str],
        inputs: tuple[str, ...],
    ) -> None:
        self.config, self.model, self.train, self.val = config, model, train, val
        self.digests, self.inputs = digests, inputs
        self.unused = False
        self._teacher = teacher.requires_grad_(False).eval()
        self._perceptual = perceptual_distance(config.objective)

    @classmethod
    def prepare(cls, request: Any, config: PreviewTraining) -> None:
        """Decode the clips once."""
        open_bank(request, config)

    @classmethod
    def open(cls, request: Any, config: PreviewTraining) -> PreviewJob:
        """Model, tokenizer and data of a run; ``request.model`` is the tokenizer.

        Raises:
            WorldloomError: no clips, clips that are too short, an unknown tokenizer, or sizes that are not its own.
        """
        refuse_lora(config)
        dataset, bank = open_bank(request, config)
        teacher = load_tokenizer(request.model)
        name = str(Path(request.model).resolve()) if Path(request.model).is_dir() else request.model
        given = sorted(set(config.model) & set(_SIZES))
        if given:
            raise WorldloomError("these follow from the tokenizer", got=f"model.{given[0]}", do="leave them out")
        sizes = {size: getattr(teacher, size) for size in _SIZES}
        model = PreviewDecoder(
            configs.load(PreviewConfig, base={**config.model, **sizes}), Teacher(name, teacher.fingerprint)
        )
        train, val = open_windows(bank, config, teacher)
        first = train.collate([train.item(0, i) for i in spread(len(train), _FIRST_WINDOWS)])
        with torch.no_grad():
            model.initialise(teacher.encode(first), first)
        digests = {"dataset": dataset.id, "tokenizer": teacher.fingerprint}
        inputs = (*dataset.ids, f"model:{name}@{teacher.fingerprint}")
        return cls(config, model, teacher, train, val, digests, inputs)

    def loss(self, batch: Tensor, generator: torch.Generator, step: int | None) -> tuple[Tensor, dict[str, float]]:
        """How far the frames of a batch's latents are from what they should be."""
        del step  # the same from the first to the last
        objective, teacher = self.config.objective, self._teacher.to(batch.device, batch.dtype)
        with torch.no_grad():
            latents = teacher.encode(batch)
            target = teacher.decode(latents) if objective.target == "teacher" else batch
        if objective.latent_noise:
            latents = latents + objective.latent_noise * normal(latents.shape, latents, generator)
        loss, metrics = frame_loss(self.model(latents), target, objective, self._perceptual)
        return finite(loss), metrics

    def sample(self) -> np.ndarray | None:
        """Held-out windows above the previews of their latents."""
        device = next(self.model.parameters()).device
        teacher = self._teacher.to(device)
        items = self.val if len(self.val) else self.train
        return contact_sheet(items, device, lambda video: self.model.decode(teacher.encode(video)))

    def finish(self) -> None:
        """Round to the exported precision, so that the figures are those of the result."""
        self.model.load_state_dict(rounded(self.model, self.config))

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """Of held-out windows, PSNR in dB (peak-to-peak 2): of the previews, of the tokenizer's own frames, and of the
        previews against those."""
        values: dict[str, list[float]] = {"psnr_db": [], "tokenizer_psnr_db": [], "psnr_db_to_tokenizer": []}
        teacher = self._teacher.cpu().float()
        for index in spread(len(self.val), _HELD_OUT_WINDOWS):
            video = self.val.collate([self.val.item(0, index)])
            latents = teacher.encode(video)
            made, own = self.model.decode(latents), teacher.decode(latents)
            for name, (one, other) in zip(values, ((made, video), (own, video), (made, own)), strict=True):
                values[name] += psnr(one, other)
        return {name: float(np.mean(found)) for name, found in values.items() if found}

    def export(self, folder: Path) -> str:
        """Write weights and config.toml; returns the weights' file name."""
        from worldloom.weights import WEIGHTS, write_weights

        write_weights(rounded(self.model, self.config), folder)
        checkpoint = PreviewCheckpoint(tokenizer=self.model.tokenizer, model=self.model.config)
        configs.save(checkpoint, folder / "config.toml")
        return WEIGHTS

    def describe(self) -> str:
        """First paragraph of the model card."""
        return (
            f"A preview decoder: the latents of the tokenizer `{self.model.tokenizer.name}`, and no others, to frames, "
            "at a fraction of the cost of its own decoder. Written by `worldloom finetune preview-decoder`; "
            "read by `worldloom_tokenizers.preview.load_preview`."
        )
