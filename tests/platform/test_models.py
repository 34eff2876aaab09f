from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from worldloom import models
from worldloom.artifacts import Store, file_digest
from worldloom.cli import main


@pytest.fixture
def shipped(install) -> Path:
    """A third party that ships one good model, one damaged, one absent, one without a promise, and a tokenizer."""
    root = install(
        "acme_m",
        {
            "worldloom.models": {"m": "acme_m.catalog:MODELS"},
            "worldloom.tokenizers": {"t": "acme_m.catalog:TOKENIZERS"},
        },
        {"acme_m/__init__.py": "", "acme_m/catalog.py": ""},
    )
    lines = {}
    for name in ("good", "changed", "absent", "unchecked"):
        folder = root / "acme_m" / "weights" / name
        line = {
            "target": "acme_m.load:load",
            "path": f"weights/{name}",
            "family": "acme",
            "summary": f"A {name} model.",
        }
        if name != "absent":
            folder.mkdir(parents=True)
            save_file(
                {"a": np.zeros((3, 5), np.float32), "b": np.zeros((7,), np.float16)}, folder / "model.safetensors"
            )
            (folder / "config.toml").write_text('family = "acme"\n')
            (folder / "README.md").write_text("# The card\n\nTrained on *episodes*.\n")
        if name != "unchecked":
            line["sha256"] = file_digest(folder / "model.safetensors") if name != "absent" else "0" * 64
        lines[f"acme-{name}"] = line
    tokenizer = {"acme-tokenizer": {"target": "acme_m.load:load", "path": "weights/good", "summary": "A tokenizer."}}
    (root / "acme_m" / "catalog.py").write_text(f"MODELS = {lines!r}\nTOKENIZERS = {tokenizer!r}\n")
    with open(root / "acme_m" / "weights" / "changed" / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == "acme_m"]:
        del sys.modules[name]
    models.registry.group.cache_clear()
    return root / "acme_m" / "weights"


def test_shipped_files_are_checked_against_their_digest(shipped: Path) -> None:
    found = {item.name: item for item in models.known() if item.name.startswith("acme-")}
    states = {name: item.state for name, item in found.items()}
    assert states == {
        "acme-good": "ok",
        "acme-changed": "changed",
        "acme-absent": "missing",
        "acme-unchecked": "unchecked",
        "acme-tokenizer": "unchecked",
    }
    good = found["acme-good"]
    assert (good.parameters, good.family, good.folder) == (22, "acme", shipped / "good")
    assert good.bytes == (shipped / "good" / "model.safetensors").stat().st_size
    assert found["acme-absent"].parameters == 0


def test_list(shipped: Path, worldloom_home: Path, tmp_path: Path) -> None:
    for kind in ("model", "dataset"):
        (tmp_path / kind).write_text(kind)
        Store().put(tmp_path / kind, kind=kind, name=f"my-{kind}")
    done = CliRunner().invoke(main, ["models", "list"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    assert rows["acme-good"][1:4] == ["acme", "22", "ok"]
    assert rows["acme-tokenizer"][1] == "tokenizer"
    assert rows["my-model"][1:4] == ["model", "made", "here"]
    assert "my-dataset" not in rows
    plain = json.loads(CliRunner().invoke(main, ["models", "list", "--json"]).stdout)
    assert [item["name"] for item in plain["made"]] == ["my-model"]
    assert {"acme-good", "acme-absent"} <= {item["name"] for item in plain["shipped"]}


def test_show_a_shipped_model_a_folder_and_one_made_here(shipped: Path, worldloom_home: Path) -> None:
    made = Store().put(shipped / "good", kind="model", name="my-world", inputs=["dataset-1"])
    for name in ("acme-good", str(shipped / "good"), made.id[:10], "my-world"):
        done = CliRunner().invoke(main, ["models", "show", name])
        assert done.exit_code == 0, done.output
        assert 'family = "acme"' in done.output
        assert "The card" in done.output
        plain = json.loads(CliRunner().invoke(main, ["models", "show", name, "--json"]).stdout)
        assert plain["card"].startswith("# The card")
    digest = file_digest(shipped / "good" / "model.safetensors")
    folder = json.loads(CliRunner().invoke(main, ["models", "show", str(shipped / "good"), "--json"]).stdout)
    assert (folder["sha256"], folder["parameters"]) == (digest, 22)


def test_show_what_is_not_there(shipped: Path, tmp_path: Path, worldloom_home: Path) -> None:
    done = CliRunner().invoke(main, ["models", "show", "acme-goood"])
    assert done.exit_code == 2
    assert "did you mean acme-good" in done.stderr
    done = CliRunner().invoke(main, ["models", "show", str(tmp_path)])
    assert done.exit_code == 2
    assert "holds no model.safetensors" in done.stderr


@given(st.binary(max_size=100), st.booleans())
def test_counting_parameters_never_fails(tmp_path_factory: pytest.TempPathFactory, data: bytes, sized: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(len(data).to_bytes(8, "little") + data if sized else data)
    assert models.count_parameters(path) >= 0


@pytest.mark.parametrize("header", ["[]", "3", '{"a": 3}', '{"a": {"shape": "x"}}', '{"a": {"shape": null}}'])
def test_a_header_that_is_none_counts_as_nothing(tmp_path: Path, header: str) -> None:
    path = tmp_path / "any.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())
    assert models.count_parameters(path) == 0


@pytest.mark.parametrize(("value", "text"), [(0, ""), (22, "22"), (6_144_000, "6.14 M"), (2e9, "2 B"), (999, "999")])
def test_short_count(value: float, text: str) -> None:
    assert models.short_count(value) == text
