"""How each released Cosmos checkpoint is meant to be sampled: one row each, no torch import.

`worldloom_model_zoo.predict.released` takes the network from a row and writes its sampler into ``config.toml``.

Sources: NVIDIA's cosmos-predict2 and cosmos-predict2.5 repositories (configurations, checkpoint lists and inference
scripts) and, for Cosmos 1, diffusers' pipelines. Where the authors' sampler is none of ours, the row's ``note`` says
what stands in for it. Guidance of the 2.5 base models is that of their release and of diffusers, 7; later scripts of
NVIDIA's take 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from worldloom.errors import WorldloomError
from worldloom_model_zoo.predict import config as presets
from worldloom_model_zoo.predict.config import PredictConfig, SamplerConfig

NEGATIVE_PROMPT = (
    "The video captures a series of frames showing ugly scenes, static with no motion, motion blur, over-saturation, "
    "shaky footage, low resolution, grainy texture, pixelated images, poorly lit areas, underexposed and overexposed "
    "scenes, poor color balance, washed out colors, choppy sequences, jerky movements, low frame rate, artifacting, "
    "color banding, unnatural transitions, outdated special effects, fake elements, unconvincing visuals, poorly "
    "edited content, jump cuts, visual noise, and flickering. Overall, the video is of poor quality."
)
"""What Cosmos-Predict2 and 2.5 are told not to make: part of their released settings, word for word."""

SIZES: dict[str, tuple[tuple[int, int], ...]] = {
    "1024": ((1360, 768), (768, 1360), (1168, 880), (880, 1168), (1024, 1024)),
    "720": ((1280, 704), (704, 1280), (960, 704), (704, 960), (960, 960)),
    "720p": ((1280, 720), (720, 1280), (960, 720), (720, 960), (960, 960)),
    "480": ((768, 432), (432, 768), (640, 480), (480, 640), (480, 480)),
    "bridge-480": ((640, 480),),
    "bridge-256": ((320, 256),),
}
"""Name of a resolution -> the (width, height) it was trained at; the first one is the default."""


@dataclass(frozen=True)
class Recipe:
    """A released checkpoint: its network, where it is, and how it is sampled."""

    name: str
    """What ``--variant`` takes."""
    network: Callable[[], PredictConfig]
    """Preset of the network."""
    repository: str
    """On the Hugging Face Hub: organisation/name."""
    file: str = ""
    """The pickled checkpoint in the repository, in the native layout; empty where there is none."""
    revision: str = ""
    """Revision of the repository that holds safetensors in the diffusers layout, where it is not ``main``."""
    sampler: SamplerConfig | None = field(default_factory=SamplerConfig)
    """The sampler, guidance and negative prompt; None where its sampler is not one of ours."""
    sizes: str = "720"
    """Key of `SIZES`."""
    frames: int = 93
    """Video frames at a time, given ones included; of each view."""
    fps: float = 16.0
    """Frames per second."""
    given: tuple[int, ...] = (0, 1, 5)
    """Numbers of given video frames that it was trained with: none is text to video, 1 is an image."""
    condition_level: float | None = 0.0
    """Noise level that the network is told for given frames; None is that of the others."""
    tokenizer: str = "wan2.1"
    """Which published tokenizer made its latents (``worldloom tokenize import --variant``)."""
    text_encoder: str = "t5-11b"
    """What encodes its text."""
    text_tokens: int = 512
    """Length to which texts are cut or filled up."""
    note: str = ""
    """What differs from its authors' sampling."""

    @property
    def size(self) -> tuple[int, int]:
        """Default (width, height) in pixels."""
        return SIZES[self.sizes][0]


