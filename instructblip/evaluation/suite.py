"""Several evaluation tasks with one model, and the files that remain. Used by evaluate.py and at the end of training."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from instructblip.data.features import FeatureCache
from instructblip.data.shards import ShardReader
from instructblip.evaluation.distributed import ALONE, Worker
from instructblip.evaluation.protocol import Task, withheld
from instructblip.evaluation.results import DatasetResult, baselines, results_json, score_table, write_results
from instructblip.evaluation.runner import ReadImage, answer_share, read_pixels, run_task
from instructblip.evaluation.submissions import SUBMISSION
from instructblip.files import exclusive
from instructblip.loading import FrozenPart
from instructblip.model.frozen import fingerprint, fingerprint_tensors
from instructblip.model.instructblip import InstructBLIP
from instructblip.model.llm import LLM_KINDS
from instructblip.model.quantized import QuantizedLinear

_WITHHELD = "images_withheld"  # folder of a dataset's blind answers, below its others


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


def model_identity(model: InstructBLIP, frozen: Mapping[str, str]) -> str:
    """SHA-256 of all that a model's answers depend on: every weight, frozen or not, and how texts and images enter.

    `frozen` are the frozen parts' fingerprints: computing them takes a while, and all of the weights.
    """
    llm, vision = model.llm, model.vision
    conventions = [
        [llm.image_prefix_ids, llm.prompt_ids("A word?"), llm.target_ids("A word.")],
        [model.max_instruction_tokens, model.qformer.instruction_aware],
        [vision.image_size, vision.mean.tolist(), vision.std.tolist(), str(vision.layers), str(vision.grid)],
    ]
    parts = [fingerprint_tensors(model.trainable_state()), *frozen.values()]
    return hashlib.sha256(json.dumps([parts, conventions]).encode()).hexdigest()


def describe_model(model: InstructBLIP, parts: Mapping[str, FrozenPart], frozen: Mapping[str, str]) -> dict[str, Any]:
    """What results.json says of a model: its frozen parts by name, how they are held, and fingerprints.

    Args:
        model: what was evaluated.
        parts: its `llm` and `vision`.
        frozen: the fingerprints of both.
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
    described = {name: {**parts[name]._asdict(), **held[name], "sha256": frozen[name]} for name in held}
    return {"sha256": model_identity(model, frozen), **described}


def llm_kind(model: InstructBLIP) -> str:
    """`decoder` or `encoder_decoder`."""
    return next(name for name, kind in LLM_KINDS.items() if isinstance(model.llm, kind))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
    tolerance: int = 0,
    worker: Worker = ALONE,
) -> list[DatasetResult]:
    """Run tasks and their baselines; answers are kept below `folder/<dataset>`.

    What an earlier evaluation made of other answers is removed there as soon as a task has its new ones.

    Args:
        shards: folder of prepared datasets, for the majority baseline.
        blind: also answer every question with the images withheld.
        frozen: fingerprints of the frozen parts.
        tolerance: samples that may fail, for each task.
        worker: which of several processes this is.

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
        runs = [(task, home), (withheld(task), home / _WITHHELD)][: 1 + blind]
        found = []
        for asked, place in runs:
            if not worker.is_first:
                answer_share(model, asked, reader, folder=place, worker=worker, **options)
                continue
            found.append(run_task(model, asked, reader, folder=place, worker=worker, **options))
            (place / SUBMISSION).unlink(missing_ok=True)
        if not worker.is_first:
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
    examples: int,
    console: Console,
) -> None:
    """Print the score table, write results.json and report.html, and name what was written.

    Args:
        model, results: what was evaluated, and what `evaluate_tasks` gave.
        folder: as there.
        title: of the table and the report.
        checkpoint, step: where the trained weights come from.
        parts, frozen: names and fingerprints of the frozen parts.
        examples: samples shown for each dataset.
        console: for the table.

    Raises:
        UserError: as `write_results`.
    """
    weights = fingerprint_tensors(model.trainable_state())
    described = describe_model(model, parts, frozen)
    summary = results_json(results, checkpoint=checkpoint, fingerprint=weights, step=step, model=described)
    written = write_results(folder, title, results, summary, examples)
    console.print(score_table(title, results))
    for path in written:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
