"""What the entry points share: compose with Hydra, validate, check, hand over, and say errors in one line.

Hydra changes only keys that some YAML file writes, and wants `+` for others. Here every key of the schema can be set as
`key=value`: Hydra is told `++key=value`, and what is no key is found when the whole is validated.

Sweeps (`-m key=a,b`) are Hydra's: one job for each combination, one after the other, or on SLURM by a launcher. Each job's
output folder is named after what is swept: `held_out-llm_vicuna_7b`.
"""

import gc
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from yaml import YAMLError

from instructblip.config.checks import check
from instructblip.config.schema import CONFIGS, Schema
from instructblip.config.validate import unknown_choice, validate
from instructblip.errors import UserError
from instructblip.interrupts import raise_once

EXIT_USER_ERROR = 2
_SWEEP_FLAGS = ("-m", "--multirun")
_OTHER_CONFIGURATION = ("--config", "-cp", "-cn", "-cd")  # Hydra's options that name one
_LONGEST_NAME = 180  # characters; file systems end at 255 bytes
_SLURM = "hydra/launcher=slurm needs Hydra's launcher for it; pip install -r requirements-slurm.txt"


def main(name: str, schema: type[Schema], task: Callable[[Schema, Console], int | None]) -> None:
    """Run an entry point: `configs/<name>.yaml` with the command line's overrides, checked against `schema`.

    Exits with 0, with the status that `task` returns, or with 2 after a line on standard error that says what to mend. In a
    sweep a user's mistake ends that job alone; the others run, and the status is 2 at the end.
    """
    raise_once()
    failed: list[str] = []
    process = os.getpid()

    def run(composed: DictConfig) -> None:
        sweeping, swept, number = _job()
        status = None
        try:
            config = validate(composed, schema)
            check(config)
            status = task(_named_after(config, swept) if sweeping else config, Console())
        except UserError as error:  # here, since Hydra would print a traceback of whatever leaves this function
            if not sweeping or os.getpid() != process:  # a job of its own process, on SLURM, ends with it
                _fail(error)
            _print_error(f"job {number} ({swept}): {error}")
            failed.append(swept)
        if sweeping:
            gc.collect()  # the next job's model needs the memory of this one's
        if status:
            raise SystemExit(status)

    try:
        check_overrides(name, schema, sys.argv[1:])
        sys.argv += _sweep_naming(sys.argv[1:])
        sys.argv[1:] = _settable(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=name)(run)()
    except UserError as error:
        _fail(error)
    except KeyboardInterrupt:
        _fail(UserError("interrupted; nothing half-written is left, run the same command again to go on"), status=130)
    if failed:
        raise SystemExit(EXIT_USER_ERROR)


def check_overrides(name: str, schema: Any, arguments: list[str]) -> None:
    """Compose and validate once before Hydra does, to say what is wrong in one line; of a sweep each swept value once.

    With Hydra's options (`--cfg job`, `--help`), which only show something, required keys may be missing. Where they name
    another configuration than ours it is left to Hydra.

    Raises:
        UserError: an unknown key or an unknown choice of a group, with the nearest valid one; as `validate` and `check`.
    """
    options = [argument for argument in arguments if argument.startswith("-") and argument not in _SWEEP_FLAGS]
    if any(option.startswith(_OTHER_CONFIGURATION) for option in options):
        return
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    if options:
        overrides = [
            argument for argument in overrides if "=" in argument or argument.startswith("~")
        ]  # not their values
    if set(arguments) & set(_SWEEP_FLAGS):
        for job in _jobs(overrides):  # what goes together is checked in each job, for the others may run
            validate(_compose(name, job), schema, missing_ok=bool(options))
        return
    config = validate(_compose(name, overrides), schema, missing_ok=bool(options))
    if config is not None:
        check(config)


def compose_config(name: str, schema: type[Schema], overrides: list[str]) -> Schema:
    """The configuration that an entry point would run with, for callers that are none.

    Args:
        name: of the file in `configs/`.
        schema: what it is checked against.
        overrides: as on the command line, `llm=vicuna_7b`.

    Raises:
        UserError: an unknown key or an unknown choice of a group, with the nearest valid one; as `validate` and `check`.
    """
    config = validate(_compose(name, overrides), schema)
    check(config)
    return config


