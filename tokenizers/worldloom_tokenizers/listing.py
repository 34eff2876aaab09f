"""The tokenizers of the catalogs and what each is, from catalog lines and ``config.toml``; no weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from worldloom import models, registry
from worldloom.errors import WorldloomError

if TYPE_CHECKING:
    from worldloom_tokenizers.codec import VideoCodec


@dataclass(frozen=True)
class ListedTokenizer:
    """One tokenizer; None where its catalog line and folder do not say."""

    name: str
    """What ``--tokenizer`` takes."""
    kind: str | None
    """``continuous`` or ``discrete``, or what its catalog line has as ``kind``."""
    network: str | None
    """``kind`` of its ``config.toml``."""
    ratio: str | None
    """Frames x height x width of a latent vector, e.g. ``4x8x8``."""
    channels: int | None
    """Of a latent vector."""
    codebooks: int | None
    """Codes of a latent vector; None for a continuous one."""
    codebook_size: int | None
    """Codes of one codebook."""
    parameters: int | None
    """Of encoder and decoder together."""
    bytes: int | None
    """Size of ``model.safetensors``."""
    state: str
    """``ok``, ``missing``, ``changed`` (not the file that the catalog names), ``unchecked`` (it names no digest) or
    ``elsewhere`` (it names no folder: the weights come from another package, or are fetched)."""
    summary: str
    """One sentence."""
    folder: str | None
    """Where its files are."""


def listed(problems: list[str] | None = None) -> list[ListedTokenizer]:
    """Every tokenizer of the catalogs, by name; catalogs and folders that cannot be read are told to ``problems``."""
    found: list[ListedTokenizer] = []
    for model in models.known(problems):
        if model.group != "tokenizers":
            continue
        line = registry.group("tokenizers").entries[model.name][0]
        network, codec = None, None
        try:
            if "kind" not in line.meta:  # what names its kind is no video tokenizer
                network, codec = _network(model.folder)
        except WorldloomError as error:
            if problems is not None:
                problems.append(f"{model.name}: {error.what}")
        size = codec.codebook_size if codec is not None else 0
        derived = None if codec is None else "discrete" if size else "continuous"
        found.append(
            ListedTokenizer(
                name=model.name,
                kind=line.meta.get("kind", derived),
                network=network,
                ratio=None if codec is None else f"{codec.temporal_ratio}x{codec.spatial_ratio}x{codec.spatial_ratio}",
                channels=None if codec is None else codec.latent_channels,
                codebooks=codec.codebooks if codec is not None and size else None,
                codebook_size=size or None,
                parameters=model.parameters or None,
                bytes=model.bytes or None,
                state=model.state if model.folder is not None else "elsewhere",
                summary=model.summary,
                folder=None if model.folder is None else str(model.folder),
            )
        )
    return found


def _network(folder: Path | None) -> tuple[str | None, VideoCodec | None]:
    """The kind and network of a folder's ``config.toml``, without memory for weights; None where there is no such file.

    Raises:
        WorldloomError: a configuration that this version does not read.
    """
    if folder is None or not (folder / "config.toml").is_file():
        return None, None
    import torch

    from worldloom_tokenizers import checkpoint

    record = checkpoint.read_config(folder / "config.toml")
    with torch.device("meta"):
        return record.kind, checkpoint.build(record.model)


def print_table(tokenizers: Sequence[ListedTokenizer]) -> None:
    """A table for the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("name", "kind", "ratio", "latents"):
        table.add_column(column, overflow="fold")
    for column in ("parameters", "size"):
        table.add_column(column, justify="right")
    table.add_column("files")
    for one in tokenizers:
        size = "" if one.bytes is None else f"{one.bytes / 2**20:.1f} MiB"
        latents = "" if one.channels is None else f"{one.channels} channels"
        if one.codebook_size is not None:
            latents = f"{one.codebooks} x {one.codebook_size} codes"
        parameters = models.short_count(one.parameters or 0)
        table.add_row(one.name, one.kind or "", one.ratio or "", latents, parameters, size, one.state)
    Console(highlight=False, markup=False).print(table)
