"""Recipe "latent-actions": a latent action model, trained on clips whose actions, if they have any, it does not see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from worldloom import config as configs
from worldloom.errors import WorldloomError
from worldloom.order import spread
from worldloom_finetune import data
from worldloom_finetune.clips import open_bank, refuse_lora
from worldloom_finetune.config import FinetuneConfig
from worldloom_finetune.export import rounded
from worldloom_tokenizers.config import LatentActionConfig
from worldloom_tokenizers.latent_actions import LatentActionModel, load_latent_actions, write_config

PRESETS = ("latent-actions/nano",)
_FIRST_WINDOWS = 512  # windows among whose encodings the codes start
_HELD_OUT_WINDOWS = 512  # held-out windows that the figures are of


@dataclass(frozen=True)
class LatentActionTraining(FinetuneConfig):
    """Configuration of the recipe "latent-actions"."""

    model: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `LatentActionConfig` that differ from the preset."""


class LatentActionJob:
    """See `worldloom_finetune.module.Job`."""

    config_class: ClassVar[type[LatentActionTraining]] = LatentActionTraining
    kind: ClassVar[str] = "tokenizer"

    def __init__(
        self,
        config: LatentActionTraining,
        model: LatentActionModel,
        train: data.ClipItems,
        val: data.ClipItems,
        digests: Mapping[str, str],
        inputs: tuple[str, ...],
    ) -> None:
        self.config, self.model, self.train, self.val = config, model, train, val
        self.digests, self.inputs = digests, inputs
        self.unused = False

    @classmethod
    def prepare(cls, request: Any, config: LatentActionTraining) -> None:
        """Decode the clips once."""
        open_bank(request, config)

    @classmethod
    def open(cls, request: Any, config: LatentActionTraining) -> LatentActionJob:
        """Model and data of a run.

        Raises:
            WorldloomError: no clips, clips that are too short, frames of a size that the model does not take, or an
                unknown model.
        """
        refuse_lora(config)
        dataset, bank = open_bank(request, config)
        digests = {"dataset": dataset.id}
        inputs: tuple[str, ...] = dataset.ids
        fresh = request.model in PRESETS
        if fresh:
            model = LatentActionModel(configs.load(LatentActionConfig, base=config.model))
            digests["base"] = f"preset:{request.model}"
        else:
            if "/" in request.model and not Path(request.model).is_dir():
                raise WorldloomError(
                    "there is no such checkpoint folder or preset", got=request.model, do=f"presets: {PRESETS[0]}"
                )
            if config.model:
                raise WorldloomError("a model that has weights keeps its configuration", got=dict(config.model))
            model = load_latent_actions(request.model)
            digests["base"] = model.fingerprint
            inputs += (f"model:{request.model}@{model.fingerprint}",)
        train, val = _windows(bank, config, model.config.past)
        first = train.collate([train.item(0, i) for i in spread(len(train), _FIRST_WINDOWS)])
        model.check_video(first)
        if fresh:
            model.initialise(first)
        return cls(config, model, train, val, digests, inputs)

    def loss(self, batch: Tensor, generator: torch.Generator, step: int | None) -> tuple[Tensor, dict[str, float]]:
        """Prediction and codebook loss of a batch of windows."""
        del step  # the same from the first to the last
        return self.model.loss(batch, generator)

    @torch.no_grad()
    def sample(self) -> np.ndarray | None:
        """Held-out frames, each followed by what comes next and by what would come after each latent action."""
        from worldloom import media

        items, codes = self.val if len(self.val) else self.train, self.model.config.codes
        rows: list[np.ndarray] = []
        for index in spread(len(items), 6):
            video = items.collate([items.item(0, index)]).to(next(self.model.parameters()).device)
            past = video[:, :, :-1].expand(codes, -1, -1, -1, -1)
            actions = torch.arange(codes)[:, None].expand(-1, past.shape[2])
            made = self.model.predict(past, actions.to(past.device))[:, :, -1]  # (codes, 3, H, W)
            shown = torch.cat([video[0, :, -2:].movedim(1, 0), made])
            rows.append(media.to_frames(shown.movedim(0, 1)[None].cpu())[0])
        return media.contact_sheet(rows)

    def finish(self) -> None:
        """Round to the exported precision, so that the figures are those of the result."""
        self.model.load_state_dict(rounded(self.model, self.config))

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """Of held-out windows: PSNR in dB (peak-to-peak 2, of the mean error) of the predicted frames and of repeating
        the frame before; the number of codes that occur and the exponential of their entropy."""
        if not len(self.val):
            return {}
        errors = torch.zeros(2, dtype=torch.float64)
        counts = torch.zeros(self.model.config.codes, dtype=torch.int64)
        chosen = spread(len(self.val), _HELD_OUT_WINDOWS)
        for index in chosen:
            video = self.val.collate([self.val.item(0, index)])
            past, following, actions = video[:, :, :-1], video[:, :, 1:], self.model.infer(video)
            for i, made in enumerate((self.model.predict(past, actions), past)):
                errors[i] += (made - following).double().square().mean()
            counts += actions.flatten().bincount(minlength=len(counts))
        made, still = (10 * torch.log10(4 * len(chosen) / errors.clamp_min(1e-12))).tolist()
        share = counts.double() / counts.sum()
        return {
            "psnr_db": made,
            "psnr_db_still": still,
            "codes_used": float((counts > 0).sum()),
            "perplexity": float(torch.special.entr(share).sum().exp()),
        }

    def export(self, folder: Path) -> str:
        """Write weights and config.toml; returns the weights' file name."""
        from worldloom.weights import WEIGHTS, write_weights

        write_weights(rounded(self.model, self.config), folder)
        write_config(self.model.config, folder / "config.toml")
        return WEIGHTS

    def describe(self) -> str:
        """First paragraph of the model card."""
        return (
            f"A latent action model: what happens between two frames becomes one of {self.model.config.codes} codes, "
            "and a frame and a code become the next frame. It was trained on video alone, without actions. Written by "
            "`worldloom finetune latent-actions`; read by `worldloom_tokenizers.load_latent_actions`."
        )


def _windows(bank: data.FrameBank, config: LatentActionTraining, past: int) -> tuple[data.ClipItems, data.ClipItems]:
    length = config.data.frames or past + 1
    if length < 2:
        raise WorldloomError("a window has a frame and the next at least", got=f"data.frames = {length}", do="use 2")
    train, val = data.split([clip.id for clip in bank.clips], config.data.val_fraction)
    seed, stride, crop = config.trainer.seed, config.data.stride, config.data.crop
    training = data.ClipItems(bank, train, length, seed, jitter=True, stride=stride, crop=crop)
    if not len(training):
        longest = max((shape[0] for shape in bank.shapes), default=0)
        raise WorldloomError(
            "no clip is long enough for a training window",
            got=f"data.frames = {length}, the longest clip has {longest}",
            do="lower data.frames",
        )
    return training, data.ClipItems(bank, val, length, seed, jitter=False, crop=crop)
