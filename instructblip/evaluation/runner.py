"""Run one evaluation task with a model: predictions, journal, score.

Predictions are appended to a journal keyed by content (model, protocol, sample), so a killed evaluation goes on where it
stopped and counts every sample once.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instructblip.data.features import shard_pixels
from instructblip.data.shards import ShardReader
from instructblip.errors import UserError
from instructblip.evaluation.metrics.accuracy import normalize_answer
from instructblip.evaluation.outcomes import Prediction, TaskResult, class_scores, score_task
from instructblip.evaluation.protocol import EvaluationSample, Task
from instructblip.files import is_disk_full, write_atomically
from instructblip.model.instructblip import InstructBLIP
from instructblip.progress import progress_bar

Group = list[tuple[str, EvaluationSample]]  # journal keys and samples that ask the same of the same image
ReadImage = Callable[[ShardReader, int], Tensor]  # image tokens (F, P, V) or uint8 pixels (F, 3, H, W) of F frames
PREDICTIONS = "predictions.jsonl"
_GREY = 127  # a picture that shows nothing, near the middle of what encoders are normalised to


def run_task(
    model: InstructBLIP,
    task: Task,
    read_image: ReadImage,
    *,
    batch_size: int,
    model_fingerprint: str = "",
    folder: Path | None = None,
    show_progress: bool = True,
) -> TaskResult:
    """Answer every sample of a task and score the answers.

    Args:
        model: put into evaluation mode for the duration.
        task: samples and protocol.
        read_image: gives image tokens or pixels.
        batch_size: samples at a time; the result does not depend on it.
        model_fingerprint: of the weights; part of the journal's keys.
        folder: where predictions.jsonl is kept; None keeps nothing.
        show_progress: draw a progress bar.
    """
    started = time.perf_counter()
    keys = [_key(model_fingerprint, task, sample) for sample in task.samples]
    done = _read_journal(folder, set(keys))
    groups = _same_inputs(task, [pair for pair in zip(keys, task.samples, strict=True) if pair[0] not in done])
    training = model.training
    model.eval()
    try:
        for batch in _batches(groups, batch_size, task, show_progress):
            answers = _answer(model, task, [group[0][1] for group in batch], read_image)
            predictions = [
                Prediction(key, sample.id, text, scores)
                for group, (text, scores) in zip(batch, answers, strict=True)
                for key, sample in group
            ]
            done.update((prediction.key, prediction) for prediction in predictions)
            _append_journal(folder, predictions)
    finally:
        model.train(training)
    ordered = [done[key] for key in keys]
    result = score_task(task, task.samples, ordered, seconds=time.perf_counter() - started)
    if folder is not None:
        lines = map(_line, task.samples, ordered, result.per_sample)
        write_atomically(folder / PREDICTIONS, "\n".join(lines) + "\n")
    return result


def blank_image(image_size: int) -> Tensor:
    """A mid-grey uint8 picture (3, H, W), which stands for an image that is withheld."""
    return torch.full((3, image_size, image_size), _GREY, dtype=torch.uint8)


def read_pixels(image_size: int) -> ReadImage:
    """A reader that decodes and squashes images, for use without a feature cache."""

    return partial(shard_pixels, image_size=image_size)


def _same_inputs(task: Task, pairs: Iterable[tuple[str, EvaluationSample]]) -> list[Group]:
    """(key, sample) pairs with the same image and prompt together, to be answered once; short prompts first.

    Prompts of one length in a batch mean less padding. With images withheld all samples share one image.
    """
    groups: dict[tuple[str, str], Group] = {}
    for key, sample in pairs:
        image = "" if task.protocol.images == "withheld" else sample.image_key
        groups.setdefault((image, sample.prompt), []).append((key, sample))
    return sorted(groups.values(), key=lambda group: len(group[0][1].prompt))


def _answer(
    model: InstructBLIP, task: Task, samples: Sequence[EvaluationSample], read_image: ReadImage
) -> list[tuple[str, tuple[float, ...]]]:
    """Text and candidate scores (none for open generation) for each sample."""
    protocol = task.protocol
    images = _images(model, task, samples, read_image)
    prompts = [sample.prompt for sample in samples]
    if protocol.mode == "generate":
        texts = model.generate(
            images,
            prompts,
            num_beams=protocol.num_beams,
            max_new_tokens=protocol.max_new_tokens,
            min_new_tokens=protocol.min_new_tokens,
            length_penalty=protocol.length_penalty,
            repetition_penalty=protocol.repetition_penalty,
        )
        classes = {normalize_answer(text): label for text, label in protocol.verbalizers}
        return [(classes.get(normalize_answer(text), text), ()) for text in texts]
    candidates = [list(task.candidates(sample.record)) for sample in samples]
    scores = model.rank(images, prompts, candidates, normalize=protocol.normalize, include_eos=protocol.include_eos)
    answers = []
    for texts, row in zip(candidates, scores, strict=True):
        names, values = class_scores(protocol, texts, row.tolist())
        answers.append((names[values.index(max(values))], tuple(row.tolist())))
    return answers


def _images(model: InstructBLIP, task: Task, samples: Sequence[EvaluationSample], read_image: ReadImage) -> Tensor:
    if task.protocol.images == "withheld":
        blank = model.image_tokens(blank_image(model.vision.image_size)[None, None])
        return blank.expand(len(samples), -1, -1, -1)
    unique: dict[str, Tensor] = {}
    for sample in samples:
        if sample.image_key not in unique:
            unique[sample.image_key] = read_image(sample.shard, sample.row)
    tokens = model.image_tokens(torch.stack(list(unique.values())))
    place = {key: number for number, key in enumerate(unique)}
    return tokens[[place[sample.image_key] for sample in samples]]


def _line(sample: EvaluationSample, prediction: Prediction, score: float | None) -> str:
    """A line of predictions.jsonl; the score is on the scale of `TaskResult.value`."""
    record = sample.record
    line: dict[str, Any] = {"key": prediction.key, "id": prediction.id, "prompt": sample.prompt}
    line["answers"] = list(record.answers or record.captions)
    line |= {"prediction": prediction.prediction, "score": score, "scores": list(prediction.scores)}
    if prediction.ranked:
        line["ranked"] = list(prediction.ranked)
    return json.dumps(line, ensure_ascii=False)


def _key(model_fingerprint: str, task: Task, sample: EvaluationSample) -> str:
    content = "\n".join((model_fingerprint, task.protocol.sha256(), sample.id))
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _read_journal(folder: Path | None, wanted: set[str]) -> dict[str, Prediction]:
    """Predictions of an earlier, perhaps killed, run of the same protocol with the same model."""
    found: dict[str, Prediction] = {}
    if folder is None or not (folder / PREDICTIONS).exists():
        return found
    for line in (folder / PREDICTIONS).read_text(encoding="utf-8").split("\n"):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a killed run may be cut: its sample is simply answered again
        if entry["key"] in wanted:
            found[entry["key"]] = Prediction(entry["key"], entry["id"], entry["prediction"], tuple(entry["scores"]))
    return found


def _append_journal(folder: Path | None, predictions: Iterable[Prediction]) -> None:
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"key": item.key, "id": item.id, "prediction": item.prediction, "scores": list(item.scores)})
        for item in predictions
    ]
    try:
        with open(folder / PREDICTIONS, "a", encoding="utf-8") as file:
            file.write("\n" + "\n".join(lines) + "\n")  # the leading line break ends a cut line
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise UserError(
            f"disk full while writing {folder / PREDICTIONS}; free some space and run the same command again: "
            "it goes on where it stopped"
        ) from None


def _batches(groups: Sequence[Group], size: int, task: Task, show: bool) -> Iterable[Sequence[Group]]:
    """`size` groups at a time, under a progress bar that counts their samples."""
    with progress_bar("questions", show=show) as progress:
        title = f"evaluating {task.card.name}" + (", images withheld" if task.protocol.images == "withheld" else "")
        bar = progress.add_task(title, total=sum(len(group) for group in groups))
        for start in range(0, len(groups), size):
            batch = groups[start : start + size]
            yield batch
            progress.advance(bar, sum(len(group) for group in batch))
