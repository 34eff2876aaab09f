"""From a name or a folder to a model that is ready to use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from worldloom import config as configs
from worldloom import registry
from worldloom.errors import WorldloomError


def load_model(name_or_path: str | Path, device: str = "cpu", tokenizer: str | Path | None = None) -> Any:
    """A model by catalog name, or from a checkpoint or LoRA adapter folder; what it can do, its protocols say.

    Args:
        device: where it runs, e.g. ``cuda``.
        tokenizer: a name or folder to use in place of the checkpoint's own; its fingerprint must match.

    Raises:
        WorldloomError: unknown name, missing or damaged files, an adapter whose base has changed.
    """
    text = str(name_or_path)
    if "/" not in text and not Path(text).is_dir():
        entry = registry.entry("models", text)
        folder = entry.folder
        assert folder is not None, f"catalog line of {text} has no path"
        sha256 = str(entry.meta.get("sha256", ""))
        return registry.load("models", text)(folder, device=device, sha256=sha256, tokenizer=tokenizer, name=text)
    folder = Path(text)
    settings = folder / "config.toml"
    if not settings.is_file():
        raise WorldloomError(
            "this is neither a known model nor a checkpoint folder",
            got=text,
            do=f"give one of {', '.join(registry.names('models'))}, or a folder with config.toml",
        )
    family = str(configs.read_toml(settings).get("family", ""))
    return registry.load("families", family)(folder, device=device, tokenizer=tokenizer)
