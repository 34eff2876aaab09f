"""``worldloom models``: what models and tokenizers this machine knows, whether their files are what they claim, and
published checkpoints pulled, converted, imported and exported, and averages made."""

from __future__ import annotations

import importlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click

from worldloom import registry
from worldloom.artifacts import Artifact, Store, file_digest
from worldloom.errors import WorldloomError
from worldloom.loading import checkpoint_folder

State = Literal["ok", "missing", "changed", "unchecked"]
_WEIGHTS = "model.safetensors"
_ADAPTER = "adapter_model.safetensors"
_KINDS = ("model", "adapter", "tokenizer")
_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors format


@dataclass(frozen=True)
class KnownModel:
    """A model or tokenizer that a catalog offers."""

    name: str
    """What `load_model` / `load_tokenizer` take."""
    group: str
    """``models`` or ``tokenizers``."""
    family: str
    """The family that reads it; empty for a tokenizer that names none."""
    summary: str
    """One sentence."""
    folder: Path | None
    """Where its files are."""
    digest: str
    """sha256 (hex) that the catalog promises for ``model.safetensors``."""
    state: State
    """``ok``: the file is there and has that digest. ``unchecked``: the catalog promises none."""
    bytes: int
    """Size of ``model.safetensors``; 0 when missing."""
    parameters: int
    """Number of parameters; 0 when missing or unreadable."""


def known(problems: list[str] | None = None) -> list[KnownModel]:
    """Every model and tokenizer of the catalogs, each checked; catalogs that failed are appended to `problems`."""
    found: list[KnownModel] = []
    for group in ("models", "tokenizers"):
        catalogs = registry.group(group)
        if problems is not None:
            problems.extend(catalogs.problems)
        found.extend(_known(lines[0]) for lines in catalogs.entries.values())
    return found


def _known(entry: registry.Entry) -> KnownModel:
    folder, digest = entry.folder, str(entry.meta.get("sha256", ""))
    weights = folder / _WEIGHTS if folder is not None else None
    state: State = "missing"
    size = parameters = 0
    if weights is not None and weights.is_file():
        state = "unchecked" if not digest else "ok" if file_digest(weights) == digest else "changed"
        size, parameters = weights.stat().st_size, count_parameters(weights)
    family = str(entry.meta.get("family", ""))
    return KnownModel(entry.name, entry.group, family, entry.summary, folder, digest, state, size, parameters)


