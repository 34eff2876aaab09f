from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from worldloom.cli import main

COMMANDS = """
import click
from worldloom import WorldloomError

@click.command()
@click.argument("how")
@click.pass_context
def acme(ctx, how):
    if how == "mistake":
        raise WorldloomError("the file is too long", got="9 h", do="cut it")
    if how == "bug":
        raise ZeroDivisionError("a bug")
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "exit":
        ctx.exit(3)
    click.echo("done")
    return 5
"""


@pytest.fixture
def acme(install) -> Path:
    return install(
        "acme_cli",
        {
            "worldloom.commands": {
                "good": "acme_cli.catalog:COMMANDS",
                "bad": "acme_cli_broken:COMMANDS",
            }
        },
        {
            "acme_cli/__init__.py": "",
            "acme_cli/commands.py": COMMANDS,
            "acme_cli/catalog.py": """
                COMMANDS = {
                    "acme": {"target": "acme_cli.commands:acme", "summary": "Does what it is told."},
                    "acme-gone": {"target": "acme_cli.nowhere:gone", "summary": "Is not there."},
                }
            """,
            "acme_cli_broken.py": "import acme_absent",
        },
    )


def test_help_shows_what_works_and_one_line_about_what_does_not(acme: Path) -> None:
    done = CliRunner().invoke(main, ["--help"])
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert any(line.split() == ["acme", "Does", "what", "it", "is", "told."] for line in lines)
    assert any(line.strip().startswith("doctor ") for line in lines)
    [warning] = [line for line in lines if line.startswith("warning:")]
    assert "acme_cli_broken:COMMANDS failed to import" in warning
    assert "acme_absent" in warning


def test_our_own_commands_come_in_the_order_of_the_work(acme: Path) -> None:
    with main.make_context("worldloom", ["doctor"]) as ctx:
        known = main.list_commands(ctx)
    ours = [name for name in known if name in ("doctor", "serve", "models", "lineage")]
    assert ours == ["doctor", "serve", "models", "lineage"]
    assert known[-2:] == ["acme", "acme-gone"]


@pytest.mark.parametrize(
    ("how", "code", "out", "err"),
    [
        ("well", 0, "done\n", ""),
        ("mistake", 2, "", "error: the file is too long\n  got: 9 h\n  do:  cut it\n"),
        ("interrupt", 130, "", "interrupted\n"),
        ("exit", 3, "", ""),
    ],
)
def test_exit_codes(acme: Path, how: str, code: int, out: str, err: str) -> None:
    done = CliRunner().invoke(main, ["acme", how])
    assert (done.exit_code, done.stdout) == (code, out)
    assert done.stderr.strip() == err.strip()


def test_a_bug_keeps_its_traceback(acme: Path) -> None:
    done = CliRunner().invoke(main, ["acme", "bug"])
    assert isinstance(done.exception, ZeroDivisionError)


def test_debug_shows_the_traceback_of_a_mistake_too(acme: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLDLOOM_DEBUG", "1")
    done = CliRunner().invoke(main, ["acme", "mistake"])
    assert "too long" in str(done.exception)
    assert "error:" not in done.stderr


def test_a_usage_error_exits_with_2(acme: Path) -> None:
    done = CliRunner().invoke(main, ["acme"])
    assert done.exit_code == 2
    assert "Missing argument" in done.stderr


def test_an_unknown_command_names_the_nearest_and_what_is_broken(acme: Path) -> None:
    done = CliRunner().invoke(main, ["doctro"])
    assert done.exit_code == 2
    assert "Did you mean 'doctor'?" in done.stderr
    assert "acme_cli_broken:COMMANDS failed to import" in done.stderr


def test_a_command_whose_module_is_absent_is_a_clear_error(acme: Path) -> None:
    done = CliRunner().invoke(main, ["acme-gone"])
    assert done.exit_code == 2
    assert "acme_cli.nowhere:gone (named by acme_cli.catalog:COMMANDS)" in done.stderr


def test_version() -> None:
    from worldloom import __version__

    assert CliRunner().invoke(main, ["--version"]).output == f"worldloom, version {__version__}\n"


def test_help_takes_less_than_half_a_second() -> None:
    """Processor time, the best of three: the machine may be busy with something else."""
    seconds: list[float] = []
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-m", "worldloom", "--help"], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0
        seconds.append(usage.ru_utime + usage.ru_stime)
    assert min(seconds) < 0.5
