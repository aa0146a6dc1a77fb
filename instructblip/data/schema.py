"""Values read from YAML, checked against annotated dataclasses: a mistake is named with its file, key and nearest word."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from instructblip.errors import UserError


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error line: the known word nearest to `word`, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def build(kind: Any, value: Any, file: str, key: str) -> Any:
    """Turn a value read from YAML into the annotated type, or say which key of which file is wrong.

    Nothing is converted but list to tuple and int to float: an unquoted `yes` (a bool in YAML) is an error, not "True".
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return _plain(value, file, key)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, file, key)
    if origin in (types.UnionType, typing.Union):  # only "X | None" occurs
        return None if value is None else build(arguments[0], value, file, key)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{file}: {key} is {value!r}{nearest(str(value), arguments)}")
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(build(arguments[0], item, file, f"{key}[{row}]") for row, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        _check_keys_are_text(value, file, key)
        return {name: build(arguments[1], item, file, f"{key}.{name}") for name, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        expected = {tuple: "a list", dict: "keys and values", str: "text", int: "a whole number"}.get(origin or kind)
        hint = "; put it in quotes" if kind is str and value is not None and not isinstance(value, list | dict) else ""
        raise UserError(f"{file}: {key} must be {expected or kind.__name__}, not {value!r}{hint}")
    return value


def _plain(value: Any, file: str, key: str) -> Any:
    """A value that JSON can hold, as it is."""
    if isinstance(value, dict):
        _check_keys_are_text(value, file, key)
        return {name: _plain(item, file, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, file, f"{key}[{row}]") for row, item in enumerate(value)]
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise UserError(f"{file}: {key} is {value!r}, which YAML reads as {type(value).__name__}; put it in quotes")


def _build_dataclass(kind: Any, value: Any, file: str, key: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{file}: {key} must be keys and values, not {value!r}")
    _check_keys_are_text(value, file, key)
    hints = typing.get_type_hints(kind)
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in hints:
            raise UserError(f"{file}: unknown key {prefix}{name}{nearest(name, hints)}")
    for part in dataclasses.fields(kind):
        required = part.default is dataclasses.MISSING and part.default_factory is dataclasses.MISSING
        if required and part.name not in value:
            raise UserError(f"{file}: key {prefix}{part.name} is missing")
    return kind(**{name: build(hints[name], item, file, prefix + name) for name, item in value.items()})


def _check_keys_are_text(value: Mapping[Any, Any], file: str, key: str) -> None:
    for name in value:
        if not isinstance(name, str):
            raise UserError(f"{file}: {key or 'the card'} has the key {name!r}, which is not text; put it in quotes")
