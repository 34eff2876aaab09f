"""Tokenizer checkpoints: a folder with ``model.safetensors``, ``config.toml`` and ``README.md`` (the model card).

``config.toml`` names the kind of the network and holds its configuration::

    kind = "causal-vae"

    [model]
    latent_channels = 16
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from worldloom import config as configs
from worldloom import registry
from worldloom.artifacts import atomic_dir
from worldloom.errors import WorldloomError
from worldloom.weights import assign_weights, read_weights, write_weights
from worldloom_tokenizers.codec import VideoCodec

KINDS = {
    "causal-vae": ("worldloom_tokenizers.config:CausalVAEConfig", "worldloom_tokenizers.causal_vae:CausalVAE"),
    "cosmos": (
        "worldloom_tokenizers.cosmos.config:CosmosConfig",
        "worldloom_tokenizers.cosmos.checkpoint:build",
    ),
    "wan": ("worldloom_tokenizers.wan.config:WanVAEConfig", "worldloom_tokenizers.wan.model:WanVAE"),
    "vit": ("worldloom_tokenizers.config:ViTConfig", "worldloom_tokenizers.vit:CausalViT"),
}
"""Kind -> the class of its configuration and the `VideoCodec` that is built from one; imported when it is used."""


@dataclass(frozen=True)
class TokenizerCheckpoint:
    """``config.toml`` of a tokenizer folder."""

    kind: str
    """The network's line in `KINDS`."""
    model: Any
    """The network: the kind's configuration."""


def kind_of(config: Any) -> str:
    """The kind whose configuration this is."""
    target = f"{type(config).__module__}:{type(config).__qualname__}"
    kind = next((kind for kind, (known, _) in KINDS.items() if known == target), None)
    assert kind is not None, f"{target} has no line in KINDS"
    return kind


def build(config: Any) -> VideoCodec:
    """The network that a configuration describes, with new weights."""
    return _imported(KINDS[kind_of(config)][1])(config)


def load_tokenizer(name_or_path: str | Path, device: str = "cpu") -> VideoCodec:
    """A tokenizer by catalog name or from a folder, in evaluation mode, float32.

    Raises:
        WorldloomError: unknown name, missing or damaged files, an unknown kind, weights that do not fit the
            configuration.
    """
    text = str(name_or_path)
    if "/" not in text and not Path(text).exists():
        entry = registry.entry("tokenizers", text)
        folder = entry.folder
        assert folder is not None, f"catalog line of {text} has no path"
        return registry.load("tokenizers", text)(folder, device=device, sha256=str(entry.meta.get("sha256", "")))
    if Path(text).is_file():
        raise WorldloomError(
            "a tokenizer is a folder, and this is a file",
            got=text,
            do="give the folder with model.safetensors and config.toml; worldloom models convert reads pickled weights",
        )
    return load(Path(text), device=device)


def load(path: Path, device: str = "cpu", sha256: str = "") -> VideoCodec:
    """A tokenizer from a folder; ``sha256`` of the weights is checked where it is given."""
    weights = read_weights(path, sha256)
    model = build(read_config(path / "config.toml").model)
    assign_weights(model, weights, path)
    return model.to(device).eval()


def save(model: VideoCodec, path: Path, card: str, dtype: torch.dtype = torch.float16) -> None:
    """Write a tokenizer folder, all or nothing. ``card`` is the text of its README."""
    with atomic_dir(path) as folder:
        # Statistics stay exact: they are few, and scale every latent.
        tensors = {
            name: tensor.to(torch.float32 if name.startswith("latent_") else dtype)
            for name, tensor in model.state_dict().items()
        }
        write_weights(tensors, folder)
        write_config(model.config, folder / "config.toml")
        (folder / "README.md").write_text(card, encoding="utf-8")


def write_config(config: Any, path: Path) -> None:
    """Write the ``config.toml`` of a network with this configuration."""
    configs.save(TokenizerCheckpoint(kind_of(config), config), path)


def read_config(path: Path) -> TokenizerCheckpoint:
    """Read a ``config.toml``; ``model`` is of the class that its kind has in `KINDS`.

    Raises:
        WorldloomError: no such file, an unknown kind, an unknown key, a value that does not fit.
    """
    kind = configs.read_toml(path).get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise WorldloomError(
            f"{path} is not of a tokenizer kind that this version knows",
            got=f"kind = {kind!r}",
            do=f"known: {', '.join(KINDS)}; read a newer kind with a newer worldloom",
        )
    return configs.load(_record(kind), path)


@functools.cache
def _record(kind: str) -> type[TokenizerCheckpoint]:
    """`TokenizerCheckpoint` with the model of one kind, by which a file is validated."""
    cls = _imported(KINDS[kind][0])
    model = ("model", cls, field(default_factory=cls))
    return dataclasses.make_dataclass("TokenizerCheckpoint", [model], bases=(TokenizerCheckpoint,), frozen=True)


def _imported(target: str) -> Any:
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
