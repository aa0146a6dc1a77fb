"""What the entry points share: compose with Hydra, validate, check, hand over, and say errors in one line.

Hydra changes only keys that some YAML file writes, and wants `+` for others. Here every key of the schema can be set as
`key=value`: Hydra is told `++key=value`, and what is no key is found when the whole is validated.

Sweeps (`-m key=a,b`) are Hydra's: one job for each combination, one after the other, or on SLURM by a launcher. Each job's
output folder is named after what is swept, keys by their last parts: `held_out-llm_vicuna_7b`.
"""

import copy
import functools
import gc
import hashlib
import os
import re
import shlex
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.core.utils import configure_log
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from yaml import YAMLError

from instructblip.config.checks import check, check_read, check_search
from instructblip.config.folders import compose, further_folder, holds_choices, stamp
from instructblip.config.help import FLAGS, command_help, own_settings
from instructblip.config.schema import CONFIGS, Schema
from instructblip.config.validate import known_choices, read_yaml, unknown_choice, valid_keys, validate
from instructblip.errors import UserError
from instructblip.interrupts import raise_once
from instructblip.startup import print_all_signs, without_collection

EXIT_USER_ERROR = 2
_SIGNAL = 128  # and its number is the exit status of what a signal has ended
_SWEEP_FLAGS = ("-m", "--multirun")
_FURTHER_FOLDER = ("--config-dir", "-cd")  # Hydra's option for files that stand beside those of `configs/`
_OTHER_CONFIGURATION = ("--config", "-cp", "-cn")  # how those begin that name files in their place, shortened ones too
_WITH_VALUE = re.compile(r"--config[a-z-]*|-c[dpn]?|--cfg|-p|--package|--experimental-rerun")  # Hydra's options
_SETTING = re.compile(r"~|[^-].*=", re.DOTALL)
_MODES = (*_SWEEP_FLAGS, "-r", "--run", "-c", "--cfg", "-i", "--info")  # what Hydra is to do
_COMPLETION = ("-sc", "--shell-completion")  # Hydra's too: what stands beside it are no settings
_LONGEST_NAME = 180  # bytes; file systems end at 255 bytes
_PLACES = ("name", "output")  # settings that say a job's folder themselves
_SWEPT_KEY = r"(?:(?<=^)|(?<=,))([\w./@]+)="
_SHELL_SIGNS = ("$", "`", "!", "\\")  # that mean something within double quotes
_OF_SLURM = ("slurm", "submitit_slurm")  # launchers
_SEARCH = "hydra/sweeper=search needs Hydra's sweeper for it; pip install -r requirements-search.txt"
_SLURM = "hydra/launcher=slurm needs Hydra's launcher for it; pip install -r requirements-slurm.txt"


@dataclass(frozen=True)
class Outcome:
    """What a command's work ends with.

    Attributes:
        status: the exit status.
        score: what a search over settings is to raise; None where there is none.
    """

    status: int = 0
    score: float | None = None


def main(name: str, schema: type[Schema], task: Callable[[Schema, Console], int | Outcome | None]) -> None:
    """Run an entry point: `configs/<name>.yaml` with the command line's overrides, checked against `schema`.

    Exits with 0, with the status that `task` returns, or with 2 after a line on standard error that says what to mend. In a
    sweep a user's mistake or such a status ends that job alone, unless a signal did; the others run, and the status is 2 at
    the end, or the highest that one returned.
    """
    raise_once()
    print_all_signs()
    failed: list[str] = []
    statuses = [0]
    searched: set[Path] = set()
    process = os.getpid()

    def run(composed: DictConfig) -> float | None:
        job = _job()
        outcome = Outcome()
        searched.update([job.results] if job.trials else [])
        try:
            outcome = _run_job(composed, schema, task, job)
        except Exception as error:  # here, since Hydra would print a traceback of whatever leaves this function
            if not (job.trials or isinstance(error, UserError)):
                raise
            _tell_failure(error, job, failed, alone=not job.sweeping or os.getpid() != process)
        if job.sweeping:
            gc.collect()  # the next job's model needs the memory of this one's
        if outcome.status and (outcome.status > _SIGNAL or not job.sweeping or os.getpid() != process):
            raise SystemExit(outcome.status)
        statuses.append(outcome.status)
        return outcome.score

    try:
        if set(sys.argv[1:]) & set(FLAGS):
            print_help(name, schema, sys.argv[1:])
            return
        if not set(sys.argv[1:]) & set(_COMPLETION):
            with without_collection():
                composed = check_overrides(name, schema, sys.argv[1:])
            if composed is not None and _only_composed(composed):
                _run_composed(composed, run)
                return
            sys.argv[1:] = _for_hydra(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=name)(run)()
        for results in searched:
            _print_best(results)
    except UserError as error:
        _fail(error)
    except KeyboardInterrupt:
        _fail(UserError("interrupted; nothing half-written is left, run the same command again to go on"), status=130)
    if failed or any(statuses):
        raise SystemExit(EXIT_USER_ERROR if failed else max(statuses))


