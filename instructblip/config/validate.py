"""The one engine that checks what is read from YAML or the command line against the annotated dataclasses.

Configurations and dataset cards go through `build`. pydantic finds what is wrong; the line that a user reads is made here:
the file, the key's place, what is wrong with the value and what to give instead.
"""

import dataclasses
import difflib
import functools
import json
import os
import re
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from instructblip.config.schema import CONFIGS, ModelConfig, Schema
from instructblip.errors import UserError

_MOST_VALUES = 100_000  # that a file may hold, each alias counted as often as it is used
_LONGEST_SHOWN = 80  # characters of a value in an error line
KeyPath = tuple[int | str, ...]  # the keys and numbers that lead to a value


# --- the engine ------------------------------------------------------------------------------------------------------


def build(kind: Any, values: Any, file: str = "", key: str = "", *, missing_ok: bool = False) -> Any:
    """Turn values read from YAML into the annotated type, or say which key is wrong.

    Nothing is converted but list to tuple and int to float: an unquoted `yes` (a bool in YAML) is an error, not "True".

    Args:
        kind: a dataclass below `schema.Section`.
        values: plain values.
        file: where they were read, which begins the error's line; none for the command line.
        key: where they stand in it; none for all of it.
        missing_ok: accept that required keys are missing, and return None then: for a look at a part of the whole.

    Raises:
        UserError: an unknown key, a missing one, a wrong type, a value that is not among the choices or out of bounds.
    """
    try:
        _check_plain(values, key)
        try:
            # As JSON: its strict reading takes objects for dataclasses and arrays for tuples, and converts nothing else.
            return _adapter(kind).validate_json(json.dumps(values))
        except ValidationError as error:
            found = _by_weight(error.errors(include_url=False), missing_ok=missing_ok)
            if not found:
                return None
            line = _Mistake(kind, values, key, on_command_line=not file).line(found[0])
            wrong = dict.fromkeys(_dotted(key, error["loc"]) for error in found[1:] if error["type"] != "missing")
            raise UserError(line + (f" (also wrong: {', '.join(wrong)})" if wrong else "")) from None
    except UserError as error:
        raise UserError(f"{file}: {error}" if file else str(error)) from None


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _by_weight(errors: Iterable[ErrorDetails], *, missing_ok: bool) -> list[ErrorDetails]:
    """Unknown keys first, missing ones last: a misspelt key is both."""
    order = {"unexpected_keyword_argument": 0, "missing": 2}
    wanted = [error for error in errors if not (missing_ok and error["type"] == "missing")]
    return sorted(wanted, key=lambda error: order.get(error["type"], 1))


