from __future__ import annotations

import dataclasses
import enum
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worldloom import WorldloomError, config


class Precision(enum.Enum):
    FULL = "fp32"
    HALF = "bf16"


@dataclass(frozen=True)
class Optimizer:
    lr: float = 1e-3
    """Learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the two moments."""
    clip: float | None = 1.0
    """Largest gradient norm;
    none for no limit."""


@dataclass(frozen=True)
class Stage:
    name: str
    threshold: float | None = None
    tags: dict[str, int | str | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Train:
    """A config that uses every kind of field."""

    steps: int = 100
    """How many optimiser steps."""
    name: str = "run"
    label: str | None = None
    precision: Precision = Precision.FULL
    mode: Literal["full", "lora"] = "lora"
    sizes: tuple[int, ...] = (64, 64)
    out: Path = Path("runs")
    shuffle: bool = True
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=3e-4))
    stages: tuple[Stage, ...] = ()
    by_name: dict[str, Stage] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


numbers = st.floats(allow_nan=False)
words = st.text(max_size=12)
stages = st.builds(
    Stage,
    name=words,
    threshold=st.none() | numbers,
    tags=st.dictionaries(words, st.integers() | words | st.booleans(), max_size=3),
)
trains = st.builds(
    Train,
    steps=st.integers(),
    name=words,
    label=st.none() | words.filter(lambda text: text != "none"),
    precision=st.sampled_from(Precision),
    mode=st.sampled_from(["full", "lora"]),
    sizes=st.lists(st.integers(), max_size=3).map(tuple),
    out=words.map(Path),
    shuffle=st.booleans(),
    optimizer=st.builds(Optimizer, lr=numbers, betas=st.tuples(numbers, numbers), clip=st.none() | numbers),
    stages=st.lists(stages, max_size=2).map(tuple),
    by_name=st.dictionaries(words, stages, max_size=2),
    extra=st.dictionaries(words, st.lists(st.dictionaries(words, st.integers() | words), max_size=2), max_size=2),
)


@given(trains)
def test_what_is_saved_is_loaded(tmp_path_factory: pytest.TempPathFactory, train: Train) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.toml"
    config.save(train, path)
    assert config.load(Train, path) == train
    assert config.load(Train, base=config.to_dict(train)) == train


def test_values_that_are_not_finite_survive(tmp_path: Path) -> None:
    config.save(Optimizer(lr=math.nan, betas=(math.inf, -math.inf)), tmp_path / "optimizer.toml")
    back = config.load(Optimizer, tmp_path / "optimizer.toml")
    assert math.isnan(back.lr)
    assert back.betas == (math.inf, -math.inf)


