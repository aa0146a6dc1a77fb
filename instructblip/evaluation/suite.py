"""Run several tasks with one model, and write the results. evaluate.py does so, and train.py at its end."""

import hashlib
import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from instructblip.data.feature_cache import ReadImage, cached_images, feature_cache
from instructblip.distributed import ALONE, Ranks
from instructblip.errors import UserError
from instructblip.evaluation.metrics import ModelOutput
from instructblip.evaluation.outcomes import TaskResult
from instructblip.evaluation.protocol import Task, blind_task, chance_level, majority_answers
from instructblip.evaluation.report.content import part_scores, report_row, report_section
from instructblip.evaluation.report.page import Report, write_report
from instructblip.evaluation.report.table import MADE_UP_DATA
from instructblip.evaluation.results_file import FORMAT, PREDICTIONS, RESULTS
from instructblip.evaluation.runner import answer_share, read_pixels, run_task
from instructblip.evaluation.submissions import SUBMISSION, write_submission
from instructblip.files import errors_for_users, exclusive, write_json
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.llm import LLM_KINDS
from instructblip.models.quantized import QuantizedLinear
from instructblip.tracking import Logger
from instructblip.weights.load import FrozenPart

_WITHHELD = "images_withheld"  # folder of a dataset's blind answers, below its others


def image_reader(model: InstructBLIP, tasks: Sequence[Task], cache_folder: Path | None) -> ReadImage:
    """How evaluation gets its images: from a feature cache when a folder for one is given, else decoded each time."""
    if cache_folder is None:
        return read_pixels(model.vision.image_size)
    cached = [task for task in tasks if takes_cached_images(task)]
    shards = {sample.shard.tar_sha256: sample.shard for task in cached for sample in task.samples}
    cache = feature_cache(model, cache_folder)
    with exclusive(cache.folder / "lock", "encoding images"):  # of several processes one does, the others find it done
        return cached_images(model, cache, list(shards.values()), "encoding images")


def takes_cached_images(task: Task) -> bool:
    """Whether a task shows pictures as `image_reader` gives them, from a cache perhaps: squashed and upright."""
    return task.protocol.transform == "resize_square" and task.protocol.upright


def model_identity(model: InstructBLIP, frozen: Mapping[str, str], trained: str) -> str:
    """SHA-256 of all that a model's answers depend on: every weight, frozen or not, and how texts and images enter.

    Args:
        model: whose answers.
        frozen: fingerprints of the frozen parts: computing them takes a while, and all of the weights.
        trained: fingerprint of what trains.
    """
    llm, vision = model.llm, model.vision
    conventions = [
        [
            llm.prompt_format.image_prefix_ids,
            llm.prompt_format.prompt_ids("A word?"),
            llm.prompt_format.target_ids("A word."),
        ],
        [model.max_instruction_tokens, model.qformer.instruction_aware],
        [vision.image_size, vision.mean.tolist(), vision.std.tolist(), str(vision.layers), str(vision.grid)],
    ]
    parts = [trained, *frozen.values()]
    return hashlib.sha256(json.dumps([parts, conventions]).encode()).hexdigest()


def describe_model(
    model: InstructBLIP, parts: Mapping[str, FrozenPart], frozen: Mapping[str, str], trained: str
) -> dict[str, Any]:
    """What results.json says of a model: its large parts by name, how they are held, and fingerprints.

    Args:
        model: what was evaluated.
        parts: its `llm` and `vision`.
        frozen: fingerprints of the parts that are frozen.
        trained: fingerprint of what trains.
    """
    rounded = {module.kind for module in model.llm.modules() if isinstance(module, QuantizedLinear)}
    held: dict[str, dict[str, Any]] = {
        "llm": {
            "kind": llm_kind(model),
            "dtype": _dtype_name(model.llm.embeddings.weight.dtype),
            "quantization": min(rounded, default=None),  # all layers have one kind
        },
        "vision": {"dtype": _dtype_name(model.vision.dtype), "image_size": model.vision.image_size},
    }
    described = {name: {**parts[name]._asdict(), **held[name], "sha256": frozen.get(name, "trained")} for name in held}
    return {"sha256": model_identity(model, frozen, trained), **described}


