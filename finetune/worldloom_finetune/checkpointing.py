"""The training state on disk: safetensors and JSON, committed whole, the same files for every strategy.

Layout under a run's ``checkpoints`` folder::

    latest                      the name of the newest committed step; replaced last
    step-00000100/
        weights.safetensors     trained weights (float32 masters) and, in a full run, buffers
        optimizer.safetensors   ``<parameter>.exp_avg``, ``.exp_avg_sq``, ``.step``
        ema.safetensors         averages, when they are on
        state.json              step, run facts, sha256 of each file

ZeRO shards are gathered parameter by parameter (DeepSpeed's own checkpoints are pickles; see
docs/decisions/0003-training-state.md), so a state written under ZeRO-2 can be read without DeepSpeed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from worldloom.artifacts import atomic_dir, atomic_write, file_digest
from worldloom.errors import WorldloomError

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class TrainState:
    """Everything that the next step depends on."""

    step: int
    """Optimizer steps taken."""
    groups: dict[str, dict[str, Tensor]]
    """``weights``, ``optimizer`` and, when averaged, ``ema``: tensors by name, on the CPU."""
    facts: dict[str, Any]
    """JSON: configuration, digests of the inputs, counters."""


# -- between the running model and a TrainState -------------------------------------------------------------------


def capture(parameters: Mapping[str, nn.Parameter], optimizer: Any) -> dict[str, dict[str, Tensor]]:
    """Full weights and moments of the trained `parameters`; every rank must call it (ZeRO gathers)."""
    if any(_is_partitioned(p) for p in parameters.values()):
        _link_zero_state(optimizer)
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name, p in parameters.items():
        if _is_partitioned(p):
            from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

            weights[name] = _stored(safe_get_full_fp32_param(p))
            for key in _MOMENTS:
                moments[f"{name}.{key}"] = _stored(safe_get_full_optimizer_state(p, key))
            moments[f"{name}.step"] = torch.tensor(_zero_step(optimizer))
            continue
        weights[name] = _stored(p)
        for key, value in optimizer.state.get(p, {}).items():
            moments[f"{name}.{key}"] = _stored(torch.as_tensor(value))
    return {"weights": weights, "optimizer": moments}


@torch.no_grad()
def restore(groups: Mapping[str, Mapping[str, Tensor]], parameters: Mapping[str, nn.Parameter], optimizer: Any) -> None:
    """Put weights and moments back, bit for bit; every rank calls it with the full tensors."""
    weights, moments = groups["weights"], groups["optimizer"]
    missing = sorted(parameters.keys() - weights.keys())
    if missing:
        raise WorldloomError("the checkpoint lacks trained weights", got=missing[:3], do="start again in a new --out")
    partitioned = [p for p in parameters.values() if _is_partitioned(p)]
    if partitioned:
        step = next((float(v) for name, v in moments.items() if name.endswith(".step")), 0.0)
        _create_zero_state(optimizer, step)
    for name, p in parameters.items():
        value = weights[name].to(p.device)
        if not _is_partitioned(p):
            p.copy_(value)
            state = {k: moments[f"{name}.{k}"] for k in (*_MOMENTS, "step") if f"{name}.{k}" in moments}
            if state:
                # Moments take the layout of their weight in memory: the fused optimizer walks both in step.
                optimizer.state[p] = {
                    k: v.to(p.device, copy=True) if k == "step" else torch.empty_like(p).copy_(v)
                    for k, v in state.items()
                }
            continue
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        safe_set_full_fp32_param(p, value)
        if not hasattr(p, "ds_id"):  # ZeRO 1 and 2: every rank also holds the whole working copy
            p.data.copy_(value)
        for key in _MOMENTS:
            if f"{name}.{key}" in moments:
                safe_set_full_optimizer_state(p, moments[f"{name}.{key}"].to(p.device), key)


def _is_partitioned(p: nn.Parameter) -> bool:
    return hasattr(p, "ds_id") or hasattr(p, "_hp_mapping")


def _stored(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "a partitioned weight that DeepSpeed does not know"
    # A copy: safetensors refuses tensors that share memory, and the caller may go on training.
    return tensor.detach().to("cpu", copy=True).contiguous()


def _flat_partitions(optimizer: Any) -> list[Tensor]:
    """The flat float32 tensors that a DeepSpeed optimizer steps: one per group and rank."""
    for attribute in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
        flat = getattr(optimizer, attribute, None)
        if flat is not None:
            return list(flat)
    raise AssertionError(f"no flat partitions in {type(optimizer).__name__}")


def _zero_step(optimizer: Any) -> float:
    for flat in _flat_partitions(optimizer):
        state = optimizer.optimizer.state.get(flat)
        if state and "step" in state:
            return float(state["step"])
    return 0.0


def _create_zero_state(optimizer: Any, step: float) -> None:
    # DeepSpeed makes the moments at the first step; a resumed run needs them before it.
    for flat in _flat_partitions(optimizer):
        optimizer.optimizer.state[flat] = {
            "step": torch.tensor(step, device=flat.device),
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }
    _link_zero_state(optimizer)


def _link_zero_state(optimizer: Any) -> None:
    """Let every weight find its moments in ZeRO 1 and 2.

    DeepSpeed links them once, inside the first step of the first parameter group, when the other groups have none yet
    (0.19.8); so the link is made again here.
    """
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


# -- between a TrainState and the disk ----------------------------------------------------------------------------


def commit(root: Path, state: TrainState, keep: int) -> Path:
    """Write a checkpoint whole, then move ``latest``, then drop all but the `keep` newest."""
    name = f"step-{state.step:08d}"
    folder = root / name
    if folder.exists():  # written whole by a run that was killed before it moved `latest`
        shutil.rmtree(folder)
    with atomic_dir(folder) as temporary:
        digests = {}
        for group, tensors in state.groups.items():
            path = temporary / f"{group}.safetensors"
            save_file(tensors, path)
            digests[path.name] = file_digest(path)
        text = json.dumps({"format": 1, "step": state.step, "files": digests, "facts": state.facts}, indent=1)
        (temporary / "state.json").write_text(text)
    atomic_write(root / "latest", name)
    for old in sorted(root.glob("step-*"))[: -max(keep, 1)]:
        shutil.rmtree(old)
    return folder


def read_latest(root: Path) -> TrainState | None:
    """The newest committed state, or None where there is none yet.

    Raises:
        WorldloomError: a file is missing or its bytes changed since it was written.
    """
    pointer = root / "latest"
    if not pointer.is_file():
        return None
    folder = root / pointer.read_text().strip()
    advice = f"remove {root} to train from the start, or restore the folder from a copy"
    try:
        record = json.loads((folder / "state.json").read_text())
        changed = [name for name, digest in record["files"].items() if file_digest(folder / name) != digest]
    except (OSError, ValueError, KeyError) as error:
        raise WorldloomError("the newest checkpoint cannot be read", got=f"{folder}: {error}", do=advice) from error
    if changed:
        raise WorldloomError(
            "the newest checkpoint changed since it was written", got=[str(folder / n) for n in changed], do=advice
        )
    groups = {Path(name).stem: load_file(folder / name) for name in record["files"]}
    return TrainState(step=record["step"], groups=groups, facts=record["facts"])


def sweep(root: Path) -> None:
    """Remove what a killed run left behind: temporary folders and files, and steps that ``latest`` never reached."""
    pointer = root / "latest"
    newest = pointer.read_text().strip() if pointer.is_file() else ""
    for item in root.glob("*") if root.is_dir() else ():
        if item.is_dir() and (item.name.startswith(".") or item.name > newest):
            shutil.rmtree(item)
        elif item.name.startswith("."):
            item.unlink()
