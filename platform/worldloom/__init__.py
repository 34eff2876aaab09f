"""Worldloom: a platform SDK for building world models. Importing it imports neither torch nor anything heavy."""

from worldloom.errors import WorldloomError
from worldloom.schema import CheckpointRef, Clip, Decision, GenerationRequest, LatentBatch, Sample, ShardRef

__version__ = "0.1.0"

__all__ = [
    "CheckpointRef",
    "Clip",
    "Decision",
    "GenerationRequest",
    "LatentBatch",
    "Sample",
    "ShardRef",
    "WorldloomError",
    "__version__",
]
