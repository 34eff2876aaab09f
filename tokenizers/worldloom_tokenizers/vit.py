"""A causal transformer tokenizer, trained as a masked autoencoder (Hafner et al. 2025, "Training Agents Inside of
Scalable World Models", section 3.1; masking as He et al. 2022).

Each latent frame is a set of tokens: one for each patch of pixels, and one latent token for each cell of a coarser
grid, of ``spatial_ratio`` pixels. In the encoder patches see patches, and latent tokens see both; a narrow projection
and tanh make latents of the latent tokens. In the decoder latent tokens see latent tokens, and patches, which begin as
one learned vector, see both. Most layers attend within a frame; every few layers one attends along time, each token to
its own place in the present and the last frames: causal, and within a window, so that a stream needs constant memory
and gives what the whole gives. Places are known by rotary embeddings, so frames may have any size.

A latent token has a place here, other than in the paper: so it begins with the mean of its cell's patches, and a patch
of the decoder with its cell's latent. Training finds the grid sooner than from attention alone.

The latent token of cell (i, j) of latent frame k is the latent vector ``latents[:, :, k, i, j]``.

In training a share of each frame's patches, drawn uniformly up to ``config.hidden``, is replaced by a learned vector.
It makes the latents say what is to be seen rather than how each pixel is, and so easier to predict.

Letters: b batch, t latent frames, T video frames, r temporal ratio, c channels, H W pixels, h w cells, p patches and
l latent tokens of a frame, n = p + l, d width, k heads, e size of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldloom_tokenizers.codec import State, VideoCodec
from worldloom_tokenizers.config import ViTConfig


def angles(positions: Tensor, size: int) -> Tensor:
    """Rotary angles ``(n, size)`` of positions ``(n,)``: from one radian per position down to a hundredth (Su et al.
    2021, with base 100 in place of 10,000: frames have tens of patches along an edge)."""
    frequencies = 100.0 ** -torch.linspace(0, 1, size, device=positions.device)
    return positions[:, None].float() * frequencies


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turn pairs of channels of ``(..., n, e)`` by angles ``(n, e/2)``."""
    cos, sin = turn.cos().to(x), turn.sin().to(x)
    one, other = x.chunk(2, dim=-1)
    return torch.cat([one * cos - other * sin, one * sin + other * cos], dim=-1)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm that keeps its input's dtype: under autocast weights are float32, activations are not."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None, "made with a weight"
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), 1e-6)


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys (Henry et al. 2020) and rotary positions.

    With a ``window`` it runs along time: a token sees that many positions, itself the last, and a `State` keeps those
    that the next chunk needs. Positions are counted from the first one kept: only their differences matter.
    """

    def __init__(self, width: int, heads: int, window: int = 0) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, turn: Tensor | None, mask: Tensor | None, state: State | None) -> Tensor:
        """``(b, n, d)`` -> ``(b, n, d)``; ``turn (n, e/2)`` and ``mask (n, n)`` of the tokens of a frame."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (b, k, n, e)
        q, k = self.q_norm(q), self.k_norm(k)
        if not self.window:
            assert turn is not None, "the places of the tokens"
            q, k = rotate(q, turn), rotate(k, turn)
        else:
            past = state.get(self) if state is not None else None
            if past is not None:
                k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
            if state is not None:
                start = max(k.shape[2] - (self.window - 1), 0)
                state[self] = torch.stack([k[:, :, start:], v[:, :, start:]]).detach()
            place = torch.arange(k.shape[2], device=x.device)
            age = place[-q.shape[2] :, None] - place[None]  # of each key, to each query
            mask = (age >= 0) & (age < self.window)
            turn = angles(place, q.shape[-1] // 2)
            q, k = rotate(q, turn[-q.shape[2] :]), rotate(k, turn)
        made = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(made.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention within a frame or along time, then a gated MLP (SwiGLU, Shazeer 2020), each after an RMSNorm."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        hidden = -(-8 * width // 24) * 8  # 8/3 of the width, in eights: as many weights as a plain MLP of 4 widths has
        self.attention_norm = RMSNorm(width)
        self.attention = Attention(width, heads, window)
        self.mlp_norm = RMSNorm(width)
        self.gate = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, turn: Tensor, mask: Tensor, state: State | None) -> Tensor:
        """``(b, t, n, d)`` -> ``(b, t, n, d)``."""
        b, t, n, _ = x.shape
        normed = self.attention_norm(x)
        if self.attention.window:
            normed = normed.transpose(1, 2).flatten(0, 1)  # (b, t, n, d) -> (b*n, t, d)
            x = x + self.attention(normed, None, None, state).unflatten(0, (b, n)).transpose(1, 2)
        else:
            x = x + self.attention(normed.flatten(0, 1), turn, mask, None).unflatten(0, (b, t))
        gate, value = self.gate(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * value)


class Transformer(nn.Module):
    """Layers within a frame, every ``every``-th one along time; ends with an RMSNorm."""

    def __init__(self, layers: int, width: int, heads: int, every: int, window: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Layer(width, heads, window if number % every == 0 else 0) for number in range(1, layers + 1)
        )
        self.norm = RMSNorm(width)

    def forward(self, x: Tensor, turn: Tensor, mask: Tensor, state: State | None) -> Tensor:
        for layer in self.layers:
            x = layer(x, turn, mask, state)
        return self.norm(x)


class Token(nn.Module):
    """A learned vector, as many times as it is asked for."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(0.02 * torch.randn(width))

    def forward(self, *shape: int) -> Tensor:
        """``(*shape, d)``."""
        return self.vector.expand(*shape, -1)


class CausalViT(VideoCodec):
    """The tokenizer. Latents are within [-1, 1] before they are normalised."""

    chunk = 8

    def __init__(self, config: ViTConfig | None = None) -> None:
        config = config or ViTConfig()
        super().__init__(config, config.temporal_ratio, config.spatial_ratio, config.latent_channels)
        width, patch = config.width, 3 * config.temporal_ratio * config.patch**2
        self.embed = nn.Linear(patch, width)
        self.hidden_token, self.latent_token, self.patch_token = Token(width), Token(width), Token(width)
        self.encoder = Transformer(config.encoder_layers, width, config.heads, config.time_every, config.window)
        self.to_latent = nn.Linear(width, config.latent_channels)
        self.from_latent = nn.Linear(config.latent_channels, width)
        self.decoder = Transformer(config.decoder_layers, width, config.heads, config.time_every, config.window)
        self.to_pixels = nn.Linear(width, patch)

    # -- the networks of `VideoCodec`: pixels to patches is local, the transformers see whole frames -------------------

    def _to_features(self, video: Tensor, state: State | None) -> Tensor:
        ratio, cell = self.config.temporal_ratio, self.config.spatial_ratio
        if _begins(self, state):  # frame 0 fills a group of its own
            video = torch.cat([video[:, :, :1].expand(-1, -1, ratio - 1, -1, -1), video], dim=2)
        # (b, 3, t*r, H, W) -> (b, t, 3*r, H, W) -> (b, t, 3*r*cell*cell, h, w)
        groups = video.unflatten(2, (-1, ratio)).permute(0, 2, 1, 3, 4, 5).flatten(2, 3)
        return F.pixel_unshuffle(groups, cell).transpose(1, 2)

    def _to_latents(self, features: Tensor, state: State | None) -> Tensor:
        return self._encode(features, state, None)

    def _from_latents(self, latents: Tensor, state: State | None) -> Tensor:
        b, _, t, h, w = latents.shape
        turn, p = self._turn(h, w, latents.device)
        known = self.from_latent(latents.permute(0, 2, 3, 4, 1))  # (b, c, t, h, w) -> (b, t, h, w, d)
        patches = self.patch_token(b, t, p) + self._spread(known).flatten(2, 3)
        x = torch.cat([patches, known.flatten(2, 3)], dim=2)  # (b, t, n, d)
        latent = torch.arange(x.shape[2], device=x.device) >= p
        x = self.decoder(x, turn, latent[None] | ~latent[:, None], state)  # all see latent tokens, patches see all
        return self._join(self.to_pixels(x[:, :, :p]), h, w)

    def _from_features(self, features: Tensor, state: State | None) -> Tensor:
        ratio = self.config.temporal_ratio
        video = F.pixel_shuffle(features.transpose(1, 2), self.config.spatial_ratio)  # (b, t, 3*r, H, W)
        video = video.unflatten(2, (3, ratio)).permute(0, 2, 1, 3, 4, 5).flatten(2, 3)  # (b, 3, t*r, H, W)
        return video[:, :, ratio - 1 :] if _begins(self, state) else video

    # -- training: a start, hidden patches -----------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, video: Tensor) -> None:
        """Let the decoder begin at the mean patch of ``(b, 3, 1 + r k, H, W)``, with little around it."""
        patches = self._split(self._to_features(video, None))
        self.to_pixels.bias.copy_(patches.mean(dim=(0, 1, 2)))
        self.to_pixels.weight.mul_(0.1)

    def encode_for_training(self, video: Tensor, generator: torch.Generator) -> Tensor:
        """`encode_raw` of a video of which a part is hidden, drawn from ``generator``."""
        features = self._to_features(video, None)
        b, _, t, h, w = features.shape
        p = h * w * (self.config.spatial_ratio // self.config.patch) ** 2
        share = torch.rand(b, t, 1, generator=generator) * self.config.hidden
        hidden = torch.rand(b, t, p, generator=generator) < share
        return self._encode(features, None, hidden.to(video.device))

    def _encode(self, features: Tensor, state: State | None, hidden: Tensor | None) -> Tensor:
        b, _, t, h, w = features.shape
        turn, p = self._turn(h, w, features.device)
        patches = self.embed(self._split(features))  # (b, t, p, d)
        if hidden is not None:
            patches = torch.where(hidden[..., None], self.hidden_token(b, t, p).to(patches), patches)
        side = self.config.spatial_ratio // self.config.patch
        cells = patches.unflatten(2, (h, side, w, side)).mean(dim=(3, 5)).flatten(2, 3)  # (b, t, l, d)
        x = torch.cat([patches, self.latent_token(b, t, h * w) + cells], dim=2)
        latent = torch.arange(x.shape[2], device=x.device) >= p
        x = self.encoder(x, turn, latent[:, None] | ~latent[None], state)  # latent tokens see all, all see patches
        return self.to_latent(x[:, :, p:]).tanh().unflatten(2, (h, w)).permute(0, 4, 1, 2, 3)

    # -- grids ---------------------------------------------------------------------------------------------------------

    def _turn(self, h: int, w: int, device: torch.device) -> tuple[Tensor, int]:
        """Rotary angles ``(n, e/2)`` of patches, then latent tokens, half for each axis, and the number of patches."""
        side, size = self.config.spatial_ratio // self.config.patch, self.config.width // self.config.heads // 4

        def grid(scale: int) -> Tensor:
            """Angles at the centres of cells, in patches: ``(scale h * scale w, e/2)``."""
            y, x = ((torch.arange(scale * length, device=device) + 0.5) * (side / scale) for length in (h, w))
            y, x = torch.meshgrid(y, x, indexing="ij")
            return torch.cat([angles(y.flatten(), size), angles(x.flatten(), size)], dim=1)

        return torch.cat([grid(side), grid(1)]), side * side * h * w

    def _spread(self, cells: Tensor) -> Tensor:
        """What each patch finds in its cell: ``(b, t, h, w, d)`` -> ``(b, t, side h, side w, d)``."""
        side = self.config.spatial_ratio // self.config.patch
        return cells.repeat_interleave(side, dim=2).repeat_interleave(side, dim=3)

    def _split(self, features: Tensor) -> Tensor:
        """Cells of pixels ``(b, 3*r*cell*cell, t, h, w)`` -> patches ``(b, t, p, 3*r*patch*patch)``."""
        pixels = F.pixel_shuffle(features.transpose(1, 2), self.config.spatial_ratio)
        return F.pixel_unshuffle(pixels, self.config.patch).flatten(3).transpose(2, 3)

    def _join(self, patches: Tensor, h: int, w: int) -> Tensor:
        """The reverse of `_split`."""
        side = self.config.spatial_ratio // self.config.patch
        rows = patches.transpose(2, 3).unflatten(3, (side * h, side * w))
        return F.pixel_unshuffle(F.pixel_shuffle(rows, self.config.patch), self.config.spatial_ratio).transpose(1, 2)


def _begins(codec: CausalViT, state: State | None) -> bool:
    """Whether a stream begins here. The state alone does not tell: the transformer may have put something into it."""
    if state is None:
        return True
    begins = codec not in state
    state[codec] = torch.ones(())
    return begins
