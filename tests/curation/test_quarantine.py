"""A stage that raises on one clip costs that clip: the run goes on, and the ledger holds the traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from click.testing import CliRunner
from curation_videos import scene, write

from worldloom import registry
from worldloom.errors import MissingPackage
from worldloom.shards import open_dataset
from worldloom_curation import Source, Span, Verdict
from worldloom_curation.cli import curate
from worldloom_curation.config import load
from worldloom_curation.ledger import accounts, load_ledger
from worldloom_curation.pipeline import run
from worldloom_curation.quarantine import Failure, decide

STAGE = '''
from dataclasses import dataclass
import numpy as np
from worldloom.errors import missing_extra
from worldloom_curation import Verdict

@dataclass(frozen=True)
class TouchyConfig:
    """Raises."""
    watches: str = ""
    """Raise on the frames of a source of that height."""
    at: int = -1
    """Raise on the span that begins there."""
    missing: bool = False
    """As if a package were missing."""

class Watch:
    def __init__(self, config):
        self.config, self.count = config, 0
    def add(self, frame):
        self.count += 1
        if self.count > 3 and str(frame.height) == self.config.watches:
            raise ZeroDivisionError(f"no light in {self!r}")
    def result(self):
        return {"count": np.asarray(self.count)}

class Touchy:
    name, version, scope, measured_with, Config = "touchy", 1, "SCOPE", ("watches",), TouchyConfig
    def __init__(self, config):
        self.config = config
    def observer(self, source, fps):
        return Watch(self.config)
    def decide(self, spans, signals):
        if self.config.missing:
            raise missing_extra("rapidocr", "ocr")
        for span in spans:
            signals[span.source.key]["count"]
            if span.start == self.config.at:
                self.stumble(span)
        return [Verdict(span, True, "count", 1.0, 0.0, "fine") for span in spans]
    def stumble(self, span):
        raise ValueError(f"cannot look at {span.source.path}")
'''


@pytest.fixture(params=["source", "run"])
def touchy(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    site = tmp_path / "site"
    info = site / "touchy-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: touchy\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[worldloom.stages]\ntouchy = touchy_catalog:STAGES\n")
    (site / "touchy_catalog.py").write_text('STAGES = {"touchy": "touchy_stage:Touchy"}\n')
    (site / "touchy_stage.py").write_text(STAGE.replace("SCOPE", request.param))
    monkeypatch.syspath_prepend(str(site))
    registry.group.cache_clear()
    yield
    registry.group.cache_clear()
    for name in ("touchy_catalog", "touchy_stage"):
        sys.modules.pop(name, None)


SETTINGS = ("stages=['split','touchy','duplicates']",)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Two files; the first has two shots, the second another height."""
    write(tmp_path / "videos" / "a", np.concatenate([scene(1, 24), scene(2, 24)]), "mjpeg")
    write(tmp_path / "videos" / "b", scene(3, 24, height=80), "mjpeg")
    return tmp_path / "videos"


@pytest.mark.usefixtures("touchy")
def test_a_stage_that_raises_on_one_clip_costs_that_clip_only(videos: Path, tmp_path: Path) -> None:
    summary = run(videos, tmp_path / "out", load(overrides=[*SETTINGS, "touchy.at=24"]))
    assert (summary["clips"], summary["failed"], summary["quarantined"]) == (2, 1, 1)
    rows = load_ledger(tmp_path / "out")
    [row] = [row for row in rows if row.failed]
    assert (row.source, row.start, row.end, row.stage, row.kept) == ("a.avi", 24, 48, "touchy", False)
    assert row.reason == "ValueError: cannot look at the file"
    assert "in stumble" in row.traceback
    assert row.traceback.rstrip().endswith("ValueError: cannot look at a.avi")  # not the place on this machine
    assert all(account.balanced for account in accounts(rows).values())
    assert [(clip.source, clip.start) for clip in open_dataset(tmp_path / "out").clips()] == [
        ("a.avi", 0),
        ("b.avi", 0),
    ]
    # A failure is not remembered: mended, the clip is there, and nothing is decoded again.
    mended = run(videos, tmp_path / "out", load(overrides=[*SETTINGS]))
    assert (mended["clips"], mended["quarantined"], mended["work"]["scan"]["computed"]) == (3, 0, 0)


