"""`worldloom tokenize`: encode, decode, eval and train as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from click.testing import CliRunner, Result

from worldloom import media
from worldloom.cli import main
from worldloom.shards import Dataset, open_dataset
from worldloom_tokenizers import load_tokenizer
from worldloom_tokenizers.evaluate import TokenizerEvalConfig, evaluate

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
    assert json.loads((out / "summary.json").read_text())["windows"] == 3
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
        (("encode", "{clips}", "--out", "{out}", "--tokenizer", "{folder}", "--frames", "10"), "1 + 4k"),
        (("encode", "{clips}", "--out", "{out}", "--tokenizer", "loom-cv-nan"), "loom-cv-nano"),
        (("encode", "{clips}", "--out", "{out}", "--tokenizer", "{folder}", "--size", "huge"), "not a size"),
        (("encode", "{text}", "--out", "{out}", "--tokenizer", "{folder}"), "not a video"),
        (("decode", "{text}", "--out", "{out}", "--tokenizer", "{folder}"), "not a file of latents"),
        (("decode", "{text}", "--out", "{out}"), "nothing says which tokenizer"),
        (("decode", "{clips}", "--out", "{out}", "--tokenizer", "{folder}"), "holds clips"),
        (("eval", "{clips}", "--out", "{out}", "--tokenizer", "{folder}", "--frames", "29"), "no clip has the 29"),
        (("eval", "{clips}", "--out", "{out}", "--tokenizer", "{folder}", "--size", "8"), "at least 11 pixels"),
        (("eval", "{clips}", "--out", "{out}", "--tokenizer", "{folder}", "--device", "cuda:9"), "no such device"),
    ],
)
def test_mistakes_end_with_what_to_do(
    folder: Path, clips: Dataset, tmp_path: Path, words: tuple[str, ...], what: str
) -> None:
    (tmp_path / "text.mp4").write_text("no video at all")
    names = {"clips": clips.root, "out": tmp_path / "out", "folder": folder, "text": tmp_path / "text.mp4"}
    done = run(*(word.format(**names) for word in words))
    assert done.exit_code == 2
    assert what in done.stderr
    assert not (tmp_path / "out" / "summary.json").exists()


def test_evaluation_measures_what_a_plain_computation_does(folder: Path, clips: Dataset) -> None:
    tokenizer = load_tokenizer(folder)
    config = TokenizerEvalConfig(frames=9, size=None, clips=0, batch_size=2, videos=2)
    result = evaluate(tokenizer, clips, config)
    errors = []
    for sample in clips:
        assert sample.video is not None
        pixels = media.read_frames(sample.video)
        for start in range(0, len(pixels) - 8, 9):
            truth = pixels[start : start + 9]
            with torch.no_grad():
                made = media.to_frames(tokenizer.decode(tokenizer.encode(media.to_tensor(truth))))[0]
            errors.append(((made.astype(float) - truth) ** 2).mean(axis=(1, 2, 3)))
    table = 10 * np.log10(255**2 / np.stack(errors))
    assert result.windows == len(errors) == 3
    assert result.psnr_per_frame == pytest.approx(table.mean(), abs=1e-3)
    assert result.psnr_worst == pytest.approx(table.min(), abs=1e-3)
    assert result.psnr_first == pytest.approx(table[:, 0].mean(), abs=1e-3)
    assert result.curve == pytest.approx(table.mean(axis=0), abs=1e-3)
    assert result.psnr == pytest.approx(10 * np.log10(255**2 / np.mean(errors)), abs=1e-3)
    assert 0 < result.ssim < 1
    assert result.compression == pytest.approx(9 * 32 * 32 * 3 / (2 * 4 * 3 * 4 * 4))
    assert result.encode_fps > 1
    assert result.decode_fps > 1


def test_the_evaluation_command_writes_figures_and_a_report_once(folder: Path, clips: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("eval", clips.root, "--tokenizer", folder, "--frames", 9, "--size", 32, "--out", out)
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert "PSNR, mean of frames" in done.output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["windows"] == 3
    page = (out / "report.html").read_text()
    assert page.count("<video") == 3
    stamp = (out / "report.html").stat().st_mtime_ns
    assert run(*words).stdout == done.stdout
    assert (out / "report.html").stat().st_mtime_ns == stamp


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
