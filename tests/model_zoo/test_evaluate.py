"""Evaluation: figures against a computation by hand, shuffling, windows, what is left out and said, the command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from worldloom import media
from worldloom.artifacts import Store
from worldloom.cli import main
from worldloom.compare import psnr, side_by_side, ssim
from worldloom.errors import WorldloomError
from worldloom.loading import load_model
from worldloom.shards import Dataset
from worldloom_model_zoo.evaluate import (
    BASELINE,
    MODEL,
    SHUFFLED,
    TOKENIZER,
    EvalConfig,
    EvalResult,
    derangement,
    evaluate,
    plan,
)
from worldloom_model_zoo.evaluate_report import print_table, run
from worldloom_model_zoo.suite import REAL, Reference

CONFIG = EvalConfig(horizon=8, context=5, clips=0, batch_size=3, videos=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.world(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_models.clips(tmp_path_factory.mktemp("data") / "clips")


@pytest.fixture(scope="module")
def result(folder: Path, dataset: Dataset) -> EvalResult:
    return evaluate(load_model(folder), dataset, CONFIG)


def test_the_figures_are_those_of_a_plain_computation(folder: Path, dataset: Dataset, result: EvalResult) -> None:
    pipeline, windows = load_model(folder), plan(dataset, CONFIG)
    assert result.windows == len(windows) == 3 + 3 + 1  # clips of 40, 40 and 23 frames, windows of 13
    assert result.clips == 3
    model, baseline, mse = [], [], []
    for number, window in enumerate(windows):
        sample = dataset.load(window.sample)
        assert sample.video is not None
        truth = media.read_frames(sample.video)[window.start : window.start + 13]
        done = torch.from_numpy(sample.arrays["actions"][window.start : window.start + 12])[None]
        start = media.to_tensor(truth[:5])
        made = media.to_frames(pipeline.generate_video(start, done, 13, seed=number))[0, 5:]
        for frame in range(8):
            error = np.mean((made[frame].astype(float) - truth[5 + frame]) ** 2)
            mse.append(error)
            model.append(10 * np.log10(255**2 / error))
            still = np.mean((truth[4].astype(float) - truth[5 + frame]) ** 2)
            baseline.append(10 * np.log10(255**2 / max(still, 1 / 12)))
    table = np.array(mse).reshape(7, 8)
    assert result.psnr_per_frame[MODEL] == pytest.approx(np.mean(model), abs=1e-3)
    assert result.psnr_per_frame[BASELINE] == pytest.approx(np.mean(baseline), abs=1e-3)
    assert result.psnr[MODEL] == pytest.approx(10 * np.log10(255**2 / np.mean(mse)), abs=1e-3)
    assert result.curves[MODEL] == pytest.approx(10 * np.log10(255**2 / table.mean(axis=0)), abs=1e-3)
    assert result.gain == pytest.approx(result.psnr[MODEL] - result.psnr[BASELINE])
    assert result.gain_per_frame == pytest.approx(np.mean(model) - np.mean(baseline), abs=1e-3)
    assert [row[MODEL] for row in result.per_window] == pytest.approx(10 * np.log10(255**2 / table.mean(1)), abs=1e-3)


def test_ssim_agrees_with_the_papers_formula(result: EvalResult) -> None:
    """One frame's SSIM from Wang et al. 2004, eq. 13, Gaussian windows, borders reflected."""
    a, b = (tiny_models.moving_square(1, seed)[0] for seed in (1, 2))
    found = ssim(a[None, None], b[None, None])
    x = np.arange(11) - 5
    line = np.exp(-(x**2) / (2 * 1.5**2))
    kernel = np.outer(line, line) / line.sum() ** 2
    values = []
    for channel in range(3):
        wide = (np.pad(f[..., channel].astype(float), 5, mode="reflect") for f in (a, b))
        p, q = (np.lib.stride_tricks.sliding_window_view(f, (11, 11)) for f in wide)

        def mean(z: np.ndarray) -> np.ndarray:
            return (z * kernel).sum(axis=(2, 3))

        mp, mq = mean(p), mean(q)
        vp, vq, cov = mean(p * p) - mp**2, mean(q * q) - mq**2, mean(p * q) - mp * mq
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert found.shape == (1, 1)
    assert found[0, 0] == pytest.approx(np.mean(values), abs=1e-4)
    same = ssim(a[None, None], a[None, None])
    assert same[0, 0] == pytest.approx(1.0, abs=1e-6)
    assert all(0 < value <= 1 for value in result.ssim.values())


