"""`worldloom tokenize list`: what is installed, told without loading weights."""

from __future__ import annotations

import dataclasses
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_models
from click.testing import CliRunner

from worldloom import registry
from worldloom.artifacts import file_digest
from worldloom.cli import main
from worldloom_tokenizers import checkpoint, load_tokenizer

pytestmark = pytest.mark.usefixtures("worldloom_home")


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package that offers tokenizers: a discrete one, one whose file changed, a foreign one, one of a newer kind."""
    package = tmp_path / "acme"
    discrete = tiny_models.tokenizer(3, dataclasses.replace(tiny_models.VAE, levels=(5, 3)))
    checkpoint.save(discrete, package / "discrete", "# tiny\n")
    tiny_models.tokenizer_folder(package / "changed")
    (package / "newer").mkdir()
    (package / "newer" / "config.toml").write_text('kind = "from-the-future"\n')
    digest = file_digest(package / "discrete" / "model.safetensors")
    (package / "__init__.py").write_text("def load(folder, device, sha256):\n    return object()\n")
    (package / "catalog.py").write_text(
        textwrap.dedent(f"""
        LOAD = "worldloom_tokenizers.checkpoint:load"
        TOKENIZERS = {{
            "acme-discrete": {{"target": LOAD, "path": "discrete", "sha256": "{digest}", "summary": "Codes."}},
            "acme-changed": {{"target": LOAD, "path": "changed", "sha256": "{"0" * 64}"}},
            "acme-foreign": {{"target": "acme:load", "kind": "semantic"}},
            "acme-newer": {{"target": LOAD, "path": "newer"}},
            "acme-embeds": {{"target": "acme:load", "kind": "semantic", "path": "newer"}},
        }}
        """)
    )
    info = tmp_path / "acme-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[worldloom.tokenizers]\nacme = acme.catalog:TOKENIZERS\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.group.cache_clear()
    yield package
    registry.group.cache_clear()
    for name in ("acme.catalog", "acme"):
        sys.modules.pop(name, None)


def listed(*words: str) -> tuple[str, str]:
    done = CliRunner().invoke(main, ["tokenize", "list", *words], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    return done.stdout, done.stderr


def test_the_shipped_tokenizer_is_what_it_is_when_loaded() -> None:
    (nano,) = [one for one in json.loads(listed("--json")[0]) if one["name"] == "loom-cv-nano"]
    tokenizer = load_tokenizer("loom-cv-nano")
    assert (nano["kind"], nano["network"], nano["state"]) == ("continuous", "causal-vae", "ok")
    assert nano["ratio"] == f"{tokenizer.temporal_ratio}x{tokenizer.spatial_ratio}x{tokenizer.spatial_ratio}"
    assert (nano["channels"], nano["codebooks"], nano["codebook_size"]) == (tokenizer.latent_channels, None, None)
    assert nano["parameters"] == sum(tensor.numel() for tensor in tokenizer.state_dict().values())
    assert nano["bytes"] == (Path(nano["folder"]) / "model.safetensors").stat().st_size


def test_every_catalog_is_read(third_party: Path) -> None:
    out, problems = listed("--json")
    found = {one["name"]: one for one in json.loads(out)}
    discrete = found["acme-discrete"]
    assert (discrete["kind"], discrete["codebooks"], discrete["codebook_size"]) == ("discrete", 2, 15)
    assert (discrete["state"], discrete["folder"]) == ("ok", str(third_party / "discrete"))
    assert found["acme-changed"]["state"] == "changed"
    foreign = found["acme-foreign"]
    assert (foreign["kind"], foreign["state"]) == ("semantic", "elsewhere")
    assert {foreign[key] for key in ("ratio", "channels", "parameters", "bytes", "network", "folder")} == {None}
    assert found["acme-newer"]["kind"] is None
    assert "acme-newer" in problems
    assert "tokenizer kind" in problems


@pytest.mark.usefixtures("third_party")
def test_the_table_has_a_line_each() -> None:
    lines = listed()[0].splitlines()
    assert lines[0].split() == ["name", "kind", "ratio", "latents", "parameters", "size", "files"]
    (discrete,) = [line for line in lines if line.startswith("acme-discrete")]
    assert discrete.split()[1:7] == ["discrete", "4x8x8", "2", "x", "15", "codes"]
    assert discrete.split()[-1] == "ok"
    (nano,) = [line for line in lines if line.startswith("loom-cv-nano")]
    assert "16 channels" in nano


@pytest.mark.usefixtures("third_party")
@pytest.mark.parametrize("verb", ["encode", "eval"])
def test_what_is_no_video_tokenizer_is_refused(tmp_path: Path, verb: str) -> None:
    words = ["tokenize", verb, str(tmp_path), "--tokenizer", "acme-embeds", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert "does not encode video and decode it again" in done.stderr
