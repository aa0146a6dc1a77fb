"""Run several tasks with one model, and write the results. evaluate.py does so, and train.py at its end."""

import hashlib
import json
import logging
import platform
import shutil
from collections.abc import Collection, Mapping, Sequence
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
from instructblip.data.trained_on import is_trained_on, run_config, run_mixture
from instructblip.distributed import ALONE, Ranks
from instructblip.errors import LostRankError, UserError
from instructblip.evaluation.metrics import ModelOutput
from instructblip.evaluation.outcomes import TaskResult
from instructblip.evaluation.protocol import Task, blind_task, chance_level, majority_answers
from instructblip.evaluation.report.content import part_scores, report_row, report_section, tracked_samples
from instructblip.evaluation.report.page import Report, write_report
from instructblip.evaluation.report.table import MADE_UP_DATA
from instructblip.evaluation.results_file import FORMAT, PREDICTIONS, RESULTS, NotEvaluated
from instructblip.evaluation.runner import answer_share, read_pixels, run_task
from instructblip.evaluation.seeds import training_of
from instructblip.evaluation.submissions import SUBMISSION, write_submission
from instructblip.files import errors_for_users, exclusive, write_json
from instructblip.models.arguments import Decoding
from instructblip.models.base import Model
from instructblip.models.fingerprint import settings_sha256
from instructblip.models.generation import check_write
from instructblip.models.llm import LLM, LLM_KINDS
from instructblip.models.quantized import QuantizedLinear
from instructblip.models.vision_language import VisionLanguageModel
from instructblip.tracking import Logger
from instructblip.weights.load import FrozenPart
from instructblip.weights.start import PLAIN, Standing

