"""Averages of checkpoints: by hand, as a model that runs, what is recorded, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from worldloom.artifacts import Store
from worldloom.averaging import average
from worldloom.cli import main
from worldloom.errors import WorldloomError
from worldloom.loading import load_model
from worldloom.weights import read_weights, write_weights


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return tiny_models.tokenizer_folder(tmp_path / "tokenizer")


@pytest.fixture
def two(tmp_path: Path, tokenizer: Path) -> tuple[str, str]:
    folders = [tiny_models.world_folder(tmp_path / name, tokenizer, seed=seed) for seed, name in enumerate("ab")]
    return str(folders[0]), str(folders[1])


def test_an_average_is_the_mean_of_all_tensors_and_a_model(tmp_path: Path, two: tuple[str, str]) -> None:
    store, out = Store(tmp_path / "store"), tmp_path / "mean"
    base = store.put(two[1], kind="model", name="base")
    done = CliRunner().invoke(
        main, ["models", "average", f"{two[0]}=0.75", f"{two[1]}=.25", "--out", str(out), "--store", str(store.root)]
    )
    assert done.exit_code == 0, done.output
    a, b, mean = (load_file(Path(folder) / "model.safetensors") for folder in (*two, out))
    assert mean.keys() == a.keys()
    for key, tensor in mean.items():
        assert tensor.dtype == a[key].dtype
        torch.testing.assert_close(tensor, (0.75 * a[key].double() + 0.25 * b[key].double()).to(tensor.dtype))
    assert any(not torch.equal(a[key], b[key]) for key in a)
    assert (out / "config.toml").read_text() == (Path(two[0]) / "config.toml").read_text()
    (made,) = (artifact for artifact in store.find("model") if artifact.name == "mean")
    assert made.id in done.output
    assert base.id in made.inputs  # a checkpoint that was made here; the other is named with its digest
    assert any(given.startswith(f"model:{two[0]}@") for given in made.inputs)
    assert load_model(out).action_dim == 3


def test_low_precision_is_averaged_in_high(tmp_path: Path, two: tuple[str, str]) -> None:
    for folder in map(Path, two):
        write_weights({key: tensor.half() for key, tensor in read_weights(folder).items()}, folder)
    average({two[0]: 0.7, two[1]: 0.3}, tmp_path / "mean", Store(tmp_path / "store"))
    a, b, mean = (load_file(Path(folder) / "model.safetensors") for folder in (*two, tmp_path / "mean"))
    for key, tensor in mean.items():
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, (0.7 * a[key].double() + 0.3 * b[key].double()).half())


def test_what_has_no_average_is_refused(tmp_path: Path, tokenizer: Path, two: tuple[str, str]) -> None:
    out = tmp_path / "mean"
    for a, b in ((0.7, 0.7), (1.5, -0.5), (float("nan"), 0.5), (1.0, None)):
        shares = {two[0]: a} | ({} if b is None else {two[1]: b})
        with pytest.raises(WorldloomError, match="positive shares that sum to 1"):
            average(shares, out)
    other = str(tiny_models.world_folder(tmp_path / "c", tokenizer, actions=("left", "right")))
    with pytest.raises(WorldloomError, match="differ in model and action_names"):
        average({two[0]: 0.5, other: 0.5}, out)
    elsewhere = tiny_models.tokenizer_folder(tmp_path / "another", seed=5)
    with pytest.raises(WorldloomError, match="differ in tokenizer"):
        average({two[0]: 0.5, str(tiny_models.world_folder(tmp_path / "d", elsewhere)): 0.5}, out)
    with pytest.raises(WorldloomError, match="not a checkpoint folder with whole weights"):
        average({two[0]: 0.5, str(tmp_path): 0.5}, out)
    assert not out.exists()
    out.mkdir()
    with pytest.raises(WorldloomError, match="the output exists"):
        average({two[0]: 0.5, two[1]: 0.5}, out)
    for wrong in (["a"], ["a=x", "b=1"], [f"{two[0]}=0.5", f"{two[0]}=0.5"]):
        done = CliRunner().invoke(main, ["models", "average", *wrong, "--out", str(tmp_path / "new")])
        assert done.exit_code == 2


def test_counters_stay_whole_and_damaged_weights_are_refused(tmp_path: Path) -> None:
    def folder(name: str, **tensors: torch.Tensor) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_text('family = "acme"\n')
        write_weights(tensors, tmp_path / name)
        return str(tmp_path / name)

    store = Store(tmp_path / "store")
    w, n = torch.tensor([1.0, 2.0]), torch.tensor([8])
    a, b = folder("a", w=w, n=n), folder("b", w=3 * w, n=n + 1)
    average({a: 0.4, b: 0.6}, tmp_path / "mean", store)
    mean = read_weights(tmp_path / "mean")
    torch.testing.assert_close(mean["w"], 2.2 * w)
    assert mean["n"].item() == 9  # 8.6
    assert mean["n"].dtype == torch.int64

    for name, tensors in {"wider": {"w": torch.ones(3), "n": n}, "more": {"w": w, "n": n, "x": w}}.items():
        with pytest.raises(WorldloomError, match="does not hold the tensors of"):
            average({a: 0.5, folder(name, **tensors): 0.5}, tmp_path / "no", store)
    with pytest.raises(WorldloomError, match="not finite"):
        average({a: 0.5, folder("broken", w=w / 0, n=n): 0.5}, tmp_path / "no", store)
    assert not (tmp_path / "no").exists()
