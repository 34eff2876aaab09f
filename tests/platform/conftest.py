"""A third party's package, made for one test: real metadata on sys.path, found as an installed one would be."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from worldloom import registry

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """``install("acme", {"worldloom.stages": {"acme": "acme.catalog:STAGES"}}, {"acme/catalog.py": "..."})``."""
    registry.group.cache_clear()

    def make(name: str, entry_points: Mapping[str, Mapping[str, str]], files: Mapping[str, str]) -> Path:
        root = tmp_path / f"site-{name}"
        info = root / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [
            f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in items.items()) for group, items in entry_points.items()
        ]
        (info / "entry_points.txt").write_text("\n".join(lines))
        for path, text in files.items():
            file = root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(textwrap.dedent(text))
        monkeypatch.syspath_prepend(str(root))
        registry.group.cache_clear()
        return root

    yield make
    registry.group.cache_clear()
