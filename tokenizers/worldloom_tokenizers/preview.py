"""Preview decoders: a tokenizer's latents to frames at a fraction of the cost, for a picture while it is being made.

A preview decoder belongs to one tokenizer, whose fingerprint it names. As the tokenizer's own decoder it is a linear
map from latent vectors to pixels plus a convolutional network, causal along time; but the network is narrow and stops
at twice the size of the latents, so that nothing is computed at the resolution of the frames.

Checkpoints are folders with ``model.safetensors``, ``config.toml`` (`PreviewCheckpoint`) and ``README.md``.

Letters: b batch, c channels, t latent frames, T video frames, r temporal ratio, s spatial ratio, h w latent size.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldloom import config as configs
from worldloom import registry
from worldloom.errors import WorldloomError
from worldloom.weights import assign_weights, read_weights
from worldloom_tokenizers.causal_vae import RMSNorm, Stack
from worldloom_tokenizers.codec import State, digest
from worldloom_tokenizers.config import PreviewConfig

KIND = "preview-decoder"
_CHUNK = 8  # latent frames that are computed at a time


@dataclass(frozen=True)
class Teacher:
    """The tokenizer whose latents a preview decoder takes."""

    name: str = ""
    """Catalog name or folder."""
    fingerprint: str = ""
    """Its fingerprint."""


@dataclass(frozen=True)
class PreviewCheckpoint:
    """``config.toml`` of a preview decoder's folder."""

    kind: str = KIND
    """Says what the folder holds."""
    tokenizer: Teacher = field(default_factory=Teacher)
    """The tokenizer it belongs to."""
    model: PreviewConfig = field(default_factory=PreviewConfig)
    """The network."""