def _settable(arguments: list[str]) -> list[str]:
    """The command line with `++` before every key that is set or added, so that no file has to write it first."""
    return [_forced(argument) for argument in arguments]


def _forced(argument: str) -> str:
    if argument.startswith(("-", "~", "++")) or "=" not in argument:
        return argument
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        return argument  # Hydra says what is wrong with it
    group = override.package is not None or (CONFIGS / override.key_or_group).is_dir()
    if override.key_or_group.startswith("hydra") or (group and not isinstance(override.value(), dict)):
        return argument
    return f"++{argument.lstrip('+')}"


def _jobs(overrides: list[str]) -> Iterator[list[str]]:
    """The overrides of a few of a sweep's jobs, in which every swept value occurs: the first of all, then each other alone.

    Patterns, `glob(*)`, stand for what is there, and are left to Hydra.
    """
    values: dict[str, list[str]] = {}
    for override in _parse(overrides):
        key = override.get_key_element()
        if not override.is_sweep_override():
            values[key] = [override.input_line or ""]
        elif override.is_discrete_sweep() and not isinstance(override.value(), Glob):
            values[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
    first = {key: found[0] for key, found in values.items()}
    yield list(first.values())
    for key, found in values.items():
        for other in found[1:]:
            yield list((first | {key: other}).values())


def _parse(overrides: list[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise UserError(_explain(error)) from None


def _sweep_naming(arguments: list[str]) -> list[str]:
    """Settings by which Hydra tells each job, wherever it runs, what is swept: in `job.override_dirname`."""
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    if not set(arguments) & set(_SWEEP_FLAGS):
        return []
    same = [item.key_or_group for item in _parse(overrides) if not item.is_sweep_override()]
    quoted = ", ".join(f"'{key}'" for key in (*same, "name", "output"))
    return [f"hydra.job.config.override_dirname.exclude_keys=[{quoted}]"]


def _job() -> tuple[bool, str, int]:
    """Whether this is a job of a sweep, what its command line says of what is swept (`llm=vicuna_7b,seed=1`), its number."""
    settings = HydraConfig.get()
    if settings.mode != RunMode.MULTIRUN:
        return False, "", 0
    swept = re.sub(r"(^|,)\++", r"\1", str(settings.job.override_dirname))  # without what `_settable` has added
    return True, swept, int(settings.job.num)


def _named_after(config: Schema, swept: str) -> Schema:
    """The configuration with a `name`, if it has one, that no other job of the sweep has: its output folder's."""
    if not hasattr(config, "name"):
        return config
    job = re.sub(r"[^\w.+-]+", "_", swept.replace(",", "-"))
    name = f"{config.name}-{job}" if job else str(config.name)
    if len(name) > _LONGEST_NAME:
        name = f"{name[: _LONGEST_NAME - 17]}-{hashlib.sha256(swept.encode()).hexdigest()[:16]}"
    config.name = name
    return config


def _compose(name: str, overrides: list[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return hydra.compose(name, overrides=_settable(overrides))
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
        raise UserError(_explain(error)) from None
    finally:
        GlobalHydra.instance().clear()


def _explain(error: Exception) -> str:
    message = str(error)
    if "Could not load 'hydra/launcher/submitit_" in message:
        return _SLURM
    choice = re.search(r"Could not find '([^']+)/([^/']+)'", message)
    if choice:
        return unknown_choice(choice[1], choice[2])
    several = re.search(r"Ambiguous value for argument '([^']+)'", message)
    if several:
        values = several[1].lstrip("+")
        return f"{values} are several values; give -m to run one job for each, or put a text with a comma in quotes"
    if isinstance(error, YAMLError):
        return f"a file in {CONFIGS} is not valid YAML: {message}"
    reason = ": ".join(str(part).splitlines()[0] for part in (error, error.__cause__) if part and str(part))
    return (
        f"the command line cannot be understood ({reason}); write each setting as key=value, "
        "in quotes where the value holds spaces or brackets: 'key=[a, b]'"
    )


def _fail(error: UserError, status: int = EXIT_USER_ERROR) -> NoReturn:
    _print_error(str(error))
    raise SystemExit(status)


def _print_error(text: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {text}", markup=False)
