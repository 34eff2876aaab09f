from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from worldloom import doctor


def _doctor(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "worldloom", "doctor", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_working_installation() -> None:
    done = _doctor("--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["core_ok"] is True
    system = {check["name"]: check for check in found["system"]}
    assert system["python"]["value"] == sys.version.split()[0]
    assert int(system["cores"]["value"]) == len(os.sched_getaffinity(0))
    assert 0.1 < found["memory_gib"] < 1e5
    packages = {check["name"]: check for check in found["packages"]}
    assert set(doctor.CORE) | set(doctor.OPTIONAL) == set(packages)
    assert packages["torch"]["value"].startswith("2.")
    assert {"doctor", "models", "lineage"} <= {check["name"] for check in found["verbs"] if check["state"] == "ok"}
    fits = {fit["model"]: fit for fit in found["fits"]}
    assert fits["Cosmos-Predict2.5 2B"]["full"] == pytest.approx(32e9 / 2**30)


def test_a_broken_torch_is_named_and_fails(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libgomp.so.1: cannot open shared object file')")
    done = _doctor(path=tmp_path)
    assert done.returncode == 1
    [line] = [line for line in done.stdout.splitlines() if line.startswith("XX  torch ")]
    assert "libgomp.so.1" in line
    assert "pip install --force-reinstall torch" in " ".join(done.stdout.split())
    assert "The core is broken" in done.stdout


def test_a_missing_core_package_is_told_from_a_broken_one(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = doctor._core("worldloom_no_such_package")
    assert (missing.state, missing.do) == ("missing", "pip install worldloom_no_such_package")


def test_an_optional_package_names_the_exact_command(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"acme_absent": ("acme-absent", "reason", "dreaming")}
    monkeypatch.setattr(doctor, "OPTIONAL", table)
    check = doctor._optional("acme_absent")
    assert (check.state, check.value, check.do) == ("missing", "dreaming", "pip install 'worldloom[reason]'")


def test_every_extra_and_distribution_named_exists_in_the_project_file() -> None:
    from worldloom import config

    project = config.read_toml(Path(__file__).parents[2] / "pyproject.toml")["project"]
    extras = project["optional-dependencies"]
    for distribution, extra, _ in doctor.OPTIONAL.values():
        assert any(line.startswith(distribution.split("[")[0]) for line in extras[extra]) or any(
            distribution in line for line in extras[extra]
        ), (distribution, extra)
    core = " ".join(project["dependencies"])
    assert all(name in core for name in doctor.CORE)


def test_verbs_say_what_they_need(install) -> None:
    from worldloom import registry

    install(
        "acme_v",
        {"worldloom.commands": {"v": "acme_v.catalog:COMMANDS"}},
        {
            "acme_v/__init__.py": "",
            "acme_v/cli.py": "raise RuntimeError('the doctor must not run a command')",
            "acme_v/catalog.py": """
                COMMANDS = {
                    "acme-ready": {"target": "acme_v.cli:go", "summary": "Goes."},
                    "acme-needs": {"target": "acme_v.cli:go", "needs": ["acme_absent", "json"]},
                    "acme-gone": {"target": "acme_v.gone:go"},
                    "acme-lost": {"target": "acme_nowhere.cli:go"},
                }
            """,
        },
    )
    checks = {name: doctor._verb(name, lines[0]) for name, lines in registry.group("commands").entries.items()}
    assert (checks["acme-ready"].state, checks["acme-ready"].value) == ("ok", "Goes.")
    assert (checks["acme-needs"].state, checks["acme-needs"].value) == ("missing", "needs acme_absent")
    assert checks["acme-gone"].state == "missing"
    assert checks["acme-lost"].state == "broken"


@pytest.mark.parametrize(("accelerated", "weights"), [(True, 2), (False, 4)])
def test_what_fits(accelerated: bool, weights: int) -> None:
    fit = doctor._fit("x", 1e9, accelerated)
    assert fit.generate == pytest.approx(weights * 1e9 / 2**30)
    assert fit.full == pytest.approx(16e9 / 2**30)
    assert fit.generate < fit.lora < fit.full
