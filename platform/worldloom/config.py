"""Configuration: TOML files to frozen dataclasses and back.

A config class is a frozen dataclass whose fields are numbers, strings, booleans, enums, `Literal`, `Path`, tuples,
mappings, other dataclasses, or any of these `| None`; the sentence under a field is its help text. pydantic validates.
TOML has no null: an unset optional field is left out, or written ``"none"`` where leaving it out would mean its
default.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import enum
import functools
import inspect
import itertools
import json
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from worldloom.artifacts import atomic_write
from worldloom.errors import WorldloomError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

_NONE = "none"


def load(
    cls: type[T],
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    base: Mapping[str, Any] | None = None,
) -> T:
    """A validated config.

    Args:
        cls: the config dataclass.
        path: a TOML file; None for none.
        overrides: ``"a.b=1"`` strings, applied last. The value is read as TOML, and as a string where that fails or
            does not fit the field; ``none`` unsets an optional field.
        base: values under the file's, e.g. a preset as a dict.

    Raises:
        WorldloomError: no such file, not TOML, an unknown key (named in full, with the nearest known one), a value
            that does not fit.
    """
    values = _merge({}, base or {})
    if path is not None:
        values = _merge(values, read_toml(path))
    raw: dict[tuple[str, ...], str] = {}
    for override in overrides:
        keys, value, text = _parse_override(override)
        raw[keys] = text
        values = _merge(values, _nest(keys, value))
    source = str(path) if path is not None else "the overrides" if overrides else "the given values"
    _check_keys(cls, values, "", source)
    return _validate(cls, values, raw, source)


def read_toml(path: str | Path) -> dict[str, Any]:
    """A TOML file as a dict.

    Raises:
        WorldloomError: missing, unreadable, or not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WorldloomError("there is no such config file", got=path, do="give the path of a TOML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise WorldloomError(f"the config file cannot be read: {error}", got=path) from error
    except tomllib.TOMLDecodeError as error:
        raise WorldloomError(f"the config file is not valid TOML: {error}", got=path, do="mend that line") from error


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def _nest(keys: Sequence[str], value: Any) -> dict[str, Any]:
    *outer, last = keys
    nested = {last: value}
    for key in reversed(outer):
        nested = {key: nested}
    return nested


def _parse_override(override: str) -> tuple[tuple[str, ...], Any, str]:
    key, equals, text = override.partition("=")
    text = text.strip()
    try:
        nested: Any = tomllib.loads(f"{key.strip()} = 0") if equals and "\n" not in key else None
    except tomllib.TOMLDecodeError:
        nested = None
    if nested is None:
        raise WorldloomError("an override must read key=value", got=override, do="for example: train.steps=100")
    keys: list[str] = []
    while isinstance(nested, dict):
        (name, nested), *_ = nested.items()
        keys.append(name)
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        parsed = {}
    # More than one key means that the text smuggled in a line of its own: it is a string then.
    return tuple(keys), parsed["value"] if parsed.keys() == {"value"} else text, text


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _fields(cls: type) -> dict[str, Any]:
    """Names and resolved types of the fields a user may set."""
    hints = _hints(cls)
    return {item.name: hints[item.name] for item in dataclasses.fields(cls) if item.init}


def _options(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _is_optional(annotation: Any) -> bool:
    return type(None) in _options(annotation)


def _is_dataclass(annotation: Any) -> bool:
    return isinstance(annotation, type) and dataclasses.is_dataclass(annotation)


def _children(annotation: Any, value: Any) -> Iterator[tuple[str, Any, Any]]:
    """(suffix of the path, type, value) of the elements of a sequence or mapping."""
    for option in _options(annotation):
        origin, args = typing.get_origin(option), typing.get_args(option)
        if isinstance(value, Mapping) and isinstance(origin, type) and issubclass(origin, Mapping) and len(args) == 2:
            yield from ((f".{key}", args[1], item) for key, item in value.items())
        elif isinstance(value, (list, tuple)) and isinstance(origin, type) and issubclass(origin, Sequence) and args:
            single = len(args) == 1 or args[-1] is Ellipsis
            kinds = [args[0]] * len(value) if single else list(args)
            yield from ((f"[{i}]", kind, item) for i, (kind, item) in enumerate(zip(kinds, value, strict=False)))


def _check_keys(annotation: Any, value: Any, path: str, source: str) -> None:
    """Refuse a key that no field takes, before pydantic, which would ignore it."""
    options = [option for option in _options(annotation) if _is_dataclass(option)]
    if isinstance(value, Mapping) and options:
        known: dict[str, Any] = {}
        for option in options:
            known.update(_fields(option))
        for key, item in value.items():
            full = f"{path}.{key}" if path else str(key)
            if key not in known:
                raise WorldloomError(f"unknown key {full!r} in {source}", got=full, do=_nearest(key, path, known))
            _check_keys(known[key], item, full, source)
        return
    for suffix, kind, item in _children(annotation, value):
        _check_keys(kind, item, path + suffix, source)


def _nearest(key: str, path: str, known: Mapping[str, Any]) -> str:
    prefix = f"{path}." if path else ""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean {prefix}{near[0]}?"
    return f"known keys: {', '.join(prefix + name for name in known)}" if known else f"{path} takes no keys"


def _validate(cls: type[T], values: dict[str, Any], raw: dict[tuple[str, ...], str], source: str) -> T:
    from pydantic import TypeAdapter, ValidationError

    adapter = TypeAdapter(cls)
    try:
        return adapter.validate_python(_unset_nones(cls, values))
    except ValidationError as error:
        # `name=7` is meant as the text "7" where the field is text: try the words as they were typed.
        failed = [tuple(str(part) for part in problem["loc"]) for problem in error.errors()]
        typed = {keys: text for keys, text in raw.items() if any(loc[: len(keys)] == keys for loc in failed)}
        for keys, text in typed.items():
            values = _merge(values, _nest(keys, text))
        if typed:
            try:
                return adapter.validate_python(_unset_nones(cls, values))
            except ValidationError:
                pass  # the first error, about the value as TOML, is the one to show
        problem = error.errors()[0]
        place = _dotted(problem["loc"])
        got = problem.get("input")
        message = problem["msg"].removeprefix("Value error, ")
        raise WorldloomError(
            f"{place or cls.__name__} in {source}: {message[:1].lower()}{message[1:]}",
            got=None if isinstance(got, Mapping) else repr(got),
            do=f"give {place} a value of its type" if place else "",
        ) from error


def _dotted(loc: tuple[int | str, ...]) -> str:
    """``("stages", 0, "x")`` -> ``stages[0].x``; pydantic's names for union members are left out."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in _TYPE_NAMES:
            path += f".{part}" if path else part
    return path


_TYPE_NAMES = frozenset({"int", "float", "str", "bool", "none", "enum", "path"})


def _unset_nones(annotation: Any, value: Any) -> Any:
    """Turn ``"none"`` into None where the field is optional."""
    if value == _NONE and isinstance(value, str) and _is_optional(annotation):
        return None
    for option in _options(annotation):
        if isinstance(value, Mapping) and _is_dataclass(option):
            fields = _fields(option)
            return {key: _unset_nones(fields[key], item) if key in fields else item for key, item in value.items()}
    children = list(_children(annotation, value))
    if not children:
        return value
    items = [_unset_nones(kind, item) for _, kind, item in children]
    if isinstance(value, Mapping):
        return dict(zip(value, items, strict=True))
    return [*items, *value[len(items) :]]


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dicts, lists, numbers, strings and None: ready for JSON and for `Store.put`."""
    plain = _plain(config)
    if not isinstance(plain, dict):
        raise TypeError(f"expected a dataclass or a mapping, not {type(config).__name__}")
    return plain


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value) if item.init}
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a config cannot hold a {type(value).__name__}")


