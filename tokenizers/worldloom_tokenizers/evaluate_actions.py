"""How well the codes of a latent action model agree with actions that it never saw, and how much they steer it.

*Purity* gives every code the action that it goes with most often and counts how often that is right:
``sum over codes of max over actions of n(code, action) / N`` (Manning, Raghavan, Schütze, "Introduction to Information
Retrieval", 2008, section 16.3). Two figures say what it is worth: the share of the commonest action, which one code for
everything would reach, and the purity of codes dealt out at random. *NMI* is mutual information over the mean of the
two entropies. *Controllability* is that of Genie (arXiv:2402.15391, section 3): by how many decibels frames predicted
with the inferred actions are nearer to the truth than frames predicted with random ones.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from worldloom import media
from worldloom.artifacts import atomic_write, code_version
from worldloom.errors import WorldloomError
from worldloom.shards import Dataset, open_dataset
from worldloom_tokenizers.options import Size

if TYPE_CHECKING:
    from worldloom_tokenizers.latent_actions import LatentActionModel

_SEED = 0  # of the random codes that figures are compared with


@dataclass(frozen=True)
class ActionsEval:
    """What was measured."""

    purity: float
    """Share of steps whose action is the one that their code stands for."""
    majority: float
    """Share of the commonest action: the purity of one code for everything."""
    random: float
    """Purity of as many codes, dealt out at random."""
    nmi: float
    """Normalised mutual information of codes and actions, 0 to 1."""
    codes_used: int
    """Codes that occur."""
    psnr: float
    """dB (peak-to-peak 255, of the mean error) of next frames predicted with the inferred codes."""
    psnr_random: float
    """The same with random codes."""
    psnr_still: float
    """The same of repeating the frame before."""
    counts: tuple[tuple[int, ...], ...]
    """Steps by code and action."""
    actions: tuple[str, ...]
    """Names of the actions."""
    steps: int
    """Pairs of consecutive frames."""
    episodes: int
    """Clips."""
    model: dict[str, Any]
    """Name and fingerprint."""
    dataset: dict[str, Any]
    """Folder and id."""
    size: tuple[int, int] | None
    """(height, width) that frames were cropped and resized to."""

    @property
    def controllability(self) -> float:
        """dB between prediction with inferred and with random codes."""
        return self.psnr - self.psnr_random


def contingency(codes: np.ndarray, actions: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Integers ``(n,)`` and ``(n,)`` -> how often each code goes with each action, int64 of ``shape``."""
    counts = np.zeros(shape, np.int64)
    np.add.at(counts, (codes, actions), 1)
    return counts


def purity(counts: np.ndarray) -> float:
    """Cluster purity of a table of counts ``(codes, actions)``."""
    return float(counts.max(axis=1).sum() / counts.sum())


def nmi(counts: np.ndarray) -> float:
    """Mutual information over the mean entropy of a table of counts; 0 where neither side varies."""
    joint = counts / counts.sum()
    codes, actions = joint.sum(axis=1), joint.sum(axis=0)
    mean = (_entropy(codes) + _entropy(actions)) / 2
    return float((_entropy(codes) + _entropy(actions) - _entropy(joint.ravel())) / mean) if mean else 0.0


def _entropy(share: np.ndarray) -> float:
    share = share[share > 0]
    return float(-(share * np.log(share)).sum())