@pytest.mark.usefixtures("touchy")
def test_an_observer_that_raises_costs_its_source_at_that_stage(videos: Path, tmp_path: Path) -> None:
    settings = load(overrides=[*SETTINGS, "touchy.watches='80'"])
    summary = run(videos, tmp_path / "out", settings)
    assert (summary["clips"], summary["quarantined"]) == (2, 1)
    [row] = [row for row in load_ledger(tmp_path / "out") if row.failed]
    assert (row.source, row.stage) == ("b.avi", "touchy")
    assert "0x..." in row.reason
    assert "ZeroDivisionError" in row.traceback
    ledger = (tmp_path / "out" / "ledger.parquet").read_bytes()
    again = run(videos, tmp_path / "out", settings)
    assert again["work"]["scan"]["computed"] == 1  # asked again, and the others are not
    assert (tmp_path / "out" / "ledger.parquet").read_bytes() == ledger


@pytest.mark.usefixtures("touchy")
def test_the_exit_code_and_the_last_words_say_that_clips_are_in_quarantine(videos: Path, tmp_path: Path) -> None:
    args = ["run", str(videos), "--out", str(tmp_path / "out")]
    args += ["--set", SETTINGS[0]]
    assert CliRunner().invoke(curate, args).exit_code == 0
    result = CliRunner().invoke(curate, [*args, "--set", "touchy.at=24"])
    assert result.exit_code == 3, result.output
    assert "1 clip in quarantine" in result.output
    with pytest.raises(MissingPackage, match="rapidocr"):
        run(videos, tmp_path / "out", load(overrides=[*SETTINGS, "touchy.missing=true"]))


@dataclass
class Fussy:
    """Raises on the sources of `alone`, and on more than `most` spans at once; loses the frames of `loses`."""

    alone: tuple[str, ...] = ()
    most: int = 99
    loses: str = ""
    name: str = "fussy"
    version: int = 1
    scope: Literal["source", "run"] = "run"
    config: None = None
    measured_with: tuple[str, ...] = ()

    def observer(self, source: Source, fps: float) -> None:
        return None

    def decide(self, spans, signals) -> list[Verdict]:
        if len(spans) > self.most or any(span.source.name in self.alone for span in spans):
            raise RuntimeError("no")
        return [Verdict(span, True) for span in spans if span.source.name != self.loses]


SPANS = [Span(Source(name, f"/{name}", name * 64, name), 0, 20, 20.0) for name in "abcd"]


def outcome(stage: Fussy, broken: dict[str, Failure] | None = None) -> dict[str, bool]:
    verdicts = decide(stage, SPANS, {}, broken or {})
    assert [verdict.span for verdict in verdicts] == SPANS  # in order, whatever failed
    assert all(verdict.failed != verdict.kept for verdict in verdicts)
    return {verdict.span.source.name: verdict.kept for verdict in verdicts}


def test_those_that_raise_alone_are_taken_out_and_the_rest_is_decided_together() -> None:
    assert outcome(Fussy()) == {"a": True, "b": True, "c": True, "d": True}
    assert outcome(Fussy(("b", "d"))) == {"a": True, "b": False, "c": True, "d": False}
    assert outcome(Fussy(), {"a": Failure("gone")}) == {"a": False, "b": True, "c": True, "d": True}
    assert outcome(Fussy(most=2)) == dict.fromkeys("abcd", False)  # nobody to blame


def test_a_stage_that_loses_frames_has_failed_on_them() -> None:
    assert outcome(Fussy(loses="c")) == {"a": True, "b": True, "c": False, "d": True}
    [lost] = [verdict for verdict in decide(Fussy(loses="c"), SPANS, {}, {}) if verdict.failed]
    assert "do not cover the frames" in lost.reason