logger = logging.getLogger(__name__)
# Of a language model's configuration: where it came from, and what else says as well.
_NOT_COMPUTED_BY = frozenset(
    {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
)
_WITHHELD = "images_withheld"  # folder of a dataset's blind answers, below its others


def image_reader(model: Model, tasks: Sequence[Task], cache_folder: Path | None) -> ReadImage:
    """How evaluation gets its images: from a feature cache when a folder for one is given, else decoded each time."""
    if cache_folder is None:
        return read_pixels(model.vision.image_size)
    cached = [task for task in tasks if takes_cached_images(task)]
    shards = {sample.shard.tar_sha256: sample.shard for task in cached for sample in task.samples}
    cache = feature_cache(model, cache_folder)
    with exclusive(cache.folder / "lock", "encoding images"):  # of several processes one does, the others find it done
        return cached_images(model, cache, list(shards.values()), "encoding images")


def takes_cached_images(task: Task) -> bool:
    """Whether a task shows pictures as `image_reader` gives them, from a cache perhaps: squashed, upright, on white."""
    protocol = task.protocol
    return protocol.transform == "resize_square" and protocol.upright and protocol.transparency == "white"


def model_identity(model: Model, frozen: Mapping[str, str], trained: str) -> str:
    """SHA-256 of all that a model's answers depend on: weights, settings, adapters' factors, and how texts and images enter.

    Args:
        model: whose answers.
        frozen: fingerprints of the frozen parts: computing them takes a while, and all of the weights.
        trained: fingerprint of what trains.
    """
    vision = model.vision
    conventions = [
        *model.conventions(),
        [vision.mean.tolist(), vision.std.tolist()],
        _settings(model),
    ]
    scaled = {
        name: adapter.alpha for name, adapter in sorted(model.adapters.items())
    }  # by which adapters are multiplied
    parts = [trained, *frozen.values(), *([scaled] if scaled else [])]
    return hashlib.sha256(json.dumps([parts, conventions]).encode()).hexdigest()


def _settings(model: Model) -> list[Any]:
    """What each part computes by beside its weights; a language model's class reads that from its configuration."""
    parts = sorted(model.PARTS.keys() - model.FOLLOWERS - {"llm"})
    found: list[Any] = [settings_sha256(module) for part in parts for module in model.part_modules(part)]
    if (language := model.language_settings()) is not None:
        stated = {key: value for key, value in language.to_dict().items() if key not in _NOT_COMPUTED_BY}
        found.append(json.dumps(stated, sort_keys=True, default=str))
    return found


def describe_model(
    model: Model,
    parts: Mapping[str, FrozenPart],
    frozen: Mapping[str, str],
    trained: str,
    standing: Standing = PLAIN,
) -> dict[str, Any]:
    """What results.json says of a model: its large parts by name, how they are held, and fingerprints.

    Args:
        model: what was evaluated.
        parts: its `vision`, and `llm` where there is one.
        frozen: fingerprints of the parts that are frozen.
        trained: fingerprint of what trains.
        standing: what of it was never trained or is aligned to another LLM; both are said where it is so.
    """
    held: dict[str, dict[str, Any]] = {
        "vision": {"dtype": _dtype_name(model.vision.dtype), "image_size": model.vision.image_size}
    }
    if isinstance(model, VisionLanguageModel):
        held["llm"] = _describe_llm(model.llm)
    described = {name: {**parts[name]._asdict(), **held[name], "sha256": frozen.get(name, "trained")} for name in held}
    remarks = {
        "aligned_to": standing.aligned_to,
        "untrained": list(standing.untrained),
        "allow_untrained": bool(standing.untrained),  # which asks for it
    }
    kind = type(model).__name__
    return {"kind": kind, "sha256": model_identity(model, frozen, trained), **described, **remarks}


def _describe_llm(llm: LLM) -> dict[str, Any]:
    rounded = {module.kind for module in llm.modules() if isinstance(module, QuantizedLinear)}
    return {
        "kind": next(name for name, kind in LLM_KINDS.items() if isinstance(llm, kind)),
        "dtype": _dtype_name(llm.embeddings.weight.dtype),
        "quantization": min(rounded, default=None),  # all layers have one kind
    }


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def baselines(task: Task, shards: Path, blind: TaskResult | None) -> dict[str, float]:
    """Scores that need no understanding of the image.

    * `images withheld`: the same model on the same questions with a grey picture for every image.
    * `majority per question`: always the commonest training answer to the question's very words; only for datasets that
      may be trained on, and metrics that score a text alone.
    * `chance`: a class drawn uniformly from the candidates.
    """
    found = {}
    if blind is not None and blind.value is not None:
        found[BLIND] = blind.value
    if (majority := _majority(task, shards)) is not None:
        found[MAJORITY] = majority
    chance = chance_level(task)
    if chance is not None:
        found[CHANCE] = chance
    return found


def _majority(task: Task, shards: Path) -> float | None:
    """The score of the commonest training answers; None where there are none, or they have no score."""
    trained_on = task.card.role == "held-in" and task.protocol.candidates_from not in ("choices", "captions")
    if not trained_on or not task.answers_public or task.metric.needs_scores:
        return None
    if not (majority := majority_answers(task.card, shards)):
        return None
    records = [sample.record for sample in task.samples]
    guesses = [ModelOutput(majority.get(record.question or "", majority[""])) for record in records]
    try:
        return task.metric(guesses, records).table_value
    except UserError as error:  # a metric of one's own may read more of an output than its text
        logger.warning("%s has no baseline %r: %s", task.card.name, MAJORITY, error)
        return None


@dataclass(frozen=True)
class DatasetResult:
    """A task's result and what to hold it against: scores of baselines by name, in the metric's scale."""

    result: TaskResult
    baselines: dict[str, float]


def check_writes(model: Model, tasks: Sequence[Task]) -> None:
    """Refuse tasks that ask for texts of a language model that cannot write them, before the first is begun.

    Raises:
        UserError: names the task.
    """
    for task in tasks:
        if task.protocol.mode == "generate" and isinstance(model, VisionLanguageModel):
            try:
                check_write(model.llm, Decoding(num_beams=task.protocol.num_beams), task.protocol.beam_lengths)
            except UserError as error:
                raise UserError(f"{task.card.name} asks for texts: {error}") from None


def evaluate_tasks(
    model: Model,
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
    go_on: bool = True,
) -> tuple[list[DatasetResult], list[NotEvaluated]]:
    """Run tasks and their baselines; answers are kept below `folder/<dataset>`.

    What an earlier evaluation made of other answers is removed there as soon as a task has its new ones. A task that fails
    does not lose the others.

    Args:
        shards: folder of prepared datasets, for the majority baseline.
        blind: also answer every question with the images withheld.
        frozen, trained: fingerprints of the frozen parts, and of what trains.
        tolerance: samples that may fail, for each task.
        ranks: which of several processes this is.
        go_on: whether a task that fails leaves the others to be run; not where all processes work in step.

    Returns:
        The results, and the tasks that failed; none to all ranks but the first.

    Raises:
        UserError: as `check_writes`; as `run_task`, where no task ended well, or without `go_on`; another process is gone.
    """
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "model_fingerprint": model_identity(model, frozen, trained),
        "tolerance": tolerance,
    }
    check_writes(model, tasks)
    results, failed = [], []
    for task in tasks:
        home, reader = folder / task.card.name, _reader(model, task, read_image)
        blinded = blind and task.protocol.mode != "retrieve"
        runs = [(task, home), *([(blind_task(task), home / _WITHHELD)] if blinded else [])]
        try:
            if not ranks.is_first:
                for asked, place in runs:
                    answer_share(model, asked, reader, folder=place, ranks=ranks, **options)
                continue
            found = [_run(model, asked, reader, place, ranks, options) for asked, place in runs]
            if not blind and (home / _WITHHELD).exists():
                shutil.rmtree(home / _WITHHELD)
            results.append(DatasetResult(found[0], baselines(task, shards, found[1] if blinded else None)))
        except UserError as error:
            if not go_on or isinstance(error, LostRankError):
                raise
            failed.append(NotEvaluated(task.card.name, "failed", str(error)))
    if not ranks.is_first:
        return [], []  # the first hears of what failed here by the journal, and says so
    if failed and not results:
        raise UserError("; ".join(dict.fromkeys(item.reason for item in failed)))
    return results, failed


