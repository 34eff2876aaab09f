"""The documentation keeps its word: its commands parse, its TOML loads, and it builds without a warning."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from worldloom import config
from worldloom.cli import main

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
CARDS = [card for name in ("tokenizers", "model_zoo") for card in (ROOT / name).rglob("README.md")]
PAGES = sorted(
    page
    for page in [*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *(ROOT / "docs").rglob("*.md"), *CARDS]
    if "_build" not in page.parts
)
FENCE = re.compile(
    r"^(?P<indent> *)(?P<ticks>`{3,})(?P<kind>[a-z]*)[^\n]*\n(?P<body>.*?)^(?P=indent)(?P=ticks)$", re.M | re.S
)
CONFIG = re.compile(r"^# config: (?P<module>[\w.]+):(?P<cls>\w+)$", re.M)


def blocks(page: Path, *kinds: str) -> Iterator[str]:
    """The bodies of a page's fenced blocks of these kinds."""
    for fence in FENCE.finditer(page.read_text(encoding="utf-8")):
        if fence["kind"] in kinds:
            yield fence["body"]


def commands(page: Path) -> Iterator[str]:
    """Every `worldloom ...` line of a page's shell blocks, continued lines joined, prompts and output left out."""
    for body in blocks(page, "bash", "sh", "console"):
        for line in body.replace("\\\n", " ").splitlines():
            text = re.sub(r"^\s*(\$ )?((\w+=\S+|\.venv/bin/|env|nohup) *)*", "", line)
            text = re.sub(r"^\.venv/bin/", "", text)
            if re.match(r"worldloom( |$)", text):
                yield " ".join(re.sub(r"\s#\s.*$", "", text).split())


def parse(line: str) -> None:
    """Read a command line as click would, without running it and without asking that the files exist.

    Raises:
        click.UsageError: an unknown verb or option, a missing or superfluous argument, a value of the wrong kind.
    """
    words = shlex.split(line)
    assert words[:1] == ["worldloom"], line
    for stop in ("|", ">", ">>", "&&", ";", "&"):
        words = words[: words.index(stop)] if stop in words else words
    command: click.Command = main
    context = click.Context(command, info_name="worldloom")
    words = words[1:]
    while True:
        values, rest, _ = command.make_parser(context).parse_args(list(words))
        for parameter in command.get_params(context):
            value = values.get(parameter.name or "")
            given = isinstance(value, (str, list, tuple))
            if parameter.required and not given and not values.get("help"):
                raise click.MissingParameter(ctx=context, param=parameter)
            if given and not isinstance(parameter.type, (click.Path, click.File)):
                parameter.type_cast_value(context, value)
        if not isinstance(command, click.Group):
            if rest:
                raise click.UsageError(f"unexpected arguments: {' '.join(rest)}", context)
            return
        if not rest:
            return
        name, found, words = command.resolve_command(context, rest)
        assert found is not None
        command, context = found, click.Context(found, info_name=name, parent=context)


EXAMPLES = sorted((ROOT / "examples").rglob("*.toml"))
COMMANDS = sorted(
    {(page.relative_to(ROOT).as_posix(), line) for page in PAGES for line in commands(page)}
    | {(path.name, path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")) for path in EXAMPLES}
)


def test_the_pages_hold_commands() -> None:
    pages = {page for page, _ in COMMANDS}
    assert {"README.md", "docs/tutorials/quickstart.md", "docs/how-to/curate-your-videos.md"} <= pages


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page}: {line}" for page, line in COMMANDS])
def test_a_command_in_the_documentation_parses(page: str, line: str) -> None:
    try:
        parse(line)
    except click.UsageError as error:
        pytest.fail(f"{page}: {line}\n  {error.format_message()}")


@pytest.mark.parametrize(
    "line",
    [
        "worldloom curat run videos",
        "worldloom curate run videos --out data --no-such-option",
        "worldloom curate record --episodes 3 --out data",
        "worldloom lineage a b",
        "worldloom curate record --env CartPole-v1 --episodes many --out data",
    ],
)
def test_a_wrong_command_would_be_caught(line: str) -> None:
    with pytest.raises(click.UsageError):
        parse(line)


# What reads the `--set key=value` of a verb.
SETTINGS = {
    "curate run": "worldloom_curation.config:CurateConfig",
    "finetune world": "worldloom_finetune.world:WorldTraining",
    "finetune tokenizer": "worldloom_finetune.tokenizer:TokenizerTraining",
    "finetune preview-decoder": "worldloom_finetune.preview:PreviewTraining",
    "finetune latent-actions": "worldloom_finetune.latent_actions:LatentActionTraining",
    "quickstart": "worldloom_finetune.quickstart:QuickstartConfig",
}
SETS = [
    (line, reader)
    for _, line in COMMANDS
    for verb, reader in SETTINGS.items()
    if line.startswith(f"worldloom {verb} ") and "--set" in line
]


@pytest.mark.parametrize(("line", "reader"), SETS, ids=[line for line, _ in SETS])
def test_a_setting_in_the_documentation_exists(line: str, reader: str) -> None:
    module, _, name = reader.partition(":")
    words = shlex.split(line)
    overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    config.load(getattr(importlib.import_module(module), name), overrides=overrides)


def load_toml(text: str, where: str, tmp_path: Path) -> None:
    tomllib.loads(text)
    named = CONFIG.search(text)
    if named is not None:
        file = tmp_path / "config.toml"
        file.write_text(text, encoding="utf-8")
        cls = getattr(importlib.import_module(named["module"]), named["cls"])
        assert isinstance(config.load(cls, file), cls), where


TOML_BLOCKS = [(page.relative_to(ROOT).as_posix(), body) for page in PAGES for body in blocks(page, "toml")]


@pytest.mark.parametrize(("page", "body"), TOML_BLOCKS, ids=[f"{page}-{i}" for i, (page, _) in enumerate(TOML_BLOCKS)])
def test_toml_in_the_documentation_loads(page: str, body: str, tmp_path: Path) -> None:
    load_toml(body, page, tmp_path)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_config_loads(path: Path, tmp_path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert CONFIG.search(text), f"{path} must say what reads it: a line '# config: module:Class'"
    load_toml(text, path.name, tmp_path)


def test_a_link_between_pages_leads_somewhere() -> None:
    link = re.compile(r"\]\(([^)#\s]+?)(?:#[^)]*)?\)")
    targets = [
        (page, target) for page in PAGES for target in link.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    ]
    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page, target in targets
        if not re.match(r"[a-z]+:", target) and not (page.parent / target).exists()
    ]
    assert targets
    assert not broken


def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "sphinx",
            "-W",
            "--keep-going",
            "-q",
            "-b",
            "html",
            "-d",
            tmp_path / "cache",
            ROOT / "docs",
            tmp_path / "html",
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "html" / "reference" / "cli.html").read_text(encoding="utf-8")
    assert "worldloom curate run" in reference
    assert "worldloom quickstart" in reference
