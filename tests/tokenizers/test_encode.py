"""From clips to latents: windows, ids, action slices; a rerun does nothing, other parameters encode anew."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch

from worldloom import media
from worldloom.artifacts import Store
from worldloom.errors import WorldloomError
from worldloom.lineage import walk
from worldloom.schema import clip_id
from worldloom.shards import Dataset, open_dataset
from worldloom_tokenizers import CausalVAE, encode_dataset, load_tokenizer

pytestmark = pytest.mark.usefixtures("worldloom_home")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_models.clips(tmp_path_factory.mktemp("data") / "clips", lengths=(23, 9, 8, 13))


@pytest.fixture(scope="module")
def tokenizer() -> CausalVAE:
    return tiny_models.tokenizer()


SIZE = (32, 32)


def test_every_window_is_there_with_its_frames_and_its_actions(
    clips: Dataset, tokenizer: CausalVAE, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    summary = encode_dataset(
        clips.root, tokenizer, tmp_path / "out", frames=9, stride=5, size=SIZE,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert (summary.windows, summary.clips, summary.short) == (3 + 1 + 1, 3, 1)
    assert summary.left_out == (23 - 19) + 0 + 8 + (13 - 9)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    latents = open_dataset(tmp_path / "out")
    assert latents.index.kind == "latents"
    assert latents.index.tokenizer is not None
    assert latents.index.tokenizer["fingerprint"] == tokenizer.fingerprint
    assert (latents.index.size, latents.index.action_dim, latents.index.frames) == (SIZE, 3, 5 * 9)
    assert latents.index.metadata["action_names"] == list(tiny_models.ACTIONS)
    starts = {0: (0, 5, 10), 1: (0,), 3: (0,)}
    samples = iter(latents)
    for number, firsts in starts.items():
        clip = clips.load(number)
        assert clip.video is not None
        pixels = media.read_frames(clip.video)
        for first in firsts:
            sample = next(samples)
            assert sample.clip.metadata["parent"] == clip.clip.id
            assert (sample.clip.start, sample.clip.end) == (first, first + 9)
            if clip.clip.frames == 9:
                assert sample.clip.id == clip.clip.id
            else:
                assert sample.clip.id == clip_id(clip.clip.source_digest, first, first + 9)
            assert np.array_equal(sample.arrays["actions"], clip.arrays["actions"][first : first + 8])
            with torch.no_grad():
                alone = tokenizer.encode(media.to_tensor(pixels[first : first + 9]))[0].numpy()
            assert sample.arrays["latents"].shape == (4, 3, 4, 4)
            np.testing.assert_allclose(sample.arrays["latents"], alone, atol=0.01)
    assert next(samples, None) is None


@pytest.mark.parametrize(("stride", "left_out"), [(None, 5 + 0 + 8 + 4), (9, 17), (12, 5 + 0 + 8 + 4), (1, 8)])
def test_frames_in_no_window_are_counted(
    clips: Dataset, tokenizer: CausalVAE, tmp_path: Path, stride: int | None, left_out: int
) -> None:
    summary = encode_dataset(clips.root, tokenizer, tmp_path, frames=9, stride=stride, size=SIZE)
    seen = 0
    for length in (23, 9, 8, 13):
        starts = range(0, length - 8, stride or 9)
        seen += len({start + i for start in starts for i in range(9)})
    assert summary.left_out == left_out == 23 + 9 + 8 + 13 - seen


def test_a_discrete_tokenizers_codes_are_beside_its_latents(clips: Dataset, tmp_path: Path) -> None:
    discrete = tiny_models.tokenizer(3, dataclasses.replace(tiny_models.VAE, levels=(5, 3)))
    encode_dataset(clips.root, discrete, tmp_path, frames=9, size=SIZE)
    for sample in open_dataset(tmp_path):
        codes, latents = sample.arrays["codes"], sample.arrays["latents"]
        assert codes.dtype == np.int32
        assert codes.shape == (2, 3, 4, 4)
        again = discrete.from_indices(torch.from_numpy(codes)[None].long())[0]
        np.testing.assert_allclose(latents, again.numpy(), atol=2e-3)
        assert len(np.unique(codes)) > 3


def test_counts_of_an_older_version_are_counted_again(clips: Dataset, tokenizer: CausalVAE, tmp_path: Path) -> None:
    first = encode_dataset(clips.root, tokenizer, tmp_path, frames=9, size=SIZE)
    index = json.loads((tmp_path / "dataset.json").read_text())
    del index["metadata"]["counts"]["left_out"]
    (tmp_path / "dataset.json").write_text(json.dumps(index))
    assert encode_dataset(clips.root, tokenizer, tmp_path, frames=9, size=SIZE) == first


def stamps(root: Path) -> dict[str, int]:
    return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}


def test_a_rerun_does_nothing_and_other_parameters_encode_anew(
    clips: Dataset, tokenizer: CausalVAE, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = {"frames": 9, "size": SIZE}
    first = encode_dataset(clips.root, tokenizer, out, **options)
    before, identity = stamps(out), open_dataset(out).index.id
    assert encode_dataset(clips.root, tokenizer, out, **options) == first
    assert stamps(out) == before
    ids = {identity}
    changes = (
        {"frames": 5},
        {"stride": 3},
        {"size": (16, 16)},
        {"name": "other"},
    )
    for change in changes:
        encode_dataset(clips.root, tokenizer, out, **{**options, **change})
        ids.add(open_dataset(out).index.id)
    encode_dataset(clips.root, tiny_models.tokenizer(8), out, **options)
    ids.add(open_dataset(out).index.id)
    assert len(ids) == 6
    encode_dataset(clips.root, tokenizer, out, **options)
    assert open_dataset(out).index.id == identity
    assert not open_dataset(out).verify()


def test_other_clips_encode_anew(clips: Dataset, tokenizer: CausalVAE, tmp_path: Path) -> None:
    out = tmp_path / "out"
    encode_dataset(clips.root, tokenizer, out, frames=9, size=SIZE)
    other = tiny_models.clips(tmp_path / "other", lengths=(17,))
    assert encode_dataset(other.root, tokenizer, out, frames=9, size=SIZE).windows == 1
    assert len(open_dataset(out)) == 1


@pytest.mark.parametrize("damage", ["gone", "cut", "index"])
def test_a_damaged_encoding_is_made_again(clips: Dataset, tokenizer: CausalVAE, tmp_path: Path, damage: str) -> None:
    out = tmp_path / "out"
    encode_dataset(clips.root, tokenizer, out, frames=9, size=SIZE)
    identity = open_dataset(out).index.id
    shard = out / "shards" / "000000.tar"
    if damage == "gone":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-3000])
    else:
        (out / "dataset.json").unlink()
    encode_dataset(clips.root, tokenizer, out, frames=9, size=SIZE)
    assert open_dataset(out).index.id == identity
    assert not open_dataset(out).verify()


def test_the_clips_themselves_are_never_overwritten(tokenizer: CausalVAE, tmp_path: Path) -> None:
    clips = tiny_models.clips(tmp_path / "clips", lengths=(13,))
    before = stamps(clips.root)
    with pytest.raises(WorldloomError, match="holds another dataset"):
        encode_dataset(clips.root, tokenizer, clips.root, frames=9, size=SIZE)
    assert stamps(clips.root) == before


def test_lineage_leads_from_latents_to_clips_and_tokenizer(
    clips: Dataset, tokenizer: CausalVAE, tmp_path: Path
) -> None:
    encode_dataset(clips.root, tokenizer, tmp_path / "out", name="tiny", frames=9, size=SIZE)
    store = Store()
    node = walk(store, open_dataset(tmp_path / "out").index.id)
    assert node.inputs[0].id == clips.index.id
    assert (node.inputs[1].kind, node.inputs[1].label) == ("shipped", "tiny")


def test_a_tokenizers_folder_is_recorded_so_that_it_is_found_from_anywhere(
    clips: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_models.tokenizer_folder(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    encode_dataset(clips.root, load_tokenizer("./mine"), "out", name="./mine", frames=9, size=SIZE)
    reference = open_dataset("out").index.tokenizer
    assert reference is not None
    assert reference["name"] == str(folder)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"frames": 10}, "1 \\+ 4k"),
        ({"frames": 1}, "1 \\+ 4k"),
        ({"size": (30, 32)}, "multiples of 8"),
        ({"stride": -1}, "must be positive"),
        ({"batch_size": 0}, "must be positive"),
        ({"frames": 33}, "no clip is long enough"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_committed(
    clips: Dataset, tokenizer: CausalVAE, tmp_path: Path, options: dict, what: str
) -> None:
    with pytest.raises(WorldloomError, match=what):
        encode_dataset(clips.root, tokenizer, tmp_path / "out", **{"frames": 9, "size": SIZE, **options})
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_latents_are_not_encoded_again(clips: Dataset, tokenizer: CausalVAE, tmp_path: Path) -> None:
    encode_dataset(clips.root, tokenizer, tmp_path / "out", frames=9, size=SIZE)
    with pytest.raises(WorldloomError, match="latents already"):
        encode_dataset(tmp_path / "out", tokenizer, tmp_path / "twice", frames=9, size=SIZE)
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["kind"] == "latents"