def dumps(config: Any) -> str:
    """A config (or a mapping) as TOML text; `load` gives the same config back.

    Raises:
        WorldloomError: an optional text field holds the word "none", which would be read back as unset.
        TypeError: a value that TOML cannot hold.
    """
    lines: list[str] = []
    _write_table(_for_toml(config), (), lines)
    return "\n".join(lines).strip("\n") + "\n"


def save(config: Any, path: str | Path) -> None:
    """Write a config as TOML, atomically."""
    atomic_write(path, dumps(config))


_UNSET = object()


def _for_toml(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        table: dict[str, Any] = {}
        for item in dataclasses.fields(value):
            if not item.init:
                continue
            held = getattr(value, item.name)
            if held is None and _default(item) is not None:
                table[item.name] = _NONE
            elif held is not None:
                if held == _NONE and isinstance(held, str) and _is_optional(_hints(type(value))[item.name]):
                    raise WorldloomError(f"{item.name} cannot be the word 'none'", do="choose another word")
                table[item.name] = _for_toml(held)
        return table
    if isinstance(value, Mapping):
        return {str(key): _for_toml(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_for_toml(item) for item in value]
    return _plain(value)


def _default(item: dataclasses.Field[Any]) -> Any:
    if item.default is not dataclasses.MISSING:
        return item.default
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return _UNSET


def _write_table(table: Mapping[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    lines.extend(f"{_key(name)} = {_value(item)}" for name, item in table.items() if not isinstance(item, Mapping))
    for name, item in table.items():
        if isinstance(item, Mapping):
            inner = (*path, name)
            lines.extend(("", f"[{'.'.join(map(_key, inner))}]"))
            _write_table(item, inner, lines)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _text(name)


def _text(text: str) -> str:
    # JSON's escapes are TOML's, but for DEL, which TOML wants escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    raise TypeError(f"TOML cannot hold a {type(value).__name__} there")


def describe(cls: type) -> list[tuple[str, str, object, str]]:
    """``(dotted name, type, default, sentence)`` of every field that is not itself a config: for ``--help-config``.

    A field without a default has ``dataclasses.MISSING``.
    """
    return list(_describe(cls, "", {}))


def _describe(cls: type, prefix: str, preset: Mapping[str, Any]) -> Iterator[tuple[str, str, object, str]]:
    sentences = _sentences(cls)
    for item in dataclasses.fields(cls):
        if not item.init:
            continue
        annotation = _hints(cls)[item.name]
        default = preset.get(item.name, dataclasses.MISSING if (held := _default(item)) is _UNSET else held)
        nested = next((option for option in _options(annotation) if _is_dataclass(option)), None)
        if nested is not None:
            # A field's default may be a preset of the nested class: show that preset's values, not the class's own.
            held = default if dataclasses.is_dataclass(default) else None
            inner = {f.name: getattr(held, f.name) for f in dataclasses.fields(nested)} if held is not None else {}
            yield from _describe(nested, f"{prefix}{item.name}.", inner)
        else:
            yield prefix + item.name, _type_name(annotation), default, sentences.get(item.name, "")


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(repr(option) for option in typing.get_args(annotation))
    options = _options(annotation)
    if len(options) > 1:
        return " | ".join("none" if option is type(None) else _type_name(option) for option in options)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return " | ".join(repr(member.value) for member in annotation)
    if isinstance(annotation, type) and typing.get_origin(annotation) is None:
        return annotation.__name__
    return re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Za-z])", "", str(annotation))


@functools.cache
def _sentences(cls: type) -> dict[str, str]:
    """The string under each field, of the class and its bases."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
        except (OSError, TypeError, SyntaxError):
            continue  # made at run time, or built in: no source to read
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for field, below in itertools.pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                found[field.target.id] = " ".join(below.value.value.split())
    return found
