"""Checkpoints of the predict family.

A full checkpoint is a folder with ``model.safetensors``, ``config.toml`` (`PredictCheckpoint`) and ``README.md``.
A LoRA adapter is a folder in peft's layout, ``adapter_model.safetensors`` and ``adapter_config.json``, and a
``config.toml`` (`PredictAdapter`) that names its base and the digest of the base's weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from worldloom import config as configs
from worldloom.artifacts import atomic_dir, file_digest
from worldloom.errors import WorldloomError, missing_extra
from worldloom.loading import checkpoint_folder
from worldloom.protocols import VideoTokenizer
from worldloom.schema import CheckpointRef
from worldloom.weights import WEIGHTS, assign_weights, read_weights, write_weights
from worldloom_model_zoo.predict.config import PredictCheckpoint
from worldloom_model_zoo.predict.model import PredictTransformer
from worldloom_model_zoo.predict.pipeline import PredictPipeline
from worldloom_tokenizers import load_tokenizer

ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class PredictAdapter:
    """``config.toml`` of a LoRA adapter folder."""

    base: str
    """Catalog name or folder of the base checkpoint."""
    base_sha256: str
    """sha256 of the base's weights; another base is refused."""
    checkpoint: PredictCheckpoint = field(default_factory=PredictCheckpoint)
    """The settings with the adapter applied; they differ from the base's in the actions, where they do."""
    family: str = "predict"
    """The catalog's name of the family."""


def load(
    path: Path,
    device: str = "cpu",
    sha256: str = "",
    tokenizer: str | Path | None = None,
    name: str = "",
) -> PredictPipeline:
    """A pipeline from a checkpoint or adapter folder; see `worldloom_model_zoo.load_model`."""
    settings = configs.read_toml(path / "config.toml")
    if "base" in settings:
        return _load_adapter(path, device, tokenizer, name)
    weights = read_weights(path, sha256)
    checkpoint = configs.load(PredictCheckpoint, path / "config.toml")
    model = PredictTransformer(checkpoint.model)
    assign_weights(model, weights, path)
    ref = CheckpointRef(name or path.name, str(path), sha256 or file_digest(path / WEIGHTS), "predict")
    return _assemble(model, checkpoint, device, tokenizer, ref)


def save(
    model: PredictTransformer, checkpoint: PredictCheckpoint, path: Path, card: str, dtype: torch.dtype = torch.float16
) -> None:
    """Write a full checkpoint folder, all or nothing. ``card`` is the text of its README."""
    with atomic_dir(path) as folder:
        write_weights({key: tensor.to(dtype) for key, tensor in model.state_dict().items()}, folder)
        configs.save(checkpoint, folder / "config.toml")
        (folder / "README.md").write_text(card, encoding="utf-8")


def fresh_actions(model: PredictTransformer, action_dim: int) -> PredictTransformer:
    """The same weights with a fresh embedding for other actions; size 0 takes actions out.

    The new embedding ends in zeros, so that the model starts out as it was under the null action.
    """
    config = replace(model.config, action_dim=action_dim, action_head=model.config.action_head and action_dim > 0)
    resized = PredictTransformer(config)
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("action_")}
    resized.load_state_dict(weights, strict=False)
    return resized.to(next(model.parameters()).device)


def _load_adapter(path: Path, device: str, tokenizer: str | Path | None, name: str) -> PredictPipeline:
    try:
        import peft
    except ImportError as error:
        raise missing_extra("peft", "finetune") from error
    adapter = configs.load(PredictAdapter, path / "config.toml")
    base, _ = checkpoint_folder(adapter.base)
    digest = file_digest(base / WEIGHTS) if (base / WEIGHTS).is_file() else ""
    if digest != adapter.base_sha256:
        raise WorldloomError(
            "the adapter was trained on other base weights",
            got=f"{adapter.base} has {digest[:12] or 'no weights'}, the adapter wants {adapter.base_sha256[:12]}",
            do="give back the base checkpoint it was trained on, or train the adapter again",
        )
    pipeline = load(base, device="cpu", tokenizer=tokenizer)
    model, action_dim = pipeline.model, adapter.checkpoint.model.action_dim
    if action_dim != model.config.action_dim:
        model = fresh_actions(model, action_dim)
    peft_config = peft.PeftConfig.from_pretrained(str(path))
    assert isinstance(peft_config, peft.LoraConfig), f"{path} is not a LoRA adapter"
    peft_config.inference_mode = True
    wrapped = peft.get_peft_model(model, peft_config)  # type: ignore[arg-type]
    report = peft.set_peft_model_state_dict(wrapped, read_weights(path, name=ADAPTER_WEIGHTS))
    if report.unexpected_keys:
        raise WorldloomError("the adapter does not fit its base", got=report.unexpected_keys[:3])
    inner = wrapped.get_base_model()
    assert isinstance(inner, PredictTransformer)
    ref = CheckpointRef(name or path.name, str(path), file_digest(path / ADAPTER_WEIGHTS), "predict")
    return _assemble(inner, adapter.checkpoint, device, tokenizer, ref)


def _assemble(
    model: PredictTransformer,
    checkpoint: PredictCheckpoint,
    device: str,
    tokenizer: str | Path | None,
    ref: CheckpointRef,
) -> PredictPipeline:
    chosen = tokenizer or checkpoint.tokenizer.name
    codec: VideoTokenizer = load_tokenizer(chosen, device=device)
    expected = checkpoint.tokenizer.fingerprint
    if expected and codec.fingerprint != expected:
        raise WorldloomError(
            "the model was trained on latents of another tokenizer",
            got=f"{chosen} has fingerprint {codec.fingerprint[:12]}, not {expected[:12]}",
            do="give the tokenizer it was trained with",
        )
    return PredictPipeline(model.to(device).eval(), codec, checkpoint, ref)