def _check_plain(values: Any, key: str) -> None:
    """Values that JSON can hold, under keys that are text, and not too many of them.

    Aliases of YAML let a short file stand for more values than memory holds.
    """
    left = _MOST_VALUES

    def visit(value: Any, key: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise UserError(f"there are more than {_MOST_VALUES:,} values, by aliases perhaps; write what is meant")
        if isinstance(value, dict):
            for name, inner in value.items():
                if not isinstance(name, str):
                    raise UserError(f"{key or 'the file'} has the key {name!r}, which is not text; put it in quotes")
                visit(inner, f"{key}.{name}" if key else name)
        elif isinstance(value, list):
            for number, inner in enumerate(value):
                visit(inner, f"{key}.{number}")
        elif value is not None and type(value) not in (str, int, float, bool):
            raise UserError(f"{key} is {value!r}, which YAML reads as {type(value).__name__}; put it in quotes")

    try:
        visit(values, key)
    except RecursionError:  # an alias of what it stands in
        raise UserError(f"{key or 'the file'} is nested too deep, or holds itself by an alias") from None


def _dotted(key: str, place: Iterable[int | str]) -> str:
    return ".".join([*([key] if key else []), *map(str, place)])


@dataclasses.dataclass(frozen=True)
class _Mistake:
    """Makes the line about one of pydantic's errors."""

    kind: Any
    values: Any
    key: str  # where the values stand
    on_command_line: bool

    def line(self, error: ErrorDetails) -> str:
        kind, place = error["type"], error["loc"]
        name, limits = _dotted(self.key, place), error.get("ctx", {})
        given = f"{name}={_shown(error['input'])}"
        if kind == "unexpected_keyword_argument":
            return self._unknown(place)
        if place and place[-1] == "[key]":
            return self._no_key(place[:-1], error)
        if kind == "missing":
            return self._missing(place)
        if kind == "literal_error":
            return self._no_choice(place, error["input"])
        if kind == "value_error":
            return f"{given}: {limits['error']}"
        bounds = {
            "greater_than_equal": "{ge} or more",
            "greater_than": "more than {gt}",
            "less_than_equal": "{le} or less",
            "less_than": "less than {lt}",
        }
        if kind in bounds:
            wanted = bounds[kind].format_map({limit: f"{value:g}" for limit, value in limits.items()})
            return f"{given} is too {'small' if kind.startswith('greater') else 'large'}; give {wanted}"
        if kind in ("too_short", "too_long"):
            least = limits.get("min_length", limits.get("max_length"))
            return f"{given} has {limits['actual_length']} entries; give {'at least ' * (least == 1)}{least}"
        return self._wrong_type(name, kind, error)

    def _as_meant(self, place: KeyPath, value: str) -> str:
        """A text that is given for a section, or for a list of them, in the form that the schema has: `{name: TEXT}`."""
        wanted = _bare(_annotation(self.kind, place))
        inner = _bare(typing.get_args(wanted)[0]) if typing.get_origin(wanted) in (list, tuple) else wanted
        names = valid_keys(inner) if isinstance(inner, type) and dataclasses.is_dataclass(inner) else ()
        text = f"{{name: {_shown(value)}}}" if "name" in names else _shown(value)
        return text if inner is wanted else f"[{text}]"

    def _wrong_type(self, name: str, kind: str, error: ErrorDetails) -> str:
        expected = {
            "int_type": "a whole number",
            "int_from_float": "a whole number",
            "float_type": "a number",
            "finite_number": "a finite number",
            "bool_type": "true or false",
            "string_type": "text",
            "list_type": "a list",
            "tuple_type": "a list",
            "dict_type": "keys and values",
            "dataclass_type": "keys and values",
        }
        value = error["input"]
        hint = ""
        if kind == "string_type" and value is not None and not isinstance(value, list | dict):
            hint = f"; put it in quotes: {name}=\"'{_shown(value)}'\"" if self.on_command_line else "; put it in quotes"
        elif kind in ("list_type", "tuple_type", "dataclass_type") and isinstance(value, str) and self.on_command_line:
            meant = self._as_meant(error["loc"], value)
            hint = f"; give {name}={meant}" if meant[0] == "[" else f"; give {meant}" if meant[0] == "{" else ""
        return f"{name or 'the file'} must be {expected.get(kind, error['msg'])}, not {_shortened(repr(value))}{hint}"

    def _no_choice(self, place: KeyPath, value: Any) -> str:
        annotation = _annotation(self.kind, place)
        known = [_shown(choice) for choice in _choices(annotation)]
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{_dotted(self.key, place)}={_shown(value)} is none of {', '.join(known)}{hint}"

    def _unknown(self, place: KeyPath) -> str:
        """Said with the names that stand at this place for NAME and numbers of the schema's keys."""
        prefix = f"{self.key}." if self.key else ""
        wanted = ".".join(str(step) for step in _schematic(self.kind, place))
        line = unknown_key(wanted, valid_keys(self.kind))
        general, special = wanted.rpartition(".")[0], _dotted("", place).rpartition(".")[0]
        line = line.replace(f"{general}.", f"{special}.") if general else line
        return re.sub(r"(unknown key |did you mean )", rf"\g<1>{prefix}", line)

    def _no_key(self, place: KeyPath, error: ErrorDetails) -> str:
        """Of keys that are not the schema's own but a choice, or a text of a certain form."""
        name, section = _dotted(self.key, place), _dotted(self.key, place[:-1])
        if error["type"] != "literal_error":
            return f"{name}: {error.get('ctx', {}).get('error', error['msg'])}"
        known = list(map(str, _choices(typing.get_args(_bare(_annotation(self.kind, place[:-1])))[0])))
        near = difflib.get_close_matches(str(place[-1]), known, n=1)
        if near:
            return f"unknown key {name}; did you mean {section}.{near[0]}?"
        return f"unknown key {name}; the keys there are: {', '.join(known)}"

    def _missing(self, place: KeyPath) -> str:
        """An entry of a section by name that lacks something may be another's name misspelt, or its number."""
        name = _dotted(self.key, place)
        parent = self.values
        for step in place[:-2]:
            parent = parent[step]
        if len(place) > 1 and isinstance(parent, dict) and _schematic(self.kind, place)[-2] == "NAME":
            entry, others = str(place[-2]), [other for other in parent if other != place[-2] and not other.isdigit()]
            near = difflib.get_close_matches(entry, others, n=1)
            if entry.isdigit() and int(entry) < len(others):
                near = [others[int(entry)]]
            if near:
                section, keys = _dotted(self.key, place[:-2]), parent[entry] or {"...": 0}
                meant = ", ".join(f"{section}.{near[0]}.{key}" for key in keys)
                return f"{section} go by name, and {section}.{entry} is none of them; did you mean {meant}?"
        return f"key {name} is missing; give {name}=..." if self.on_command_line else f"key {name} is missing"


def _shown(value: Any) -> str:
    """A value as it is written on the command line and in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return _shortened(str(value))


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."


# --- annotations -----------------------------------------------------------------------------------------------------


def _bare(annotation: Any) -> Any:
    """Without bounds and without `| None`."""
    if typing.get_origin(annotation) is Annotated:
        return _bare(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        (inner,) = [part for part in typing.get_args(annotation) if part is not types.NoneType]
        return _bare(inner)
    return annotation


def _annotation(kind: Any, place: Iterable[int | str]) -> Any:
    """The annotation of what stands at a place; Any where there is none."""
    for step in place:
        bare = _bare(kind)
        arguments = typing.get_args(bare)
        if dataclasses.is_dataclass(bare):
            kind = typing.get_type_hints(bare, include_extras=True).get(str(step), Any)
        else:
            kind = arguments[-1 if typing.get_origin(bare) is dict else 0] if arguments else Any
    return kind


def _choices(annotation: Any) -> list[Any]:
    """Of a Literal, None among them where it may be left out."""
    choices = list(typing.get_args(_bare(annotation)))
    optional = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return [*choices, None] if optional else choices


def _schematic(kind: Any, place: KeyPath) -> list[str]:
    """A place in the words of `valid_keys`: 0 for any number, NAME for any name."""
    steps = []
    for depth, step in enumerate(place):
        around = typing.get_origin(_bare(_annotation(kind, place[:depth])))
        steps.append({list: "0", tuple: "0", dict: "NAME"}.get(around, str(step)))
    return steps


# --- words -----------------------------------------------------------------------------------------------------------


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error line: the known word nearest to `word`, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def unknown_key(key: str, valid: Sequence[str]) -> str:
    """The message for a key that does not exist, naming the nearest one that does, else its neighbours."""

    def likeness(name: str) -> tuple[float, float]:
        last, whole = key.rpartition(".")[2], difflib.SequenceMatcher(None, key, name).ratio()
        return difflib.SequenceMatcher(None, last, name.rpartition(".")[2]).ratio(), whole

    def nearness(name: str) -> tuple[bool, float]:
        last, whole = likeness(name)
        return last == 1, last + whole  # a key of the same name elsewhere comes before one of a like name

    best = max(valid, key=nearness)
    last, whole = likeness(best)
    if last >= 0.7 or whole >= 0.8:
        return f"unknown key {key}; did you mean {best}?"
    section = key.rpartition(".")[0]
    section = f"{section}." if any(name.startswith(f"{section}.") for name in valid) else ""
    neighbours = [name for name in valid if name.startswith(section) and "." not in name[len(section) :]]
    return f"unknown key {key}; the keys there are: {', '.join(neighbours)}"


def unknown_choice(group: str, wanted: str, configs: Path = CONFIGS, *further: Path) -> str:
    """The message for a choice that a group does not have in these folders, with the nearest one and all that it has."""
    known, where = known_choices(group, configs, *further)
    near = difflib.get_close_matches(wanted, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"there is no {group}={wanted}; {hint}{where}"


def known_choices(group: str, configs: Path = CONFIGS, *further: Path) -> tuple[list[str], str]:
    """The choices of a group, and a clause that names them and where they stand."""
    known = sorted(group_options(group, configs, *further))
    places = [folder / group for folder in further if os.path.isdir(folder / group)]
    beside = [
        f" and {place}{'' if os.access(place, os.R_OK | os.X_OK) else ', which may not be read,'}" for place in places
    ]
    return known, f"configs/{group}{''.join(beside)} {'have' if beside else 'has'}: {', '.join(known)}"


def group_options(group: str, *folders: Path) -> dict[str, Path]:
    """A group's choices by name, hidden files left out; of the same name that of the first folder counts, as for Hydra."""
    found = [path for folder in reversed(folders) for path in sorted((folder / group).glob("*.yaml"))]
    return {path.stem: path for path in found if os.path.isfile(path) and not path.name.startswith(".")}


@functools.cache
def valid_keys(schema: Any, prefix: str = "") -> tuple[str, ...]:
    """Dotted names of every key of a dataclass schema, inner ones included.

    The entries of a list are named by the first one, `mixture.datasets.0.name`; those of a dict by NAME.
    """
    names = []
    for name, annotation in typing.get_type_hints(schema, include_extras=True).items():
        if typing.get_origin(annotation) is typing.ClassVar or name in schema.NOT_SAID:
            continue
        names.append(prefix + name)
        bare, step = _bare(annotation), ""
        if typing.get_origin(bare) in (list, tuple, dict):
            step = "NAME." if typing.get_origin(bare) is dict else "0."
            bare = _bare(typing.get_args(bare)[-1 if step == "NAME." else 0])
        if dataclasses.is_dataclass(bare):
            names += valid_keys(typing.cast(type, bare), f"{prefix}{name}.{step}")
    return tuple(names)


# --- configurations --------------------------------------------------------------------------------------------------


def validate(config: DictConfig, schema: type[Schema], *, missing_ok: bool = False) -> Schema:
    """Check a composed configuration against its dataclass and return it as one.

    Args:
        config: as Hydra composed it; its interpolations are resolved, and `???` counts as left out.
        schema: what it is checked against.
        missing_ok: as in `build`.

    Raises:
        UserError: as `build`; an interpolation that leads nowhere.
    """
    try:
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"configuration key {error.full_key}: {reason}; correct it") from None
    built: Schema = build(schema, _without_placeholders(values), missing_ok=missing_ok)
    return built


