"""Curation: from videos or recorded episodes to a dataset of clips, with a ledger of every decision."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worldloom.lazy import exports

if TYPE_CHECKING:
    from worldloom_curation.config import CurateConfig
    from worldloom_curation.pictures import Frame
    from worldloom_curation.stage import Adds, Derives, Observer, Source, Span, Stage, Verdict

__all__ = ["Adds", "CurateConfig", "Derives", "Frame", "Observer", "Source", "Span", "Stage", "Verdict"]

__getattr__ = exports(
    __name__,
    {
        "Adds": "worldloom_curation.stage",
        "CurateConfig": "worldloom_curation.config",
        "Derives": "worldloom_curation.stage",
        "Frame": "worldloom_curation.pictures",
        "Observer": "worldloom_curation.stage",
        "Source": "worldloom_curation.stage",
        "Span": "worldloom_curation.stage",
        "Stage": "worldloom_curation.stage",
        "Verdict": "worldloom_curation.stage",
    },
)