# Predict2: sigma from 80 to 0.002 after Karras, s = sigma / (1 + sigma); x0 = cond + g (cond - uncond). Its authors' 35
# steps of Adams-Bashforth (diffusers: Euler) end with one more call, which cleans what is left of the noise.
_PREDICT2 = SamplerConfig(
    steps=36,
    method="ab2",
    schedule="karras",
    sigma_min=0.002,
    sigma_max=80.0,
    guidance_scale=7.0,
    guidance_convention="conditional",
    negative_prompt=NEGATIVE_PROMPT,
    condition_level=0.0001,
)
# Predict2.5: UniPC of order 2, levels from 0.999 shifted by 5; v = cond + g (cond - uncond), levels cut to thousandths.
_PREDICT25 = SamplerConfig(
    steps=35,
    method="unipc",
    shift=5.0,
    first_level=0.999,
    guidance_scale=7.0,
    guidance_convention="conditional",
    negative_prompt=NEGATIVE_PROMPT,
    condition_level=None,
    round_levels=True,
)
# Cosmos 1: EDM, sigma from 80 to 0.002, sigma_data 0.5.
_COSMOS1 = SamplerConfig(
    steps=36,
    method="edm_euler",
    schedule="karras",
    sigma_min=0.002,
    sigma_max=80.0,
    sigma_data=0.5,
    guidance_scale=7.0,
    guidance_convention="conditional",
)


def _cosmos1() -> list[Recipe]:
    rows = []
    for size, preset in (("7b", presets.cosmos1_7b), ("14b", presets.cosmos1_14b)):
        for mode, video in (("Text2World", False), ("Video2World", True)):
            rows.append(
                Recipe(
                    f"cosmos1-{size}-{mode.lower()}",
                    lambda preset=preset, video=video: preset(condition_mask=video),
                    f"nvidia/Cosmos-1.0-Diffusion-{size.upper()}-{mode}",
                    sampler=_COSMOS1,
                    frames=121,
                    fps=30.0,
                    given=(1, 9) if video else (0,),
                    tokenizer="cosmos-cv8x8x8",
                    note="given frames carry noise of sigma 0.001 in their authors' sampling, none in ours"
                    if video
                    else "",
                )
            )
    return rows


def _predict2() -> list[Recipe]:
    rows = []
    for size, preset in (
        ("0.6b", presets.cosmos_predict2_text2image_0_6b),
        ("2b", presets.cosmos_predict2_text2image_2b),
        ("14b", presets.cosmos_predict2_text2image_14b),
    ):
        rows.append(
            Recipe(
                f"cosmos-predict2-{size}-text2image",
                preset,
                f"nvidia/Cosmos-Predict2-{size.upper()}-Text2Image",
                "model.pt",
                sampler=replace(_PREDICT2, guidance_scale=4.0, negative_prompt="", condition_level=0.0),
                sizes="1024",
                frames=1,
                given=(0,),
            )
        )
    for size, preset in (("2b", presets.cosmos_predict2_2b), ("14b", presets.cosmos_predict2_14b)):
        base = Recipe(
            f"cosmos-predict2-{size}-video2world",
            preset,
            f"nvidia/Cosmos-Predict2-{size.upper()}-Video2World",
            "model-720p-16fps.pt",
            sampler=_PREDICT2,
            given=(1, 5),
            condition_level=0.0001,
        )
        rows.append(base)
        for height, fps in (("720", 10), ("480", 16), ("480", 10)):
            rows.append(
                replace(
                    base,
                    name=f"{base.name}-{height}p-{fps}fps",
                    file=f"model-{height}p-{fps}fps.pt",
                    sizes=height,
                    fps=float(fps),
                    frames=93 if fps == 16 else 61,
                )
            )
        if size == "14b":
            rows.extend(
                replace(
                    base,
                    name=f"cosmos-predict2-14b-gr00t-{data.lower()}",
                    repository=f"nvidia/Cosmos-Predict2-14B-Sample-GR00T-Dreams-{data}",
                    file="model-480p-16fps.pt",
                    sizes="480",
                )
                for data in ("GR1", "DROID")
            )
    rows.append(
        Recipe(
            "cosmos-predict2-2b-action",
            presets.cosmos_predict2_2b_action,
            "nvidia/Cosmos-Predict2-2B-Sample-Action-Conditioned",
            "model-480p-4fps.pt",
            sampler=replace(_PREDICT2, negative_prompt=""),
            sizes="bridge-480",
            frames=13,
            fps=4.0,
            given=(1,),
            condition_level=0.0001,
        )
    )
    rows.append(
        Recipe(
            "cosmos-predict2-2b-multiview",
            presets.cosmos_predict2_2b_multiview,
            "nvidia/Cosmos-Predict2-2B-Multiview",
            "model-720p-10fps-7views-29frames.pt",
            sampler=replace(_PREDICT2, sigma_min=0.01, sigma_max=200.0),
            frames=29,
            fps=10.0,
            given=(0, 1),
            condition_level=0.0001,
        )
    )
    return rows


