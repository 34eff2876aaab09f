"""Recipe "world": an action-conditioned world model on latents, from scratch, fine-tuned whole, or by LoRA."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from worldloom import config as configs
from worldloom import registry
from worldloom.artifacts import Store, file_digest
from worldloom.errors import WorldloomError
from worldloom.loading import checkpoint_folder
from worldloom.order import spread
from worldloom.progress import progress
from worldloom.schema import LatentBatch
from worldloom.shards import DatasetIndex, ShardSample, open_dataset
from worldloom.weights import WEIGHTS, assign_weights, read_weights, write_weights
from worldloom_finetune import data, lora
from worldloom_finetune.config import FinetuneConfig
from worldloom_finetune.distillation import world_loss
from worldloom_finetune.export import rounded
from worldloom_finetune.objectives import ObjectiveConfig, channel_weights
from worldloom_model_zoo.predict.checkpoint import PredictAdapter, fresh_actions
from worldloom_model_zoo.predict.config import (
    PredictCheckpoint,
    PredictConfig,
    SamplerConfig,
    TextEncoderRef,
    TokenizerRef,
)
from worldloom_model_zoo.predict.inputs import align_actions
from worldloom_model_zoo.predict.model import PredictTransformer

_ACTIONS = "action_embedder"  # the one module whose shape depends on the data
_FAMILY = "worldloom_model_zoo.predict.config"
_WINDOW = 33  # video frames of an encoded window, where nothing else is said
_PRESETS = ("nano", "nano_text", "tiny", "cosmos_predict25_2b", "cosmos_predict25_14b")


@dataclass(frozen=True)
class WorldTraining(FinetuneConfig):
    """Configuration of the recipe "world"."""

    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What it is trained for."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `PredictConfig` that differ from the preset; for training from scratch."""
    text_encoder: str = "minilm"
    """Encodes the clips' captions, for a preset with text of its size."""


@dataclass(frozen=True)
class Base:
    """What training starts from."""

    name: str
    """As it was given."""
    checkpoint: PredictCheckpoint
    """Its configuration, fitted to the data."""
    weights: Mapping[str, Tensor] | None
    """Its weights, or None for a preset."""
    sha256: str
    """Of the weights' file; empty for a preset."""
    network: PredictConfig | None = None
    """That of the weights, before it was fitted to the data and the objective."""
    new_actions: bool = False
    """Whether it does not know the data's actions, so that their embedding starts afresh."""