def llm_kind(model: InstructBLIP) -> str:
    """`decoder` or `encoder_decoder`."""
    return next(name for name, kind in LLM_KINDS.items() if isinstance(model.llm, kind))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def baselines(task: Task, shards: Path, blind: TaskResult | None) -> dict[str, float]:
    """Scores that need no understanding of the image.

    * `images withheld`: the same model on the same questions with a grey picture for every image.
    * `majority per question`: always the commonest training answer to the question's very words; only for datasets that
      may be trained on.
    * `chance`: a class drawn uniformly from the candidates.
    """
    found = {}
    if blind is not None and blind.value is not None:
        found[BLIND] = blind.value
    asked = task.card.role == "held-in" and task.protocol.candidates_from != "choices" and task.answers_public
    if majority := majority_answers(task.card, shards) if asked else {}:
        records = [sample.record for sample in task.samples]
        guesses = [ModelOutput(majority.get(record.question or "", majority[""])) for record in records]
        found[MAJORITY] = task.metric(guesses, records).table_value
    chance = chance_level(task)
    if chance is not None:
        found[CHANCE] = chance
    return found


@dataclass(frozen=True)
class DatasetResult:
    """A task's result and what to hold it against: scores of baselines by name, in the metric's scale."""

    result: TaskResult
    baselines: dict[str, float]


def evaluate_tasks(
    model: InstructBLIP,
    tasks: Sequence[Task],
    read_image: ReadImage,
    *,
    shards: Path,
    folder: Path,
    batch_size: int,
    blind: bool,
    frozen: Mapping[str, str],
    trained: str,
    tolerance: int = 0,
    ranks: Ranks = ALONE,
) -> list[DatasetResult]:
    """Run tasks and their baselines; answers are kept below `folder/<dataset>`.

    What an earlier evaluation made of other answers is removed there as soon as a task has its new ones.

    Args:
        shards: folder of prepared datasets, for the majority baseline.
        blind: also answer every question with the images withheld.
        frozen, trained: fingerprints of the frozen parts, and of what trains.
        tolerance: samples that may fail, for each task.
        ranks: which of several processes this is.

    Returns:
        The results; none to all ranks but the first.

    Raises:
        UserError: as `run_task`.
    """
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "model_fingerprint": model_identity(model, frozen, trained),
        "tolerance": tolerance,
    }
    results = []
    for task in tasks:
        home, protocol = folder / task.card.name, task.protocol
        reader = read_image
        if not takes_cached_images(task):
            reader = read_pixels(model.vision.image_size, protocol.transform, upright=protocol.upright)
        runs = [(task, home), (blind_task(task), home / _WITHHELD)][: 1 + blind]
        found = []
        for asked, place in runs:
            if not ranks.is_first:
                answer_share(model, asked, reader, folder=place, ranks=ranks, **options)
                continue
            found.append(run_task(model, asked, reader, folder=place, ranks=ranks, **options))
            (place / SUBMISSION).unlink(missing_ok=True)
        if not ranks.is_first:
            continue
        if not blind and (home / _WITHHELD).exists():
            shutil.rmtree(home / _WITHHELD)
        results.append(DatasetResult(found[0], baselines(task, shards, found[1] if blind else None)))
    return results


def finish_evaluation(
    model: InstructBLIP,
    results: Sequence[DatasetResult],
    folder: Path,
    *,
    title: str,
    checkpoint: str,
    step: int,
    parts: Mapping[str, FrozenPart],
    frozen: Mapping[str, str],
    trained: str,
    examples: int,
    console: Console,
) -> None:
    """Print the score table, write results.json and report.html, and name what was written.

    Args:
        model, results: what was evaluated, and what `evaluate_tasks` gave.
        folder: as there.
        title: of the table and the report.
        checkpoint, step: where the trained weights come from.
        parts, frozen: names of the large parts, and fingerprints of those that are frozen.
        trained: fingerprint of what trains.
        examples: samples shown for each dataset.
        console: for the table.

    Raises:
        UserError: as `write_results`; or the answers are not there any more.
    """
    for item in results:
        if not (answers := folder / item.result.task.card.name / PREDICTIONS).is_file():
            raise UserError(f"{answers} was deleted while the evaluation was at work; run the same command again")
    described = describe_model(model, parts, frozen, trained)
    summary = results_json(results, checkpoint=checkpoint, fingerprint=trained, step=step, model=described)
    written = write_results(folder, title, results, summary, examples)
    console.print(console_table(title, results))
    for path in written:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)


_VERSIONS = ("torch", "torchvision", "timm", "transformers")
BLIND = "images withheld"
MAJORITY = "majority per question"
CHANCE = "chance"


