"""Text embeddings: the token vectors of every kept clip's caption, stored with it, for models that read text.

The encoder is one of the registry's ``encoders``. `worldloom tokenize encode` and `worldloom finetune` take the vectors
as they are, where they want those of the same encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from worldloom.errors import WorldloomError
from worldloom_curation.stage import Observer, Source, Span, Verdict

if TYPE_CHECKING:
    from worldloom.schema import Clip
    from worldloom_curation.stage import Signals


@dataclass(frozen=True)
class TextEmbeddingsConfig:
    """Vectors of captions."""

    encoder: str = "minilm"
    """The text encoder: a name, or what else `worldloom_tokenizers.load_text_encoder` takes."""
    tokens: int = 24
    """Tokens that every caption is cut or filled up to."""

    def __post_init__(self) -> None:
        if self.tokens < 3:
            raise WorldloomError("text_embeddings.tokens must be at least 3", got=self.tokens)


@dataclass(frozen=True)
class _Known(TextEmbeddingsConfig):
    fingerprint: str = ""
    """Of the encoder: part of the key of every result."""


class TextEmbeddingsStage:
    """Adds ``text``, float16 ``(tokens, dim)``, to every clip: zeros for one without a caption. Drops nothing.

    Comes after the stages that write captions.

    Raises:
        WorldloomError: an unknown encoder, or one that is not installed.
    """

    name = "text_embeddings"
    version = 1
    scope: Literal["source", "run"] = "source"
    measured_with = ()
    reads_caption = True
    Config = TextEmbeddingsConfig

    def __init__(self, config: TextEmbeddingsConfig) -> None:
        from worldloom import registry

        self._encoder: Any = registry.load("encoders", "text")(config.encoder, config.tokens)
        self.config = _Known(**asdict(config), fingerprint=self._encoder.fingerprint)

    def observer(self, source: Source, fps: float) -> Observer | None:
        return None

    def decide(self, spans: Sequence[Span], signals: Mapping[str, Signals]) -> list[Verdict]:
        reasons = ("it has no caption: its vectors are zeros", f"the vectors of {self.config.tokens} tokens go with it")
        return [Verdict(span, True, reason=reasons[bool(span.caption.strip())]) for span in spans]

    def add(self, clip: Clip, video: bytes) -> dict[str, np.ndarray]:
        return {"text": self._encoder.encode([clip.caption])[0].half().cpu().numpy()}

    def facts(self) -> dict[str, Any]:
        known = self.config
        return {"text_encoder": {"name": self._encoder.name, "fingerprint": known.fingerprint, "tokens": known.tokens}}
