"""Tokenizer checkpoints: a folder with ``model.safetensors``, ``config.toml`` and ``README.md`` (the model card)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from worldloom import config as configs
from worldloom import registry
from worldloom.artifacts import atomic_dir
from worldloom.weights import assign_weights, read_weights, write_weights
from worldloom_tokenizers.causal_vae import CausalVAE
from worldloom_tokenizers.config import CausalVAEConfig


@dataclass(frozen=True)
class TokenizerCheckpoint:
    """``config.toml`` of a tokenizer folder."""

    kind: str = "causal-vae"
    """The class that reads it."""
    model: CausalVAEConfig = field(default_factory=CausalVAEConfig)
    """The network."""


def load_tokenizer(name_or_path: str | Path, device: str = "cpu") -> CausalVAE:
    """A tokenizer by catalog name or from a folder, in evaluation mode, float32.

    Raises:
        WorldloomError: unknown name, missing or damaged files, weights that do not fit the configuration.
    """
    text = str(name_or_path)
    if "/" not in text and not Path(text).is_dir():
        entry = registry.entry("tokenizers", text)
        folder = entry.folder
        assert folder is not None, f"catalog line of {text} has no path"
        return registry.load("tokenizers", text)(folder, device=device, sha256=str(entry.meta.get("sha256", "")))
    return load(Path(text), device=device)


def load(path: Path, device: str = "cpu", sha256: str = "") -> CausalVAE:
    """A tokenizer from a folder; ``sha256`` of the weights is checked where it is given."""
    weights = read_weights(path, sha256)
    checkpoint = configs.load(TokenizerCheckpoint, path / "config.toml")
    model = CausalVAE(checkpoint.model)
    assign_weights(model, weights, path)
    return model.to(device).eval()


def save(model: CausalVAE, path: Path, card: str, dtype: torch.dtype = torch.float16) -> None:
    """Write a tokenizer folder, all or nothing. ``card`` is the text of its README."""
    with atomic_dir(path) as folder:
        # Statistics stay exact: they are few, and scale every latent.
        tensors = {
            name: tensor.to(torch.float32 if name.startswith("latent_") else dtype)
            for name, tensor in model.state_dict().items()
        }
        write_weights(tensors, folder)
        configs.save(TokenizerCheckpoint(model=model.config), folder / "config.toml")
        (folder / "README.md").write_text(card, encoding="utf-8")
