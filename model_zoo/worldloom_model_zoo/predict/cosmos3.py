"""Cosmos 3 (NVIDIA 2026) behind Loom's protocols: a thin adapter over diffusers' Cosmos3OmniPipeline.

| what is asked | mode of Cosmos 3 |
|---|---|
| a prompt | text2video |
| a prompt and an image | image2video |
| a prompt and a video | video2video: its last five frames, or one, are continued |
| actions, with an image or a video's last frame | forward_dynamics |
| `infer_actions` of a video | inverse_dynamics |
| `act` from a start and an instruction | policy |

Actions are those of one embodiment (``domain``), in Cosmos 3's unified representation.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from worldloom import config as configs
from worldloom import media
from worldloom.artifacts import atomic_dir, file_digest
from worldloom.errors import WorldloomError, missing_extra
from worldloom.pull import LOCK
from worldloom.schema import CheckpointRef, GenerationRequest
from worldloom.weights import find_pickles, pickle_refused
from worldloom_model_zoo.predict.config import PredictCheckpoint, PredictConfig
from worldloom_model_zoo.predict.inputs import read_actions

if TYPE_CHECKING:
    from PIL import Image

Mode = Literal["forward_dynamics", "inverse_dynamics", "policy"]


@dataclass(frozen=True)
class Cosmos3Checkpoint:
    """``config.toml`` of a Cosmos 3 checkpoint folder: where the published pipeline is and how it is asked."""

    source: str
    """Folder of the published pipeline, with ``model_index.json``; relative to this file."""
    family: str = "cosmos3"
    """The catalog's name of the family."""
    height: int = 720
    """Pixels of what is made without actions."""
    width: int = 1280
    """Pixels of what is made without actions."""
    frames: int = 189
    """Frames of what is made without actions, 1 + 4k."""
    fps: float = 24.0
    """Frames per second."""
    steps: int = 35
    """Sampler steps."""
    guidance_scale: float = 6.0
    """Guidance g in uncond + g (cond - uncond); 1 is none."""
    domain: str = "droid_lerobot"
    """Embodiment whose actions are given and predicted."""
    view_point: Literal["ego_view", "third_person_view", "wrist_view", "concat_view"] = "ego_view"
    """What the camera of an embodiment shows."""
    resolution_tier: Literal[256, 480, 704, 720] = 480
    """Size class at which frames with actions are shown to the model; frames are not enlarged."""
    guard: bool = True
    """Run NVIDIA's own guardrail inside the pipeline; it needs the package cosmos_guardrail."""


