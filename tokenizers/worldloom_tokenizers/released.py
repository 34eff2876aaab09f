"""Tokenizers that others have published: which there are, and how their files are read and written.

A published file becomes one of our folders once (`import_released`, ``worldloom tokenize import``) and is used like
any other tokenizer from then on; a folder is written back in a published layout by `export_released`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from worldloom.errors import WorldloomError
from worldloom_tokenizers.codec import VideoCodec
from worldloom_tokenizers.layouts import Layout, from_released, recognise, to_released

_COSMOS, _WAN = "worldloom_tokenizers.cosmos", "worldloom_tokenizers.wan"

VARIANTS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    **{
        f"cosmos-{kind}{t}x{s}x{s}": (_COSMOS, kind, (t, s))
        for kind in ("cv", "dv")
        for t, s in ((4, 8), (8, 8), (8, 16))
    },
    **{f"cosmos-{kind}{s}x{s}": (_COSMOS, kind, (s,)) for kind in ("ci", "di") for s in (8, 16)},
    "wan2.1": (_WAN, "wan21", ()),
    "wan2.2": (_WAN, "wan22", ()),
}
"""Name -> package of the family, the function of its ``config.py`` that gives the configuration, and its arguments."""

_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors", "autoencoder.safetensors")
"""What the weights are called in published folders."""


def variant_config(variant: str) -> Any:
    """The configuration of a published variant.

    Raises:
        WorldloomError: an unknown name.
    """
    if variant not in VARIANTS:
        raise WorldloomError(
            "no published tokenizer has that name here", got=variant, do=f"one of {', '.join(VARIANTS)}"
        )
    package, function, arguments = VARIANTS[variant]
    return getattr(importlib.import_module(f"{package}.config"), function)(*arguments)


def load_released(path: str | Path, variant: str | Any, device: str = "cpu") -> VideoCodec:
    """A tokenizer from published weights, in evaluation mode, float32.

    Args:
        path: a safetensors file, or a folder with one, in the native or the diffusers layout (told by its keys).
        variant: a name of `VARIANTS`, or the configuration itself.

    Raises:
        WorldloomError: unknown variant, a pickle (with the command that converts it), a damaged file, weights of
            another variant, or values that are not finite.
    """
    from worldloom.weights import pickle_refused, read_weights
    from worldloom_tokenizers.checkpoint import build

    path = Path(path)
    if path.is_dir():
        name = next((name for name in _FILES if (path / name).is_file()), "model.safetensors")
    else:
        path, name = path.parent, path.name
    if not name.endswith(".safetensors"):
        raise pickle_refused(path / name, (path / name).with_suffix(".safetensors"))
    weights = read_weights(path, name=name)
    config = variant_config(variant) if isinstance(variant, str) else variant
    family = _family(config)
    names = family.names(config)
    model = build(config)
    layout = recognise(weights, {layout: names for layout in family.LAYOUTS if _has(names, layout)})
    unused = list(family.unused(config)) if layout == "native" else []
    from_released(model, names, weights, layout, unused)
    bad = next((key for key, tensor in model.state_dict().items() if not tensor.isfinite().all()), None)
    if bad is not None:
        raise WorldloomError("the weights hold values that are not finite", got=f"{path / name}: {bad}")
    return model.to(device).eval()


def import_released(path: str | Path, variant: str, out: str | Path) -> VideoCodec:
    """Read published weights and write a tokenizer folder in float32, all or nothing."""
    import torch

    from worldloom.artifacts import file_digest
    from worldloom_tokenizers.checkpoint import save

    model = load_released(path, variant)
    source = Path(path)
    digest = f" (sha256 `{file_digest(source)}`)" if source.is_file() else ""
    card = (
        f"# {variant}\n\nWritten by `worldloom tokenize import` from `{source.name}`{digest}. "
        "Its authors' card and licence apply.\n"
    )
    save(model, Path(out), card, dtype=torch.float32)
    return model


def export_released(model: VideoCodec, path: str | Path, layout: Layout) -> Path:
    """Write a model's weights as one safetensors file in a published layout.

    Raises:
        WorldloomError: the family has no such layout.
    """
    from worldloom.artifacts import atomic_file
    from worldloom.weights import write_weights

    family = _family(model.config)
    names = family.names(model.config)
    if layout not in family.LAYOUTS or not _has(names, layout):
        raise WorldloomError(
            f"{type(model).__name__} of this variant has no {layout} layout",
            do=f"one of {', '.join(known for known in family.LAYOUTS if _has(names, known))}",
        )
    tensors = to_released(model, names, layout)
    if layout == "native":
        import torch

        like = next(iter(tensors.values()))
        tensors |= {key: torch.zeros(shape, dtype=like.dtype) for key, shape in family.unused(model.config).items()}
    with atomic_file(Path(path)) as file:
        write_weights(tensors, file.parent, file.name)
    return Path(path)


def _family(config: Any) -> Any:
    """The ``checkpoint`` module of a configuration's family."""
    package = type(config).__module__.rpartition(".")[0]
    if package not in (_COSMOS, _WAN):
        raise WorldloomError("this tokenizer is not of a published family", got=type(config).__name__)
    return importlib.import_module(f"{package}.checkpoint")


def _has(names: dict[str, dict[Layout, str]], layout: Layout) -> bool:
    return all(layout in row for row in names.values())
