"""Finding things by name across packages without importing them.

Groups: commands, stages, tokenizers, families, models, recipes, guards, embedders, encoders. A package announces a
*catalog* with an entry point of the group ``worldloom.<group>``; a catalog is a plain dict ``{name: "module:attr"}`` or
``{name: {"target": "module:attr", "summary": "...", ...}}`` in a module that imports nothing heavy. A target is
imported only by `load`.
One broken catalog never hides the others: see `Group.problems`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from worldloom.errors import WorldloomError

GROUPS = ("commands", "stages", "tokenizers", "families", "models", "recipes", "guards", "embedders", "encoders")


@dataclass(frozen=True)
class Entry:
    """One line of a catalog."""

    name: str
    """The name a user types."""
    group: str
    """The group it belongs to, e.g. ``models``."""
    target: str
    """``module:attr`` of what `load` returns."""
    summary: str = ""
    """One sentence for lists and ``--help``."""
    meta: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Every other key of the catalog line, e.g. ``path`` and ``sha256``."""
    catalog: str = ""
    """``module:attr`` of the catalog that holds the line."""

    @property
    def folder(self) -> Path | None:
        """What the entry ships: ``meta["path"]``, relative to the folder of the catalog's package; None without one."""
        if "path" not in self.meta:
            return None
        spec = importlib.util.find_spec(self.catalog.partition(":")[0])
        assert spec is not None, f"{self.catalog} was imported a moment ago"
        assert spec.origin is not None, f"{self.catalog} has no file"
        return Path(spec.origin).parent / str(self.meta["path"])


@dataclass(frozen=True)
class Group:
    """Everything known about one group."""

    entries: Mapping[str, tuple[Entry, ...]]
    """Name -> the lines that define it, sorted by name; more than one line means that two catalogs collide."""
    problems: tuple[str, ...]
    """One sentence for each catalog that could not be read."""


@functools.cache
def group(name: str) -> Group:
    """Read every catalog of a group (cached for the life of the process; ``group.cache_clear()`` reads again).

    Raises:
        WorldloomError: there is no such group.
    """
    if name not in GROUPS:
        raise WorldloomError("there is no such registry group", got=name, do=f"use one of: {', '.join(GROUPS)}")
    found: dict[str, list[Entry]] = {}
    problems: list[str] = []
    points = {(point.name, point.value): point for point in importlib.metadata.entry_points(group=f"worldloom.{name}")}
    for _, point in sorted(points.items()):
        try:
            lines = point.load()
            entries = [_entry(name, key, line, point.value) for key, line in lines.items()]
        # A third party's catalog can fail in any way; the rest must still be usable.
        except Exception as error:
            problems.append(f"the catalog {point.value} failed to import: {type(error).__name__}: {error}")
            continue
        for entry in entries:
            found.setdefault(entry.name, []).append(entry)
    return Group({key: tuple(found[key]) for key in sorted(found)}, tuple(problems))


def _entry(group_name: str, name: str, line: str | Mapping[str, Any], catalog: str) -> Entry:
    fields = {"target": line} if isinstance(line, str) else dict(line)
    target = fields.pop("target", None)
    if not isinstance(target, str) or target.count(":") != 1:
        raise ValueError(f"the target of {name!r} must be 'module:attr', not {target!r}")
    return Entry(name, group_name, target, str(fields.pop("summary", "")), fields, catalog)


def names(group_name: str) -> list[str]:
    """The sorted names of a group.

    Raises:
        WorldloomError: there is no such group, or two catalogs define one name.
    """
    return [_single(lines).name for lines in group(group_name).entries.values()]


def entry(group_name: str, name: str) -> Entry:
    """The catalog line of a name.

    Raises:
        WorldloomError: unknown (names the nearest, and any catalog that failed to import), or defined twice.
    """
    known = group(group_name)
    if name in known.entries:
        return _single(known.entries[name])
    near = difflib.get_close_matches(name, known.entries, n=3, cutoff=0.5)
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    elif known.entries:
        hint = f"known: {', '.join(known.entries)}"
    else:
        hint = "nothing is installed that offers any"
    noun = {"families": "family"}.get(group_name, group_name.removesuffix("s"))
    raise WorldloomError(f"there is no {noun} of that name", got=name, do="; ".join((hint, *known.problems)))


def _single(lines: tuple[Entry, ...]) -> Entry:
    first, *others = lines
    if others:
        raise WorldloomError(
            f"two catalogs define {first.group} {first.name!r}",
            got=" and ".join(line.catalog for line in lines),
            do="uninstall one of the packages, or rename its entry",
        )
    return first


def load(group_name: str, name: str) -> Any:
    """Import and return what a name stands for.

    Raises:
        WorldloomError: unknown or ambiguous name, or the module cannot be imported.
    """
    found = entry(group_name, name)
    module_name, _, attribute = found.target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise WorldloomError(
            f"{name!r} of the {group_name} cannot be imported: {error}",
            got=f"{found.target} (named by {found.catalog})",
            do="worldloom doctor shows what is missing; WORLDLOOM_DEBUG=1 shows where",
        ) from error
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise WorldloomError(
                f"{name!r} of the {group_name} names something that does not exist",
                got=f"{found.target} (named by {found.catalog})",
                do="mend that line of the catalog",
            )
        value = getattr(value, part)
    return value
