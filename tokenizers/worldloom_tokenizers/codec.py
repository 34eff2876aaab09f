"""What the video tokenizers share: checks, normalised latents, streams, chunks, prefixes, tiles, a fingerprint.

A tokenizer subclasses `VideoCodec` and provides its networks as two pairs of maps. One of each pair is *local*: it
works at pixel resolution, and what it makes at a place depends on the neighbourhood of that place only. The other works
at the resolution of the latents, where memory is no concern, and may look at whole frames (attention):

    video --_to_features (local)--> features --_to_latents--> raw latents --normalise--> latents
    latents --denormalise--> raw latents --_from_latents--> features --_from_features (local)--> video

Tiles cut the local maps only, with a halo as wide as they can see, so tiled results are those of the whole frame.

Every map takes a `State`, in which its temporal layers keep what they need of the frames before; given None, a map
takes its input for the beginning of a video and keeps nothing. A video that is cut between latent frames and sent
through with one state gives what the whole gives.

Letters: b batch, c channels, t latent frames, T video frames, r temporal ratio, h w latent size, H W pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from worldloom.errors import WorldloomError
from worldloom_tokenizers import fsq

State = dict[Any, Tensor]
"""What temporal layers remember between the chunks of a stream, keyed by layer; a stream starts with an empty one.
Tensors in it may be written to as the stream goes on: a stream that is to go on in two ways needs copies of them."""


@dataclass(frozen=True)
class Tiling:
    """Cut frames into tiles to bound memory.

    Where all local maps are convolutions and norms over channels (Loom's and Wan's tokenizers), tiles with their
    default halo give the whole frame's result to 1e-5. Cosmos-Tokenizer normalises over whole frames: tiles shift its
    latents and frames by up to a tenth of their spread, on average, and its features are small enough to do without.
    """

    tile: tuple[int, int] = (256, 256)
    """Height and width of a tile in pixels, without its halo; multiples of the tokenizer's spatial ratio."""
    halo: int | None = None
    """Pixels of surroundings that a tile sees on each side, a multiple of the spatial ratio. Unset takes the reach of
    the network, with which tiled results are those of the whole frame; less is faster and approximate."""


