"""What a card of one's own need not say: `datasets/tasks/<task>.yaml` has it by task, the rest follows from the card itself.

An official card states all of it. Here a short card becomes as whole as an official one, before both are checked alike.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, get_args

from instructblip.config.schema import CardTask, Section
from instructblip.config.validate import build, read_sections
from instructblip.errors import UserError
from instructblip.files import shipped

TASKS_FOLDER = shipped("datasets") / "tasks"
TRAIN_SPLIT = "train"
# Splits that are scored and watched where a card does not say which, the first that there is.
SCORED_SPLITS = ("test", "val", "validation", "dev")
WATCHED_SPLITS = ("val", "validation", "dev")
CANDIDATE_KEYS = ("candidates", "verbalizers", "candidates_from")

_COUNTS = ("images", "records")  # of a split, where they are numbers
_PLAIN_KEYS = ("records_by_kind", "files")
_PYTHON_FILE = re.compile(r"\.py(:|$)")


@dataclass(frozen=True, kw_only=True)
class TaskDefaults(Section):
    """What a task gives to a card that does not say it.

    Attributes:
        task_group, templates, training, evaluation: as in a card; the evaluation without its split.
        candidates: what is ranked where the card ranks and does not say what, as in an evaluation; none: nothing.
    """

    task_group: str
    templates: str
    training: dict[str, Any]
    evaluation: dict[str, Any]
    candidates: dict[str, Any] = field(default_factory=dict)


@cache
def task_defaults(task: str) -> TaskDefaults:
    """The defaults of one of the tasks there are."""
    path = TASKS_FOLDER / f"{task}.yaml"
    found: TaskDefaults = build(TaskDefaults, read_sections(path, "the task's file"), str(path))
    return found


def completed(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A card of one's own in the form of an official one.

    Files that the card names are made paths that hold wherever the command is run. A value of the wrong type stays as it
    is, for `build` to refuse.

    Args:
        values: as the card's file has them.
        path: of that file.

    Raises:
        UserError: a place of files that is none; nothing says what is trained on or scored.
    """
    task = values.get("task")
    if task is None and "templates" not in values and "evaluation" not in values:
        raise UserError(
            f"{path}: key task is missing; give one of {', '.join(get_args(CardTask))}, or say templates and evaluation"
        )
    defaults = task_defaults(task) if task in get_args(CardTask) else None
    whole = {**_about(values, defaults), **values}
    if isinstance(splits := values.get("splits"), dict):
        whole["splits"] = {name: _split(said, f"{path}: splits.{name}") for name, said in splits.items()}
        whole |= _use(values, defaults, list(splits), path)
    return _with_paths(whole, path.parent)


# --- splits ----------------------------------------------------------------------------------------------------------


def _split(said: Any, key: str) -> Any:
    """A split whose files stand beside its counts (`records: train.jsonl`) as one with `files`; counts that are not said are
    not known.

    Raises:
        UserError: a place that is no text.
    """
    if not isinstance(said, dict):
        return said  # for `build` to refuse
    plain = {name: value for name, value in said.items() if name in _PLAIN_KEYS or _is_count(name, value)}
    places = {name: _places(value, f"{key}.{name}") for name, value in said.items() if name not in plain}
    files = plain.get("files", {})
    return dict.fromkeys(_COUNTS) | plain | ({"files": files | places} if isinstance(files, dict) else {})


def _is_count(name: str, value: Any) -> bool:
    return name in _COUNTS and not isinstance(value, str | list | dict)


def _places(value: Any, key: str) -> list[str]:
    places = value if isinstance(value, list) else [value]
    if not all(isinstance(place, str) for place in places):
        raise UserError(
            f"{key} must be the path of a file or folder, or a list of some, not {value!r}; put it in quotes"
        )
    return places


# --- what follows from the rest --------------------------------------------------------------------------------------