class PreviewDecoder(nn.Module):
    """The network: ``(b, c, t, h, w)`` normalised latents to ``(b, 3, 1 + r (t-1), s h, s w)``.

    Args:
        config: sizes.
        tokenizer: the one whose latents it takes.
    """

    def __init__(self, config: PreviewConfig, tokenizer: Teacher) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        wide, narrow = config.widths
        pixels, half = 3 * config.temporal_ratio, config.spatial_ratio // 2
        self.linear = nn.Conv2d(config.latent_channels, pixels * config.spatial_ratio**2, 1)
        self.enter = nn.Conv2d(config.latent_channels, wide, 3, padding=1)
        self.first = Stack(wide, config.blocks[0], config.temporal_kernel)
        self.up = nn.Conv2d(wide, 4 * narrow, 1)
        self.second = Stack(narrow, config.blocks[1], config.temporal_kernel)
        self.norm = RMSNorm(narrow)
        self.leave = nn.Conv2d(narrow, pixels * half**2, 1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(cast(Tensor, self.leave.bias))
        self.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]

    def forward(self, latents: Tensor, state: State | None = None) -> Tensor:
        """Latents -> frames, not clamped; ``state`` as in `VideoCodec.decode_raw`."""
        ratio, edge, first = self.config.temporal_ratio, self.config.spatial_ratio, not state
        b, _, t = latents.shape[:3]
        z = latents.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)  # (b*t, c, h, w)
        x = self.first(self.enter(z), t, state)
        x = self.second(F.pixel_shuffle(self.up(x), 2), t, state)
        x = F.pixel_shuffle(self.leave(F.silu(self.norm(x))), edge // 2)  # (b*t, 3*r, H, W)
        x = x + F.pixel_shuffle(self.linear(z), edge)
        # (b*t, 3*r, H, W) -> (b, 3, t*r, H, W)
        video = x.unflatten(1, (3, ratio)).unflatten(0, (b, t)).permute(0, 2, 1, 3, 4, 5).flatten(2, 3)
        return video[:, :, ratio - 1 :] if first else video

    def decode(self, latents: Tensor) -> Tensor:
        """Latents as the tokenizer's ``encode`` gives them -> frames in [-1, 1].

        Raises:
            WorldloomError: latents of another shape.
        """
        state: State = {}
        return torch.cat([self.decode_step(part, state) for part in latents.split(_CHUNK, dim=2)], dim=2)

    def decode_step(self, latents: Tensor, state: State) -> Tensor:
        """The next latents of a stream whose state the caller holds; start with an empty dict."""
        channels = self.config.latent_channels
        if latents.ndim != 5 or latents.shape[1] != channels or latents.shape[2] < 1:
            raise WorldloomError(f"latents are (b, {channels}, t, h, w), t at least 1", got=tuple(latents.shape))
        video = self.forward(latents, state)
        state.setdefault("begun", torch.ones(()))  # without temporal layers nothing else is left in it
        return video.clamp(-1, 1)

    def check(self, fingerprint: str) -> None:
        """Refuse the latents of another tokenizer.

        Raises:
            WorldloomError: ``fingerprint`` is not that of the tokenizer this decoder belongs to.
        """
        if fingerprint != self.tokenizer.fingerprint:
            raise WorldloomError(
                "these latents were made by another tokenizer than the preview decoder's",
                got=f"latents {fingerprint[:12]}, decoder {self.tokenizer.fingerprint[:12]} ({self.tokenizer.name})",
                do="decode them with their tokenizer, or train it one: worldloom finetune preview-decoder",
            )

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) that changes whenever the frames would."""
        return digest(self.config, self.state_dict())

    @torch.no_grad()
    def initialise(self, latents: Tensor, video: Tensor) -> None:
        """Set the linear map to the least-squares one from latents ``(b, c, t, h, w)`` to their ``(b, 3, T, H, W)``."""
        ratio, edge = self.config.temporal_ratio, self.config.spatial_ratio
        video = torch.cat([video[:, :, :1].expand(-1, -1, ratio - 1, -1, -1), video], dim=2)  # frame 0 fills a group
        _, c, frames, height, width = video.shape
        groups = video.unflatten(2, (frames // ratio, ratio)).permute(0, 2, 1, 3, 4, 5)
        groups = groups.reshape(-1, c * ratio, height, width)  # (b*t, 3*r, H, W)
        patches = F.pixel_unshuffle(groups, edge).permute(0, 2, 3, 1).flatten(0, 2).double()  # (b*t*h*w, 3*r*s*s)
        vectors = latents.permute(0, 2, 3, 4, 1).flatten(0, 3).double()  # (b*t*h*w, c)
        known = torch.cat([vectors, torch.ones_like(vectors[:, :1])], dim=1)
        small = 1e-6 * len(known) * torch.eye(known.shape[1], dtype=known.dtype)  # a channel may be constant
        solution = torch.linalg.solve(known.T @ known + small, known.T @ patches)
        self.linear.weight.copy_(solution[:-1].T[:, :, None, None])
        cast(Tensor, self.linear.bias).copy_(solution[-1])


def load_preview(name_or_path: str | Path, device: str = "cpu") -> PreviewDecoder:
    """The preview decoder that ships for a tokenizer, by the tokenizer's catalog name, or one from a folder.

    Raises:
        WorldloomError: unknown name, a tokenizer without a preview decoder, missing or damaged files.
    """
    text = str(name_or_path)
    if "/" in text or Path(text).is_dir():
        return load(Path(text), device=device)
    entry = registry.entry("tokenizers", text)
    if "preview" not in entry.meta:
        raise WorldloomError(
            "there is no preview decoder for this tokenizer",
            got=text,
            do=f"train one: worldloom finetune preview-decoder --model {text} --data CLIPS --out RUN",
        )
    folder = dataclasses.replace(entry, meta={"path": entry.meta["preview"]}).folder
    assert folder is not None, "it has a path"
    return load(folder, device=device, sha256=str(entry.meta.get("preview_sha256", "")))


def load(path: Path, device: str = "cpu", sha256: str = "") -> PreviewDecoder:
    """A preview decoder from a folder; ``sha256`` of the weights is checked where it is given."""
    weights = read_weights(path, sha256)
    kind = configs.read_toml(path / "config.toml").get("kind")
    if kind != KIND:
        raise WorldloomError("there is no preview decoder here", got=f"{path}: kind = {kind!r}", do="give its folder")
    checkpoint = configs.load(PreviewCheckpoint, path / "config.toml")
    model = PreviewDecoder(checkpoint.model, checkpoint.tokenizer)
    assign_weights(model, weights, path)
    return model.to(device).eval()
