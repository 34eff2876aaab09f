"""The Python of the platform's README runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "platform" / "README.md"


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 3
    (tmp_path / "readme.py").write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, "readme.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"model-[0-9a-f]{16}\n", done.stdout)
    assert (tmp_path / "runs" / "mine" / "config.toml").read_text() == 'steps = 60\nclip = "none"\n'


def test_every_module_it_names_exists() -> None:
    rows = re.findall(r"^\| (`[^|]+`) \|", README.read_text(encoding="utf-8"), re.M)
    names = {name for row in rows for name in re.findall(r"`([a-z_]+)`", row)}
    assert len(names) >= 15
    assert [name for name in names if not (README.parent / "worldloom" / f"{name}.py").is_file()] == []
