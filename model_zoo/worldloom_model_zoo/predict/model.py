"""The predict transformer: a video diffusion transformer with per-frame noise levels and per-frame actions.

The network of Cosmos-Predict2 and 2.5 (NVIDIA 2025): latent patches, 3-D rotary positions, blocks of self-attention,
cross-attention and MLP, each modulated by AdaLN-LoRA. Three things are free in it:

- the noise level is per latent frame, which gives diffusion forcing and conditioning frames in one mechanism;
- actions enter per latent frame, added to the timestep embedding and to the shared modulation;
- attention is full or block-causal. Causal attention has a key-value cache, so the same weights can be stepped.

Letters: b batch, t latent frames, c channels, h w latent size, p patch edge, n = (h/p)*(w/p) tokens of a frame,
d width, k heads, e head size, m text tokens, r actions between latent frames, a action size, v views.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldloom.errors import WorldloomError
from worldloom_model_zoo.predict.causal import KVCache, causal_mask, forcing_mask
from worldloom_model_zoo.predict.config import PredictConfig
from worldloom_model_zoo.predict.layers import (
    ActionEmbedder,
    Block,
    LearnedPositions,
    Modulation,
    TimestepEmbedder,
    rotations,
    sinusoid,
)
from worldloom_model_zoo.predict.skipping import FirstBlockCache


@dataclass(frozen=True)
class ReadText:
    """Text as a network's blocks see it, from `PredictTransformer.read_text`: the same for all steps of a sample."""

    of_blocks: tuple[tuple[Tensor, Tensor], ...]
    """Keys and values ``(b*v, k, m, e)`` of each block's cross-attention."""
    rows: int
    """b*v."""