def _only_composed(composed: DictConfig) -> bool:
    """Whether Hydra has nothing to do for a job but to compose: no sweep, no folder, no callback."""
    asked = composed.hydra
    return (
        asked.mode != RunMode.MULTIRUN
        and (asked.run.dir, asked.output_subdir, asked.job.chdir) == (".", None, False)
        and not asked.callbacks
        and not asked.job.env_set
    )


def _run_composed(composed: DictConfig, run: Callable[[DictConfig], float | None]) -> None:
    """Run a job as Hydra does, which would compose twice more: to learn the mode, and to run."""
    settings = HydraConfig.instance()
    before = settings.cfg
    settings.set_config(composed)
    configure_log(composed.hydra.job_logging, composed.hydra.verbose)
    _leave_out_hydra(composed)
    try:
        run(composed)
    except Exception as error:
        traceback.print_exception(error)
        raise SystemExit(1) from None
    finally:
        settings.cfg = before


def _leave_out_hydra(composed: DictConfig) -> DictConfig:
    """Take Hydra's settings out of a composed configuration, in place."""
    with open_dict(composed):
        del composed["hydra"]
    return composed


def _tell_failure(error: Exception, job: "_Job", failed: list[str], *, alone: bool) -> None:
    """Say why a job failed, and end what ends with it.

    Args:
        failed: the jobs that did before, to which it is added.
        alone: the process ends with it: there is no other job, or SLURM gives each a process of its own.
    """
    if job.trials and not isinstance(error, UserError):
        traceback.print_exception(error)  # of which the search would say the last line only
    failed.append(job.swept)
    failure = UserError(f"job {job.number} ({job.swept}): {error}")
    if job.trials and len(failed) == job.trials:
        _fail(UserError(f"no trial of {job.trials} has a score; {failure}"))
    if job.trials:
        raise failure from None  # the search says so, and goes on
    if alone:
        _fail(UserError(str(error)))
    _print_error(str(failure))


def _run_job(
    composed: DictConfig, schema: type[Schema], task: Callable[[Schema, Console], int | Outcome | None], job: "_Job"
) -> Outcome:
    print_all_signs()  # a launcher has given the job another process, perhaps
    config = validate(composed, schema)
    check(config)
    if job.trials:
        try:
            check_search(config, job.direction)
        except UserError as error:  # of all trials alike
            _fail(error)
        if hasattr(config, "resume"):
            config.resume = "auto"  # it may try the same values twice, and goes on after a kill
    found = task(_named_after(config, job.swept) if job.sweeping else config, Console())
    outcome = found if isinstance(found, Outcome) else Outcome(found or 0)
    if job.trials and not outcome.status and outcome.score is None:
        raise UserError("it was never validated, so it has no score; a phase has to train answers")
    return outcome


