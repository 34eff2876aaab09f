"""The predict family in use: generate a video, or step an interactive world.

Letters: b batch, t latent frames, T video frames, r frames in a latent frame, H W pixels, a action size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from worldloom.errors import WorldloomError
from worldloom.protocols import VideoTokenizer
from worldloom.schema import CheckpointRef, GenerationRequest
from worldloom_model_zoo.predict import actions as action_sampling
from worldloom_model_zoo.predict.caching import TensorCache, default_cache
from worldloom_model_zoo.predict.config import PredictCheckpoint, SamplerConfig
from worldloom_model_zoo.predict.inputs import align_actions, read_conditioning, read_views
from worldloom_model_zoo.predict.model import PredictTransformer
from worldloom_model_zoo.predict.sampling import GuidedNetwork, as_context, draw_latents, schedule
from worldloom_model_zoo.predict.stepping import World, draw_noise, noise_source, seeded
from worldloom_model_zoo.samplers import pyramid_levels


class PredictPipeline:
    """A model with its tokenizer and sampler.

    Implements `Generates`; `Steps` where attention is causal; `InfersActions` and `Acts` where there is an action head.
    """

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
        self._world: World | None = None
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
    def lacks(self) -> tuple[str, ...]:
        """Protocols whose methods this checkpoint cannot carry out."""
        config = self.model.config
        stepped = () if config.attention == "causal" else ("Steps",)
        return stepped if config.action_head else (*stepped, "InfersActions", "Acts")

    @property
    def frames_per_step(self) -> int:
        """Video frames, and actions, of one `step`."""
        return self.tokenizer.temporal_ratio

    # -- Generates ------------------------------------------------------------------------------------------------

    def generate(self, request: GenerationRequest, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """The video a request describes, conditioning frames included: ``(1, 3, T, H, W)`` in [-1, 1].

        Of several views it shows one beside the other; the prompt is the first camera's text.

        ``progress(done, total)`` counts sampler steps; an exception that it raises ends the work. What is encoded is
        kept on disk for the next request (`caching.default_cache`).

        Raises:
            WorldloomError: text for a model without text, no conditioning, actions of another size or number.
        """
        request, start, actions = self._read(request)
        assert request.frames is not None
        given: dict[str, Any] = {
            "seed": request.seed,
            "sampler": self._sampler(request),
            "progress": progress,
            "size": self._size(request),
            "cache": default_cache(),
        }
        if not request.views:
            text = [request.prompt] if request.prompt else None
            return self.generate_video(start, actions, request.frames, text=text, **given)
        cameras = range(len(request.views))
        texts = [[request.prompt, *[""] * (len(cameras) - 1)]] if request.prompt else None
        made = self.generate_views(start, request.frames, views=cameras, text=texts, **given)
        return torch.cat(made.unbind(1), dim=-1)  # (1, v, 3, T, H, W) -> (1, 3, T, H, v*W)

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
                    do="give the encoder that it was trained with: its folder, or the version of its package",
                )
            self._encoder = encoder
        return self._encoder.encode(texts).to(self.device)

    def _read(self, request: GenerationRequest) -> tuple[GenerationRequest, Tensor | None, Tensor | None]:
        """The completed request, with the start (of several views ``(1, v, 3, T0, H, W)``) and the actions it names."""
        if request.negative_prompt and not self.config.text.name:
            raise WorldloomError("this model takes no text", got=request.negative_prompt, do="leave it out")
        height, width = self._size(request)
        config, sampler = replace(self.config, height=height, width=width), self._sampler(request)
        if request.views:
            start, actions = read_views(request, config, self.frames_per_step), None
        else:
            start, actions = read_conditioning(request, config, self.frames_per_step)
        frames = request.frames
        if frames is None:
            given = start.shape[-3] if start is not None else 1
            frames = given + 16 if actions is None else actions.shape[1] + 1
        self._check(start[:, 0] if request.views and start is not None else start, actions, frames)
        fps = self.config.fps if request.fps is None else request.fps
        if fps <= 0:
            raise WorldloomError("the frame rate must be a positive number", got=fps)
        completed = replace(
            request,
            frames=frames,
            steps=sampler.steps,
            guidance_scale=sampler.guidance_scale + (sampler.guidance_convention == "conditional"),
            fps=fps,
            negative_prompt=sampler.negative_prompt,
            shift=sampler.shift,
            height=height,
            width=width,
        )
        return completed, start, actions

    def _size(self, request: GenerationRequest) -> tuple[int, int]:
        """Height and width of a request, of those that the model was trained at."""
        sizes = [(self.config.height, self.config.width), *self.config.sizes]
        for size in sizes:
            if request.height in (None, size[0]) and request.width in (None, size[1]):
                return size
        raise WorldloomError(
            "the model was not trained at this size",
            got=f"height {request.height}, width {request.width}",
            do="use " + " or ".join(f"height {height}, width {width}" for height, width in sizes),
        )

    def _sampler(self, request: GenerationRequest) -> SamplerConfig:
        """The model's sampler with what the request sets; a request's guidance is in the convention unconditional."""
        given: dict[str, Any] = {"steps": request.steps, "shift": request.shift}
        if request.guidance_scale is not None:
            given["guidance_scale"] = request.guidance_scale - (self.sampler.guidance_convention == "conditional")
        given["negative_prompt"] = request.negative_prompt or None
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
        if start is not None:
            self._check_start(start)

    def _check_start(self, start: Tensor) -> None:
        """A start is ``(b, 3, 1 + r k, H, W)`` of a size that divides into tokens."""
        ratio, edge = self.frames_per_step, self.tokenizer.spatial_ratio * self.model.config.patch
        if start.ndim != 5 or start.shape[1] != 3 or not start.shape[2] or (start.shape[2] - 1) % ratio:
            raise WorldloomError(
                f"a start is a video (b, 3, T, H, W) with T = 1 + {ratio}k",
                got=tuple(start.shape),
                do=f"give 1 or {ratio + 1} frames, or {ratio} more",
            )
        if start.shape[3] % edge or start.shape[4] % edge:
            raise WorldloomError(
                f"height and width must be multiples of {edge}",
                got=tuple(start.shape[3:]),
                do=f"resize to {self.config.height}x{self.config.width}, which the model was trained at",
            )

    @torch.no_grad()
    def generate_video(
        self,
        start: Tensor | None,
        actions: Tensor | None,
        frames: int,
        *,
        text: Sequence[str] | Tensor | None = None,
        negative: Sequence[str] | Tensor | None = None,
        seed: int = 0,
        sampler: SamplerConfig | None = None,
        progress: Callable[[int, int], None] | None = None,
        size: tuple[int, int] | None = None,
        cache: TensorCache | None = None,
    ) -> Tensor:
        """Continue ``start (b, 3, T0, H, W)``, T0 = 1 + r k, to ``frames`` = T video frames; the given frames are kept.

        With full attention a video longer than ``sampler.chunk_frames`` is made in chunks: each starts from the last
        ``overlap_frames`` of the one before.

        Args:
            start: None where a text alone says what to show. Only these frames are encoded.
            actions: ``(b, T-1, a)`` from the first frame on; None for the null action.
            text: one for each row, or their vectors ``(b, m, text_dim)``.
            negative: the same, to be guided away from; None for ``sampler.negative_prompt``.
            seed: of the noise; row i of a batch draws from seed + i, so a row does not depend on its batch.
            progress: called with (calls of the network done, calls in all), guidance apart; may raise to stop.
            size: height and width where there is no start; None for the checkpoint's.
            cache: keeps the encoded start and texts for the next time.

        Raises:
            WorldloomError: lengths or sizes that do not fit, or neither start nor text.
        """
        self._check(start, actions, frames)
        sampler = sampler or self.sampler
        network = self._network(sampler, text, negative, cache)
        if start is not None:
            start = start.to(self.device)
            context = self._encode(start, cache)
        elif network.text is not None:
            height, width = size or (self.config.height, self.config.width)
            edge = self.tokenizer.spatial_ratio
            shape = (len(network.text), self.tokenizer.latent_channels, 0, height // edge, width // edge)
            context = next(self.model.parameters()).new_zeros(shape)
        else:
            raise WorldloomError("a start is needed, or a text", got="neither")
        actions = None if actions is None else actions.to(self.device)
        if self.model.config.attention == "causal":
            latents = self._generate_causally(network, context, actions, frames, seed, progress)
            return self._decode_after(start, latents)
        if sampler.rolling_delay:
            raise WorldloomError("rolling_delay is for causal models", got=self.model.config.attention)
        return self._generate_in_chunks(network, start, context, actions, frames, seed, progress)

    @torch.no_grad()
    def generate_views(
        self,
        start: Tensor | None,
        frames: int,
        *,
        views: Sequence[int] | None = None,
        text: Sequence[Sequence[str]] | Tensor | None = None,
        negative: Sequence[Sequence[str]] | Tensor | None = None,
        seed: int = 0,
        sampler: SamplerConfig | None = None,
        progress: Callable[[int, int], None] | None = None,
        size: tuple[int, int] | None = None,
        cache: TensorCache | None = None,
    ) -> Tensor:
        """What several cameras see at once: ``(b, v, 3, T, H, W)``, T = ``frames``, for models with views.

        Args:
            start: ``(b, v, 3, T0, H, W)``, T0 = 1 + r k, kept as it is; None where a text alone says what to show.
            views: the cameras' numbers in the model, v of them; None is all of them, in order.
            text: v texts for each row, where an empty one is zeros (the released models read the first camera's only),
                or their vectors ``(b, v*m, text_dim)``.
            negative: the same, to be guided away from; None for ``sampler.negative_prompt`` at the first camera.
            seed, sampler, progress, size, cache: as for `generate_video`.

        Raises:
            WorldloomError: a model of one view, cameras that it does not know, lengths or sizes that do not fit, more
                frames than ``sampler.chunk_frames``, or neither start nor text.
        """
        known, sampler = self.model.config.views, sampler or self.sampler
        numbers = list(range(known) if views is None else views)
        if not known or not numbers or not all(0 <= number < known for number in numbers):
            raise WorldloomError(
                f"this model knows the views 0 to {known - 1}" if known else "this model knows one view only",
                got=numbers,
            )
        if start is not None and (start.ndim != 6 or start.shape[1] != len(numbers)):
            raise WorldloomError(f"a start is (b, {len(numbers)}, 3, T, H, W)", got=tuple(start.shape))
        if 0 < sampler.chunk_frames < frames:
            raise WorldloomError(
                "several views are made in one chunk", got=frames, do=f"at most {sampler.chunk_frames}"
            )
        flat = None if start is None else start.flatten(0, 1).to(self.device)  # (b*v, 3, T0, H, W)
        self._check(flat, None, frames)
        vectors = self._vectors_of_views(text, len(numbers), cache)
        if negative is None and sampler.negative_prompt and sampler.guided and vectors is not None:
            negative = [[sampler.negative_prompt, *[""] * (len(numbers) - 1)]]
        away = self._vectors_of_views(negative, len(numbers), cache)
        network = self._network(sampler, vectors, away, cache, torch.tensor(numbers, device=self.device))
        if flat is not None:
            context = self._encode(flat, cache).unflatten(0, (-1, len(numbers)))  # (b, v, c, k, h, w)
            context = context.transpose(1, 2).flatten(2, 3)
        elif vectors is not None:
            height, width = size or (self.config.height, self.config.width)
            edge, c = self.tokenizer.spatial_ratio, self.tokenizer.latent_channels
            context = next(self.model.parameters()).new_zeros(len(vectors), c, 0, height // edge, width // edge)
        else:
            raise WorldloomError("a start is needed, or a text", got="neither")
        t, generators = 1 + (frames - 1) // self.frames_per_step, seeded(len(context), seed)
        latents = self._denoise_jointly(network, context, None, t, generators, _ticker(progress, sampler.calls))
        latents = latents.unflatten(2, (len(numbers), t)).transpose(1, 2).flatten(0, 1)  # (b*v, c, t, h, w)
        return self._decode_after(flat, latents).unflatten(0, (-1, len(numbers)))

    def _vectors_of_views(
        self, texts: Sequence[Sequence[str]] | Tensor | None, views: int, cache: TensorCache | None
    ) -> Tensor | None:
        """``(b, v*m, text_dim)``: vectors of v texts a row, zeros for empty ones."""
        if texts is None or isinstance(texts, Tensor):
            return texts
        flat = [text for row in texts for text in row]
        if any(len(row) != views for row in texts) or not any(flat):
            raise WorldloomError(f"each row has {views} texts, one of them not empty", got=[list(row) for row in texts])
        found = self._vectors([text for text in flat if text], cache)
        assert found is not None
        vectors = found.new_zeros(len(flat), *found.shape[1:])
        vectors[[bool(text) for text in flat]] = found
        return vectors.unflatten(0, (-1, views)).flatten(1, 2)

    def _network(
        self,
        sampler: SamplerConfig,
        text: Sequence[str] | Tensor | None,
        negative: Sequence[str] | Tensor | None = None,
        cache: TensorCache | None = None,
        views: Tensor | None = None,
    ) -> GuidedNetwork:
        """The network with its text, and with the negative one where guidance makes use of it."""
        text = self._vectors(text, cache)
        if negative is None and sampler.negative_prompt:
            negative = [sampler.negative_prompt]
        if text is None or not sampler.guided:
            negative = None
        negative = self._vectors(negative, cache)
        if text is not None and negative is not None and len(negative) != len(text):
            negative = negative.expand(len(text), -1, -1)
        return GuidedNetwork(self.model, sampler, text, negative, self.config.fps, views)

    def _vectors(self, text: Sequence[str] | Tensor | None, cache: TensorCache | None) -> Tensor | None:
        if text is None or isinstance(text, Tensor):
            return text
        if cache is None or not self.config.text.name:
            return self.encode_text(text)
        # The encoder is loaded only where something is missing: so its fingerprint is that of the checkpoint.
        ref = self.config.text
        origin = ("text", ref.name, ref.fingerprint, str(ref.tokens), *self._machine())
        rows = [cache.get(lambda one=one: self.encode_text([one]), *origin, one) for one in text]
        return torch.cat(rows).to(self.device)

    def _encode(self, start: Tensor, cache: TensorCache | None) -> Tensor:
        if cache is None:
            return self.tokenizer.encode(start)
        origin = ("latents", self.tokenizer.fingerprint, *self._machine())
        return cache.get(lambda: self.tokenizer.encode(start), *origin, start).to(self.device)

    def _machine(self) -> tuple[str, ...]:
        """What results depend on besides weights and input."""
        weight = next(self.model.parameters())
        return weight.device.type, str(weight.dtype), torch.__version__

    def _generate_causally(
        self,
        network: GuidedNetwork,
        context: Tensor,
        actions: Tensor | None,
        frames: int,
        seed: int,
        progress: Callable[[int, int], None] | None,
    ) -> Tensor:
        """Latents frame by frame, or several at a time with ``rolling_delay``."""
        ratio, sampler, known = self.frames_per_step, network.sampler, context.shape[2]
        t = 1 + (frames - 1) // ratio

        def led(first: int, last: int) -> Tensor | None:
            """Actions that lead to latent frames ``first`` to before ``last``; frame i >= 1 has r (i - 1) to r i."""
            return None if actions is None else actions[:, max(first - 1, 0) * ratio : max(last - 1, 0) * ratio]

        world = World(network, len(context), seed)
        world.observe(context, led(0, known))
        parts = [context]
        if sampler.rolling_delay:
            total = pyramid_levels(schedule(sampler), t - known, sampler.rolling_delay).shape[0] - 1
            parts.extend(world.roll(t - known, lambda a, b: led(known + a, known + b), _ticker(progress, total)))
        else:
            tick = _ticker(progress, (t - known) * sampler.calls)
            parts.extend(world.advance(led(index, index + 1), tick) for index in range(known, t))
        return torch.cat(parts, dim=2)

    def _generate_in_chunks(
        self,
        network: GuidedNetwork,
        start: Tensor | None,
        context: Tensor,
        actions: Tensor | None,
        frames: int,
        seed: int,
        progress: Callable[[int, int], None] | None,
    ) -> Tensor:
        """The video, all frames of a chunk at once."""
        ratio, sampler = self.frames_per_step, network.sampler
        longest, overlap = sampler.chunk_frames or frames, sampler.overlap_frames
        if (longest - 1) % ratio or (overlap - 1) % ratio:
            raise WorldloomError(
                f"chunk_frames and overlap_frames must be 1 + {ratio}k", got=f"{longest} and {overlap}"
            )
        if start is not None and start.shape[2] >= longest:
            raise WorldloomError(
                "the start is as long as a chunk", got=start.shape[2], do=f"give fewer than {longest} frames"
            )
        count = 1 + max(0, -(-(frames - longest) // (longest - overlap)))
        length = min(frames, longest) if count == 1 else longest  # every chunk as long as in training; the end is cut
        tick = _ticker(progress, count * sampler.calls)
        generators = seeded(len(context), seed)
        video = start if start is not None else None
        for index in range(count):
            if index:
                assert video is not None
                context = self.tokenizer.encode(video[:, :, -overlap:])
            begin = index * (longest - overlap)
            chosen = None if actions is None else actions[:, begin : begin + length - 1]
            if chosen is not None and chosen.shape[1] < length - 1:  # what they lead to is cut off
                chosen = F.pad(chosen, (0, 0, 0, length - 1 - chosen.shape[1]))
            latents = self._denoise_jointly(network, context, chosen, 1 + (length - 1) // ratio, generators, tick)
            if index:
                assert video is not None
                video = torch.cat([video, self.tokenizer.decode(latents)[:, :, overlap:]], dim=2)
            else:
                video = self._decode_after(start, latents)
        assert video is not None
        return video[:, :, :frames]

    def _denoise_jointly(
        self,
        network: GuidedNetwork,
        context: Tensor,
        actions: Tensor | None,
        t: int,
        generators: list[torch.Generator],
        tick: Callable[[], None],
    ) -> Tensor:
        """Full attention: t frames of each view at once, with the given ones put in place at every step.

        ``context`` has the given frames of one view after another, ``(b, c, v*known, h, w)``, and the result all of
        them, ``(b, c, v*t, h, w)``.
        """
        (b, c, shown_frames, h, w), sampler = context.shape, network.sampler
        v = 1 if network.views is None else len(network.views)
        known = shown_frames // v
        noise = draw_noise(generators, (c, v * (t - known), h, w), context)

        def after(first: Tensor, then: Tensor) -> Tensor:
            """The frames of each view, first the given ones."""
            parts = first.unflatten(2, (v, known)), then.unflatten(2, (v, t - known))
            return torch.cat(parts, dim=3).flatten(2, 3)

        given = after(context.new_ones(b, 1, v * known, h, w), context.new_zeros(b, 1, v * (t - known), h, w))
        shown, level = as_context(context, sampler, lambda: draw_noise(generators, (c, v * known, h, w), context))
        network.renew()

        def predict(x: Tensor, at: float, step: float | None) -> Tensor:
            told = level if sampler.edm or sampler.condition_level is not None else at
            levels = ([told] * known + [at] * (t - known)) * v
            made = network(after(shown, x), levels, actions, known=known, step=step, condition_mask=given)
            tick()
            return made.unflatten(2, (v, t))[:, :, :, known:].flatten(2, 3)

        made = draw_latents(predict, noise, sampler, lambda: draw_noise(generators, tuple(noise.shape[1:]), noise))
        return after(context, made)

    def _decode_after(self, start: Tensor | None, latents: Tensor) -> Tensor:
        """The decoded video, with the start in the place of its reconstruction."""
        video = self.tokenizer.decode(latents)
        return video if start is None else torch.cat([start, video[:, :, start.shape[2] :]], dim=2)

    # -- Steps ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reset(
        self,
        video: Tensor,
        actions: Tensor | None = None,
        *,
        seed: int = 0,
        text: Sequence[str] | Tensor | None = None,
    ) -> Tensor:
        """Start a world from ``(b, 3, T, H, W)``, T = 1 + r k; returns the start as the tokenizer sees it.

        ``text`` says what the world is, one for each row or their vectors, for models that take it.
        """
        self._check_start(video)
        world = World(self._network(self.sampler, text), video.shape[0], seed)
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

    # -- InfersActions, Acts ----------------------------------------------------------------------------------------

    def infer_actions(self, video: Tensor, *, seed: int = 0) -> Tensor:
        """The actions between the frames of ``(b, 3, T, H, W)``, T = 1 + r k: ``(b, T-1, a)``; see `actions`.

        Raises:
            WorldloomError: a model without ``action_head``, or a video that does not fit it.
        """
        self._check_start(video)
        with torch.no_grad():
            latents = self.tokenizer.encode(video.to(self.device))
        draw = noise_source(len(video), seed, latents)
        return action_sampling.infer_actions(self.model, latents, self.sampler, draw)

    def act(self, start: Tensor, prompt: str, horizon: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
        """What to do from ``start (b, 3, T, H, W)`` on: actions ``(b, horizon, a)``, and the video that they lead to.

        Args:
            prompt: what is to be done; empty for a model without text.
            horizon: a multiple of r.

        Raises:
            WorldloomError: a model without ``action_head``, another horizon, or a prompt that the model cannot take.
        """
        self._check_start(start)
        if horizon < 1 or horizon % self.frames_per_step:
            raise WorldloomError(f"the horizon is a multiple of {self.frames_per_step}", got=horizon)
        text = self.encode_text([prompt] * len(start)) if prompt else None
        with torch.no_grad():
            context = self.tokenizer.encode(start.to(self.device))
            draw, frames = noise_source(len(start), seed, context), horizon // self.frames_per_step
            chosen, latents = action_sampling.act(self.model, context, text, frames, self.sampler, draw)
            return chosen, self._decode_after(start.to(self.device), latents)

    def _decode(self, latents: Tensor, world: World) -> Tensor:
        return self.tokenizer.decode_step(latents, world.decoder_state)


def _ticker(progress: Callable[[int, int], None] | None, total: int) -> Callable[[], None]:
    """A function that counts its calls and reports them."""
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return tick
