"""World-model families: one folder each, loaded by catalog name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worldloom_model_zoo.loading import load_model
    from worldloom_model_zoo.predict.config import PredictConfig
    from worldloom_model_zoo.predict.model import KVCache, PredictTransformer
    from worldloom_model_zoo.predict.pipeline import PredictPipeline

__all__ = ["KVCache", "PredictConfig", "PredictPipeline", "PredictTransformer", "load_model"]

_HOMES = {
    "KVCache": "predict.model",
    "PredictConfig": "predict.config",
    "PredictPipeline": "predict.pipeline",
    "PredictTransformer": "predict.model",
    "load_model": "loading",
}


def __getattr__(name: str) -> Any:
    """Import on first use: the catalog must be readable without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
