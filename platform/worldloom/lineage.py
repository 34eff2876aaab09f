"""From a sample, a model or a dataset back to the source files, through the recorded inputs of each artifact."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from worldloom.artifacts import Artifact, Store, tree_digest
from worldloom.errors import WorldloomError

if TYPE_CHECKING:
    from rich.tree import Tree

_SHOWN = 12
"""A node shows at most this many source files; the rest are counted (``--all`` shows them)."""


@dataclass(frozen=True)
class Node:
    """One artifact, or one leaf: a source file, a simulator, a shipped model, or a record that is not in this store."""

    id: str
    """Artifact id, or the input string of a leaf."""
    kind: str
    """The artifact's kind; ``file``, ``simulator``, ``shipped`` or ``missing`` for a leaf."""
    label: str
    """Name for people."""
    digest: str
    """sha256 (hex) of the content; empty where unknown."""
    artifact: Artifact | None = None
    """The record, for a node that is no leaf."""
    inputs: tuple[Node, ...] = ()
    """What it was made from."""


def walk(store: Store, artifact_id: str) -> Node:
    """The tree over the inputs of an artifact. An artifact that several others used is read once and shared.

    Raises:
        WorldloomError: the first id is unknown or ambiguous; a record that depends on itself (a tampered store).
    """
    return _walk(store, store.get(artifact_id).id, {}, ())


def _walk(store: Store, key: str, seen: dict[str, Node], path: tuple[str, ...]) -> Node:
    if key in path:
        raise WorldloomError(
            "an artifact depends on itself", got=" -> ".join((*path, key)), do="do not trust this store"
        )
    if key not in seen:
        seen[key] = _leaf(key) or _inner(store, key, seen, path)
    return seen[key]


def _leaf(text: str) -> Node | None:
    if found := re.fullmatch(r"file:([0-9a-f]{64}):(.+)", text, re.S):
        return Node(text, "file", found[2], found[1])
    if found := re.fullmatch(r"(?:model|tokenizer):(.+)@([0-9a-f]{64})", text):
        return Node(text, "shipped", found[1], found[2])
    if found := re.fullmatch(r"env:(.+)", text, re.S):
        return Node(text, "simulator", found[1], "")
    return None


def _inner(store: Store, key: str, seen: dict[str, Node], path: tuple[str, ...]) -> Node:
    if key not in store:
        # Made on another machine, or its record was removed: say so, and keep the rest of the tree.
        return Node(key, "missing", key, "")
    artifact = store.get(key)
    inputs = tuple(_walk(store, item, seen, (*path, key)) for item in artifact.inputs)
    return Node(
        artifact.id, artifact.kind, artifact.name or Path(artifact.location).name, artifact.digest, artifact, inputs
    )


def sources(node: Node) -> list[Node]:
    """The leaves under a node, each once, in order of appearance."""
    found: dict[str, Node] = {}
    visited: set[str] = set()

    def visit(at: Node) -> None:
        if at.id in visited:
            return
        visited.add(at.id)
        if at.artifact is None:
            found[at.id] = at
        for item in at.inputs:
            visit(item)

    visit(node)
    return list(found.values())


def to_dict(node: Node) -> dict[str, Any]:
    """A node as plain JSON-ready dicts."""
    plain: dict[str, Any] = {"id": node.id, "kind": node.kind, "label": node.label, "digest": node.digest}
    if node.artifact is not None:
        plain |= {
            "location": node.artifact.location,
            "code_version": node.artifact.code_version,
            "seed": node.artifact.seed,
            "created": node.artifact.created,
            "config": dict(node.artifact.config),
            "metadata": dict(node.artifact.metadata),
            "inputs": [to_dict(item) for item in node.inputs],
        }
    return plain


def render(node: Node, everything: bool = False) -> Tree:
    """A node as a rich tree; long lists of source files are cut unless `everything`."""
    from rich.tree import Tree

    tree = Tree(_label(node), guide_style="dim")
    _grow(tree, node, everything, set())
    return tree