def job_number() -> int | None:
    """The number of this process's job in a sweep, the same on all ranks; None outside of one."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return int(HydraConfig.get().job.num)


def launcher() -> dict[str, Any]:
    """The settings of the chosen `hydra/launcher`, for a command that starts jobs of its own; empty outside of one."""
    if not HydraConfig.initialized():
        return {}
    found: dict[str, Any] = OmegaConf.to_container(HydraConfig.get().launcher, resolve=True)  # type: ignore[assignment]
    return found


def require_slurm() -> None:
    """Refuse to submit jobs where nothing takes them, before submitit does, in a traceback.

    Raises:
        UserError: says where to start the command.
    """
    if shutil.which("srun") is None:  # which submitit looks for, too
        raise UserError(
            "hydra/launcher=slurm submits jobs to SLURM, whose srun is not on this machine's PATH; start the command where "
            "it is, or leave hydra/launcher=slurm out to run the jobs here"
        )


def merged(overrides: Sequence[str]) -> list[str]:
    """Overrides of which later ones take the place of earlier ones of the same key; Hydra refuses a group's second choice.

    Raises:
        UserError: one cannot be understood, or has several values.
    """
    found: dict[tuple[bool, str], str] = {}
    for override in _parse(list(overrides)):
        if override.is_sweep_override():
            raise UserError(f"{override.input_line} are several values; give one")
        key = (override.is_delete(), override.get_key_element().lstrip("+~"))
        found.pop(key, None)
        found[key] = override.input_line or ""
    return list(found.values())


def check_overrides(name: str, schema: Any, arguments: list[str]) -> DictConfig | None:
    """Compose and validate once before Hydra does, to say what is wrong in one line; of a sweep each swept value once.

    With Hydra's options (`--cfg job`, `--help`), which only show something, required keys may be missing. `-cd FOLDER` has
    files that stand beside ours. Where options name another configuration than ours it is left to Hydra.

    Returns:
        What was composed, with Hydra's own settings; None where the command line has other options, or changes those
        settings.

    Raises:
        UserError: an unknown key or an unknown choice of a group, with the nearest valid one; as `validate` and `check`.
    """
    arguments = _joined(arguments)
    _check_options(arguments)
    options = [argument for argument in arguments if argument.startswith("-") and argument not in _SWEEP_FLAGS]
    others = [option for option in options if option.partition("=")[0] not in _FURTHER_FOLDER]
    if any(option.startswith(_OTHER_CONFIGURATION) for option in others):
        return None
    further, shows = _further_folder(arguments), bool(others)
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    if others:
        overrides = [argument for argument in overrides if _SETTING.match(argument)]  # not their values
    if set(arguments) & set(_SWEEP_FLAGS):
        parsed = _parse(overrides)
        _check_swept(parsed, further)
        if "name" in valid_keys(schema):
            _check_job_names(parsed)
        # What goes together is checked in each job, for the others may run.
        jobs = {
            tuple(job): validate(_compose(name, job, further), schema, missing_ok=shows) for job in _jobs(overrides)
        }
        _check_read_by_some(jobs, parsed)
        if not shows and any(item.key_or_group == "hydra/launcher" and item.value() in _OF_SLURM for item in parsed):
            require_slurm()
        return None
    composed = _compose(name, overrides, further, with_hydra=True)
    config = validate(_leave_out_hydra(copy.deepcopy(composed)), schema, missing_ok=shows)
    if config is not None:
        check(config)
        check_read(config, _keys(overrides))
    of_hydra = any(item.key_or_group.startswith("hydra") for item in _parse(overrides))
    return None if others or of_hydra else composed


def _check_read_by_some(jobs: Mapping[tuple[str, ...], Any], given: Sequence[Override]) -> None:
    """Refuse keys that no job of a sweep would read.

    Args:
        jobs: by overrides, the configuration that they compose.
        given: on the command line. Intervals are in no job of these; what a pattern would choose is not known.
    """
    others = [item for item in given if item.is_sweep_override() and not item.is_discrete_sweep()]
    if any(item.is_discrete_sweep() and isinstance(item.value(), Glob) for item in given):
        return
    refused: list[UserError] = []
    for overrides, config in jobs.items():
        try:
            if config is not None:
                check_read(config, [*_keys(list(overrides)), *(item.key_or_group for item in others)])
        except UserError as error:
            refused.append(error)
    if len(refused) == len(jobs):
        raise refused[0]


def _joined(arguments: Sequence[str]) -> list[str]:
    """A command line of which each of Hydra's options is one word with its value: a folder `a=b` is no setting.

    Raises:
        UserError: an option lacks its value.
    """
    found, words = [], iter(arguments)
    for word in words:
        option, has_value, value = word.partition("=")
        if _WITH_VALUE.fullmatch(option):
            value = value if has_value else next(words, "")
            if not value:
                raise UserError(f"{option} lacks its value; give {option}=VALUE")
            word = f"{option}={os.path.abspath(os.path.expanduser(value)) if option in _FURTHER_FOLDER else value}"
        found.append(word)
    return found


def _check_options(arguments: Sequence[str]) -> None:
    """Refuse options that Hydra would refuse with a traceback."""
    given = {argument.partition("=")[0]: None for argument in arguments}
    modes = [option for option in given if option in _MODES]
    if len(modes) > 1:
        raise UserError(f"{' and '.join(modes)} do not go together; give one of them")
    if "--resolve" in given and not {"-c", "--cfg"} & given.keys():
        raise UserError("--resolve is for --cfg; give --cfg job --resolve")


def _further_folder(arguments: Sequence[str]) -> Path | None:
    """The folder of `-cd` in what `_joined` has made, of which Hydra takes the last.

    Raises:
        UserError: there is none of that name, or it may not be read.
    """
    found = None
    for argument in arguments:
        option, _, value = argument.partition("=")
        if option in _FURTHER_FOLDER:
            found = Path(value)
            if os.path.isfile(found):
                raise UserError(f"{option}: {found} is a file; give FOLDER where it is FOLDER/GROUP/NAME.yaml")
            if not os.path.isdir(found):
                raise UserError(f"{option}: there is no folder {found}; correct its name")
            if not os.access(found, os.R_OK | os.X_OK):
                raise UserError(f"{option}: the folder {found} may not be read; change its permissions")
    return found


def compose_config(name: str, schema: type[Schema], overrides: list[str]) -> Schema:
    """The configuration that an entry point would run with, for callers that are none.

    Within a command with `-cd FOLDER` that folder's files are known.

    Args:
        name: of the file in `configs/`.
        schema: what it is checked against.
        overrides: as on the command line, `llm=vicuna_7b`.

    Raises:
        UserError: an unknown key or an unknown choice of a group, with the nearest valid one; as `validate` and `check`.
    """
    config = validate(_compose(name, overrides, further_folder()), schema)
    check(config)
    check_read(config, _keys(overrides))
    return config


def print_help(name: str, schema: type[Schema], arguments: list[str]) -> None:
    """Print what a command does, the choices of each group, and its settings as the other arguments compose them.

    Raises:
        UserError: as `check_overrides`.
    """
    arguments = _joined(arguments)
    overrides = [argument for argument in arguments if _SETTING.match(argument)]
    settings, choices = own_settings(name), {}
    further = _further_folder(arguments)
    if overrides:
        check_overrides(name, schema, arguments)
    if overrides or not _mandatory(name):
        composed = _compose(name, next(_jobs(overrides)), further, with_hydra=True)
        choices = {key: value for key, value in composed.hydra.runtime.choices.items() if "hydra/" not in key}
        settings = {key: value for key, value in _plain(composed).items() if key != "hydra"}
    width = min(shutil.get_terminal_size((120, 0)).columns, 120)
    print(command_help(name, settings, choices, _folders(further), width=width))
    print("\nPowered by Hydra (https://hydra.cc): --hydra-help shows its own options, --cfg job the settings alone.")


def _plain(composed: DictConfig) -> dict[str, Any]:
    """The settings as they stand in the files, nothing interpolated."""
    found: dict[str, Any] = OmegaConf.to_container(composed)  # type: ignore[assignment]
    return found


def _mandatory(name: str) -> bool:
    """Whether a command cannot be composed before a choice is made, such as `study=`."""
    entries = read_yaml(CONFIGS / f"{name}.yaml").get("defaults", [])
    return any("???" in entry.values() for entry in entries if isinstance(entry, dict))


def _for_hydra(arguments: list[str]) -> list[str]:
    """What Hydra is told in place of a command line: options first, for it takes no settings from two places."""
    arguments = _joined(arguments)
    arguments.sort(key=lambda argument: bool(_SETTING.match(argument)))
    return _settable([*arguments, *_sweep_naming(arguments)], _folders(_further_folder(arguments)))


def _settable(arguments: list[str], folders: Sequence[Path] = (CONFIGS,)) -> list[str]:
    """The command line with `++` before every key that is set or added, so that no file has to write it first.

    A group is left out by `GROUP=null`, as a key is.
    """
    return [_forced(argument, folders) for argument in arguments]


def _forced(argument: str, folders: Sequence[Path]) -> str:
    if argument.startswith(("-", "~", "++")) or "=" not in argument:
        return argument
    try:
        override = _parse_one(argument)
    except HydraException:
        return argument  # Hydra says what is wrong with it
    group = _names_group(override, folders)
    if group and override.value() is None:
        return f"~{override.key_or_group}"  # Hydra's way to leave a group out
    if override.key_or_group.startswith("hydra") or (group and not isinstance(override.value(), dict)):
        return argument
    return f"++{argument.lstrip('+')}"


def _names_group(override: Override, folders: Sequence[Path]) -> bool:
    return override.package is not None or _is_group(override.key_or_group, folders)


def _is_group(key: str, folders: Sequence[Path]) -> bool:
    """Of a further folder only what has files: an `output` beside them is none."""
    return (folders[0] / key).is_dir() or any(holds_choices(key, folder) for folder in folders[1:])


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


def _keys(overrides: list[str]) -> list[str]:
    """What overrides set to something."""
    return [item.key_or_group for item in _parse(overrides) if not item.is_delete() and item.value() is not None]


def _check_swept(overrides: list[Override], further: Path | None) -> None:
    """Refuse to set a section as a whole after a value in it that is swept, which would be the same in all jobs then.

    A search gives the swept values first, whatever stands first on the command line. Refused is also a key that Hydra, which
    composes each job, would take for a group, since the further folder has a folder of its name.
    """
    searching = any(override.key_or_group == "hydra/sweeper" for override in overrides)
    for place, swept in enumerate(overrides):
        for fixed in overrides if searching else overrides[place:]:
            inside = swept.key_or_group.startswith(f"{fixed.key_or_group}.")
            if swept.is_sweep_override() and inside and not fixed.is_sweep_override() and not fixed.is_delete():
                raise UserError(
                    f"{swept.key_or_group} is swept, and {fixed.key_or_group}={{...}} would set it again in each job; "
                    f"give the other keys of {fixed.key_or_group} one by one"
                )
        place_of_key = None if further is None else further / swept.key_or_group
        if (
            place_of_key is not None
            and os.path.isdir(place_of_key)
            and not _is_group(swept.key_or_group, _folders(further))
        ):
            raise UserError(
                f"a sweep takes {swept.key_or_group}= for a choice of the files in {place_of_key}, which has none; "
                "rename that folder, or give -cd another one"
            )


def _check_job_names(overrides: list[Override]) -> None:
    """Refuse values of which two would name one folder: the second job would find the first one's results there."""
    for override in overrides:
        if not override.is_discrete_sweep() or isinstance(override.value(), Glob):
            continue
        if override.key_or_group in _PLACES:  # each value is a folder as it stands
            continue
        named: dict[str, str] = {}
        for value in override.sweep_string_iterator():
            other = named.setdefault(_as_name(value), value)
            if other != value:
                raise UserError(
                    f"{override.get_key_element()}={other} and {value} would be jobs of one name and folder; start one of "
                    "them by itself, with another name="
                )


