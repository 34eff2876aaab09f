"""Video that is not what it claims to be: a named error or the frames that can be had, never a crash or a leak."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import tempfile
import wave
from pathlib import Path

import numpy as np
import pytest

from worldloom import media
from worldloom.errors import WorldloomError

av = pytest.importorskip("av")

ONE_FRAME = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)


def video(count: int = 30, size: int = 32) -> bytes:
    frames = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    data = media.write_video(None, frames, 30, lossless=True)
    assert data is not None
    return data


def refused(source, message: str, **kwargs) -> str:
    """Both doors refuse `source` with an error that says `message` and names it; returns the error."""
    with pytest.raises(WorldloomError, match=message) as caught:
        media.probe(source, **kwargs)
    with pytest.raises(WorldloomError, match=message):
        media.read_frames(source, **kwargs)
    if isinstance(source, Path):
        assert source.name in str(caught.value)
    return str(caught.value)


def test_not_a_video(tmp_path: Path) -> None:
    text = tmp_path / "story.mp4"
    text.write_text("Once upon a time there was a file with the wrong name.\n" * 100)
    refused(text, "not a video")
    noise = tmp_path / "noise.mp4"
    noise.write_bytes(np.random.default_rng(0).bytes(100_000))
    refused(noise, "not a video|no frame|no video")
    picture = tmp_path / "picture.png"
    media.write_image(picture, ONE_FRAME[0])
    refused(picture, "not a video")


def test_nothing_there(tmp_path: Path) -> None:
    empty = tmp_path / "empty.mp4"
    empty.touch()
    refused(empty, "empty")
    refused(b"", "empty")
    refused(tmp_path / "missing.mp4", "does not exist")
    refused(tmp_path, "is a folder")
    refused("http://127.0.0.1:9/a.mp4", "does not exist")
    refused("pipe:0", "does not exist")
    refused("concat:a.mp4|b.mp4", "does not exist")
    refused("a\0b.mp4", "does not exist|cannot be looked up")
    refused(Path("/dev/zero"), "not a regular file")


def test_dangling_and_circular_links(tmp_path: Path) -> None:
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "gone.mp4")
    refused(tmp_path / "dangling.mp4", "does not exist")
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    refused(tmp_path / "loop.mp4", "does not exist|cannot be looked up")


def test_unreadable_file() -> None:
    """Read by an unprivileged user in a process of its own, for the superuser may read everything."""
    code = (
        "import os, sys\n"
        "from worldloom import media\nimport av\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "try: media.probe(sys.argv[1])\n"
        "except media.WorldloomError as error: print(error)\n"
    )
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path: that user may not enter it
        Path(folder).chmod(0o755)
        file = Path(folder) / "secret.mp4"
        file.write_bytes(video(2))
        file.chmod(0)
        done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, timeout=120)
    assert "may not be read" in done.stdout, done.stdout + done.stderr
    assert "secret.mp4" in done.stdout


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_truncated_file(container: str, tmp_path: Path) -> None:
    whole = media.read_frames(video())
    data = video()
    if container == "mkv":
        buffer = io.BytesIO()
        with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format="matroska") as out:
            stream = out.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(source.streams.video[0]):
                if packet.size:
                    packet.stream = stream
                    out.mux(packet)
        data = buffer.getvalue()
    file = tmp_path / f"cut.{container}"
    file.write_bytes(data[: len(data) // 2])
    if container == "mp4":  # the table of contents is at the end: nothing can be had
        refused(file, "not a video")
    else:
        got = media.read_frames(file)
        assert 5 < len(got) < 30
        np.testing.assert_array_equal(got[:-1], whole[: len(got) - 1])  # the last one may be damaged
    for cut in (1, 8, 40, 200):
        file.write_bytes(data[:cut])
        refused(file, "not a video|no frame")


def test_damage_in_the_middle() -> None:
    """Broken packets cost frames, not the file; and never the process."""
    data = bytearray(video(60))
    rng = np.random.default_rng(3)
    middle = len(data) // 2
    data[middle : middle + 3000] = rng.bytes(3000)
    got = media.read_frames(bytes(data))
    assert 20 <= len(got) <= 60
    assert got.shape[1:] == (32, 32, 3)


def test_random_damage_never_crashes() -> None:
    data = video(10)
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(60):
        broken = bytearray(data)
        for place in rng.integers(0, len(data), 40):
            broken[place] = rng.integers(256)
        try:
            outcomes.add(media.read_frames(bytes(broken)).shape[1:] != ())
        except WorldloomError:
            outcomes.add(False)
    assert outcomes  # anything but another exception, which would have ended the test


def test_small_and_odd_sizes() -> None:
    for height, width in [(1, 10), (2, 5), (63, 47), (1, 1)]:
        frames = np.random.default_rng(0).integers(0, 256, (3, height, width, 3), dtype=np.uint8)
        data = media.write_video(None, frames, 30, lossless=True)
        assert data is not None
        info = media.probe(data)
        assert (info.height, info.width) == (height, width)
        np.testing.assert_array_equal(media.read_frames(data), frames)


def test_large_frames_and_the_pixel_limit() -> None:
    frames = np.zeros((1, 4096, 4096, 3), np.uint8)
    frames[0, ::64] = 255
    data = media.write_video(None, frames, 30)
    assert data is not None
    assert media.read_frames(data, size=(32, 32)).shape == (1, 32, 32, 3)
    refused(data, "limit", limits=media.Limits(max_pixels=4096 * 4095))


def test_declared_size_beyond_the_limit_allocates_nothing() -> None:
    """A header that claims 65535 x 65535 is refused by the claim; decoding it would ask for 12 GiB a frame."""
    data = bytearray(video(2))
    place = data.index(b"avc1", data.index(b"stsd"))
    data[place + 4 + 24 : place + 4 + 28] = struct.pack(">HH", 65535, 65535)
    header = data.index(b"tkhd") + 4 + 76
    data[header : header + 8] = struct.pack(">II", 65535 << 16, 65535 << 16)
    code = (
        "import resource, sys\n"
        "from worldloom import media\nimport av\n"
        "resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))\n"
        "try: print(media.read_frames(sys.stdin.buffer.read()).shape)\n"
        "except media.WorldloomError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=bytes(data), capture_output=True, timeout=120)
    # The codec's own headers tell the true size, and it wins; otherwise the limit speaks.
    assert b"(2, 32, 32, 3)" in done.stdout or b"limit" in done.stdout, done.stdout + done.stderr
    y4m = b"YUV4MPEG2 W65535 H65535 F25:1 Ip A1:1 C420\nFRAME\n" + bytes(1000)
    done = subprocess.run([sys.executable, "-c", code], input=y4m, capture_output=True, timeout=120)
    assert b"limit" in done.stdout or b"not a video" in done.stdout, done.stdout + done.stderr


def test_frame_second_and_byte_limits(tmp_path: Path) -> None:
    file = tmp_path / "a.mp4"
    file.write_bytes(video(30))
    refused(file, "bytes", limits=media.Limits(max_bytes=1000))
    refused(file, "seconds", limits=media.Limits(max_seconds=0.5))
    refused(file, "seconds of work", limits=media.Limits(max_work_seconds=-1.0))
    with pytest.raises(WorldloomError, match="20 frames"):
        media.read_frames(file, limits=media.Limits(max_frames=20))
    assert len(media.read_frames(file, end=20, limits=media.Limits(max_frames=21))) == 20
    with pytest.raises(WorldloomError, match="memory"):
        media.read_frames(file, limits=media.Limits(max_array_bytes=10 * 32 * 32 * 3))
    frames = media.iter_frames(file, limits=media.Limits(max_array_bytes=10))
    assert sum(1 for _ in frames) == 30  # streaming holds one frame at a time


def test_spans_that_make_no_sense() -> None:
    data = video(5)
    for start, end, stride in [(-1, 3, 1), (3, 3, 1), (4, 2, 1), (0, 3, 0)]:
        with pytest.raises(WorldloomError, match="span"):
            media.read_frames(data, start, end, stride=stride)
    with pytest.raises(WorldloomError, match="no frame in that span"):
        media.read_frames(data, 5, 9)
    assert len(media.read_frames(data, 3, 99)) == 2


def test_sound_only(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    refused(buffer.getvalue(), "no video")
    with wave.open(str(tmp_path / "a.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    refused(tmp_path / "a.wav", "not a video")


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A real video beside the hostile file, which must not be reached through it."""
    file = tmp_path / "secret.mp4"
    file.write_bytes(video(3))
    (tmp_path / "secret.ts").write_bytes(transport_stream())
    return file


