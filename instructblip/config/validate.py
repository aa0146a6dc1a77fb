"""Values read from YAML, checked against annotated dataclasses: a mistake is named with its file, key and nearest word."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from instructblip.config.schema import CONFIGS, ModelConfig, Schema
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


def validate(config: DictConfig, schema: type[Schema]) -> Schema:
    """Check a composed configuration against its dataclass and return it as one.

    Raises:
        UserError: an unknown key (with the nearest valid one), a wrong type, or a value that must be given.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), config)
        result = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise UserError(unknown_key(_place(error, schema), valid_keys(schema))) from None
    except MissingMandatoryValue as error:
        key = _place(error, schema)
        raise UserError(f"the configuration needs a value for {key}; give {key}=...") from None
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"configuration key {_place(error, schema)}: {reason}; give a value of the right type"
        ) from None
    assert isinstance(result, schema)
    return result


def check_at_least(minimum: int, values: Mapping[str, int | None]) -> None:
    """Refuse numbers below a minimum; None is no number.

    Raises:
        UserError: names the first key.
    """
    for key, value in values.items():
        if value is not None and value < minimum:
            raise UserError(f"{key}={value} is too small; give {minimum} or more")


def unknown_key(key: str, valid: list[str]) -> str:
    """The message for a key that does not exist, naming the nearest one that does, else its neighbours."""
    wanted = re.sub(r"(\.\d+|\[\d*\])(?=\.)", ".0", key)
    if wanted in valid:  # of a list's entry, which has only the keys that its file names
        return f"{key} is left at its default there; set it with +{key}=VALUE"

    def likeness(name: str) -> tuple[float, float]:
        last, whole = wanted.rpartition(".")[2], difflib.SequenceMatcher(None, wanted, name).ratio()
        return difflib.SequenceMatcher(None, last, name.rpartition(".")[2]).ratio(), whole

    nearest = max(valid, key=lambda name: sum(likeness(name)))
    last, whole = likeness(nearest)
    if last >= 0.7 or whole >= 0.8:
        return f"unknown configuration key {key}; did you mean {nearest}?"
    section = wanted.rpartition(".")[0]
    section = f"{section}." if any(name.startswith(f"{section}.") for name in valid) else ""
    neighbours = [name for name in valid if name.startswith(section) and "." not in name[len(section) :]]
    return f"unknown configuration key {key}; the keys there are: {', '.join(neighbours)}"


def unknown_choice(group: str, wanted: str, configs: Path = CONFIGS) -> str:
    """The message for a choice of a group that does not exist, naming the nearest one and all that do."""
    known = sorted(path.stem for path in (configs / group).glob("*.yaml"))
    near = difflib.get_close_matches(wanted, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"there is no {group}={wanted}; {hint}configs/{group} has: {', '.join(known)}"


def valid_keys(schema: Any, prefix: str = "") -> list[str]:
    """Dotted names of every key of a dataclass schema, inner ones included.

    The entries of a list are named by the first one, `recipe.phases.0.steps`; those of a dict by NAME.
    """
    names = []
    for name, kind in typing.get_type_hints(schema).items():
        names.append(prefix + name)
        inner, step = _inner_schema(kind)
        if inner is not None:
            names += valid_keys(inner, f"{prefix}{name}.{step}")
    return names


def _inner_schema(kind: Any) -> tuple[Any, str]:
    """The dataclass that a type annotation holds, if any, and what stands between its name and the inner keys."""
    if dataclasses.is_dataclass(kind):
        return kind, ""
    step = {list: "0.", dict: "NAME."}.get(typing.get_origin(kind), "")
    inner = [argument for argument in typing.get_args(kind) if dataclasses.is_dataclass(argument)]
    return (inner[0] if inner else None), step


def _place(error: OmegaConfBaseException, schema: Any) -> str:
    """The dotted name of the key an error is about; OmegaConf names what stands in a list from the list's entry on."""
    key = str(error.full_key or error.key)
    for section in [name.removesuffix(".0.name") for name in valid_keys(schema) if name.endswith(".0.name")]:
        kind = schema
        for name in section.split("."):
            kind = typing.get_type_hints(kind)[name]
        if error.object_type is _inner_schema(kind)[0] and not key.startswith(section):
            return f"{section}[].{key}"
    return key


def read_config(path: Path, schema: type[Schema]) -> Schema:
    """Read a run's stored config.yaml.

    Raises:
        UserError: missing, not YAML, or of another schema.
    """
    return _validate_file(path, _read_yaml(path), schema)


def read_model_config(path: Path) -> ModelConfig:
    """Read what a model is built from out of a stored config.yaml; how it was trained need not stand there.

    Raises:
        UserError: missing, not YAML, or of another schema.
    """
    wanted = {part.name for part in dataclasses.fields(ModelConfig)}
    loaded = _read_yaml(path)
    return _validate_file(path, OmegaConf.masked_copy(loaded, [key for key in loaded if key in wanted]), ModelConfig)


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        raise UserError(f"{path} is missing; a checkpoint is used inside the run folder that it was written to")
    try:
        loaded = OmegaConf.load(path)
    except YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path} is not a configuration; a run writes it and needs it unchanged")
    return loaded


def _validate_file(path: Path, loaded: DictConfig, schema: type[Schema]) -> Schema:
    try:
        return validate(loaded, schema)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def to_yaml(config: Any) -> str:
    """A validated configuration as YAML that `read_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: Any) -> dict[str, Any]:
    """A validated configuration as plain values."""
    return dataclasses.asdict(config)


def differences(old: dict[str, Any], new: dict[str, Any], *, ignore: tuple[str, ...], prefix: str = "") -> list[str]:
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