def _parse(overrides: list[str]) -> list[Override]:
    parsed = []
    for override in overrides:
        try:
            parsed.append(_parse_one(override))
        except HydraException:
            raise UserError(_unreadable(override)) from None
    return parsed


@functools.lru_cache(maxsize=1024)
def _parse_one(override: str) -> Override:
    """Hydra's parser takes milliseconds for each, and a command asks it several times; what it returns is not changed."""
    return OverridesParser.create().parse_override(override)


def _unreadable(override: str) -> str:
    key, _, value = override.partition("=")
    if not value or not re.fullmatch(r"[+~]*[\w./@]+", key):
        return f"{override} cannot be understood; write each setting as key=value"
    line = f"{override} cannot be understood; put the value in quotes within quotes: {_quoted(key, value)}"
    return line + (f"; in a list each text: \"{key}=['a b', c]\"" if value[0] in "[{" else "")


def _quoted(key: str, value: str) -> str:
    """A setting as a shell takes it, its value in quotes of Hydra's, in which every sign stands for itself."""
    for_the_shell_too = any(sign in value for sign in _SHELL_SIGNS)
    inner = '"' if '"' not in value and ("'" in value or for_the_shell_too) else "'"
    escaped = value.replace(inner, f"\\{inner}")
    escaped += "\\" * (len(value) - len(value.rstrip("\\")))  # the last one would escape the quote
    argument = f"{key}={inner}{escaped}{inner}"
    if not any(sign in argument for sign in ('"', *_SHELL_SIGNS)):
        return f'"{argument}"'
    return f"'{argument}'" if "'" not in argument else shlex.quote(argument)


