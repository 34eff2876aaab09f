"""The recipe "preview-decoder": it learns the tokenizer's frames, leaves the tokenizer alone, and names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from finetune_runs import SMALL, curve

from worldloom.artifacts import Store
from worldloom.errors import WorldloomError
from worldloom_finetune import train
from worldloom_tokenizers import load_tokenizer
from worldloom_tokenizers.preview import load_preview

TINY = ("data.size=[32,32]", "data.frames=5", "model.widths=[8,8]", "model.blocks=[1,1]")


def _train(data: Path, out: Path, teacher: str | Path, *overrides: str) -> dict[str, Any]:
    config = train.load_config("preview-decoder", None, (*SMALL, *TINY, *overrides))
    return train.run(
        train.Request("preview-decoder", str(data), str(teacher), str(out), command="a test", quiet=True), config
    )


@pytest.mark.parametrize("target", ["teacher", "frames"])
def test_a_preview_decoder_learns_and_names_its_tokenizer(
    target: str, clips: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    teacher = load_tokenizer(tokenizer_folder)
    settings = (f"objective.target={target}", "trainer.max_steps=60", "ema.decay=0", "optim.lr=0.003")
    summary = _train(clips, tmp_path / "run", tokenizer_folder, *settings)
    figures = summary["figures"]
    assert figures["val_loss_last"] < figures["val_loss_first"]
    nearest = max(("psnr_db_to_tokenizer", "psnr_db"), key=figures.__getitem__)
    assert nearest == ("psnr_db_to_tokenizer" if target == "teacher" else "psnr_db")
    preview = load_preview(summary["model"])
    preview.check(teacher.fingerprint)
    assert preview.tokenizer.name == str(tokenizer_folder)
    assert load_tokenizer(tokenizer_folder).fingerprint == teacher.fingerprint
    assert summary["digests"]["tokenizer"] == teacher.fingerprint
    assert any(teacher.fingerprint in line for line in Store().get(summary["artifact"]).inputs)
    assert summary["parameters"]["trained"] == summary["parameters"]["all"]
    assert str(tokenizer_folder) in (Path(summary["model"]) / "README.md").read_text()
    assert list((tmp_path / "run" / "samples").glob("*.png"))


def test_each_term_is_in_the_loss(clips: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    def first(name: str, *settings: str) -> dict[str, float]:
        _train(clips, tmp_path / name, tokenizer_folder, "trainer.max_steps=1", *settings)
        return json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])

    plain, terms = first("plain"), first("terms", "objective.temporal=0.5", "objective.l2=0")
    assert terms["psnr"] == plain["psnr"]
    mse = 4 / 10 ** (plain["psnr"] / 10)
    assert terms["loss"] == pytest.approx(plain["loss"] - 2 * mse + 0.5 * terms["temporal"], rel=1e-4)
    assert first("noisy", "objective.latent_noise=0.5")["psnr"] < plain["psnr"]


def test_a_resumed_run_gives_the_decoder_of_an_uninterrupted_one(
    clips: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    settings = ("optim.schedule=constant", "trainer.val_every=0")
    _train(clips, tmp_path / "resumed", tokenizer_folder, *settings, "trainer.max_steps=4")
    _train(clips, tmp_path / "resumed", tokenizer_folder, *settings, "trainer.max_steps=9")
    _train(clips, tmp_path / "whole", tokenizer_folder, *settings, "trainer.max_steps=9")
    assert curve(tmp_path / "resumed") == curve(tmp_path / "whole")
    one, other = ((tmp_path / name / "model/model.safetensors").read_bytes() for name in ("resumed", "whole"))
    assert one == other


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        (("model.latent_channels=3",), "follow from the tokenizer"),
        (("data.frames=6",), "1 \\+ 4 k"),
        (("model.width=3",), "widths"),
        (("lora.rank=2",), "trained whole"),
    ],
)
def test_mistakes_are_answered(
    settings: tuple[str, ...], what: str, clips: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(WorldloomError, match=what):
        _train(clips, tmp_path / "run", tokenizer_folder, "trainer.max_steps=1", *settings)


def test_an_unknown_tokenizer_is_answered(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(WorldloomError, match="loom-cv-nano"):
        _train(clips, tmp_path / "run", "loom-cv-nan", "trainer.max_steps=1")
