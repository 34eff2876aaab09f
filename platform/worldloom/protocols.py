"""Capabilities a model can have. A family implements those it has; serving and the CLI offer only these.

No universal base class: each protocol is small, and ``isinstance`` works on all of them.
Letters: b batch, c channels, t latent frames, T video frames, h w latent size, H W pixels, a action size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from worldloom.schema import GenerationRequest, VideoVerdict


@runtime_checkable
class VideoTokenizer(Protocol):
    """Video to latents and back. Causal: frame 0 is encoded alone, then ``temporal_ratio`` frames a latent frame."""

    @property
    def temporal_ratio(self) -> int: ...
    @property
    def spatial_ratio(self) -> int: ...
    @property
    def latent_channels(self) -> int: ...
    @property
    def fingerprint(self) -> str:
        """sha256 (hex) that changes whenever the latents would; latent shards record it."""
        ...

    def encode(self, video: Tensor) -> Tensor:
        """``(b, 3, T, H, W)`` in [-1, 1], T = 1 + k * temporal_ratio -> ``(b, c, t, h, w)``, about unit variance."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """``(b, c, t, h, w)`` -> ``(b, 3, T, H, W)`` in [-1, 1]."""
        ...

    def stream_encode(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Encode consecutive chunks of one video with cached state; concatenated, equal to `encode` of the whole."""
        ...

    def stream_decode(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Decode consecutive latent chunks of one video; concatenated, equal to `decode` of the whole."""
        ...

    def encode_step(self, video: Tensor, state: dict[Any, Tensor]) -> Tensor:
        """Encode the next frames of a stream whose state the caller holds; it starts as an empty dict."""
        ...

    def decode_step(self, latents: Tensor, state: dict[Any, Tensor]) -> Tensor:
        """Decode the next latents of a stream whose state the caller holds; it starts as an empty dict."""
        ...


@runtime_checkable
class SemanticTokenizer(Protocol):
    """Video to features that say what is in it: a frozen encoder, with no way back to pixels."""

    @property
    def temporal_ratio(self) -> int: ...
    @property
    def spatial_ratio(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def fingerprint(self) -> str:
        """sha256 (hex) that changes whenever the features would."""
        ...

    def encode(self, video: Tensor) -> Tensor:
        """``(b, 3, T, H, W)`` in [-1, 1] -> ``(b, d, t, h, w)``, T = temporal_ratio * t, H = spatial_ratio * h."""
        ...

    def embed(self, video: Tensor) -> Tensor:
        """``(b, 3, T, H, W)`` -> ``(b, d)``: the mean of what `encode` gives."""
        ...


@runtime_checkable
class ActionTokenizer(Protocol):
    """Actions to integer tokens and back."""

    @property
    def action_dim(self) -> int: ...
    @property
    def tokens(self) -> int:
        """Tokens of one action."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids are 0 to this less one."""
        ...

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) that changes whenever the tokens would."""
        ...

    def encode(self, actions: Tensor, *, clip: bool = False) -> Tensor:
        """``(b, T, a)`` or ``(T, a)`` -> int64 ``(b, T, n)`` or ``(T, n)``; ``clip`` takes values outside the range."""
        ...

    def decode(self, tokens: Tensor) -> Tensor:
        """The reverse of `encode`, up to the width of a bin; float32."""
        ...


@runtime_checkable
class HasProvenance(Protocol):
    """Says what it is made of; every model that makes samples does."""

    def provenance(self) -> Mapping[str, Any]:
        """See `Generates.provenance`."""
        ...


@runtime_checkable
class Generates(Protocol):
    """Makes a video from text, an image, a video or actions."""

    def complete(self, request: GenerationRequest) -> GenerationRequest:
        """The request with every unset field filled in from the model's defaults; raises where `generate` would.

        A field that is set and that the model would not heed is refused, never passed over.
        """
        ...

    def generate(self, request: GenerationRequest, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """The whole video, conditioning frames included: ``(b, 3, T, H, W)`` in [-1, 1].

        ``progress(done, total)`` is called between units of work; an exception that it raises ends the work.
        """
        ...

    def provenance(self) -> Mapping[str, Any]:
        """What decides a result besides the request, JSON-ready; a sample's sidecar records it.

        ``model`` {name, path, digest, kind}, and where it has them ``tokenizer`` {name, fingerprint} and ``sampler``.
        """
        ...


@runtime_checkable
class Steps(Protocol):
    """An interactive world: set its start, then advance it with actions."""

    @property
    def action_dim(self) -> int: ...
    @property
    def frames_per_step(self) -> int: ...

    def reset(self, video: Tensor, actions: Tensor | None = None, *, seed: int = 0) -> Tensor:
        """Start from ``(b, 3, T, H, W)`` and its ``(b, T-1, a)`` actions; returns the start as the world sees it."""
        ...

    def step(self, actions: Tensor) -> Tensor:
        """Advance by ``(b, frames_per_step, a)`` actions; returns the new frames ``(b, 3, frames_per_step, H, W)``."""
        ...

    def rollout(self, actions: Tensor) -> Tensor:
        """``(b, n * frames_per_step, a)`` -> ``(b, 3, n * frames_per_step, H, W)``: repeated `step`."""
        ...


@runtime_checkable
class Answers(Protocol):
    """Answers questions about a video."""

    def answer(self, video: Tensor, question: str) -> str: ...


@runtime_checkable
class Embeds(Protocol):
    """Maps a video to vectors."""

    def embed(self, video: Tensor) -> Tensor:
        """``(b, 3, T, H, W)`` -> ``(b, d)``."""
        ...


@runtime_checkable
class Embedder(Protocol):
    """Maps pictures, texts or both to unit vectors of one space, by whose products a dataset is searched.

    A model that takes only one of them refuses the other with a `WorldloomError`.
    """

    name: str
    """As a user gives it."""
    fingerprint: str
    """Changes whenever the vectors would."""
    takes: Sequence[str]
    """``frames``, ``texts`` or both."""

    def embed_frames(self, frames: np.ndarray) -> np.ndarray:
        """uint8 ``(n, h, w, 3)`` -> float32 ``(n, d)``."""
        ...

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """-> float32 ``(n, d)``."""
        ...


@runtime_checkable
class Renders(Protocol):
    """Renders a persistent scene from camera poses."""

    def render(self, poses: Tensor) -> Tensor:
        """``(b, T, 4, 4)`` camera-to-world -> ``(b, 3, T, H, W)``."""
        ...


@runtime_checkable
class Plans(Protocol):
    """Chooses actions that lead from a start to a goal."""

    def plan(self, start: Tensor, goal: Tensor, horizon: int) -> Tensor:
        """``(b, 3, T, H, W)`` and ``(b, 3, 1, H, W)`` -> actions ``(b, horizon, a)``."""
        ...


@runtime_checkable
class InfersActions(Protocol):
    """Inverse dynamics: finds the actions that lead from frame to frame of a video."""

    def infer_actions(self, video: Tensor, *, seed: int = 0) -> Tensor:
        """``(b, 3, T, H, W)`` in [-1, 1] -> actions ``(b, T-1, a)``."""
        ...


@runtime_checkable
class Acts(Protocol):
    """A policy: chooses actions from a start and an instruction, and foresees the frames they lead to."""

    def act(self, start: Tensor, prompt: str, horizon: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
        """``(b, 3, T, H, W)`` -> actions ``(b, horizon, a)`` and the whole video ``(b, 3, T + horizon, H, W)``."""
        ...


@runtime_checkable
class Upsamples(Protocol):
    """Rewrites a short prompt into the kind of text a model was trained on."""

    def identity(self) -> Mapping[str, Any]:
        """What decides the rewritten text besides the prompt, JSON-ready; part of a sample's key."""
        ...

    def upsample(self, prompt: str, start: Tensor | None = None) -> str:
        """The rewritten prompt; ``start (1, 3, T, H, W)`` is what the video begins with, where it begins with frames.

        Raises:
            WorldloomError: it could not be rewritten. The caller does not go on with the original.
        """
        ...


@runtime_checkable
class ChecksText(Protocol):
    """A guard before generation."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever a verdict could; part of a sample's key."""
        ...

    def check_text(self, text: str) -> str:
        """Why the text is refused; empty where it may pass."""
        ...


@runtime_checkable
class ChecksVideo(Protocol):
    """A guard after generation. It may refuse a video, or give back a changed one."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever a verdict or a changed pixel could; part of a sample's key."""
        ...

    def check_video(self, frames: np.ndarray) -> VideoVerdict:
        """Look at uint8 ``(t, h, w, 3)`` RGB, which is not to be written to."""
        ...


CAPABILITIES: Sequence[type] = (Generates, Steps, Answers, Embeds, Renders, Plans, InfersActions, Acts)


def capabilities(model: object) -> list[str]:
    """Names of the protocols of `CAPABILITIES` that a model implements, but for those that it says it lacks.

    A class may have the methods of more than one of its checkpoints can do; ``lacks`` then names the others.
    """
    lacks = getattr(model, "lacks", ())
    return [c.__name__ for c in CAPABILITIES if isinstance(model, c) and c.__name__ not in lacks]