def _sweep_naming(arguments: list[str]) -> list[str]:
    """Settings by which Hydra tells each job, wherever it runs, what is swept: in `job.override_dirname`."""
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    if not set(arguments) & set(_SWEEP_FLAGS):
        return []
    same = [item.key_or_group for item in _parse(overrides) if not item.is_sweep_override()]
    quoted = ", ".join(f"'{key}'" for key in (*same, *_PLACES))
    return [f"hydra.job.config.override_dirname.exclude_keys=[{quoted}]"]


class _Job(NamedTuple):
    """A job of a sweep, or what is run alone.

    Attributes:
        swept: what its command line says of what is swept: `llm=vicuna_7b,seed=1`.
        trials: how many jobs a search has, the values of each chosen by the scores of those before; 0: it is none.
        direction: whether it is to `maximize` them.
        results: where it writes what was best.
    """

    sweeping: bool = False
    swept: str = ""
    number: int = 0
    trials: int = 0
    direction: str = ""
    results: Path = Path()


def _job() -> _Job:
    number = job_number()
    if number is None:
        return _Job()
    settings = HydraConfig.get()
    swept = re.sub(r"(^|,)\++", r"\1", str(settings.job.override_dirname))  # without what `_settable` has added
    sweeper = settings.sweeper
    direction = str(sweeper.get("direction", "")).rpartition(".")[2]  # of an enum
    results = Path(settings.sweep.dir) / "optimization_results.yaml"
    return _Job(True, swept, number, int(sweeper.get("n_trials", 0)), direction, results)


