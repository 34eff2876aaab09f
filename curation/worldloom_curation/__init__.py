"""Curation: from videos or recorded episodes to a dataset of clips, with a ledger of every decision."""

from worldloom_curation.config import CurateConfig
from worldloom_curation.stage import Observer, Source, Span, Stage, Verdict

__all__ = ["CurateConfig", "Observer", "Source", "Span", "Stage", "Verdict"]
