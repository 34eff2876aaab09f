"""Near-copies, planted in videos: encoded again, cropped, resized, shifted in time, at another rate."""

from __future__ import annotations

import numpy as np
import pytest

from worldloom import WorldloomError, media
from worldloom_curation import Frame, Source, Span, Verdict
from worldloom_curation.stages import near_duplicates as near
from worldloom_curation.stages.near_duplicates import NearDuplicatesConfig, NearDuplicatesStage, Window

STAGE = NearDuplicatesStage(NearDuplicatesConfig())


def film(seed: int, frames: int = 50, height: int = 96, width: int = 144, room: int | None = None) -> np.ndarray:
    """Four discs that drift and bounce before a wall of random tiles: uint8 ``(t, h, w, 3)``.

    Args:
        room: seed of the wall; None for one of its own. Two films in one room differ in what moves.
    """
    wall = np.random.default_rng(1000 + (seed if room is None else room))
    tiles = wall.integers(30, 226, (6, 9, 3), np.uint8)
    back = media.resize(np.repeat(np.repeat(tiles, 4, 0), 4, 1), (height, width))
    rng = np.random.default_rng(seed)
    where, speed = rng.uniform(0.2, 0.8, (4, 2)), rng.uniform(-0.03, 0.03, (4, 2))
    radius, colours = rng.uniform(0.08, 0.16, 4), rng.integers(0, 256, (4, 3))
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width])[:, None, None]
    made = np.repeat(back[None], frames, 0)
    for i, frame in enumerate(made):
        at = np.abs((where + speed * i) % 2 - 1)  # bounces
        for (cy, cx), r, colour in zip(at, radius, colours, strict=True):
            frame[(y - cy) ** 2 + (x - cx) ** 2 < r**2] = colour
    return made


