"""Video in and out: exact frames, exact round trips, equal bytes for equal frames."""

from __future__ import annotations

import hashlib
import io
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from curation_videos import turned
from hypothesis import given, settings
from hypothesis import strategies as st

from worldloom import media
from worldloom.encoding import for_encoder
from worldloom.errors import WorldloomError

av = pytest.importorskip("av")


def scene(count: int = 24, height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """A smooth texture that drifts, so that codecs have something to predict."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    texture = media.resize(coarse, (height + count, width + count))
    return np.stack([texture[i : i + height, i // 2 : i // 2 + width] for i in range(count)])


def encode(frames: np.ndarray, codec: str, container: str, options: dict[str, str], fps: int = 25) -> bytes:
    """Encode with PyAV alone, to have files that `write_video` does not write."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.thread_count = 1
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = i
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


@pytest.mark.parametrize("shape", [(5, 47, 63), (1, 1, 1), (3, 10, 10), (4, 64, 64), (2, 3, 10)])
def test_lossless_video_comes_back_exactly(shape: tuple[int, int, int]) -> None:
    frames = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    data = media.write_video(None, frames, 30, lossless=True)
    assert data is not None
    np.testing.assert_array_equal(media.read_frames(data), frames)


@pytest.mark.parametrize(
    ("height", "width", "pix_fmt"), [(48, 64, "yuv420p"), (47, 63, "yuv444p"), (48, 63, "yuv444p")]
)
def test_lossy_video_keeps_its_size_and_its_looks(height: int, width: int, pix_fmt: str) -> None:
    frames = scene(12, height, width)
    data = media.write_video(None, frames, 24, crf=12)
    assert data is not None
    info = media.probe(data, count=True)
    assert (info.height, info.width, info.frames, info.exact, info.codec) == (height, width, 12, True, "h264")
    assert info.fps == 24
    assert info.pix_fmt == pix_fmt
    assert psnr(media.read_frames(data), frames) > 34  # a swapped colour matrix or channel order falls far below


def test_colours_survive() -> None:
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [128, 64, 200]], np.uint8)
    for colour in colours:
        frames = np.broadcast_to(colour, (3, 32, 32, 3)).copy()
        data = media.write_video(None, frames, 10)
        assert data is not None
        assert np.abs(media.read_frames(data).astype(int) - frames).max() <= 4, colour


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("size", [48, 64, 256])
def test_equal_frames_give_equal_bytes(lossless: bool, size: int) -> None:
    frames = scene(40, size, size)
    digests = set()
    for fill in range(12):
        junk = [
            np.full(1 << n, 17 * fill, np.uint8) for n in range(10, 21)
        ]  # what x264 finds in memory must not matter
        del junk
        data = media.write_video(None, frames, Fraction(30000, 1001), lossless=lossless)
        assert data is not None
        digests.add(hashlib.sha256(data).hexdigest())
    assert len(digests) == 1


def test_frames_may_come_one_by_one() -> None:
    frames = scene(6)
    assert media.write_video(None, iter(frames), 30) == media.write_video(None, frames, 30)


def test_writing_to_a_path_is_whole_or_nothing(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "a.mp4"
    assert media.write_video(file, scene(4), 30) is None
    before = file.read_bytes()

    def broken():
        yield scene(1)[0]
        raise RuntimeError("the source died")

    with pytest.raises(RuntimeError, match="the source died"):
        media.write_video(file, broken(), 30)
    assert file.read_bytes() == before
    assert [item.name for item in file.parent.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        (np.zeros((0, 4, 4, 3), np.uint8), 30, "no frames"),
        (np.zeros((2, 4, 4, 3), np.float32), 30, "uint8"),
        (np.zeros((2, 4, 4, 4), np.uint8), 30, "uint8"),
        (np.zeros((2, 4, 4, 3), np.uint8), 0, "frame rate"),
        (np.zeros((2, 4, 4, 3), np.uint8), float("nan"), "frame rate"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 6, 3), np.uint8)], 30, "one size"),
    ],
)
def test_what_cannot_be_written_is_refused(frames, fps: float, message: str) -> None:
    with pytest.raises(WorldloomError, match=message):
        media.write_video(None, frames, fps)


SPANS = [(0, 5), (1, 2), (7, 31), (63, 66), (64, 70), (65, None), (90, 91), (99, 140), (119, 120)]


