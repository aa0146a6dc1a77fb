"""Several evaluation tasks with one model, and the files that remain. Used by evaluate.py and at the end of training."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from instructblip.build import frozen_fingerprints
from instructblip.data.features import FeatureCache
from instructblip.data.shards import ShardReader
from instructblip.evaluation.distributed import ALONE, Worker
from instructblip.evaluation.protocol import Task, withheld
from instructblip.evaluation.results import DatasetResult, baselines, results_json, score_table, write_results
from instructblip.evaluation.runner import ReadImage, answer_share, read_pixels, run_task
from instructblip.files import exclusive
from instructblip.model.frozen import fingerprint, fingerprint_tensors
from instructblip.model.instructblip import InstructBLIP
from instructblip.model.llm import LLM_KINDS


def feature_cache(model: InstructBLIP, folder: Path) -> FeatureCache:
    """The cache of this model's frozen image tokens below `folder`."""
    vision = model.vision
    identity = f"{fingerprint(vision)} {vision.layers} {vision.grid} {vision.mean.tolist()} {vision.std.tolist()}"
    return FeatureCache(folder, encoder_fingerprint=identity, image_size=vision.image_size)


def cached_images(model: InstructBLIP, cache: FeatureCache, shards: Sequence[ShardReader], title: str) -> ReadImage:
    """Encode the images of these shards once and return a reader of their tokens."""
    device = model.projection.weight.device

    def encode(images_B3HW: Tensor) -> Tensor:
        tokens: Tensor = model.vision(images_B3HW.to(device))
        return tokens

    cache.fill(shards, encode, title)
    return cache.tokens


def image_reader(model: InstructBLIP, tasks: Sequence[Task], cache_folder: Path | None) -> ReadImage:
    """How evaluation gets its images: from a feature cache when a folder for one is given, else decoded each time."""
    if cache_folder is None:
        return read_pixels(model.vision.image_size)
    shards = {sample.shard.tar_sha256: sample.shard for task in tasks for sample in task.samples}
    cache = feature_cache(model, cache_folder)
    with exclusive(cache.folder / "lock", "encoding images"):  # of several processes one does, the others find it done
        return cached_images(model, cache, list(shards.values()), "encoding images")


def model_identity(model: InstructBLIP, frozen: Mapping[str, str] | None = None) -> str:
    """SHA-256 of all that a model's answers depend on: every weight, frozen or not, and how texts and images enter.

    `frozen` are the frozen parts' fingerprints where they are known; computing them takes a while, and all of the weights.
    """
    llm, vision = model.llm, model.vision
    conventions = [
        [llm.image_prefix_ids, llm.prompt_ids("A word?"), llm.target_ids("A word.")],
        [model.max_instruction_tokens, model.qformer.instruction_aware],
        [vision.image_size, vision.mean.tolist(), vision.std.tolist(), str(vision.layers), str(vision.grid)],
    ]
    parts = [fingerprint_tensors(model.trainable_state()), *(frozen or frozen_fingerprints(model)).values()]
    return hashlib.sha256(json.dumps([parts, conventions]).encode()).hexdigest()


def llm_kind(model: InstructBLIP) -> str:
    """`decoder` or `encoder_decoder`."""
    return next(name for name, kind in LLM_KINDS.items() if isinstance(model.llm, kind))


def evaluate_tasks(
    model: InstructBLIP,
    tasks: Sequence[Task],
    read_image: ReadImage,
    *,
    shards: Path,
    folder: Path,
    batch_size: int,
    blind: bool,
    tolerance: int = 0,
    worker: Worker = ALONE,
    frozen: Mapping[str, str] | None = None,
) -> list[DatasetResult]:
    """Run tasks and their baselines; answers are kept below `folder/<dataset>`.

    Args:
        shards: folder of prepared datasets, for the majority baseline.
        blind: also answer every question with the images withheld.
        tolerance: samples that may fail, for each task.
        worker: which of several processes this is.
        frozen: fingerprints of the frozen parts, where they are known.

    Returns:
        The results; none to all workers but the first.

    Raises:
        UserError: as `run_task`.
    """
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "model_fingerprint": model_identity(model, frozen),
        "tolerance": tolerance,
    }
    results = []
    for task in tasks:
        home, transform = folder / task.card.name, task.protocol.transform
        # What `read_image` gives, from a cache perhaps, is squashed.
        reader = read_image if transform == "squash" else read_pixels(model.vision.image_size, transform)
        runs = [(task, home), (withheld(task), home / "images_withheld")][: 1 + blind]
        if not worker.is_first:
            for asked, place in runs:
                answer_share(model, asked, reader, folder=place, worker=worker, **options)
            continue
        shown, *without = [
            run_task(model, asked, reader, folder=place, worker=worker, **options) for asked, place in runs
        ]
        results.append(DatasetResult(shown, baselines(task, shards, without[0] if without else None)))
    return results


def finish_evaluation(
    model: InstructBLIP,
    results: Sequence[DatasetResult],
    folder: Path,
    *,
    title: str,
    checkpoint: str,
    step: int,
    examples: int,
    console: Console,
) -> None:
    """Print the score table, write results.json and report.html, and name what was written."""
    weights = fingerprint_tensors(model.trainable_state())
    summary = results_json(results, checkpoint=checkpoint, fingerprint=weights, step=step)
    written = write_results(folder, title, results, summary, examples)
    console.print(score_table(title, results))
    for path in written:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
