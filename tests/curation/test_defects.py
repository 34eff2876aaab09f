"""Black, frozen, flickering, badly exposed and blurred pictures, each planted in a video that is encoded."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from curation_videos import scene, write

from worldloom import WorldloomError, media
from worldloom_curation import Frame, Source, Span, Verdict
from worldloom_curation.config import load
from worldloom_curation.ledger import accounts, load_ledger
from worldloom_curation.measures import cut_out, runs
from worldloom_curation.pipeline import run
from worldloom_curation.stages.black import BlackConfig, BlackStage
from worldloom_curation.stages.blur import BlurConfig, BlurStage, blur
from worldloom_curation.stages.exposure import ExposureConfig, ExposureStage
from worldloom_curation.stages.flicker import FlickerConfig, FlickerStage
from worldloom_curation.stages.frozen import FrozenConfig, FrozenStage, stretches

FILE = Source("a.mp4", "/a.mp4", "a" * 64, "a")


def decided(stage: Any, frames: np.ndarray, crf: int = 28, step: int = 1) -> list[Verdict]:
    """The verdicts on one video, encoded first."""
    encoded = media.write_video(None, frames, 20, crf=crf)
    assert encoded is not None
    observer = stage.observer(FILE, 20.0)
    for frame in media.read_frames(encoded):
        observer.add(Frame(frame))
    span = Span(FILE, 0, len(frames), 20.0, step)
    verdicts = stage.decide([span], {"a": observer.result()})
    edges = [(verdict.span.start, verdict.span.end) for verdict in verdicts]
    assert edges[0][0] == 0
    assert edges[-1][1] == len(frames)
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(edges))
    return verdicts


def parts(verdicts: list[Verdict]) -> list[tuple[int, int, bool]]:
    return [(verdict.span.start, verdict.span.end, verdict.kept) for verdict in verdicts]


def test_a_frozen_stretch_is_found_and_cut_out_to_the_frame() -> None:
    moving = scene(1, 70, 120, 160)
    frames = np.concatenate([moving[:30], np.repeat(moving[29:30], 40, 0), moving[30:70]])
    verdicts = decided(FrozenStage(FrozenConfig()), frames)
    # Frame 29 is the first of the 41 equal ones.
    assert parts(verdicts) == [(0, 29, True), (29, 70, False), (70, 110, True)]
    assert verdicts[1].reason == "the picture stands still"
    assert verdicts[1].value == pytest.approx(41 / 20)


def test_a_short_stall_is_kept_and_so_are_a_slow_fade_and_one_small_thing_that_moves() -> None:
    moving = scene(2, 60, 120, 160)
    stall = np.concatenate([moving[:30], np.repeat(moving[29:30], 10, 0), moving[30:]])
    assert parts(decided(FrozenStage(FrozenConfig()), stall)) == [(0, 70, True)]
    fade = np.stack([np.full((120, 160, 3), 40 + i // 3, np.uint8) for i in range(120)])
    assert parts(decided(FrozenStage(FrozenConfig()), fade, crf=10)) == [(0, 120, True)]
    dot = np.repeat(scene(3, 1, 120, 160), 60, 0)
    for i, frame in enumerate(dot):
        frame[60:66, 2 * i : 2 * i + 6] = 255
    assert parts(decided(FrozenStage(FrozenConfig()), dot)) == [(0, 60, True)]


def test_a_still_picture_is_frozen_whole_and_slivers_beside_a_stretch_are_dropped() -> None:
    still = np.repeat(scene(4, 1, 120, 160), 60, 0)
    [verdict] = decided(FrozenStage(FrozenConfig()), still, crf=35)
    assert (verdict.kept, verdict.value) == (False, 3.0)
    frames = np.concatenate([scene(5, 10, 120, 160), still])
    verdicts = decided(FrozenStage(FrozenConfig()), frames)
    assert parts(verdicts) == [(0, 10, False), (10, 70, False)]
    assert verdicts[0].reason == "10 frames are left beside a frozen stretch"


def test_what_is_left_has_an_allowed_length_and_a_thinned_clip_loses_no_frame() -> None:
    moving = scene(6, 70, 120, 160)
    frames = np.concatenate([moving[:40], np.repeat(moving[39:40], 30, 0), moving[40:]])
    stage = FrozenStage(FrozenConfig(min_frames=5, frames_multiple=4))
    verdicts = decided(stage, frames, step=3)
    assert parts(verdicts) == [(0, 39, True), (39, 70, False), (70, 95, True), (95, 100, False)]
    assert [verdict.span.frames % 4 for verdict in verdicts if verdict.kept] == [1, 1]


def test_runs_and_stretches() -> None:
    assert runs(np.array([1, 1, 0, 1, 1, 1], bool), 3) == [(3, 6)]
    assert runs(np.zeros(3, bool), 1) == []
    levels = np.array([0, 0.4, 0.8, 1.2, 1.3, 1.2, 5.0])[:, None]
    assert stretches(levels, 1.0, 2) == [(0, 3), (3, 6)]
    assert cut_out(Span(FILE, 3, 9, 20.0), [], 1, 1, lambda s, k: Verdict(s, k), lambda s: Verdict(s, False)) == [
        Verdict(Span(FILE, 3, 9, 20.0), True)
    ]


def test_black_frames_are_cut_out() -> None:
    frames = np.concatenate([scene(1, 30, 120, 160), np.full((6, 120, 160, 3), 2, np.uint8), scene(2, 40, 120, 160)])
    verdicts = decided(BlackStage(BlackConfig()), frames)
    assert parts(verdicts) == [(0, 30, True), (30, 36, False), (36, 76, True)]
    assert verdicts[1].reason == "it is black"
    lit = np.zeros((40, 120, 160, 3), np.uint8)
    lit[:, 40:70, 40:80] = 200  # a bright thing in the dark is no black picture
    assert parts(decided(BlackStage(BlackConfig()), lit)) == [(0, 40, True)]


def test_flicker_is_found_and_movement_and_fades_are_none() -> None:
    moving = scene(1, 40, 120, 160).astype(np.float32)
    strobe = moving * np.where(np.arange(40) % 2, 0.85, 1.0)[:, None, None, None]
    fade = moving * np.linspace(0.2, 1, 40)[:, None, None, None]
    values = {}
    for name, frames in {"moving": moving, "strobe": strobe, "fade": fade}.items():
        [verdict] = decided(FlickerStage(FlickerConfig()), frames.astype(np.uint8))
        values[name] = (verdict.kept, verdict.value)
    assert [kept for kept, _ in values.values()] == [True, False, True], values
    assert values["strobe"][1] > 4 * max(values["moving"][1], values["fade"][1])


def test_exposure_drops_what_is_too_dark_or_too_bright() -> None:
    frames = scene(1, 20, 120, 160)
    stage = ExposureStage(ExposureConfig())
    [dark], [bright], [good] = (decided(stage, video) for video in (frames // 24, np.uint8(255) - frames // 24, frames))
    assert (dark.kept, bright.kept, good.kept) == (False, False, True)
    assert dark.reason == "100 % of it is dark, 0 % bright"
    drawn = np.zeros_like(frames)
    drawn[:, 30:60, 40:70] = 150  # 6 % of the picture
    assert decided(stage, drawn)[0].kept


def test_the_blur_effect_of_two_lines_is_what_the_paper_says_by_hand() -> None:
    image = np.zeros((16, 40), np.uint8)
    image[:, 20:] = 90
    # Along rows: one step of 90 in each; smoothed over 9 pixels it is 9 steps of 10, so 80 of the 90 are lost.
    # Along columns nothing differs: as blurred as can be.
    assert blur(image) == 1.0
    both = np.zeros((40, 40), np.uint8)
    both[20:, 20:] = 90
    assert blur(both) == pytest.approx(10 / 90, abs=1e-5)
    assert blur(np.full((40, 40), 7, np.uint8)) == 1.0


def test_blurred_videos_are_dropped_and_sharp_ones_kept() -> None:
    import cv2

    rng = np.random.default_rng(0)
    texture = cv2.resize(rng.integers(0, 256, (8, 10, 3), np.uint8), (160, 120), interpolation=cv2.INTER_NEAREST)
    sharp = np.repeat(texture[None], 20, 0)
    smeared = np.repeat(cv2.GaussianBlur(texture, (0, 0), 6)[None], 20, 0)
    [kept], [dropped] = (decided(BlurStage(BlurConfig()), frames) for frames in (sharp, smeared))
    assert (kept.kept, dropped.kept) == (True, False)
    assert dropped.reason == "it is blurred"


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (FrozenConfig, {"seconds": 0}),
        (BlackConfig, {"share": 0}),
        (ExposureConfig, {"dark": 250}),
        (BlurConfig, {"rate": 0}),
    ],
)
def test_settings_that_make_no_sense_are_refused(config: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(WorldloomError):
        config(**wrong)


def test_the_filters_run_in_a_pipeline_and_a_changed_threshold_decodes_nothing(tmp_path: Path) -> None:
    moving = scene(1, 60, 120, 160)
    write(tmp_path / "in" / "stalls", np.concatenate([moving[:30], np.repeat(moving[29:30], 40, 0), moving[30:]]))
    stages = "stages=['split','black','frozen','exposure','flicker','blur']"
    first = run(tmp_path / "in", tmp_path / "out", load(overrides=[stages, "blur.threshold=1"]))
    rows = load_ledger(tmp_path / "out")
    assert [(row.start, row.end) for row in rows if row.stage == "frozen" and not row.kept] == [(29, 70)]
    assert [(row.start, row.end) for row in rows if row.stage == "write"] == [(0, 29), (70, 100)]
    assert all(account.balanced for account in accounts(rows).values())
    assert first["work"]["scan"]["computed"] == 1
    again = run(tmp_path / "in", tmp_path / "out", load(overrides=[stages, "blur.threshold=1", "frozen.seconds=3"]))
    assert again["work"]["scan"]["computed"] == 0
    assert again["clips"] == 1