@pytest.mark.parametrize(
    ("codec", "container", "options"),
    [
        ("libx264", "mp4", {"bf": "3", "g": "24"}),
        ("libx264", "matroska", {"bf": "2", "g": "12"}),
        ("libx264", "mp4", {"bf": "3", "g": "24", "x264-params": "open-gop=1:b-pyramid=normal"}),
        ("libx264", "mp4", {"bf": "0", "g": "30", "x264-params": "intra-refresh=1"}),
        ("libx264", "mpegts", {"bf": "2", "g": "24"}),
        ("libx265", "mp4", {"g": "24", "x265-params": "log-level=none:pools=none:frame-threads=1"}),
        ("libvpx-vp9", "webm", {"g": "20", "lag-in-frames": "10", "auto-alt-ref": "1", "cpu-used": "8"}),
        ("mpeg4", "avi", {"bf": "2", "g": "12"}),
        ("mpeg2video", "mpeg", {"bf": "2", "g": "12"}),
    ],
)
def test_spans_are_frame_exact(codec: str, container: str, options: dict[str, str]) -> None:
    """Every span, seeking or not, equals the same slice of a whole decode."""
    data = encode(scene(120, 64, 96), codec, container, options)
    whole = media.read_frames(data)
    assert len(whole) in (119, 120)  # MPEG-PS may lose its last B-frame
    for start, end in SPANS:
        if start < len(whole):
            np.testing.assert_array_equal(
                media.read_frames(data, start, end), whole[start:end], err_msg=str((start, end))
            )
    np.testing.assert_array_equal(media.read_frames(data, 70, 110, stride=7), whole[70:110:7])


def test_seeking_is_used_and_saves_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    from worldloom import decoding

    data = encode(scene(400, 32, 32), "libx264", "mp4", {"bf": "2", "g": "20"})
    decoded = []
    original = decoding.Reader.frames

    def counting(self):
        for frame in original(self):
            decoded.append(frame)
            yield frame

    monkeypatch.setattr(decoding.Reader, "frames", counting)
    media.read_frames(data, 390, 395)
    assert len(decoded) < 64 + 40  # the first 64 prove that seeking is exact, then one group of pictures


def test_time_stamps_that_lie_do_not_shift_frames() -> None:
    """A file whose packets claim decode times as presentation times: spans still count decoded frames."""
    data = encode(scene(120, 64, 96), "libx264", "mp4", {"bf": "3", "g": "24"})
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(source.streams.video[0])):
            if packet.size:
                packet.pts = packet.dts = number * 512
                packet.stream = stream
                out.mux(packet)
    lying = buffer.getvalue()
    whole = media.read_frames(lying)
    np.testing.assert_array_equal(media.read_frames(lying, 70, 75), whole[70:75])


def test_frames_that_an_edit_list_hides_are_not_counted() -> None:
    """Cut by a player without re-encoding: the packets before the cut are there, decode, and are not shown."""
    data = encode(scene(140, 64, 96), "libx264", "mp4", {"bf": "2", "g": "20"})
    whole = media.read_frames(data)
    buffer = io.BytesIO()
    with (
        av.open(io.BytesIO(data)) as source,
        av.open(buffer, "w", format="mp4", options={"avoid_negative_ts": "disabled"}) as out,
    ):
        stream = out.add_stream_from_template(source.streams.video[0])
        shift = 7 * int(1 / (25 * source.streams.video[0].time_base))
        for packet in source.demux(source.streams.video[0]):
            if packet.size and packet.pts is not None and packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                out.mux(packet)
    shown = media.read_frames(buffer.getvalue())
    np.testing.assert_array_equal(shown, whole[7:])
    for start in (64, 66, 100):
        np.testing.assert_array_equal(media.read_frames(buffer.getvalue(), start, start + 3), shown[start : start + 3])


def test_variable_frame_rate_counts_frames() -> None:
    frames = scene(30)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as out:
        stream = out.add_stream("libx264", rate=1000, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv444p"
        for i, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = i * i * 7 + i  # ever slower
            picture.time_base = Fraction(1, 1000)
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
    got = media.read_frames(buffer.getvalue())
    assert len(got) == 30
    assert psnr(got, frames) > 40
    np.testing.assert_array_equal(media.read_frames(buffer.getvalue(), 11, 13), got[11:13])


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (270, 3)])
def test_rotated_video_is_turned_upright(degrees: int, turns: int) -> None:
    frames = scene(5, 32, 48)
    data = media.write_video(None, frames, 30, lossless=True)
    assert data is not None
    rotated = turned(data, degrees)
    expected = np.rot90(frames, turns, axes=(1, 2))
    np.testing.assert_array_equal(media.read_frames(rotated), expected)
    info = media.probe(rotated)
    assert (info.height, info.width) == expected.shape[1:3]
    assert info.rotation == degrees


