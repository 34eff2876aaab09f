"""Weights in the layouts that others publish: renamed by one table, nothing left over, nothing missing.

A family's ``checkpoint.py`` gives the table for a configuration: the prefix of each of our modules that has weights,
and its prefix in each layout. Both directions come from it, so a state dict that goes out and comes back is
bit-equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from worldloom.errors import WorldloomError
from worldloom.weights import misfit

if TYPE_CHECKING:
    from torch import Tensor

    from worldloom_tokenizers.codec import VideoCodec

Layout = Literal["native", "diffusers"]
Names = dict[str, dict[Layout, str]]
"""Our module prefix -> layout -> its prefix there."""

_STATISTICS = ("latent_mean", "latent_std")


def to_released(model: VideoCodec, names: Names, layout: Layout) -> dict[str, Tensor]:
    """The weights of a model under a layout's names; the statistics of its latents stay with its configuration."""
    own = {key: value for key, value in model.state_dict().items() if key not in _STATISTICS}
    renamed = _renaming(own, names, layout)
    return {renamed[key]: tensor for key, tensor in own.items()}


def from_released(
    model: VideoCodec, names: Names, weights: Mapping[str, Tensor], layout: Layout, unused: Sequence[str] = ()
) -> None:
    """Load released weights into a model, in the model's own precision.

    Args:
        unused: keys that the layout may hold although no network uses them.

    Raises:
        WorldloomError: a key is missing, unmatched, or of another shape: the checkpoint is of another variant.
    """
    import torch

    own = {key: value for key, value in model.state_dict().items() if key not in _STATISTICS}
    renamed = _renaming(own, names, layout)
    left_over = set(unused) - set(renamed.values())
    if found := misfit(own, renamed, {key: value for key, value in weights.items() if key not in left_over}):
        raise WorldloomError(
            f"these weights are of another variant than the {layout} layout of {type(model).__name__} asked for",
            got=found,
            do="name the variant that the checkpoint is of",
        )
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(weights[renamed[key]])


def recognise(weights: Mapping[str, Any], candidates: Mapping[Layout, Names]) -> Layout:
    """Which layout a state dict is in, by its keys.

    Raises:
        WorldloomError: none of them.
    """
    keys = set(weights)
    for layout, names in candidates.items():
        known = [names[ours][layout] for ours in names]
        if all(any(key.startswith(f"{prefix}.") for key in keys) for prefix in (known[0], known[-1])):
            return layout
    raise WorldloomError(
        "these weights are in none of the layouts of this tokenizer",
        got=f"keys such as {sorted(keys)[:3]}",
        do="give the state dict of the whole autoencoder",
    )


def _renaming(own: Mapping[str, Any], names: Names, layout: Layout) -> dict[str, str]:
    """Our key -> the layout's key."""
    found = {}
    for key in own:
        prefix, _, leaf = key.rpartition(".")
        assert prefix in names, f"{key} is in no row of the table"
        found[key] = f"{names[prefix][layout]}.{leaf}"
    return found
