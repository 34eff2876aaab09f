"""Real tokenizers, checkpoints and datasets at the smallest sizes, random weights throughout, no layer left at zero."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from worldloom import media
from worldloom.schema import Clip, clip_id
from worldloom.shards import Dataset, ShardSample, ShardWriter, commit_dataset, open_dataset
from worldloom_model_zoo.predict import checkpoint as predict_checkpoint
from worldloom_model_zoo.predict.config import PredictCheckpoint, PredictConfig, SamplerConfig, TokenizerRef
from worldloom_model_zoo.predict.model import PredictTransformer
from worldloom_tokenizers import checkpoint as tokenizer_checkpoint
from worldloom_tokenizers.causal_vae import CausalVAE
from worldloom_tokenizers.config import CausalVAEConfig

SIZE = 32
ACTIONS = ("left", "right", "fire")
VAE = CausalVAEConfig(latent_channels=4, widths=(8, 8, 16), encoder_blocks=(0, 1, 1), decoder_blocks=(1, 1, 1))


def stir(module: torch.nn.Module, seed: int) -> None:
    """Give every parameter that starts at zero random values, so that no path through the network is dead."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                scale = 0.1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def scatter(module: torch.nn.Module, seed: int) -> None:
    """Weights at which no layer is dead and nothing explodes."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        spread = 0.5 if p.numel() == p.shape[0] else p[0].numel() ** -0.5
        p.data.copy_(spread * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def tokenizer(seed: int = 0, config: CausalVAEConfig = VAE) -> CausalVAE:
    """A tokenizer in memory."""
    torch.manual_seed(seed)
    model = CausalVAE(config)
    stir(model, seed)
    return model.eval()


def tokenizer_folder(path: Path, seed: int = 0) -> Path:
    """A saved tokenizer."""
    tokenizer_checkpoint.save(tokenizer(seed), path, "# tiny\n")
    return path


def world_folder(
    path: Path,
    tokenizer_path: Path,
    *,
    seed: int = 0,
    actions: tuple[str, ...] = ACTIONS,
    attention: str = "causal",
    sampler: SamplerConfig | None = None,
) -> Path:
    """A saved world model that works with the tokenizer in `tokenizer_path`."""
    config = PredictConfig(
        latent_channels=VAE.latent_channels, width=32, blocks=2, heads=2, adaln_rank=8,
        action_dim=len(actions), action_hidden=16, attention=attention,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    torch.manual_seed(seed)
    model = PredictTransformer(config)
    stir(model, seed)
    fingerprint = tokenizer_checkpoint.load(tokenizer_path).fingerprint
    checkpoint = PredictCheckpoint(
        height=SIZE, width=SIZE, fps=10.0, action_names=actions, model=config,
        sampler=sampler or SamplerConfig(steps=2), tokenizer=TokenizerRef(str(tokenizer_path), fingerprint),
    )  # fmt: skip
    predict_checkpoint.save(model, checkpoint, path, "# tiny world\n")
    return path


def world(path: Path, **options: object) -> Path:
    """A tokenizer and a world model that uses it, under `path`; returns the model's folder."""
    folder = path / "tiny-tokenizer"
    if not folder.exists():
        tokenizer_folder(folder)
    return world_folder(path / "tiny-world", folder, **options)  # pyright: ignore[reportArgumentType]


def moving_square(frames: int, seed: int, size: int = SIZE) -> np.ndarray:
    """A bright square that wanders over a gradient: uint8 ``(t, size, size, 3)``."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(20, 120, size).astype(np.uint8)
    video = np.empty((frames, size, size, 3), np.uint8)
    y, x = random.integers(0, size - 8, 2)
    for frame in video:
        frame[:] = ramp[None, :, None]
        frame[y : y + 8, x : x + 8] = (250, 200, 40)
        y, x = (np.array([y, x]) + random.integers(-3, 4, 2)).clip(0, size - 8)
    return video


def clips(
    root: Path, lengths: tuple[int, ...] = (40, 40, 23), names: tuple[str, ...] | None = ACTIONS, size: int = SIZE
) -> Dataset:
    """A dataset of clips with one-hot actions called `names`, or without actions."""
    with ShardWriter(root) as writer:
        for number, length in enumerate(lengths):
            random = np.random.default_rng(100 + number)
            digest = f"{number:064x}"
            arrays = {}
            if names:
                arrays["actions"] = np.eye(len(names), dtype=np.float32)[random.integers(0, len(names), length - 1)]
            clip = Clip(
                clip_id(digest, 0, length), f"episode-{number}", digest, 0, length, 10.0, size, size,
                action_dim=len(names or ()), metadata={"action_names": list(names)} if names else {},
            )  # fmt: skip
            video = media.write_video(None, moving_square(length, number, size), 10.0, lossless=True)
            writer.write(ShardSample(clip, video, arrays))
        refs = writer.close()
    commit_dataset(root, refs, metadata={"action_names": list(names)} if names else {})
    return open_dataset(root)
