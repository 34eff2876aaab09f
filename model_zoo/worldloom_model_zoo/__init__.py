"""World-model families: one folder each, loaded by catalog name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from worldloom.lazy import exports

if TYPE_CHECKING:
    from worldloom.loading import load_model
    from worldloom_model_zoo.predict.causal import KVCache
    from worldloom_model_zoo.predict.config import PredictConfig
    from worldloom_model_zoo.predict.model import PredictTransformer
    from worldloom_model_zoo.predict.pipeline import PredictPipeline

__all__ = ["KVCache", "PredictConfig", "PredictPipeline", "PredictTransformer", "load_model"]

__getattr__ = exports(
    __name__,
    {
        "KVCache": "worldloom_model_zoo.predict.causal",
        "PredictConfig": "worldloom_model_zoo.predict.config",
        "PredictPipeline": "worldloom_model_zoo.predict.pipeline",
        "PredictTransformer": "worldloom_model_zoo.predict.model",
        "load_model": "worldloom.loading",
    },
)
