"""Stages that add to the kept clips: vectors of captions and frames, and latents as a dataset of their own."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from curation_videos import scene, write

from worldloom import WorldloomError, media
from worldloom.schema import Clip, clip_id
from worldloom.shards import ShardSample, ShardWriter, commit_dataset, open_dataset
from worldloom_curation import search
from worldloom_curation.config import load
from worldloom_curation.ledger import load_ledger, reconcile
from worldloom_curation.pipeline import run
from worldloom_curation.stages.embeddings import EmbeddingsStage
from worldloom_curation.stages.latents import LatentsConfig, LatentsStage
from worldloom_tokenizers import encode_dataset, load_text_encoder, load_tokenizer

ALL = (
    'stages=["split","motion","caption","text_embeddings","embeddings","latents"]',
    "split.max_frames=24",
    "latents.frames=9",
)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    for number, frames in enumerate((40, 24)):
        write(folder / f"{number}", scene(number, frames), "h264")
    return folder


def digests(out: Path) -> dict[str, str]:
    """Of all that a run has written."""
    files = [*sorted(out.glob("*.json")), *sorted(out.glob("*.parquet")), *sorted(out.rglob("shards/*.tar"))]
    files += sorted(out.glob("latents/dataset.json"))
    return {
        file.relative_to(out).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.name != "summary.json"
    }


def test_vectors_are_stored_with_the_clips_and_latents_beside_them(videos: Path, tmp_path: Path) -> None:
    summary = run(videos, tmp_path / "out", load(overrides=ALL))
    clips, latents = open_dataset(tmp_path / "out"), open_dataset(tmp_path / "out" / "latents")
    assert summary["derived"] == {"latents": latents.index.id}
    assert len(clips) >= 2
    embedder = search.find_embedder("efficientnet-lite0", "frames")
    for sample in clips:
        assert sample.video is not None
        vectors = sample.arrays["embedding"].astype(np.float32)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-2)
        frames = media.read_frames(sample.video)
        numbers = np.linspace(0, len(frames) - 1, 4).round().astype(int)
        np.testing.assert_allclose(vectors, embedder.embed_frames(frames[numbers]), atol=2e-3)
        assert not sample.clip.caption
        assert not sample.arrays["text"].any()  # nothing is said of a clip without a caption
    tokenizer = load_tokenizer("loom-cv-nano")
    windows = [(clip.id, start) for clip in clips.clips() for start in range(0, clip.frames - 8, 9)]
    assert [sample.clip.metadata["parent"] for sample in latents] == [clip for clip, _ in windows]
    for sample, (clip, start) in zip(latents, windows, strict=True):
        video = media.to_tensor(media.read_frames(clips.load(clip).video)[start : start + 9][None])
        with torch.no_grad():
            expected = tokenizer.encode(video)[0].numpy()
        np.testing.assert_allclose(sample.arrays["latents"].astype(np.float32), expected, atol=5e-3)
        assert (sample.clip.frames, sample.clip.height, sample.clip.width) == (9, 64, 96)


def test_latents_are_those_of_tokenize_encode(videos: Path, tmp_path: Path) -> None:
    run(videos, tmp_path / "out", load(overrides=(*ALL, "latents.size=[32,48]")))
    encoder = load_text_encoder("minilm")
    encode_dataset(
        tmp_path / "out", load_tokenizer("loom-cv-nano"), tmp_path / "encoded", name="loom-cv-nano", frames=9,
        size=(32, 48), text_encoder=encoder,
    )  # fmt: skip
    ours, theirs = open_dataset(tmp_path / "out" / "latents"), open_dataset(tmp_path / "encoded")
    assert ours.index.tokenizer == theirs.index.tokenizer
    assert ours.index.metadata["text_encoder"] == theirs.index.metadata["text_encoder"]
    assert len(ours) == len(theirs) > 4
    for one, other in zip(ours, theirs, strict=True):
        assert one.clip == other.clip
        assert one.arrays.keys() == other.arrays.keys() == {"latents", "text"}
        np.testing.assert_allclose(one.arrays["latents"], other.arrays["latents"], atol=2e-3)


def test_what_was_added_is_cached_and_workers_give_the_same_bytes(videos: Path, tmp_path: Path) -> None:
    first = run(videos, tmp_path / "one", load(overrides=ALL))
    count = first["clips"]
    assert all(first["work"][name]["computed"] == count for name in ("text_embeddings", "embeddings", "latents"))
    before = digests(tmp_path / "one")
    again = run(videos, tmp_path / "one", load(overrides=ALL))
    assert {work["computed"] for work in again["work"].values()} == {0}
    assert digests(tmp_path / "one") == before
    run(videos, tmp_path / "two", load(overrides=(*ALL, "workers=2")))
    assert digests(tmp_path / "two") == before
    write(videos / "2", scene(7, 20), "h264")
    more = run(videos, tmp_path / "one", load(overrides=ALL))
    assert {more["work"][name]["computed"] for name in ("text_embeddings", "embeddings", "latents")} == {1}
    changed = run(videos, tmp_path / "one", load(overrides=(*ALL, "embeddings.frames=2")))
    assert [changed["work"][name]["computed"] for name in ("text_embeddings", "embeddings", "latents")] == [
        0,
        count + 1,
        0,
    ]


def test_a_search_takes_the_stored_vectors(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(videos, tmp_path / "out", load(overrides=ALL))
    run(videos, tmp_path / "plain", load(overrides=ALL[1:2]))
    query = tmp_path / "query.png"
    media.write_image(query, scene(1, 24)[12])
    expected = search.search(open_dataset(tmp_path / "plain"), str(query))
    embedder = search.find_embedder("efficientnet-lite0", "frames")
    seen: list[int] = []
    embed = type(embedder).embed_frames
    monkeypatch.setattr(
        type(embedder), "embed_frames", lambda self, frames: seen.append(len(frames)) or embed(self, frames)
    )
    found = search.search(open_dataset(tmp_path / "out"), str(query))
    assert seen == [1]  # the query alone
    assert [result.clip for result in found] == [result.clip for result in expected]
    np.testing.assert_allclose([result.score for result in found], [result.score for result in expected], atol=2e-3)
    assert [result.frame for result in found] == [result.frame for result in expected]


def test_a_clip_that_a_stage_cannot_take_is_quarantined_alone(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = run(videos, tmp_path / "good", load(overrides=ALL))
    bad = next(iter(open_dataset(tmp_path / "good").clips())).id
    add = EmbeddingsStage.add

    def fail(self, clip, video):
        if clip.id == bad:
            raise ZeroDivisionError("no such luck")
        return add(self, clip, video)

    monkeypatch.setattr(EmbeddingsStage, "add", fail)
    summary = run(videos, tmp_path / "out", load(overrides=ALL))
    assert (summary["clips"], summary["failed"], summary["quarantined"]) == (good["clips"] - 1, 1, 1)
    rows = load_ledger(tmp_path / "out")
    assert not reconcile(rows)
    (row,) = [row for row in rows if row.failed]
    assert (row.clip_id, row.stage) == (bad, "write")
    assert row.reason == "embeddings: ZeroDivisionError: no such luck"
    assert "in fail" in row.traceback
    parents = {sample.clip.metadata["parent"] for sample in open_dataset(tmp_path / "out" / "latents")}
    assert bad not in parents
    monkeypatch.undo()
    assert run(videos, tmp_path / "out", load(overrides=ALL))["clips"] == good["clips"]  # tried again


def test_latents_go_with_their_stage_and_never_replace_another_dataset(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(videos, out, load(overrides=ALL))
    run(videos, out, load(overrides=ALL[1:2]))
    assert not (out / "latents").exists()
    encode_dataset(out, load_tokenizer("loom-cv-nano"), out / "latents", name="loom-cv-nano", frames=9)
    kept = (out / "latents" / "dataset.json").read_text()
    with pytest.raises(WorldloomError, match="in the place of another"):
        run(videos, out, load(overrides=ALL))
    run(videos, out, load(overrides=ALL[1:2]))
    assert (out / "latents" / "dataset.json").read_text() == kept


def test_windows_longer_than_every_clip_are_said_to_be(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(WorldloomError, match="no clip gave a sample of latents"):
        run(videos, tmp_path / "out", load(overrides=(*ALL, "latents.frames=33")))
    assert len(open_dataset(tmp_path / "out")) >= 2
    assert not (tmp_path / "out" / "latents").exists()
    assert not (tmp_path / "out" / "summary.json").exists()
    reasons = {row.reason for row in load_ledger(tmp_path / "out") if row.stage == "latents"}
    assert reasons == {"shorter than a window of 33 frames: it gives no latents"}


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("latents.frames=10", "1 \\+ 4k frames"),
        ("latents.size=[60,64]", "multiples of 8"),
        ("latents.size=[64,0]", "0 or positive"),
        ("latents.tokenizer='loom-xx'", "loom-xx"),
        ("embeddings.model='minilm'", "embeds texts only"),
        ("embeddings.frames=0", "at least 1"),
        ("text_embeddings.encoder='t6'", "t6"),
        ("text_embeddings.tokens=2", "at least 3"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_decoded(
    videos: Path, tmp_path: Path, setting: str, said: str
) -> None:
    with pytest.raises(WorldloomError, match=said):
        run(videos, tmp_path / "out", load(overrides=(*ALL, setting)))
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_a_clip_smaller_than_a_latent_pixel_is_quarantined(tmp_path: Path) -> None:
    """Of two episodes, one is six pixels high: too little for a tokenizer of 8x8, unless a size is named."""
    for name, height in (("a", 6), ("b", 64)):
        write(tmp_path / "videos" / name, scene(1, 20, height), "ffv1")
    settings = ('stages=["split","latents"]', "latents.frames=17", "probe.min_side=2", "write.short_side=0")
    summary = run(tmp_path / "videos", tmp_path / "out", load(overrides=settings))
    assert (summary["clips"], summary["failed"]) == (1, 1)
    [row] = [row for row in load_ledger(tmp_path / "out") if row.failed]
    assert "too small for the tokenizer" in row.reason
    summary = run(tmp_path / "videos", tmp_path / "out", load(overrides=(*settings, "latents.size=[32,32]")))
    assert (summary["clips"], summary["failed"]) == (2, 0)


def test_the_fingerprint_of_a_tokenizer_is_part_of_the_key() -> None:
    configs = [LatentsConfig(tokenizer=name) for name in ("loom-cv-nano", "loom-dv-nano")]
    assert len({LatentsStage(config).config.fingerprint for config in configs}) == 2


def test_the_actions_of_an_episode_are_cut_to_its_windows(tmp_path: Path) -> None:
    pixels, actions = scene(3, 21), np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)
    clip = Clip(clip_id("a" * 64, 0, 21), "env:A", "a" * 64, 0, 21, 10.0, 96, 64, action_dim=2)
    with ShardWriter(tmp_path / "recorded") as writer:
        writer.write(ShardSample(clip, media.write_video(None, pixels, 10.0, lossless=True), {"actions": actions}))
    commit_dataset(tmp_path / "recorded", writer.shards)
    run(tmp_path / "recorded", tmp_path / "out", load(overrides=('stages=["split","latents"]', "latents.frames=9")))
    windows = list(open_dataset(tmp_path / "out" / "latents"))
    assert [(window.clip.start, window.clip.end) for window in windows] == [(0, 9), (9, 18)]
    for window, start in zip(windows, (0, 9), strict=True):
        np.testing.assert_array_equal(window.arrays["actions"], actions[start : start + 8])
    assert [sample.clip.frames for sample in open_dataset(tmp_path / "out")] == [21]


def test_where_one_of_two_equal_episodes_fails_the_other_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their pictures, and so the ids of their clips, are the same; their actions differ."""
    first = write(tmp_path / "episodes" / "a", scene(3, 20), "h264")
    shutil.copy(first, first.with_stem("b"))  # encoded again, its bytes may be others
    for number, name in enumerate(("a", "b")):
        np.save(tmp_path / "episodes" / f"{name}.actions.npy", np.full((19, 1), number, np.float32))
    seen: list[str] = []
    add = EmbeddingsStage.add

    def fail_first(self, clip, video):
        seen.append(clip.id)
        if len(seen) == 1:
            raise ZeroDivisionError
        return add(self, clip, video)

    monkeypatch.setattr(EmbeddingsStage, "add", fail_first)
    summary = run(tmp_path / "episodes", tmp_path / "out", load(overrides=('stages=["split","embeddings"]',)))
    assert (len(seen), len({*seen})) == (2, 1)
    assert (summary["clips"], summary["failed"]) == (1, 1)
    (sample,) = open_dataset(tmp_path / "out")
    assert sample.arrays["actions"].tolist() == [[1.0]] * 19
    assert sample.arrays["embedding"].any()
