"""Text encoders."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from text_folders import save_reason, save_t5

from worldloom.errors import WorldloomError
from worldloom_tokenizers import load_text_encoder, text


def test_texts_of_one_meaning_are_near_and_padding_is_zero() -> None:
    encoder = load_text_encoder("minilm", tokens=16)
    texts = ["a robot arm pushes a block", "a manipulator moves a cube", "the game of Pong", ""]
    vectors = encoder.encode(texts)
    assert vectors.shape == (4, 16, encoder.dim)
    assert not vectors[3].any()
    assert not vectors[0, -1].any()
    means = torch.nn.functional.normalize(vectors.sum(dim=1)[:3], dim=-1)
    near, far = means[0] @ means[1], means[0] @ means[2]
    assert near > far + 0.2


def test_a_text_does_not_depend_on_its_batch_and_is_cut_to_length() -> None:
    encoder = load_text_encoder("minilm", tokens=8)
    long = "word " * 50
    together = encoder.encode([long, "short"])
    assert together.shape[1] == 8
    torch.testing.assert_close(encoder.encode(["short"])[0], together[1], rtol=1e-5, atol=1e-5)
    assert len(encoder.fingerprint) == 64


def test_an_unknown_encoder_is_named() -> None:
    with pytest.raises(WorldloomError, match="minilm"):
        load_text_encoder("t5-xxl")


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(text.TEXT_ENCODERS, "absent", "a_package_that_is_not_there")
    with pytest.raises(WorldloomError, match=r"worldloom\[text\]"):
        load_text_encoder("absent")


# -- encoders of released world models, from folders -------------------------------------------------------------------


PROMPTS = ["a robot arm pushes the red block", "no motion", ""]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_t5_from_a_pipeline_folder_gives_what_diffusers_does(tmp_path: Path, dtype: torch.dtype) -> None:
    save_t5(tmp_path, dtype)
    encoder = load_text_encoder(tmp_path, tokens=12)
    assert next(encoder.network.parameters()).dtype == dtype
    theirs = SimpleNamespace(tokenizer=encoder.tokenizer, text_encoder=encoder.network)
    expected = diffusers.Cosmos2VideoToWorldPipeline._get_t5_prompt_embeds(theirs, PROMPTS, 12, "cpu", torch.float32)
    found = encoder.encode(PROMPTS)
    assert (found.shape, encoder.dim, found.dtype) == ((3, 12, 16), 16, torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert found[2, 0].any()  # an empty prompt is its end mark, as these models were trained
    assert not found[1, 3:].any()


def test_reason_from_one_folder_gives_what_diffusers_does(tmp_path: Path) -> None:
    save_reason(tmp_path)
    encoder = load_text_encoder(tmp_path, tokens=24)
    theirs = SimpleNamespace(tokenizer=encoder.tokenizer, text_encoder=encoder.network)
    expected = diffusers.Cosmos2_5_PredictBasePipeline._get_prompt_embeds(theirs, PROMPTS, 24, "cpu", torch.float32)
    found = encoder.encode(PROMPTS)
    assert (found.shape, encoder.dim) == ((3, 24, 48), 48)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found[0], found[1])
    states = found[0].unflatten(-1, (3, 16))
    torch.testing.assert_close(states.mean(-1), torch.zeros(24, 3), rtol=0, atol=1e-5)


def test_the_fingerprint_of_a_folder_is_that_of_its_bytes(tmp_path: Path) -> None:
    save_t5(tmp_path / "a")
    first = load_text_encoder(tmp_path / "a").fingerprint
    assert load_text_encoder(tmp_path / "a").fingerprint == first
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert load_text_encoder(tmp_path / "b").fingerprint == first
    save_t5(tmp_path / "c")
    assert load_text_encoder(tmp_path / "c").fingerprint != first


def test_a_folder_of_an_encoders_name_does_not_take_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "minilm").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_text_encoder("minilm").name == "minilm"


def test_folders_without_such_an_encoder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WorldloomError, match="no text encoder of transformers"):
        load_text_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(WorldloomError, match="no text of this network"):
        load_text_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(WorldloomError, match="cannot be read"):
        load_text_encoder(tmp_path)
    save_t5(tmp_path / "pickled")
    weights = tmp_path / "pickled" / "text_encoder" / "model.safetensors"
    torch.save({}, weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(WorldloomError, match="cannot be read"):
        load_text_encoder(tmp_path / "pickled")
