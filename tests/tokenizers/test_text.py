"""Text encoders."""

from __future__ import annotations

import pytest
import torch

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
