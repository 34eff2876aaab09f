"""The ``worldloom`` command. Help imports no command: names and summaries come from the catalogs."""

from __future__ import annotations

import difflib
import os
import sys
from typing import Any

import click

from worldloom import __version__, registry
from worldloom.errors import WorldloomError

# The order in which a newcomer needs them; a command that is not named here (a third party's) comes after, by name.
_ORDER = (
    "quickstart",
    "doctor",
    "curate",
    "tokenize",
    "finetune",
    "generate",
    "transfer",
    "reason",
    "eval",
    "serve",
    "models",
    "lineage",
)


class LazyGroup(click.Group):
    """A click group whose commands are the registry's group ``commands``, imported when they run.

    Exit codes: 0 success; 1 the command says so, or a bug (with its traceback); 2 a mistake of the user, shown as
    ``error: ...``; 130 interrupted. ``WORLDLOOM_DEBUG=1`` shows the traceback of a user's mistake too.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the work they do."""
        known = registry.group("commands").entries
        return [name for name in _ORDER if name in known] + [name for name in known if name not in _ORDER]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command, or None for a name that no catalog has."""
        if cmd_name not in registry.group("commands").entries:
            return None
        return registry.load("commands", cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command of an argument list; an unknown name names its nearest neighbour."""
        known = registry.group("commands")
        if args and args[0] not in known.entries and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], known.entries, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            broken = "".join(f"\n{problem}" for problem in known.problems)
            raise click.UsageError(f"there is no command {args[0]!r}.{hint}{broken}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, from the catalogs alone, and one line if any catalog is broken."""
        known = registry.group("commands")
        rows = [(name, known.entries[name][0].summary) for name in self.list_commands(ctx)]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)
        if known.problems:
            formatter.write(f"\nwarning: some commands are missing: {'; '.join(known.problems)}\n")

    def invoke(self, ctx: click.Context) -> None:
        """Run the command; what it returns is not an exit code."""
        super().invoke(ctx)

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """Run, and end the process with the exit code above."""
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **extra)
        try:
            code = super().main(*args, standalone_mode=False, **extra)
        except WorldloomError as error:
            if os.environ.get("WORLDLOOM_DEBUG"):
                raise
            click.echo(f"error: {error}", err=True)
            sys.exit(2)
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            click.echo("interrupted", err=True)
            sys.exit(130)
        # Without standalone mode click returns the code of `ctx.exit(code)`, else what `invoke` returned: None.
        sys.exit(code or 0)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="worldloom")
def main() -> None:
    """Worldloom: build world models. From raw video to a served, evaluated model, with one lineage.

    Start with: worldloom quickstart
    """