def _reader(model: Model, task: Task, read_image: ReadImage) -> ReadImage:
    """How a task's pictures are read: as given, from a cache perhaps, or as its protocol shows them."""
    if takes_cached_images(task):
        return read_image
    protocol = task.protocol
    return read_pixels(
        model.vision.image_size, protocol.transform, upright=protocol.upright, transparency=protocol.transparency
    )


def _run(
    model: Model, task: Task, reader: ReadImage, folder: Path, ranks: Ranks, options: Mapping[str, Any]
) -> TaskResult:
    result = run_task(model, task, reader, folder=folder, ranks=ranks, **options)
    (folder / SUBMISSION).unlink(missing_ok=True)
    return result


def finish_evaluation(
    model: Model,
    results: Sequence[DatasetResult],
    folder: Path,
    *,
    title: str,
    checkpoint: str,
    adapter: str | None = None,
    step: int,
    parts: Mapping[str, FrozenPart],
    frozen: Mapping[str, str],
    trained: str,
    standing: Standing,
    examples: int,
    console: Console,
    not_evaluated: Sequence[NotEvaluated] = (),
) -> None:
    """Print the score table, write results.json and report.html, and name what was written.

    Args:
        model, results: what was evaluated, and what `evaluate_tasks` gave.
        folder: as there.
        title: of the table and the report.
        checkpoint, step: where the trained weights come from; `adapter`, those that were put onto them.
        parts, frozen: names of the large parts, and fingerprints of those that are frozen.
        trained: fingerprint of what trains.
        standing: what the model started from, and what of it was never trained or is aligned to another LLM.
        examples: samples shown for each dataset.
        console: for the table.
        not_evaluated: what else the suite has.

    Raises:
        UserError: as `write_results`; or the answers are not there any more.
    """
    for scored in results:
        if not (answers := folder / scored.result.task.card.name / PREDICTIONS).is_file():
            raise UserError(f"{answers} was deleted while the evaluation was at work; run the same command again")
    described = describe_model(model, parts, frozen, trained, standing)
    summary = results_json(
        results,
        checkpoint=checkpoint,
        adapter=adapter,
        fingerprint=trained,
        step=step,
        model=described,
        started_from=standing.start.weights,
        not_evaluated=not_evaluated,
    )
    trained_on = seen_in_training(checkpoint, results)
    written = write_results(folder, title, results, summary, examples, trained_on=trained_on)
    console.print(console_table(title, results, trained_on=trained_on))
    for item in not_evaluated:
        console.print(
            f"no score of {item.name}, {item.why}: {item.reason}", markup=False, highlight=False, soft_wrap=True
        )
    for path in written:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def seen_in_training(checkpoint: str, results: Sequence[DatasetResult]) -> frozenset[str] | None:
    """The datasets scored that the checkpoint's run trained on, or one that it started from; None: that is not known."""
    config = run_config(checkpoint)
    mixture = {} if config is None else run_mixture(config)
    if not mixture:  # converted weights, and those of others
        return None
    names = (item.result.task.card.name for item in results)
    return frozenset(name for name in names if is_trained_on(name, mixture))


_VERSIONS = ("torch", "torchvision", "timm", "transformers")
BLIND = "images withheld"
MAJORITY = "majority per question"
CHANCE = "chance"


def refuse_failed(failed: Sequence[NotEvaluated], folder: Path, again: str) -> None:
    """End an evaluation in which datasets failed as a failed one, once the results of the others are written in its folder.

    Args:
        failed: none: nothing is refused.
        folder: of the evaluation.
        again: the command that goes on.

    Raises:
        UserError: names the datasets, and where the others' scores are.
    """
    if failed:
        raise UserError(
            f"{', '.join(item.name for item in failed)} could not be evaluated, as said above; the scores of the others are "
            f"in {folder / RESULTS}; once that is mended, {again} goes on where it stopped"
        )