def test_the_result_does_not_depend_on_the_batch(folder: Path, dataset: Dataset, result: EvalResult) -> None:
    other = evaluate(load_model(folder), dataset, EvalConfig(8, 5, 0, batch_size=2, videos=0))
    for kind in (MODEL, BASELINE, SHUFFLED, TOKENIZER):
        # 8-bit rounding may flip a pixel's level by what batching does to float sums
        assert other.psnr[kind] == pytest.approx(result.psnr[kind], abs=0.01)


def test_shorter_horizons_are_those_of_shorter_evaluations(folder: Path, dataset: Dataset, result: EvalResult) -> None:
    """Over the first four frames: the same windows, evaluated with that horizon, up to the windows' spacing."""
    assert [horizon.frames for horizon in result.horizons] == [1, 2, 4, 8]
    last = result.horizons[-1]
    assert last.psnr == pytest.approx(result.psnr[MODEL])
    assert last.gain == pytest.approx(result.gain)
    assert last.action_sensitivity == pytest.approx(result.action_sensitivity)
    first = result.horizons[0]
    assert first.gain == pytest.approx(first.gain_at)
    mse = 255**2 / 10 ** (np.array(result.curves[MODEL][:4]) / 10)
    assert result.horizons[2].psnr == pytest.approx(10 * np.log10(255**2 / mse.mean()))


def test_flicker_of_repeating_is_how_much_moved(dataset: Dataset, result: EvalResult) -> None:
    moved = []
    for window in plan(dataset, CONFIG):
        sample = dataset.load(window.sample)
        assert sample.video is not None
        truth = media.read_frames(sample.video)[window.start + 4 : window.start + 13].astype(float)
        moved.append(np.abs(np.diff(truth, axis=0)).mean())
    assert result.flicker[BASELINE] == pytest.approx(np.mean(moved), rel=1e-5)
    assert set(result.flicker) == set(result.psnr)


def test_psnr_is_bounded_on_both_sides() -> None:
    assert float(psnr(0.0)) == pytest.approx(58.92, abs=0.01)
    assert float(psnr(255.0**2)) == 0


def test_a_model_that_ignores_actions_scores_zero(folder: Path, dataset: Dataset) -> None:
    deaf = load_model(folder)
    with torch.no_grad():
        for name, parameter in deaf.model.named_parameters():
            if name.startswith("action_embedder"):
                parameter.zero_()
    assert evaluate(deaf, dataset, CONFIG).action_sensitivity == 0


def test_actions_matter_to_a_model_that_hears_them(result: EvalResult) -> None:
    assert result.action_sensitivity == pytest.approx(result.psnr[MODEL] - result.psnr[SHUFFLED])
    assert result.action_sensitivity != 0
    assert SHUFFLED in result.curves


def test_actions_are_aligned_by_their_names(folder: Path, tmp_path: Path, result: EvalResult) -> None:
    """The same episodes with the action columns in another order give the same figures."""
    from worldloom.shards import ShardSample, ShardWriter, commit_dataset, open_dataset

    straight = tiny_models.clips(tmp_path / "straight")
    with ShardWriter(tmp_path / "turned") as writer:
        for sample in straight:
            sample.clip.metadata["action_names"].reverse()  # pyright: ignore[reportAttributeAccessIssue]
            turned = np.ascontiguousarray(sample.arrays["actions"][:, ::-1])
            writer.write(ShardSample(sample.clip, sample.video, {"actions": turned}))
        refs = writer.close()
    commit_dataset(tmp_path / "turned", refs)
    other = evaluate(load_model(folder), open_dataset(tmp_path / "turned"), CONFIG)
    assert other.psnr == result.psnr


def test_without_actions_it_says_so(folder: Path, tmp_path: Path) -> None:
    silent = tiny_models.clips(tmp_path / "silent", names=None)
    result = evaluate(load_model(folder), silent, CONFIG)
    assert result.action_sensitivity is None
    assert SHUFFLED not in result.psnr
    assert any("no actions" in note for note in result.notes)


