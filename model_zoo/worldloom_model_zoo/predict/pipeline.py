"""The predict family in use: generate a video, or step an interactive world.

Letters: b batch, t latent frames, T video frames, r frames in a latent frame, H W pixels, a action size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from worldloom.errors import WorldloomError
from worldloom.protocols import VideoTokenizer
from worldloom.schema import CheckpointRef, GenerationRequest
from worldloom_model_zoo.predict.config import PredictCheckpoint, SamplerConfig
from worldloom_model_zoo.predict.inputs import align_actions, read_conditioning
from worldloom_model_zoo.predict.model import KVCache, PredictTransformer
from worldloom_model_zoo.samplers import flow_euler, flow_interpolate, flow_levels, guide


class PredictPipeline:
    """A model with its tokenizer and sampler. Implements `Generates`, and `Steps` where attention is causal."""

    def __init__(
        self,
        model: PredictTransformer,
        tokenizer: VideoTokenizer,
        config: PredictCheckpoint,
        ref: CheckpointRef | None = None,
    ) -> None:
        if tokenizer.latent_channels != config.model.latent_channels:
            raise WorldloomError(
                "the tokenizer's latents do not fit the model",
                got=f"{tokenizer.latent_channels} channels, the model takes {config.model.latent_channels}",
            )
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.ref = ref
        self.sampler: SamplerConfig = config.sampler
        self._world: _World | None = None
        self._encoder: Any = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def action_dim(self) -> int:
        """Size of an action; 0 for a model without actions."""
        return self.model.config.action_dim

    @property
    def frames_per_step(self) -> int:
        """Video frames, and actions, of one `step`."""
        return self.tokenizer.temporal_ratio

    # -- Generates ------------------------------------------------------------------------------------------------

    def generate(self, request: GenerationRequest, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """The video a request describes, conditioning frames included: ``(1, 3, T, H, W)`` in [-1, 1].

        ``progress(done, total)`` counts sampler steps; an exception that it raises ends the work.

        Raises:
            WorldloomError: text for a model without text, no conditioning, actions of another size or number.
        """
        request, start, actions = self._read(request)
        assert request.frames is not None
        sampler, text = self._sampler(request), [request.prompt] if request.prompt else None
        return self.generate_video(
            start, actions, request.frames, text=text, seed=request.seed, sampler=sampler, progress=progress
        )

    def complete(self, request: GenerationRequest) -> GenerationRequest:
        """The request with frames, steps, guidance and rate filled in; raises what `generate` would."""
        return self._read(request)[0]

    def provenance(self) -> dict[str, Any]:
        """What decides a sample besides its request: digests of model and tokenizer, sampler, checkpoint settings."""
        return {
            "model": asdict(self.ref) if self.ref is not None else None,
            "tokenizer": {"name": self.config.tokenizer.name, "fingerprint": self.tokenizer.fingerprint},
            "sampler": asdict(self.sampler),
            "checkpoint": asdict(self.config),
        }

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Texts -> vectors ``(b, m, text_dim)``, by the encoder that the checkpoint names.

        Raises:
            WorldloomError: the model has none, it is not installed, or it is another one than in training.
        """
        ref = self.config.text
        if not ref.name:
            raise WorldloomError("this model takes no text", got=list(texts), do="use a text-conditioned model")
        if self._encoder is None:
            from worldloom_tokenizers import load_text_encoder

            encoder = load_text_encoder(ref.name, ref.tokens)
            if ref.fingerprint and encoder.fingerprint != ref.fingerprint:
                raise WorldloomError(
                    "the model was trained with another text encoder",
                    got=f"{ref.name} {encoder.fingerprint[:12]}, the model wants {ref.fingerprint[:12]}",
                    do="install the version of its package that the model was trained with",
                )
            self._encoder = encoder
        return self._encoder.encode(texts).to(self.device)

    def _read(self, request: GenerationRequest) -> tuple[GenerationRequest, Tensor | None, Tensor | None]:
        """The completed request, with the start and the actions that it names."""
        start, actions = read_conditioning(request, self.config, self.frames_per_step)
        frames = request.frames
        if frames is None:
            given = start.shape[2] if start is not None else 1
            frames = given + 16 if actions is None else actions.shape[1] + 1
        self._check(start, actions, frames)
        sampler = self._sampler(request)
        fps = self.config.fps if request.fps is None else request.fps
        if fps <= 0:
            raise WorldloomError("the frame rate must be a positive number", got=fps)
        completed = replace(request, frames=frames, steps=sampler.steps, guidance_scale=sampler.guidance_scale, fps=fps)
        return completed, start, actions

    def _sampler(self, request: GenerationRequest) -> SamplerConfig:
        given = {"steps": request.steps, "guidance_scale": request.guidance_scale}
        return replace(self.sampler, **{key: value for key, value in given.items() if value is not None})

    def _check(self, start: Tensor | None, actions: Tensor | None, frames: int) -> None:
        ratio, given = self.frames_per_step, start.shape[2] if start is not None else 0
        if (frames - 1) % ratio or frames <= given:
            raise WorldloomError(
                f"the number of frames must be 1 + {ratio}k and exceed the {given} given",
                got=frames,
                do=f"use {max((frames - 1) // ratio, -(-given // ratio)) * ratio + 1}",
            )
        if actions is not None and actions.shape[1] != frames - 1:
            raise WorldloomError(
                f"{frames} frames need {frames - 1} actions, one between two frames", got=actions.shape[1]
            )

    @torch.no_grad()
    def generate_video(
        self,
        start: Tensor | None,
        actions: Tensor | None,
        frames: int,
        *,
        text: Sequence[str] | Tensor | None = None,
        seed: int = 0,
        sampler: SamplerConfig | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Continue ``start (b, 3, T0, H, W)``, T0 = 1 + r k, to ``frames`` = T video frames; the given frames are kept.

        Args:
            start: None where a text alone says what to show.
            actions: ``(b, T-1, a)`` from the first frame on; None for the null action.
            text: one for each row, or their vectors ``(b, m, text_dim)``.
            seed: of the noise; row i of a batch draws from seed + i, so a row does not depend on its batch.
            progress: called with (sampler steps done, sampler steps in all); may raise to stop.

        Raises:
            WorldloomError: lengths that do not fit, or neither start nor text.
        """
        self._check(start, actions, frames)
        ratio, sampler = self.frames_per_step, sampler or self.sampler
        vectors = text if text is None or isinstance(text, Tensor) else self.encode_text(text)
        if start is not None:
            start = start.to(self.device)
            context = self.tokenizer.encode(start)
        elif vectors is not None:
            edge = self.tokenizer.spatial_ratio
            size = (self.config.height // edge, self.config.width // edge)
            context = next(self.model.parameters()).new_zeros(len(vectors), self.tokenizer.latent_channels, 0, *size)
        else:
            raise WorldloomError("a start is needed, or a text", got="neither")
        if self.model.config.attention == "causal":
            t, known = 1 + (frames - 1) // ratio, context.shape[2]
            world = _World(self.model, sampler, len(context), seed, vectors)
            tick = _ticker(progress, (t - known) * sampler.steps)
            chosen = None if actions is None else actions.to(self.device)
            world.observe(context, None if chosen is None else chosen[:, : max(known - 1, 0) * ratio])
            parts = [context]
            for index in range(known, t):  # latent frame i >= 1 is led to by actions r (i - 1) to r i
                led = None if chosen is None or not index else chosen[:, (index - 1) * ratio : index * ratio]
                parts.append(world.advance(led, tick))
            latents = torch.cat(parts, dim=2)
        else:
            t = 1 + (frames - 1) // ratio
            latents = self._denoise_jointly(context, actions, vectors, t, seed, sampler, progress)
        video = self.tokenizer.decode(latents)
        return video if start is None else torch.cat([start, video[:, :, start.shape[2] :]], dim=2)

    def _denoise_jointly(
        self,
        context: Tensor,
        actions: Tensor | None,
        text: Tensor | None,
        t: int,
        seed: int,
        sampler: SamplerConfig,
        progress: Callable[[int, int], None] | None,
    ) -> Tensor:
        """Full attention: all frames at once, context frames held clean at noise level 0."""
        b, c, known, h, w = context.shape
        generators = _generators(b, seed)
        noise = _noise(generators, (c, t - known, h, w), context)
        actions = None if actions is None else actions.to(context)
        given = context.new_zeros(b, 1, t, h, w)
        given[:, :, :known] = 1
        tick = _ticker(progress, sampler.steps)

        def velocity(x: Tensor, level: float) -> Tensor:
            levels = torch.cat([context.new_zeros(b, known), context.new_full((b, t - known), level)], dim=1)
            whole = torch.cat([context, x], dim=2)
            made = self._guided(whole, levels, actions, text, given, sampler.guidance_scale)[:, :, known:]
            tick()
            return made

        made = flow_euler(velocity, noise, flow_levels(sampler.steps, sampler.shift))
        return torch.cat([context, made], dim=2)

    def _guided(
        self, x: Tensor, levels: Tensor, actions: Tensor | None, text: Tensor | None, given: Tensor, scale: float
    ) -> Tensor:
        conditional = self.model(x, levels, actions, text, condition_mask=given)
        if scale == 1 or (actions is None and text is None):
            return conditional
        return guide(conditional, self.model(x, levels, None, None, condition_mask=given), scale)

    # -- Steps ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reset(self, video: Tensor, actions: Tensor | None = None, *, seed: int = 0) -> Tensor:
        """Start a world from ``(b, 3, T, H, W)``, T = 1 + r k; returns the start as the tokenizer sees it."""
        world = _World(self.model, self.sampler, video.shape[0], seed)
        context = self.tokenizer.encode(video.to(self.device))
        world.observe(context, None if actions is None else actions.to(self.device))
        self._world = world
        return self._decode(context, world)

    @torch.no_grad()
    def step(self, actions: Tensor) -> Tensor:
        """Advance by ``(b, r, a)`` actions; returns the r new frames ``(b, 3, r, H, W)``."""
        if self._world is None:
            raise WorldloomError("the world has no start yet", do="call reset(video) first")
        latents = self._world.advance(actions.to(self.device))
        return self._decode(latents, self._world)

    def rollout(self, actions: Tensor) -> Tensor:
        """``(b, n*r, a)`` -> ``(b, 3, n*r, H, W)``: repeated `step`."""
        ratio = self.frames_per_step
        if actions.shape[1] % ratio or not actions.shape[1]:
            raise WorldloomError(f"a rollout takes a multiple of {ratio} actions", got=actions.shape[1])
        return torch.cat([self.step(part) for part in actions.split(ratio, dim=1)], dim=2)

    def align(self, actions: Tensor, names: tuple[str, ...]) -> Tensor:
        """Actions ``(b, n, k)`` whose components are called ``names``, in this model's own order and size."""
        return align_actions(actions, names, self.config.action_names, self.action_dim)

    def _decode(self, latents: Tensor, world: _World) -> Tensor:
        return self.tokenizer.decode_step(latents, world.decoder_state)


class _World:
    """The state of one rollout: what the model has seen, the decoder's state, the noise streams."""

    def __init__(
        self, model: PredictTransformer, sampler: SamplerConfig, batch: int, seed: int, text: Tensor | None = None
    ) -> None:
        self.model, self.sampler, self.text = model, sampler, text
        self.cache = KVCache()
        self.decoder_state: dict[Any, Tensor] = {}
        self.generators = _generators(batch, seed)
        self.shape: tuple[int, ...] = ()
        self.newest: tuple[Tensor, Tensor | None] | None = None
        """The last sampled frame and its actions, taken into the cache when the next one needs it."""

    def observe(self, latents: Tensor, actions: Tensor | None) -> None:
        """Take clean latent frames ``(b, c, t, h, w)`` and the actions that led to them into the cache."""
        b, c, t, h, w = latents.shape
        self.shape = (c, 1, h, w)
        if not t:
            return
        level = latents.new_full((b, t), self.sampler.context_noise)
        if self.sampler.context_noise:
            noise = _noise(self.generators, (c, t, h, w), latents)
            latents = flow_interpolate(latents, noise, level)
        self.model(latents, level, actions, self.text, cache=self.cache, commit=True)

    def advance(self, actions: Tensor | None, tick: Callable[[], None] = lambda: None) -> Tensor:
        """Sample the next latent frame ``(b, c, 1, h, w)``; `tick` after each step."""
        if self.newest is not None:
            self.observe(*self.newest)
        noise = _noise(self.generators, self.shape, next(self.model.parameters()))
        b, scale = len(self.generators), self.sampler.guidance_scale

        def velocity(x: Tensor, level: float) -> Tensor:
            levels = x.new_full((b, 1), level)
            made = self.model(x, levels, actions, self.text, cache=self.cache)
            if scale != 1 and (actions is not None or self.text is not None):
                made = guide(made, self.model(x, levels, None, None, cache=self.cache), scale)
            tick()
            return made

        latents = flow_euler(velocity, noise, flow_levels(self.sampler.steps, self.sampler.shift))
        self.newest = (latents, actions)
        return latents


def _ticker(progress: Callable[[int, int], None] | None, total: int) -> Callable[[], None]:
    """A function that counts its calls and reports them."""
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return tick


def _generators(batch: int, seed: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + row) for row in range(batch)]


def _noise(generators: list[torch.Generator], shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Standard normal ``(b, *shape)``, drawn on the CPU so that a seed means the same on every device."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(like)
