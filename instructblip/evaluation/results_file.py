"""Read and check stored evaluations: results.json and predictions.jsonl."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from instructblip.config.validate import build
from instructblip.data.cards import Card, OwnCard
from instructblip.data.coverage import RecordCounts
from instructblip.errors import UserError

RESULTS = "results.json"
PREDICTIONS = "predictions.jsonl"
FORMAT = 3  # of results.json; 1 had accuracies only, 2 neither the model nor what ties it to its predictions.jsonl

_Why = Literal["missing", "failed"]
_HINT = "give the folder of an evaluation that ended, or evaluate again"


Numbers = tuple[float | None, float | None, float | None]  # value, low, high


@dataclass(frozen=True)
class NotEvaluated:
    """A dataset of the suite without a score, and why: it was `missing`, not prepared where that is allowed, or `failed`."""

    name: str
    why: _Why
    reason: str


@dataclass(frozen=True)
class StoredScore:
    """One dataset's entry of results.json.

    Attributes:
        value, low, high: the score and its 95% interval on the scale of papers' tables; None where answers are not public,
            the interval also where there is none.
        count: samples scored.
        metric: its name in the card.
        protocol: every choice behind it, with its hash.
        records: how many the card expects, were prepared, lost, answered and scored.
        predictions_sha256: of the predictions.jsonl that was scored.
        tokenizer: of captions, by the name that their metric gives; None for other metrics.
        made_up: whether the samples are made up, so that the score means nothing.
        parts: further scores by name: value and interval.
        higher_is_better: whether a larger score is a better one; True where nothing is said.
        card: of one's own, as it was; None for an official one.
        baselines: scores that need no understanding of the image, by name.
    """

    value: float | None
    low: float | None
    high: float | None
    count: int
    metric: str
    protocol: Mapping[str, Any]
    records: RecordCounts
    predictions_sha256: str
    tokenizer: str | None
    made_up: bool = False
    higher_is_better: bool = True
    card: Card | None = None
    parts: Mapping[str, Numbers] = field(default_factory=dict)
    baselines: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StoredRun:
    """An evaluation's folder, what was evaluated, the scores in it, and what has none, by dataset.

    `adapter` is the folder of those that were put onto the checkpoint; `llm` is None where there is no language model.
    `seed`, `recipe` and `step` are of the run that was trained: its seed, a hash of what else decided it, steps it has seen.
    """

    folder: Path
    checkpoint: str
    llm: str | None
    scores: dict[str, StoredScore]
    not_evaluated: dict[str, NotEvaluated] = field(default_factory=dict)
    adapter: str | None = None
    seed: int | None = None
    recipe: str | None = None
    step: int | None = None

    @property
    def about(self) -> str:
        """Where the scores come from, in a line."""
        beside = {"adapter": self.adapter, "LLM": self.llm}
        told = [f"{what} {name}" for what, name in beside.items() if name]
        told += [] if self.seed is None else [f"seed {self.seed}"]
        return ", ".join([str(self.folder), f"checkpoint {self.checkpoint}", *told])


@dataclass(frozen=True)
class StoredPrediction:
    """A line of predictions.jsonl; `score` is on the table's scale, None where the metric leaves the sample out."""

    id: str
    image: str
    answers: tuple[str, ...]
    score: float | None


def read_run(place: str | Path) -> StoredRun:
    """Read an evaluation's results.json; `place` is that file, its folder, or the folder of a training run.

    Raises:
        UserError: no such file, or not one that evaluate.py or train.py wrote; names the file and what is wrong in it.
    """
    path = Path(place).expanduser()
    candidates = [path] if path.suffix == ".json" else [path / RESULTS, path / "evaluation" / RESULTS]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise UserError(f"{candidates[0]} is missing; {_HINT}")
    values = _read_json(file)
    if not isinstance(values, dict) or not isinstance(values.get("datasets"), dict) or not values["datasets"]:
        raise UserError(f"{file} holds no evaluation: it has no datasets; {_HINT}")
    if values.get("format") != FORMAT:
        raise UserError(f"{file} has format {values.get('format')!r}, this version reads {FORMAT}; evaluate again")
    checkpoint = values.get("checkpoint")
    if not isinstance(checkpoint, dict):
        raise UserError(f"{file} names no checkpoint; {_HINT}")
    llm = _at(values, "model", "llm", "name")
    if not isinstance(llm, str) and ("llm" in values.get("model", {}) or "vision" not in values.get("model", {})):
        raise UserError(f"{file} names no model: model.llm.name is {llm!r}; {_HINT}")
    scores = {name: _stored_score(entry, name, file) for name, entry in values["datasets"].items()}
    adapter = checkpoint.get("adapter")
    if not (adapter is None or isinstance(adapter, str)):
        raise UserError(f"{file} names no adapter: checkpoint.adapter is {adapter!r}; {_HINT}")
    evaluated = str(checkpoint.get("path"))
    seed, recipe, step = (checkpoint.get(key) for key in ("seed", "recipe_sha256", "step"))
    if not (seed is None or (isinstance(seed, int) and isinstance(recipe, str))):
        raise UserError(f"{file} does not say whole what was trained: checkpoint.seed is {seed!r}; {_HINT}")
    return StoredRun(file.parent, evaluated, llm, scores, _not_evaluated(values, file), adapter, seed, recipe, step)


