"""The process that `worldloom.convert` starts: the only place where a pickled checkpoint is opened.

It gives up its rights (`worldloom.confinement`), loads with PyTorch's ``weights_only`` unpickler, finds the one level
of the file that holds the tensors, and writes them as safetensors. Its answer is ``report.json`` in its folder.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worldloom.confinement import confine_interpreter, confine_kernel, limit_resources
from worldloom.errors import WorldloomError

if TYPE_CHECKING:
    from torch import Tensor

TENSORS, REPORT = "tensors.safetensors", "report.json"
_PLAIN = (bool, int, float, str, type(None))
# How `torch.load` names what a pickle wants to call and may not.
_CODE = re.compile(r"(?:GLOBAL|unrecognized function) ([\w.]+)")


def main(job: Mapping[str, Any]) -> None:
    """Convert ``job["source"]`` into the folder ``job["folder"]``; see `worldloom.convert` for the fields."""
    folder = str(job["folder"])
    confine_kernel(folder)
    # What loading and writing need, imported while ctypes and the like are still allowed.
    import safetensors.torch
    import torch  # noqa: F401

    limit_resources(int(job["memory"]), int(job["seconds"]))
    confine_interpreter(folder)
    try:
        _, tensors, left_out = choose(_load(Path(job["source"])), job["key"])
        metadata = {"format": "pt", **job["metadata"]}
        safetensors.torch.save_file(_own_storage(tensors), f"{folder}/{TENSORS}", metadata)
        report: dict[str, object] = {"left_out": left_out}
    except WorldloomError as error:
        report = {"what": error.what, "got": error.got and str(error.got), "do": error.do}
    except Exception as error:  # a hostile or damaged file can fail in any way; the parent shows one error
        reason = "it asks for far more memory than its size explains" if _lacks_memory(error) else _sentence(error)
        report = {"what": f"the checkpoint cannot be converted: {reason}"}
    Path(folder, REPORT).write_text(json.dumps(report), encoding="utf-8")


def _load(source: Path) -> Any:
    """What the file holds, read by ``torch.load(weights_only=True)``, or the state of a TorchScript module."""
    import torch

    try:
        entries = zipfile.ZipFile(source).infolist() if zipfile.is_zipfile(source) else []
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            return torch.jit.load(source, map_location="cpu").state_dict()
        # Mapped into memory where the bytes of a tensor are the bytes of the file, so a large file costs little.
        mapped = bool(entries) and all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # as above
        if _lacks_memory(error):
            raise
        found = _CODE.search(str(error))
        if found:
            raise WorldloomError(
                "the checkpoint needs code, and code in a checkpoint is not run",
                got=f"it calls {found[1]}",
                do="ask its author for safetensors, or for a file that holds tensors only",
            ) from error
        raise WorldloomError(
            f"the file is damaged, cut short, or not a PyTorch checkpoint: {_sentence(error)}",
            do="compare its size or digest with its source, and copy it again",
        ) from error


def _lacks_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def _sentence(error: Exception) -> str:
    # What `torch.load` puts around the reason is advice to load the file without its checks.
    reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
    return f"{type(error).__name__}: {(reason.splitlines() or [''])[0][:200]}"


def choose(content: Any, key: str) -> tuple[str, dict[str, Tensor], list[str]]:
    """The one level that holds all tensors: its path, its tensors, and the paths of what is left out.

    Levels are nested dicts and lists, named by their keys with ``/`` between; the outermost is ``/``. What has a number
    for a name, as in a list, gets that number in digits.

    Args:
        content: what a checkpoint holds.
        key: this level, or the only one below it; "" looks everywhere.

    Raises:
        WorldloomError: no tensors, tensors on several levels, a key that is not there, or a value that is neither a
            tensor nor plain.
    """
    levels = dict(_levels(content, ""))
    start = "/" + key.strip("/")
    if start not in levels:
        if key:
            raise WorldloomError("the checkpoint has no such level", got=key, do=f"choose one of: {_some(levels)}")
        levels = {}
    if key and _holds_tensors(levels[start]):
        candidates = {start: levels[start]}
    else:
        below = start.rstrip("/") + "/"
        candidates = {path: level for path, level in levels.items() if path == start or path.startswith(below)}
    holding = [path for path, level in candidates.items() if _holds_tensors(level)]
    if not holding:
        raise WorldloomError("the checkpoint holds no named tensors", got=type(content).__name__)
    if len(holding) > 1:
        raise WorldloomError(
            "tensors lie on several levels of the checkpoint", got=_some(holding), do="choose one of them with --key"
        )
    left_out: list[str] = []
    for path, level in candidates.items():
        for name, value in level.items():
            where = f"{path.rstrip('/')}/{name}"
            if _is_tensor(value) or where in candidates:
                continue
            if where not in levels and not isinstance(value, _PLAIN):
                raise WorldloomError(
                    "the checkpoint holds something that is neither a tensor nor a plain value",
                    got=f"{where}: {type(value).__module__}.{type(value).__qualname__}",
                    do="choose the level of the tensors with --key",
                )
            left_out.append(where)
    found = [(str(name), value) for name, value in candidates[holding[0]].items() if _is_tensor(value)]
    tensors = dict(found)
    if len(tensors) < len(found):
        raise WorldloomError("two tensors differ in the type of their name only, 1 and '1'", got=holding[0])
    return holding[0], tensors, left_out


def _levels(content: Any, path: str) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Every dict, list and tuple that is nested in `content`, with its path."""
    if isinstance(content, (list, tuple)):
        content = dict(enumerate(content))
    if isinstance(content, Mapping):
        yield path or "/", content
        for name, value in content.items():
            yield from _levels(value, f"{path}/{name}")


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _holds_tensors(level: Mapping[Any, Any]) -> bool:
    return any(_is_tensor(value) for value in level.values())


def _some(names: Collection[str]) -> str:
    shown = [name.removeprefix("/") or "/" for name in names]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")


def _own_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share memory, or are a view of a larger one, get their own: safetensors stores each by itself."""
    import torch

    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            kind = f"{tensor.layout}, {tensor.dtype}, {tensor.device}"
            raise WorldloomError("safetensors holds dense tensors only", got=f"{name}: {kind}")
        tensor = tensor.detach()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes or not tensor.is_contiguous():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(storage.data_ptr())
        own[name] = tensor
    return own
