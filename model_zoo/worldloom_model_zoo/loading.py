"""From a name or a folder to a model that is ready to use."""

from worldloom.loading import load_model

__all__ = ["load_model"]