class Pile:
    """Spans of videos and what the stage collected from them."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.signals: dict[str, dict[str, np.ndarray]] = {}

    def add(self, name: str, frames: np.ndarray, fps: int = 20, crf: int = 20) -> None:
        encoded = media.write_video(None, frames, fps, crf=crf)
        assert encoded is not None
        source = Source(name, name, name, name)
        observer = STAGE.observer(source, float(fps))
        assert observer is not None
        for frame in media.iter_frames(encoded):
            observer.add(Frame(frame))
        self.signals[name] = observer.result()
        self.spans.append(Span(source, 0, len(frames), float(fps)))

    def decide(self, **settings: object) -> dict[str, Verdict]:
        stage = NearDuplicatesStage(NearDuplicatesConfig(**settings))  # pyright: ignore[reportArgumentType]
        return {verdict.span.source.name: verdict for verdict in stage.decide(self.spans, self.signals)}


def crop(frames: np.ndarray, top: float, bottom: float, left: float, right: float) -> np.ndarray:
    _, h, w, _ = frames.shape
    cut = frames[:, int(h * top) : h - int(h * bottom), int(w * left) : w - int(w * right)]
    return np.stack([media.resize(frame, (72, 108)) for frame in cut])


@pytest.fixture(scope="module")
def pile() -> Pile:
    pile = Pile()
    films = [film(seed) for seed in range(7)]
    for number, frames in enumerate(films):
        pile.add(f"film {number}", frames)
    pile.add("copy of 0", np.stack([media.resize(frame, (64, 96)) for frame in films[0]]), crf=33)
    pile.add("copy of 1", crop(films[1], 0.1, 0.12, 0.05, 0.15), crf=30)
    pile.add("copy of 2", crop(films[2], 0.0, 0.0, 0.12, 0.13), crf=30)
    pile.add("copy of 3", films[3][6:])
    pile.add("copy of 4", np.clip(films[4][::2] * 0.85 + 10, 0, 255).astype(np.uint8), fps=10)
    pile.add("other film in the room of 5", film(50, room=5))
    pile.add("larger copy of 6", np.stack([media.resize(frame, (144, 216)) for frame in films[6]]))
    return pile


def test_near_copies_are_named_and_nothing_else_is(pile: Pile) -> None:
    verdicts = pile.decide()
    named = {name: verdict.reason for name, verdict in verdicts.items() if not verdict.kept}
    assert set(named) == {"copy of 0", "copy of 1", "copy of 2", "copy of 3", "copy of 4", "film 6"}, {
        name: (round(verdict.value or 0, 2), verdict.reason) for name, verdict in verdicts.items()
    }
    for number in range(5):
        assert f" of film {number} [0, 50)" in named[f"copy of {number}"]
    assert verdicts["copy of 0"].like == pile.spans[0].id
    # The one with more pixels stays, though it came later.
    assert "those of larger copy of 6" in named["film 6"]


def test_two_films_of_one_room_are_told_apart_by_what_moves(pile: Pile) -> None:
    verdict = pile.decide()["other film in the room of 5"]
    assert verdict.kept
    assert verdict.value is not None
    assert verdict.value < 0.5
    stands = Pile()
    stands.add("wall", film(5)[:1].repeat(40, 0))
    stands.add("wall again", film(5)[:1].repeat(40, 0), crf=30)
    verdict = stands.decide()["wall again"]
    assert (verdict.kept, verdict.reason.split(" [")[0]) == (False, "it stands still, and the picture is that of wall")


def test_blocks_make_no_difference(pile: Pile, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pile.decide()
    monkeypatch.setattr(near, "_BLOCK", 5)
    monkeypatch.setattr(near, "_AT_ONCE", 3)
    assert [verdict.kept for verdict in pile.decide().values()] == [verdict.kept for verdict in whole.values()]
    assert STAGE.decide([], {}) == []


def test_only_named_where_asked(pile: Pile) -> None:
    verdicts = pile.decide(drop=False)
    assert all(verdict.kept for verdict in verdicts.values())
    assert verdicts["copy of 1"].reason.startswith("picture and movement are those of film 1")


def test_a_part_that_is_shared_by_less_than_asked_for_is_no_copy() -> None:
    pile = Pile()
    pile.add("first", film(1)[:40])
    pile.add("later", np.concatenate([film(1)[30:40], film(2)[:40]]))
    assert pile.decide()["later"].kept
    pile.add("most", np.concatenate([film(1)[10:40], film(3)[:10]]))
    assert not pile.decide()["most"].kept


def test_the_crops_of_a_spectrum_are_the_spectra_of_the_crops() -> None:
    dctn = pytest.importorskip("scipy.fft").dctn

    picture = np.random.default_rng(0).uniform(0, 255, (1, 32, 32))
    spectra = near._spectra(picture, whole=False)
    for number, (y, x) in enumerate(near._PAIRS):
        (top, height), (left, width) = near._WINDOWS[y], near._WINDOWS[x]
        cut = near._resampling(top, height) @ picture[0] @ near._resampling(left, width).T
        expected = dctn(cut, type=2)[:6, :6] / 4
        np.testing.assert_allclose(
            spectra[0, number], [expected[v] for v in near._ORDER], rtol=1e-3, atol=1, err_msg=f"{y} {x}"
        )
    np.testing.assert_allclose(near._spectra(picture, whole=True)[0, 0], spectra[0, 0], atol=0.05)


def test_registration_finds_the_crop() -> None:
    frames = film(3)[::10].astype(np.float32).mean(3)
    whole = np.stack([media.resize(frame[..., None].astype(np.uint8), (32, 32))[..., 0] for frame in frames])
    asked = Window(8, 56, 4, 60)
    found = near.register(whole.astype(np.float32), asked.cut(whole.astype(np.float32)), Window(6, 58, 6, 58))
    edges = ("top", "bottom", "left", "right")
    assert max(abs(getattr(found, edge) - getattr(asked, edge)) for edge in edges) <= 1
    picture = whole.astype(np.float32)
    rows, shift, window, own = near._start(picture, asked.cut(picture), 0) or (None, 0, Window(0, 64, 0, 64), False)
    assert (shift, own) == (0, True)
    assert max(abs(getattr(window, edge) - getattr(asked, edge)) for edge in edges) <= 5
    assert rows is not None
    assert near._start(picture, 255 - picture, 0) is None


def test_thumbnails_are_taken_by_time_at_any_rate() -> None:
    for fps, expected in ((15.0, [0, 4, 8, 11, 15]), (20.0, [0, 5, 10, 15]), (3.0, list(range(18)))):
        observer = near.Thumbnails(fps, 4.0)
        for frame in film(1, 18):
            observer.add(Frame(frame))
        assert observer.result()["at"].tolist() == expected


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(WorldloomError):
        NearDuplicatesConfig(rate=0)
