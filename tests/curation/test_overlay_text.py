"""Burnt-in text, planted in videos; and text that belongs to the scene."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from curation_videos import scene

from worldloom import WorldloomError
from worldloom_curation import Frame, Source, Span, Verdict
from worldloom_curation.stages.overlay_text import (
    OverlayTextConfig,
    OverlayTextStage,
    TextBoxes,
    longest_stay,
    overlaps,
)

FILE = Source("a.mp4", "/a.mp4", "a" * 64, "a")


def signals(looks: list[list[tuple[float, float, float, float]]], score: float = 0.9) -> dict[str, np.ndarray]:
    at = [3 * number for number, boxes in enumerate(looks) for _ in boxes]
    boxes = np.array([box for boxes in looks for box in boxes], np.float32).reshape(-1, 4)
    scores = np.full(len(at), score, np.float32)
    return {"boxes": boxes, "at": np.array(at, np.int32), "scores": scores, "every": np.asarray(3)}


def decided(found: dict[str, np.ndarray], length: int, **settings: Any) -> Verdict:
    [verdict] = OverlayTextStage(OverlayTextConfig(**settings)).decide([Span(FILE, 0, length, 20.0)], {"a": found})
    return verdict


def test_overlaps_of_boxes() -> None:
    one = np.array([[0, 0, 0.2, 0.1], [0.5, 0.5, 0.6, 0.6]])
    other = np.array([[0.1, 0, 0.3, 0.1], [0.5, 0.5, 0.6, 0.6], [0.9, 0.9, 1, 1]])
    np.testing.assert_allclose(overlaps(one, other), [[1 / 3, 0, 0], [0, 1, 0]], atol=1e-9)


def test_a_stay_is_counted_through_looks_in_a_row() -> None:
    here, there, none = np.array([[0.4, 0.8, 0.6, 0.9]]), np.array([[0.45, 0.8, 0.65, 0.9]]), np.zeros((0, 4))
    assert longest_stay([here, here, none, here], 0.9) == 2
    assert longest_stay([here, there, here], 0.9) == 1
    assert longest_stay([np.concatenate([there, here]), here, here], 0.9) == 3
    assert longest_stay([none], 0.9) == 0


def test_text_that_stays_is_an_overlay_and_text_that_moves_is_not() -> None:
    still = signals([[(0.4, 0.8, 0.6, 0.9)]] * 5)
    verdict = decided(still, 15)
    assert (verdict.kept, verdict.value, verdict.threshold) == (False, 5.0, 3.0)
    assert verdict.reason == "text stays in its place through 5 of 5 looks"
    assert decided(still, 15, frames=6).kept
    assert decided(still, 15, score=0.95).reason == "no text"
    moving = signals([[(0.1 * i + 0.1, 0.4, 0.1 * i + 0.3, 0.5)] for i in range(6)])
    assert decided(moving, 18).kept
    # A span sees its own looks only.
    [late] = OverlayTextStage(OverlayTextConfig()).decide([Span(FILE, 8, 15, 20.0)], {"a": still})
    assert (late.kept, late.value) == (True, 2.0)


def test_changing_text_in_a_corner_is_an_overlay() -> None:
    corner = signals([[(0.02, 0.02 + 0.01 * i, 0.1 + 0.02 * (i % 2), 0.06 + 0.01 * i)] for i in range(5)])
    verdict = decided(corner, 15)
    assert (verdict.kept, verdict.measure, verdict.value) == (False, "corner text share", 1.0)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(WorldloomError):
        OverlayTextConfig(frames=1)


def test_planted_subtitles_are_found_and_a_sign_that_glides_by_is_kept() -> None:
    pytest.importorskip("rapidocr")
    import cv2

    plain = np.ascontiguousarray(scene(1, 13, 160, 240, speed=6))
    subtitled, sign = plain.copy(), plain.copy()
    for i in range(len(plain)):
        cv2.putText(subtitled[i], "THE KITCHEN", (50, 140), cv2.FONT_HERSHEY_SIMPLEX, 0.7, (255, 255, 255), 2)
        cv2.putText(sign[i], "BAKERY", (5 + 9 * i, 90), cv2.FONT_HERSHEY_SIMPLEX, 0.7, (255, 255, 255), 2)
    verdicts = {}
    for name, frames in {"plain": plain, "subtitled": subtitled, "sign": sign}.items():
        stage = OverlayTextStage(OverlayTextConfig(side=160))
        observer = stage.observer(FILE, 20.0)
        assert isinstance(observer, TextBoxes)
        for frame in frames:
            observer.add(Frame(frame))
        [verdicts[name]] = stage.decide([Span(FILE, 0, len(frames), 20.0)], {"a": observer.result()})
    assert [verdict.kept for verdict in verdicts.values()] == [True, False, True], verdicts
    assert verdicts["subtitled"].reason.startswith("text stays in its place through")
    assert verdicts["plain"].reason == "no text"
    assert verdicts["sign"].reason == "no text stays in its place; text in 5 of 5 looks"