def _predict25() -> list[Recipe]:
    rows = []
    for size, preset, files in (
        (
            "2b",
            presets.cosmos_predict25_2b,
            ("d20b7120-df3e-4911-919d-db6e08bad31c", "81edfebe-bd6a-4039-8c1d-737df1a790bf"),
        ),
        (
            "14b",
            presets.cosmos_predict25_14b,
            ("54937b8c-29de-4f04-862c-e67b04ec41e8", "e21d2a49-4747-44c8-ba44-9f6f9243715f"),
        ),
    ):
        for stage, file in zip(("pre-trained", "post-trained"), files, strict=True):
            rows.append(
                Recipe(
                    f"cosmos-predict2.5-{size}-{stage}",
                    preset,
                    f"nvidia/Cosmos-Predict2.5-{size.upper()}",
                    f"base/{stage}/{file}_ema_bf16.pt",
                    f"diffusers/base/{stage}",
                    sampler=_PREDICT25,
                    condition_level=None,
                    text_encoder="cosmos-reason1-7b",
                )
            )
    post = next(index for index, row in enumerate(rows) if row.name == "cosmos-predict2.5-2b-post-trained")
    # 35 steps under Karras are 36 calls: sigma from 200 to 0.01 at both ends.
    karras = replace(
        _PREDICT25,
        steps=36,
        schedule="karras",
        shift=1.0,
        first_level=1.0,
        sigma_min=0.01,
        sigma_max=200.0,
        condition_level=0.0001,
    )
    rows[post] = replace(rows[post], sampler=karras, condition_level=0.0001)
    base = rows[post]
    rows.append(
        replace(
            base,
            name="cosmos-predict2.5-2b-distilled",
            file="base/distilled/575edf0f-d973-4c74-b52c-69929a08d0a5_ema_bf16.pt",
            revision="",
            sampler=None,
            note="distilled to few steps under TrigFlow (DMD2), a sampler that is not one of ours",
        )
    )
    rows.append(
        replace(
            base,
            name="cosmos-predict2.5-2b-multiview",
            network=presets.cosmos_predict25_2b_multiview,
            file="auto/multiview/524af350-2e43-496c-8590-3646ae1325da_ema_bf16.pt",
            revision="",
            sampler=replace(_PREDICT25, guidance_scale=3.0, negative_prompt=""),
            sizes="720p",
            frames=29,
            fps=30.0,
            condition_level=None,
        )
    )
    rows.append(
        replace(
            base,
            name="cosmos-predict2.5-2b-action",
            network=presets.cosmos_predict25_2b_action,
            file="robot/action-cond/38c6c645-7d41-4560-8eeb-6f4ddc0e6574_ema_bf16.pt",
            revision="",
            sampler=replace(_PREDICT25, guidance_scale=0.0, negative_prompt=""),
            sizes="bridge-256",
            frames=13,
            fps=4.0,
            given=(1,),
            condition_level=None,
        )
    )
    return rows


RECIPES: dict[str, Recipe] = {row.name: row for row in (*_cosmos1(), *_predict2(), *_predict25())}
"""Name -> row."""


def recipe(name: str) -> Recipe:
    """The row of a name.

    Raises:
        WorldloomError: there is none.
    """
    if name not in RECIPES:
        raise WorldloomError(
            "no released predict checkpoint has that name here", got=name, do=f"one of {', '.join(RECIPES)}"
        )
    return RECIPES[name]


def named(file: str) -> Recipe | None:
    """The row whose checkpoint a file's name tells, as those of Predict2.5 do by an id; else None."""
    stem = file.rpartition("/")[2].rpartition(".")[0]
    ids = {row.file.rpartition("/")[2].partition("_")[0]: row for row in RECIPES.values() if "_ema_" in row.file}
    return next((row for key, row in ids.items() if key in stem), None)
