"""`worldloom tokenize`: encode, decode, eval and train as a user runs them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from click.testing import CliRunner, Result

from worldloom import media
from worldloom.cli import main
from worldloom.shards import Dataset, open_dataset
from worldloom_tokenizers import encode_dataset, load_tokenizer

pytestmark = pytest.mark.usefixtures("worldloom_home")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.tokenizer_folder(tmp_path_factory.mktemp("models") / "tiny-tokenizer")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_models.clips(tmp_path_factory.mktemp("data") / "clips", lengths=(23, 13))


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["tokenize", *(str(word) for word in words)])


def test_a_dataset_goes_to_latents_and_back(folder: Path, clips: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "latents"
    words = ("encode", clips.root, "--out", out, "--tokenizer", folder, "--frames", 9, "--size", 32)
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert "3 windows of 2 clips" in done.output
    assert "9 frames are left out: they lie in no window of 9" in done.output
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["windows"], summary["left_out"]) == (3, 23 + 13 - 3 * 9)
    assert run(*words).stdout == done.stdout
    done = run("decode", out, "--out", tmp_path / "videos")
    assert done.exit_code == 0, done.output
    assert "3 videos" in done.output
    sample = open_dataset(out).load(1)
    with torch.no_grad():
        latents = torch.from_numpy(sample.arrays["latents"].astype(np.float32))[None]
        expected = media.to_frames(load_tokenizer(folder).decode(latents))[0]
    found = (tmp_path / "videos" / f"{sample.clip.id}.mp4").read_bytes()
    assert found == media.write_video(None, expected, sample.clip.fps)
    assert run("decode", out, "--out", tmp_path / "one", "--clips", 1).stdout.startswith("1 videos")


def test_a_file_goes_to_latents_and_back_in_pieces(folder: Path, tmp_path: Path) -> None:
    frames = tiny_models.moving_square(75, 2)  # more than one piece of 8 latent frames, and a remainder
    media.write_video(tmp_path / "film.mp4", frames, 12.0, lossless=True)
    done = run("encode", tmp_path / "film.mp4", "--out", tmp_path / "l", "--tokenizer", folder, "--size", "32x32")
    assert done.exit_code == 0, done.output
    latents = np.load(tmp_path / "l" / "film.npy")
    with torch.no_grad():
        expected = load_tokenizer(folder).encode(media.to_tensor(frames[:73]))[0].numpy()
    np.testing.assert_allclose(latents, expected, atol=0.01)
    done = run("decode", tmp_path / "l" / "film.npy", "--out", tmp_path / "v")
    assert done.exit_code == 0, done.output
    info = media.probe(tmp_path / "v" / "film.mp4", count=True)
    assert (info.frames, info.fps) == (73, pytest.approx(12.0))


def test_latents_of_another_tokenizer_are_refused(folder: Path, clips: Dataset, tmp_path: Path) -> None:
    run("encode", clips.root, "--out", tmp_path / "l", "--tokenizer", folder, "--frames", 9, "--size", 32)
    other = tiny_models.tokenizer_folder(tmp_path / "other", seed=5)
    done = run("decode", tmp_path / "l", "--out", tmp_path / "v", "--tokenizer", other)
    assert done.exit_code == 2
    assert "another tokenizer" in done.stderr
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize(
    ("words", "what"),
    [
        # a length, a size or a device that does not fit
        ("encode {clips} --out {out} --tokenizer {folder} --frames 10", "1 + 4k"),
        ("encode {clips} --out {out} --tokenizer {folder} --frames 9 --size 30", "multiples of 8"),
        ("encode {clips} --out {out} --tokenizer {folder} --frames 29", "no clip is long enough"),
        ("encode {clips} --out {out} --tokenizer {folder} --size huge", "not a size"),
        ("encode {clips} --out {out} --tokenizer {folder} --device cuda:9", "no such device"),
        ("encode {clips} --out {out} --tokenizer {folder} --batch-size 0", "not in the range"),
        ("encode {clips} --out {out} --tokenizer {folder} --stride 0", "not in the range"),
        ("decode {latents} --out {out} --fps 0", "not in the range"),
        ("encode {clips} --out {out} --tokenizer {folder} --pad", "for a video file"),
        ("encode {film} --out {out} --tokenizer {folder} --size 30", "multiples of 8"),
        ("decode {latents} --out {out} --device cuda:9", "no such device"),
        ("eval {clips} --out {out} --tokenizer {folder} --frames 10", "1 + 4k"),
        ("eval {clips} --out {out} --tokenizer {folder} --frames 9 --size 30", "multiples of 8"),
        ("eval {clips} --out {out} --tokenizer {folder} --frames 29", "no clip has the 29"),
        ("eval {clips} --out {out} --tokenizer {folder} --size 8", "at least 11 pixels"),
        ("eval {clips} --out {out} --tokenizer {folder} --device cuda:9", "no such device"),
        # a tokenizer that is none
        ("encode {clips} --out {out} --tokenizer loom-cv-nan", "did you mean loom-cv-nano"),
        ("encode {clips} --out {out} --tokenizer {pt}", "models convert"),
        ("encode {clips} --out {out} --tokenizer {cut}", "cannot be read"),
        ("encode {clips} --out {out} --tokenizer {world}", "not of a tokenizer kind"),
        ("encode {clips} --out {out} --tokenizer {clips}", "no checkpoint here"),
        ("eval {clips} --out {out} --tokenizer {folder} --tokenizer {folder}", "not with itself"),
        # data that is none
        ("encode {text} --out {out} --tokenizer {folder}", "not a video"),
        ("encode {empty} --out {out} --tokenizer {folder}", "not a finished dataset"),
        ("eval {empty} --out {out} --tokenizer {folder}", "not a finished dataset"),
        ("decode {empty} --out {out} --tokenizer {folder}", "not a finished dataset"),
        ("encode {zero} --out {out} --tokenizer {folder}", "the dataset is empty"),
        ("eval {zero} --out {out} --tokenizer {folder}", "the dataset is empty"),
        ("encode {latents} --out {out} --tokenizer {folder}", "latents already"),
        ("eval {latents} --out {out} --tokenizer {folder}", "compares pixels"),
        ("decode {clips} --out {out} --tokenizer {folder}", "holds clips"),
        ("decode {text} --out {out} --tokenizer {folder}", "not a file of latents"),
        ("decode {array} --out {out}", "nothing says which tokenizer"),
        ("decode {array} --out {out} --tokenizer {folder}", "not finite"),
    ],
)
def test_mistakes_end_with_what_to_do(mistakes: dict[str, Path], tmp_path: Path, words: str, what: str) -> None:
    names = mistakes | {"out": tmp_path / "out"}
    done = run(*(word.format(**names) for word in words.split()))
    assert done.exit_code == 2, done.output
    assert what in done.stderr
    assert not list((tmp_path / "out").rglob("*.json")) + list((tmp_path / "out").rglob("*.mp4"))


@pytest.fixture(scope="module")
def mistakes(folder: Path, clips: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What `test_mistakes_end_with_what_to_do` gives to the commands, by name."""
    root = tmp_path_factory.mktemp("mistakes")
    encode_dataset(clips.root, load_tokenizer(folder), root / "latents", name=str(folder), frames=9, size=(32, 32))
    media.write_video(root / "film.mp4", tiny_models.moving_square(9, 1), 10.0)
    (root / "text.mp4").write_text("no video at all")
    (root / "empty").mkdir()
    (root / "zero").mkdir()
    index = json.loads((clips.root / "dataset.json").read_text()) | {"samples": 0, "frames": 0, "shards": []}
    (root / "zero" / "dataset.json").write_text(json.dumps(index))
    (root / "model.pt").write_bytes(b"\x80\x02")
    shutil.copytree(folder, root / "cut")
    weights = root / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    np.save(root / "array.npy", np.full((4, 2, 4, 4), np.nan, np.float32))
    world = tiny_models.world_folder(root / "world", folder)
    paths = {"text": "text.mp4", "empty": "empty", "zero": "zero", "pt": "model.pt", "cut": "cut", "array": "array.npy"}
    paths |= {"latents": "latents", "film": "film.mp4"}
    return {name: root / path for name, path in paths.items()} | {"folder": folder, "clips": clips.root, "world": world}


def test_training_goes_through_the_recipe(clips: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLDLOOM_TRACKING", "off")
    out = tmp_path / "run"
    settings = {
        "model.latent_channels": "4", "model.widths": "[8,8,16]", "model.encoder_blocks": "[0,1,1]",
        "model.decoder_blocks": "[1,1,1]", "trainer.max_steps": "2", "data.size": "[32,32]", "data.frames": "5",
        "data.batch_size": "2",
    }  # fmt: skip
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    done = run("train", "--data", clips.root, "--out", out, *words)
    assert done.exit_code == 0, done.output + done.stderr
    trained = load_tokenizer(out / "model")
    assert trained.config == tiny_models.VAE
    assert trained.latent_std.min() > 0
    done = run("train", "--data", clips.root, "--out", tmp_path / "x", "--no-such-option")
    assert done.exit_code == 2
