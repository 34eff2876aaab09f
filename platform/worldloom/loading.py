"""From a name, a folder or an artifact id to a model that is ready to use, whichever package it lives in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from worldloom import config as configs
from worldloom import registry
from worldloom.artifacts import Store
from worldloom.errors import WorldloomError


def load_model(
    name_or_path: str | Path,
    device: str = "cpu",
    tokenizer: str | Path | None = None,
    store: Store | None = None,
) -> Any:
    """A model by catalog name, checkpoint or LoRA adapter folder, or artifact id; what it can do, its protocols say.

    Args:
        device: where it runs, e.g. ``cuda``.
        tokenizer: a name or folder to use in place of the checkpoint's own; its fingerprint must match.
        store: where artifact ids are looked up; None for the default store.

    Raises:
        WorldloomError: unknown name, missing or damaged files, an adapter whose base has changed, no such device.
    """
    check_device(device)
    text = str(name_or_path)
    folder = Path(text)
    if "/" not in text and not folder.is_dir():
        made = _made(text, store)
        if made is None:
            shipped, sha256 = checkpoint_folder(text)
            return registry.load("models", text)(shipped, device=device, sha256=sha256, tokenizer=tokenizer, name=text)
        folder = made
    settings = folder / "config.toml"
    if not settings.is_file():
        raise WorldloomError(
            "this is neither a known model nor a checkpoint folder",
            got=text,
            do=f"give one of {', '.join(registry.names('models'))}, or a folder with config.toml",
        )
    family = str(configs.read_toml(settings).get("family", ""))
    return registry.load("families", family)(folder, device=device, tokenizer=tokenizer)


def checkpoint_folder(name: str) -> tuple[Path, str]:
    """The folder that a catalog name or a path means, there or not, and the sha256 of its weights: "" for a path.

    Raises:
        WorldloomError: a name that no catalog has.
    """
    if "/" in name or Path(name).is_dir():
        return Path(name), ""
    entry = registry.entry("models", name)
    assert entry.folder is not None, f"catalog line of {name} has no path"
    return entry.folder, str(entry.meta.get("sha256", ""))


def _made(text: str, store: Store | None) -> Path | None:
    """The folder of a model made here, by its whole artifact id; None where the text is no such id."""
    if text in registry.group("models").entries or not text.startswith(("model-", "adapter-")):
        return None
    try:
        return Path((store or Store()).get(text).location)
    except WorldloomError:
        return None  # the catalog's error names what there is


def check_device(device: str) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        WorldloomError: naming those it has.
    """
    import torch

    try:
        torch.empty(0, device=device)
    # torch raises AssertionError, RuntimeError or NotImplementedError, by device and build.
    except Exception as error:
        known = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        raise WorldloomError("there is no such device here", got=device, do=f"use {' or '.join(known)}") from error
