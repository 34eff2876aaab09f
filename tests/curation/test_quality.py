"""Quality scores: a classical measure on known encodings, and a head on a CLIP model from files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from worldloom import WorldloomError
from worldloom_curation import Frame, Source, Span
from worldloom_curation.stages.quality import QualityConfig, QualityStage, compression

FILE = Source("a.mp4", "/a.mp4", "a" * 64, "a")


def picture(seed: int = 0, height: int = 128, width: int = 160) -> np.ndarray:
    """Something like a photograph: edges, shading, a little noise."""
    import cv2

    rng = np.random.default_rng(seed)
    tiles = cv2.resize(rng.integers(0, 256, (9, 11, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(12):
        (x, y), r = rng.integers(0, (width, height)), int(rng.integers(4, 24))
        cv2.circle(tiles, (int(x), int(y)), r, [int(c) for c in rng.integers(0, 256, 3)], -1)
    return np.clip(tiles.astype(int) + rng.normal(0, 3, tiles.shape), 0, 255).astype(np.uint8)


def as_jpeg(frame: np.ndarray, quality: int) -> np.ndarray:
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(frame).save(data, "JPEG", quality=quality)
    return np.asarray(Image.open(data).convert("RGB"))


def decided(frames: list[np.ndarray], config: QualityConfig | None = None):
    stage = QualityStage(config or QualityConfig(rate=20.0))
    observer = stage.observer(FILE, 20.0)
    assert observer is not None
    for frame in frames:
        observer.add(Frame(frame))
    [verdict] = stage.decide([Span(FILE, 0, len(frames), 20.0)], {"a": observer.result()})
    return verdict


def test_the_score_falls_with_the_quality_of_the_encoding() -> None:
    for seed in range(3):
        scores = [decided([as_jpeg(picture(seed), quality)]).value for quality in (3, 8, 20, 50, 90)]
        assert scores == sorted(scores), scores
        assert scores[0] < 3 < 7 < scores[-1]


def test_bad_encodings_are_dropped_and_good_ones_kept() -> None:
    bad, good = decided([as_jpeg(picture(), 4)] * 3), decided([picture()] * 3)
    assert (bad.kept, bad.reason, good.kept) == (False, "not good enough", True)
    assert good.span.notes["compression_score"] == pytest.approx(good.value, abs=1e-4)
    mixed = [picture(), as_jpeg(picture(), 4)]
    least = decided(mixed, QualityConfig(rate=20.0, reduce="min")).value
    assert least < decided(mixed).value


def test_the_measure_is_that_of_the_paper_by_hand() -> None:
    # Sums written out, pixel by pixel.
    grey = np.random.default_rng(0).integers(0, 256, (24, 32), np.uint8)

    def along(image: np.ndarray) -> tuple[float, float, float]:
        m, n = image.shape
        d = [[int(image[i, j + 1]) - int(image[i, j]) for j in range(n - 1)] for i in range(m)]
        b = sum(abs(d[i][8 * j - 1]) for i in range(m) for j in range(1, n // 8)) / (m * (n // 8 - 1))
        a = (8 / (m * (n - 1)) * sum(abs(x) for row in d for x in row) - b) / 7
        z = sum(d[i][j] * d[i][j + 1] < 0 for i in range(m) for j in range(n - 2)) / (m * (n - 2))
        return b, a, z

    b, a, z = ((x + y) / 2 for x, y in zip(along(grey), along(grey.T), strict=True))
    assert compression(grey) == pytest.approx(-245.9 + 261.9 * b**-0.0240 * a**0.0160 * z**0.0064)


def test_plain_pictures_are_not_scored() -> None:
    verdict = decided([np.full((64, 64, 3), 40, np.uint8)])
    assert (verdict.kept, verdict.value, verdict.reason) == (True, None, "its pictures are too plain to score")


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(WorldloomError, match="needs weights"):
        QualityConfig(measure="aesthetic")
    with pytest.raises(WorldloomError, match="no such quality measure"):
        QualityConfig(measure="beauty")


def test_a_head_on_clip_is_read_from_files_and_its_digest_is_part_of_the_key(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    settings = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    network = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**settings, "vocab_size": 64},
            vision_config={**settings, "image_size": 32, "patch_size": 16},
            projection_dim=16,
        )
    )
    network.save_pretrained(tmp_path / "clip")
    Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")).save(str(tmp_path / "clip" / "tokenizer.json"))
    transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "clip" / "tokenizer.json")).save_pretrained(
        tmp_path / "clip"
    )
    transformers.CLIPImageProcessor(size=32, crop_size=32).save_pretrained(tmp_path / "clip")
    head = {
        "layers.0.weight": torch.randn(8, 16), "layers.0.bias": torch.randn(8),
        "layers.10.weight": torch.randn(1, 4), "layers.10.bias": torch.randn(1),
        "layers.2.weight": torch.randn(4, 8), "layers.2.bias": torch.randn(4),
    }  # fmt: skip
    save_file(head, tmp_path / "head.safetensors")
    config = QualityConfig("aesthetic", threshold=-100, clip=tmp_path / "clip", head=tmp_path / "head.safetensors")
    frame = picture(height=32, width=32)
    verdict = decided([frame], config)
    from worldloom_curation.search import find_embedder

    vector = torch.from_numpy(find_embedder(str(tmp_path / "clip"), "frames").embed_frames(frame[None])[0])
    for number in (0, 2, 10):
        vector = torch.nn.functional.linear(vector, head[f"layers.{number}.weight"], head[f"layers.{number}.bias"])
    assert verdict.value == pytest.approx(vector.item(), abs=1e-4)
    before = QualityStage(config).config.weights
    head["layers.0.bias"] += 1
    save_file(head, tmp_path / "head.safetensors")
    assert QualityStage(config).config.weights != before
    save_file({"layers.0.weight": torch.randn(3, 16), "layers.0.bias": torch.randn(3)}, tmp_path / "head.safetensors")
    with pytest.raises(WorldloomError, match="down to one number"):
        QualityStage(config).observer(FILE, 20.0)
