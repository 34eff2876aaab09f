"""Folders of every kind of tokenizer: what is built from them, and what is said about one that nobody knows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch

from worldloom import config as configs
from worldloom.errors import WorldloomError
from worldloom_tokenizers import checkpoint, load_tokenizer
from worldloom_tokenizers.codec import VideoCodec


@pytest.mark.parametrize("kind", checkpoint.KINDS)
def test_each_kind_is_built_from_its_configuration_and_read_back(kind: str, tmp_path: Path) -> None:
    config_class = checkpoint._imported(checkpoint.KINDS[kind][0])
    config = config_class()
    with torch.device("meta"):  # released networks are large
        model = checkpoint.build(config)
    assert isinstance(model, VideoCodec)
    assert model.config == config
    assert checkpoint.kind_of(config) == kind
    checkpoint.write_config(config, tmp_path / "config.toml")
    assert configs.read_toml(tmp_path / "config.toml")["kind"] == kind
    again = checkpoint.read_config(tmp_path / "config.toml")
    assert (again.kind, again.model) == (kind, config)
    assert type(again.model) is config_class


def test_an_unknown_kind_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    folder = tiny_models.tokenizer_folder(tmp_path / "saved")
    file = folder / "config.toml"
    text = file.read_text()
    assert text.startswith('kind = "causal-vae"\n')
    for line in ('kind = "causal-vea"\n', "kind = 3\n", "kind = [1]\n", ""):
        file.write_text(line + text.split("\n", 1)[1])
        with pytest.raises(WorldloomError, match="kind") as caught:
            load_tokenizer(folder)
        for kind in checkpoint.KINDS:
            assert kind in str(caught.value)


def test_keys_are_named_in_full_with_their_file(tmp_path: Path) -> None:
    folder = tiny_models.tokenizer_folder(tmp_path / "saved")
    text = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(text.replace("widths", "width"))
    with pytest.raises(WorldloomError, match=r"model\.widths") as caught:
        load_tokenizer(folder)
    assert str(folder / "config.toml") in str(caught.value)
    (folder / "config.toml").write_text("knid = 3\n" + text)
    with pytest.raises(WorldloomError, match="did you mean kind"):
        load_tokenizer(folder)


def test_a_kind_is_imported_when_it_is_used() -> None:
    program = "import sys, worldloom_tokenizers.checkpoint\nprint('worldloom_tokenizers.causal_vae' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
