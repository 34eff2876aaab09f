"""Video tokenizers: frames to latents and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worldloom_tokenizers.causal_vae import CausalVAE
    from worldloom_tokenizers.checkpoint import load_tokenizer
    from worldloom_tokenizers.config import CausalVAEConfig
    from worldloom_tokenizers.encode import encode_dataset

__all__ = ["CausalVAE", "CausalVAEConfig", "encode_dataset", "load_tokenizer"]

_HOMES = {
    "CausalVAE": "causal_vae",
    "CausalVAEConfig": "config",
    "encode_dataset": "encode",
    "load_tokenizer": "checkpoint",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the catalog must be readable without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