def test_no_time_stamps() -> None:
    """A bare H.264 stream has none at all."""
    frames = scene(80)
    data = encode(frames, "libx264", "h264", {"bf": "2", "g": "24"})
    whole = media.read_frames(data)
    assert len(whole) == 80
    np.testing.assert_array_equal(media.read_frames(data, 70, 74), whole[70:74])


def test_size_is_fit(tmp_path: Path) -> None:
    frames = scene(4, 48, 80)
    file = tmp_path / "a.mp4"
    media.write_video(file, frames, 30, lossless=True)
    np.testing.assert_array_equal(media.read_frames(file, size=(16, 16)), media.fit(frames, (16, 16)))


def test_fit_crops_the_centre_and_averages() -> None:
    frames = np.zeros((1, 4, 8, 3), np.uint8)
    frames[0, :, 2:6] = 200  # exactly the centre square
    np.testing.assert_array_equal(media.fit(frames, (2, 2)), np.full((1, 2, 2, 3), 200, np.uint8))
    checker = np.indices((8, 8)).sum(0) % 2 * 255
    small = media.fit(np.repeat(checker[None, ..., None], 3, 3).astype(np.uint8), (4, 4))
    assert np.abs(small.astype(int) - 127).max() <= 1  # area averaging, not picking


@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1)
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_resize_agrees_with_plain_numpy(h: int, w: int, height: int, width: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)
    with_cv2, without = media.resize(image, (height, width)), media._resize_numpy(image, height, width)
    assert with_cv2.shape == without.shape == (height, width, 3)
    if height <= h and width <= w:
        assert np.abs(with_cv2.astype(int) - without).max() <= 1


def test_every_pixel_value_survives_the_tensor() -> None:
    values = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 2, 8, 16, 3)
    video = media.to_tensor(values)
    assert video.shape == (1, 3, 2, 8, 16)
    assert video.dtype == torch.float32
    assert (float(video.min()), float(video.max())) == (-1.0, 1.0)
    np.testing.assert_array_equal(media.to_frames(video), values)
    np.testing.assert_array_equal(media.to_frames(video.to(torch.float64)), values)


def test_tensor_axes_and_bounds() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 3), dtype=np.uint8)
    video = media.to_tensor(frames)
    assert float(video[1, 2, 0, 3, 4]) == pytest.approx(frames[1, 0, 3, 4, 2] / 127.5 - 1)
    assert media.to_tensor(frames[0]).shape == (1, 3, 3, 4, 5)
    assert media.to_frames(torch.full((1, 3, 1, 1, 1), 7.0)).max() == 255
    assert media.to_frames(torch.full((1, 3, 1, 1, 1), -7.0)).max() == 0
    frozen = frames.copy()
    frozen.setflags(write=False)
    media.to_tensor(frozen).add_(1)
    np.testing.assert_array_equal(frozen, frames)
    with pytest.raises(WorldloomError, match="not finite"):
        media.to_frames(torch.full((1, 3, 1, 1, 1), float("nan")))
    with pytest.raises(WorldloomError, match="uint8"):
        media.to_tensor(frames.astype(np.float32))


def test_images_round_trip(tmp_path: Path) -> None:
    image = scene(1)[0]
    media.write_image(tmp_path / "a.png", image)
    np.testing.assert_array_equal(media.read_image(tmp_path / "a.png"), image)
    media.write_image(tmp_path / "a.jpg", image)
    assert psnr(media.read_image(tmp_path / "a.jpg"), image) > 30
    (tmp_path / "b.png").write_text("hello")
    with pytest.raises(WorldloomError, match="not an image"):
        media.read_image(tmp_path / "b.png")


def test_gif_and_contact_sheet(tmp_path: Path) -> None:
    frames = scene(6, 20, 30)
    media.write_gif(tmp_path / "a.gif", frames, 10)
    info = media.probe(tmp_path / "a.gif", count=True)
    assert (info.codec, info.frames, info.height, info.width) == ("gif", 6, 20, 30)
    sheet = media.contact_sheet([frames, frames[:3]], every=2, gap=1)
    assert sheet.shape == (2 * 21 - 1, 3 * 31 - 1, 3)
    np.testing.assert_array_equal(sheet[:20, 31:61], frames[2])
    assert (sheet[21:, 62:] == 255).all()  # the shorter row ends in white