def transport_stream() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mpegts") as out:
        stream = out.add_stream("mpeg2video", rate=25)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for i in range(5):
            picture = av.VideoFrame.from_ndarray(ONE_FRAME[0], format="rgb24")
            picture.pts = i
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def scripts(secret: Path) -> dict[str, str]:
    """Files that make FFmpeg open other files. Each one opens when nothing forbids it; see the test below."""
    ts = secret.with_suffix(".ts").as_posix()
    hls = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:1.0,\nfile://{ts}\n#EXT-X-ENDLIST\n"
    return {
        "playlist.m3u8": hls,
        "playlist.mp4": hls,
        "list.ffconcat": f"ffconcat version 1.0\nfile '{secret.name}'\n",
        "list.mp4": f"ffconcat version 1.0\nfile '{secret.name}'\n",
    }


@pytest.mark.parametrize("name", ["playlist.m3u8", "playlist.mp4", "list.ffconcat", "list.mp4"])
def test_playlists_and_scripts_open_nothing(name: str, secret: Path) -> None:
    file = secret.with_name(name)
    file.write_text(scripts(secret)[name])
    if name.endswith(("m3u8", "ffconcat")):
        # The attack is real: PyAV on its own follows the script.
        with av.open(str(file)) as container:
            assert next(container.decode(video=0)).width == 32
    refused(file, "not a video")
    refused(file.read_bytes(), "not a video")


