"""The layout's own rules (docs/decisions/0001-layout.md): nothing shadows the standard library, imports go one way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPONENTS = {
    "platform": "worldloom",
    "tokenizers": "worldloom_tokenizers",
    "curation": "worldloom_curation",
    "model_zoo": "worldloom_model_zoo",
    "finetune": "worldloom_finetune",
}


@pytest.mark.parametrize(("folder", "package"), COMPONENTS.items())
def test_a_component_folder_holds_one_package_and_no_module(folder: str, package: str) -> None:
    assert not list((ROOT / folder).glob("*.py")), "a module here would shadow others when the root is on sys.path"
    assert [init.parent.name for init in (ROOT / folder).glob("*/__init__.py")] == [package]
    assert (ROOT / folder / package / "py.typed").exists()
    assert (ROOT / folder / "README.md").exists(), "it says what the component is for"


@pytest.mark.parametrize(
    "arguments",
    [["-m", "pip", "--version"], ["-m", "pytest", "--version"], ["-c", "import uuid, platform; platform.machine()"]],
    ids=["pip", "pytest", "uuid"],
)
def test_python_works_from_the_repository_root(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("folder", "imports"),
    [
        ("platform", "worldloom_finetune"),
        ("tokenizers", "worldloom_curation"),
        ("curation", "worldloom_model_zoo"),
        ("model_zoo", "worldloom_finetune"),
    ],
)
def test_an_import_against_the_grain_is_caught(tmp_path: Path, folder: str, imports: str) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name in COMPONENTS:
        ignored = shutil.ignore_patterns("__pycache__", "weights", "*.safetensors")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    # Ahead of the editable install on sys.path, so that the copy is what gets read.
    path = os.pathsep.join(str(tmp_path / name) for name in COMPONENTS)

    def lint() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"]
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    before = lint()
    assert before.returncode == 0, before.stdout + before.stderr
    (tmp_path / folder / COMPONENTS[folder] / "planted.py").write_text(f"import {imports}\n")
    after = lint()
    assert after.returncode != 0
    assert f"{COMPONENTS[folder]}.planted -> {imports}" in after.stdout


def test_no_module_is_a_drawer_for_everything() -> None:
    modules = [path for folder in COMPONENTS for path in (ROOT / folder).rglob("*.py")]
    assert modules
    assert not [path for path in modules if path.stem in {"utils", "util", "helpers", "common", "misc"}]


def test_no_test_folder_is_a_package() -> None:
    # tests/platform/__init__.py would become `platform` wherever tests/ is on sys.path.
    assert not list((ROOT / "tests").rglob("__init__.py"))
