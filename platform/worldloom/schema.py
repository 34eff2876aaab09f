"""What passes between components: small frozen dataclasses, no torch import.

Shapes: float video is ``(b, c, t, h, w)`` in [-1, 1]; decoded frames are uint8 ``(t, h, w, c)``.
``actions[t]`` is taken at frame t and leads to frame t+1, so T frames carry T-1 actions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def clip_id(source_digest: str, start: int, end: int) -> str:
    """The id of frames ``[start, end)`` of a source: a hash of the source's bytes (their sha256) and the span."""
    return hashlib.sha256(f"{source_digest}:{start}:{end}".encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Clip:
    """A span of one source video, the unit that curation keeps or drops."""

    id: str
    """`clip_id(source_digest, start, end)`; survives from file to training sample to lineage."""
    source: str
    """Path or URL of the source, relative to the curated folder where it can be."""
    source_digest: str
    """sha256 (hex) of the source's bytes."""
    start: int
    """First frame of the span in the source."""
    end: int
    """One past the last frame of the span in the source."""
    fps: float
    """Frames per second of the stored clip."""
    width: int
    """Pixels of the stored clip."""
    height: int
    """Pixels of the stored clip."""
    caption: str = ""
    """Text that describes the clip; empty when nothing produced one."""
    action_dim: int = 0
    """Size of the action vector, 0 where the clip carries none."""
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Facts about the recording (env id, seed, action names, ...), JSON-serialisable."""
    step: int = 1
    """Every how many frames of the span the clip takes one, from the first on."""

    @property
    def frames(self) -> int:
        """Number of frames of the clip."""
        return -(-(self.end - self.start) // self.step)


@dataclass(frozen=True)
class Decision:
    """One row of the decision ledger: what one stage decided about one span, and on what grounds."""

    clip_id: str
    """Id of the span, or of the whole file where no span exists yet."""
    source: str
    """The file the span comes from."""
    start: int
    """First frame (0 where unknown)."""
    end: int
    """One past the last frame (0 where unknown)."""
    stage: str
    """The stage that decided."""
    kept: bool
    """True if the stage let the span pass."""
    measure: str = ""
    """What was measured, e.g. ``motion``."""
    value: float | None = None
    """The measured value."""
    threshold: float | None = None
    """The threshold it was held against."""
    reason: str = ""
    """One sentence for a person."""
    failed: bool = False
    """True if the span could not be processed at all (then `kept` is False and `reason` is the error)."""
    like: str = ""
    """Id of the clip that this one repeats or resembles, where a stage compared them."""
    traceback: str = ""
    """Where an exception came from that no one expected; empty for what is merely wrong with the file."""


@dataclass(frozen=True)
class ShardRef:
    """A committed tar shard of a dataset."""

    path: str
    """Path relative to the dataset folder."""
    digest: str
    """sha256 (hex) of the tar."""
    samples: int
    """How many samples it holds."""
    bytes: int
    """Size of the tar."""


@dataclass(frozen=True)
class CheckpointRef:
    """A saved model: a folder with ``model.safetensors``, ``config.toml`` and ``README.md``."""

    name: str
    """Name in the catalog or registry, or the folder's name."""
    path: str
    """The folder."""
    digest: str
    """sha256 (hex) of ``model.safetensors``."""
    kind: str
    """Family or tokenizer class that reads it, e.g. ``predict`` or ``causal-vae``."""


@dataclass(frozen=True)
class GenerationRequest:
    """What a user asks a generating model for. Unset fields take the model's own defaults."""

    model: str
    """Catalog name or checkpoint folder."""
    prompt: str = ""
    """Text, for models with a text encoder."""
    image: str | None = None
    """Path of a conditioning image."""
    video: str | None = None
    """Path of a conditioning video; its last frames are continued."""
    actions: str | None = None
    """Path of actions ``(T-1, action_dim)``: .npy, .json or .csv."""
    frames: int | None = None
    """Number of frames of the result, conditioning frames included."""
    seed: int = 0
    """Seed of the noise; equal seeds give equal bits on the same device."""
    steps: int | None = None
    """Number of sampler steps."""
    guidance_scale: float | None = None
    """Classifier-free guidance g in ``v = uncond + g (cond - uncond)``; 1 switches it off."""
    fps: float | None = None
    """Frames per second written into the result."""
    negative_prompt: str = ""
    """Text to keep away from, for models that take one."""
    shift: float | None = None
    """Timestep shift of the sampler, for models that let it be chosen."""
    height: int | None = None
    """Pixels of the result, for models of several sizes."""
    width: int | None = None
    """Pixels of the result, for models of several sizes."""
    views: tuple[str, ...] = ()
    """Path of a conditioning image or video of each camera, for models of several views, in the model's order of
    cameras. The result shows them beside each other."""


@dataclass(frozen=True)
class VideoVerdict:
    """What a guard makes of a video."""

    blocked: str = ""
    """Why the video is refused; empty where it may pass."""
    frames: np.ndarray | None = None
    """uint8 ``(t, h, w, 3)``: the video to go on with; None where nothing was changed."""
    detail: str = ""
    """One sentence for a person."""
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What was measured, JSON-ready."""


@dataclass(frozen=True)
class Sample:
    """One generated video on disk, with what is needed to make it again."""

    id: str
    """Artifact id; ``worldloom lineage ID`` walks back from it."""
    path: str
    """The video file."""
    sidecar: str
    """JSON beside it: model digest, seed, effective config, inputs."""
    request: GenerationRequest
    """The effective request."""


@dataclass(frozen=True)
class LatentBatch:
    """A training batch of encoded clips."""

    latents: Tensor
    """``(b, c, t, h, w)``, already scaled to about unit variance."""
    actions: Tensor | None = None
    """``(b, T-1, action_dim)`` at video rate, T = 1 + ratio * (t - 1); None where the data carries none."""
    text: Tensor | None = None
    """``(b, n, d)`` text embeddings; None where there are none."""
    clip_ids: tuple[str, ...] = ()
    """One id per row."""

    def to(self, *args: Any, **kwargs: Any) -> LatentBatch:
        """A copy whose tensors went through ``Tensor.to``."""

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(*args, **kwargs)

        return LatentBatch(self.latents.to(*args, **kwargs), move(self.actions), move(self.text), self.clip_ids)
