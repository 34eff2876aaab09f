"""Exact duplicates: drop a span whose decoded frames were seen before, in the order of the sources.

Equal means every byte of every frame as it was decoded, at the source's size; a copy of a file, the same stream in
another container, and a repeated shot all count. What only looks alike (another codec, another size) does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from worldloom_curation.stage import Observer, Source, Span, Verdict

if TYPE_CHECKING:
    from worldloom_curation.pictures import Frame
    from worldloom_curation.stage import Signals


@dataclass(frozen=True)
class DuplicatesConfig:
    """Exact duplicates."""

    drop: bool = True
    """Drop them; false only names them in the ledger."""


class FrameDigests:
    """Collects 16 bytes per frame, over its size and its pixels: uint8 ``(t, 16)``."""

    def __init__(self) -> None:
        self._digests = bytearray()

    def add(self, frame: Frame) -> None:
        self._digests += frame.digest()

    def result(self) -> dict[str, np.ndarray]:
        return {"digests": np.frombuffer(bytes(self._digests), np.uint8).reshape(-1, 16)}


class DuplicatesStage:
    """Keeps the first of equal spans. Sees the whole run: the order of sources decides which is the first."""

    name = "duplicates"
    version = 1
    scope: Literal["source", "run"] = "run"
    measured_with = ()
    Config = DuplicatesConfig

    def __init__(self, config: DuplicatesConfig) -> None:
        self.config = config

    def observer(self, source: Source, fps: float) -> Observer | None:
        return FrameDigests()

    def decide(self, spans: Sequence[Span], signals: Mapping[str, Signals]) -> list[Verdict]:
        first: dict[bytes, Span] = {}
        verdicts: list[Verdict] = []
        for span in spans:
            taken = signals[span.source.key]["digests"][span.start : span.end : span.step]
            digest = hashlib.sha256(taken.tobytes()).digest()
            other = first.setdefault(digest, span)
            if other is span:
                verdicts.append(Verdict(span, True, "earlier copies", 0.0, 1.0, "no earlier span has these frames"))
                continue
            if other.source.digest == span.source.digest and other.source.name != span.source.name:
                reason = f"the file is a copy of {other.source.name}"
            else:
                reason = f"the same frames as {other.source.name} [{other.start}, {other.end}), clip {other.id}"
            verdicts.append(Verdict(span, not self.config.drop, "earlier copies", 1.0, 1.0, reason, other.id))
        return verdicts