def test_file_over_base_and_overrides_over_file(tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text("steps = 7\n[optimizer]\nlr = 0.5\n")
    base = {"steps": 1, "name": "base", "optimizer": {"clip": 4.0, "lr": 9.0}}
    train = config.load(Train, path, ["optimizer.betas=[0.1, 0.2]", "optimizer.lr = 0.25", "shuffle=false"], base)
    assert (train.steps, train.name, train.shuffle) == (7, "base", False)
    assert train.optimizer == Optimizer(lr=0.25, betas=(0.1, 0.2), clip=4.0)


@pytest.mark.parametrize(
    ("override", "name", "expected"),
    [
        ("name=plain words", "name", "plain words"),
        ("name=7", "name", "7"),
        ("name=true", "name", "true"),
        ('name="quoted = yes"', "name", "quoted = yes"),
        ("name=a=b", "name", "a=b"),
        ("name=", "name", ""),
        ('name="x"\nsteps = 3', "name", '"x"\nsteps = 3'),
        ("label=none", "label", None),
        ("precision=bf16", "precision", Precision.HALF),
        ("out=/tmp/x", "out", Path("/tmp/x")),
        ("sizes=[1, 2, 3]", "sizes", (1, 2, 3)),
        ("extra.'a.b'.c=1", "extra", {"a.b": {"c": 1}}),
        ("steps=1_000", "steps", 1000),
    ],
)
def test_overrides(override: str, name: str, expected: object) -> None:
    train = config.load(Train, overrides=[override])
    assert getattr(train, name) == expected
    assert train == dataclasses.replace(Train(), **{name: expected})


def test_an_optional_number_is_unset_by_none() -> None:
    assert config.load(Train, overrides=["optimizer.clip=none"]).optimizer.clip is None


@pytest.mark.parametrize("override", ["steps", "=1", "a b=1", "steps\nname=1", "[x]=1", "a.=1"])
def test_an_override_that_is_none_is_refused(override: str) -> None:
    with pytest.raises(WorldloomError, match="key=value"):
        config.load(Train, overrides=[override])


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        ("[optimizer]\nlearning = 1\nlrr = 2", "optimizer.learning", "known keys: optimizer.lr, optimizer.betas"),
        ("[optimizer]\nlrr = 2", "optimizer.lrr", "did you mean optimizer.lr?"),
        ("stpes = 2", "stpes", "did you mean steps?"),
        ("[[stages]]\nname = 'a'\n[[stages]]\nname = 'b'\ntreshold = 1", "stages[1].treshold", "stages[1].threshold?"),
        ("[by_name.first]\nnmae = 'a'", "by_name.first.nmae", "did you mean by_name.first.name?"),
    ],
)
def test_an_unknown_key_names_its_path_and_the_nearest(tmp_path: Path, text: str, key: str, hint: str) -> None:
    path = tmp_path / "train.toml"
    path.write_text(text)
    with pytest.raises(WorldloomError) as error:
        config.load(Train, path)
    assert error.value.got == key
    assert str(path) in error.value.what
    assert hint in error.value.do


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("steps=many", "steps"),
        ("optimizer.lr=fast", "optimizer.lr"),
        ("sizes=[1, 'two']", "sizes[1]"),
        ("mode=both", "mode"),
        ("precision=fp8", "precision"),
        ("optimizer=3", "optimizer"),
        ("stages=[{threshold = 1.0}]", "stages[0].name"),
    ],
)
def test_a_value_that_does_not_fit_names_its_place(override: str, place: str) -> None:
    with pytest.raises(WorldloomError) as error:
        config.load(Train, overrides=[override])
    assert error.value.what.startswith(f"{place} in the overrides: "), error.value.what


def test_a_file_that_is_missing_or_is_not_toml_says_so(tmp_path: Path) -> None:
    with pytest.raises(WorldloomError, match="no such config file"):
        config.load(Train, tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("steps = = 1")
    with pytest.raises(WorldloomError, match=r"not valid TOML.*line 1"):
        config.load(Train, tmp_path / "bad.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(WorldloomError, match="cannot be read"):
        config.load(Train, tmp_path / "bytes.toml")


def test_the_word_none_is_refused_where_it_would_be_read_as_unset() -> None:
    assert 'name = "none"' in config.dumps(Train(name="none"))
    with pytest.raises(WorldloomError, match="label cannot be the word 'none'"):
        config.dumps(Train(label="none"))


def test_what_toml_cannot_hold_is_refused() -> None:
    with pytest.raises(TypeError):
        config.dumps(Train(extra={"when": object()}))
    with pytest.raises(TypeError):
        config.to_dict([1])


def test_describe_gives_names_types_defaults_and_sentences() -> None:
    rows = {name: (kind, default, sentence) for name, kind, default, sentence in config.describe(Train)}
    assert rows["steps"] == ("int", 100, "How many optimiser steps.")
    assert rows["mode"][0] == "'full' | 'lora'"
    assert rows["precision"][0] == "'fp32' | 'bf16'"
    assert rows["sizes"][0] == "tuple[int, ...]"
    # The preset of the field, not the class's own default.
    assert rows["optimizer.lr"] == ("float", 3e-4, "Learning rate.")
    assert rows["optimizer.clip"] == ("float | none", 1.0, "Largest gradient norm; none for no limit.")
    assert [row[0] for row in config.describe(Stage)] == ["name", "threshold", "tags"]
    assert config.describe(Stage)[0][2] is dataclasses.MISSING
