"""The config of `worldloom curate run`: which stages, in which order, and a table for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from worldloom import config as configs
from worldloom import registry
from worldloom.errors import WorldloomError
from worldloom_curation.episodes import EpisodeConfig
from worldloom_curation.stage import Stage
from worldloom_curation.stages.black import BlackConfig
from worldloom_curation.stages.blur import BlurConfig
from worldloom_curation.stages.camera import CameraConfig
from worldloom_curation.stages.caption import CaptionConfig
from worldloom_curation.stages.caption_windows import CaptionWindowsConfig
from worldloom_curation.stages.duplicates import DuplicatesConfig
from worldloom_curation.stages.embeddings import EmbeddingsConfig
from worldloom_curation.stages.exposure import ExposureConfig
from worldloom_curation.stages.flicker import FlickerConfig
from worldloom_curation.stages.frozen import FrozenConfig
from worldloom_curation.stages.idle import IdleConfig
from worldloom_curation.stages.jerk import JerkConfig
from worldloom_curation.stages.latents import LatentsConfig
from worldloom_curation.stages.motion import MotionConfig
from worldloom_curation.stages.motion_vectors import MotionVectorsConfig
from worldloom_curation.stages.near_duplicates import NearDuplicatesConfig
from worldloom_curation.stages.outliers import OutliersConfig
from worldloom_curation.stages.overlay_text import OverlayTextConfig
from worldloom_curation.stages.probe import ProbeConfig
from worldloom_curation.stages.quality import QualityConfig
from worldloom_curation.stages.safety import SafetyConfig
from worldloom_curation.stages.semantic_duplicates import SemanticDuplicatesConfig
from worldloom_curation.stages.split import SplitConfig
from worldloom_curation.stages.success import SuccessConfig
from worldloom_curation.stages.sync import SyncConfig
from worldloom_curation.stages.text_embeddings import TextEmbeddingsConfig
from worldloom_curation.stages.text_safety import TextSafetyConfig
from worldloom_curation.stages.write import WriteConfig


@dataclass(frozen=True)
class CurateConfig:
    """Everything that decides what `curate run` writes."""

    stages: tuple[str, ...] = ("split", "motion", "duplicates", "caption")
    """The stages between probe and write, in order; each has a table of its name."""
    executor: Literal["local", "ray"] = "local"
    """Where sources are decoded and encoded: on this machine, or on Ray. The result does not depend on it."""
    workers: int = 1
    """Processes that decode and encode. The result does not depend on it."""
    sources: EpisodeConfig = field(default_factory=EpisodeConfig)
    """Which cameras of robot datasets are taken, and which URLs may be read."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """Which sources are taken."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """Where clips begin and end."""
    motion: MotionConfig = field(default_factory=MotionConfig)
    """How much must move."""
    duplicates: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    """Exact duplicates."""
    black: BlackConfig = field(default_factory=BlackConfig)
    """Stretches of black frames."""
    frozen: FrozenConfig = field(default_factory=FrozenConfig)
    """Stretches that stand still."""
    flicker: FlickerConfig = field(default_factory=FlickerConfig)
    """Brightness that jumps."""
    exposure: ExposureConfig = field(default_factory=ExposureConfig)
    """Too dark, too bright."""
    blur: BlurConfig = field(default_factory=BlurConfig)
    """Out of focus."""
    camera: CameraConfig = field(default_factory=CameraConfig)
    """How the camera moves."""
    motion_vectors: MotionVectorsConfig = field(default_factory=MotionVectorsConfig)
    """How much must move, by stored motion vectors."""
    overlay_text: OverlayTextConfig = field(default_factory=OverlayTextConfig)
    """Text that was laid over the picture."""
    quality: QualityConfig = field(default_factory=QualityConfig)
    """How good the pictures are."""
    safety: SafetyConfig = field(default_factory=SafetyConfig)
    """Nudity."""
    near_duplicates: NearDuplicatesConfig = field(default_factory=NearDuplicatesConfig)
    """Copies that were encoded again, resized, cropped or shifted."""
    semantic_duplicates: SemanticDuplicatesConfig = field(default_factory=SemanticDuplicatesConfig)
    """Spans that show the same thing."""
    idle: IdleConfig = field(default_factory=IdleConfig)
    """Robot episodes: where nothing is done."""
    sync: SyncConfig = field(default_factory=SyncConfig)
    """Robot episodes: actions and pictures of one moment."""
    outliers: OutliersConfig = field(default_factory=OutliersConfig)
    """Robot episodes: actions far from all the others."""
    jerk: JerkConfig = field(default_factory=JerkConfig)
    """Robot episodes: jerky actions."""
    success: SuccessConfig = field(default_factory=SuccessConfig)
    """Robot episodes: success flags."""
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    """Captions of recorded episodes."""
    caption_windows: CaptionWindowsConfig = field(default_factory=CaptionWindowsConfig)
    """Captions by a model."""
    text_safety: TextSafetyConfig = field(default_factory=TextSafetyConfig)
    """What captions are checked for."""
    text_embeddings: TextEmbeddingsConfig = field(default_factory=TextEmbeddingsConfig)
    """Vectors of captions."""
    embeddings: EmbeddingsConfig = field(default_factory=EmbeddingsConfig)
    """Vectors of frames."""
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    """Latents of the clips, for training."""
    write: WriteConfig = field(default_factory=WriteConfig)
    """How clips are stored."""

    def __post_init__(self) -> None:
        if not self.stages or self.stages[0] != "split" or len(set(self.stages)) != len(self.stages):
            raise WorldloomError(
                "stages must begin with split and name each stage once",
                got=list(self.stages),
                do='for example: stages = ["split", "motion", "duplicates", "caption"]',
            )
        if self.workers < 1:
            raise WorldloomError("workers must be at least 1", got=self.workers)


def config_class() -> type[CurateConfig]:
    """`CurateConfig` with a table for every installed stage that is not one of ours."""
    known = {item.name for item in dataclasses.fields(CurateConfig)}
    extra = [name for name in registry.names("stages") if name not in known]
    if not extra:
        return CurateConfig
    fields = []
    for name in extra:
        cls = registry.load("stages", name).Config
        fields.append((name, cls, field(default_factory=cls)))
    return dataclasses.make_dataclass("CurateConfig", fields, bases=(CurateConfig,), frozen=True)


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> CurateConfig:
    """The effective config of a TOML file and ``a.b=1`` overrides; see `worldloom.config.load`."""
    return configs.load(config_class(), path, overrides)


def build_stages(config: CurateConfig) -> list[Stage]:
    """One object for each name in ``config.stages``."""
    return [registry.load("stages", name)(getattr(config, name)) for name in config.stages]
