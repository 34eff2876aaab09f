"""Training state on disk: whole, checked, and never a pickle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from worldloom.errors import WorldloomError
from worldloom_finetune import checkpointing
from worldloom_finetune.checkpointing import TrainState


def _state(step: int) -> TrainState:
    groups = {"weights": {"w": torch.full((3,), float(step))}, "optimizer": {"w.exp_avg": torch.zeros(3)}}
    return TrainState(step, groups, {"note": "é", "step_of": step})


def _model(layout: torch.memory_format = torch.contiguous_format) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(2, 2)).to(memory_format=layout)
    return model, dict(model.named_parameters())


def _steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + count):
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_restored_optimizer_continues_bit_for_bit(layout: torch.memory_format, tmp_path: Path) -> None:
    model, parameters = _model(layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    _steps(model, optimizer, 3)
    checkpointing.commit(tmp_path, TrainState(3, checkpointing.capture(parameters, optimizer), {}), keep=1)
    expected = _steps(model, optimizer, 4, first=3)

    model, parameters = _model(layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    state = checkpointing.read_latest(tmp_path)
    assert state is not None
    checkpointing.restore(state.groups, parameters, optimizer)
    assert _steps(model, optimizer, 4, first=3) == expected


def test_latest_moves_and_old_states_go(tmp_path: Path) -> None:
    assert checkpointing.read_latest(tmp_path) is None
    for step in (5, 10, 15):
        checkpointing.commit(tmp_path, _state(step), keep=2)
    state = checkpointing.read_latest(tmp_path)
    assert state is not None
    assert (state.step, state.facts["step_of"], state.facts["note"]) == (15, 15, "é")
    assert torch.equal(state.groups["weights"]["w"], torch.full((3,), 15.0))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000010", "step-00000015"]


def test_a_state_that_latest_never_reached_does_not_count(tmp_path: Path) -> None:
    checkpointing.commit(tmp_path, _state(5), keep=3)
    checkpointing.commit(tmp_path, _state(10), keep=3)
    (tmp_path / "latest").write_text("step-00000005")  # as if killed between the folder and the pointer
    (tmp_path / ".step-00000015.abc.worldloom-tmp").mkdir()
    (tmp_path / ".latest.0123.worldloom-tmp").write_text("step-000")  # a kill while the pointer was written
    checkpointing.sweep(tmp_path)
    state = checkpointing.read_latest(tmp_path)
    assert state is not None
    assert state.step == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000005"]
    checkpointing.commit(tmp_path, _state(10), keep=3)  # the rerun gets there again
    assert (tmp_path / "latest").read_text() == "step-00000010"


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_state_is_refused_by_name(name: str, damage: str, tmp_path: Path) -> None:
    folder = checkpointing.commit(tmp_path, _state(5), keep=2)
    file = folder / name
    data = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2 if name != "state.json" else data.index(b'"files"')] ^= 1
        file.write_bytes(data)
    with pytest.raises(WorldloomError, match="newest checkpoint"):
        checkpointing.read_latest(tmp_path)


def test_only_safetensors_and_json_are_written(tmp_path: Path) -> None:
    folder = checkpointing.commit(tmp_path, _state(5), keep=2)
    assert {p.suffix for p in folder.iterdir()} == {".safetensors", ".json"}


def test_a_state_of_other_weights_is_refused(tmp_path: Path) -> None:
    model, parameters = _model()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(WorldloomError, match="lacks trained weights"):
        checkpointing.restore(_state(1).groups, parameters, optimizer)