def read_predictions(run: StoredRun, dataset: str) -> dict[str, StoredPrediction]:
    """The predictions behind a score, by sample id.

    Raises:
        UserError: no such file, a line that is not a finished evaluation's, or not the file that results.json was made of.
    """
    file = run.folder / dataset / PREDICTIONS
    try:
        content = file.read_bytes()
        lines = content.decode("utf-8").removesuffix("\n").split("\n")  # not at what else ends a line in Unicode
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read ({error}); {_HINT}") from None
    found = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            score = None if entry["score"] is None else float(entry["score"])
            prediction = StoredPrediction(str(entry["id"]), str(entry["image"]), tuple(entry["answers"]), score)
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file} line {number} is not a prediction of a finished evaluation; {_HINT}") from None
        found[prediction.id] = prediction
    if hashlib.sha256(content).hexdigest() != run.scores[dataset].predictions_sha256:
        raise UserError(
            f"{file} is not what the score in {run.folder / RESULTS} was computed from: another evaluation into this folder "
            "has replaced it and did not end, or it was edited; evaluate again"
        )
    return found


def _at(values: Any, *keys: str) -> Any:
    """What lies at the end of a path through nested objects; None where there is none."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); {_HINT}") from None
    except ValueError as error:
        raise UserError(f"{file} is not whole JSON ({error}); {_HINT}") from None


def _not_evaluated(values: Mapping[str, Any], file: Path) -> dict[str, NotEvaluated]:
    entries = values.get("not_evaluated", {})
    if not isinstance(entries, dict):
        raise UserError(f"{file}: not_evaluated is no object of datasets; {_HINT}")
    found = {}
    for name, entry in entries.items():
        why, reason = _at(entry, "why"), _at(entry, "reason")
        if why not in get_args(_Why) or not isinstance(reason, str):
            raise UserError(f"{file}: not_evaluated.{name} does not say why; {_HINT}")
        found[name] = NotEvaluated(name, why, reason)
    return found


def _stored_card(entry: Mapping[str, Any], name: str, file: Path) -> Card | None:
    """A card of one's own as results have it. Nothing that it names is opened, nor run."""
    values = entry.get("card")
    if values is None:
        return None
    try:
        card: Card = build(OwnCard, values, str(file), f"datasets.{name}.card")
    except UserError as error:
        raise UserError(f"{error}; {_HINT}") from None
    return card


def _stored_score(entry: Any, name: str, file: Path) -> StoredScore:
    """One dataset's entry, every value of the right type."""
    if not isinstance(entry, dict):
        raise UserError(f"{file}: datasets.{name} is not a score; {_HINT}")

    count, metric, protocol = entry.get("count"), entry.get("metric"), entry.get("protocol")
    if not isinstance(count, int) or isinstance(count, bool):
        raise UserError(f"{file}: datasets.{name}.count is {count!r}, not a number of samples; {_HINT}")
    if not isinstance(metric, str):
        raise UserError(f"{file}: datasets.{name}.metric is {metric!r}, not a name; {_HINT}")
    if not isinstance(protocol, dict) or not {"split", "sha256", "samples_sha256"} <= protocol.keys():
        raise UserError(f"{file}: datasets.{name}.protocol is not whole; {_HINT}")
    try:
        records = RecordCounts.from_json(entry.get("records"))
    except ValueError as error:
        raise UserError(f"{file}: datasets.{name}.records is {error}; {_HINT}") from None
    digest, tokenizer = entry.get("predictions_sha256"), _at(entry, "metric_details", "tokenizer")
    if not isinstance(digest, str):
        raise UserError(f"{file}: datasets.{name}.predictions_sha256 is {digest!r}, not a hash; {_HINT}")
    if not isinstance(tokenizer, str | None):
        raise UserError(f"{file}: datasets.{name}.metric_details.tokenizer is {tokenizer!r}, not a name; {_HINT}")
    value, low, high = _numbers(entry, f"{file}: datasets.{name}")
    parts = entry.get("parts", {})  # results of before this key and the next were written have none
    made_up = entry.get("made_up") is True
    if not isinstance(parts, dict):
        raise UserError(f"{file}: datasets.{name}.parts are not scores by name; {_HINT}")
    found = {part: _numbers(numbers, f"{file}: datasets.{name}.parts.{part}") for part, numbers in parts.items()}
    better, card = entry.get("higher_is_better") is not False, _stored_card(entry, name, file)
    baselines = _baselines(entry.get("baselines", {}), f"{file}: datasets.{name}.baselines")
    return StoredScore(
        value, low, high, count, metric, protocol, records, digest, tokenizer, made_up, better, card, found, baselines
    )


def _baselines(values: Any, where: str) -> dict[str, float]:
    if not isinstance(values, dict):
        raise UserError(f"{where} are not scores by name; {_HINT}")
    return {name: _number(value, f"{where}.{name}") for name, value in values.items()}


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where} is {value!r}, not a number; {_HINT}")
    return float(value)


def _numbers(entry: Any, where: str) -> Numbers:
    """Value and interval of a score or a part."""
    if not isinstance(entry, dict):
        raise UserError(f"{where} is not a score; {_HINT}")

    def number(key: str) -> float | None:
        value = entry.get(key)
        return None if value is None and key in entry else _number(value, f"{where}.{key}")

    value, low, high = number("value"), number("low"), number("high")
    if (low is None) != (high is None) or (value is None and low is not None):
        raise UserError(f"{where} has half an interval, or one without a value; {_HINT}")
    return value, low, high