def load(
    path: Path, device: str = "cpu", sha256: str = "", tokenizer: str | Path | None = None, name: str = ""
) -> Cosmos3Pipeline:
    """A pipeline from a checkpoint folder that `import_folder` made; see `worldloom_model_zoo.load_model`.

    Raises:
        WorldloomError: diffusers or the guardrail is not installed, the published folder is gone or holds pickles, or a
            tokenizer was given.

    The model's digest is that of the lock file that pins the published files; without one, of ``model_index.json``.
    """
    if tokenizer is not None:
        raise WorldloomError("Cosmos 3 brings its own tokenizer", got=tokenizer, do="leave it out")
    checkpoint = configs.load(Cosmos3Checkpoint, path / "config.toml")
    source = path / checkpoint.source
    _check_source(source)
    try:
        from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import Cosmos3OmniPipeline
    except ImportError as error:
        raise missing_extra("diffusers", "cosmos3") from error
    try:
        pipeline = Cosmos3OmniPipeline.from_pretrained(
            str(source),
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32 if device == "cpu" else torch.bfloat16,
            enable_safety_checker=checkpoint.guard,
        )
    except ImportError as error:
        raise WorldloomError(
            f"the pipeline needs a package that is not installed: {str(error).partition('. ')[0]}",
            got=path,
            do="install it; guard = false in config.toml goes without NVIDIA's guardrail, and the sidecar says so",
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise WorldloomError(f"the pipeline cannot be read: {error}", got=source, do="pull it again") from error
    pinned = next(file for file in (source / LOCK, source / "model_index.json") if file.is_file())
    ref = CheckpointRef(name or path.name, str(path), sha256 or file_digest(pinned), "cosmos3")
    return Cosmos3Pipeline(pipeline.to(device), checkpoint, ref)


def import_folder(
    path: str | Path,
    out: str | Path,
    variant: str = "",
    tokenizer: str | Path = "",
    text_encoder: str | Path = "",
    action_dim: int = 0,
) -> str:
    """Make a checkpoint folder that stands for a published pipeline folder; its weights stay where they are.

    Args:
        variant: embodiment of its actions, `Cosmos3Checkpoint.domain`; "" for the default.

    Returns:
        What was made, for a person.

    Raises:
        WorldloomError: not such a folder, pickles in it, or settings that Cosmos 3 does not have.
    """
    if tokenizer or text_encoder or action_dim:
        raise WorldloomError(
            "Cosmos 3 brings its own tokenizer and text encoder, and its actions are set by the embodiment",
            got=f"tokenizer {str(tokenizer)!r}, text encoder {str(text_encoder)!r}, action_dim {action_dim}",
            do="name the embodiment with --variant",
        )
    source = Path(path).absolute()
    _check_source(source)
    checkpoint = Cosmos3Checkpoint(str(source))
    checkpoint = replace(checkpoint, domain=variant) if variant else checkpoint
    with atomic_dir(Path(out)) as folder:
        configs.save(checkpoint, folder / "config.toml")
        (folder / "README.md").write_text(
            f"# Cosmos 3\n\nStands for `{source}`, which it needs. Its authors' card and licence apply.\n",
            encoding="utf-8",
        )
    return f"Cosmos 3, actions of {checkpoint.domain}: {out} (its weights stay in {source})"


class Cosmos3Pipeline:
    """A Cosmos 3 pipeline. Implements `Generates`, `InfersActions` and `Acts`; the last two raise where the checkpoint
    was not trained with actions.

    Args:
        pipeline: diffusers' Cosmos3OmniPipeline.
        config: sizes, sampling and embodiment.
    """

    def __init__(self, pipeline: Any, config: Cosmos3Checkpoint, ref: CheckpointRef | None = None) -> None:
        self.pipeline, self.config, self.ref = pipeline, config, ref

    @property
    def action_dim(self) -> int:
        """Size of the embodiment's action; 0 for a model without actions.

        Raises:
            WorldloomError: an embodiment that Cosmos 3 does not know.
        """
        from diffusers.pipelines.cosmos import pipeline_cosmos3_omni as omni

        if not self.pipeline.transformer.config.action_gen:
            return 0
        widths = omni._EMBODIMENT_TO_RAW_ACTION_DIM
        if self.config.domain not in widths:
            raise WorldloomError(
                "Cosmos 3 has no actions of that embodiment", got=self.config.domain, do=f"use {', '.join(widths)}"
            )
        return int(widths[self.config.domain])

    # -- Generates ------------------------------------------------------------------------------------------------

    def complete(self, request: GenerationRequest) -> GenerationRequest:
        """The request with every unset field filled in; raises what `generate` would."""
        return self._read(request)[0]

    def generate(self, request: GenerationRequest, progress: Callable[[int, int], None] | None = None) -> Tensor:
        """The video a request describes: ``(1, 3, T, H, W)`` in [-1, 1].

        Given frames go through the tokenizer and come back as it decodes them. With actions the frames have the size of
        the start, cut to whole latents.

        Raises:
            WorldloomError: nothing to start from, sizes that do not fit, a field that Cosmos 3 does not heed.
        """
        request, start, actions = self._read(request)
        if actions is not None:
            assert start is not None
            action = self._condition("forward_dynamics", len(actions), start[-1:], actions)
            return self._run(request, progress, action=action)[0]
        given: dict[str, Any] = {"num_frames": request.frames, "height": request.height, "width": request.width}
        if request.image:
            assert start is not None
            given["image"] = _pictures(start)[0]
        elif request.video:
            assert start is not None
            kept = 5 if len(start) >= 5 else 1
            given |= {"video": _pictures(start[-kept:]), "condition_frame_indexes_vision": (0, 1)[: 1 + kept // 5]}
        return self._run(request, progress, **given)[0]

    def provenance(self) -> dict[str, Any]:
        """What decides a sample besides its request."""
        guard = getattr(self.pipeline, "safety_checker", None)
        return {
            "model": asdict(self.ref) if self.ref is not None else None,
            "checkpoint": asdict(self.config),
            "scheduler": json.loads(json.dumps(dict(self.pipeline.scheduler.config), default=str)),
            "guard": type(guard).__name__ if guard is not None else "none inside the pipeline",
        }

    # -- InfersActions and Acts -----------------------------------------------------------------------------------

    def infer_actions(self, video: Tensor, *, seed: int = 0) -> Tensor:
        """``(b, 3, T, H, W)`` in [-1, 1], T = 1 + 4k -> actions ``(b, T-1, a)``.

        Raises:
            WorldloomError: another length, or a model without actions.
        """
        found = []
        for row, frames in enumerate(video):
            action = self._condition("inverse_dynamics", frames.shape[1] - 1, media.to_frames(frames[None])[0])
            request = replace(self._request(), seed=seed + row)
            found.append(self._run(request, None, action=action)[1])
        return torch.stack(found)

    def act(self, start: Tensor, prompt: str, horizon: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
        """``(b, 3, T, H, W)`` -> actions ``(b, horizon, a)`` and the whole video ``(b, 3, T + horizon, H, W)``.

        The last frame of the start is what the policy sees.

        Raises:
            WorldloomError: a horizon that is no multiple of 4, frames that are not whole latents at the resolution
                tier, or a model without actions.
        """
        actions, videos = [], []
        for row, frames in enumerate(start):
            action = self._condition("policy", horizon, media.to_frames(frames[None, :, -1:])[0])
            request = replace(self._request(prompt), seed=seed + row)
            made, taken = self._run(request, None, action=action)
            if made.shape[-2:] != frames.shape[-2:]:
                raise WorldloomError(
                    "the policy's frames have another size than its start",
                    got=f"{tuple(made.shape[-2:])}, start {tuple(frames.shape[-2:])}",
                    do=f"give frames of multiples of {self._ratio} pixels that fit resolution_tier "
                    f"{self.config.resolution_tier}",
                )
            actions.append(taken)
            videos.append(torch.cat([frames, made[0, :, 1:].to(frames)], dim=1))
        return torch.stack(actions), torch.stack(videos)

    # -- one call -------------------------------------------------------------------------------------------------

    @property
    def _ratio(self) -> int:
        return int(self.pipeline.vae_scale_factor_spatial)

    def _request(self, prompt: str = "") -> GenerationRequest:
        config = self.config
        return GenerationRequest(
            self.ref.name if self.ref is not None else "cosmos3",
            prompt,
            steps=config.steps,
            guidance_scale=config.guidance_scale,
            fps=config.fps,
        )

    def _condition(self, mode: Mode, chunk: int, frames: np.ndarray, actions: Tensor | None = None) -> Any:
        """diffusers' CosmosActionCondition for ``chunk`` actions; ``frames`` uint8 ``(t, h, w, 3)``."""
        from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import CosmosActionCondition

        if not self.action_dim:
            raise WorldloomError("this checkpoint was not trained with actions", do="use one that was")
        ratio = int(self.pipeline.vae_scale_factor_temporal)
        if chunk < 1 or chunk % ratio:
            raise WorldloomError(f"Cosmos 3 takes a multiple of {ratio} actions at once", got=chunk)
        pictures = _pictures(frames)
        return CosmosActionCondition(
            mode=mode,
            chunk_size=chunk,
            domain_name=self.config.domain,
            resolution_tier=self.config.resolution_tier,
            raw_actions=actions,
            image=None if mode == "inverse_dynamics" else pictures[0],
            video=pictures if mode == "inverse_dynamics" else None,
            view_point=self.config.view_point,
        )

    def _run(
        self, request: GenerationRequest, progress: Callable[[int, int], None] | None, **given: Any
    ) -> tuple[Tensor, Tensor | None]:
        """One call of the pipeline: the video ``(1, 3, T, H, W)`` in [-1, 1], and the actions ``(n, a)`` it predicts.

        Raises:
            WorldloomError: NVIDIA's guardrail refused the prompt or the video.
        """

        def after(_pipeline: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if progress is not None:
                progress(step + 1, request.steps or 0)
            return tensors

        self.pipeline.set_progress_bar_config(disable=True)
        try:
            made = self.pipeline(
                request.prompt,
                negative_prompt=request.negative_prompt or None,
                fps=request.fps,
                num_inference_steps=request.steps,
                guidance_scale=request.guidance_scale,
                generator=torch.Generator().manual_seed(request.seed),
                output_type="pt",
                callback_on_step_end=after,
                **given,
            )
        except ValueError as error:
            if "Guardrail" not in str(error):
                raise
            raise WorldloomError(
                "NVIDIA's guardrail refused the prompt or the video", got=request.prompt, do="ask for something else"
            ) from error
        video = made.video.float().permute(1, 0, 2, 3)[None] * 2 - 1  # (t, c, h, w) in [0, 1] -> (1, c, t, h, w)
        return video, made.action[0].float() if made.action else None

    def _read(self, request: GenerationRequest) -> tuple[GenerationRequest, np.ndarray | None, Tensor | None]:
        """The completed request, the given frames uint8 ``(t, h, w, 3)`` and the actions ``(n, a)``."""
        config = self.config
        if request.shift is not None:
            raise WorldloomError("Cosmos 3 takes its shift from the scheduler of the checkpoint", got=request.shift)
        if request.views:
            raise WorldloomError(
                "Cosmos 3 makes one camera's video here", got=request.views, do="give --image or --video"
            )
        if request.image and request.video:
            raise WorldloomError("a start is an image or a video, one of them", got=[request.image, request.video])
        if not (request.prompt or request.image or request.video):
            raise WorldloomError("nothing to start from", do="give --prompt, --image or --video")
        completed = replace(
            request,
            steps=config.steps if request.steps is None else request.steps,
            guidance_scale=config.guidance_scale if request.guidance_scale is None else request.guidance_scale,
            fps=config.fps if request.fps is None else request.fps,
        )
        start = _start(request)
        if request.actions:
            return self._read_actions(completed, start)
        frames = config.frames if request.frames is None else request.frames
        height = config.height if request.height is None else request.height
        width = config.width if request.width is None else request.width
        if height % self._ratio or width % self._ratio:
            raise WorldloomError(f"height and width are multiples of {self._ratio}", got=f"{width}x{height}")
        given = 0 if start is None else 5 if request.video and len(start) >= 5 else 1
        if (frames - 1) % int(self.pipeline.vae_scale_factor_temporal) or frames <= given:
            raise WorldloomError(f"the number of frames must be 1 + 4k and exceed the {given} given", got=frames)
        return replace(completed, frames=frames, height=height, width=width), start, None

    def _read_actions(
        self, request: GenerationRequest, start: np.ndarray | None
    ) -> tuple[GenerationRequest, np.ndarray, Tensor]:
        assert request.actions is not None
        if start is None:
            raise WorldloomError("actions need a frame to start from", do="give --image or --video")
        if request.height is not None or request.width is not None:
            raise WorldloomError(
                "with actions the frames have the size of the start", got=f"{request.width}x{request.height}"
            )
        network = PredictConfig(action_dim=self.action_dim)
        actions = read_actions(Path(request.actions), PredictCheckpoint(model=network))[0]
        if request.frames not in (None, len(actions) + 1):
            raise WorldloomError(f"{request.frames} frames need {request.frames - 1} actions", got=len(actions))
        self._condition("forward_dynamics", len(actions), start[-1:], actions)
        return replace(request, frames=len(actions) + 1), start, actions


def _start(request: GenerationRequest) -> np.ndarray | None:
    """The frames that a request gives, uint8 ``(t, h, w, 3)`` in their own size."""
    if request.image:
        return media.read_image(request.image)[None]
    if request.video:
        last: list[np.ndarray] = []
        for frame in media.iter_frames(request.video):
            last.append(frame)
            del last[:-5]
        return np.stack(last)
    return None


def _pictures(frames: np.ndarray) -> list[Image.Image]:
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_extra("pillow", "curation") from error
    return [Image.fromarray(frame) for frame in frames]


def _check_source(source: Path) -> None:
    """Refuse what is not a published pipeline of safetensors."""
    index = source / "model_index.json"
    if not index.is_file():
        raise WorldloomError(
            "this is not a published pipeline",
            got=source,
            do="give a folder with model_index.json: worldloom models pull",
        )
    try:
        name = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise WorldloomError("model_index.json cannot be read", got=index, do="pull it again") from error
    if name != "Cosmos3OmniPipeline":
        raise WorldloomError("this is another pipeline than Cosmos 3's", got=f"{index}: {name}")
    for folder in (source, *(child for child in source.iterdir() if child.is_dir())):
        if any(folder.glob("*.safetensors")):
            continue
        if pickles := find_pickles(folder):
            raise pickle_refused(pickles[0], pickles[0].with_suffix(".safetensors"))
