"""Folders with tiny text encoders of the kinds that released world models read, as transformers saves them."""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch
import transformers

_TEXT = "a robot arm pushes the red block into box and stops . drawn with no motion"
WORDS = tuple(_TEXT.split())


def save_t5(folder: Path, dtype: torch.dtype = torch.float32, dim: int = 16) -> None:
    """A tiny T5 with a tokenizer of whole words, as transformers saves them."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in WORDS)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer")
    config = transformers.T5Config(
        vocab_size=len(vocabulary),
        d_model=dim,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    transformers.T5EncoderModel(config).to(dtype).save_pretrained(folder / "text_encoder")


def save_reason(folder: Path) -> None:
    """A tiny Qwen2.5-VL with a tokenizer of whole words and a chat template, in one folder."""
    vocabulary = {word: i for i, word in enumerate(("<pad>", "<unk>", "<turn>", *WORDS))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.chat_template = (
        "{% for turn in messages %}{{ ' <turn> ' + turn.role + ' ' }}"
        "{% for part in turn.content %}{{ part.text }}{% endfor %}{% endfor %}"
    )
    fast.save_pretrained(folder)
    text_config = {
        "vocab_size": len(vocabulary), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 16}
    config = transformers.Qwen2_5_VLConfig(text_config=text_config, vision_config=vision)
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