def count_parameters(path: str | Path) -> int:
    """Number of elements of all tensors of a safetensors file, from its header alone; 0 if it is no such file."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _HEADER_LIMIT:
                return 0
            header = json.loads(file.read(length))
        total = 0
        for name, tensor in header.items():
            if name != "__metadata__":
                elements = 1
                for size in tensor["shape"]:
                    elements *= int(size)
                total += elements
        return total
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError):
        return 0


@click.group()
def models() -> None:
    """List and show the models and tokenizers this machine knows."""


_store_option = click.option("--store", "root", default=None, help="Artifact store.  [default: ./.worldloom/store]")


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_store_option
def list_(as_json: bool, root: str | None) -> None:
    """Shipped models and tokenizers, then those made here."""
    from rich.console import Console
    from rich.table import Table

    problems: list[str] = []
    shipped, made = known(problems), _made(Store(root))
    if as_json:
        plain = {"shipped": [_plain(item) for item in shipped], "made": [_summary(item) for item in made]}
        click.echo(json.dumps(plain, indent=1))
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column, justify in (
        ("name", "left"),
        ("kind", "left"),
        ("parameters", "right"),
        ("files", "left"),
        ("", "left"),
    ):
        table.add_column(column, justify=justify, overflow="fold")  # pyright: ignore[reportArgumentType]
    for item in shipped:
        table.add_row(item.name, _kind(item), short_count(item.parameters), item.state, item.summary)
    for artifact in made:
        table.add_row(artifact.name or artifact.id, artifact.kind, "", "made here", artifact.location)
    if shipped or made:
        Console(highlight=False, markup=False).print(table)
    else:
        click.echo("No model is known: none is shipped with the installed packages, and none was made here.")
    for problem in problems:
        click.echo(f"warning: {problem}", err=True)


@models.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@_store_option
def show(name: str, as_json: bool, root: str | None) -> None:
    """Show NAME (a catalog name, a checkpoint folder, or an artifact id): figures, config and model card."""
    facts, folder = _facts(name, Store(root))
    config = _read(folder, "config.toml")
    card = _read(folder, "README.md")
    if as_json:
        click.echo(json.dumps(facts | {"config": config, "card": card}, indent=1))
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        if value not in ("", 0):
            click.echo(f"{key:<{width}}  {value}")
    if config:
        click.echo("\nconfig.toml\n" + "\n".join(f"  {line}" for line in config.rstrip().splitlines()))
    if card:
        from rich.console import Console
        from rich.markdown import Markdown

        click.echo()
        Console(highlight=False).print(Markdown(card))


@models.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The .safetensors file to write.")
@click.option("--key", default="", help="The level that holds the tensors, e.g. state_dict.  [default: the only one]")
def convert(source: Path, out: Path, key: str) -> None:
    """Convert SOURCE, a pickled checkpoint (.pt, .pth, .ckpt, .bin) or TorchScript archive (.jit), to safetensors.

    It is loaded in a process without network that runs none of its Python code.
    """
    from worldloom.convert import convert_checkpoint

    done = convert_checkpoint(source, out, key=key)
    if done.left_out:
        shown = ", ".join(done.left_out[:10]) + (", ..." if len(done.left_out) > 10 else "")
        click.echo(f"left out, {len(done.left_out)} beside the tensors: {shown}")
    click.echo(f"{out}: {done.tensors} tensors" + ("" if done.made else ", converted before"))


@models.command("import")
@click.argument("source", type=click.Path(exists=True))
@click.option("--family", default="predict", show_default=True, help="Family of models that reads it.")
@click.option("--variant", default="", help="Which published checkpoint it is.  [default: told by names and shapes]")
@click.option("--tokenizer", default="", help="Name or folder of its tokenizer.  [default: the published one's name]")
@click.option(
    "--text-encoder", default="", help="Folder of its text encoder, T5 or Cosmos-Reason1.  [default: it reads no text]"
)
@click.option("--action-dim", default=0, help="Size of an action, where it was fine-tuned to another.")
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder of the checkpoint.")
def import_(
    source: str, family: str, variant: str, tokenizer: str, text_encoder: str, action_dim: int, out: str
) -> None:
    """Make a checkpoint folder of SOURCE, published weights of a model.

    SOURCE is a safetensors file, an index of shards, or a folder with either, in the native or the diffusers layout.
    Pickled files are converted first: worldloom models convert.
    """
    made = _of_family(family, "importer")(
        source, out, variant=variant, tokenizer=tokenizer, text_encoder=text_encoder, action_dim=action_dim
    )
    click.echo(made)


@models.command()
@click.argument("model")
@click.option(
    "--layout", type=click.Choice(["native", "diffusers"]), required=True, help="Whose names the weights get."
)
@click.option("--out", required=True, help="native: a safetensors file; diffusers: a folder.")
def export(model: str, layout: str, out: str) -> None:
    """Write the weights of MODEL, a checkpoint folder or a name, as others publish them."""
    from worldloom import config as configs

    folder, _ = checkpoint_folder(model)
    settings = folder / "config.toml"
    if not settings.is_file():
        raise WorldloomError("this is not a checkpoint folder", got=model, do="give a folder with config.toml")
    family = str(configs.read_toml(settings).get("family", ""))
    click.echo(_of_family(family, "exporter")(folder, out, layout))


@models.command()
@click.argument("parts", nargs=-1, required=True, metavar="MODEL=SHARE...")
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder of the checkpoint.")
@_store_option
def average(parts: tuple[str, ...], out: str, root: str | None) -> None:
    """Average the weights of checkpoints of one network, such as a fine-tuned model and its base.

    MODEL is a checkpoint folder or a name; the shares sum to 1. Configuration and precision are those of the first.
    """
    from worldloom.averaging import average as average_

    shares = {}
    for part in parts:
        name, _, share = part.rpartition("=")
        try:
            shares[name] = float(share)
        except ValueError:
            raise click.UsageError(f"a part is MODEL=SHARE, not {part}") from None
    if len(shares) != len(parts):
        raise click.UsageError("a model is given twice")
    made = average_(shares, out, Store(root))
    click.echo(f"{out}  ({made.id})")


@models.command()
@click.argument("url")
@click.option("--out", default=None, type=click.Path(file_okay=False), help="Folder.  [default: in ./.worldloom/hub]")
@click.option("--include", multiple=True, help="Only files that match, e.g. 'transformer/*'; may be repeated.")
@click.option("--update", is_flag=True, help="Take what the revision holds now, not what was pulled before.")
def pull(url: str, out: str | None, include: tuple[str, ...], update: bool) -> None:
    """Download the weights at URL, hf://ORG/NAME or hf://ORG/NAME@REVISION, from the Hugging Face Hub.

    Only safetensors and JSON files are taken. The commit and the sha256 of every file are kept in a lock file;
    pulling again gives the same bytes or an error.
    """
    from worldloom.pull import pull as pull_

    done = pull_(url, out, include=include, update=update)
    size = sum(file.bytes for file in done.files.values())
    click.echo(f"{done.repository} at {done.commit[:12]}: {len(done.files)} files, {size / 1e6:.1f} MB, {done.state}")
    click.echo(done.folder)


def _of_family(family: str, what: str) -> Any:
    """What a family's catalog line names as ``importer`` or ``exporter``.

    Raises:
        WorldloomError: an unknown family, or one that has none.
    """
    target = str(registry.entry("families", family).meta.get(what, ""))
    if not target:
        able = [name for name in registry.names("families") if what in registry.entry("families", name).meta]
        raise WorldloomError(
            f"the family has no {what}", got=family, do=f"use {' or '.join(able) or 'another version'}"
        )
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _facts(name: str, store: Store) -> tuple[dict[str, Any], Path | None]:
    """What is known about a name, and its folder."""
    found = next((item for item in known() if item.name == name), None)
    if found is not None:
        return _plain(found), found.folder
    if Path(name).is_dir():
        return _folder_facts(Path(name)), Path(name)
    try:
        artifact = store.get(name)
    except WorldloomError:
        artifact = next((item for item in reversed(_made(store)) if item.name == name), None)
    if artifact is not None:
        return _summary(artifact) | {"inputs": list(artifact.inputs)}, Path(artifact.location)
    registry.entry("models", name)  # raises, and names the nearest
    raise AssertionError("a name of the catalog was not found in it")


def _folder_facts(folder: Path) -> dict[str, Any]:
    weights = next((folder / file for file in (_WEIGHTS, _ADAPTER) if (folder / file).is_file()), None)
    if weights is None:
        raise WorldloomError(f"this folder holds no {_WEIGHTS}", got=folder, do="give the folder of a saved checkpoint")
    return {
        "name": folder.name,
        "folder": str(folder.absolute()),
        "sha256": file_digest(weights),
        "bytes": weights.stat().st_size,
        "parameters": count_parameters(weights),
    }


def _made(store: Store) -> list[Artifact]:
    return [artifact for artifact in store.find() if artifact.kind in _KINDS]


def _kind(item: KnownModel) -> str:
    return "tokenizer" if item.group == "tokenizers" else item.family or "model"


def _plain(item: KnownModel) -> dict[str, Any]:
    return {
        "name": item.name,
        "kind": _kind(item),
        "summary": item.summary,
        "folder": str(item.folder or ""),
        "sha256": item.digest,
        "state": item.state,
        "bytes": item.bytes,
        "parameters": item.parameters,
    }


def _summary(artifact: Artifact) -> dict[str, Any]:
    return {
        "name": artifact.name,
        "kind": artifact.kind,
        "id": artifact.id,
        "folder": artifact.location,
        "digest": artifact.digest,
        "bytes": artifact.size,
        "created": artifact.created,
    }


def _read(folder: Path | None, name: str) -> str:
    file = folder / name if folder is not None else None
    return file.read_text(encoding="utf-8", errors="replace") if file is not None and file.is_file() else ""


def short_count(value: float) -> str:
    """``6_100_000`` -> ``6.1 M``; empty for 0."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return str(int(value)) if value else ""
