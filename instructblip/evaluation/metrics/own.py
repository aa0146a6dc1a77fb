"""Metrics of one's own: `evaluation.metric: ./my_metric.py:score` in a card.

The name stands for a function in that file, or for a `Metric`. The function gets what every metric gets, a `ModelOutput`
and a `Record` a sample, and gives one number a sample on the scale of the tables, or a `Score`:

    def score(outputs, records):
        return [100.0 * (output.text in record.answers) for output, record in zip(outputs, records)]

The file is code that the user wrote into a card and is run as such; whatever it raises or gives that is no score is a
`UserError` of one line. Cards refuse code that comes with a checkpoint (`data.card_evaluation`).
"""

import importlib.util
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from instructblip.config.validate import nearest
from instructblip.data.card_evaluation import metric_name, metric_sha256, own_metric
from instructblip.errors import UserError
from instructblip.evaluation.metrics.metric import Interval, Metric, Outcome, Outputs, Records, any_reference
from instructblip.evaluation.metrics.registry import METRICS
from instructblip.evaluation.metrics.score import Score, mean_score

Function = Callable[[Outputs, Records], Any]


def find_metric(metric: str) -> Metric:
    """The metric that a card names, one of `METRICS` or one of one's own.

    Raises:
        UserError: there is none of that name; the file cannot be run, or holds no such function.
    """
    own = own_metric(metric)
    if own is None:
        if metric not in METRICS:
            raise UserError(f"evaluation.metric is {metric!r}{nearest(metric, METRICS)}")
        return METRICS[metric]
    path, name = own
    found = getattr(_module(path, metric_sha256(metric)), name, None)
    if found is None:
        raise UserError(f"metric file {path} has no {name}; define a function of that name that gives the scores")
    title = metric_name(metric)
    if isinstance(found, Metric):
        return replace(found, name=title, function=partial(_guarded, found.function, title, path))
    if not callable(found):
        raise UserError(f"metric {title} is no function but {type(found).__name__}; define one in {path}")
    return Metric(
        title,
        title,
        partial(_guarded, found, title, path),
        references=any_reference,
        interval=Interval.MEAN,  # of what scale its numbers are, nobody knows
        outcome=Outcome.NONE,
        chance=None,
    )


def _module(path: Path, sha256: str) -> ModuleType:
    """The file as a module, run once for each content."""
    name = f"instructblip_own_metric_{sha256}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # of any file that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses of the file look themselves up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"metric file {path} cannot be run ({_described(error, path)})") from None
    return module


def _guarded(function: Function, title: str, path: Path, outputs: Outputs, records: Records) -> Score:
    """What the function gives, as a score.

    Raises:
        UserError: it raises something, or gives no score.
    """
    try:
        given = function(outputs, records)
    except (Exception, SystemExit) as error:
        raise UserError(f"metric {title} fails ({_described(error, path)})") from None
    values = given.per_sample if isinstance(given, Score) else _numbers(given, title)
    expected = len(given.scored) if isinstance(given, Score) and given.scored is not None else len(outputs)
    if len(values) != expected or not all(_is_finite(value) for value in values):
        raise UserError(f"metric {title} must give one finite number a sample, {expected} of them, not {given!r:.80}")
    return given if isinstance(given, Score) else mean_score([float(value) for value in values], metric=title)


def _numbers(given: Any, title: str) -> Sequence[Any]:
    """A sequence of numbers; arrays and tensors as lists."""
    values = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(values, list | tuple):
        raise UserError(f"metric {title} must give a list with one number a sample, or a Score, not {given!r:.80}")
    return values


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _described(error: BaseException, path: Path) -> str:
    """Kind and message of an error, and the line of the user's file that it comes from."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    where = "" if line is None else f", line {line}"
    return f"{type(error).__name__}: {error}{where}"
