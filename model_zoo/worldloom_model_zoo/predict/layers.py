"""What the predict transformer is made of: rotary and learned positions, time, AdaLN-LoRA, attention, blocks, actions.

The layers know nothing of sampling: masks, and keys and values of frames before, are given to them.

Letters: b batch, t latent frames, n tokens of a frame, d width, k heads, e head size, m text tokens, r actions between
latent frames, a action size, v views.

Angles and sinusoids are computed in float32, in float64 where the latents are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldloom.errors import WorldloomError
from worldloom_model_zoo.predict.config import PredictConfig

# -- positions and time ----------------------------------------------------------------------------------------------


def rotations(
    config: PredictConfig, frames: int, height: int, width: int, offset: int, like: Tensor, fps: float | None = None
) -> tuple[Tensor, Tensor]:
    """What `rotate` takes for ``frames*height*width`` tokens, the first frame at ``offset``; in the type of ``like``.

    A head's pairs are shared out to time, height and width: height and width take ``e // 6`` each, time the rest.
    NTK scaling multiplies the base of an axis of 2m components by ratio ** (m / (m - 1)).
    """
    device, dtype = like.device, torch.promote_types(like.dtype, torch.float32)
    pairs_hw = config.head_dim // 6
    pairs = (config.head_dim // 2 - 2 * pairs_hw, pairs_hw, pairs_hw)
    time = torch.arange(offset, offset + frames, device=device, dtype=dtype)
    if config.base_fps and fps is not None:
        time = time / fps * config.base_fps
    positions = (
        time,
        torch.arange(height, device=device, dtype=dtype),
        torch.arange(width, device=device, dtype=dtype),
    )
    axes = []
    for axis, (count, position, ratio) in enumerate(zip(pairs, positions, config.rope_ratios, strict=True)):
        base = 10_000.0 * (ratio ** (count / (count - 1)) if count > 1 else 1.0)
        frequencies = base ** -(torch.arange(count, device=device, dtype=dtype) / max(count, 1))
        shape = [1, 1, 1, count]
        shape[axis] = len(position)
        axes.append(torch.outer(position, frequencies).view(shape).expand(frames, height, width, count))
    angles = torch.cat(axes, dim=-1).reshape(frames * height * width, -1)
    cos, sin = angles.cos().to(like.dtype), angles.sin().to(like.dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate ``(b, k, tokens, e)``: component i is paired with i + e/2 (Su et al. 2021, half-split layout).

    ``turn``: the cosine of each component's angle ``(tokens, e)``, and its sine, negative in the first half.
    """
    cos, sin = (part.to(x.dtype) for part in turn)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def sinusoid(timestep: Tensor, size: int) -> Tensor:
    """``(...)`` -> ``(..., size)``: cosines, then sines, of geometrically spaced frequencies from 1 down to 1e-4."""
    half, dtype = size // 2, torch.promote_types(timestep.dtype, torch.float32)
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half, device=timestep.device, dtype=dtype) / half)
    angles = timestep.to(dtype)[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


# -- blocks ----------------------------------------------------------------------------------------------------------


class LearnedPositions(nn.Module):
    """A learned vector per frame, row and column, summed and scaled to a root mean square of one (Cosmos 1)."""

    def __init__(self, sizes: tuple[int, int, int], width: int) -> None:
        super().__init__()
        self.frames, self.rows, self.columns = (nn.Parameter(torch.zeros(size, width)) for size in sizes)

    def forward(self, frames: int, rows: int, columns: int, offset: int) -> Tensor:
        """-> ``(frames, rows*columns, d)``, to be added before each block."""
        sizes = (len(self.frames), len(self.rows), len(self.columns))
        if offset + frames > sizes[0] or rows > sizes[1] or columns > sizes[2]:
            raise WorldloomError(
                "the latents are larger than this model's learned positions",
                got=f"{offset + frames} frames of {rows} x {columns} tokens, learned: {sizes}",
                do="use fewer frames or a smaller resolution",
            )
        x = self.frames[offset : offset + frames, None, None] + self.rows[:rows, None] + self.columns[:columns]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x / (norm * x.shape[-1] ** -0.5 + 1e-6)).flatten(1, 2)


class TimestepEmbedder(nn.Module):
    """The shared modulation of all blocks: sinusoid ``(..., d)`` -> ``(..., 3d)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, width, bias=False)
        self.linear_2 = nn.Linear(width, 3 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Modulation(nn.Module):
    """AdaLN-LoRA: SiLU of the embedding ``(b, t, d)`` -> ``parts`` tensors ``(b, t, 1, d)``, low-rank plus shared."""

    def __init__(self, width: int, rank: int, parts: int) -> None:
        super().__init__()
        self.parts, self.width = parts, width
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, parts * width, bias=False)

    def forward(self, embedding: Tensor, shared: Tensor) -> tuple[Tensor, ...]:
        modulation = self.up(self.down(embedding)) + shared[..., : self.parts * self.width]
        return modulation.unsqueeze(2).chunk(self.parts, dim=-1)


class Attention(nn.Module):
    """Attention with normalised queries and keys, no bias."""

    def __init__(self, width: int, heads: int, context: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(context, width, bias=False)
        self.v_proj = nn.Linear(context, width, bias=False)
        self.output_proj = nn.Linear(width, width, bias=False)
        self.q_norm = nn.RMSNorm(width // heads, eps=eps)
        self.k_norm = nn.RMSNorm(width // heads, eps=eps)

    def queries(self, x: Tensor) -> Tensor:
        """``(b, tokens, d)`` -> ``(b, k, tokens, e)``."""
        return self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, -1))).transpose(1, 2)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(b, tokens, d)`` -> keys and values ``(b, k, tokens, e)``."""
        keys = self.k_norm(self.k_proj(x).unflatten(-1, (self.heads, -1))).transpose(1, 2)
        return keys, self.v_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """-> ``(b, tokens, d)``."""
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return self.output_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers with GELU, no bias."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layer1 = nn.Linear(width, hidden, bias=False)
        self.layer2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer2(F.gelu(self.layer1(x)))