def _grow(tree: Tree, node: Node, everything: bool, shown: set[str]) -> None:
    from rich.text import Text

    files = [item for item in node.inputs if item.kind == "file"]
    hidden = set() if everything else {item.id for item in files[_SHOWN:]}
    for item in node.inputs:
        if item.id in hidden:
            continue
        label = _label(item)
        if item.id in shown and item.inputs:
            tree.add(label.append("  (shown above)", style="dim"))
            continue
        shown.add(item.id)
        _grow(tree.add(label), item, everything, shown)
    if hidden:
        tree.add(Text(f"and {len(hidden)} more source files (--all shows them)", style="dim"))


def _label(node: Node) -> Any:
    from rich.text import Text

    styles = {"file": "green", "missing": "red", "shipped": "magenta"}
    text = Text().append(node.kind, style=styles.get(node.kind, "bold cyan")).append("  ")
    if node.artifact is None:
        text.append(node.label)
        return text.append("  not in this store" if node.kind == "missing" else f"  {node.digest[:12]}", style="dim")
    text.append(node.id).append(f"  {node.label}")
    seed = "" if node.artifact.seed is None else f"  seed {node.artifact.seed}"
    return text.append(f"{seed}  {node.artifact.code_version}", style="dim")


def find(store: Store, wanted: str) -> Artifact:
    """The artifact of an id, a prefix, or a file or folder on disk (found by its content).

    Raises:
        WorldloomError: nothing in the store matches.
    """
    if Path(wanted).exists():
        digest = tree_digest(wanted)
        found = [artifact for artifact in store.find() if artifact.digest == digest]
        if found:
            return found[-1]  # made twice with equal bytes: the newest
        raise WorldloomError(
            f"no artifact in {store.root} has these bytes",
            got=wanted,
            do="the file was changed since it was made, or made elsewhere: give --store",
        )
    return store.get(wanted)


@click.command()
@click.argument("artifact", required=False)
@click.option(
    "--store", "root", default=None, help="Folder or URL of the artifact store.  [default: ./.worldloom/store]"
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--all", "everything", is_flag=True, help="Show every source file.")
@click.option("--verify", is_flag=True, help="Check the bytes of every artifact and source; exit 1 if any changed.")
@click.pass_context
def lineage(
    ctx: click.Context, artifact: str | None, root: str | None, as_json: bool, everything: bool, verify: bool
) -> None:
    """Walk from ARTIFACT (an id, the beginning of one, or a file) back to its source files.

    Without ARTIFACT, list what the store holds.
    """
    store = Store(root)
    if artifact is None:
        _list(store, as_json)
        return
    node = walk(store, find(store, artifact).id)
    changed = _verify(store, node) if verify else []
    if as_json:
        click.echo(json.dumps(to_dict(node) | ({"changed": changed} if verify else {}), indent=1))
    else:
        _print(render(node, everything))
    for line in changed:
        click.echo(f"changed: {line}", err=True)
    if verify and not as_json:
        click.echo("changed: " + str(len(changed)) if changed else "every file that is recorded here is unchanged")
    ctx.exit(1 if changed else 0)


def _verify(store: Store, node: Node) -> list[str]:
    """What no longer matches its digest, anywhere in the tree. A source that is not at its path is left alone."""
    changed: dict[str, None] = {}
    pending, visited = [node], set[str]()
    while pending:
        at = pending.pop()
        if at.id in visited:
            continue
        visited.add(at.id)
        pending.extend(at.inputs)
        if at.artifact is not None:
            changed.update({f"{at.id} {name}": None for name in store.verify(at.id)})
        elif at.kind == "file" and Path(at.label).is_file() and tree_digest(at.label) != at.digest:
            changed[f"source {at.label}"] = None
    return list(changed)


def _list(store: Store, as_json: bool) -> None:
    from rich.table import Table

    found = store.find()
    if as_json:
        rows = [
            {"id": a.id, "kind": a.kind, "name": a.name, "location": a.location, "created": a.created} for a in found
        ]
        click.echo(json.dumps(rows, indent=1))
        return
    if not found:
        click.echo(f"The store {store.root} is empty.")
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("id", "name", "created", "location"):
        table.add_column(column, overflow="fold")
    for item in found:
        table.add_row(item.id, item.name, item.created, item.location)
    _print(table)


def _print(thing: Any) -> None:
    from rich.console import Console

    # Not a terminal: no fixed width to wrap ids at.
    console = Console(highlight=False, markup=False)
    console.print(thing) if console.is_terminal else Console(highlight=False, markup=False, width=200).print(thing)