@pytest.mark.slow
def test_real_videos() -> None:
    """Films of real cameras and encoders; WORLDLOOM_REAL_VIDEOS names a folder of them."""
    folder = os.environ.get("WORLDLOOM_REAL_VIDEOS", "")
    files = sorted(item for item in Path(folder).iterdir() if item.is_file()) if folder else []
    if not files:
        pytest.skip("WORLDLOOM_REAL_VIDEOS names no folder with videos")
    for file in files:
        info = media.probe(file, count=True)
        whole = media.read_frames(file, size=(48, 64))
        assert len(whole) == info.frames > 1, file.name
        assert whole.std() > 5, file.name
        for start, end in [(0, 3), (len(whole) // 2, len(whole) // 2 + 3), (len(whole) - 2, len(whole))]:
            got = media.read_frames(file, start, end, size=(48, 64))
            np.testing.assert_array_equal(got, whole[start:end], err_msg=f"{file.name} [{start}, {end})")
        assert media.read_frames(file, 0, 1).shape == (1, info.height, info.width, 3)


# -- taking a video as it is ------------------------------------------------------------------------------------------


def test_a_video_is_copied_bit_by_bit() -> None:
    frames = scene(30)
    data = media.write_video(None, frames, 25)
    assert data is not None
    copied = media.copy_video(data, 30, 25, (48, 64))
    assert copied is not None
    np.testing.assert_array_equal(media.read_frames(copied), media.read_frames(data))
    assert media.copy_video(data, 30, 25, (48, 64)) == copied
    assert media.copy_video(copied, 30, 25, (48, 64)) == copied
    info = media.probe(copied, count=True)
    assert (info.frames, info.fps, info.codec, info.has_audio) == (30, 25, "h264", False)


def test_what_is_not_that_video_is_not_copied() -> None:
    frames = scene(30)
    data = media.write_video(None, frames, 25)
    exact = media.write_video(None, frames, 25, lossless=True)
    assert data is not None
    assert exact is not None
    assert media.copy_video(data, 30, 25, (48, 64)) is not None
    assert media.copy_video(data, 29, 25, (48, 64)) is None
    assert media.copy_video(data, 30, 24, (48, 64)) is None
    assert media.copy_video(data, 30, 25, (64, 48)) is None
    assert media.copy_video(turned(data, 90), 30, 25, (48, 64)) is None
    assert media.copy_video(exact, 30, 25, (48, 64)) is None
    assert media.copy_video(encode(frames, "mpeg4", "avi", {}), 30, 25, (48, 64)) is None


# -- pictures for the encoder, without RGB ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoder", "pixels", "colorspace"),
    [("libx264", "yuv420p", 1), ("libx264", "yuv422p", 6), ("libx264", "yuv420p10le", 1), ("mjpeg", "yuvj420p", 5)],
)
def test_pictures_for_the_encoder_are_stored_as_their_rgb_would_be(encoder: str, pixels: str, colorspace: int) -> None:
    frames = scene(6, 96, 160)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as out:
        stream = out.add_stream(encoder, rate=25, options={"crf": "8"} if encoder == "libx264" else {"q": "2"})
        stream.height, stream.width, stream.pix_fmt = 96, 160, pixels
        stream.codec_context.colorspace = colorspace
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            out.mux(stream.encode(picture.reformat(format=pixels, dst_colorspace=colorspace)))
        out.mux(stream.encode(None))
    data = buffer.getvalue()
    made = [for_encoder(picture, (48, 80)) for picture in media.iter_decoded(data)]
    assert all(picture is not None for picture in made)
    stored = media.write_video(None, made, 25, crf=4)
    again = media.write_video(None, media.iter_frames(data, size=(48, 80)), 25, crf=4)
    assert stored is not None
    assert again is not None
    assert psnr(media.read_frames(stored), media.read_frames(again)) > 36
    info = media.probe(stored)
    assert (info.frames, info.fps, info.pix_fmt, info.height, info.width) == (6, 25, "yuv420p", 48, 80)


def test_pictures_that_must_be_cut_turned_or_odd_go_through_rgb() -> None:
    data = media.write_video(None, scene(2), 25)
    assert data is not None
    picture = next(media.iter_decoded(data))
    assert for_encoder(picture, (24, 32)) is not None
    assert for_encoder(picture, (24, 24)) is None
    assert for_encoder(picture, (27, 36)) is None
    assert for_encoder(next(media.iter_decoded(turned(data, 90))), (24, 32)) is None