def results_json(
    results: Sequence[DatasetResult],
    *,
    checkpoint: str,
    adapter: str | None = None,
    fingerprint: str,
    step: int,
    model: Mapping[str, Any],
    started_from: Sequence[Mapping[str, str]] = (),
    not_evaluated: Sequence[NotEvaluated] = (),
) -> dict[str, Any]:
    """Everything a score needs to be trusted: the model, the machine, the versions, and each frozen protocol.

    Beside the scores stands what of the suite has none, and why.
    """
    on_top = {} if adapter is None else {"adapter": adapter}
    return {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint": {
            "path": checkpoint,
            **on_top,
            "trainable_sha256": fingerprint,
            "step": step,
            **training_of(checkpoint),
        },
        "started_from": list(started_from),
        "model": dict(model),
        "machine": {"platform": platform.platform(), "torch_threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _VERSIONS}},
        "datasets": {item.result.task.card.name: _results_entry(item) for item in results},
        "not_evaluated": {item.name: {"why": item.why, "reason": item.reason} for item in not_evaluated},
    }


def _checkpoint_line(checkpoint: Mapping[str, Any]) -> str:
    adapter = f" with adapter {checkpoint['adapter']}" if "adapter" in checkpoint else ""
    seed = f", seed {checkpoint['seed']}" if "seed" in checkpoint else ""
    return f"{checkpoint['path']}{adapter} (step {checkpoint['step']}{seed})"


def write_results(
    folder: Path,
    title: str,
    results: Sequence[DatasetResult],
    summary: Mapping[str, Any],
    examples: int,
    *,
    trained_on: Collection[str] | None = None,
) -> list[Path]:
    """Write results.json, report.html and what leaderboards take; return the paths of everything the evaluation left.

    Args:
        examples: samples shown for each dataset, half of them wrong ones.
        trained_on: datasets that the model was trained on, whatever their cards say; None: that is not known.

    Raises:
        UserError: a damaged image, a record that a leaderboard's file has no place for, or a disk that is full.
    """
    page = folder / "report.html"
    with errors_for_users(page):
        page.unlink(missing_ok=True)  # should this end here, an earlier one must not stand beside other scores
    write_json(folder / RESULTS, summary)
    report = Report(
        title=title,
        checkpoint=_checkpoint_line(summary["checkpoint"]),
        model=_model_line(summary["model"]),
        created=summary["created"],
        summary=[
            report_row(item.result, item.baselines, trained_on=item.result.task.card.name in (trained_on or ()))
            for item in results
        ],
        sections=[report_section(item.result, examples) for item in results],
        not_evaluated=[f"{name}, {item['why']}: {item['reason']}" for name, item in summary["not_evaluated"].items()],
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
    vision = model["vision"]
    parts = [f"image encoder {vision['name']} ({vision['dtype']}, {vision['image_size']} px)"]
    if llm := model.get("llm"):
        parts.insert(0, f"LLM {llm['name']} ({', '.join(filter(None, (llm['dtype'], llm['quantization'])))})")
    remarks = [f"Q-Former aligned to {model['aligned_to']}"] if model.get("aligned_to") else []
    remarks += [f"never trained: {', '.join(model['untrained'])}"] if model.get("untrained") else []
    return "; ".join([", ".join(parts), *remarks])


def has_submission(result: TaskResult) -> bool:
    """Whether a public leaderboard takes this result: it refuses a part of a split, and blind answers are not meant."""
    protocol = result.task.protocol
    whole = protocol.samples is None and not result.failures and protocol.images == "shown"
    return result.task.card.name in result.task.metric.submissions and whole


def console_table(title: str, results: Sequence[DatasetResult], *, trained_on: Collection[str] | None = None) -> Table:
    """Scores with their 95% intervals beside the baselines, for the terminal; `trained_on` as for `write_results`."""
    held_out = [item.result.task.card.name for item in results if item.result.task.card.role == "held-out"]
    seen = trained_on or ()
    kinds = {
        "held out" if trained_on is None else "held out, not in this run's data": [
            n for n in held_out if n not in seen
        ],
        "trained on here, so no zero-shot scores": [name for name in held_out if name in seen],
    }
    notes = [f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names]
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
        return write_submission(folder, name, result.outputs, records, result.task.metric.submissions[name])
    except ValueError as error:
        raise UserError(
            f"{name} has no form that its leaderboard takes ({error}); prepare the official files"
        ) from None


def log_scores(logger: Logger, results: Sequence[DatasetResult], step: int | None, *, samples: int) -> None:
    """Give an experiment tracker what results.json says: each score with its interval, and all of them as a table.

    Scores of splits without public answers are in neither. Of every dataset it also gets some pictures with their answers.
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
    for item in results:
        shown = tracked_samples(item.result, samples)
        logger.log_samples(f"evaluation_samples/{item.result.task.card.name}", shown, step)


def _results_entry(item: DatasetResult) -> dict[str, Any]:
    return {**item.result.to_json(), "parts": part_scores(item.result), "baselines": item.baselines}
