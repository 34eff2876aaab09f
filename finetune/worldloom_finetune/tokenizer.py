"""Recipe "tokenizer": a causal video autoencoder, trained on clips."""

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
from worldloom.progress import progress
from worldloom_finetune import data
from worldloom_finetune.config import FinetuneConfig
from worldloom_finetune.export import rounded
from worldloom_finetune.objectives import ReconstructionConfig, tokenizer_loss

PRESETS = ("causal-vae/nano",)
_LINEAR_WINDOWS = 512  # windows whose patches set the linear maps before training


@dataclass(frozen=True)
class TokenizerTraining(FinetuneConfig):
    """Configuration of the recipe "tokenizer"."""

    objective: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    """What the loss is made of."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `CausalVAEConfig` that differ from the preset, or, of a tokenizer that has weights, new ``levels``."""


class TokenizerJob:
    """See `worldloom_finetune.module.Job`."""

    config_class: ClassVar[type[TokenizerTraining]] = TokenizerTraining
    kind: ClassVar[str] = "tokenizer"

    def __init__(
        self,
        config: TokenizerTraining,
        model: Any,
        train: data.ClipItems,
        val: data.ClipItems,
        digests: Mapping[str, str],
        inputs: tuple[str, ...],
    ) -> None:
        self.config, self.model, self.train, self.val = config, model, train, val
        self.digests, self.inputs = digests, inputs
        self.unused = False

    @classmethod
    def prepare(cls, request: Any, config: TokenizerTraining) -> None:
        """Decode the clips once."""
        _bank(request, config)

    @classmethod
    def open(cls, request: Any, config: TokenizerTraining) -> TokenizerJob:
        """Model and data of a run.

        Raises:
            WorldloomError: no clips, clips that are too short, or an unknown model.
        """
        from worldloom_tokenizers.causal_vae import CausalVAE
        from worldloom_tokenizers.config import CausalVAEConfig

        if config.lora.rank:
            raise WorldloomError("a tokenizer is trained whole", got=f"lora.rank = {config.lora.rank}", do="use 0")
        dataset, bank = _bank(request, config)
        digests = {"dataset": dataset.id}
        inputs: tuple[str, ...] = dataset.ids
        if request.model in PRESETS:
            given = configs.load(CausalVAEConfig, base=config.model)
            model = CausalVAE(given)
            digests["base"] = f"preset:{request.model}"
        else:
            from worldloom_tokenizers import load_tokenizer

            model = load_tokenizer(request.model)
            digests["base"] = model.fingerprint
            inputs += (f"model:{request.model}@{model.fingerprint}",)
            if config.model:
                model = _discretised(model, config.model)
        length = config.data.frames or 1 + 2 * model.config.temporal_ratio
        if (length - 1) % model.config.temporal_ratio:
            raise WorldloomError(f"data.frames must be 1 + {model.config.temporal_ratio} k", got=length)
        train, val = data.split([clip.id for clip in bank.clips], config.data.val_fraction)
        seed, stride = config.trainer.seed, config.data.stride
        crop = config.data.crop
        training = data.ClipItems(bank, train, length, seed, jitter=True, stride=stride, crop=crop)
        if not len(training):
            longest = max((shape[0] for shape in bank.shapes), default=0)
            raise WorldloomError(
                "no clip is long enough for a training window",
                got=f"data.frames = {length}, the longest clip has {longest}",
                do="lower data.frames",
            )
        if request.model in PRESETS:
            count = min(len(training), _LINEAR_WINDOWS)
            model.initialise_linear(training.collate([training.item(0, i) for i in data.spread(len(training), count)]))
        return cls(
            config, model, training, data.ClipItems(bank, val, length, seed, jitter=False, crop=crop), digests, inputs
        )

    def loss(self, batch: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """Reconstruction loss of a batch of windows."""
        return tokenizer_loss(self.model, batch, self.config.objective, generator)

    def sample(self) -> np.ndarray | None:
        """Held-out windows above their reconstructions."""
        from worldloom import media

        items = self.val if len(self.val) else self.train
        rows: list[np.ndarray] = []
        for index in data.spread(len(items), 3):
            frames = items.item(0, index)
            device = next(self.model.parameters()).device
            video = items.collate([frames]).to(device)
            again = self.model.decode_raw(self.model.encode_raw(video)).clamp(-1, 1)
            rows += [frames, media.to_frames(again.cpu())[0]]
        return media.contact_sheet(rows)

    @torch.no_grad()
    def finish(self) -> None:
        """Round to the exported precision, then measure the statistics that normalise the latents on training data."""
        self.model.load_state_dict(rounded(self.model, self.config))
        total = squares = torch.zeros((), dtype=torch.float64)
        count = 0
        for index in data.spread(len(self.train), 512):
            raw = self.model.encode_raw(self.train.collate([self.train.item(0, index)])).double()
            total = total + raw.sum(dim=(0, 2, 3, 4))
            squares = squares + raw.square().sum(dim=(0, 2, 3, 4))
            count += raw[:, 0].numel()
        mean = total / count
        self.model.set_statistics(mean.float(), (squares / count - mean.square()).clamp_min(0).sqrt().float())

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """PSNR in dB (peak-to-peak 2) of held-out windows, through the normalised latents."""
        if not len(self.val):
            return {}
        values = []
        for index in data.spread(len(self.val), 128):
            video = self.val.collate([self.val.item(0, index)])
            error = (self.model.decode(self.model.encode(video)) - video).square().mean(dim=(1, 3, 4))
            values += (10 * torch.log10(4 / error.clamp_min(1e-12))).flatten().tolist()
        return {"psnr_db": float(np.mean(values)), "psnr_db_worst_frame": float(min(values))}

    def export(self, folder: Path) -> str:
        """Write weights and config.toml; returns the weights' file name."""
        from worldloom.weights import WEIGHTS, write_weights
        from worldloom_tokenizers.checkpoint import write_config

        write_weights(rounded(self.model, self.config), folder)
        write_config(self.model.config, folder / "config.toml")
        return WEIGHTS

    def describe(self) -> str:
        """First paragraph of the model card."""
        c = self.model.config
        return (
            f"A causal video autoencoder: {c.temporal_ratio} frames of {c.spatial_ratio}x{c.spatial_ratio} pixels "
            f"become one vector of {c.latent_channels} numbers; the first frame is encoded alone. Written by "
            "`worldloom finetune tokenizer`; read by `worldloom_tokenizers.load_tokenizer`."
        )


def _discretised(model: Any, changes: Mapping[str, Any]) -> Any:
    """A continuous tokenizer's weights under finite scalar quantisation: a far better start than random weights."""
    from worldloom_tokenizers.causal_vae import CausalVAE

    if set(changes) != {"levels"}:
        raise WorldloomError(
            "of a tokenizer that has weights, only [model] levels can be set", got=dict(changes), do="remove the others"
        )
    changed = CausalVAE(configs.load(type(model.config), base={**configs.to_dict(model.config), **changes}))
    changed.load_state_dict(model.state_dict())
    return changed


def _bank(request: Any, config: TokenizerTraining) -> tuple[Any, data.FrameBank]:
    from worldloom.shards import open_dataset

    parts = [open_dataset(root) for root in request.data.split(",")]
    for part in parts:
        if part.index.kind != "clips":
            raise WorldloomError("a tokenizer is trained on clips", got=f"{part.root} holds {part.index.kind}")
    dataset = data.Joined(parts)
    with progress("decoding clips", quiet=request.quiet) as shown:
        bank = data.FrameBank.open(dataset, config.data.size, Path(request.out) / "cache", shown)
    return dataset, bank