def _without_placeholders(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _without_placeholders(value) for name, value in values.items() if value != "???"}
    return values


def read_config(path: Path, schema: type[Schema]) -> Schema:
    """Read a stored config.yaml. It may come from somebody else: nothing in it is interpolated.

    Raises:
        UserError: missing, not YAML, or of another schema.
    """
    built: Schema = build(schema, _read_stored(path), str(path))
    return built


def read_model_config(path: Path) -> ModelConfig:
    """Read what a model is built from out of a stored config.yaml; how it was trained need not stand there.

    Raises:
        UserError: missing, not YAML, or of another schema.
    """
    wanted = {part.name for part in dataclasses.fields(ModelConfig)}
    stored = _read_stored(path)
    _check_whole(path, stored)
    sections = {name: value for name, value in stored.items() if name in wanted}
    built: ModelConfig = build(ModelConfig, sections, str(path))
    return built


def _check_whole(path: Path, stored: Mapping[str, Any]) -> None:
    try:
        _check_plain(stored, "")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _read_stored(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is missing; a checkpoint is used inside the run folder that it was written to")
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a configuration; a run writes it and needs it unchanged")
    return values


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # libyaml's, ten times faster
    """YAML as Hydra reads it: `1e-4` is a number, and no key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value} stands twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+)$"),
    list("-+.0123456789"),
)


def read_yaml(path: Path) -> Any:
    """The plain values of a YAML file, nothing of it interpolated.

    Raises:
        UserError: it cannot be read, or is not valid YAML.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        wrong = f"byte {error.object[error.start]:#04x} at {error.start}"
        raise UserError(f"{path} is not valid YAML: it is not UTF-8 text ({wrong}); save it as UTF-8") from None
    except (yaml.YAMLError, RecursionError) as error:
        reason = str(error).replace('in "<unicode string>", ', "in ")
        raise UserError(f"{path} is not valid YAML: {reason}") from None


def read_sections(path: Path, what: str) -> dict[str, Any]:
    """The keys and values of a YAML file that anybody may have written: plain ones, and not too many.

    Args:
        path: the file.
        what: it is, for the error.

    Raises:
        UserError: as `read_yaml`; something else than keys and values, or values that `build` takes from no file.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"{what} {path} must hold keys and values at its top level")
    _check_whole(path, values)
    return values


def to_yaml(config: Any) -> str:
    """A validated configuration as YAML that `read_config` reads back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def to_dict(config: Any) -> dict[str, Any]:
    """A validated configuration as plain values."""
    return dataclasses.asdict(config)


def differences(old: dict[str, Any], new: dict[str, Any], *, ignore: Collection[str], prefix: str = "") -> list[str]:
    """`key: old -> new` for every value that differs, except below the keys in `ignore`; entries of lists by number."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        name, before, after = f"{prefix}{key}", old.get(key), new.get(key)
        if name in ignore or before == after:
            continue
        before, after = _by_number(before), _by_number(after)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, ignore=ignore, prefix=f"{name}.")
        else:
            found.append(f"{name}: {before} -> {after}")
    return found


def _by_number(value: Any) -> Any:
    """A list of sections as a dict by number; anything else as it is."""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        return {str(number): part for number, part in enumerate(value)}
    return value
