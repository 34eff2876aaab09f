"""LoRA: nothing at first, something after training, and the same bits after reloading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from finetune_runs import RATIO, SMALL
from torch import Tensor, nn

from worldloom.errors import WorldloomError
from worldloom_finetune import checkpointing, lora, train
from worldloom_finetune.config import LoraConfig
from worldloom_finetune.world import WorldJob
from worldloom_model_zoo import load_model
from worldloom_model_zoo.predict.pipeline import PredictPipeline


def _inputs(action_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 16, 3, 4, 4, generator=generator)
    return x, torch.full((2, 3), 0.4), torch.randn(2, 2 * RATIO, action_dim, generator=generator)


@torch.no_grad()
def _velocity(model: nn.Module, action_dim: int = 2) -> Tensor:
    return model.eval()(*_inputs(action_dim))


def _request(data: Path, model: Path, out: Path) -> train.Request:
    return train.Request("world", str(data), str(model), str(out), command="a test", quiet=True)


def _config(*overrides: str):
    return train.load_config("world", None, (*SMALL, "lora.rank=4", "trainer.max_steps=6", *overrides))


def test_a_fresh_adapter_changes_nothing(latents: Path, base_folder: Path, tmp_path: Path) -> None:
    job = WorldJob.open(_request(latents, base_folder, tmp_path), _config())
    assert torch.equal(_velocity(job.model), _velocity(load_model(base_folder).model))
    names = lora.trained(job.model)
    assert names
    assert all("lora_" in name for name in names)
    trained, total = lora.count(job.model)
    assert 0 < trained < total / 2
    adapted = {name.split(".lora_")[0] for name in names}
    assert {name.rpartition(".")[2] for name in adapted} == {
        "q_proj", "k_proj", "v_proj", "output_proj", "layer1", "layer2"
    }  # fmt: skip


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_trained_adapter_reloads_to_the_same_bits(
    ema: float, latents: Path, base_folder: Path, tmp_path: Path
) -> None:
    request, config = _request(latents, base_folder, tmp_path / "run"), _config(f"ema.decay={ema}")
    summary = train.run(request, config)
    reloaded = load_model(summary["model"])

    job = WorldJob.open(request, config)  # the model as it was in training, from the training state
    state = checkpointing.read_latest(tmp_path / "run" / "checkpoints")
    assert state is not None
    final = state.groups["ema" if ema else "weights"]
    with torch.no_grad():
        for name, p in lora.trained(job.model).items():
            p.copy_(final[name])
    assert torch.equal(_velocity(reloaded.model), _velocity(job.model))

    base = load_model(base_folder)
    assert (_velocity(reloaded.model) - _velocity(base.model)).abs().max() > 1e-3
    trained = PredictPipeline(job.model.eval(), base.tokenizer, reloaded.config)
    start, actions = torch.zeros(1, 3, 5, 32, 32), torch.ones(1, 12, 2)
    samples = [p.generate_video(start, actions, frames=13, seed=1) for p in (reloaded, trained, base)]
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_actions_of_another_size_are_trained_whole_and_saved_with_the_adapter(
    latents_of_three_actions: Path, base_folder: Path, tmp_path: Path
) -> None:
    summary = train.run(_request(latents_of_three_actions, base_folder, tmp_path / "run"), _config("ema.decay=0"))
    reloaded = load_model(summary["model"])
    assert reloaded.action_dim == 3
    record = json.loads((Path(summary["model"]) / "adapter_config.json").read_text())
    assert record["modules_to_save"] == ["action_embedder"]
    state = checkpointing.read_latest(tmp_path / "run" / "checkpoints")
    assert state is not None
    whole = [name for name in state.groups["weights"] if "lora_" not in name]
    assert whole
    assert all("action_embedder" in name for name in whole)
    loaded = {name.replace("modules_to_save.default.", ""): p for name, p in reloaded.model.named_parameters()}
    for name in whole:
        assert torch.equal(loaded[name.replace("modules_to_save.default.", "")], state.groups["weights"][name])
    # A new embedding starts with no effect; training gave it one.
    x, sigma, actions = _inputs(3)
    with torch.no_grad():
        assert not torch.equal(reloaded.model(x, sigma, actions), reloaded.model(x, sigma, None))


def test_an_adapter_names_its_base_and_refuses_another(latents: Path, base_folder: Path, tmp_path: Path) -> None:
    import shutil

    own_base = tmp_path / "base"
    shutil.copytree(base_folder, own_base)
    summary = train.run(_request(latents, own_base, tmp_path / "run"), _config())
    load_model(summary["model"])
    weights = own_base / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(WorldloomError, match="other base weights"):
        load_model(summary["model"])


def test_equal_runs_write_equal_adapters(latents: Path, base_folder: Path, tmp_path: Path) -> None:
    folders = [
        Path(train.run(_request(latents, base_folder, tmp_path / name), _config())["model"]) for name in ("a", "b")
    ]
    for name in ("adapter_model.safetensors", "adapter_config.json", "config.toml"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_a_preset_cannot_be_adapted(latents: Path, tmp_path: Path) -> None:
    with pytest.raises(WorldloomError, match="preset has no weights"):
        train.run(_request(latents, Path("predict/tiny"), tmp_path / "run"), _config())


def test_targets_that_match_nothing_name_what_would() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(WorldloomError, match=r"lora\.targets") as error:
        lora.inject(model, LoraConfig(rank=2, targets=("nonsense",)))
    assert "'0'" in str(error.value)
