"""What a curation stage is.

A source (one video file, or one recorded episode) is decoded once, from its first frame to its last. Every stage may
put an `Observer` into that pass; what the observers collected (per-frame numbers, never frames) is cached. After it,
each stage turns spans into verdicts with `decide`, a pure function of the spans, the collected numbers and its config.
So a changed threshold asks for new verdicts and not for a new decoding.

A stage may also add arrays to the clips that are kept, from the clips as they are stored (`Adds`), or make samples of a
dataset of its own from them (`Derives`).

A third party's stage is one class with this shape and one line in a catalog (entry point group ``worldloom.stages``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from worldloom.schema import clip_id

if TYPE_CHECKING:
    import numpy as np

    from worldloom.schema import Clip
    from worldloom.shards import ShardSample
    from worldloom_curation.pictures import Frame

    Signals = Mapping[str, np.ndarray]
    """What an observer collected over a whole source: named arrays, as a rule one row per frame."""


@dataclass(frozen=True)
class Source:
    """One video: a file, or an episode of a recorded dataset."""

    name: str
    """Path relative to the curated folder, with ``/``; an episode adds ``#`` and its clip id or number (and camera)."""
    path: str
    """The file; for an episode of one of our own datasets, the dataset folder."""
    digest: str
    """sha256 (hex) of the video's bytes; half of every clip id."""
    key: str
    """sha256 (hex) of everything a result can depend on: the video, and an episode's arrays and facts."""
    index: int | None = None
    """Number of the episode in its dataset; None for a file."""
    cut_from: tuple[int, int, int] | None = None
    """(start, end, step) in the original source of an episode that was itself cut from something."""
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any], compare=False)
    """What the recorder wrote about an episode (environment, action names, ...); empty for a file."""
    actions: np.ndarray | None = field(default=None, compare=False)
    """An episode's actions ``(T-1, a)``."""
    error: str = ""
    """Why it cannot even be opened; empty as a rule."""
    window: tuple[int, int] | None = None
    """The frames ``[first, last)`` of the file that are this episode; None for all of them."""
    rate: float = 0.0
    """Frames per second, where the dataset says so; 0 leaves it to the file."""
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict["str", "np.ndarray"], compare=False)
    """The arrays of an episode that was not recorded by us, as a shard sample has them; ``actions`` is among them."""
    exact: bool = False
    """True for an episode of one of our own datasets: its pixels are without loss, and its bytes may be copied."""

    @property
    def recorded(self) -> bool:
        """True for an episode, which has arrays beside its video."""
        return self.index is not None

    def original(self, start: int, end: int) -> tuple[int, int]:
        """Frames ``[start, end)`` in the numbering of the original source, the one that `digest` names."""
        if self.cut_from is None:
            return start, end
        first, last, step = self.cut_from
        return first + start * step, min(first + end * step, last)


@dataclass(frozen=True)
class Span:
    """Frames ``[start, end)`` of a source, every `step`-th of them, on their way to becoming a clip."""

    source: Source
    start: int
    end: int
    fps: float
    """Frames per second of the source."""
    step: int = 1
    """Every how many frames the clip takes one."""
    caption: str = ""
    """Text for the clip, once a stage gave one."""
    notes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Facts that stages found (JSON-serialisable); stored in the clip's metadata."""

    @property
    def id(self) -> str:
        """`worldloom.schema.clip_id` of the span."""
        return clip_id(self.source.digest, *self.source.original(self.start, self.end))

    @property
    def frames(self) -> int:
        """Frames of the clip: those of the span that `step` takes."""
        return -(-(self.end - self.start) // self.step)


@dataclass(frozen=True)
class Verdict:
    """What a stage decided about one span; becomes a row of the ledger."""

    span: Span
    kept: bool
    measure: str = ""
    """What was measured."""
    value: float | None = None
    threshold: float | None = None
    reason: str = ""
    """One sentence for a person."""
    like: str = ""
    """Id of the clip that this one repeats or resembles, where the stage compares spans."""
    failed: bool = False
    """True where the stage could not judge the span; then it is not kept, and it is judged again in the next run."""
    traceback: str = ""
    """Set for a stage that raised."""


class Observer(Protocol):
    """Watches one source being decoded. Holds numbers about frames, not the frames: a source may be hours long."""

    def add(self, frame: Frame) -> None:
        """The next frame; small pictures of it cost little, ``frame.rgb()`` is the whole of it."""
        ...

    def result(self) -> dict[str, np.ndarray]:
        """What was collected; called once, after the last frame."""
        ...


@runtime_checkable
class Stage(Protocol):
    """One step of the pipeline. Built as ``StageClass(config)``; the class attribute ``Config`` is its config class."""

    name: str
    """The name in ``stages = [...]``, of its config table, and in the ledger."""
    version: int
    """Raise it whenever the code would give another result for the same input: it invalidates cached results."""
    scope: Literal["source", "run"]
    """``source``: `decide` sees the spans of one source. ``run``: the spans of all sources, in order."""
    config: Any
    measured_with: tuple[str, ...]
    """Names of the config fields that the observer depends on; all others are free to change without decoding."""

    def observer(self, source: Source, fps: float) -> Observer | None:
        """What this stage collects from a source; None for nothing."""
        ...

    def decide(self, spans: Sequence[Span], signals: Mapping[str, Signals]) -> list[Verdict]:
        """Verdicts in order; pure. `signals` maps a source's `key` to what the observer collected there.

        The spans of the verdicts must cover the frames of the spans given, so that the ledger accounts for every frame.
        """
        ...


@runtime_checkable
class Adds(Stage, Protocol):
    """A stage that adds arrays to the samples of kept clips. Its results are cached, and may come from a worker."""

    reads_caption: bool
    """Whether what it adds depends on the clip's caption; on its pictures it always may."""

    def add(self, clip: Clip, video: bytes) -> dict[str, np.ndarray]:
        """Arrays of a clip as it is stored, by name (`worldloom.shards`); what it raises fails that clip alone."""
        ...

    def facts(self) -> dict[str, Any]:
        """What ``dataset.json`` says about them, in its metadata."""
        ...


@runtime_checkable
class Derives(Adds, Protocol):
    """A stage whose arrays become a dataset of latents of their own, ``DIR/<name>``, instead of parts of the clips."""

    @property
    def tokenizer(self) -> Mapping[str, Any]:
        """Of that dataset, as ``dataset.json`` records it."""
        ...

    @property
    def inputs(self) -> Sequence[str]:
        """What it is made of besides the clips, for its lineage."""
        ...

    def derive(self, sample: ShardSample, made: Mapping[str, np.ndarray]) -> Iterator[ShardSample]:
        """The samples of a clip, from what `add` has made of it."""
        ...
