"""The recipe "world" under its other objectives: what the model gains, how its result is sampled, what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from finetune_runs import SMALL

from worldloom import WorldloomError
from worldloom import config as configs
from worldloom.artifacts import file_digest
from worldloom.weights import read_weights
from worldloom_finetune import train
from worldloom_model_zoo import load_model
from worldloom_model_zoo.predict.config import PredictCheckpoint

QUICK = (
    *SMALL,
    "objective.pixel_weighting=0",
    "trainer.max_steps=2",
    "trainer.val_every=0",
    "ema.decay=0",
    "optim.lr=1e-3",
)


def finetuned(out: Path, data: Path, model: Path | str, *settings: str):
    """Train for two steps and load the result."""
    train.run(
        train.Request("world", str(data), str(model), str(out), command="a test", quiet=True),
        train.load_config("world", None, (*QUICK, *settings)),
    )
    return load_model(str(out / "model"))


def test_distillation_changes_the_student_and_how_it_is_sampled(
    tmp_path: Path, latents: Path, base_folder: Path
) -> None:
    settings = ("objective.kind=distill", "objective.steps=1", "objective.rollout_share=0.5", "objective.shift=2.0")
    student = finetuned(tmp_path / "run", latents, base_folder, *settings)
    assert (student.sampler.steps, student.sampler.method, student.sampler.shift) == (1, "euler", 2.0)
    before = read_weights(base_folder)
    assert any(not torch.equal(value, before[name]) for name, value in student.model.state_dict().items())


def test_a_student_is_distilled_on_by_a_teacher_that_is_not_its_base(
    tmp_path: Path, latents: Path, base_folder: Path
) -> None:
    settings = ("objective.kind=distill", "objective.steps=1", "objective.rollout_share=0.5")
    finetuned(tmp_path / "first", latents, base_folder, *settings)
    student = tmp_path / "first" / "model"
    by_itself = finetuned(tmp_path / "itself", latents, student, *settings).model.state_dict()
    taught = finetuned(
        tmp_path / "taught", latents, student, *settings, f"objective.teacher={base_folder}"
    ).model.state_dict()
    assert any(not torch.equal(value, by_itself[name]) for name, value in taught.items())
    digests = json.loads((tmp_path / "taught" / "summary.json").read_text())["digests"]
    assert digests["teacher"] == file_digest(base_folder / "model.safetensors") != digests["base"]


def test_a_teacher_with_its_actions_in_another_order_is_refused(
    tmp_path: Path, latents: Path, base_folder: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(base_folder, teacher)
    config = configs.load(PredictCheckpoint, base_folder / "config.toml")
    names = tuple(reversed(config.action_names)) or ("left", "right")
    configs.save(dataclasses.replace(config, action_names=names), teacher / "config.toml")
    with pytest.raises(WorldloomError, match="different orders"):
        finetuned(tmp_path / "run", latents, base_folder, "objective.kind=distill", f"objective.teacher={teacher}")


def test_distillation_from_no_teacher_is_refused(
    tmp_path: Path, latents: Path, latents_of_three_actions: Path, base_folder: Path
) -> None:
    for data, model in ((latents, "predict/tiny"), (latents_of_three_actions, base_folder)):
        with pytest.raises(WorldloomError, match="teacher must be trained"):
            finetuned(tmp_path / "run", data, model, "objective.kind=distill")


def test_joint_training_gives_a_world_model_an_action_head(tmp_path: Path, latents: Path, base_folder: Path) -> None:
    world = finetuned(tmp_path / "run", latents, base_folder, "objective.action_weight=0.5")
    assert world.model.config.action_head
    video = torch.zeros(1, 3, 5, 32, 32)
    assert world.infer_actions(video).shape == (1, 4, 2)
    actions, made = world.act(video, "", 4)
    assert (actions.shape, made.shape) == ((1, 4, 2), (1, 3, 9, 32, 32))


def test_a_shortcut_model_and_an_edm_model_are_sampled_as_they_were_trained(
    tmp_path: Path, latents: Path, base_folder: Path
) -> None:
    short = finetuned(tmp_path / "shortcut", latents, base_folder, "objective.kind=shortcut", "objective.steps=8")
    assert short.model.config.step_size
    assert (short.sampler.method, short.sampler.steps) == ("shortcut", 4)
    edm = finetuned(tmp_path / "edm", latents, "predict/tiny", "objective.kind=edm", "objective.sigma_data=0.7")
    assert (edm.sampler.method, edm.sampler.sigma_data) == ("edm_heun", 0.7)
    for world in (short, edm):
        made = world.generate_video(torch.zeros(1, 3, 5, 32, 32), torch.zeros(1, 8, 2), 9)
        assert made.shape == (1, 3, 9, 32, 32)
        assert made.isfinite().all()


def test_new_parts_under_lora_are_refused(tmp_path: Path, latents: Path, base_folder: Path) -> None:
    with pytest.raises(WorldloomError, match="LoRA would leave untrained"):
        finetuned(tmp_path / "run", latents, base_folder, "objective.action_weight=0.5", "lora.rank=2")
