"""Batch files: what to generate, one sample an entry, in the field names of Cosmos 3 (cosmos-framework, June 2026).

A ``.json``, ``.yaml`` or ``.toml`` file holds one sample, a list of samples, or an object with

    samples       the list
    defaults      fields that every sample has unless it sets them
    guardrails    a `GuardrailConfig`

A ``.jsonl`` file holds a sample a line; a line ``{"defaults": {...}}`` holds for the lines after it. Paths are relative
to the file that names them. A field that does not exist is an error that names the nearest one.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import pydantic

from worldloom import config as configs
from worldloom.errors import WorldloomError
from worldloom.guardrails import GuardrailConfig
from worldloom.schema import GenerationRequest

ModelMode = Literal["text2video", "image2video", "video2video", "forward_dynamics", "inverse_dynamics", "policy"]
AspectRatio = Literal["1,1", "4,3", "3,4", "16,9", "9,16"]

SIZES: Mapping[str, Mapping[str, tuple[int, int]]] = {
    "256": {"1,1": (256, 256), "4,3": (320, 256), "16,9": (320, 192)},
    "480": {"1,1": (640, 640), "4,3": (736, 544), "16,9": (832, 480)},
    "720": {"1,1": (960, 960), "4,3": (1104, 832), "16,9": (1280, 720)},
    "768": {"1,1": (1024, 1024), "4,3": (1184, 880), "16,9": (1360, 768)},
}
"""Cosmos 3's (width, height) of a resolution and an aspect ratio, in pixels; upright ones are these turned."""

IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
"""Suffixes of a ``vision_path`` that is an image; any other is a video."""

_HORIZON = 16  # actions of a policy where nothing says how many; Cosmos 3's
_OTHER_MODES = frozenset({"text2image", "image2image", "audio_image2video", "reasoner"})
_OTHER = """
model extra num_outputs output_dir tensors_file pickle_file guidance_interval normalize_cfg sigma_max
duration_template resolution_template negative_metadata_mode inverse_duration_template
inverse_resolution_template negative_prompt_keep_metadata condition_frame_indexes_vision video_save_quality
image_save_quality enable_sound sound_path domain_name image_size view_point max_new_tokens do_sample temperature
top_k top_p repetition_penalty presence_penalty control_guidance control_guidance_interval edge blur depth seg wsm
negative_prompt_file num_video_frames_per_chunk num_conditional_frames max_frames show_control_condition
show_input num_first_chunk_conditional_frames share_vision_temporal_positions emphasize_control_in_prompt
"""
_OTHER_FIELDS = frozenset(_OTHER.split())  # of Cosmos 3, without a counterpart here


