"""Evaluation of tokenizers: every figure against a plain computation, the table, the files and the report."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from click.testing import CliRunner, Result

from worldloom import media
from worldloom.cli import main
from worldloom.compare import flicker, ms_ssim, ssim
from worldloom.shards import Dataset
from worldloom_tokenizers import checkpoint, load_tokenizer
from worldloom_tokenizers.evaluate import TokenizerEval, TokenizerEvalConfig, evaluate
from worldloom_tokenizers.evaluate_report import figures, labels

pytestmark = pytest.mark.usefixtures("worldloom_home")

FSQ = dataclasses.replace(tiny_models.VAE, levels=(5, 3))
CONFIG = TokenizerEvalConfig(frames=9, size=None, clips=0, batch_size=2, videos=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.tokenizer_folder(tmp_path_factory.mktemp("models") / "tiny-tokenizer")


@pytest.fixture(scope="module")
def discrete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two codebooks of 15 codes."""
    path = tmp_path_factory.mktemp("models") / "tiny-discrete"
    checkpoint.save(tiny_models.tokenizer(3, FSQ), path, "# tiny\n")
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_models.clips(tmp_path_factory.mktemp("data") / "clips", lengths=(23, 13))


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["tokenize", "eval", *(str(word) for word in words)])


def windows(clips: Dataset) -> list[np.ndarray]:
    """Those of 9 frames, ``(9, 32, 32, 3)``."""
    videos = [media.read_frames(sample.video) for sample in clips if sample.video is not None]
    return [pixels[start : start + 9] for pixels in videos for start in range(0, len(pixels) - 8, 9)]


def test_evaluation_measures_what_a_plain_computation_does(folder: Path, clips: Dataset) -> None:
    tokenizer = load_tokenizer(folder)
    result = evaluate(tokenizer, clips, CONFIG)
    truth = np.stack(windows(clips))
    with torch.no_grad():
        latents = tokenizer.encode(media.to_tensor(truth))
        made = media.to_frames(tokenizer.decode(latents))
    errors = np.square(made.astype(float) - truth).mean(axis=(2, 3, 4))
    table = 10 * np.log10(255**2 / errors)
    assert (result.windows, result.frames) == (3, 27)
    assert result.psnr == pytest.approx(10 * np.log10(255**2 / errors.mean()), abs=1e-3)
    assert result.psnr_per_frame == pytest.approx(table.mean(), abs=1e-3)
    assert result.psnr_worst == pytest.approx(table.min(), abs=1e-3)
    assert result.psnr_first == pytest.approx(table[:, 0].mean(), abs=1e-3)
    assert result.curve == pytest.approx(table.mean(axis=0), abs=1e-3)
    assert result.ssim == pytest.approx(ssim(made, truth).mean(), abs=1e-3)
    assert result.ms_ssim == pytest.approx(ms_ssim(made, truth).mean(), abs=1e-3)
    assert result.ms_ssim_scales == (2,)
    assert result.flicker == pytest.approx(flicker(made, truth).mean(), abs=0.02)
    assert result.latent_mean == pytest.approx(latents.mean().item(), abs=1e-3)
    assert result.latent_std == pytest.approx(latents.std().item(), rel=1e-2)
    assert result.bits_per_pixel == pytest.approx(16 * (4 * 3 * 4 * 4) / (9 * 32 * 32))
    assert result.compression == pytest.approx(9 * 32 * 32 * 3 / (2 * 4 * 3 * 4 * 4))
    assert min(result.encode_fps, result.decode_fps) > 1
    assert result.codes is None
    assert result.code_counts == ()
    assert len(result.examples) == 2
    assert np.array_equal(result.examples[1].truth, truth[2])


def test_codes_are_counted(discrete: Path, clips: Dataset) -> None:
    tokenizer = load_tokenizer(discrete)
    result = evaluate(tokenizer, clips, CONFIG)
    with torch.no_grad():
        codes = tokenizer.to_indices(tokenizer.encode(media.to_tensor(np.stack(windows(clips))))).numpy()
    assert result.codes is not None
    assert (result.codes.size, result.codes.seen) == (15, 3 * 3 * 4 * 4)
    for book in range(2):
        uses = [int((codes[:, book] == code).sum()) for code in range(15)]
        used = [count for count in uses if count]
        assert len(used) > 1
        entropy = -sum(count / 144 * math.log(count / 144) for count in used)
        assert result.codes.usage[book] == pytest.approx(len(used) / 15)
        assert result.codes.perplexity[book] == pytest.approx(math.exp(entropy))
        assert result.code_counts[book].tolist() == sorted(used, reverse=True)
    assert result.bits_per_pixel == pytest.approx(math.log2(15) * 2 * 3 * 4 * 4 / (9 * 32 * 32))
    assert result.compression == pytest.approx(24 / result.bits_per_pixel)


def test_a_tokenizer_that_knows_nothing_of_codes_is_continuous(folder: Path, clips: Dataset) -> None:
    inner = load_tokenizer(folder)

    class Plain:
        """A third party's: what the protocol wants and nothing else."""

        temporal_ratio, spatial_ratio, latent_channels, fingerprint = 4, 8, 4, "f" * 64

        def encode(self, video: torch.Tensor) -> torch.Tensor:
            return inner.encode(video)

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return inner.decode(latents)

    tokenizer: Any = Plain()
    result = evaluate(tokenizer, clips, CONFIG)
    assert result.codes is None
    assert result.psnr == pytest.approx(evaluate(inner, clips, CONFIG).psnr)


