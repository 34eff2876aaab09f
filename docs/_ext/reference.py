"""Two directives that write reference pages from the code itself, so that they cannot fall behind it.

``{cli-reference}`` describes every command of `worldloom`; ``{config-reference} module:Class`` every field of a config.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import click
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from worldloom.errors import WorldloomError

log = logging.getLogger(__name__)


def _inline(text: str) -> list[nodes.Node]:
    """Plain text, with what stands between backticks set as code."""
    pieces = re.split(r"`+([^`]+)`+", " ".join(text.split()))
    return [nodes.literal(text=piece) if i % 2 else nodes.Text(piece) for i, piece in enumerate(pieces) if piece]


def _paragraphs(text: str) -> list[nodes.Node]:
    parts = inspect.cleandoc(text).replace("\b", "").split("\n\n")
    return [nodes.paragraph("", "", *_inline(part)) for part in parts if part.strip()]


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]], widths: tuple[int, ...]) -> nodes.table:
    """A table whose columns are set as code, all but the last, which is prose."""
    group = nodes.tgroup(cols=len(header))
    group += [nodes.colspec(colwidth=width) for width in widths]

    def row(cells: tuple[str, ...], *, code: bool) -> nodes.row:
        out = nodes.row()
        for i, cell in enumerate(cells):
            literal = code and i < len(cells) - 1
            out += nodes.entry("", nodes.paragraph("", "", *([nodes.literal(text=cell)] if literal else _inline(cell))))
        return out

    group += nodes.thead("", row(header, code=False))
    group += nodes.tbody("", *(row(cells, code=True) for cells in rows))
    return nodes.table("", group, align="left", classes=["colwidths-given"])


class CliReference(SphinxDirective):
    """One section for each command, with its usage, help and options as click knows them."""

    def run(self) -> list[nodes.Node]:
        from worldloom.cli import main

        return list(self._sections(main, click.Context(main, info_name="worldloom")))

    def _sections(self, group: click.Group, context: click.Context) -> Iterator[nodes.section]:
        for name in group.list_commands(context):
            try:
                command = group.get_command(context, name)
            except WorldloomError as error:
                log.warning("the command %s cannot be described: %s", name, error)
                continue
            assert command is not None, name
            yield self._section(command, click.Context(command, info_name=name, parent=context))

    def _section(self, command: click.Command, context: click.Context) -> nodes.section:
        path = context.command_path
        section = nodes.section(ids=[nodes.make_id(path)])
        section += nodes.title("", "", nodes.literal(text=path))
        section += _paragraphs(command.help or "")
        if isinstance(command, click.Group):
            section += list(self._sections(command, context))
            return section
        usage = " ".join([path, *command.collect_usage_pieces(context)])
        section += nodes.literal_block(usage, usage, language="text")
        records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
        rows = [record for record in records if record is not None and record[1] and "--help" not in record[0].split()]
        if rows:
            section += _table(("Option", "Meaning"), rows, (35, 65))
        return section


class ConfigReference(SphinxDirective):
    """A table of a config dataclass: name, type, default and the sentence under the field."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        from worldloom.config import describe

        module, _, name = self.arguments[0].partition(":")
        try:
            cls = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            log.warning("the config %s cannot be described: %s", self.arguments[0], error)
            return []
        rows = [(key, str(kind), _default(default), sentence or "") for key, kind, default, sentence in describe(cls)]
        return [_table(("Key", "Type", "Default", "Meaning"), rows, (25, 15, 15, 45))]


def _default(value: Any) -> str:
    if value is dataclasses.MISSING:
        return "required"
    return repr(value)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("cli-reference", CliReference)
    app.add_directive("config-reference", ConfigReference)
    return {"version": "1", "parallel_read_safe": True}
