"""A latent action model (Bruce et al. 2024, "Genie", arXiv:2402.15391, section 2.1): actions found in video alone.

An encoder looks at a frame and the next one and names what happened between them with one of a few codes; a decoder
makes the next frame from the frames before it and the code. All that the decoder cannot see in the past must come
through the code, and as a code holds a few bits only, training fills it with what changes most from one moment to the
next: what the agent did. No action labels take part.

Both networks see frames as patches of 4x4 pixels; frames may have any size that a multiple of 8 pixels divides.

Letters: b batch, T frames, p past frames, n pairs of consecutive frames, d code size, e width, H W pixels, h w patches.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldloom import config as configs
from worldloom import registry
from worldloom.artifacts import atomic_dir
from worldloom.errors import WorldloomError
from worldloom.weights import assign_weights, read_weights, write_weights
from worldloom_tokenizers.config import LatentActionConfig
from worldloom_tokenizers.vq import VectorQuantizer

KIND = "latent-actions"
_PATCH = 4
_EDGE = 8  # frame sizes are multiples of this: a patch, halved once
_PAIRS = 128  # pairs computed at a time where no gradients are recorded


class Block(nn.Module):
    """Residual block, scaled and shifted by a code where it is given one (FiLM, Perez et al. 2018)."""

    def __init__(self, width: int, code_dim: int = 0) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.film = nn.Linear(code_dim, 2 * width) if code_dim else None

    def forward(self, x: Tensor, code: Tensor | None = None) -> Tensor:
        """``(n, e, h, w)`` and ``(n, d)`` -> ``(n, e, h, w)``."""
        y = self.conv1(F.silu(self.norm(x)))
        if self.film is not None:
            assert code is not None, "this block is steered by a code"
            scale, shift = self.film(code)[:, :, None, None].chunk(2, dim=1)
            y = y * (1 + scale) + shift
        return x + self.conv2(F.silu(y))


class Encoder(nn.Module):
    """Past frames and the next -> what is quantised."""

    def __init__(self, config: LatentActionConfig) -> None:
        super().__init__()
        width = config.width
        self.patches = nn.Conv2d(3 * (config.past + 1), width, _PATCH, stride=_PATCH)
        self.fine = nn.Sequential(*(Block(width) for _ in range(config.encoder_blocks)))
        self.halve = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.coarse = nn.Sequential(*(Block(2 * width) for _ in range(config.encoder_blocks)))
        self.out = nn.Linear(2 * width, config.code_dim)

    def features(self, past: Tensor, following: Tensor) -> Tensor:
        """``(n, 3p, H, W)`` and ``(n, 3, H, W)`` -> ``(n, 2e)``."""
        # The difference beside the frames: where nothing happens, nothing is there.
        x = self.patches(torch.cat([past, following - past[:, -3:]], dim=1))
        x = self.coarse(self.halve(self.fine(x)))
        return F.silu(x).mean(dim=(2, 3))

    def forward(self, past: Tensor, following: Tensor) -> Tensor:
        """``(n, 3p, H, W)`` and ``(n, 3, H, W)`` -> ``(n, d)``."""
        return self.out(self.features(past, following))


class Decoder(nn.Module):
    """Past frames and a code -> the next frame."""

    def __init__(self, config: LatentActionConfig) -> None:
        super().__init__()
        width, d = config.width, config.code_dim
        self.patches = nn.Conv2d(3 * config.past, width, _PATCH, stride=_PATCH)
        self.down = nn.ModuleList(Block(width, d) for _ in range(config.decoder_blocks))
        self.halve = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.coarse = nn.ModuleList(Block(2 * width, d) for _ in range(config.decoder_blocks))
        self.grow = nn.Conv2d(2 * width, 4 * width, 1)
        self.up = nn.ModuleList(Block(width, d) for _ in range(config.decoder_blocks))
        self.out = nn.Conv2d(width, 3 * _PATCH**2, 1)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)  # it begins with "nothing changes"

    def forward(self, past: Tensor, code: Tensor) -> Tensor:
        """``(n, 3p, H, W)`` and ``(n, d)`` -> ``(n, 3, H, W)``."""
        x = self.patches(past)
        for block in self.down:
            x = block(x, code)
        y = self.halve(x)
        for block in self.coarse:
            y = block(y, code)
        x = x + F.pixel_shuffle(self.grow(y), 2)
        for block in self.up:
            x = block(x, code)
        return past[:, -3:] + F.pixel_shuffle(self.out(x), _PATCH)


class LatentActionModel(nn.Module):
    """Latent actions of videos ``(b, 3, T, H, W)`` in [-1, 1].

    Args:
        config: sizes and the loss; part of the fingerprint.
    """

    def __init__(self, config: LatentActionConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantizer = VectorQuantizer(
            config.codes, config.code_dim, config.commitment, config.balance, config.bypass
        )
        self.decoder = Decoder(config)

    @torch.no_grad()
    def initialise(self, video: Tensor) -> None:
        """Spread the encodings of ``(b, 3, T, H, W)``, at least a few hundred pairs, and put the codes among them.

        Random networks give all pairs nearly the same vector, and one code would take them all. So the last layer of
        the encoder whitens what its features hold, and the codes start where k-means on the sphere puts them.

        Raises:
            WorldloomError: fewer pairs than codes.
        """
        past, following = self._past(video[:, :, :-1]), _flat(video[:, :, 1:])
        parts = zip(past.split(_PAIRS), following.split(_PAIRS), strict=True)
        if len(past) < max(self.config.codes, self.config.code_dim):
            raise WorldloomError(
                f"{self.config.codes} codes need as many pairs of frames at least", got=len(past), do="give more video"
            )
        features = torch.cat([self.encoder.features(*part) for part in parts])
        centred = features - features.mean(dim=0)
        _, scale, axes = torch.linalg.svd(centred, full_matrices=False)
        axes = axes[: self.config.code_dim] / (scale[: self.config.code_dim, None] / len(features) ** 0.5 + 1e-6)
        self.encoder.out.weight.copy_(axes)
        self.encoder.out.bias.copy_(-axes @ features.mean(dim=0))
        self.quantizer.initialise(centred @ axes.T)

    @torch.no_grad()
    def infer(self, video: Tensor) -> Tensor:
        """``(b, 3, T, H, W)``, T at least 2 -> int64 ``(b, T-1)``: action t leads from frame t to frame t+1."""
        self.check_video(video, 2)
        past, following = self._past(video[:, :, :-1]), _flat(video[:, :, 1:])
        parts = zip(past.split(_PAIRS), following.split(_PAIRS), strict=True)
        indices = torch.cat([self.quantizer(self.encoder(*part)).indices for part in parts])
        return indices.unflatten(0, (len(video), -1))

    @torch.no_grad()
    def predict(self, video: Tensor, actions: Tensor) -> Tensor:
        """The next frame after each frame: ``(b, 3, T, H, W)`` and int ``(b, T)`` -> ``(b, 3, T, H, W)``.

        Frame t of the result is made from ``actions[:, t]`` and frames up to t of `video`, as far back as the model
        looks.
        """
        self.check_video(video, 1)
        self._check_actions(actions, (len(video), video.shape[2]))
        parts = zip(self._past(video).split(_PAIRS), actions.flatten().split(_PAIRS), strict=True)
        frames = torch.cat([self.decoder(past, self.quantizer.lookup(index)) for past, index in parts])
        return frames.clamp(-1, 1).unflatten(0, (len(video), -1)).movedim(1, 2)

    def loss(self, video: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, dict[str, float]]:
        """Loss of all pairs of consecutive frames of ``(b, 3, T, H, W)``, and what it is made of."""
        past, following = self._past(video[:, :, :-1]), _flat(video[:, :, 1:])
        code = self.quantizer(self.encoder(past, following), generator if self.training else None)
        made = self.decoder(past, code.codes)
        moved = (following - past[:, -3:]).abs().mean(dim=1, keepdim=True)
        weight = 1 + self.config.moving_weight * (moved > self.config.moving_threshold)
        error = (weight * (made - following).square()).mean() / weight.mean()
        still = (weight * (past[:, -3:] - following).square()).mean() / weight.mean()
        share = torch.bincount(code.indices, minlength=self.config.codes) / len(code.indices)
        perplexity = (-torch.special.xlogy(share, share).sum()).exp()
        metrics = {"error": float(error.detach()), "still": float(still), "perplexity": float(perplexity)}
        return error + code.loss * self.config.codebook_weight, metrics

    def _past(self, video: Tensor) -> Tensor:
        """``(b, 3, T, H, W)`` -> ``(b*T, 3p, H, W)``: each frame and those before it, oldest first."""
        first = video[:, :, :1].expand(-1, -1, self.config.past - 1, -1, -1)  # nothing is known before the beginning
        padded, frames = torch.cat([first, video], dim=2), video.shape[2]
        return torch.cat([_flat(padded[:, :, i : i + frames]) for i in range(self.config.past)], dim=1)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the configuration and of every weight, as float32."""
        digest = hashlib.sha256(configs.dumps(self.config).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def check_video(self, video: Tensor, frames: int = 2) -> None:
        """Refuse what is no video ``(b, 3, T, H, W)`` of at least ``frames`` frames that this model takes.

        Raises:
            WorldloomError: another shape or size, or values that are not finite.
        """
        if video.ndim != 5 or video.shape[1] != 3 or video.shape[2] < frames or not len(video):
            raise WorldloomError(f"a video is (b, 3, T, H, W), T at least {frames}", got=tuple(video.shape))
        if any(side % _EDGE or not side for side in video.shape[3:]):
            raise WorldloomError(
                f"height and width must be multiples of {_EDGE}", got=tuple(video.shape[3:]), do="resize the video"
            )
        if not torch.isfinite(video).all():
            raise WorldloomError("the video holds values that are not finite", do="check how it was decoded")

    def _check_actions(self, actions: Tensor, shape: tuple[int, int]) -> None:
        if actions.dtype.is_floating_point or tuple(actions.shape) != shape:
            raise WorldloomError(f"latent actions are integers {shape}, one for each frame", got=tuple(actions.shape))
        if not 0 <= int(actions.min()) <= int(actions.max()) < self.config.codes:
            raise WorldloomError(
                f"latent actions are 0 to {self.config.codes - 1}", got=(int(actions.min()), int(actions.max()))
            )


def _flat(video: Tensor) -> Tensor:
    """``(b, 3, T, H, W)`` -> ``(b*T, 3, H, W)``."""
    return video.movedim(2, 1).flatten(0, 1)


# -- on disk ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LatentActionCheckpoint:
    """``config.toml`` of a folder that holds a latent action model."""

    kind: str = KIND
    """What the folder holds."""
    model: LatentActionConfig = field(default_factory=LatentActionConfig)
    """The networks."""


def load_latent_actions(name_or_path: str | Path, device: str = "cpu") -> LatentActionModel:
    """A latent action model by catalog name or from a folder, in evaluation mode, float32.

    Raises:
        WorldloomError: an unknown name or one of something else, missing or damaged files, weights that do not fit.
    """
    text = str(name_or_path)
    if "/" in text or Path(text).exists():
        return load(Path(text), device)
    entry = registry.entry("tokenizers", text)
    if entry.meta.get("kind") != KIND or entry.folder is None:
        raise WorldloomError("this is no latent action model", got=text, do="use load_tokenizer for video tokenizers")
    return registry.load("tokenizers", text)(entry.folder, device, str(entry.meta.get("sha256", "")))


def load(path: Path, device: str = "cpu", sha256: str = "") -> LatentActionModel:
    """A latent action model from a folder; ``sha256`` of the weights is checked where it is given."""
    weights = read_weights(path, sha256)
    kind = configs.read_toml(path / "config.toml").get("kind")
    if kind != KIND:
        raise WorldloomError("this folder holds no latent action model", got=f"{path}: kind = {kind!r}")
    model = LatentActionModel(configs.load(LatentActionCheckpoint, path / "config.toml").model)
    assign_weights(model, weights, path)
    return model.to(device).eval()


def save(model: LatentActionModel, path: Path, card: str, dtype: torch.dtype = torch.float16) -> None:
    """Write a folder with weights, configuration and ``card``, the text of its README; all or nothing."""
    with atomic_dir(path) as folder:
        write_weights({name: tensor.to(dtype) for name, tensor in model.state_dict().items()}, folder)
        write_config(model.config, folder / "config.toml")
        (folder / "README.md").write_text(card, encoding="utf-8")


def write_config(config: LatentActionConfig, path: Path) -> None:
    """Write the ``config.toml`` of a model."""
    configs.save(LatentActionCheckpoint(KIND, config), path)
