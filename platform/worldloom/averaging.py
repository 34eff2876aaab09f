"""Checkpoints of one network averaged into one.

The mean of a fine-tuned model's weights and its base's often keeps what both can do (Wortsman et al. 2022, "Robust
fine-tuning of zero-shot models"), and so does that of several fine-tunings of one base ("Model soups", the same year).
It holds for weights that are joined by training: two models trained apart have no mean that works.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from worldloom import config as configs
from worldloom.artifacts import Artifact, Store, atomic_dir, file_digest
from worldloom.errors import WorldloomError
from worldloom.loading import checkpoint_folder
from worldloom.weights import WEIGHTS, misfit, read_weights, write_weights

_SUM = 1e-6  # how far from 1 the shares may sum to


def average(shares: Mapping[str, float], out: str | Path, store: Store | None = None) -> Artifact:
    """Write the weighted mean of checkpoints as a checkpoint folder; returns its artifact.

    Configuration, precision and all else are those of the first.

    Args:
        shares: catalog name or checkpoint folder -> its share; positive, 1 in all.
        out: a new folder.
        store: where the result is recorded; None for the default store.

    Raises:
        WorldloomError: shares that are none, checkpoints of different networks or latents, or ``out`` exists.
    """
    import torch

    given = list(shares.values())
    if len(given) < 2 or not all(share > 0 for share in given) or not abs(sum(given) - 1) <= _SUM:  # NaN is none
        raise WorldloomError(
            "an average is of two checkpoints or more, with positive shares that sum to 1",
            got=", ".join(f"{name}={share:g}" for name, share in shares.items()),
            do="for example: worldloom models average runs/tuned/model=0.7 runs/base/model=0.3 --out runs/mean",
        )
    out = Path(out)
    if out.exists():
        raise WorldloomError("the output exists", got=out, do="give a new folder")
    found = {name: checkpoint_folder(name) for name in shares}
    for name, (folder, _) in found.items():
        if not (folder / "config.toml").is_file() or not (folder / WEIGHTS).is_file():
            raise WorldloomError(
                "this is not a checkpoint folder with whole weights",
                got=name,
                do=f"give one with config.toml and {WEIGHTS}",
            )
    first, *others = found
    folder, sha256 = found[first]
    settings, weights = configs.read_toml(folder / "config.toml"), read_weights(folder, sha256)
    total = {key: tensor.double() * shares[first] for key, tensor in weights.items()}
    for name in others:
        folder, sha256 = found[name]
        _check_same(first, settings, name, configs.read_toml(folder / "config.toml"))
        added = read_weights(folder, sha256)
        if unlike := misfit(weights, {key: key for key in weights}, added):
            raise WorldloomError(
                f"{name} does not hold the tensors of {first}", got=unlike, do="give checkpoints of one network"
            )
        for key, tensor in added.items():
            total[key] += tensor.double() * shares[name]
    made = {}
    for key, tensor in weights.items():
        mean = total[key] if tensor.is_floating_point() else total[key].round()
        made[key] = mean.to(tensor.dtype)
        if not torch.isfinite(made[key]).all():
            raise WorldloomError("an average is not finite", got=key, do="check the checkpoints")
    said = " and ".join(f"{share:g} of `{name}`" for name, share in shares.items())
    with atomic_dir(out) as new:
        write_weights(made, new)
        shutil.copyfile(found[first][0] / "config.toml", new / "config.toml")
        (new / "README.md").write_text(f"# {out.name}\n\nThe mean of the weights of {said}.\n", encoding="utf-8")
    store = store or Store()
    digests = {name: file_digest(folder / WEIGHTS) for name, (folder, _) in found.items()}
    inputs = [store.holding(digest, "model") or f"model:{name}@{digest}" for name, digest in digests.items()]
    return store.put(out, kind="model", name=out.name, inputs=inputs, config={"shares": dict(shares)})


def _check_same(first: str, settings: Mapping[str, Any], name: str, other: Mapping[str, Any]) -> None:
    """Raise unless two configurations describe one network in the latents of one tokenizer."""
    ours, theirs = (
        {
            **{key: given.get(key) for key in ("family", "model", "action_names")},
            **{key: dict(given.get(key) or {}).get("fingerprint") for key in ("tokenizer", "text")},
        }
        for given in (settings, other)
    )
    if differ := [key for key in ours if ours[key] != theirs[key]]:
        raise WorldloomError(
            f"the checkpoints differ in {' and '.join(differ)}",
            got=f"{first} and {name}",
            do="average checkpoints of which one was trained from the other, or both from a third",
        )