class SampleSpec(pydantic.BaseModel):
    """One sample of a batch file. What is left out takes the model's own value."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    name: str = pydantic.Field(description="Folder of the sample.", max_length=200)
    model_mode: ModelMode | None = pydantic.Field(None, description="What to do; found out from the fields if unset.")
    prompt: str = pydantic.Field("", max_length=10_000, description="Text: the scene, or a policy's instruction.")
    negative_prompt: str = pydantic.Field("", max_length=10_000, description="Text to keep away from.")
    vision_path: Path | None = pydantic.Field(None, description="Image or video to start from, or to look at.")
    action_path: Path | None = pydantic.Field(None, description="Actions: .npy, .json or .csv, a row between frames.")
    resolution: str | None = pydantic.Field(None, description="256, 480, 720 or 768, or WIDTHxHEIGHT in pixels.")
    aspect_ratio: AspectRatio | None = pydantic.Field(None, description="Of a resolution that is one number: W,H.")
    num_frames: Annotated[int, pydantic.Field(ge=1)] | None = pydantic.Field(None, description="Start included.")
    fps: Annotated[float, pydantic.Field(gt=0, le=1000)] | None = pydantic.Field(None, description="Frames a second.")
    seed: int = pydantic.Field(0, ge=0, lt=2**63 - 2**20, description="Equal seeds give equal bits on one device.")
    guidance: Annotated[float, pydantic.Field(ge=0, le=100)] | None = pydantic.Field(
        None, description="g in uncond + g (cond - uncond); 1 switches it off."
    )
    shift: Annotated[float, pydantic.Field(gt=0)] | None = pydantic.Field(None, description="Timestep shift.")
    num_steps: Annotated[int, pydantic.Field(ge=1)] | None = pydantic.Field(None, description="Sampler steps.")
    condition_video_keep: Literal["last"] = pydantic.Field("last", description="Which end of a video is continued.")
    action_chunk_size: Annotated[int, pydantic.Field(ge=1)] | None = pydantic.Field(
        None, description="Actions that a policy chooses; 16 if unset."
    )
    raw_action_dim: Annotated[int, pydantic.Field(ge=1)] | None = pydantic.Field(
        None, description="Size of an action; must be the model's."
    )

    @property
    def mode(self) -> ModelMode:
        """`model_mode`, or what the fields ask for: actions mean forward dynamics, else the kind of ``vision_path``."""
        if self.model_mode is not None:
            return self.model_mode
        if self.action_path is not None:
            return "forward_dynamics"
        if self.vision_path is None:
            return "text2video"
        return "image2video" if self.is_image else "video2video"

    @property
    def is_image(self) -> bool:
        """Whether ``vision_path`` names an image."""
        return self.vision_path is not None and self.vision_path.suffix.lower() in IMAGES

    @property
    def horizon(self) -> int | None:
        """Actions to choose, for a policy; None for every other mode."""
        return (self.action_chunk_size or _HORIZON) if self.mode == "policy" else None

    def request(self, model: str) -> GenerationRequest:
        """What is asked of a model.

        Raises:
            WorldloomError: a mode without what it needs, or with what it has no use for.
        """
        _check_mode(self)
        height, width = _size(self)
        vision = None if self.vision_path is None else str(self.vision_path)
        return GenerationRequest(
            model,
            prompt=self.prompt,
            image=vision if self.is_image else None,
            video=None if self.is_image else vision,
            actions=None if self.action_path is None else str(self.action_path),
            frames=self.num_frames,
            seed=self.seed,
            steps=self.num_steps,
            guidance_scale=self.guidance,
            fps=self.fps,
            negative_prompt=self.negative_prompt,
            shift=self.shift,
            height=height,
            width=width,
        )

    def effective(self, request: GenerationRequest) -> dict[str, Any]:
        """The sample with every value that a model completed, JSON-ready; as a batch file it gives the same bits."""
        size = {} if request.height is None else {"resolution": f"{request.width}x{request.height}"}
        horizon = {} if self.horizon is None else {"action_chunk_size": self.horizon}
        filled = {
            "name": self.name,
            "model_mode": self.mode,
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "vision_path": None if self.vision_path is None else str(self.vision_path),
            "action_path": None if self.action_path is None else str(self.action_path),
            **size,
            "num_frames": request.frames,
            "fps": request.fps,
            "seed": request.seed,
            "guidance": request.guidance_scale,
            "shift": request.shift,
            "num_steps": request.steps,
            **horizon,
            "raw_action_dim": self.raw_action_dim,
        }
        return {key: value for key, value in filled.items() if value not in (None, "")}


@dataclass(frozen=True)
class Batch:
    """A batch file, read and checked."""

    samples: tuple[SampleSpec, ...]
    """In the order of the file; no two have one name."""
    guardrails: Mapping[str, Any] | None = None
    """The file's own section, as `guardrail_config` reads it; None where it has none."""


def read_batch(path: str | Path) -> Batch:
    """Read a batch file.

    Raises:
        WorldloomError: no such file, a format it is not, an unknown field, a value that does not fit, two samples of
            one name. Files that a sample names are not looked at here.
    """
    path = Path(path)
    entries, guardrails = _entries(path)
    if not entries:
        raise WorldloomError("the batch file holds no sample", got=path)
    samples: list[SampleSpec] = []
    for number, (place, entry) in enumerate(entries):
        unnamed = path.stem if len(entries) == 1 and path.suffix.lower() != ".jsonl" else f"{path.stem}_{number}"
        samples.append(_sample(entry, place, unnamed, path.absolute().parent))
    names: dict[str, str] = {}
    for sample, (place, _) in zip(samples, entries, strict=True):
        if sample.name.lower() in names:
            raise WorldloomError(
                "two samples have the same name, which is their folder's",
                got=f"{sample.name} in {names[sample.name.lower()]} and {place}",
                do="name one of them otherwise",
            )
        names[sample.name.lower()] = place
    return Batch(tuple(samples), guardrails)


def guardrail_config(section: Mapping[str, Any] | None, base: Path, **flags: Any) -> GuardrailConfig:
    """The guardrails of a batch file's section, with what the command line says over it.

    Args:
        base: folder that the section's paths are relative to.
        flags: fields of `GuardrailConfig`; None where the command line does not say.
    """
    values = dict(section or {})
    if isinstance(values.get("mode"), bool):  # YAML 1.1 reads on and off as true and false
        values["mode"] = "on" if values["mode"] else "off"
    if isinstance(values.get("blocklist"), str):
        values["blocklist"] = str(base / values["blocklist"])
    values |= {key: value for key, value in flags.items() if value is not None}
    return configs.load(GuardrailConfig, base=values)


