from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from curation_videos import CODECS, scene, write

from worldloom import WorldloomError, media
from worldloom.artifacts import Store
from worldloom.config import load
from worldloom.shards import open_dataset
from worldloom_curation import CurateConfig, pipeline
from worldloom_curation.config import load as load_config
from worldloom_curation.ledger import accounts, load_ledger, rows_about
from worldloom_curation.pipeline import run

OUTPUTS = ("ledger.parquet", "dataset.json", "config.toml")


def digests(out: Path) -> dict[str, str]:
    """Digest of every output that must be the same for the same input."""
    files = [*(out / name for name in OUTPUTS), *sorted((out / "shards").iterdir())]
    return {file.relative_to(out).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def settings(*overrides: str) -> CurateConfig:
    return load(CurateConfig, overrides=overrides)


def counts(summary: dict[str, Any]) -> dict[str, tuple[int, int]]:
    return {stage: (work["cached"], work["computed"]) for stage, work in summary["work"].items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six codecs, cuts, a still, a copy, the same frames in another container."""
    root = tmp_path_factory.mktemp("videos")
    for number, codec in enumerate(sorted(CODECS)):
        write(root / codec, np.concatenate([scene(10 * number, 24), scene(10 * number + 1, 30)]), codec)
    still = np.repeat(scene(100, 1), 40, 0)
    write(root / "deep" / "still", np.concatenate([scene(101, 20), still]), "ffv1")
    shutil.copy(root / "h264.mp4", root / "h264_copy.mp4")
    with av.open(str(root / "h264.mp4")) as source, av.open(str(root / "remuxed.mkv"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return root


@pytest.fixture(scope="module")
def curated(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("curated")
    run(folder, out)
    return out


def test_every_codec_gives_the_clips_between_its_cuts(curated: Path) -> None:
    spans = {(clip.source.partition(".")[0], clip.start, clip.end) for clip in open_dataset(curated).clips()}
    expected = {(codec, *span) for codec in CODECS for span in ((0, 24), (24, 54))}
    assert spans == expected | {("deep/still", 0, 20)}


def test_a_clip_shows_the_frames_of_its_span(folder: Path, curated: Path) -> None:
    for sample in open_dataset(curated):
        clip = sample.clip
        assert sample.video is not None
        stored = media.read_frames(sample.video)
        original = media.read_frames(folder / clip.source, clip.start, clip.end)
        assert stored.shape == original.shape == (clip.frames, clip.height, clip.width, 3)
        assert np.abs(stored.astype(int) - original).mean() < 4, clip.source
        assert clip.source_digest == hashlib.sha256((folder / clip.source).read_bytes()).hexdigest()


def test_the_still_and_the_copies_are_dropped_and_say_so(curated: Path) -> None:
    rows = load_ledger(curated)
    [still] = [row for row in rows if row.stage == "motion" and not row.kept]
    assert (still.source, still.start, still.end) == ("deep/still.mkv", 20, 60)
    assert still.value is not None
    assert still.threshold == CurateConfig().motion.threshold
    assert still.value < still.threshold
    copies = {row.source: row.reason for row in rows if row.stage == "duplicates" and not row.kept}
    assert copies.keys() == {"h264_copy.mp4", "remuxed.mkv"}
    assert copies["h264_copy.mp4"] == "the file is a copy of h264.mp4"
    assert copies["remuxed.mkv"].startswith("the same frames as h264.mp4 [24, 54)")


def test_every_frame_is_accounted_for(folder: Path, curated: Path) -> None:
    every = accounts(load_ledger(curated))
    assert len(every) == sum(path.is_file() for path in folder.rglob("*"))
    for name, account in every.items():
        assert account.frames == sum(1 for _ in media.iter_frames(folder / name)), name
        assert account.balanced, (name, account)
    assert every["deep/still.mkv"].kept == 20
    assert every["h264_copy.mp4"].dropped == 54


def test_a_ledger_that_loses_a_span_does_not_balance(curated: Path) -> None:
    rows = [row for row in load_ledger(curated) if not (row.stage == "motion" and not row.kept)]
    assert [name for name, account in accounts(rows).items() if not account.balanced] == ["deep/still.mkv"]


def test_the_same_run_again_computes_nothing_and_changes_nothing(folder: Path, curated: Path) -> None:
    before = digests(curated)
    summary = run(folder, curated)
    assert {computed for _, computed in counts(summary).values()} == {0}
    assert digests(curated) == before


def test_a_changed_threshold_decides_again_without_decoding(folder: Path, tmp_path: Path) -> None:
    first = run(folder, tmp_path)
    assert counts(first)["motion"] == (0, 18)
    motions = [row.value for row in load_ledger(tmp_path) if row.stage == "motion" and row.value is not None]
    threshold = sorted(motions)[4] + 1e-6
    under = sum(value < threshold for value in motions)  # a copy moves as much as its original
    second = run(folder, tmp_path, settings(f"motion.threshold={threshold}"))
    work = counts(second)
    assert work["probe"] == (8, 0)  # eight contents: the copy is looked at once
    assert work["scan"] == (8, 0)
    assert work["split"] == (9, 0)
    assert work["motion"] == (0, 18)
    kept_by_motion = 18 - second["dropped"]["motion"]
    assert second["dropped"]["motion"] == under >= 5
    assert work["duplicates"] == (0, kept_by_motion)
    assert work["write"] == (second["clips"], 0)
    assert second["clips"] < first["clips"]
    fresh = tmp_path / "fresh"
    run(folder, fresh, settings(f"motion.threshold={threshold}"))
    assert digests(fresh) == digests(tmp_path)


def test_a_changed_measurement_is_measured_again_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path)
    work = counts(run(folder, tmp_path, settings("motion.gap=0.5")))
    assert work["probe"] == (8, 0)
    assert work["scan"] == (0, 8)
    assert work["split"] == (9, 0)
    assert work["motion"] == (0, 18)
    work = counts(run(folder, tmp_path, settings("motion.gap=0.5", "write.crf=30")))
    assert work["duplicates"][1] == work["scan"][1] == work["motion"][1] == 0
    assert work["write"] == (0, 13)


def test_a_new_file_is_all_that_is_looked_at(folder: Path, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(folder, videos)
    run(videos, tmp_path / "out")
    write(videos / "aaa", scene(77, 40))
    work = counts(run(videos, tmp_path / "out"))
    assert work["scan"] == (8, 1)
    assert work["motion"] == (18, 1)
    assert work["write"] == (13, 1)
    run(videos, tmp_path / "fresh")
    assert digests(tmp_path / "fresh") == digests(tmp_path / "out")


def test_workers_give_the_same_bytes(folder: Path, curated: Path, tmp_path: Path) -> None:
    summary = run(folder, tmp_path, settings("workers=2"))
    assert counts(summary)["scan"] == (0, 8)
    one, two = digests(curated), digests(tmp_path)
    assert one.pop("config.toml") != two.pop("config.toml")
    assert one == two


def test_a_small_shard_holds_few_clips(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path, settings("write.samples_per_shard=4"))
    assert [shard.samples for shard in open_dataset(tmp_path).index.shards] == [4, 4, 4, 1]
    run(folder, tmp_path)
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["000000.tar"]


def test_bad_files_are_rows_and_the_rest_is_kept(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    good = write(videos / "good", scene(1, 40))
    (videos / "text.mp4").write_text("not a video, whatever its name says")
    (videos / "empty.mp4").touch()
    (videos / "cut.mp4").write_bytes(good.read_bytes()[:1500])
    avi = write(videos / "short", scene(2, 60), "mjpeg")
    avi.write_bytes(avi.read_bytes()[: avi.stat().st_size * 2 // 3])
    write(videos / "tiny", scene(3, 40, 10, 10), "ffv1")
    write(videos / "huge", np.zeros((2, 4096, 4096, 3), np.uint8), "ffv1")
    write(videos / "brief", scene(4, 5))
    (videos / "gone.mp4").symlink_to(videos / "nowhere.mp4")
    (videos / "loop").symlink_to(videos)
    os.mkfifo(videos / "pipe.mp4")
    (videos / ".hidden.mp4").write_text("left out")
    summary = run(videos, tmp_path / "out")
    assert summary["clips"] == 2
    rows = load_ledger(tmp_path / "out")
    lost = {row.source: row for row in rows if not row.kept}
    kept = {row.source for row in rows if row.stage == "write" and row.kept}
    assert kept == {"good.mp4", "short.avi"}
    assert {row.source for row in rows} == {path.name for path in videos.iterdir()} - {".hidden.mp4"}
    assert {name: row.stage for name, row in lost.items() if row.failed} == dict.fromkeys(
        ("text.mp4", "empty.mp4", "cut.mp4", "huge.mkv", "gone.mp4", "loop", "pipe.mp4"), "probe"
    )
    assert "not a video" in lost["text.mp4"].reason
    assert "empty" in lost["empty.mp4"].reason
    assert "within the limit" in lost["huge.mkv"].reason
    assert lost["gone.mp4"].reason == "the file cannot be read: No such file or directory"
    assert lost["loop"].reason == "a link to a folder is not followed"
    assert lost["pipe.mp4"].reason == "not a regular file"
    assert (lost["tiny.mkv"].measure, lost["tiny.mkv"].value, lost["tiny.mkv"].threshold) == ("short side", 10.0, 32.0)
    assert lost["brief.mp4"].stage == "split"
    [probe] = [row for row in rows if row.source == "short.avi" and row.stage == "probe"]
    assert probe.kept
    assert 30 < probe.end < 50
    assert str(tmp_path) not in json.dumps([row.reason for row in rows])
    assert all(account.balanced for account in accounts(rows).values())


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that opens and cannot be read")
def test_a_file_that_fails_while_it_is_read_is_a_row(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    write(videos / "good", scene(1, 40))
    (videos / "broken.mp4").symlink_to("/proc/self/mem")
    run(videos, tmp_path / "out")
    [row] = rows_about(load_ledger(tmp_path / "out"), "broken.mp4")
    assert row.failed
    assert row.reason == "the file cannot be read: Input/output error"


def test_an_empty_folder_a_missing_one_and_the_same_one_are_errors(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(WorldloomError, match="the folder holds no files"):
        run(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(WorldloomError, match="there is nothing to curate at this path"):
        run(tmp_path / "missing", tmp_path / "out")
    write(tmp_path / "empty" / "a", scene(1, 40))
    with pytest.raises(WorldloomError, match="the output folder is the source folder"):
        run(tmp_path / "empty", tmp_path / "empty")
    assert not (tmp_path / "out").exists()


def test_a_run_that_keeps_nothing_says_why_and_leaves_no_dataset(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path)
    with pytest.raises(WorldloomError, match="18 dropped by motion"):
        run(folder, tmp_path, settings("motion.threshold=255"))
    assert accounts(load_ledger(tmp_path))["h264.mp4"].dropped == 54
    assert not {"dataset.json", "summary.json", "shards"} & {path.name for path in tmp_path.iterdir()}


def test_one_file_and_an_output_inside_the_source(tmp_path: Path) -> None:
    video = write(tmp_path / "a", scene(1, 40))
    assert run(video, tmp_path / "one")["sources"] == 1
    shutil.rmtree(tmp_path / "one")
    for _ in range(2):
        assert run(tmp_path, tmp_path / "out")["sources"] == 1


def test_thinned_clips_of_one_plus_four_k_frames(tmp_path: Path) -> None:
    write(tmp_path / "videos" / "a", scene(1, 75), fps=30)
    run(tmp_path / "videos", tmp_path / "out", settings("split.fps=10", "split.frames_multiple=4"))
    [sample] = open_dataset(tmp_path / "out")
    assert sample.video is not None
    assert len(media.read_frames(sample.video)) == 25
    clip = sample.clip
    assert (clip.fps, clip.step, clip.start, clip.end, clip.frames) == (10.0, 3, 0, 75, 25)
    assert open_dataset(tmp_path / "out").index.frames == 25
    stored, original = media.read_frames(sample.video), media.read_frames(tmp_path / "videos" / "a.mp4", stride=3)
    assert np.abs(stored.astype(int) - original[:25]).mean() < 4


def test_videos_are_shrunk_to_the_short_side(tmp_path: Path) -> None:
    write(tmp_path / "videos" / "a", scene(1, 20, 120, 200))
    run(tmp_path / "videos", tmp_path / "out", settings("write.short_side=64"))
    [sample] = open_dataset(tmp_path / "out")
    assert sample.video is not None
    info = media.probe(sample.video)
    assert (info.height, info.width) == (sample.clip.height, sample.clip.width) == (64, 106)


def test_videos_are_cut_to_a_shape(tmp_path: Path) -> None:
    path = write(tmp_path / "videos" / "a", scene(1, 20, 120, 200))
    run(tmp_path / "videos", tmp_path / "out", settings("write.aspect=1:1"))
    [sample] = open_dataset(tmp_path / "out")
    assert sample.video is not None
    stored, original = media.read_frames(sample.video), media.read_frames(path)
    assert stored.shape == (20, 120, 120, 3)
    assert np.abs(stored.astype(int) - original[:, :, 40:160]).mean() < 4


def test_a_file_that_fits_is_not_encoded_again(tmp_path: Path) -> None:
    path = write(tmp_path / "videos" / "a", scene(1, 40, 120, 200))
    taken, again = tmp_path / "taken", tmp_path / "again"
    run(tmp_path / "videos", taken, settings())
    run(tmp_path / "videos", again, settings("write.copy=false"))
    [sample], [other] = open_dataset(taken), open_dataset(again)
    assert sample.video is not None
    assert other.video is not None
    assert sample.clip == other.clip
    original = media.read_frames(path)
    np.testing.assert_array_equal(media.read_frames(sample.video), original)
    assert not np.array_equal(media.read_frames(other.video), original)
    assert media.probe(sample.video).fps == 20


@pytest.mark.parametrize(
    ("codec", "overrides"),
    [
        ("mpeg4", []),  # another codec
        ("h264", ["write.short_side=64"]),  # another size
        ("h264", ["split.fps=10"]),  # another rate
        ("h264", ["split.max_frames=20"]),  # cut in two
    ],
)
def test_a_file_that_does_not_fit_is_encoded(codec: str, overrides: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "videos" / "a", scene(1, 40, 120, 200), codec)
    run(tmp_path / "videos", tmp_path / "out", settings(*overrides))
    sample = next(iter(open_dataset(tmp_path / "out")))
    assert sample.video is not None
    stored, original = media.read_frames(sample.video), media.read_frames(path)
    assert not np.array_equal(stored, original[: len(stored)])


def test_copies_that_are_allowed_are_still_one_clip(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path, settings("duplicates.drop=false"))
    rows = load_ledger(tmp_path)
    dropped = {row.source for row in rows if row.stage == "write" and not row.kept}
    assert dropped == {"h264_copy.mp4"}  # the same clip ids; the remuxed file has its own
    assert all(account.balanced for account in accounts(rows).values())


def test_damaged_cache_files_are_computed_again(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path)
    before = digests(tmp_path)
    for path in (tmp_path / ".cache").rglob("*"):
        if path.suffix in (".json", ".npz"):
            path.write_bytes(path.read_bytes()[:-5])
    work = counts(run(folder, tmp_path))
    assert work["scan"] == (0, 8)
    assert digests(tmp_path) == before


def test_the_lineage_starts_at_the_files(folder: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    summary = run(folder, tmp_path / "out", store=store)
    artifact = store.get(summary["dataset"])
    assert artifact.kind == "dataset"
    digest = hashlib.sha256((folder / "h264.mp4").read_bytes()).hexdigest()
    assert f"file:{digest}:h264.mp4" in artifact.inputs
    assert len(artifact.inputs) == 9
    assert store.verify(artifact.id) == []


def test_two_runs_in_one_folder_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_PATIENCE", 0.05)

    def start_another(*_: object) -> None:
        with pytest.raises(WorldloomError, match="another run is at work"):
            run(folder, tmp_path)

    run(folder, tmp_path, progress=start_another)


def test_a_run_waits_for_what_a_killed_one_left_starting(folder: Path, tmp_path: Path) -> None:
    """A process killed between fork and exec of a program leaves a child that holds the lock for a moment."""
    (tmp_path / ".cache").mkdir()
    with open(tmp_path / ".cache" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        timer = threading.Timer(0.5, fcntl.flock, (lock, fcntl.LOCK_UN))
        timer.start()
        began = time.monotonic()
        run(folder, tmp_path, settings())
        assert time.monotonic() - began > 0.4
        timer.join()


def test_a_setting_that_does_not_exist_names_the_nearest() -> None:
    with pytest.raises(WorldloomError, match=r"did you mean motion\.threshold"):
        load_config(overrides=["motion.treshold=1"])
    with pytest.raises(WorldloomError, match="stages must begin with split"):
        load_config(overrides=["stages=['motion']"])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of its memory in /proc")
def test_a_long_video_is_never_whole_in_memory(tmp_path: Path) -> None:
    still = np.broadcast_to(scene(1, 1, 480, 640), (500, 480, 640, 3))  # 440 MiB decoded
    video = write(tmp_path / "long", still, "mpeg4", fps=50)
    # Not ru_maxrss: after exec it still holds the peak of the process that started this one.
    code = (
        "import re, sys; from pathlib import Path; from worldloom.config import load;"
        "from worldloom_curation import CurateConfig;"
        "from worldloom_curation.pipeline import run;"
        "run(sys.argv[1], sys.argv[2], load(CurateConfig, overrides=['motion.threshold=0']));"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(video), str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert len(open_dataset(tmp_path / "out")) == 2
    assert int(done.stdout) / 1024 < 350  # MiB; about 170 of them are libraries
