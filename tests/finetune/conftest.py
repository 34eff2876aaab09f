"""A tiny tokenizer, a tiny base model and tiny data, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from finetune_runs import make_clips, make_latents

from worldloom_model_zoo.predict.checkpoint import save as save_model
from worldloom_model_zoo.predict.config import PredictCheckpoint, TokenizerRef, tiny
from worldloom_model_zoo.predict.model import PredictTransformer
from worldloom_tokenizers.causal_vae import CausalVAE
from worldloom_tokenizers.checkpoint import load_tokenizer
from worldloom_tokenizers.checkpoint import save as save_tokenizer
from worldloom_tokenizers.config import CausalVAEConfig


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal VAE with random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tokenizer") / "tiny-vae"
    save_tokenizer(CausalVAE(CausalVAEConfig(widths=(8, 8, 8))), folder, "A tokenizer for tests.")
    return folder


@pytest.fixture(scope="session")
def latents(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """Encoded clips (made up, but under the tiny tokenizer's fingerprint), two actions a frame."""
    fingerprint = load_tokenizer(tokenizer_folder).fingerprint
    root = tmp_path_factory.mktemp("latents") / "two-actions"
    return make_latents(root, fingerprint=fingerprint, tokenizer=str(tokenizer_folder))


@pytest.fixture(scope="session")
def latents_of_three_actions(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """The same with three actions a frame."""
    fingerprint = load_tokenizer(tokenizer_folder).fingerprint
    root = tmp_path_factory.mktemp("latents") / "three-actions"
    return make_latents(root, actions=3, fingerprint=fingerprint, tokenizer=str(tokenizer_folder))


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips of 17 frames, 32x32."""
    return make_clips(tmp_path_factory.mktemp("clips") / "squares")


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A world model with two actions whose every weight is random, so that nothing it computes is zero."""
    torch.manual_seed(0)
    model = PredictTransformer(tiny(action_dim=2))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.1 * torch.randn_like(p))
    reference = TokenizerRef(str(tokenizer_folder), load_tokenizer(tokenizer_folder).fingerprint)
    checkpoint = PredictCheckpoint(height=32, width=32, fps=10.0, model=model.config, tokenizer=reference)
    folder = tmp_path_factory.mktemp("base") / "tiny-world"
    save_model(model, checkpoint, folder, "A model for tests.", torch.float32)
    return folder