class Block(nn.Module):
    """Self-attention, cross-attention where there is text, MLP; each shifted, scaled and gated per frame."""

    def __init__(self, config: PredictConfig) -> None:
        super().__init__()
        d, rank = config.width, config.adaln_rank
        self.norm = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)
        self.modulate_self = Modulation(d, rank, 3)
        self.self_attn = Attention(d, config.heads, d, config.qk_eps)
        self.cross_attn = None
        if config.context_dim:
            self.modulate_cross = Modulation(d, rank, 3)
            self.cross_attn = Attention(d, config.heads, config.context_dim, config.qk_eps)
        self.modulate_mlp = Modulation(d, rank, 3)
        self.mlp = MLP(d, int(d * config.mlp_ratio))

    def forward(
        self,
        x: Tensor,
        embedding: Tensor,
        shared: Tensor,
        turn: tuple[Tensor, Tensor],
        text: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        past: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(b, t, n, d)`` -> the same, and the rotated keys and the values of these frames ``(b, k, t*n, e)``.

        ``text`` has keys and values ``(b*v, k, m, e)``: each view sees its own.
        """
        frames_tokens = x.shape[1:3]

        shift, scale, gate = self.modulate_self(embedding, shared)
        hidden = (self.norm(x) * (1 + scale) + shift).flatten(1, 2)  # (b, t, n, d) -> (b, t*n, d)
        new_keys, new_values = self.self_attn.keys_values(hidden)
        queries, new_keys = rotate(self.self_attn.queries(hidden), turn), rotate(new_keys, turn)
        keys, values = new_keys, new_values
        if past is not None:
            keys, values = torch.cat([past[0], keys], dim=2), torch.cat([past[1], values], dim=2)
        x = torch.addcmul(x, gate, self.self_attn.attend(queries, keys, values, mask).unflatten(1, frames_tokens))

        if self.cross_attn is not None and text is not None:
            shift, scale, gate = self.modulate_cross(embedding, shared)
            hidden = (self.norm(x) * (1 + scale) + shift).flatten(1, 2)
            hidden = hidden.reshape(len(text[0]), -1, hidden.shape[-1])  # (b, v*t'*n, d) -> (b*v, t'*n, d)
            out = self.cross_attn.attend(self.cross_attn.queries(hidden), *text)
            x = torch.addcmul(x, gate, out.reshape(x.shape))

        shift, scale, gate = self.modulate_mlp(embedding, shared)
        x = torch.addcmul(x, gate, self.mlp(self.norm(x) * (1 + scale) + shift))
        return x, new_keys, new_values


class ActionEmbedder(nn.Module):
    """The r actions that lead to a latent frame -> an addition to its timestep embedding and to the modulation.

    Where actions have a noise level of their own (Zhu et al. 2025), its embedding is added to both hidden layers.
    In the layout ``cosmos-chunk`` it takes all actions at once.
    """

    def __init__(self, config: PredictConfig) -> None:
        super().__init__()
        hidden, d, layout = config.action_hidden, config.width, config.action_layout
        size = config.action_dim * (config.action_chunk if layout == "cosmos-chunk" else config.actions_per_latent)
        self.size = size
        activation = nn.SiLU() if layout == "frame" else nn.GELU("tanh")
        self.to_embedding = nn.Sequential(nn.Linear(size, hidden), activation, nn.Linear(hidden, d))
        self.to_modulation = nn.Sequential(nn.Linear(size, hidden), activation, nn.Linear(hidden, 3 * d))
        self.noise = None
        if config.action_head:
            self.noise = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 2 * hidden))

    def forward(self, actions: Tensor, level: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(b, t, r*a)`` and noise levels ``(b, t)``, None for clean, -> ``(b, t, d)`` and ``(b, t, 3d)``."""
        if self.noise is None:
            return self.to_embedding(actions), self.to_modulation(actions)
        level = actions.new_zeros(actions.shape[:2]) if level is None else level
        hidden = self.noise[0].in_features
        assert isinstance(hidden, int)
        noise = self.noise(sinusoid(level * 1000, hidden).to(actions.dtype)).chunk(2, dim=-1)
        made = []
        for layers, added in zip((self.to_embedding, self.to_modulation), noise, strict=True):
            made.append(layers[2](layers[1](layers[0](actions) + added)))
        return made[0], made[1]
