"""``worldloom curate search``: the clips of a dataset that are most like a text, a picture or a video.

A clip is known by vectors of a few of its frames, or of its caption; which model makes them is looked up in the
registry's ``embedders`` (`worldloom.protocols.Embedder`), for curation imports no model. Vectors are made once and kept
beside the dataset, in ``search/<key>.npz``; the key covers the dataset's id, the model's fingerprint and what is
embedded, so nothing stale is ever searched.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
import numpy as np

from worldloom.artifacts import atomic_write
from worldloom.errors import WorldloomError
from worldloom.shards import Dataset

if TYPE_CHECKING:
    from worldloom.protocols import Embedder

What = Literal["frames", "texts"]

FRAMES = 4
"""Frames of a clip that are embedded, evenly spread."""
_EDGE = 224  # pixels that frames are kept at for a contact sheet
_CHUNK = 65536  # vectors compared at a time
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


@dataclass(frozen=True)
class Found:
    """One clip that is like the query."""

    clip: str
    """Its id."""
    score: float
    """Cosine of the angle to the query: 1 is the same, 0 nothing in common."""
    frame: int | None
    """The frame of the clip that is most like it; None where captions were compared."""
    source: str
    """Where the clip comes from,"""
    start: int
    """from this frame"""
    end: int
    """to before this one."""
    caption: str
    """Its caption."""


@dataclass(frozen=True)
class Vectors:
    """What a dataset is searched by."""

    keys: np.ndarray
    """Clip ids, ``(n,)``."""
    frames: np.ndarray
    """int64 ``(n, k)``: the frame that each vector stands for, -1 for a caption."""
    vectors: np.ndarray
    """float16 ``(n, k, d)``, of length 1; zeros where there was nothing to embed."""

    def nearest(self, query: np.ndarray, top: int) -> list[tuple[int, int, float]]:
        """(clip, which of its vectors, cosine) of the `top` clips most like a unit vector ``(d,)``, best first.

        A clip without anything that was embedded is like nothing.
        """
        scores = np.empty(len(self.keys), np.float32)
        best = np.empty(len(self.keys), np.int64)
        for i in range(0, len(self.keys), _CHUNK):
            chunk = self.vectors[i : i + _CHUNK]
            cosines = chunk.astype(np.float32) @ query.astype(np.float32)  # (n, k)
            cosines[~chunk.any(-1)] = -np.inf
            best[i : i + _CHUNK] = cosines.argmax(1)
            scores[i : i + _CHUNK] = cosines.max(1)
        order = np.argsort(-scores, kind="stable")[:top]  # equal ones in reading order
        return [(int(i), int(best[i]), float(scores[i])) for i in order if scores[i] > -np.inf]


def find_embedder(model: str, what: What) -> Embedder:
    """The embedder `model`: a name in the registry or a folder; "" takes the one that is installed for `what`.

    Raises:
        WorldloomError: unknown, cannot be read, or takes something else.
    """
    from worldloom import registry

    if not model:
        model = "efficientnet-lite0" if what == "frames" else "minilm"
    if model not in registry.names("embedders") and Path(model).is_dir():
        embedder = registry.load("embedders", "clip")(model)
    elif model == "clip":
        raise WorldloomError("clip stands for a folder of such a model", do="give --model FOLDER")
    else:
        embedder = registry.load("embedders", model)()
    if what not in embedder.takes:
        raise WorldloomError(
            f"this model embeds {' and '.join(embedder.takes)} only",
            got=f"{model}, and the query is {'a text' if what == 'texts' else 'a picture'}",
            do="leave --model out, or give a folder that holds a CLIP or SigLIP model",
        )
    return embedder


def embed_dataset(
    dataset: Dataset, embedder: Embedder, what: What, progress: Callable[[int, int], None] = lambda done, total: None
) -> Vectors:
    """The vectors of all clips, made now or read from what was made before.

    Args:
        what: ``frames`` of the videos, or their captions (``texts``).
        progress: called with (clips done, clips in all).

    Raises:
        WorldloomError: frames of a dataset that holds no videos, or captions where there are none.
    """
    facts = [1, dataset.index.id, embedder.fingerprint, what, FRAMES]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
    path = dataset.root / "search" / f"{key}.npz"
    if path.is_file():
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
                found = Vectors(file["keys"], file["frames"], file["vectors"])
            if len(found.keys) == len(found.vectors) == len(found.frames) == len(dataset):
                return found
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass  # damaged: made again
    if what == "frames" and dataset.index.kind != "clips":
        raise WorldloomError(
            "latents hold no pictures to search",
            got=dataset.root,
            do="give the dataset of clips they were encoded from",
        )
    embed = _frame_vectors if what == "frames" else _caption_vectors
    rows = []
    for row in embed(dataset, embedder):
        rows.append(row)
        progress(len(rows), len(dataset))
    found = Vectors(
        np.array([key for key, _, _ in rows]),
        np.stack([frames for _, frames, _ in rows]),
        np.stack([vectors for _, _, vectors in rows]).astype(np.float16),
    )
    if not found.vectors.any():
        raise WorldloomError(
            "no clip of the dataset has a caption",
            got=dataset.root,
            do="add the stage caption, or give a folder that holds a CLIP or SigLIP model as --model",
        )
    buffer = io.BytesIO()
    np.savez(buffer, keys=found.keys, frames=found.frames, vectors=found.vectors)
    atomic_write(path, buffer.getvalue())
    return found


Row = tuple[str, np.ndarray, np.ndarray]  # key, frame numbers (k,), vectors (k, d)


def _frame_vectors(dataset: Dataset, embedder: Embedder) -> Iterator[Row]:
    stored = dataset.index.metadata.get("embedder") or {}
    fits = (stored.get("fingerprint"), stored.get("frames")) == (embedder.fingerprint, FRAMES)
    for sample in dataset:
        if fits and "embedding" in sample.arrays:  # curation's stage of that name made them
            yield sample.clip.id, places(sample.clip.frames, FRAMES), sample.arrays["embedding"]
        else:
            numbers, frames = spread(sample.video or b"")
            yield sample.clip.id, numbers, embedder.embed_frames(frames)


def _caption_vectors(dataset: Dataset, embedder: Embedder) -> Iterator[Row]:
    clips = dataset.clips()
    while waiting := list(itertools.islice(clips, 64)):
        vectors = embedder.embed_texts([clip.caption for clip in waiting])
        for clip, vector in zip(waiting, vectors, strict=True):
            yield clip.id, np.array([-1]), vector[None] * bool(clip.caption.strip())


def places(frames: int, count: int) -> np.ndarray:
    """The numbers of ``count`` frames spread evenly over a video of ``frames``: int64 ``(count,)``."""
    return np.linspace(0, frames - 1, count).round().astype(np.int64)


def spread(video: bytes | Path, count: int = FRAMES) -> tuple[np.ndarray, np.ndarray]:
    """The numbers and the pictures, uint8 ``(count, h, w, 3)``, of evenly spread frames of a video.

    Raises:
        WorldloomError: it cannot be decoded.
    """
    from worldloom import media

    frames = media.read_frames(video)
    numbers = places(len(frames), count)
    return numbers, frames[numbers]


def embed_query(query: str, embedder: Embedder, what: What) -> np.ndarray:
    """The unit vector ``(d,)`` of a text, or of a picture or a video in a file (the mean of `FRAMES` frames)."""
    if what == "texts":
        return embedder.embed_texts([query])[0]
    from worldloom import media

    if Path(query).suffix.lower() in _PICTURES:
        return embedder.embed_frames(media.read_image(query)[None])[0]
    mean = embedder.embed_frames(spread(Path(query))[1]).mean(0)
    return mean / max(float(np.linalg.norm(mean)), 1e-12)


def search(
    dataset: Dataset,
    query: str,
    *,
    top: int = 10,
    model: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Found]:
    """The `top` clips of a dataset that are most like a text, or like the picture or video in a file, best first.

    Args:
        query: a path of a file that is there, else a text.
        model: of `find_embedder`. A model that takes both compares a text with frames, any other with captions.

    Raises:
        WorldloomError: as `find_embedder` and `embed_dataset`; an empty query, or a file that is no picture or video.
    """
    if not query.strip():
        raise WorldloomError("there is nothing to search for", got=query)
    asked: What = "frames" if _is_file(query) else "texts"
    embedder = find_embedder(model, asked)
    compared: What = "frames" if "frames" in embedder.takes else "texts"
    vector = embed_query(query, embedder, asked)
    vectors = embed_dataset(dataset, embedder, compared, progress)
    results = []
    for place, which, score in vectors.nearest(vector, top):
        clip, frame = dataset.clip(str(vectors.keys[place])), int(vectors.frames[place, which])
        results.append(
            Found(
                clip.id, round(score, 4), None if frame < 0 else frame, clip.source, clip.start, clip.end, clip.caption
            )
        )
    return results


def _is_file(query: str) -> bool:
    try:
        return Path(query).is_file()
    except OSError:  # too long for a name
        return False


# -- showing ------------------------------------------------------------------------------------------------------


def table(results: Sequence[Found]) -> str:
    """One line for each clip."""
    rows = [("score", "clip", "frame", "source", "caption")]
    for found in results:
        frame = "" if found.frame is None else str(found.frame)
        source = f"{found.source}[{found.start}:{found.end}]"
        rows.append((f"{found.score:.3f}", found.clip, frame, source, found.caption[:60]))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def contact_sheet(dataset: Dataset, results: Sequence[Found]) -> np.ndarray:
    """uint8 ``(h, w, 3)``: a row of `FRAMES` frames for each clip, best first."""
    from worldloom import media

    rows = [media.fit(spread(dataset.load(found.clip).video or b"")[1], (_EDGE, _EDGE)) for found in results]
    return media.contact_sheet(rows)


def report(dataset: Dataset, query: str, results: Sequence[Found], path: Path) -> None:
    """A self-contained page with the clips found, playable."""
    from worldloom.report import Report

    page = Report(f"Search: {query}", f"{len(results)} of {len(dataset)} clips in {dataset.root}")
    if dataset.index.kind == "clips":
        page.videos([(f"{f.score:.3f}  {f.caption or f.source}", dataset.load(f.clip).video or b"") for f in results])
    columns = ("score", "clip", "frame", "source", "start", "end", "caption")
    rows = [[f.score, f.clip, f.frame, f.source, f.start, f.end, f.caption] for f in results]
    page.section("Clips").table(columns, rows)
    page.save(path)


@click.command("search")
@click.argument("dataset", type=click.Path(path_type=Path))
@click.argument("query")
@click.option("--top", default=10, show_default=True, type=click.IntRange(min=1), help="How many clips.")
@click.option("--model", default="", help="minilm, efficientnet-lite0, or a folder of a CLIP or SigLIP model.")
@click.option("--html", type=click.Path(path_type=Path), help="Also write a page with the clips, playable.")
@click.option("--sheet", type=click.Path(path_type=Path), help="Also write a picture (PNG): a row for each clip.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def search_command(
    dataset: Path, query: str, top: int, model: str, html: Path | None, sheet: Path | None, as_json: bool
) -> None:
    """Find the clips of DATASET that are most like QUERY: a text, or the path of a picture or a video.

    Without --model a text is compared with the captions, a picture or a video with the frames. The first search of a
    dataset embeds it, later ones take an instant.
    """
    from worldloom import media
    from worldloom.progress import progress
    from worldloom.shards import open_dataset

    opened = open_dataset(dataset)
    if sheet is not None and opened.index.kind != "clips":
        raise WorldloomError("latents hold no pictures to show", got=str(dataset), do="leave --sheet out")
    with progress("embedding") as shown:
        results = search(opened, query, top=top, model=model, progress=shown)
    if as_json:
        click.echo(json.dumps([asdict(found) for found in results], indent=1))
    else:
        click.echo(table(results))
    if html is not None:
        report(opened, query, results, html)
        click.echo(f"page: {html}", err=as_json)
    if sheet is not None:
        media.write_image(sheet, contact_sheet(opened, results))
        click.echo(f"sheet: {sheet}", err=as_json)
