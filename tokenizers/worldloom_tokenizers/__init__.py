"""Video tokenizers: frames to latents and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worldloom.lazy import exports

if TYPE_CHECKING:
    from worldloom_tokenizers.actions import ActionCodec
    from worldloom_tokenizers.causal_vae import CausalVAE
    from worldloom_tokenizers.checkpoint import load_tokenizer
    from worldloom_tokenizers.codec import Tiling, VideoCodec
    from worldloom_tokenizers.config import CausalVAEConfig
    from worldloom_tokenizers.encode import encode_dataset
    from worldloom_tokenizers.latent_actions import load_latent_actions
    from worldloom_tokenizers.preview import load_preview
    from worldloom_tokenizers.released import load_released
    from worldloom_tokenizers.semantic import load_semantic
    from worldloom_tokenizers.text import load_text_encoder

__all__ = [
    "ActionCodec",
    "CausalVAE",
    "CausalVAEConfig",
    "Tiling",
    "VideoCodec",
    "encode_dataset",
    "load_latent_actions",
    "load_preview",
    "load_released",
    "load_semantic",
    "load_text_encoder",
    "load_tokenizer",
]

__getattr__ = exports(
    __name__,
    {
        "ActionCodec": "worldloom_tokenizers.actions",
        "CausalVAE": "worldloom_tokenizers.causal_vae",
        "CausalVAEConfig": "worldloom_tokenizers.config",
        "Tiling": "worldloom_tokenizers.codec",
        "VideoCodec": "worldloom_tokenizers.codec",
        "encode_dataset": "worldloom_tokenizers.encode",
        "load_latent_actions": "worldloom_tokenizers.latent_actions",
        "load_preview": "worldloom_tokenizers.preview",
        "load_released": "worldloom_tokenizers.released",
        "load_semantic": "worldloom_tokenizers.semantic",
        "load_text_encoder": "worldloom_tokenizers.text",
        "load_tokenizer": "worldloom_tokenizers.checkpoint",
    },
)
