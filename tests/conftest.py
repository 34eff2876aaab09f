"""What every test gets: one torch thread, its own WORLDLOOM_HOME, fixed seeds, and no network beyond this machine."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before anything imports torch. Subprocesses that a test starts inherit all of it.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
    os.environ[_name] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import pytest
from hypothesis import settings

# Derandomised on CI, so that a failure there is found again here; no deadline, because two workers share two cores.
settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True, database=None)
settings.register_profile("dev", deadline=None, max_examples=50)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


class NetworkBlocked(RuntimeError):
    """A test tried to reach another machine."""


def _is_local(host: Any) -> bool:
    name = host.decode() if isinstance(host, bytes) else str(host or "")
    local = {"", "localhost", "0.0.0.0", "::", "::1", socket.gethostname()}
    return name in local or name.startswith(("127.", "::ffff:127."))


def _fence(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook: Python asks it before any socket of any class or library connects, sends or resolves a name."""
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = args[1]
        if isinstance(address, tuple) and not _is_local(address[0]):  # a Unix socket's address is a path
            raise NetworkBlocked(f"tests reach no other machine than this one; something tried {address!r}")
    elif event in ("socket.getaddrinfo", "socket.gethostbyname") and not _is_local(args[0]):
        raise NetworkBlocked(f"tests reach no other machine than this one; something looked up {args[0]!r}")


sys.addaudithook(_fence)


@pytest.fixture(scope="session", autouse=True)
def _session_home() -> Iterator[Path]:
    """One home per test process, so that fixtures of any scope see the same store; nothing lands in the checkout."""
    with tempfile.TemporaryDirectory(prefix="worldloom-tests-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLDLOOM_HOME", folder)
        yield Path(folder)


@pytest.fixture
def worldloom_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh, empty home for a test that counts or lists what is in it."""
    home = tmp_path / "home"
    monkeypatch.setenv("WORLDLOOM_HOME", str(home))
    return home


@pytest.fixture(autouse=True)
def _torch_seed() -> None:
    """Same weights and noise in every order of the tests. random and numpy are pytest-randomly's; torch is not."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_configure() -> None:
    """Keep pytest-randomly from importing DeepSpeed, which registers a seeder with it, where no test needs torch."""
    if "pytest_randomly" in sys.modules:
        vars(sys.modules["pytest_randomly"])["entrypoint_reseeds"] = []


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test that needs a GPU skips itself without one, so `make test-all` runs anywhere."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
