"""What the entry points share: compose with Hydra, validate, hand over, and say errors in one line."""

import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from yaml import YAMLError

from instructblip.config import CONFIGS, Schema, unknown_choice, unknown_key, valid_keys, validate
from instructblip.errors import UserError

EXIT_USER_ERROR = 2


def main(name: str, schema: type[Schema], task: Callable[[Schema, Console], int | None]) -> None:
    """Run an entry point: `configs/<name>.yaml` with the command line's overrides, checked against `schema`.

    Exits with 0, with the status that `task` returns, or with 2 after a line on standard error that says what to mend.
    """
    console = Console()

    def run(composed: DictConfig) -> None:
        try:
            status = task(validate(composed, schema), console)
        except UserError as error:  # here, since Hydra would print a traceback of whatever leaves this function
            _fail(error)
        if status:
            raise SystemExit(status)

    try:
        check_overrides(name, schema, sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=name)(run)()
    except UserError as error:
        _fail(error)
    except KeyboardInterrupt:
        _fail(UserError("interrupted; nothing half-written is left, run the same command again to go on"), status=130)


def check_overrides(name: str, schema: Any, arguments: list[str]) -> None:
    """Compose once before Hydra does, to say what is wrong in one line.

    Sweeps (`-m`) are left to Hydra, whose grammar splits them first; Hydra's own options are too.

    Raises:
        UserError: an unknown key or an unknown choice of a group, with the nearest valid one.
    """
    if not any(argument.startswith("-") for argument in arguments):
        _compose(name, schema, arguments)


def compose_config(name: str, schema: type[Schema], overrides: list[str]) -> Schema:
    """The configuration that an entry point would run with, for callers that are none.

    Args:
        name: of the file in `configs/`.
        schema: what it is checked against.
        overrides: as on the command line, `llm=vicuna_7b`.

    Raises:
        UserError: an unknown key or an unknown choice of a group, with the nearest valid one; a wrong type.
    """
    return validate(_compose(name, schema, overrides), schema)


def _compose(name: str, schema: Any, overrides: list[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return hydra.compose(name, overrides=overrides)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
        raise UserError(_explain(error, schema)) from None
    finally:
        GlobalHydra.instance().clear()


def _explain(error: Exception, schema: Any) -> str:
    message = str(error)
    key = re.search(r"Could not override '([^']+)'", message)
    if key:
        name, known = key.group(1), valid_keys(schema)
        return f"{name} is a section; add to it with +{name}.KEY=VALUE" if name in known else unknown_key(name, known)
    choice = re.search(r"Could not find '([^']+)/([^/']+)'", message)
    if choice:
        return unknown_choice(choice[1], choice[2])
    group = re.search(r"Could not override '?([\w/]+)'?\. No match in the defaults list", message)
    if group:
        return unknown_key(group.group(1), valid_keys(schema))
    if isinstance(error, YAMLError):
        return f"a file in {CONFIGS} is not valid YAML: {message}"
    reason = ": ".join(str(part).splitlines()[0] for part in (error, error.__cause__) if part and str(part))
    return (
        f"the command line cannot be understood ({reason}); write each setting as key=value, "
        "in quotes where the value holds spaces or brackets: 'key=[a, b]'"
    )


def _fail(error: UserError, status: int = EXIT_USER_ERROR) -> NoReturn:
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {error}", markup=False)
    raise SystemExit(status)