class WorldJob:
    """See `worldloom_finetune.module.Job`."""

    config_class: ClassVar[type[WorldTraining]] = WorldTraining
    kind: ClassVar[str] = "model"

    def __init__(
        self,
        config: WorldTraining,
        model: PredictTransformer,
        base: Base,
        dataset: data.Joined,
        train: data.LatentItems,
        val: data.LatentItems,
        teacher: Base | None = None,
    ) -> None:
        self.config, self.model, self.base, self.dataset = config, model, base, dataset
        self.teacher = None if teacher is None else _teacher(teacher)
        self.train, self.val = train, val
        tokenizer = dataset.index.tokenizer or {}
        fingerprint = str(tokenizer.get("fingerprint", ""))
        origin = base.sha256 or f"preset:{base.name}"
        self.digests = {"dataset": dataset.index.id, "tokenizer": fingerprint, "base": origin}
        if teacher is not None and teacher.sha256 != base.sha256:
            self.digests["teacher"] = teacher.sha256
        inputs = [*dataset.ids, f"tokenizer:{tokenizer.get('name', 'tokenizer')}@{fingerprint}"]
        weights = {source.sha256: source.name for source in (base, teacher) if source is not None and source.sha256}
        inputs += [Store().holding(sha256, "model") or f"model:{name}@{sha256}" for sha256, name in weights.items()]
        self.inputs = tuple(inputs)
        model_config = base.checkpoint.model
        self.unused = bool(model_config.context_dim and not dataset.index.metadata.get("text_encoder"))
        self.unused |= bool(model_config.action_dim and not dataset.index.action_dim)
        self.unused |= model_config.action_head and not config.objective.action_weight
        self._tokenizer: Any = None
        self._weights: Tensor | None = None  # of the latent channels in the loss

    # -- opening --------------------------------------------------------------------------------------------------

    @classmethod
    def prepare(cls, request: Any, config: WorldTraining) -> None:
        """Encode the clips into OUT/latents, where the dataset is not encoded yet."""
        roots = request.data.split(",")
        if data.kind_of(roots) == "latents":
            return
        from worldloom_tokenizers import encode_dataset, load_tokenizer

        settings = PredictCheckpoint() if _preset(request.model) else _settings(request.model)
        name = request.tokenizer or settings.tokenizer.name
        tokenizer = load_tokenizer(name)
        out = Path(request.out) / "latents"
        if (out / "dataset.json").is_file():
            found = str((open_dataset(out).index.tokenizer or {}).get("fingerprint"))
            if found != tokenizer.fingerprint:
                raise WorldloomError(
                    "the latents of this run were made by another tokenizer",
                    got=f"{out}: {found[:12]}, {name}: {tokenizer.fingerprint[:12]}",
                    do=f"remove {out} to encode again, or name the tokenizer it was made by",
                )
        with progress("encoding clips", quiet=request.quiet) as shown:
            encode_dataset(
                roots,
                tokenizer,
                out,
                name=name,
                frames=config.data.frames or _WINDOW,
                stride=config.data.stride or None,
                size=config.data.size or (settings.height, settings.width),
                text_encoder=_text_encoder(request.model, config, settings),
                progress=shown,
            )

    @classmethod
    def open(cls, request: Any, config: WorldTraining) -> WorldJob:
        """Model and data of a run.

        Raises:
            WorldloomError: no latents, a model that does not fit them, or an unknown model.
        """
        dataset, parts = data.open_latents(request.data.split(","), Path(request.out) / "latents")
        ratio, channels, shortest = _facts(dataset)
        base = open_base(request.model, config, dataset, ratio, channels)
        model = build(base)
        teacher = base if config.objective.kind == "distill" else None
        if teacher is not None and (given := config.objective.teacher):
            teacher = open_base(given, dataclasses.replace(config, model={}), dataset, ratio, channels)
            if teacher.checkpoint.action_names != base.checkpoint.action_names:
                raise WorldloomError(
                    "teacher and student take their actions in different orders",
                    got=f"{given}: {teacher.checkpoint.action_names}, {base.name}: {base.checkpoint.action_names}",
                    do="give a teacher that was trained on the same data",
                )
        if config.lora.rank:
            if base.weights is None:
                raise WorldloomError(
                    "LoRA adapts a trained model, and a preset has no weights",
                    got=request.model,
                    do="give a checkpoint as --model, or set lora.rank = 0",
                )
            lora.inject(model, config.lora, [_ACTIONS] if base.new_actions else [])
        frames = data.window_length(config.data.frames, ratio, shortest, "a sample of the dataset")
        train, val = data.split(dataset.groups(), config.data.val_fraction)
        read, shapes = Aligned(dataset, base.checkpoint), dataset.shapes()
        hold = sum(ref.bytes for ref in dataset.index.shards) < config.data.memory_gb * 1e9
        return cls(
            config,
            model,
            base,
            dataset,
            data.LatentItems(read, train, frames, ratio, hold=hold, shapes=shapes, parts=parts),
            data.LatentItems(read, val, frames, ratio, hold=hold, shapes=shapes, parts=parts),
            teacher,
        )

    # -- training -------------------------------------------------------------------------------------------------

    def loss(self, batch: LatentBatch, generator: torch.Generator, step: int | None) -> tuple[Tensor, dict[str, float]]:
        """The objective's loss of a batch of latents."""
        del step  # the same from the first to the last
        if self.teacher is not None:
            self.teacher.to(batch.latents)
        weights = self._channel_weights()
        return world_loss(self.model, batch, self.config.objective, generator, weights, self.teacher)

    def _channel_weights(self) -> Tensor | None:
        if not self.config.objective.pixel_weighting:
            return None
        if self._weights is None:
            count = min(8, len(self.train))
            latents = self.train.collate([self.train.item(0, i) for i in spread(len(self.train), count)]).latents
            tokenizer = self._load_tokenizer()
            if tokenizer is None:
                raise WorldloomError(
                    "objective.pixel_weighting needs the tokenizer, which is not here",
                    got=(self.dataset.index.tokenizer or {}).get("name"),
                    do="set objective.pixel_weighting=0",
                )
            self._weights = channel_weights(tokenizer, latents, self.config.objective.pixel_weighting)
        return self._weights

    def sample(self) -> np.ndarray | None:
        """Held-out clips (decoded latents) above what the model makes of their beginning and their actions."""
        from worldloom import media
        from worldloom_model_zoo.predict.pipeline import PredictPipeline

        items = self.val if len(self.val) else self.train
        batch = items.collate([items.item(0, i) for i in range(min(2, len(items)))])
        tokenizer = self._load_tokenizer()
        if tokenizer is None:
            return None
        pipeline = PredictPipeline(self.model, tokenizer, self.base.checkpoint)
        device = next(self.model.parameters()).device
        tokenizer, batch = tokenizer.to(device), batch.to(device)
        truth = tokenizer.decode(batch.latents)
        known = truth[:, :, : min(self.base.checkpoint.sampler.context_frames, 1 + tokenizer.temporal_ratio)]
        made = pipeline.generate_video(known, batch.actions, frames=truth.shape[2], text=batch.text, seed=0)
        rows = [frames for pair in zip(media.to_frames(truth), media.to_frames(made), strict=True) for frames in pair]
        return media.contact_sheet(rows, every=max(1, truth.shape[2] // 12))

    def _load_tokenizer(self) -> Any:
        if self._tokenizer is None:
            from worldloom_tokenizers import load_tokenizer

            name = self.base.checkpoint.tokenizer.name
            try:
                self._tokenizer = load_tokenizer(name)
            except WorldloomError as error:  # latents can be trained on where their tokenizer is not
                print(f"no samples: {error.what}: {name}", file=sys.stderr)
        return self._tokenizer

    # -- the result -----------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Nothing remains to be measured."""

    def figures(self) -> dict[str, float]:
        """Quality is what `worldloom eval` measures; training adds its losses."""
        return {}

    def export(self, folder: Path) -> str:
        """Write a checkpoint, or an adapter with a reference to its base; returns the weights' file name."""
        checkpoint = self.base.checkpoint
        if self.config.lora.rank:
            lora.save_adapter(self.model, folder)
            base = str(Path(self.base.name).absolute()) if Path(self.base.name).is_dir() else self.base.name
            adapter = PredictAdapter(base=base, base_sha256=self.base.sha256, checkpoint=checkpoint)
            configs.save(adapter, folder / "config.toml")
            return lora.WEIGHTS
        write_weights(rounded(self.model, self.config), folder)
        configs.save(checkpoint, folder / "config.toml")
        return WEIGHTS

    def describe(self) -> str:
        """First paragraph of the model card."""
        config = self.base.checkpoint
        what = (
            f"A LoRA adapter (rank {self.config.lora.rank}) of `{self.base.name}`"
            if self.config.lora.rank
            else (f"A world model of {lora.count(self.model)[1]:,} parameters")
        )
        actions = f"actions of {config.model.action_dim} numbers per frame" if config.model.action_dim else "no actions"
        return (
            f"{what}, family `{config.family}`: it continues video of {config.width}x{config.height} pixels at "
            f"{config.fps:g} frames per second, with {actions}, in the latents of `{config.tokenizer.name}`."
        )


def open_base(name: str, config: WorldTraining, dataset: data.Joined, ratio: int, channels: int) -> Base:
    """Resolve `name`, a preset (``predict/nano``), a catalog name or a folder, and fit its configuration to the data.

    Raises:
        WorldloomError: nothing of that name, or a model for other latents.
    """
    index = dataset.index
    reference = index.tokenizer or {}
    preset, network, new_actions = _preset(name), None, False
    if preset:
        made: PredictConfig = getattr(importlib.import_module(_FAMILY), preset)()
        given = dataclasses.asdict(made) | {
            "latent_channels": channels,
            "actions_per_latent": ratio,
            "action_dim": index.action_dim,
            **config.model,
        }
        model = configs.load(PredictConfig, base=given)
        checkpoint, weights, sha256 = PredictCheckpoint(model=model, action_names=_names(index)), None, ""
    else:
        if config.model:
            raise WorldloomError("[model] is for training from scratch", got=dict(config.model), do="remove it")
        folder, expected = find_checkpoint(name)
        weights = read_weights(folder, expected)
        checkpoint = configs.load(PredictCheckpoint, folder / "config.toml")
        sha256 = file_digest(folder / WEIGHTS)
        model = network = checkpoint.model
        new_actions = bool(index.action_dim) and not _understands(checkpoint, index)
        if new_actions:
            model = dataclasses.replace(model, action_dim=index.action_dim)
            checkpoint = dataclasses.replace(checkpoint, action_names=_names(index))
        _check_tokenizer(name, checkpoint.tokenizer, reference)
    if (model.latent_channels, model.actions_per_latent) != (channels, ratio):
        raise WorldloomError(
            "the model is for other latents",
            got=f"data: {channels} channels, {ratio} frames each; {name}: {model.latent_channels}, "
            f"{model.actions_per_latent}",
            do="encode the clips with the model's own tokenizer",
        )
    fitted = _fit(model, config.objective)
    if network is not None and fitted != model and config.lora.rank:
        raise WorldloomError(
            "this objective gives the model new parts, which LoRA would leave untrained", do="set lora.rank = 0"
        )
    checkpoint = dataclasses.replace(
        checkpoint,
        model=fitted,
        sampler=_sampler(checkpoint.sampler, config.objective, fitted),
        tokenizer=TokenizerRef(
            str(reference.get("name") or checkpoint.tokenizer.name), str(reference.get("fingerprint", ""))
        ),
    )
    checkpoint = dataclasses.replace(checkpoint, text=_text(name, checkpoint, index.metadata.get("text_encoder")))
    if index.size is not None:
        checkpoint = dataclasses.replace(checkpoint, height=index.size[0], width=index.size[1])
    if index.fps is not None:
        checkpoint = dataclasses.replace(checkpoint, fps=float(index.fps))
    return Base(name, checkpoint, weights, sha256, network, new_actions)


def _fit(model: PredictConfig, objective: ObjectiveConfig) -> PredictConfig:
    """The network with the parts that an objective trains."""
    if objective.action_weight:
        model = dataclasses.replace(model, action_head=True)
    return dataclasses.replace(model, step_size=True) if objective.kind == "shortcut" else model


def _sampler(sampler: SamplerConfig, objective: ObjectiveConfig, model: PredictConfig) -> SamplerConfig:
    """The sampler that a model trained for an objective needs; as it was, where it may stay."""
    if objective.kind == "edm":
        return dataclasses.replace(
            sampler, method="edm_heun", schedule="karras", sigma_min=0.002, sigma_max=80.0,
            sigma_data=objective.sigma_data, steps=max(sampler.steps, 8),
        )  # fmt: skip
    if objective.kind == "shortcut":
        steps = min(4, objective.steps)
        return dataclasses.replace(sampler, method="shortcut", schedule="uniform", first_level=1.0, steps=steps)
    if objective.kind == "distill":
        off = 1.0 if sampler.guidance_convention == "unconditional" else 0.0
        return dataclasses.replace(
            sampler, method="euler", schedule="uniform", first_level=1.0, last_level=0.0, steps=objective.steps,
            shift=objective.shift, guidance_scale=sampler.guidance_scale if objective.teacher_guidance == 1 else off,
            context_noise=objective.context_noise if model.attention == "causal" else sampler.context_noise,
        )  # fmt: skip
    return sampler


def _text_encoder(name: str, config: WorldTraining, settings: PredictCheckpoint) -> Any:
    """What encodes captions for the model ``name``; None where it takes no text, or text of another kind."""
    preset = _preset(name)
    model, encoder, tokens = settings.model, settings.text.name, settings.text.tokens
    if preset:
        model = getattr(importlib.import_module(_FAMILY), preset)()
        model = configs.load(PredictConfig, base=dataclasses.asdict(model) | dict(config.model))
        encoder = config.text_encoder
    if not (model.context_dim and encoder):
        return None
    from worldloom_tokenizers import load_text_encoder

    found = load_text_encoder(encoder, tokens)
    return found if found.dim == (model.text_dim or model.context_dim) else None


def _text(name: str, checkpoint: PredictCheckpoint, found: Mapping[str, Any] | None) -> TextEncoderRef:
    """The text encoder that a checkpoint records, given what encoded the captions of its data.

    Raises:
        WorldloomError: the model was trained with another one.
    """
    if not found or not checkpoint.model.context_dim:
        return checkpoint.text
    wanted, fingerprint = checkpoint.text.fingerprint, str(found["fingerprint"])
    if wanted and wanted != fingerprint:
        raise WorldloomError(
            f"the captions were encoded by another text encoder than the one {name} was trained with",
            got=f"captions: {found['name']} {fingerprint[:12]}, model: {checkpoint.text.name} {wanted[:12]}",
            do="encode the clips again: give the clips as --data",
        )
    return TextEncoderRef(str(found["name"]), fingerprint, int(found["tokens"]))


def _names(index: DatasetIndex) -> tuple[str, ...]:
    """What the components of the data's actions are called; () where that is not known."""
    names = tuple(str(name) for name in index.metadata.get("action_names") or ())
    return names if len(names) == index.action_dim else ()


def _understands(checkpoint: PredictCheckpoint, index: DatasetIndex) -> bool:
    """Whether a model can take the data's actions as they are, or by name in its own order."""
    names = _names(index)
    if names and checkpoint.action_names:
        return set(names) <= set(checkpoint.action_names)
    return index.action_dim == checkpoint.model.action_dim


@dataclass(frozen=True)
class Aligned:
    """Reads samples of a dataset as a model takes them: actions in its order, matched by name where both have names.

    A model without text is given none.

    A class, not a closure: loader processes get it by pickle.
    """

    dataset: data.Joined
    """Where samples come from."""
    checkpoint: PredictCheckpoint
    """The model's settings."""

    def __call__(self, which: int) -> ShardSample:
        sample = self.dataset.load(which)
        names, wanted = _names(self.dataset.index), self.checkpoint.action_names
        if "actions" in sample.arrays and names and wanted and names != wanted:
            given = torch.from_numpy(sample.arrays["actions"])
            sample.arrays["actions"] = align_actions(given, names, wanted, len(wanted)).numpy()
        if not self.checkpoint.model.context_dim:
            sample.arrays.pop("text", None)
        return sample


def find_checkpoint(name: str) -> tuple[Path, str]:
    """Folder and expected sha256 ("" where none is recorded) of a catalog name or a folder.

    Raises:
        WorldloomError: neither, or a folder that holds an adapter.
    """
    path = Path(name)
    if path.is_dir():
        if (path / lora.WEIGHTS).is_file():
            raise WorldloomError("this folder holds an adapter", got=name, do="give its base model as --model")
        return path, ""
    if "/" in name:
        raise WorldloomError(
            "there is no such checkpoint folder or preset",
            got=name,
            do=f"presets: {', '.join(f'predict/{p}' for p in _PRESETS)}; models: {', '.join(registry.names('models'))}",
        )
    return checkpoint_folder(name)


def build(base: Base) -> PredictTransformer:
    """The base model; new are the action embedder where it does not know the data's actions, and parts it lacks."""
    wanted = base.checkpoint.model
    if base.weights is None or base.network is None:
        return PredictTransformer(wanted)
    model = PredictTransformer(base.network)
    assign_weights(model, base.weights, Path(base.name))
    if base.new_actions:
        model = fresh_actions(model, wanted.action_dim)
    if model.config == wanted:
        return model
    larger = PredictTransformer(wanted)
    larger.load_state_dict(model.state_dict(), strict=False)
    return larger


def _teacher(base: Base) -> PredictTransformer:
    """A frozen model of its own from a base's weights.

    Raises:
        WorldloomError: it is untrained, wholly or for the data's actions.
    """
    if base.weights is None or base.new_actions:
        raise WorldloomError(
            "a teacher must be trained, and for the data's actions",
            got=base.name,
            do="train with objective.kind = 'flow' first, and give the result as --model or objective.teacher",
        )
    return build(base).eval().requires_grad_(False)


def _preset(name: str) -> str:
    """The preset that `name` means, or ""."""
    family, _, preset = name.partition("/")
    return preset if family == "predict" and preset in _PRESETS and not Path(name).is_dir() else ""


def _settings(name: str) -> PredictCheckpoint:
    folder, _ = find_checkpoint(name)
    return configs.load(PredictCheckpoint, folder / "config.toml")


def _check_tokenizer(name: str, wanted: TokenizerRef, found: Mapping[str, Any]) -> None:
    fingerprint = str(found.get("fingerprint", ""))
    if wanted.fingerprint and fingerprint and wanted.fingerprint != fingerprint:
        raise WorldloomError(
            f"the latents were made by another tokenizer than the one {name} was trained with",
            got=f"latents: {found.get('name')} {fingerprint[:12]}, model: {wanted.name} {wanted.fingerprint[:12]}",
            do=f"encode the clips with {wanted.name}: give the clips as --data and leave --tokenizer out",
        )


def _facts(dataset: data.Joined) -> tuple[int, int, int]:
    """(video frames per latent frame, latent channels, latent frames of the shortest sample)."""
    first = dataset.load(0)
    channels, t = first.arrays["latents"].shape[:2]
    reference = dataset.index.tokenizer or {}
    ratio = int(reference.get("temporal_ratio") or (round((first.clip.frames - 1) / (t - 1)) if t > 1 else 4))
    return ratio, channels, min(shape[1] for shape in dataset.shapes())