def _about(said: Mapping[str, Any], defaults: TaskDefaults | None) -> dict[str, Any]:
    """What an official card says about its dataset, as far as anybody knows it of another."""
    found: dict[str, Any] = {"task_group": defaults.task_group if defaults else "own data", "role": "held-out"}
    if "name" in said:
        found["title"] = said["name"]
    if said.get("view_of") is None:
        found |= {
            "homepage": "-",
            "licence": "not stated",
            "how_to_get": "raw= is the folder that the card's files lie in",
            "verified": False,
        }
        if not {"fetch", "source_part"} & said.keys():
            found["not_fetched"] = "its card says no address"
    return found


def _use(said: Mapping[str, Any], defaults: TaskDefaults | None, splits: list[str], path: Path) -> dict[str, Any]:
    """Role, templates, training and evaluation."""
    trains = TRAIN_SPLIT in splits and said.get("templates", defaults) is not None
    found: dict[str, Any] = {"role": said.get("role", "held-in" if trains else "held-out")}
    if defaults is None:
        return found
    if trains:
        found["templates"] = said.get("templates", defaults.templates)
    found["training"] = said.get("training", defaults.training)
    if isinstance(given := said.get("evaluation", {}), dict):
        found["evaluation"] = _evaluation(given, defaults, splits, path)
    return found


def _evaluation(said: dict[str, Any], defaults: TaskDefaults, splits: list[str], path: Path) -> dict[str, Any] | None:
    """The task's evaluation with what the card says of it; None where no split but `train` could be scored."""
    others = [name for name in splits if name != TRAIN_SPLIT]
    known = [name for name in SCORED_SPLITS if name in splits] or (others if len(others) == 1 else [])
    if "split" not in said and not known:
        if not others and not said:
            return None
        raise UserError(f"{path}: key evaluation.split is missing; name the split that is scored: {', '.join(splits)}")
    split = said.get("split", known[0] if known else None)
    chosen = any(key in said for key in CANDIDATE_KEYS)
    mode = said.get("mode", "rank" if chosen else defaults.evaluation["mode"])
    candidates = defaults.candidates if mode == "rank" and not chosen else {}
    watched = [name for name in WATCHED_SPLITS if name in splits and name != split]
    validation = {"validation_split": watched[0]} if watched else {}
    whole = {**defaults.evaluation, **candidates, **validation, "split": split, "mode": mode, **said}
    if whole.get("candidates_from") == "train_answers" and TRAIN_SPLIT not in splits:
        raise UserError(
            f"{path}: key evaluation.candidates is missing; list what is chosen among, for there is no split "
            f"{TRAIN_SPLIT} to take its answers from"
        )
    return whole


# --- files beside the card -------------------------------------------------------------------------------------------


def _with_paths(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The values with the files that they name (`./my_templates.yaml`, `./my_metric.py:score`) as absolute paths."""
    found = dict(values)
    if isinstance(templates := found.get("templates"), str) and is_template_file(templates):
        found["templates"] = _absolute(templates, folder)
    if isinstance(evaluation := found.get("evaluation"), dict):
        found["evaluation"] = _metrics_with_paths(evaluation, folder)
    return found


def _metrics_with_paths(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Of an evaluation, of its presets, and of what these say by kind of language model."""
    inner = {key: _metrics_with_paths(value, folder) for key, value in values.items() if isinstance(value, dict)}
    metric = values.get("metric")
    named = {"metric": _absolute(metric, folder)} if isinstance(metric, str) and is_metric_file(metric) else {}
    return values | inner | named


def is_template_file(templates: str) -> bool:
    """Whether a card gives a template set by its file, not by its name."""
    return "/" in templates or templates.endswith((".yaml", ".yml"))


def is_metric_file(metric: str) -> bool:
    """Whether a card gives a metric by the file it is in, not by its name."""
    return "/" in metric or _PYTHON_FILE.search(metric) is not None


def _absolute(place: str, folder: Path) -> str:
    return str((folder / Path(place).expanduser()).absolute())