def evaluate(
    model: LatentActionModel,
    dataset: Dataset | str | Path,
    *,
    name: str = "model",
    size: tuple[int, int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ActionsEval:
    """Infer the codes of every clip of a dataset whose actions are one-hot, and compare.

    Args:
        name: the model's, for the record.
        size: (height, width) that frames are cropped and resized to; None keeps their own.
        progress: called with (clips done, clips in all).

    Raises:
        WorldloomError: no clips, no actions, actions that are not one-hot, or of several environments.
    """
    import torch

    dataset = dataset if isinstance(dataset, Dataset) else open_dataset(dataset)
    if dataset.index.kind != "clips":
        raise WorldloomError("actions are inferred from frames", got=f"{dataset.root} holds latents")
    codes, device, rng = model.config.codes, next(model.parameters()).device, np.random.default_rng(_SEED)
    inferred: list[np.ndarray] = []
    taken: list[np.ndarray] = []
    errors, values = np.zeros(3), 0
    width, names = 0, ()
    for done, sample in enumerate(dataset):
        actions = _one_hot(sample.arrays.get("actions"), sample.clip.id)
        if width not in (0, actions.shape[1]):
            raise WorldloomError("the clips have different actions", got=f"{width} and {actions.shape[1]} of them")
        assert sample.video is not None, "clips have a video"
        video = media.to_tensor(media.read_frames(sample.video, size=size)[None]).to(device)
        found = model.infer(video)
        dealt = torch.from_numpy(rng.integers(0, codes, found.shape)).to(device)
        past, truth = video[:, :, :-1], media.to_frames(video[:, :, 1:]).astype(np.float64)
        for i, made in enumerate((model.predict(past, found), model.predict(past, dealt), past)):
            errors[i] += np.square(media.to_frames(made) - truth).sum()
        values += truth.size
        inferred.append(found[0].cpu().numpy())
        taken.append(actions.argmax(axis=1))
        width = actions.shape[1]
        names = tuple(sample.clip.metadata.get("action_names", ())) or tuple(f"action {i}" for i in range(width))
        if progress is not None:
            progress(done + 1, len(dataset))
    chosen, truth = np.concatenate(inferred), np.concatenate(taken)
    counts = contingency(chosen, truth, (codes, width))
    dealt = contingency(rng.integers(0, codes, len(truth)), truth, (codes, width))
    made, random, still = (10 * np.log10(255**2 / np.maximum(errors / values, 1e-12))).tolist()
    return ActionsEval(
        purity=purity(counts),
        majority=float(counts.sum(axis=0).max() / counts.sum()),
        random=purity(dealt),
        nmi=nmi(counts),
        codes_used=int((counts.sum(axis=1) > 0).sum()),
        psnr=made,
        psnr_random=random,
        psnr_still=still,
        counts=tuple(map(tuple, counts.tolist())),
        actions=names,
        steps=len(truth),
        episodes=len(dataset),
        model={"name": name, "fingerprint": model.fingerprint},
        dataset={"path": str(dataset.root), "id": dataset.index.id},
        size=size,
    )


def _one_hot(actions: np.ndarray | None, clip: str) -> np.ndarray:
    if actions is None:
        raise WorldloomError(
            "the clips have no actions to compare with", got=clip, do="record some: worldloom curate record"
        )
    if not (np.isin(actions, (0, 1)).all() and (actions.sum(axis=1) == 1).all()):
        raise WorldloomError("latent actions are compared with discrete ones, which are stored one-hot", got=clip)
    return actions


# -- the command -----------------------------------------------------------------------------------------------------


@click.group("actions")
def actions_group() -> None:
    """Latent actions: what a model without labels takes the actions of a video for."""


@actions_group.command("eval")
@click.argument("data", type=click.Path(exists=True, file_okay=False))
@click.option("--model", "name", default="loom-lam-nano", show_default=True, help="Catalog name or checkpoint folder.")
@click.option("--out", default="out/actions-eval", show_default=True, type=click.Path(file_okay=False), help="Folder.")
@click.option("--size", type=Size(), default="64", show_default=True, help="Clips are cropped and resized to this.")
@click.option("--device", default="cpu", show_default=True, help="Where it runs, e.g. cuda.")
def eval_command(data: str, name: str, out: str, size: tuple[int, int], device: str) -> None:
    """Infer the latent actions of the episodes of DATA and compare them with the recorded ones."""
    from worldloom.loading import check_device
    from worldloom.progress import progress
    from worldloom_tokenizers.latent_actions import load_latent_actions

    check_device(device)
    model = load_latent_actions(name, device)
    with progress("inferring actions") as shown:
        result = evaluate(model, data, name=name, size=size, progress=shown)
    summary = {**dataclasses.asdict(result), "controllability": result.controllability, "code_version": code_version()}
    atomic_write(Path(out) / "summary.json", json.dumps(summary, indent=1) + "\n")
    _print(result)
    click.echo(f"figures in {Path(out) / 'summary.json'}")


def _print(result: ActionsEval) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for row in (
        ("purity", f"{result.purity:.3f}"),
        ("share of the commonest action", f"{result.majority:.3f}"),
        ("purity of random codes", f"{result.random:.3f}"),
        ("normalised mutual information", f"{result.nmi:.3f}"),
        ("codes used", f"{result.codes_used} of {len(result.counts)}"),
        ("next frame, inferred codes", f"{result.psnr:.2f} dB"),
        ("next frame, random codes", f"{result.psnr_random:.2f} dB"),
        ("frame before repeated", f"{result.psnr_still:.2f} dB"),
        ("steps, episodes", f"{result.steps}, {result.episodes}"),
    ):
        table.add_row(*row)
    console.print(table)
    counts = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("code", *result.actions):
        counts.add_column(column, justify="right")
    for code, row in enumerate(result.counts):
        counts.add_row(str(code), *map(str, row))
    console.print(counts)