def test_memory_is_measured_or_absent(clips: Dataset) -> None:
    wide = dataclasses.replace(tiny_models.VAE, widths=(64, 64, 64))
    result = evaluate(tiny_models.tokenizer(0, wide), clips, dataclasses.replace(CONFIG, size=(128, 128)))
    if result.encode_peak_bytes is None:
        pytest.skip("nothing measures memory here")
    assert result.decode_peak_bytes is not None
    # one activation at half size: 2 windows x 3 latent frames x 64 channels x 64 x 64, float32
    assert 6.3e6 < result.decode_peak_bytes < 1e9
    assert result.encode_peak_bytes > 6.3e6 / 4


def test_one_frame_has_no_flicker(folder: Path, clips: Dataset) -> None:
    result = evaluate(load_tokenizer(folder), clips, dataclasses.replace(CONFIG, frames=1, clips=4))
    assert result.flicker is None
    assert "flicker" not in " ".join(row[0] for row in figures([result]))
    assert json.loads(json.dumps(result.to_dict()))["flicker"] is None


@pytest.mark.parametrize("which", ["folder", "discrete"])
def test_figures_survive_json(which: str, clips: Dataset, request: pytest.FixtureRequest) -> None:
    result = evaluate(load_tokenizer(request.getfixturevalue(which)), clips, CONFIG)
    again = TokenizerEval.from_dict(json.loads(json.dumps(result.to_dict())))
    assert again == result
    assert figures([again]) == figures([result])


def test_the_evaluation_command_writes_figures_and_a_report_once(folder: Path, clips: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = (clips.root, "--tokenizer", folder, "--frames", 9, "--size", 32, "--out", out)
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert "PSNR, mean of frames" in done.output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["windows"] == 3
    metrics = json.loads((out / "metrics.json").read_text())
    assert {**summary, "curve": metrics["curve"]}.items() >= metrics.items()
    for figure in ("ms_ssim", "flicker", "bits_per_pixel", "encode_fps", "codes", "encode_peak_bytes"):
        assert figure in metrics
    page = (out / "report.html").read_text()
    assert page.count("<video") == 3
    stamp = (out / "report.html").stat().st_mtime_ns
    assert run(*words).stdout == done.stdout
    assert (out / "report.html").stat().st_mtime_ns == stamp


def test_several_tokenizers_stand_side_by_side(folder: Path, discrete: Path, clips: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = (clips.root, "--tokenizer", folder, "--tokenizer", discrete, "--frames", 9, "--size", 32, "--out", out)
    done = run(*words)
    assert done.exit_code == 0, done.output
    head, *rows = [line for line in done.stdout.splitlines() if line.strip()]
    assert head.split() == ["tiny-tokenizer", "tiny-discrete"]
    (codes,) = [row for row in rows if row.startswith("codes  ")]
    assert codes.split(maxsplit=2)[1:] == ["–", "2 codebooks of 15"]
    metrics = json.loads((out / "metrics.json").read_text())
    assert [one["tokenizer"]["name"] for one in metrics["tokenizers"]] == [str(folder), str(discrete)]
    for one, path in zip(metrics["tokenizers"], (folder, discrete), strict=True):
        alone = evaluate(load_tokenizer(path), clips, TokenizerEvalConfig(frames=9, size=(32, 32)))
        assert one["psnr"] == pytest.approx(alone.psnr, abs=1e-3)
    page = (out / "report.html").read_text()
    assert page.count("<video") == 3
    assert "original, tiny-tokenizer and tiny-discrete" in page
    assert "tiny-discrete, codebook 2" in page
    stamp = (out / "report.html").stat().st_mtime_ns
    assert run(*words).stdout == done.stdout
    assert (out / "report.html").stat().st_mtime_ns == stamp
    swapped = (clips.root, "--tokenizer", discrete, "--tokenizer", folder, *words[5:])
    assert run(*swapped).stdout.splitlines()[0].split() == ["tiny-discrete", "tiny-tokenizer"]


@pytest.mark.parametrize(("mean", "shown"), [(-0.0001, "0.000"), (-0.25, "-0.250"), (0.0004, "0.000"), (1.5, "1.500")])
def test_no_minus_stands_before_a_zero(folder: Path, clips: Dataset, mean: float, shown: str) -> None:
    result = dataclasses.replace(evaluate(load_tokenizer(folder), clips, CONFIG), latent_mean=mean, latent_std=1.0)
    assert dict(figures([result]))["latents, mean and standard deviation"] == f"{shown}, 1.000"


def test_labels_tell_folders_of_one_name_apart(folder: Path, clips: Dataset) -> None:
    result = evaluate(load_tokenizer(folder), clips, CONFIG)
    named = [
        dataclasses.replace(result, tokenizer={"name": name, "fingerprint": "f"})
        for name in ("runs/a/model", "runs/b/model", "loom-cv-nano", "mine/other")
    ]
    assert labels(named) == ["runs/a/model", "runs/b/model", "loom-cv-nano", "other"]
