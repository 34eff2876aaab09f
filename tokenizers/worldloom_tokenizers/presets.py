"""Named configurations to train a tokenizer from scratch with; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from worldloom_tokenizers.config import CausalVAEConfig, ViTConfig


def causal_vae_nano() -> CausalVAEConfig:
    """Continuous, 4x8x8, 16 channels: what `loom-cv-nano` is; trains and runs on two CPU cores."""
    return CausalVAEConfig()


def causal_vae_nano_fsq() -> CausalVAEConfig:
    """Discrete, 4x8x8: the same network, whose 16 channels are 4 codes of 8 x 5 x 5 x 5 = 1000 values each."""
    return CausalVAEConfig(levels=(8, 5, 5, 5))


def vit_nano() -> ViTConfig:
    """Continuous, 1x16x16, 32 channels: a transformer trained as a masked autoencoder; trains on two CPU cores."""
    return ViTConfig()


PRESETS: dict[str, Callable[[], Any]] = {
    "causal-vae/nano": causal_vae_nano,
    "causal-vae/nano-fsq": causal_vae_nano_fsq,
    "vit/nano": vit_nano,
}
"""What ``worldloom finetune tokenizer --model`` takes besides checkpoints: kind/name -> its configuration."""