# -- reading ---------------------------------------------------------------------------------------------------------

Entry = tuple[str, dict[str, Any]]  # where it stands, and its fields


def _entries(path: Path) -> tuple[list[Entry], dict[str, Any] | None]:
    """The samples of a file with its defaults filled in, and its guardrails section."""
    if path.suffix.lower() == ".jsonl":
        return _lines(path), None
    whole = _parse(path)
    if isinstance(whole, list):
        return [(f"sample {i} of {path}", _object(entry, path)) for i, entry in enumerate(whole)], None
    whole = _object(whole, path)
    guardrails = whole.pop("guardrails", None)
    if guardrails is not None:
        guardrails = _object(guardrails, path, "guardrails")
    if "samples" not in whole:
        return [(str(path), _with_defaults(whole, whole.pop("defaults", {}), path))], guardrails
    defaults, samples = whole.pop("defaults", {}), whole.pop("samples")
    if whole:
        raise WorldloomError(
            f"unknown section {next(iter(whole))!r} in {path}", do="beside samples there are defaults and guardrails"
        )
    if not isinstance(samples, list):
        raise WorldloomError("samples is a list", got=type(samples).__name__, do="write [ {...}, {...} ]")
    return [
        (f"sample {i} of {path}", _with_defaults(_object(entry, path), defaults, path))
        for i, entry in enumerate(samples)
    ], guardrails


def _lines(path: Path) -> list[Entry]:
    entries: list[Entry] = []
    defaults: Any = {}
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        place = f"line {number} of {path}"
        try:
            entry = _object(json.loads(line), path, place)
        except ValueError as error:
            raise WorldloomError(f"{place} is not JSON: {error}", do="write one object a line") from error
        if set(entry) == {"defaults"}:
            defaults = entry["defaults"]
        else:
            entries.append((place, _with_defaults(entry, defaults, path)))
    return entries


def _with_defaults(entry: dict[str, Any], defaults: Any, path: Path) -> dict[str, Any]:
    """A sample over its own defaults file, over the file's defaults section."""
    merged = dict(_object(defaults, path, "defaults"))
    for layer in (merged, entry):
        file = layer.pop("defaults_file", None)
        if file is not None:
            source = path.parent / str(file)
            loaded = _object(_parse(source), source)
            # Paths in that file are relative to it.
            for key in ("vision_path", "action_path", "prompt_path"):
                if isinstance(loaded.get(key), str):
                    loaded[key] = str(source.absolute().parent / loaded[key])
            merged = {**merged, **loaded} if layer is entry else {**loaded, **merged}
    return {**merged, **entry}