class PredictTransformer(nn.Module):
    """Velocity of noisy latents under rectified flow, given each frame's noise level, actions and text."""

    def __init__(self, config: PredictConfig) -> None:
        super().__init__()
        self.config = config
        d, patch = config.width, config.patch**2
        channels = config.latent_channels * (1 + config.previous_frame) + config.condition_mask + config.padding_mask
        channels += config.view_dim if config.views else 0
        self.patch_in = nn.Linear(channels * patch, d, bias=False)
        self.view_embedding = nn.Embedding(config.views, config.view_dim) if config.views else None
        self.positions = LearnedPositions(config.learned_positions, d) if any(config.learned_positions) else None
        self.time_embedder = TimestepEmbedder(d)
        self.time_norm = nn.RMSNorm(d, eps=1e-6)
        self.step_embedder = TimestepEmbedder(d) if config.step_size else None
        self.text_proj = nn.Linear(config.text_dim, config.context_dim) if config.text_dim else None
        self.action_embedder = ActionEmbedder(config) if config.action_dim else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.final_norm = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)
        self.final_modulation = Modulation(d, config.adaln_rank, 2)
        self.patch_out = nn.Linear(d, config.latent_channels * patch, bias=False)
        self.action_head = None
        if config.action_head:
            self.action_head = nn.Linear(d, config.actions_per_latent * config.action_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal of 1/sqrt(fan-in); modulation and output start at zero, so each block starts as identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.up.weight)
            if isinstance(module, LearnedPositions):
                for parameter in module.parameters():
                    nn.init.trunc_normal_(parameter, std=self.config.width**-0.5)
        nn.init.zeros_(self.time_embedder.linear_2.weight)
        if self.step_embedder is not None:
            nn.init.zeros_(self.step_embedder.linear_2.weight)
        nn.init.zeros_(self.patch_out.weight)
        if self.action_embedder is not None:
            for last in (self.action_embedder.to_embedding[-1], self.action_embedder.to_modulation[-1]):
                assert isinstance(last, nn.Linear)
                nn.init.zeros_(last.weight)
        if self.action_head is not None:
            nn.init.zeros_(self.action_head.weight)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        actions: Tensor | None = None,
        text: Tensor | ReadText | None = None,
        *,
        condition_mask: Tensor | None = None,
        padding_mask: Tensor | None = None,
        action_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
        cache: KVCache | None = None,
        commit: bool = False,
        action_timestep: Tensor | None = None,
        return_actions: bool = False,
        step: Tensor | None = None,
        fps: float | None = None,
        views: Tensor | None = None,
        skip: FirstBlockCache | None = None,
        context: Tensor | None = None,
        context_timestep: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The velocity, noise - clean, of each latent frame; with ``return_actions`` that of the actions too.

        Args:
            x: noisy latents ``(b, c, t, h, w)``; with a cache that holds frames, the frames that follow them.
            timestep: noise level of each frame ``(b, t)``, or of all of them ``(b,)``, in [0, 1]; 0 is clean.
            actions: at video rate. Without earlier frames ``(b, r*(t-1), a)``: the first frame has none. After cached
                frames ``(b, r*t, a)``. In chunks ``(b, action_chunk, a)``. None is the null action: no contribution.
            text: ``(b, m, text_dim or context_dim)``; None is the null text, one token of zeros. With several views
                ``(b, v*m, ...)``, one text after another. Or what `read_text` made of it.
            condition_mask: ``(b, 1, t, h, w)``, 1 at conditioning frames; for configurations that have it.
            padding_mask: ``(b, 1, h, w)`` or of the video's pixels, 1 at padded ones; for configurations that have it.
            action_mask: ``(b,)`` boolean, False where a sample gets the null action (dropout, guidance).
            text_mask: ``(b,)`` boolean, False where a sample gets the null text.
            cache: frames seen before; needs causal attention.
            commit: add these frames to the cache. Pass them clean, with the context's noise level as timestep.
            action_timestep: noise level of the actions that lead to each latent frame ``(b, actions / r)`` in [0, 1];
                None is 0, clean. Needs ``action_head``. Noisy actions and clean frames are inverse dynamics, clean
                actions and noisy frames forward dynamics, both noisy a policy (Zhu et al. 2025).
            return_actions: give ``(velocity, action_velocity)``, the second of the shape of the actions.
            step: how far each frame's noise level is to fall, of the shape of timestep, for configurations with
                ``step_size``; None is 0, the velocity at a point.
            fps: frames per second of the video; counts in configurations with ``base_fps`` only. None is ``base_fps``.
            views: ``(v,)`` or ``(b, v)`` integers, which cameras ``x`` shows one after another along time; None is
                the first camera alone. For configurations with views.
            skip: leaves out the blocks after the first where it may; not with ``commit``.
            context: ``(b, c, t, h, w)`` the same frames, nearly clean. Each frame of ``x`` then sees itself and those
                of the context before it, as if the context were in a cache: teacher forcing, all frames in one call.
                For causal attention, without a cache, and with a timestep of ``(b, t)``.
            context_timestep: noise level of each frame of the context ``(b, t)``.

        Raises:
            WorldloomError: where a shape does not fit the configuration.
        """
        config = self.config
        views = self._views(x, views)
        count = 1 if views is None else views.shape[1]
        self._check(x, timestep, actions, text, cache, count)
        self._check_action_noise(actions, action_timestep, return_actions)
        assert skip is None or not commit
        if step is not None and (self.step_embedder is None or step.shape != timestep.shape):
            raise WorldloomError(
                "a step size is for a model that knows them, and of the shape of the timestep",
                got=tuple(step.shape),
                do="use a checkpoint with step_size = true",
            )
        b, _, t, h, w = x.shape
        rows, columns = h // config.patch, w // config.patch
        offset = cache.frames if cache is not None else 0

        if context is not None:
            self._check_context(x, timestep, context, context_timestep, cache, step)
            assert context_timestep is not None
            timestep = torch.cat([context_timestep, timestep], dim=1)
        times = count if context is None else 2  # that the same positions are there
        tokens = self._patchify(x, condition_mask, padding_mask, views, cache, context)  # (b, t or 2t, n, d)
        embedding = self._sinusoid(timestep, x)  # (b, t or 1 or 2t, d)
        shared = self.time_embedder(embedding)  # (b, t or 1, 3d)
        if self.step_embedder is not None:
            step = torch.zeros_like(timestep) if step is None else step
            shared = shared + self.step_embedder(self._sinusoid(step, x))
        if actions is not None:
            added = self._embed_actions(actions, action_timestep, action_mask, condition_mask, t)
            to_embedding, to_modulation = added if context is None else (part.repeat(1, 2, 1) for part in added)
            shared = shared + to_modulation
            if config.action_layout == "frame":
                embedding = self.time_norm(embedding) + to_embedding
            else:
                embedding = self.time_norm(embedding + to_embedding)
        else:
            embedding = self.time_norm(embedding)
        embedding = F.silu(embedding)  # as every modulation takes it

        read = text if isinstance(text, ReadText) else self.read_text(text, b, text_mask, views=count)

        cos, sin = rotations(config, t // count, rows, columns, offset, x, fps)
        turn = cos.repeat(times, 1), sin.repeat(times, 1)
        positions = None
        if self.positions is not None:
            positions = self.positions(t, rows, columns, offset).to(x.dtype).repeat(times, 1, 1)
        if context is None:
            mask = self._mask(t, rows * columns, cache, x.device)
        else:
            mask = forcing_mask(t, rows * columns, config.window, config.sink, x.device)
        keys, values, entered = [], [], tokens
        for index, block in enumerate(self.blocks):
            if index == 1 and skip is not None and (reused := skip.recall(entered, tokens)) is not None:
                tokens = reused
                break
            past = (cache.keys[index], cache.values[index]) if cache is not None and cache.keys else None
            if positions is not None:
                tokens = tokens + positions
            seen = read.of_blocks[index] if read is not None else None
            tokens, new_keys, new_values = block(tokens, embedding, shared, turn, seen, mask, past)
            if commit:
                keys.append(new_keys)
                values.append(new_values)
        else:
            if skip is not None and len(self.blocks) > 1:
                skip.keep(tokens)
        if commit:
            assert cache is not None
            cache.append(x, keys, values, config.window, config.sink)

        if context is not None:
            tokens, embedding, shared = (part[:, t:] for part in (tokens, embedding, shared))
        shift, scale = self.final_modulation(embedding, shared)
        tokens = self.final_norm(tokens) * (1 + scale) + shift
        velocity = self._unpatchify(self.patch_out(tokens), rows, columns)
        if not return_actions:
            return velocity
        assert self.action_head is not None
        assert actions is not None
        first = t - actions.shape[1] // config.actions_per_latent
        pooled = tokens.mean(dim=2)[:, first:]  # (b, t, n, d) -> (b, t', d)
        return velocity, self.action_head(pooled).reshape(actions.shape)

    def _sinusoid(self, level: Tensor, like: Tensor) -> Tensor:
        """``(b, t)`` -> ``(b, t, d)``, ``(b,)`` -> ``(b, 1, d)``."""
        level = level[:, None] if level.ndim == 1 else level
        level = level.to(torch.promote_types(like.dtype, torch.float32)) * self.config.timestep_scale
        return sinusoid(level, self.config.width).to(like.dtype)

    def _embed_actions(
        self, actions: Tensor, level: Tensor | None, keep: Tensor | None, condition_mask: Tensor | None, frames: int
    ) -> tuple[Tensor, ...]:
        """What actions add to the timestep embedding ``(b, t or 1, d)`` and to the modulation ``(b, t or 1, 3d)``."""
        assert self.action_embedder is not None
        layout, b = self.config.action_layout, len(actions)
        groups = 1 if layout == "cosmos-chunk" else actions.shape[1] // self.config.actions_per_latent
        actions = actions.to(self.patch_in.weight.dtype).reshape(b, groups, self.action_embedder.size)
        added = self.action_embedder(actions, level)
        if layout != "cosmos-chunk":  # where the sequence starts here, its first frame has no action
            added = tuple(F.pad(part, (0, 0, frames - groups, 0)) for part in added)
        if layout == "cosmos-frame" and condition_mask is not None:
            noisy = 1 - condition_mask[:, 0, :, 0, 0, None].to(actions.dtype)  # (b, t, 1)
            added = tuple(part * noisy for part in added)
        if keep is not None:
            added = tuple(part * keep.view(b, 1, 1).to(part.dtype) for part in added)
        return added

    def _views(self, x: Tensor, views: Tensor | None) -> Tensor | None:
        """Indices ``(b, v)`` of the cameras that follow one another in ``x``."""
        known = self.config.views
        if not known:
            if views is not None:
                raise WorldloomError("this model knows one view only", got=views.tolist(), do="leave views out")
            return None
        if views is None:
            return torch.zeros(x.shape[0], 1, dtype=torch.long, device=x.device)
        views = views.to(x.device)
        views = views.expand(x.shape[0], -1) if views.ndim == 1 else views
        if views.ndim != 2 or len(views) != x.shape[0] or x.ndim != 5 or x.shape[2] % views.shape[1]:
            raise WorldloomError(
                "views are (v,) or (b, v), and the latent frames a multiple of v",
                got=f"views {tuple(views.shape)}, latents {tuple(x.shape)}",
            )
        if int(views.min()) < 0 or int(views.max()) >= known:
            raise WorldloomError(f"this model knows the views 0 to {known - 1}", got=views.tolist())
        return views

    def read_text(
        self, text: Tensor | None, rows: int, mask: Tensor | None = None, *, views: int = 1
    ) -> ReadText | None:
        """Text ``(b, m, text_dim or context_dim)`` as every block sees it, to be given to many calls as ``text``.

        Args:
            text: as `forward` takes it; None is the null text.
            rows: the batch size b.
            mask: ``(b,)`` boolean, False where a row gets the null text.
            views: texts of a row, one after another.

        Returns:
            None for a model without text.
        """
        config = self.config
        if not config.context_dim:
            return None
        if text is None:
            text = self.patch_in.weight.new_zeros(rows, views, config.context_dim)
        elif self.text_proj is not None:
            text = F.gelu(self.text_proj(text))
        if mask is not None:  # zeros, of whatever number, are what one token of zeros is
            text = text * mask.view(rows, 1, 1).to(text.dtype)
        text = text.reshape(rows * views, -1, config.context_dim)
        return ReadText(tuple(block.cross_attn.keys_values(text) for block in self.blocks), rows * views)  # type: ignore[union-attr, operator]

    def _patchify(
        self,
        x: Tensor,
        condition_mask: Tensor | None,
        padding_mask: Tensor | None,
        views: Tensor | None,
        cache: KVCache | None,
        context: Tensor | None,
    ) -> Tensor:
        """``(b, c, t, h, w)``, masks, views -> tokens ``(b, t, n, d)``; a patch is laid out (channel, row, column).

        With a context ``(b, 2t, n, d)``: its frames first.
        """
        true, times = (x, 1) if context is None else (context, 2)
        x = x if context is None else torch.cat([context, x], dim=2)
        b, _, t, h, w = x.shape
        if self.config.previous_frame:
            before = cache.last if cache is not None and cache.last is not None else torch.zeros_like(x[:, :, :1])
            previous = torch.cat([before, true[:, :, :-1]], dim=2)
            x = torch.cat([x, previous.repeat(1, 1, times, 1, 1)], dim=1)
        if self.config.condition_mask:
            mask = x.new_zeros(b, 1, t // times, h, w) if condition_mask is None else condition_mask.to(x.dtype)
            x = torch.cat([x, mask.repeat(1, 1, times, 1, 1)], dim=1)
        if self.config.padding_mask:
            mask = x.new_zeros(b, 1, h, w) if padding_mask is None else padding_mask.to(x.dtype)
            if mask.shape[-2:] != (h, w):
                mask = F.interpolate(mask, size=(h, w), mode="nearest")
            x = torch.cat([x, mask.unsqueeze(2).expand(b, -1, t, -1, -1)], dim=1)
        if self.view_embedding is not None:
            assert views is not None
            shown = self.view_embedding(views).repeat_interleave(t // views.shape[1], dim=1)  # (b, t, view_dim)
            x = torch.cat([x, shown.to(x.dtype).mT[..., None, None].expand(-1, -1, -1, h, w)], dim=1)
        p = self.config.patch
        x = x.unflatten(4, (w // p, p)).unflatten(3, (h // p, p))  # (b, c, t, h/p, p, w/p, p)
        x = x.permute(0, 2, 3, 5, 1, 4, 6)  # (b, t, h/p, w/p, c, p, p)
        return self.patch_in(x.flatten(4).flatten(2, 3))

    def _unpatchify(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """``(b, t, n, p*p*c)`` -> ``(b, c, t, h, w)``; a patch is laid out (row, column, channel)."""
        p = self.config.patch
        x = x.unflatten(3, (p, p, -1)).unflatten(2, (rows, columns))  # (b, t, h/p, w/p, p, p, c)
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)  # (b, c, t, h, w)

    def _mask(self, frames: int, tokens: int, cache: KVCache | None, device: torch.device) -> Tensor | None:
        if self.config.attention == "full":
            return None
        window, sink = self.config.window, self.config.sink
        held = cache.keys[0].shape[2] // tokens if cache is not None and cache.keys else 0
        if frames == 1 and (not window or held < window + sink):
            return None  # one new frame sees everything that the cache kept
        offset = cache.frames if cache is not None else 0
        rows = torch.arange(offset, offset + frames, device=device)
        columns = rows if cache is None else torch.cat([cache.positions(held, sink, device), rows])
        return causal_mask(rows, columns, tokens, window, sink)

    def _check(
        self,
        x: Tensor,
        timestep: Tensor,
        actions: Tensor | None,
        text: Tensor | ReadText | None,
        cache: KVCache | None,
        views: int,
    ) -> None:
        config = self.config
        if (
            x.ndim != 5
            or x.shape[1] != config.latent_channels
            or x.shape[3] % config.patch
            or x.shape[4] % config.patch
        ):
            raise WorldloomError(
                f"latents are (b, {config.latent_channels}, t, h, w), h and w multiples of {config.patch}",
                got=tuple(x.shape),
            )
        b, t = x.shape[0], x.shape[2]
        if tuple(timestep.shape) not in ((b,), (b, t)):
            raise WorldloomError(
                "the noise level is one number per latent frame (b, t), or one for all (b,)", got=tuple(timestep.shape)
            )
        if cache is not None and config.attention != "causal":
            raise WorldloomError("only a causal model can be stepped", do="use a checkpoint with attention = 'causal'")
        if actions is not None:
            if not config.action_dim:
                raise WorldloomError("this model takes no actions", got=tuple(actions.shape), do="leave them out")
            steps = t if cache is not None and cache.frames else t - 1
            number, meaning = steps * config.actions_per_latent, f"{config.actions_per_latent} a latent frame"
            if config.action_layout == "cosmos-chunk":
                number, meaning = config.action_chunk, "a whole chunk"
            expected = (b, number, config.action_dim)
            if tuple(actions.shape) != expected:
                raise WorldloomError(
                    "actions do not fit the latents",
                    got=tuple(actions.shape),
                    do=f"give {expected}: (batch, {meaning}, action_dim)",
                )
        if isinstance(text, ReadText):
            if text.rows != b * views:
                raise WorldloomError("this text was read for another batch", got=f"{text.rows} rows, {b * views} here")
            return
        if text is not None and (not config.context_dim or text.shape[-1] != (config.text_dim or config.context_dim)):
            raise WorldloomError(
                "the text embedding does not fit the model",
                got=tuple(text.shape),
                do=f"its last size is {config.text_dim or config.context_dim or 'absent: this model takes no text'}",
            )
        if text is not None and text.shape[1] % views:
            raise WorldloomError(f"{views} views need a text each, of one length", got=tuple(text.shape))

    def _check_context(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        context_timestep: Tensor | None,
        cache: KVCache | None,
        step: Tensor | None,
    ) -> None:
        if self.config.attention != "causal" or cache is not None or step is not None:
            raise WorldloomError(
                "a context goes with causal attention, without a cache and without a step size",
                got=f"attention = {self.config.attention!r}",
                do="train models with full attention with objective.context = 'prefix' or 'mixed'",
            )
        levels = (b, t) = (x.shape[0], x.shape[2])
        if context.shape != x.shape or tuple(timestep.shape) != levels or context_timestep is None:
            raise WorldloomError(
                "the context has the shape of the latents, and both have a noise level per frame",
                got=f"latents {tuple(x.shape)}, context {tuple(context.shape)}, timestep {tuple(timestep.shape)}",
                do=f"give timestep and context_timestep ({b}, {t})",
            )

    def _check_action_noise(self, actions: Tensor | None, level: Tensor | None, return_actions: bool) -> None:
        if level is None and not return_actions:
            return
        if self.action_head is None:
            raise WorldloomError(
                "this model's actions have no noise level of their own", do="use a checkpoint with action_head = true"
            )
        if actions is None:
            raise WorldloomError("denoising actions needs noisy actions to start from", do="give actions")
        expected = (actions.shape[0], actions.shape[1] // self.config.actions_per_latent)
        if level is not None and tuple(level.shape) != expected:
            raise WorldloomError(
                "the actions' noise level is one number per latent frame that they lead to",
                got=tuple(level.shape),
                do=f"give {expected}",
            )