class VideoCodec(nn.Module):
    """A video tokenizer: `worldloom.protocols.VideoTokenizer` on top of the four maps of a subclass.

    With ``levels`` it is discrete: raw latents are codes of finite scalar quantisation; `to_indices` numbers them.

    Args:
        config: a frozen dataclass; part of the fingerprint.
        temporal_ratio: video frames per latent frame, after the first, which is encoded alone.
        spatial_ratio: pixels along an edge of a latent vector.
        latent_channels: channels of the latents.
        levels: levels of each channel of a code; none for a continuous tokenizer.
    """

    latent_mean: Tensor
    latent_std: Tensor
    pixels: ClassVar[int] = 1 << 19
    """Pixels of video computed at a time where no gradients are recorded; one latent frame at least."""
    encode_reach: int = 0
    """How far `_to_features` sees to each side, in features."""
    decode_reach: int = 0
    """How far `_from_features` sees to each side, in features."""

    def __init__(
        self,
        config: Any,
        temporal_ratio: int,
        spatial_ratio: int,
        latent_channels: int,
        levels: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.config = config
        self.temporal_ratio, self.spatial_ratio, self.latent_channels = temporal_ratio, spatial_ratio, latent_channels
        self.levels = levels
        if levels:
            fsq.check_levels(levels)
            if latent_channels % len(levels):
                raise WorldloomError(
                    "each codebook takes as many latent channels as it has levels",
                    got=f"{latent_channels} channels, {len(levels)} levels",
                )
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))

    # -- the networks: a subclass has these --------------------------------------------------------------------------

    def _to_features(self, video: Tensor, state: State | None) -> Tensor:
        """``(b, 3, T, H, W)`` -> features ``(b, d, t, h, w)``; a continued stream has T = r t."""
        raise NotImplementedError

    def _to_latents(self, features: Tensor, state: State | None) -> Tensor:
        """Features -> raw latents ``(b, c, t, h, w)``."""
        raise NotImplementedError

    def _from_latents(self, latents: Tensor, state: State | None) -> Tensor:
        """Raw latents -> features of the decoder ``(b, e, t, h, w)``."""
        raise NotImplementedError

    def _from_features(self, features: Tensor, state: State | None) -> Tensor:
        """Features of the decoder -> ``(b, 3, T, H, W)``, not clamped."""
        raise NotImplementedError

    # -- whole networks on raw latents: what training uses -----------------------------------------------------------

    def encode_raw(self, video: Tensor, state: State | None = None) -> Tensor:
        """``(b, 3, T, H, W)`` -> ``(b, c, t, h, w)`` before normalisation. A continued stream has T = r t."""
        return self._quantize(self._to_latents(self._to_features(video, state), state))

    def decode_raw(self, latents: Tensor, state: State | None = None) -> Tensor:
        """``(b, c, t, h, w)`` before normalisation -> ``(b, 3, T, H, W)``, not clamped."""
        return self._from_features(self._from_latents(latents, state), state)

    def encode_for_training(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """`encode_raw` as a training step calls it; a subclass may hide parts of the video, drawn from `generator`."""
        del generator
        return self.encode_raw(video)

    def initialise(self, video: Tensor) -> None:
        """Set initial weights that follow from some real video ``(b, 3, 1 + r k, H, W)``; a subclass may have such."""

    # -- VideoTokenizer ----------------------------------------------------------------------------------------------

    def encode(
        self, video: Tensor, *, chunk: int | None = None, pad: bool = False, tiling: Tiling | None = None
    ) -> Tensor:
        """``(b, 3, T, H, W)`` in [-1, 1], T = 1 + r k, H and W multiples of the spatial ratio -> ``(b, c, 1+k, h, w)``.

        Args:
            chunk: latent frames computed at a time; the result is the same for each. Unset goes by `VideoCodec.pixels`,
                or the whole video where gradients are recorded (a chunk does not pass them to the one before it).
            pad: take a video of any T by repeating its last frame; ``decode(latents, frames=T)`` cuts it off again.
            tiling: cut frames into tiles.

        Raises:
            WorldloomError: for another shape, or values that are not finite.
        """
        if pad:
            video = self._pad(video)
        self._check_video(video, first=True)
        chunk = chunk if chunk is not None else self._chunk(video.shape[3] * video.shape[4])
        parts = video.split(self._sizes(self.latent_frames(video.shape[2]), chunk, self.temporal_ratio), dim=2)
        state: State | None = {} if len(parts) > 1 else None
        return torch.cat([self._encode_part(part, state, tiling) for part in parts], dim=2)

    def decode(
        self, latents: Tensor, *, chunk: int | None = None, frames: int | None = None, tiling: Tiling | None = None
    ) -> Tensor:
        """``(b, c, t, h, w)`` -> ``(b, 3, 1 + r (t-1), H, W)``, clamped to [-1, 1].

        Args:
            chunk: as for `encode`.
            frames: keep this many frames, where fewer were encoded with ``pad``.
            tiling: cut frames into tiles.
        """
        self._check_latents(latents)
        chunk = chunk if chunk is not None else self._chunk(latents[0, 0, 0].numel() * self.spatial_ratio**2)
        parts = latents.split(self._sizes(latents.shape[2], chunk, 1), dim=2)
        state: State | None = {} if len(parts) > 1 else None
        video = torch.cat([self._decode_part(part, state, tiling) for part in parts], dim=2)
        if frames is not None and not 0 < frames <= video.shape[2]:
            raise WorldloomError(f"these latents hold 1 to {video.shape[2]} frames", got=f"frames = {frames}")
        return video[:, :, :frames]

    def encode_prefix(self, video: Tensor, frames: int, *, chunk: int | None = None) -> Tensor:
        """Latents of the first ``frames`` frames alone: those that `encode` of the whole begins with, as it is causal.

        Args:
            frames: 1 + r k of them; the rest of the video is not looked at.
        """
        if not 0 < frames <= video.shape[2]:
            raise WorldloomError("a prefix is a part of the video", got=f"{frames} of {video.shape[2]} frames")
        return self.encode(video[:, :, :frames], chunk=chunk)

    def encode_step(self, video: Tensor, state: State) -> Tensor:
        """Encode the next frames of a stream whose state the caller holds; the first time 1 + r k, then r k."""
        self._check_video(video, first=not state)
        return self._encode_part(video, state, None)

    def decode_step(self, latents: Tensor, state: State) -> Tensor:
        """Decode the next latents of a stream whose state the caller holds; start with an empty dict."""
        self._check_latents(latents)
        return self._decode_part(latents, state, None)

    def stream_encode(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Consecutive chunks of one video, first 1 + r k frames, then r k each; latents as they are ready."""
        state: State = {}
        for chunk in chunks:
            yield self.encode_step(chunk, state)

    def stream_decode(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Consecutive latent chunks of one video, of any number of latent frames; frames as they are ready."""
        state: State = {}
        for chunk in chunks:
            for part in chunk.split(self._chunk(chunk[0, 0, 0].numel() * self.spatial_ratio**2), dim=2):
                yield self.decode_step(part, state)

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a video of ``frames`` frames, 1 + r k."""
        return 1 + (frames - 1) // self.temporal_ratio

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of every weight, as float32, and of the configuration where it differs from the defaults."""
        return digest(self.config, self.state_dict())

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set the per-channel statistics ``(c,)`` that normalise raw latents."""
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std.clamp_min(1e-4))

    # -- discrete tokenizers -----------------------------------------------------------------------------------------

    @property
    def codebook_size(self) -> int:
        """Number of codes of one codebook; 0 for a continuous tokenizer."""
        return math.prod(self.levels) if self.levels else 0

    @property
    def codebooks(self) -> int:
        """Codes per latent vector; 0 for a continuous tokenizer."""
        return self.latent_channels // len(self.levels) if self.levels else 0

    def to_indices(self, latents: Tensor) -> Tensor:
        """Latents that this tokenizer encoded ``(b, c, t, h, w)`` -> int64 ``(b, codebooks, t, h, w)``."""
        self._check_discrete()
        self._check_latents(latents)
        codes = self._denormalise(latents).unflatten(1, (self.codebooks, len(self.levels)))
        return fsq.codes_to_indices(codes, self.levels, dim=2)

    def from_indices(self, indices: Tensor) -> Tensor:
        """The reverse of `to_indices`."""
        self._check_discrete()
        if indices.ndim != 5 or indices.shape[1] != self.codebooks:
            raise WorldloomError(f"indices are (b, {self.codebooks}, t, h, w)", got=tuple(indices.shape))
        return self._normalise(fsq.indices_to_codes(indices, self.levels, dim=2).flatten(1, 2).to(self.latent_mean))

    def _check_discrete(self) -> None:
        if not self.levels:
            raise WorldloomError("this tokenizer is continuous: it has no codes", do="use one with levels, e.g. a DV")

    def _quantize(self, raw: Tensor) -> Tensor:
        if not self.levels:
            return raw
        grouped = raw.unflatten(1, (self.codebooks, len(self.levels)))
        return fsq.quantize(grouped, self.levels, dim=2).flatten(1, 2)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _encode_part(self, video: Tensor, state: State | None, tiling: Tiling | None) -> Tensor:
        """The next frames of a stream, or with no state all there are."""
        if tiling is None:
            raw = self.encode_raw(video, state)
        else:
            features = self._tiled(video, state, tiling, self._to_features, self.spatial_ratio, self.encode_reach)
            raw = self._quantize(self._to_latents(features, state))
        if state is not None:
            state.setdefault("begun", torch.ones(()))  # a network without temporal layers leaves nothing else
        return self._normalise(raw)

    def _decode_part(self, latents: Tensor, state: State | None, tiling: Tiling | None) -> Tensor:
        """The next latents of a stream, or with no state all there are."""
        raw = self._denormalise(latents)
        if tiling is None:
            video = self.decode_raw(raw, state)
        else:
            features = self._from_latents(raw, state)
            video = self._tiled(features, state, tiling, self._from_features, 1, self.decode_reach)
        if state is not None:
            state.setdefault("begun", torch.ones(()))
        return video.clamp(-1, 1)

    def _tiled(
        self,
        x: Tensor,
        state: Any,
        tiling: Tiling,
        network: Callable[[Tensor, State | None], Tensor],
        scale: int,
        reach: int,
    ) -> Tensor:
        """Run a local map tile by tile. ``scale``: input positions per feature. Each tile has a state of its own."""
        edge = self.spatial_ratio
        halo = reach * edge if tiling.halo is None else tiling.halo
        sizes = (*tiling.tile, halo)
        if min(tiling.tile) < edge or halo < 0 or any(size % edge for size in sizes):
            raise WorldloomError(
                f"tile and halo are multiples of {edge}, and a tile is not empty", got=tiling, do="choose other sizes"
            )
        halo //= edge
        rows, columns = (
            [(start, min(start + size // edge, total)) for start in range(0, total, size // edge)]
            for size, total in zip(tiling.tile, (x.shape[-2] // scale, x.shape[-1] // scale), strict=True)
        )
        height, width = rows[-1][1], columns[-1][1]
        strips = []
        for top, bottom in rows:
            strip = []
            for left, right in columns:
                y, x0 = max(top - halo, 0), max(left - halo, 0)
                part = x[..., y * scale : (bottom + halo) * scale, x0 * scale : (right + halo) * scale]
                own = None if state is None else state.setdefault(("tile", network.__name__, top, left), {})
                made = network(part, own)
                grown = made.shape[-1] // (min(right + halo, width) - x0)  # output positions per feature
                strip.append(
                    made[..., (top - y) * grown : (bottom - y) * grown, (left - x0) * grown : (right - x0) * grown]
                )
            strips.append(torch.cat(strip, dim=-1))
        assert height * scale == x.shape[-2]
        return torch.cat(strips, dim=-2)

    def _chunk(self, pixels: int) -> int:
        """Latent frames to compute at a time, of frames with so many pixels."""
        return 1 << 30 if torch.is_grad_enabled() else max(1, self.pixels // (pixels * self.temporal_ratio))

    def _sizes(self, t: int, chunk: int, ratio: int) -> list[int]:
        """Lengths of the parts of a sequence of ``t`` latent frames; ``ratio`` frames each but the first, one frame."""
        if chunk < 1:
            raise WorldloomError("chunk is a positive number of latent frames", got=chunk)
        counts = [min(chunk, t - start) for start in range(0, t, chunk)]
        return [1 + (counts[0] - 1) * ratio, *(count * ratio for count in counts[1:])]

    def _pad(self, video: Tensor) -> Tensor:
        if video.ndim != 5 or not video.shape[2]:
            return video  # the check says what is wrong
        missing = -(video.shape[2] - 1) % self.temporal_ratio
        return torch.cat([video, video[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2) if missing else video

    def _normalise(self, raw: Tensor) -> Tensor:
        return (raw - self.latent_mean.view(1, -1, 1, 1, 1)) / self.latent_std.view(1, -1, 1, 1, 1)

    def _denormalise(self, latents: Tensor) -> Tensor:
        return latents * self.latent_std.view(1, -1, 1, 1, 1) + self.latent_mean.view(1, -1, 1, 1, 1)

    def _check_video(self, video: Tensor, first: bool) -> None:
        ratio, edge = self.temporal_ratio, self.spatial_ratio
        if video.ndim != 5 or video.shape[1] != 3:
            raise WorldloomError("a video tensor is (b, 3, T, H, W)", got=tuple(video.shape))
        frames, height, width = video.shape[2:]
        if height % edge or width % edge or not height or not width:
            raise WorldloomError(
                f"height and width must be multiples of {edge}", got=(height, width), do="resize or crop the video"
            )
        if frames < 1 or (frames - first) % ratio:
            raise WorldloomError(
                f"the number of frames must be {'1 + ' if first else ''}{ratio}k",
                got=frames,
                do=f"take the first {max((frames - first) // ratio * ratio + first, first)} frames"
                + (", or encode with pad=True" if first else ""),
            )
        if not torch.isfinite(video).all():
            raise WorldloomError("the video holds values that are not finite", do="check how it was decoded")

    def _check_latents(self, latents: Tensor) -> None:
        if latents.ndim != 5 or latents.shape[1] != self.latent_channels or latents.shape[2] < 1:
            raise WorldloomError(
                f"latents are (b, {self.latent_channels}, t, h, w), t at least 1", got=tuple(latents.shape)
            )


def digest(config: Any, tensors: Mapping[str, Tensor]) -> str:
    """sha256 (hex) of tensors, as float32, and of a dataclass where it differs from its defaults."""
    changed = [
        f"{f.name}={getattr(config, f.name)!r}"
        for f in dataclasses.fields(config)
        if getattr(config, f.name) != _default(f)
    ]
    found = hashlib.sha256(" ".join((type(config).__name__, *changed)).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return found.hexdigest()


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