def test_image_patterns_open_nothing(tmp_path: Path) -> None:
    for i in range(3):
        media.write_image(tmp_path / f"f{i}.png", ONE_FRAME[0])
    pattern = tmp_path / "f%d.png"
    with av.open(str(pattern)) as container:
        assert next(container.decode(video=0)).width == 32
    refused(pattern, "does not exist")
    pattern.write_bytes(b"x")  # even where a file of that very name exists
    refused(pattern, "not a video")


def test_decoding_before_a_fork_does_not_hang_the_child(tmp_path: Path) -> None:
    """A PyAV decoder with threads in the parent makes forked data loader workers hang; ours has none."""
    file = tmp_path / "a.mp4"
    frames = np.random.default_rng(0).integers(0, 256, (40, 256, 256, 3), dtype=np.uint8)
    media.write_video(file, frames, 30)
    code = (
        "import os, sys, threading\n"
        "from worldloom import media\n"
        "import av, numpy\n"
        "threads = len(os.listdir('/proc/self/task')) if sys.platform == 'linux' else 0\n"
        "held = media.iter_frames(sys.argv[1]); next(held)\n"
        "assert threads in (0, len(os.listdir('/proc/self/task'))), 'the decoder started threads'\n"
        "for _ in range(4):\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        os._exit(0 if len(media.read_frames(sys.argv[1])) == 40 else 1)\n"
        "    assert os.waitpid(pid, 0)[1] == 0\n"
        "print(sum(1 for _ in held))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(file)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "39", done.stderr
