"""The decision ledger, ``ledger.parquet``: one row for every (span, stage) ever considered: kept, dropped or failed."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from worldloom.artifacts import atomic_write
from worldloom.errors import WorldloomError, missing_extra
from worldloom.schema import Decision

NAME = "ledger.parquet"

_TYPES = {
    "clip_id": "string",
    "source": "string",
    "start": "int64",
    "end": "int64",
    "stage": "string",
    "kept": "bool",
    "measure": "string",
    "value": "float64",
    "threshold": "float64",
    "reason": "string",
    "failed": "bool",
    "like": "string",
    "traceback": "string",
}


def save_ledger(rows: Sequence[Decision], path: str | Path) -> None:
    """Write the ledger, atomically; equal rows give equal bytes."""
    pa = _pyarrow()
    import pyarrow.parquet as parquet

    assert list(_TYPES) == [item.name for item in fields(Decision)], "the ledger holds exactly a Decision's fields"
    columns = {name: [getattr(row, name) for row in rows] for name in _TYPES}
    table = pa.table(columns, schema=pa.schema([(name, pa.type_for_alias(kind)) for name, kind in _TYPES.items()]))
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, compression="zstd", use_dictionary=True)
    atomic_write(path, buffer.getvalue())


def load_ledger(folder: str | Path) -> list[Decision]:
    """The rows of a curated folder, in order: by source, then by stage, then by span.

    Raises:
        WorldloomError: no ledger there, or one that cannot be read.
    """
    pa = _pyarrow()
    import pyarrow.parquet as parquet

    path = Path(folder) / NAME
    if not path.is_file():
        raise WorldloomError(
            "there is no decision ledger in this folder", got=folder, do="give the --out folder of worldloom curate run"
        )
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
        return [Decision(**row) for row in rows]
    except (pa.ArrowException, OSError, TypeError) as error:
        raise WorldloomError(
            f"the ledger cannot be read: {error}", got=path, do="run worldloom curate run again"
        ) from error


@dataclass(frozen=True)
class Account:
    """Where the frames of one source went."""

    frames: int = 0
    """Frames that decode."""
    kept: int = 0
    """Frames in clips that were written."""
    dropped: int = 0
    """Frames in spans that a stage dropped."""
    failed: int = 0
    """Frames in spans that could not be processed."""

    @property
    def balanced(self) -> bool:
        """Whether every frame is accounted for exactly once."""
        return self.frames == self.kept + self.dropped + self.failed


def accounts(rows: Iterable[Decision]) -> dict[str, Account]:
    """Per source, what became of its frames: every frame ends in a written clip, a dropped span or a failed one."""
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        account = found.setdefault(row.source, dict.fromkeys(("frames", "kept", "dropped", "failed"), 0))
        length = row.end - row.start
        if row.stage == "probe" and row.start == 0:
            account["frames"] += length
        if row.failed:
            account["failed"] += length
        elif not row.kept:
            account["dropped"] += length
        elif row.stage == "write":
            account["kept"] += length
    return {source: Account(**account) for source, account in found.items()}


def fate_of(row: Decision | None) -> str:
    """``kept`` (written), ``dropped``, ``failed``, or ``absent`` for None."""
    if row is None:
        return "absent"
    return "failed" if row.failed else "kept" if row.kept else "dropped"


def fates(rows: Iterable[Decision]) -> list[Decision]:
    """The rows that end a span's way: written, dropped or failed. Together they have every frame once."""
    return [row for row in rows if row.failed or not row.kept or row.stage == "write"]


@dataclass(frozen=True)
class Discrepancy:
    """Frames ``[start, end)`` of a source that do not end in exactly one place."""

    source: str
    start: int
    end: int
    times: int
    """How often the ledger has them: 0, lost; 2 and more, counted twice."""


def reconcile(rows: Sequence[Decision], frames: Mapping[str, int] | None = None) -> list[Discrepancy]:
    """Hold kept + dropped + failed spans against the sources, frame by frame; empty if each frame is there once.

    Sums could agree by accident, with one span lost and another counted twice; this finds both.

    Args:
        frames: source -> frames, counted by someone else; None takes what the probe rows say.
    """
    ends: dict[str, list[Decision]] = {row.source: [] for row in rows}
    known = dict(frames) if frames is not None else dict.fromkeys(ends, 0)
    for row in rows:
        if frames is None and row.stage == "probe" and row.start == 0:
            known[row.source] = row.end
    for row in fates(rows):
        ends[row.source].append(row)
    found: list[Discrepancy] = []
    for source in dict.fromkeys([*ends, *known]):
        whole, spans = known.get(source, 0), ends.get(source, [])
        edges = sorted({0, whole, *(row.start for row in spans), *(row.end for row in spans)})
        steps: dict[int, int] = {}
        for row in spans:
            steps[row.start] = steps.get(row.start, 0) + 1
            steps[row.end] = steps.get(row.end, 0) - 1
        times = 0
        for start, end in itertools.pairwise(edges):
            times += steps.get(start, 0)
            if times != (start < whole):
                found.append(Discrepancy(source, start, end, times))
    return found


def rows_about(rows: Sequence[Decision], what: str) -> list[Decision]:
    """The rows of a clip id (or a unique beginning of one of at least 4 characters) of a source file, or of a
    recorded dataset (all its episodes).

    Raises:
        WorldloomError: nothing matches, or several do.
    """
    sources = {row.source for row in rows}
    if what in sources:
        return [row for row in rows if row.source == what]
    name = Path(what).as_posix().removeprefix("./")
    if any(source.startswith(f"{name}#") for source in sources):
        return [row for row in rows if row.source.startswith(f"{name}#")]
    matching = sorted(
        source for source in sources if source == name or source.endswith("/" + name) or name.endswith("/" + source)
    )
    if len(matching) == 1:
        return [row for row in rows if row.source == matching[0]]
    if len(matching) > 1:
        raise WorldloomError("several sources end so", got=what, do=f"name one: {', '.join(matching[:8])}")
    ids = {row.clip_id for row in rows}
    if what not in ids and len(what) >= 4:
        begins = sorted(item for item in ids if item.startswith(what))
        if len(begins) > 1:
            raise WorldloomError("several clips begin so", got=what, do=f"name one: {', '.join(begins[:8])}")
        what = begins[0] if begins else what
    if what not in ids:
        raise WorldloomError(
            "the ledger has no such clip or source", got=what, do=_near(what, [*sorted(sources), *sorted(ids)])
        )
    return [row for row in rows if row.clip_id == what]


def _near(what: str, known: Sequence[str]) -> str:
    import difflib

    near = difflib.get_close_matches(what, known, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(near)}?" if near else f"known sources and clips: {', '.join(known[:5])}, ..."


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise missing_extra("pyarrow", "curation") from error
    return pyarrow
