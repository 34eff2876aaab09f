"""Curation: from videos or recorded episodes to a dataset of clips, with a ledger of every decision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worldloom_curation.config import CurateConfig
    from worldloom_curation.stage import Observer, Source, Span, Stage, Verdict

__all__ = ["CurateConfig", "Observer", "Source", "Span", "Stage", "Verdict"]

_HOMES = {
    "CurateConfig": "config",
    "Observer": "stage",
    "Source": "stage",
    "Span": "stage",
    "Stage": "stage",
    "Verdict": "stage",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the catalog must be readable without numpy."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