def results_json(
    results: Sequence[DatasetResult], *, checkpoint: str, fingerprint: str, step: int, model: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything a score needs to be trusted: the model, the machine, the versions, and each frozen protocol."""
    return {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": {"path": checkpoint, "trainable_sha256": fingerprint, "step": step},
        "model": dict(model),
        "machine": {"platform": platform.platform(), "torch_threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _VERSIONS}},
        "datasets": {item.result.task.card.name: _results_entry(item) for item in results},
    }


def write_results(
    folder: Path, title: str, results: Sequence[DatasetResult], summary: Mapping[str, Any], examples: int
) -> list[Path]:
    """Write results.json, report.html and what leaderboards take; return the paths of everything the evaluation left.

    Args:
        examples: samples shown for each dataset, half of them wrong ones.

    Raises:
        UserError: a damaged image, a record that a leaderboard's file has no place for, or a disk that is full.
    """
    page = folder / "report.html"
    with errors_for_users(page):
        page.unlink(missing_ok=True)  # should this end here, an earlier one must not stand beside other scores
    write_json(folder / RESULTS, summary)
    report = Report(
        title=title,
        checkpoint=f"{summary['checkpoint']['path']} (step {summary['checkpoint']['step']})",
        model=_model_line(summary["model"]),
        created=summary["created"],
        summary=[report_row(item.result, item.baselines) for item in results],
        sections=[report_section(item.result, examples) for item in results],
    )
    write_report(page, report)
    written = [folder / RESULTS, page]
    for item in results:
        home = folder / item.result.task.card.name
        written.append(home / PREDICTIONS)
        if has_submission(item.result):
            written.append(_write_submission(home, item.result))
    return written


def _model_line(model: Mapping[str, Any]) -> str:
    """The frozen parts of `results_json`'s model."""
    llm, vision = model["llm"], model["vision"]
    held = ", ".join(filter(None, (llm["dtype"], llm["quantization"])))
    return f"LLM {llm['name']} ({held}), image encoder {vision['name']} ({vision['dtype']}, {vision['image_size']} px)"


def has_submission(result: TaskResult) -> bool:
    """Whether a public leaderboard takes this result: it refuses a part of a split, and blind answers are not meant."""
    protocol = result.task.protocol
    whole = protocol.samples is None and not result.failures and protocol.images == "shown"
    return result.task.card.name in result.task.metric.submissions and whole


def console_table(title: str, results: Sequence[DatasetResult]) -> Table:
    """Scores with their 95% intervals beside the baselines, for the terminal."""
    held_out = [item.result.task.card.name for item in results if item.result.task.card.role == "held-out"]
    notes = [f"held out, never trained on: {', '.join(held_out)}"] if held_out else []
    if any(item.result.task.made_up for item in results):
        notes.append(f"{MADE_UP_DATA.symbol} {MADE_UP_DATA.meaning}")
    caption = "\n".join(notes) or None
    # Narrow enough for a terminal of 80 columns.
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    names = list(dict.fromkeys(name for item in results for name in item.baselines))
    table.add_column("dataset", no_wrap=True)
    for name in ("score", "95%", *names, "samples"):
        table.add_column(name, justify="right")
    for item in results:
        result = item.result
        others = [f"{item.baselines[name]:.1f}" if name in item.baselines else "" for name in names]
        value, interval = "-", "not public"
        if result.value is not None:
            value = f"{result.value:.1f}"
            interval = "" if result.low is None else f"{result.low:.1f}-{result.high:.1f}"
        name = result.task.card.name + (f" {MADE_UP_DATA.symbol}" if result.task.made_up else "")
        table.add_row(name, value, interval, *others, str(len(result.samples)))
    return table


def _write_submission(folder: Path, result: TaskResult) -> Path:
    name, records = result.task.card.name, [sample.record for sample in result.samples]
    try:
        return write_submission(folder, name, result.outputs, records)
    except ValueError as error:
        raise UserError(
            f"{name} has no form that its leaderboard takes ({error}); prepare the official files"
        ) from None


def log_scores(logger: Logger, results: Sequence[DatasetResult], step: int | None) -> None:
    """Give an experiment tracker what results.json says: each score with its interval, and all of them as a table.

    Scores of splits without public answers are in neither.
    """
    entries = {item.result.task.card.name: _results_entry(item) for item in results if item.result.value is not None}
    columns = ("value", "low", "high", "count", "metric", "made_up")
    baselines = list(dict.fromkeys(name for entry in entries.values() for name in entry["baselines"]))
    numbers = {
        name: {key: entry[key] for key in ("value", "low", "high") if entry[key] is not None}
        | {part: score["value"] for part, score in entry["parts"].items()}
        for name, entry in entries.items()
    }
    rows = [
        [name, *(entry[key] for key in columns), *(entry["baselines"].get(key) for key in baselines)]
        for name, entry in entries.items()
    ]
    logger.log({"evaluation": numbers}, step)
    logger.log_table("evaluation/table", ["dataset", *columns, *baselines], rows, step)


def _results_entry(item: DatasetResult) -> dict[str, Any]:
    return {**item.result.to_json(), "parts": part_scores(item.result), "baselines": item.baselines}
