"""Recipe "tokenizer": a video tokenizer of any kind, trained on clips."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from worldloom import config as configs
from worldloom.errors import WorldloomError
from worldloom.order import spread
from worldloom_finetune import data
from worldloom_finetune.clips import contact_sheet, open_bank, open_windows, psnr, refuse_lora
from worldloom_finetune.config import FinetuneConfig
from worldloom_finetune.discriminator import PatchDiscriminator
from worldloom_finetune.export import rounded
from worldloom_finetune.reconstruction import ReconstructionConfig, perceptual_distance, tokenizer_loss
from worldloom_tokenizers.checkpoint import build, kind_of, load_tokenizer, write_config
from worldloom_tokenizers.codec import VideoCodec
from worldloom_tokenizers.presets import PRESETS

_FIRST_WINDOWS = 512  # windows from which a new tokenizer takes its initial weights
_MEASURED_WINDOWS = 512  # training windows that give the statistics of the latents
_HELD_OUT_WINDOWS = 128  # held-out windows that the figures are of


@dataclass(frozen=True)
class TokenizerTraining(FinetuneConfig):
    """Configuration of the recipe "tokenizer"."""

    objective: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    """What the loss is made of."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the tokenizer's configuration that differ from the preset, or, of a tokenizer that has weights, new
    ``levels``."""


class TokenizerJob:
    """See `worldloom_finetune.module.Job`.

    With the adversarial term the trained module holds the tokenizer and the discriminator; the result has the tokenizer
    alone.
    """

    config_class: ClassVar[type[TokenizerTraining]] = TokenizerTraining
    kind: ClassVar[str] = "tokenizer"

    def __init__(
        self,
        config: TokenizerTraining,
        tokenizer: VideoCodec,
        train: data.ClipItems,
        val: data.ClipItems,
        digests: Mapping[str, str],
        inputs: tuple[str, ...],
    ) -> None:
        self.config, self.tokenizer, self.train, self.val = config, tokenizer, train, val
        self.digests, self.inputs = digests, inputs
        self.model: nn.Module = tokenizer
        self.discriminator: nn.Module | None = None
        objective = config.objective
        if objective.adversarial:
            self.discriminator = PatchDiscriminator(objective.adversarial_channels)
            self.model = nn.ModuleDict({"tokenizer": tokenizer, "discriminator": self.discriminator})
        self.unused = False
        self._perceptual = perceptual_distance(objective)

    @classmethod
    def prepare(cls, request: Any, config: TokenizerTraining) -> None:
        """Decode the clips once."""
        open_bank(request, config)

    @classmethod
    def open(cls, request: Any, config: TokenizerTraining) -> TokenizerJob:
        """Model and data of a run.

        Raises:
            WorldloomError: no clips, clips that are too short, or an unknown model.
        """
        refuse_lora(config)
        dataset, bank = open_bank(request, config)
        digests = {"dataset": dataset.id}
        inputs: tuple[str, ...] = dataset.ids
        preset = PRESETS.get(request.model)
        if preset is not None:
            defaults = preset()
            tokenizer = build(configs.load(type(defaults), base={**configs.to_dict(defaults), **config.model}))
            digests["base"] = f"preset:{request.model}"
        else:
            tokenizer = _trained(request.model)
            digests["base"] = tokenizer.fingerprint
            inputs += (f"model:{request.model}@{tokenizer.fingerprint}",)
            if config.model:
                tokenizer = _discretised(tokenizer, config.model)
        train, val = open_windows(bank, config, tokenizer)
        if preset is not None:
            tokenizer.initialise(train.collate([train.item(0, i) for i in spread(len(train), _FIRST_WINDOWS)]))
        return cls(config, tokenizer, train, val, digests, inputs)

    def loss(self, batch: Tensor, generator: torch.Generator, step: int | None) -> tuple[Tensor, dict[str, float]]:
        """Reconstruction loss of a batch of windows."""
        return tokenizer_loss(
            self.tokenizer,
            batch,
            self.config.objective,
            generator,
            step=step,
            perceptual=self._perceptual,
            discriminator=self.discriminator,
        )

    def sample(self) -> np.ndarray | None:
        """Held-out windows above their reconstructions."""
        return contact_sheet(
            self.val if len(self.val) else self.train,
            next(self.tokenizer.parameters()).device,
            lambda video: self.tokenizer.decode_raw(self.tokenizer.encode_raw(video)),
        )

    @torch.no_grad()
    def finish(self) -> None:
        """Round to the exported precision, then measure what normalises continuous latents, on training data."""
        self.model = self.tokenizer  # the discriminator has done its work
        self.tokenizer.load_state_dict(rounded(self.tokenizer, self.config))
        if self.tokenizer.levels:  # codes are in [-1, 1] as they are
            return
        total = squares = torch.zeros((), dtype=torch.float64)
        count = 0
        for index in spread(len(self.train), _MEASURED_WINDOWS):
            raw = self.tokenizer.encode_raw(self.train.collate([self.train.item(0, index)])).double()
            total = total + raw.sum(dim=(0, 2, 3, 4))
            squares = squares + raw.square().sum(dim=(0, 2, 3, 4))
            count += raw[:, 0].numel()
        mean = total / count
        self.tokenizer.set_statistics(mean.float(), (squares / count - mean.square()).clamp_min(0).sqrt().float())

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """Of held-out windows: PSNR in dB (peak-to-peak 2) through the normalised latents, and the use of codes.

        ``codebook<k>_usage`` is the share of the codes of codebook k that occur, ``codebook<k>_perplexity`` the
        exponential of their entropy in nats: as many equally frequent codes would be as informative.
        """
        values: list[float] = []
        counts = torch.zeros(self.tokenizer.codebooks, self.tokenizer.codebook_size, dtype=torch.int64)
        for index in spread(len(self.val), _HELD_OUT_WINDOWS):
            video = self.val.collate([self.val.item(0, index)])
            latents = self.tokenizer.encode(video)
            values += psnr(self.tokenizer.decode(latents), video)
            for row, used in zip(counts, self.tokenizer.to_indices(latents)[0] if len(counts) else (), strict=True):
                row += used.flatten().bincount(minlength=len(row))
        if not values:
            return {}
        figures = {"psnr_db": float(np.mean(values)), "psnr_db_worst_frame": min(values)}
        for k, row in enumerate(counts):
            figures[f"codebook{k}_usage"] = float((row > 0).float().mean())
            figures[f"codebook{k}_perplexity"] = perplexity(row)
        return figures

    def export(self, folder: Path) -> str:
        """Write weights and config.toml; returns the weights' file name."""
        from worldloom.weights import WEIGHTS, write_weights

        write_weights(rounded(self.tokenizer, self.config), folder)
        write_config(self.tokenizer.config, folder / "config.toml")
        return WEIGHTS

    def describe(self) -> str:
        """First paragraph of the model card."""
        codec = self.tokenizer
        made = f"one vector of {codec.latent_channels} numbers"
        if codec.levels:
            made = f"{codec.codebooks} codes of {codec.codebook_size} values each"
        frames = "a frame's" if codec.temporal_ratio == 1 else f"{codec.temporal_ratio} frames of"
        alone = "" if codec.temporal_ratio == 1 else "; the first frame is encoded alone"
        return (
            f"A causal video tokenizer of kind `{kind_of(codec.config)}`: {frames} "
            f"{codec.spatial_ratio}x{codec.spatial_ratio} pixels become {made}{alone}. Written by "
            "`worldloom finetune tokenizer`; read by `worldloom_tokenizers.load_tokenizer`."
        )


def perplexity(counts: Tensor) -> float:
    """The exponential of the entropy of the distribution that ``counts (n,)`` are of."""
    share = counts.double() / counts.sum()
    return float(torch.special.entr(share).sum().exp())


def _trained(name: str) -> VideoCodec:
    if "/" in name and not Path(name).is_dir():
        raise WorldloomError(
            "there is no such checkpoint folder or preset", got=name, do=f"presets: {', '.join(PRESETS)}"
        )
    return load_tokenizer(name)


def _discretised(tokenizer: VideoCodec, changes: Mapping[str, Any]) -> VideoCodec:
    """A continuous tokenizer's weights under finite scalar quantisation: a far better start than random weights."""
    if set(changes) != {"levels"}:
        raise WorldloomError(
            "of a tokenizer that has weights, only [model] levels can be set", got=dict(changes), do="remove the others"
        )
    kind = type(tokenizer.config)
    changed = build(configs.load(kind, base={**configs.to_dict(tokenizer.config), **changes}))
    changed.load_state_dict(tokenizer.state_dict())
    changed.set_statistics(torch.zeros_like(changed.latent_mean), torch.ones_like(changed.latent_std))
    return changed
