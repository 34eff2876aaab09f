"""A third party's stage: one class and one catalog line, installed as a package would be."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from curation_videos import scene, write

from worldloom import WorldloomError, registry
from worldloom.shards import open_dataset
from worldloom_curation import Stage
from worldloom_curation.config import CurateConfig, load
from worldloom_curation.ledger import accounts, load_ledger
from worldloom_curation.pipeline import run

STAGE = '''
from dataclasses import dataclass, replace
import numpy as np
from worldloom_curation import Verdict

@dataclass(frozen=True)
class BrightConfig:
    """Brightness."""
    least: float = 100.0
    """Least mean grey level."""
    channel: int = 0
    """The channel that is looked at."""

class Watch:
    def __init__(self, channel):
        self.channel, self.means = channel, []
    def add(self, frame):
        self.means.append(frame.rgb()[..., self.channel].mean())
    def result(self):
        return {"means": np.asarray(self.means)}

class Bright:
    name, version, scope, measured_with, Config = "bright", 1, "source", ("channel",), BrightConfig
    def __init__(self, config):
        self.config = config
    def observer(self, source, fps):
        return Watch(self.config.channel)
    def decide(self, spans, signals):
        verdicts = []
        for span in spans:
            value = float(signals[span.source.key]["means"][span.start : span.end].mean())
            span = replace(span, notes={**span.notes, "brightness": value})
            verdicts.append(Verdict(span, value >= self.config.least, "brightness", value, self.config.least, "light"))
        return verdicts
'''


@pytest.fixture
def bright(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    site = tmp_path / "site"
    info = site / "brightness-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brightness\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[worldloom.stages]\nbrightness = brightness_catalog:STAGES\n")
    (site / "brightness_catalog.py").write_text('STAGES = {"bright": "brightness_stage:Bright"}\n')
    (site / "brightness_stage.py").write_text(STAGE)
    monkeypatch.syspath_prepend(str(site))
    registry.group.cache_clear()
    yield
    registry.group.cache_clear()
    for name in ("brightness_catalog", "brightness_stage"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("bright")
@pytest.mark.parametrize("workers", [1, 2])
def test_an_installed_stage_runs_between_ours(tmp_path: Path, workers: int) -> None:
    dark = scene(1, 30) // 4
    write(tmp_path / "videos" / "both", np.concatenate([dark, 255 - dark]), "ffv1")
    write(tmp_path / "videos" / "light", 255 - dark[::-1], "ffv1")
    settings = ["stages=['split','bright','duplicates']", f"workers={workers}", "bright.least=120"]
    assert isinstance(registry.load("stages", "bright")(None), Stage)
    summary = run(tmp_path / "videos", tmp_path / "out", load(overrides=settings))
    assert (summary["clips"], summary["dropped"]["bright"]) == (2, 1)
    [row] = [row for row in load_ledger(tmp_path / "out") if row.stage == "bright" and not row.kept]
    assert (row.source, row.start, row.end, row.threshold) == ("both.mkv", 0, 30, 120.0)
    for clip in open_dataset(tmp_path / "out").clips():
        assert clip.metadata["brightness"] > 190
    assert all(account.balanced for account in accounts(load_ledger(tmp_path / "out")).values())
    again = run(tmp_path / "videos", tmp_path / "out", load(overrides=[*settings, "bright.least=10"]))
    assert again["work"]["scan"] == {"cached": 2, "computed": 0, "copied": 0}
    assert again["work"]["bright"] == {"cached": 0, "computed": 3, "copied": 0}
    assert again["clips"] == 3
    other = run(tmp_path / "videos", tmp_path / "out", load(overrides=[*settings, "bright.channel=2"]))
    assert other["work"]["scan"]["computed"] == 2
    assert "least = 120" in (tmp_path / "out" / "config.toml").read_text()


def test_a_stage_that_is_not_installed_is_named() -> None:
    with pytest.raises(WorldloomError, match="there is no stage of that name"):
        run(Path(__file__), "unused", CurateConfig(stages=("split", "motoin")))
    with pytest.raises(WorldloomError, match="unknown key 'bright'"):
        load(overrides=["bright.least=1"])