def _parse(path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix == ".toml":
        return configs.read_toml(path)
    text = _text(path)
    if suffix == ".json":
        try:
            return json.loads(text)
        except ValueError as error:
            raise WorldloomError(f"the batch file is not JSON: {error}", got=path, do="mend that line") from error
    if suffix in (".yaml", ".yml"):
        import yaml

        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise WorldloomError(f"the batch file is not YAML: {error}", got=path, do="mend that line") from error
    raise WorldloomError("a batch file is .json, .jsonl, .yaml or .toml", got=path)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise WorldloomError("there is no such batch file", got=path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise WorldloomError(f"the batch file cannot be read: {error}", got=path) from error


def _object(value: Any, path: Path, what: str = "a sample") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise WorldloomError(f"{what} is an object with named fields", got=f"{type(value).__name__} in {path}")
    return {str(key): item for key, item in value.items()}


def _sample(entry: dict[str, Any], place: str, unnamed: str, base: Path) -> SampleSpec:
    """Check the fields of one sample; paths become absolute."""
    fields = {key: value for key, value in entry.items() if value is not None}  # null is the same as left out
    known = [*SampleSpec.model_fields, "prompt_path", "defaults_file"]
    for key in [key for key in fields if key not in known]:
        if key in _OTHER_FIELDS and fields[key] in (False, "", [], {}):
            del fields[key]  # Cosmos writes every field out, the unused ones too
            continue
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known fields: {', '.join(known)}"
        if key in _OTHER_FIELDS:
            raise WorldloomError(f"Cosmos 3's field {key!r} is not offered here", got=place, do="leave it out")
        raise WorldloomError(f"unknown field {key!r} in {place}", got=key, do=hint)
    if fields.get("model_mode") in _OTHER_MODES:
        modes = ", ".join(get_args(ModelMode))
        raise WorldloomError(
            "this mode is not offered here", got=f"{fields['model_mode']} in {place}", do=f"use {modes}"
        )
    prompt_path = fields.pop("prompt_path", None)
    if prompt_path is not None and "prompt" not in fields:
        fields["prompt"] = _text(base / str(prompt_path)).strip()
    if isinstance(fields.get("resolution"), int) and not isinstance(fields["resolution"], bool):
        fields["resolution"] = str(fields["resolution"])
    for key in ("vision_path", "action_path"):
        if isinstance(fields.get(key), str):
            if "://" in fields[key]:
                raise WorldloomError(f"{key} is a file of this machine", got=f"{fields[key]} in {place}", do="fetch it")
            fields[key] = base / Path(fields[key]).expanduser()
    try:
        sample = SampleSpec.model_validate({"name": unnamed} | fields)
    except pydantic.ValidationError as error:
        problem = error.errors()[0]
        where = str(problem["loc"][0]) if problem["loc"] else "the sample"
        message = problem["msg"][:1].lower() + problem["msg"][1:]
        raise WorldloomError(f"{where} in {place}: {message}", got=repr(problem.get("input"))) from error
    if not re.fullmatch(r"[^\W_][\w .+=@-]*", sample.name) or sample.name != sample.name.rstrip(" ."):
        raise WorldloomError(
            "a sample's name is a folder's: letters, digits and . _ - inside", got=f"{sample.name!r} in {place}"
        )
    _size(sample)
    return sample


# -- meaning ---------------------------------------------------------------------------------------------------------


def _size(spec: SampleSpec) -> tuple[int | None, int | None]:
    """Height and width of a sample, None where the model's own is meant."""
    if spec.resolution is None:
        if spec.aspect_ratio is not None:
            raise WorldloomError("an aspect ratio needs a resolution", got=f"{spec.aspect_ratio} of {spec.name}")
        return None, None
    if found := re.fullmatch(r"(\d+)x(\d+)", spec.resolution):
        if spec.aspect_ratio is not None:
            raise WorldloomError("WIDTHxHEIGHT has its aspect ratio already", got=spec.aspect_ratio, do="leave it out")
        return int(found[2]), int(found[1])
    if spec.resolution not in SIZES:
        raise WorldloomError(
            "there is no such resolution",
            got=f"{spec.resolution} of {spec.name}",
            do=f"use {', '.join(SIZES)} with an aspect_ratio, or WIDTHxHEIGHT in pixels",
        )
    sizes = SIZES[spec.resolution]
    ratio = spec.aspect_ratio or "16,9"  # Cosmos 3's default
    width, height = sizes[ratio] if ratio in sizes else sizes[ratio.partition(",")[2] + "," + ratio.partition(",")[0]]
    return (height, width) if ratio in sizes else (width, height)


_NEEDS: Mapping[str, tuple[str, ...]] = {
    # mode: what it cannot do without ("vision" is either kind)
    "text2video": ("prompt",),
    "image2video": ("image",),
    "video2video": ("video",),
    "forward_dynamics": ("vision", "actions"),
    "inverse_dynamics": ("video",),
    "policy": ("vision",),
}


def _check_mode(spec: SampleSpec) -> None:
    """Refuse a sample that lacks what its mode needs, or has what its mode has no use for."""
    needs = _NEEDS[spec.mode]
    given = {
        "prompt": bool(spec.prompt),
        "image": spec.is_image,
        "video": spec.vision_path is not None and not spec.is_image,
        "vision": spec.vision_path is not None,
        "actions": spec.action_path is not None,
    }
    fields = {
        "prompt": "a prompt",
        "image": "vision_path to an image",
        "video": "vision_path to a video",
        "vision": "vision_path to an image or a video",
        "actions": "action_path",
    }
    for need in needs:
        if not given[need]:
            shown = spec.vision_path if need in ("image", "video") else None
            raise WorldloomError(f"{spec.mode} needs {fields[need]}", got=shown or f"none in {spec.name}")
    if given["actions"] and "actions" not in needs:
        raise WorldloomError(
            f"{spec.mode} takes no actions",
            got=spec.action_path,
            do="use model_mode forward_dynamics, or leave them out",
        )
    if given["vision"] and not {"image", "video", "vision"} & set(needs):
        raise WorldloomError(
            f"{spec.mode} takes no image or video", got=spec.vision_path, do="use image2video or video2video"
        )
    for path in (spec.vision_path, spec.action_path):
        if path is not None and not path.is_file():
            raise WorldloomError("there is no such file", got=path, do="paths are relative to the batch file")


def fields() -> list[tuple[str, str]]:
    """Name and meaning of every field of a sample, for the documentation."""
    return [(name, str(info.description)) for name, info in SampleSpec.model_fields.items()]
