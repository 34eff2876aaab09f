"""What each package exports, and that importing one costs nothing. (`test_repository.py` holds the folders' rules.)"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

EXPORTS = {
    "worldloom": [
        "CheckpointRef",
        "Clip",
        "Decision",
        "GenerationRequest",
        "LatentBatch",
        "Sample",
        "ShardRef",
        "WorldloomError",
        "__version__",
    ],
    "worldloom_tokenizers": [
        "ActionCodec",
        "CausalVAE",
        "CausalVAEConfig",
        "Tiling",
        "VideoCodec",
        "encode_dataset",
        "load_latent_actions",
        "load_preview",
        "load_released",
        "load_semantic",
        "load_text_encoder",
        "load_tokenizer",
    ],
    "worldloom_curation": [
        "Adds",
        "CurateConfig",
        "Derives",
        "Frame",
        "Observer",
        "Source",
        "Span",
        "Stage",
        "Verdict",
    ],
    "worldloom_model_zoo": ["KVCache", "PredictConfig", "PredictPipeline", "PredictTransformer", "load_model"],
    "worldloom_finetune": [],
}

# The distributions that take longer than 50 ms to import, or that a machine may lack.
HEAVY = {
    *("torch", "lightning", "pytorch_lightning", "deepspeed", "peft", "transformers", "diffusers", "torchmetrics"),
    *("mlflow", "ray", "av", "cv2", "PIL", "scenedetect", "webdataset", "pyarrow", "pandas", "gymnasium", "vizdoom"),
    *("xxhash", "fastapi", "uvicorn", "pydantic", "rich", "fsspec", "safetensors", "numpy"),
}


def _imported(code: str) -> set[str]:
    """The top-level modules that `code` imports in a fresh process started in the repository root."""
    probe = f"{code}\nimport json, sys\nprint('\\n' + json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("package", EXPORTS)
def test_the_exports_are_these(package: str) -> None:
    module = importlib.import_module(package)
    assert sorted(getattr(module, "__all__", [])) == sorted(EXPORTS[package])
    for name in EXPORTS[package]:
        assert getattr(module, name) is not None


def test_importing_worldloom_imports_nothing_heavy() -> None:
    assert (
        sorted(_imported("import worldloom, worldloom.registry, worldloom.config, worldloom.artifacts") & HEAVY) == []
    )


def test_help_imports_nothing_heavy() -> None:
    code = "import sys\nfrom worldloom.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"
    modules = _imported(code)
    assert "click" in modules
    assert sorted(modules & HEAVY) == []


def test_every_catalog_is_readable_without_anything_heavy() -> None:
    code = "from worldloom import registry\nfor name in registry.GROUPS: assert not registry.group(name).problems, name"
    assert sorted(_imported(code) & HEAVY) == []


def test_the_standard_library_is_not_shadowed_from_the_root() -> None:
    code = "import platform, uuid; print(platform.__file__); print(uuid.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    library = Path(json.__file__).parents[1]
    assert [Path(line).parent for line in done.stdout.split()] == [library, library]