def test_a_model_without_actions_leaves_them_out(tmp_path: Path, dataset: Dataset) -> None:
    result = evaluate(load_model(tiny_models.world(tmp_path, actions=())), dataset, CONFIG)
    assert result.action_sensitivity is None
    assert any("takes no actions" in note for note in result.notes)


def test_clips_can_be_selected(folder: Path, dataset: Dataset) -> None:
    wanted = dataset.clip(2).id
    result = evaluate(load_model(folder), dataset, CONFIG, select=lambda clip: clip.id == wanted)
    assert (result.windows, result.clips) == (1, 1)
    assert result.action_sensitivity is None
    assert any("two test windows" in note for note in result.notes)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (EvalConfig(horizon=6, context=5), "horizon 4k"),
        (EvalConfig(horizon=8, context=4), "context must be 1 \\+ 4k"),
        (EvalConfig(horizon=40, context=5), "no clip has the 45 frames"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(folder: Path, dataset: Dataset, config: EvalConfig, what: str) -> None:
    with pytest.raises(WorldloomError, match=what):
        evaluate(load_model(folder), dataset, config)


def test_unknown_actions_and_latents_are_refused(folder: Path, tmp_path: Path) -> None:
    strange = tiny_models.clips(tmp_path / "strange", names=("jump", "duck"))
    with pytest.raises(WorldloomError, match="does not know these actions"):
        evaluate(load_model(folder), strange, CONFIG)


def test_ranges_are_taken_from_all_parts_of_the_reference_clips(folder: Path, tmp_path: Path) -> None:
    dataset = tiny_models.clips(tmp_path / "clips", (20,) * 8)
    reference = Reference(load_model(folder), dataset, dataset)
    spans = list(reference.pieces(clips=8, frames=40))
    places = []
    for number, span in enumerate(spans):
        clip = reference.pool.whole(number).frames
        places += [at for at in range(16) if np.array_equal(clip[at : at + 5], span)]
    assert len(places) == 8
    assert max(np.diff([0, *sorted(places), 15])) <= 4  # all parts of a clip, not the first alone
    assert [len(span) for span in reference.pieces(clips=4, frames=6400)] == [20] * 4


def test_windows_are_thinned_evenly(dataset: Dataset) -> None:
    assert [(w.sample, w.start) for w in plan(dataset, EvalConfig(8, 5, clips=3))] == [(0, 0), (1, 0), (2, 0)]
    assert len(plan(dataset, EvalConfig(8, 5, clips=100))) == 7


@given(st.lists(st.sampled_from("abcde"), max_size=30), st.integers(0, 5))
def test_shuffling_never_gives_a_window_its_own_actions(clips: Sequence[str], seed: int) -> None:
    order, note = derangement(clips, seed)
    if len(clips) < 2:
        assert order is None
        return
    assert order is not None
    assert sorted(order) == list(range(len(clips)))
    assert all(i != j for i, j in enumerate(order))
    assert derangement(clips, seed) == (order, note)
    if max(clips.count(c) for c in clips) * 2 <= len(clips):
        assert all(clips[i] != clips[j] for i, j in enumerate(order))
        assert not note
    else:
        assert note


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_figures_and_a_report_once(
    folder: Path, dataset: Dataset, tmp_path: Path, worldloom_home: Path
) -> None:
    out = tmp_path / "out"
    words = ["eval", str(folder), "--data", str(dataset.root), "--context", "5", "--clips", "4", "--out", str(out)]
    words += ["--horizon", "8"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "model minus repeat last frame" in done.output
    assert "action sensitivity" in done.output
    metrics = json.loads((out / "metrics.json").read_text())
    summary = json.loads((out / "summary.json").read_text())
    assert metrics["windows"] == 4
    assert summary["gain"] == pytest.approx(metrics["psnr"][MODEL] - metrics["psnr"][BASELINE])
    assert len(metrics["curves"][MODEL]) == 8
    assert Store().get(summary["id"]).inputs[1] == dataset.index.id
    page = (out / "report.html").read_text()
    assert page.count("<video") == 4
    assert "<svg" in page
    assert "http" not in page.split("</title>")[1].replace("http://www.w3.org", "")

    stamp = (out / "report.html").stat().st_mtime_ns
    again = CliRunner().invoke(main, words)
    assert again.exit_code == 0, again.output
    assert (out / "report.html").stat().st_mtime_ns == stamp
    assert again.stdout == done.stdout
    other = CliRunner().invoke(main, [*words, "--seed", "1"])
    assert other.exit_code == 0
    assert (out / "report.html").stat().st_mtime_ns != stamp


@pytest.mark.parametrize("reference", [False, True])
def test_what_is_asked_for_is_measured_printed_and_found_again(
    folder: Path, dataset: Dataset, tmp_path: Path, worldloom_home: Path, reference: bool
) -> None:
    config = EvalConfig(
        horizon=8, context=5, clips=0, videos=1, frechet=not reference, following=True, drift=20 * reference,
        reference=str(dataset.root) if reference else "", probe_steps=2,
    )  # fmt: skip
    result = run(load_model(folder), "tiny", dataset.root, config, tmp_path)
    assert result.following is not None
    assert set(result.following.score) == {REAL, MODEL, SHUFFLED, TOKENIZER}
    assert result.following.actions == (7 if reference else 4) * 5  # windows of the first and the third clip
    assert any("every other clip" in note for note in result.notes) != reference
    if result.frechet is not None:
        assert set(result.frechet.distance) == {REAL, MODEL, BASELINE, TOKENIZER}
    if result.drift is not None:
        assert result.drift.frames == 20
    assert (result.frechet is None, result.drift is None) == (reference, not reference)
    page = (tmp_path / "report.html").read_text()
    assert "Does it do what it is told?" in page
    assert ("Not comparable" in page) != reference
    assert ("Drift of sharpness" in page) == reference
    print_table(result)

    again = run(load_model(folder), "tiny", dataset.root, config, tmp_path)
    assert again.following == result.following
    assert again.frechet == result.frechet
    assert json.dumps(again.to_dict()) == json.dumps(result.to_dict())


def test_measures_that_cannot_be_taken_say_why(folder: Path, dataset: Dataset, tmp_path: Path) -> None:
    silent = tiny_models.clips(tmp_path / "silent", names=None)
    pipeline = load_model(folder)
    with pytest.raises(WorldloomError, match="needs a model and a dataset with actions"):
        evaluate(pipeline, silent, EvalConfig(8, 5, following=True))
    with pytest.raises(WorldloomError, match="does not say which simulator"):
        evaluate(pipeline, dataset, EvalConfig(8, 5, clips=1, physics="data"))
    with pytest.raises(WorldloomError, match="at least 20 frames"):
        evaluate(pipeline, dataset, EvalConfig(8, 5, clips=1, drift=4))
    one = tiny_models.clips(tmp_path / "one", (40,))
    with pytest.raises(WorldloomError, match="no real clips to compare with"):
        evaluate(pipeline, one, EvalConfig(8, 5, drift=20))


def test_the_report_shows_truth_model_and_baseline_side_by_side(result: EvalResult) -> None:
    example = result.examples[0]
    data = side_by_side((example.truth, example.model, example.baseline), given=5)
    info = media.probe(data, count=True)
    assert (info.frames, info.pix_fmt) == (13, "yuv420p")
    assert info.width >= 3 * 192
    assert info.height >= 192
    shown = media.read_frames(data)
    for panel, frames in enumerate((example.truth, example.model, example.baseline)):
        left = panel * (192 + 8)
        small = shown[:, 8 : 8 + 192, left : left + 192].reshape(13, 32, 6, 32, 6, 3).mean(axis=(2, 4))
        assert np.abs(small - frames).mean() < 12
    # grey over the given frames, blue over the predicted ones
    assert shown[4, 3, 100].max() - shown[4, 3, 100].min() < 20
    assert int(shown[5, 3, 100, 2]) - int(shown[5, 3, 100, 0]) > 100


def test_torchmetrics_missing_says_what_to_install(
    folder: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    with pytest.raises(WorldloomError, match="worldloom\\[eval\\]"):
        evaluate(load_model(folder), dataset, CONFIG)
