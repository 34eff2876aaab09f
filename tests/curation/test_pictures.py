from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from curation_videos import CODECS, scene, turned, write

from worldloom import media
from worldloom_curation import Frame
from worldloom_curation.pictures import frames, one_thread, opencv


def every(video: Path | bytes, start: int = 0, end: int | None = None) -> list[Frame]:
    source = video if isinstance(video, bytes) else str(video)
    return list(frames(media.iter_decoded(source, start, end)))


def difference(one: np.ndarray, two: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - two.astype(int)).mean())


def plain(colour: tuple[int, int, int], space: int, full: bool, pixels: str) -> Frame:
    """A picture of one colour, stored in a colour space and a range."""
    picture = av.VideoFrame.from_ndarray(np.full((32, 48, 3), colour, np.uint8), format="rgb24")
    made: Any = picture.reformat(format=pixels, dst_colorspace=space, dst_color_range=2 if full else 1)
    made.colorspace, made.color_range = space, 2 if full else 1
    return Frame.decoded(made)


@pytest.mark.parametrize("codec", sorted(CODECS))
def test_pictures_are_those_of_the_whole_frame(codec: str, tmp_path: Path) -> None:
    path = write(tmp_path / "video", scene(3, 9, 120, 200), codec)
    for whole, frame in zip(media.iter_frames(path), every(path), strict=True):
        assert (frame.height, frame.width) == whole.shape[:2] == (120, 200)
        assert difference(frame.colour(45), media.shrink(whole, 45)) < 2.5
        assert difference(frame.grey(45), opencv().cvtColor(media.shrink(whole, 45), opencv().COLOR_RGB2GRAY)) < 2.5
        assert difference(frame.squeezed(27, 48), media.resize(whole, (27, 48))) < 2.5
        assert frame.halved(45).shape == (30, 50, 3)
        assert difference(frame.halved(45), media.resize(whole, (30, 50))) < 2
        assert difference(frame.colour(500), whole) < 3
        np.testing.assert_array_equal(frame.rgb(), whole)


@pytest.mark.parametrize("pixels", ["yuv420p", "yuv422p", "yuv444p"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("space", [1, 5])  # ITU-R BT.709 and BT.601
def test_colours_are_read_by_their_space_and_range(space: int, full: bool, pixels: str) -> None:
    for colour in ((200, 30, 60), (20, 180, 220), (128, 128, 128), (250, 250, 250), (4, 4, 4)):
        frame = plain(colour, space, full, pixels)
        assert np.abs(frame.colour(16).astype(int) - colour).max() <= 3
        red, blue = (0.2126, 0.0722) if space == 1 else (0.299, 0.114)
        luma = red * colour[0] + (1 - red - blue) * colour[1] + blue * colour[2]
        assert np.abs(frame.grey(16) - luma).max() <= 2


def test_pictures_do_not_depend_on_what_else_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "video", scene(1, 4, 200, 300), "h264")
    alone = [frame.grey(20).copy() for frame in every(path)]
    held = every(path)
    for frame in held:
        frame.halved(60)
    together = [frame.grey(20) for frame in held[::-1]][::-1]
    again = [frame.grey(20) for frame in held]
    for one, two, three in zip(alone, together, again, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)
    np.testing.assert_array_equal(held[0].colour(40), every(path)[0].colour(40))


def test_equal_frames_have_equal_digests(tmp_path: Path) -> None:
    path = write(tmp_path / "video", scene(1, 12, 62, 90), "h264")
    buffer = io.BytesIO()
    with av.open(str(path)) as source, av.open(buffer, "w", format="matroska") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    digests = [frame.digest() for frame in every(path)]
    assert digests == [frame.digest() for frame in every(buffer.getvalue())]
    assert len(set(digests)) == 12

    still = np.zeros((16, 16, 3), np.uint8)
    other = still.copy()
    other[7, 9, 1] = 1
    assert Frame(still).digest() == Frame(still.copy()).digest() != Frame(other).digest()
    assert Frame(still).digest() != Frame(np.zeros((8, 32, 3), np.uint8)).digest()


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_pictures_of_a_rotated_video_are_upright(degrees: int) -> None:
    data = media.write_video(None, scene(5, 3, 64, 96), 20)
    assert data is not None
    for whole, frame in zip(media.iter_frames(turned(data, degrees)), every(turned(data, degrees)), strict=True):
        assert (frame.height, frame.width) == whole.shape[:2]
        assert frame.colour(32).shape == media.shrink(whole, 32).shape
        assert difference(frame.colour(32), media.shrink(whole, 32)) < 2
        assert frame.grey(32).shape == frame.colour(32).shape[:2]


def test_frames_of_another_size_are_fitted_to_the_first() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mjpeg") as out:
        stream: Any = out.add_stream("mjpeg", rate=Fraction(20))
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuvj420p"
        for frame in scene(1, 3, 48, 64):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode(None))
    larger = io.BytesIO()
    with av.open(larger, "w", format="mjpeg") as out:
        stream = out.add_stream("mjpeg", rate=Fraction(20))
        stream.height, stream.width, stream.pix_fmt = 80, 64, "yuvj420p"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(scene(1, 1, 80, 64)[0], format="rgb24")))
        out.mux(stream.encode(None))
    both = buffer.getvalue() + larger.getvalue()
    wanted = list(media.iter_frames(both))
    got = every(both)
    assert [(frame.height, frame.width) for frame in got] == [(48, 64)] * 4
    for whole, frame in zip(wanted, got, strict=True):
        np.testing.assert_array_equal(frame.rgb(), whole)


def test_a_span_of_frames_is_counted_from_the_start(tmp_path: Path) -> None:
    path = write(tmp_path / "video", scene(1, 10), "mpeg4")
    whole = [frame.digest() for frame in every(path)]
    assert [frame.digest() for frame in every(path, 3, 7)] == whole[3:7]


def test_opencv_gets_its_threads_back() -> None:
    cv2 = opencv()
    before = cv2.getNumThreads()
    with one_thread():
        assert cv2.getNumThreads() == 1
    assert cv2.getNumThreads() == before
