"""Several evaluation tasks with one model, and the files that remain. Used by evaluate.py and at the end of training."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from torch import Tensor

from instructblip.data.features import FeatureCache
from instructblip.data.shards import ShardReader
from instructblip.evaluation.protocol import Task, withheld
from instructblip.evaluation.results import DatasetResult, baselines, results_json, score_table, write_results
from instructblip.evaluation.runner import ReadImage, read_pixels, run_task
from instructblip.model.frozen import fingerprint, fingerprint_tensors
from instructblip.model.instructblip import InstructBLIP


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
    return cached_images(model, feature_cache(model, cache_folder), list(shards.values()), "encoding images")


def evaluate_tasks(
    model: InstructBLIP,
    tasks: Sequence[Task],
    read_image: ReadImage,
    *,
    shards: Path,
    folder: Path,
    batch_size: int,
    blind: bool,
) -> list[DatasetResult]:
    """Run tasks and their baselines; predictions are kept below `folder/<dataset>`.

    Args:
        shards: folder of prepared datasets, for the majority baseline.
        blind: also answer every question with the images withheld.
    """
    weights = fingerprint_tensors(model.trainable_state())
    results = []
    for task in tasks:
        run = partial(run_task, model, batch_size=batch_size, model_fingerprint=weights, read_image=read_image)
        home = folder / task.card.name
        result = run(task, folder=home)
        blind_result = run(withheld(task), folder=home / "images_withheld") if blind else None
        results.append(DatasetResult(result, baselines(task, shards, blind_result)))
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
