"""Embedders for search: pictures, texts, or both, to unit vectors whose products say how alike they are.

Two come with installed packages: EfficientNet-Lite0 for pictures and MiniLM for texts. A CLIP or SigLIP model of
transformers from a folder puts both into one space, so that a text finds pictures. All are
`worldloom.protocols.Embedder`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from worldloom import media
from worldloom.artifacts import file_digest
from worldloom.errors import WorldloomError, missing_extra
from worldloom.weights import WEIGHTS
from worldloom_tokenizers.semantic import load_semantic, transformers_model
from worldloom_tokenizers.text import load_text_encoder

_BATCH = 16  # pictures or texts at a time
_TOKENS = 128  # of a caption


def _unit(vectors: Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(vectors.float(), dim=-1).cpu().numpy()


class Pictures:
    """EfficientNet-Lite0: how alike two pictures are in what they show."""

    name = "efficientnet-lite0"
    takes: ClassVar = ("frames",)

    def __init__(self) -> None:
        self._network = load_semantic(self.name)
        self.fingerprint = self._network.fingerprint

    def embed_frames(self, frames: np.ndarray) -> np.ndarray:
        """uint8 ``(n, h, w, 3)`` -> float32 ``(n, 1280)``; frames are cropped to the middle and seen at 224x224."""
        with torch.no_grad():
            return np.concatenate(
                [
                    _unit(self._network.embed(media.to_tensor(batch[:, None])))  # videos of one frame
                    for batch in _batches(media.fit(frames, (224, 224)))
                ]
            )

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Refused: this network knows no words."""
        raise _cannot(self.name, "texts")


class Texts:
    """MiniLM-L6: how alike two texts are in what they mean; the mean of its token vectors, as it was trained."""

    name = "minilm"
    takes: ClassVar = ("texts",)

    def __init__(self) -> None:
        self._encoder = load_text_encoder(self.name, _TOKENS)
        self.fingerprint = self._encoder.fingerprint

    def embed_frames(self, frames: np.ndarray) -> np.ndarray:
        """Refused: this network sees no pictures."""
        raise _cannot(self.name, "pictures")

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """-> float32 ``(n, 384)``; zeros for an empty text."""
        out = []
        for i in range(0, len(texts), _BATCH):
            states = self._encoder.encode(texts[i : i + _BATCH])  # (b, tokens, d), zeros where there is no token
            written = states.abs().sum(-1, keepdim=True) > 0
            out.append(_unit(states.sum(1) / written.sum(1).clamp_min(1)))
        return np.concatenate(out)


class Clip:
    """A CLIP or SigLIP model of transformers, from a folder.

    Raises:
        WorldloomError: another kind of model, or one that cannot be read.
    """

    takes: ClassVar = ("frames", "texts")
    model_types: ClassVar = ("clip", "siglip")

    def __init__(self, folder: str | Path) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise missing_extra("transformers", "reason") from error
        self.name = str(folder)
        self._network, self._pixels = transformers_model(folder, self.model_types)
        self._network.requires_grad_(False).eval()
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise WorldloomError(
                "the model's text tokenizer cannot be read", got=f"{folder}: {error}", do="copy the whole folder"
            ) from error
        weights = [Path(folder) / WEIGHTS, Path(folder) / "tokenizer.json"]
        self.fingerprint = "-".join(file_digest(file) for file in weights if file.is_file())

    def embed_frames(self, frames: np.ndarray) -> np.ndarray:
        """uint8 ``(n, h, w, 3)`` -> float32 ``(n, d)``; frames are cropped to the middle, at the model's size."""
        edge = int(self._network.config.vision_config.image_size)
        mean, std = (torch.tensor(self._pixels[name]).view(3, 1, 1) for name in ("mean", "std"))
        out = []
        for batch in _batches(media.fit(frames, (edge, edge))):
            pixels = torch.from_numpy(batch.transpose(0, 3, 1, 2).copy()).float() / 255  # (b, 3, h, w)
            with torch.no_grad():
                out.append(_unit(_pooled(self._network.get_image_features(pixel_values=(pixels - mean) / std))))
        return np.concatenate(out)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """-> float32 ``(n, d)``."""
        length = int(self._network.config.text_config.max_position_embeddings)
        out = []
        for i in range(0, len(texts), _BATCH):
            given = self._tokenizer(
                list(texts[i : i + _BATCH]),
                # SigLIP was trained on texts filled up to its length, CLIP masks what is filled.
                padding="max_length" if self._network.config.model_type == "siglip" else True,
                truncation=True,
                max_length=length,
                return_tensors="pt",
            )
            with torch.no_grad():
                out.append(_unit(_pooled(self._network.get_text_features(**given))))
        return np.concatenate(out)


def _batches(frames: np.ndarray) -> list[np.ndarray]:
    return [frames[i : i + _BATCH] for i in range(0, len(frames), _BATCH)]


def _pooled(features: Any) -> Tensor:
    """transformers 5 wraps the projected vector."""
    return features if isinstance(features, Tensor) else features.pooler_output


def _cannot(name: str, what: str) -> WorldloomError:
    return WorldloomError(
        f"this model embeds no {what}", got=name, do="give --model a folder that holds a CLIP or SigLIP model"
    )


@functools.lru_cache(maxsize=1)
def pictures() -> Pictures:
    """EfficientNet-Lite0, loaded once.

    Raises:
        WorldloomError: its package is not installed.
    """
    return Pictures()


@functools.lru_cache(maxsize=1)
def texts() -> Texts:
    """MiniLM-L6, loaded once.

    Raises:
        WorldloomError: its packages are not installed.
    """
    return Texts()
