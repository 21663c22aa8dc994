"""TOML to dataclasses and back. A leaf. Every room's configuration is a frozen, keyword-only dataclass beside what it configures.

An unknown key is an error that names the nearest known one; so is a value of another type. ``a.b=c`` overrides one value.
Fields may be bool, int, float, str, ``X | None``, unions of those, Literal, ``tuple[X, Y]``, ``tuple[X, ...]``, and dataclasses.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def load(path: str | Path, kind: type[T], overrides: Iterable[str] = ()) -> T:
    """A TOML file as a ``kind``, with ``"a.b=c"`` overrides applied.

    Raises:
        FileNotFoundError: no such file. ValueError: not TOML, an unknown key, a value of the wrong type, one out of range.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: expected TOML, got a syntax error: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected TOML, which is UTF-8, got other bytes: {error}") from None
    for text in overrides:
        override(values, text)
    return from_dict(values, kind, source=str(path))


def override(values: dict[str, Any], text: str) -> None:
    """Apply one ``a.b=c``: c is read as TOML, and as a string where it is a bare word."""
    key, equals, raw = text.partition("=")
    names, raw = [name.strip() for name in key.split(".")], raw.strip()
    if not equals or not all(names) or not raw or "\n" in raw:
        raise ValueError(f"--set: expected key=value, such as optim.lr=1e-3, got {text!r}")
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError as error:
        if raw[0] in "\"'[{":  # meant as TOML
            raise ValueError(f"--set: {key}: expected a TOML value or a bare word, got {raw!r}: {error}") from None
        value = raw
    table = values
    for name in names[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ValueError(f"--set: {key}: expected {name} to be a table, got a value")
    table[names[-1]] = value


def from_dict(values: Mapping[str, Any], kind: type[T], *, source: str = "configuration", where: str = "") -> T:
    """Nested mappings as a ``kind``; ``source`` and ``where`` tell the reader of an error where to look."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{source}: {where.rstrip('.') or 'top level'}: expected a table, got {values!r}")
    hints = typing.get_type_hints(kind)
    known = {field.name: field for field in dataclasses.fields(kind)}
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {where}{nearest[0]}?" if nearest else f"; known here: {', '.join(known)}"
            raise ValueError(f"{source}: unknown key {where}{key}{hint}")
    arguments = {}
    for name, field in known.items():
        if name in values:
            arguments[name] = _convert(values[name], hints[name], source, where + name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{source}: missing key {where}{name}")
    try:
        return kind(**arguments)
    except ValueError as error:
        raise ValueError(f"{source}: {where.rstrip('.') + ': ' if where else ''}{error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as nested plain values. ``from_dict`` reads it back.

    A None that is the default is left out (TOML has no null); one that replaces another default is kept.
    """
    plain = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is not None or field.default is not None:
            plain[field.name] = _plain(value)
    return plain


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _convert(value: Any, hint: Any, source: str, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(value, hint, source=source, where=where + ".")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _convert_to_one_of(value, [a for a in arguments if a is not type(None)], source, where)
    if origin is typing.Literal:
        if not any(value == a and type(value) is type(a) for a in arguments):  # True == 1
            raise ValueError(f"{source}: {where}: expected one of {', '.join(map(repr, arguments))}, got {value!r}")
        return value
    if origin is tuple:
        any_length = arguments[-1] is Ellipsis
        if not isinstance(value, list) or (len(value) != len(arguments) and not any_length):
            raise ValueError(f"{source}: {where}: expected a list{'' if any_length else f' of {len(arguments)}'}, got {value!r}")
        if any_length:
            arguments = arguments[:1] * len(value)
        return tuple(_convert(v, a, source, where) for v, a in zip(value, arguments, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise ValueError(f"{source}: {where}: expected {hint.__name__}, got {value!r} ({type(value).__name__})")
    return value


def _convert_to_one_of(value: Any, hints: list[Any], source: str, where: str) -> Any:
    if len(hints) == 1:
        return _convert(value, hints[0], source, where)
    for hint in hints:
        try:
            return _convert(value, hint, source, where)
        except ValueError:
            continue
    names = " or ".join(hint.__name__ if isinstance(hint, type) else str(hint) for hint in hints)
    raise ValueError(f"{source}: {where}: expected {names}, got {value!r} ({type(value).__name__})")