def _print_best(path: Path) -> None:
    """Say what a search has found, which its sweeper has written to a file."""
    found = read_yaml(path)
    if "best_params" in found:  # of a search for one score
        best = " ".join(f"{key.lstrip('+')}={value}" for key, value in found["best_params"].items())
        Console(soft_wrap=True, highlight=False).print(f"best: {found['best_value']:.4g} with {best}", markup=False)
    Console(soft_wrap=True, highlight=False).print(f"wrote {path}", markup=False)


def _named_after(config: Schema, swept: str) -> Schema:
    """The configuration with a `name`, if it has one, that no other job of the sweep has: its output folder's."""
    if not hasattr(config, "name"):
        return config
    job = _as_name(_short_keys(swept))
    name = f"{config.name}-{job}" if job else str(config.name)
    if len(encoded := name.encode(errors="surrogateescape")) > _LONGEST_NAME:
        digits = hashlib.sha256(swept.encode(errors="surrogateescape")).hexdigest()[:16]
        name = f"{encoded[: _LONGEST_NAME - 17].decode(errors='ignore')}-{digits}"
    config.name = name
    return config


def _as_name(swept: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", swept.replace(",", "-"))


def _short_keys(swept: str) -> str:
    """What a job's command line says of what is swept, each key by as many of its last parts as tell it from the others.

    The same keys give the same names in all jobs of a sweep, wherever they run.
    """
    keys = re.findall(_SWEPT_KEY, swept)
    short = {}
    for key in keys:
        parts = key.split(".")
        tails = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
        short[key] = next(tail for tail in tails if sum(f".{other}".endswith(f".{tail}") for other in keys) == 1)
    return re.sub(_SWEPT_KEY, lambda found: short[found[1]] + "=", swept)


def _compose(name: str, overrides: list[str], further: Path | None = None, *, with_hydra: bool = False) -> DictConfig:
    """By files of `configs/` and of a further folder, whose own are those that it has alone."""
    _parse(overrides)
    folders = _folders(further)
    choices, values = _choices_and_values(_settable(overrides, folders), folders)
    try:
        config = copy.deepcopy(_compose_choices(name, choices, folders, stamp(folders), with_hydra))
        for override in values:
            _set(config, override)
    except (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError, TypeError) as error:
        raise UserError(_explain(error, folders, name, overrides)) from None
    except RecursionError:
        where = " or ".join(map(str, folders))
        raise UserError(
            f"a file in {where} chooses itself in its defaults, or over others; take that choice out"
        ) from None
    return config


def _folders(further: Path | None) -> tuple[Path, ...]:
    return (CONFIGS,) if further is None else (CONFIGS, further)


def _choices_and_values(
    overrides: list[str], folders: Sequence[Path] = (CONFIGS,)
) -> tuple[tuple[str, ...], list[Override]]:
    """What Hydra composes, and the settings `++key=value` after that, which change values of what it composed.

    The jobs of a sweep and the runs of a study differ in values, rarely in groups. A composition takes as long as a
    hundred values.
    """
    parsed = _parse(overrides)
    groups = [_names_group(item, folders) and not isinstance(item.value(), dict) for item in parsed]
    last = -1  # of those that Hydra must apply in their order: deletions, sweeps, its own settings
    for place, item in enumerate(parsed):
        plain = item.is_force_add() and not item.is_sweep_override() and not item.key_or_group.startswith("hydra")
        last = last if plain or groups[place] else place
    choices = [text for place, text in enumerate(overrides) if groups[place] or place <= last]
    return tuple(choices), [item for place, item in enumerate(parsed) if not groups[place] and place > last]


@functools.lru_cache(maxsize=32)
def _compose_choices(
    name: str,
    overrides: tuple[str, ...],
    folders: tuple[Path, ...],
    stamp: frozenset[tuple[str, int]],
    with_hydra: bool,
) -> DictConfig:
    """Not to be changed by the caller. `stamp`: another one stands for files that have changed."""
    return compose(name, overrides, folders, with_hydra=with_hydra)


def _set(config: DictConfig, override: Override) -> None:
    """Set one value, as Hydra does."""
    try:
        OmegaConf.update(config, override.key_or_group, override.value(), merge=True, force_add=True)
    except OmegaConfBaseException as error:
        raise HydraException(f"Error merging override {override.input_line}") from error


def _explain(error: Exception, folders: Sequence[Path], name: str, overrides: Sequence[str]) -> str:
    message = str(error)
    if "Could not load 'hydra/launcher/submitit_" in message:
        return _SLURM
    if "hydra/sweeper/optuna'" in message:
        return _SEARCH
    if choice := re.search(r"Could not (?:find|load) '([^']+/[^']+)'", message):
        return _no_choice(choice[1], folders)
    if needed := re.search(r"You must specify '([^']+)'", message):
        return f"give {needed[1]}=NAME; {known_choices(needed[1], *folders)[1]}"
    if several := re.search(r"Ambiguous value for argument '([^']+)'", message):
        values = several[1].lstrip("+")
        key, _, value = values.partition("=")
        one = "" if _is_group(key, folders) else f", or {_quoted(key, value)} for one text"
        return f"{values} are several values; give -m to run one job for each{one}"
    if again := re.search(r"Multiple values for (\S+)\. To override a value use 'override \S+: (\S+)'", message):
        group = again[1].partition("@")[0]
        return f"a file's defaults choose {group} a second time; write `override /{again[1]}: {again[2]}` there"
    if unused := re.search(r"^Could not override '([^']+)'\. No match", message):
        own = f", or give +{unused[1]}=NAME to add a file of {folders[-1]}" if folders[1:] else ""
        return f"{name} makes no choice of {unused[1]}; leave {unused[1]}= out{own}"
    if elsewhere := re.search(r"^Could not override '([^']+)'\.\nDid you mean to override (?:one of )?(.+)\?", message):
        return f"{elsewhere[1]}= is chosen for a part each; write {' or '.join(elsewhere[2].split(', '))} in its place"
    parts = [str(part) for part in (error, error.__cause__) if part and str(part)]
    reason = ": ".join(part if isinstance(error, YAMLError) else part.splitlines()[0] for part in parts)
    if any(override.lstrip("+") in message for override in overrides):
        return f"the command line cannot be understood ({reason}); write each setting as key=value"
    return f"the files in {' and '.join(map(str, folders))} cannot be composed together ({reason}); correct them"


def _no_choice(wanted: str, folders: Sequence[Path]) -> str:
    """The message for a file `GROUP/NAME` that is in none of these folders."""
    steps = wanted.split("/")
    depths = [depth for depth in range(1, len(steps)) if steps[depth - 1] not in ("", ".", "..")]
    groups = [depth for depth in depths if any(os.path.isdir(Path(folder, *steps[:depth])) for folder in folders)]
    depth = max(groups, default=1)
    group, choice = "/".join(steps[:depth]), "/".join(steps[depth:])
    line = unknown_choice(group, choice, *folders)
    if others := [path for folder in folders if os.path.isfile(path := folder / group / f"{choice}.yml")]:
        return f"{line}; {others[0]} must be called {choice}.yaml"
    if "/" in choice or choice.endswith((".yaml", ".yml")):
        return f"{line}; of a file elsewhere give folder and name: -cd FOLDER {group}=NAME is FOLDER/{group}/NAME.yaml"
    return line


def _fail(error: UserError, status: int = EXIT_USER_ERROR) -> NoReturn:
    _print_error(str(error))
    raise SystemExit(status)


def _print_error(text: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {text}", markup=False)
