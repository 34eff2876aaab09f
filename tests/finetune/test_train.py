"""Runs from request to registered model."""

from __future__ import annotations

import fcntl
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from finetune_runs import SMALL, curve, make_latents

from worldloom import config as configs
from worldloom import registry
from worldloom.artifacts import Store, file_digest
from worldloom.errors import WorldloomError
from worldloom.shards import open_dataset
from worldloom.tracking import tracker
from worldloom_finetune import train
from worldloom_finetune.catalog import RECIPES
from worldloom_finetune.config import OptimConfig
from worldloom_finetune.module import learning_rate
from worldloom_model_zoo import load_model
from worldloom_tokenizers import load_tokenizer

TINY_VAE = ("model={widths=[8,8,8]}", "data.size=[32,32]", "data.frames=5")


def _train(
    data: Path, out: Path, *overrides: str, model: str | Path = "predict/tiny", recipe: str = "world", **extra: Any
):
    config = train.load_config(recipe, None, (*SMALL, *overrides))
    return train.run(
        train.Request(recipe, str(data), str(model), str(out), command="a test", quiet=True, **extra), config
    )


def test_a_model_from_scratch_learns_and_loads(tokenizer_folder: Path, tmp_path: Path) -> None:
    fingerprint = load_tokenizer(tokenizer_folder).fingerprint
    data = make_latents(tmp_path / "data", samples=64, fingerprint=fingerprint, tokenizer=str(tokenizer_folder))
    settings = ("trainer.max_steps=150", "data.batch_size=8", "data.val_batches=20", "ema.decay=0")
    summary = _train(data, tmp_path / "run", *settings)
    figures = summary["figures"]
    assert figures["loss_last"] < 0.8 * figures["loss_first"]
    assert figures["val_loss_last"] < 0.85 * figures["val_loss_first"]
    pipeline = load_model(summary["model"])
    assert pipeline.action_dim == 2
    assert pipeline.config.tokenizer.fingerprint == fingerprint
    video = pipeline.generate_video(torch.zeros(1, 3, 5, 32, 32), torch.zeros(1, 8, 2), frames=9)
    assert video.shape == (1, 3, 9, 32, 32)
    assert list((tmp_path / "run" / "samples").glob("*.png"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns itself of much while it compiles
def test_compiled_blocks_learn_the_same(latents: Path, base_folder: Path, tmp_path: Path) -> None:
    settings = ("trainer.max_steps=3", "objective.context=teacher_forcing", "objective.kind=distill")
    compiled = {}
    for name in ("false", "true"):
        _train(latents, tmp_path / name, *settings, f"trainer.compile={name}", model=base_folder)
        compiled[name] = [loss for _, loss, _ in curve(tmp_path / name)]
    assert compiled["true"] == pytest.approx(compiled["false"], rel=1e-4)


def test_what_a_run_leaves_can_be_traced(
    latents: Path, base_folder: Path, tmp_path: Path, worldloom_home: Path
) -> None:
    summary = _train(
        latents, tmp_path / "run", "trainer.max_steps=3", "tracking.enabled=true", model=base_folder, name="traced"
    )
    folder, digests = Path(summary["model"]), summary["digests"]
    assert summary["sha256"] == file_digest(folder / "model.safetensors")
    assert digests["base"] == file_digest(base_folder / "model.safetensors")
    index = open_dataset(latents).index
    assert digests == {"dataset": index.id, "tokenizer": index.tokenizer["fingerprint"], "base": digests["base"]}
    artifact = Store().get(summary["artifact"])
    assert artifact.kind == "model"
    assert artifact.inputs[0] == index.id
    assert any(digests["tokenizer"] in item for item in artifact.inputs)
    assert any(digests["base"] in item for item in artifact.inputs)

    registered = tracker().find_model("traced", "current")
    assert registered is not None
    assert registered.run_id == summary["tracking"]["run"]
    for key, value in digests.items():
        assert registered.tags[key] == value
    assert registered.tags["sha256"] == summary["sha256"]

    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{worldloom_home / 'mlflow.db'}")
    run = client.get_run(summary["tracking"]["run"])
    assert {"loss", "lr", "grad_norm", "val_loss", "steps_per_second"} <= run.data.metrics.keys()
    assert run.data.params["optim.lr"] == "0.01"
    assert [item.path for item in client.list_artifacts(run.info.run_id, "samples")]

    card = (folder / "README.md").read_text()
    for part in ("a test", digests["base"], digests["tokenizer"], digests["dataset"], "val_loss_last", "[optim]"):
        assert part in card


def test_a_model_of_this_machine_enters_the_lineage_by_its_artifact(latents: Path, tmp_path: Path) -> None:
    first = _train(latents, tmp_path / "first", "trainer.max_steps=1")
    second = _train(latents, tmp_path / "second", "trainer.max_steps=1", model=first["model"])
    assert first["artifact"] in Store().get(second["artifact"]).inputs


def test_full_fine_tuning_starts_from_the_base(latents: Path, base_folder: Path, tmp_path: Path) -> None:
    summary = _train(
        latents, tmp_path / "run", "trainer.max_steps=1", "optim.lr=1e-9", "ema.decay=0", model=base_folder
    )
    base, tuned = load_model(base_folder).model.state_dict(), load_model(summary["model"]).model.state_dict()
    assert base.keys() == tuned.keys()
    assert max((base[k] - tuned[k]).abs().max() for k in base) < 1e-6


def test_a_finished_run_is_left_alone_and_a_longer_one_goes_on(latents: Path, tmp_path: Path) -> None:
    settings = ("optim.schedule=constant", "trainer.val_every=0")
    _train(latents, tmp_path / "run", *settings, "trainer.max_steps=4")
    before = (tmp_path / "run" / "summary.json").stat().st_mtime_ns
    _train(latents, tmp_path / "run", *settings, "trainer.max_steps=4")
    assert (tmp_path / "run" / "summary.json").stat().st_mtime_ns == before
    assert _train(latents, tmp_path / "run", *settings, "trainer.max_steps=9")["steps"] == 9
    _train(latents, tmp_path / "whole", *settings, "trainer.max_steps=9")
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_validating_and_sampling_leave_the_loss_curve_as_it_is(latents: Path, tmp_path: Path) -> None:
    _train(latents, tmp_path / "a", "trainer.max_steps=5", "trainer.val_every=1", "trainer.sample_every=2")
    _train(latents, tmp_path / "b", "trainer.max_steps=5", "trainer.val_every=0", "data.num_workers=1")
    assert curve(tmp_path / "a") == curve(tmp_path / "b")


@pytest.mark.parametrize(
    ("override", "named"),
    [("optim.lr=0.02", r"optim\.lr"), ("trainer.seed=1", r"trainer\.seed"), ("lora.rank=2", "lora")],
)
def test_other_settings_are_not_mixed_into_a_run(
    override: str, named: str, latents: Path, base_folder: Path, tmp_path: Path
) -> None:
    _train(latents, tmp_path, "trainer.max_steps=1", model=base_folder)
    with pytest.raises(WorldloomError, match=named):
        _train(latents, tmp_path, "trainer.max_steps=1", override, model=base_folder)


def test_other_data_are_not_mixed_into_a_run(latents: Path, tmp_path: Path) -> None:
    _train(latents, tmp_path / "run", "trainer.max_steps=1")
    other = make_latents(tmp_path / "other", seed=9)
    with pytest.raises(WorldloomError, match=r"digests\.dataset"):
        _train(other, tmp_path / "run", "trainer.max_steps=2")


def test_a_run_on_several_datasets_goes_on_with_other_micro_batches(
    latents: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    fingerprint = load_tokenizer(tokenizer_folder).fingerprint
    more = make_latents(tmp_path / "more", samples=4, seed=1, fingerprint=fingerprint, tokenizer=str(tokenizer_folder))
    both, out = Path(f"{latents},{more}"), tmp_path / "run"
    settings = ("data.weights=[1,3]", "data.memory_gb=0", "objective.pixel_weighting=0", "ema.decay=0")
    summary = _train(both, out, "trainer.max_steps=3", *settings)
    inputs = Store().get(summary["artifact"]).inputs
    assert list(inputs[:2]) == [open_dataset(root).index.id for root in (latents, more)]
    _train(both, out, "trainer.max_steps=5", "trainer.accumulate=2", *settings)
    state = json.loads((out / "checkpoints" / "step-00000005" / "state.json").read_text())
    place = state["facts"]["data"]
    assert (place["batch"], place["batches"]) == (2, 3 + 2 * 2)
    with pytest.raises(WorldloomError, match=r"data\.weights"):
        _train(both, out, "trainer.max_steps=6", *settings[1:])


def test_two_runs_cannot_share_a_folder(latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    moments = iter(range(0, 10_000, 6))
    monkeypatch.setattr(train.time, "monotonic", lambda: next(moments))
    with open(tmp_path / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(WorldloomError, match="another run"):
            _train(latents, tmp_path, "trainer.max_steps=1")


def test_clips_are_encoded_once_and_another_tokenizer_is_refused(
    clips: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    settings = ("trainer.max_steps=2", "data.frames=9", "data.size=[32,32]")
    summary = _train(clips, tmp_path / "run", *settings, tokenizer=str(tokenizer_folder))
    latents = open_dataset(tmp_path / "run" / "latents")
    assert latents.index.tokenizer["fingerprint"] == load_tokenizer(tokenizer_folder).fingerprint
    assert len(latents) == 6
    assert summary["digests"]["dataset"] == latents.index.id
    made = (tmp_path / "run" / "latents" / "dataset.json").stat().st_mtime_ns
    _train(clips, tmp_path / "run", *settings, tokenizer=str(tokenizer_folder))
    assert (tmp_path / "run" / "latents" / "dataset.json").stat().st_mtime_ns == made

    torch.manual_seed(5)
    other = _train(
        clips, tmp_path / "vae", *TINY_VAE, "trainer.max_steps=1", model="causal-vae/nano", recipe="tokenizer"
    )
    with pytest.raises(WorldloomError, match="another tokenizer"):
        _train(clips, tmp_path / "run", *settings, tokenizer=other["model"])


def test_latents_of_another_tokenizer_do_not_fit_a_model(base_folder: Path, tmp_path: Path) -> None:
    other = make_latents(tmp_path / "other", fingerprint="e" * 64)
    with pytest.raises(WorldloomError, match="another tokenizer"):
        _train(other, tmp_path / "run", "trainer.max_steps=1", model=base_folder)


def test_latents_are_trained_on_where_their_tokenizer_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_latents(tmp_path / "data")
    with pytest.raises(WorldloomError, match="pixel_weighting needs the tokenizer"):
        _train(data, tmp_path / "weighted", "trainer.max_steps=2")
    summary = _train(data, tmp_path / "run", "trainer.max_steps=2", "objective.pixel_weighting=0")
    assert summary["steps"] == 2
    assert "no samples" in capsys.readouterr().err


def test_data_without_actions(tmp_path: Path) -> None:
    data = make_latents(tmp_path / "data", actions=0)
    summary = _train(data, tmp_path / "run", "trainer.max_steps=2", "objective.pixel_weighting=0")
    assert configs.read_toml(Path(summary["model"]) / "config.toml")["model"]["action_dim"] == 0


def test_a_tokenizer_learns_and_its_latents_have_unit_variance(clips: Path, tmp_path: Path) -> None:
    summary = _train(
        clips,
        tmp_path / "run",
        *TINY_VAE,
        "trainer.max_steps=80",
        "ema.decay=0",
        model="causal-vae/nano",
        recipe="tokenizer",
    )
    assert summary["figures"]["val_loss_last"] < 0.8 * summary["figures"]["val_loss_first"]
    assert summary["figures"]["psnr_db"] > 10
    tokenizer = load_tokenizer(summary["model"])
    from worldloom import media

    video = torch.cat([media.to_tensor(media.read_frames(sample.video))[:, :, :5] for sample in open_dataset(clips)])
    with torch.no_grad():
        latents = tokenizer.encode(video)
    assert 0.5 < latents.std() < 2
    assert Store().get(summary["artifact"]).kind == "tokenizer"
    again = _train(
        clips, tmp_path / "more", "trainer.max_steps=1", "data.frames=5", model=summary["model"], recipe="tokenizer"
    )
    assert again["digests"]["base"] == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": "wrld"}, "world"),
        ({"model": "loom-world-nan"}, "loom-world-nano"),
        ({"model": "predict/nanoo"}, "predict/nano"),
        ({"data": "no/such/folder"}, "dataset.json"),
    ],
)
def test_unknown_names_are_answered_with_what_there_is(
    change: dict[str, str], message: str, latents: Path, tmp_path: Path
) -> None:
    given = {"recipe": "world", "model": "predict/tiny", "data": str(latents), **change}
    with pytest.raises(WorldloomError) as error:
        _train(Path(given["data"]), tmp_path / "run", recipe=given["recipe"], model=given["model"])
    assert message in str(error.value)


def test_the_command_prints_where_the_result_is(latents: Path, tmp_path: Path) -> None:
    from worldloom.cli import main

    out = tmp_path / "run"
    flags = [part for setting in (*SMALL, "trainer.max_steps=2") for part in ("--set", setting)]
    arguments = ["finetune", "world", "--data", str(latents), "--model", "predict/tiny", "--out", str(out)]
    result = CliRunner().invoke(main, [*arguments, *flags], standalone_mode=False)
    assert result.exception is None, result.exception
    assert str(out / "model") in result.output
    assert "steps/s" in result.output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["artifact"] in result.output
    assert configs.load(type(train.load_config("world")), out / "config.toml").optim.lr == 0.01


def test_the_command_lists_every_setting_with_its_sentence() -> None:
    from worldloom.cli import main

    for recipe in RECIPES:
        result = CliRunner().invoke(main, ["finetune", recipe, "--help-config"], standalone_mode=False)
        assert result.exception is None, result.exception
        kind = type(train.load_config(recipe))
        for key, _, _, sentence in configs.describe(kind):
            assert sentence, f"{key} has no sentence"
            assert key in result.output


def test_a_mistyped_setting_names_the_nearest(latents: Path, tmp_path: Path) -> None:
    with pytest.raises(WorldloomError, match=r"optim\.lr"):
        _train(latents, tmp_path, "optim.lrr=1")


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_the_shipped_recipes_load(recipe: str) -> None:
    config = train.load_config(recipe)
    assert config.trainer.max_steps > 100
    assert registry.entry("recipes", recipe).summary
    again = train.from_json(json.loads(json.dumps(train.to_json(train.Request(recipe, "d", "m", "o"), config))))
    assert again == (train.Request(recipe, "d", "m", "o"), config)


def test_the_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=10)
    rates = [learning_rate(step, 100, config) for step in range(101)]
    assert rates[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert max(rates) == 1.0
    assert rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert learning_rate(90, 100, OptimConfig(lr=1.0, warmup_steps=10, schedule="constant")) == 1.0


def test_settings_that_did_not_exist_when_a_run_began_count_as_their_defaults(tmp_path: Path) -> None:
    config = configs.to_dict(train.load_config("world"))
    defaults = configs.to_dict(type(train.load_config("world"))())
    now = {"recipe": "world", "digests": {"dataset": "a"}, "config": config}
    without = {name: dict(values) if isinstance(values, dict) else values for name, values in config.items()}
    for name in ("rollout_share", "shift"):
        del without["objective"][name]
    before = {**now, "config": without}
    with pytest.raises(WorldloomError, match=r"objective\.shift: 1\.0 before, 3\.0 now"):
        train.check_same_run(before, now, defaults, tmp_path)
    same = {**now, "config": {**config, "objective": {**config["objective"], "shift": 1.0}}}
    train.check_same_run(before, same, defaults, tmp_path)
    other = {**same, "config": {**same["config"], "objective": {**same["config"]["objective"], "rollout_share": 0.5}}}
    with pytest.raises(WorldloomError, match=r"objective\.rollout_share: 0\.0 before, 0\.5 now"):
        train.check_same_run(before, other, defaults, tmp_path)
