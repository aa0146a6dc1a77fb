"""Run one evaluation task with a model: read images, encode, ask, append the answers to the journal, score them.

How the work is cut into chunks and batches depends on the task and the batch size alone, so an interruption or another
number of processes changes no answer. docs/evaluate.md, "Design", explains chunks and the journal.
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from instructblip.data.feature_cache import ReadImage, shard_pixels
from instructblip.distributed import ALONE, Ranks
from instructblip.errors import DamagedSample, UserError
from instructblip.evaluation.journal import Journal, journal_keys
from instructblip.evaluation.metrics.accuracy import normalize_answer
from instructblip.evaluation.outcomes import Failure, Prediction, TaskResult, class_scores, score_task
from instructblip.evaluation.precision import computing
from instructblip.evaluation.protocol import EvaluationSample, Protocol, Task, refuse_unable
from instructblip.evaluation.results_file import PREDICTIONS
from instructblip.evaluation.retrieval import answer_pairs, remove_images
from instructblip.evaluation.work import BatchLimit, read_ahead
from instructblip.files import sha256_file
from instructblip.models.arguments import of_samples
from instructblip.models.base import Model
from instructblip.models.decoding import cut_at
from instructblip.models.facts import SEARCH
from instructblip.progress import progress_bar

logger = logging.getLogger(__name__)
Answer = tuple[str, tuple[float, ...], tuple[int, ...]]  # text, scores and what they are of, as in `Prediction`

_GREY = 127  # of a withheld image: near the middle of the range that encoders expect
_BATCHES_PER_CHUNK = 4
_READERS = 4  # threads that read and decode the next chunk's images meanwhile
_MOST_SCORES = 200  # of more candidates only the best scores are kept
_BEST_SCORES = 10


@dataclass(frozen=True)
class Question:
    """Samples with the same prompt on the same image, answered once; their journal keys beside them."""

    keys: tuple[str, ...]
    samples: tuple[EvaluationSample, ...]

    @property
    def sample(self) -> EvaluationSample:
        """The one that is asked."""
        return self.samples[0]


Chunk = Sequence[Question]


def run_task(
    model: Model,
    task: Task,
    read_image: ReadImage,
    *,
    batch_size: int,
    model_fingerprint: str = "",
    folder: Path | None = None,
    tolerance: int = 0,
    ranks: Ranks = ALONE,
    show_progress: bool = True,
) -> TaskResult:
    """Answer a task's samples, or the first rank's share of them, wait for the others' and score all answers.

    Args:
        model: put into evaluation mode for the duration.
        task: samples and protocol.
        read_image: gives image tokens or pixels; called from several threads.
        batch_size: questions at a time; the result does not depend on it.
        model_fingerprint: of the weights; part of the journal's keys.
        folder: where answers are kept; None keeps nothing. All ranks need the same one.
        tolerance: how many samples may fail, because their image is damaged.
        ranks: which of the processes this is; the others call `answer_share` at the same time.
        show_progress: draw a progress bar.

    Raises:
        UserError: more samples fail than are tolerated; a share does not come; the disk is full.
    """
    started = time.perf_counter()
    keys = journal_keys(model_fingerprint, task)
    journal = Journal(folder, keys, ranks)
    _answer(model, task, read_image, journal, keys, batch_size, tolerance, show=show_progress)
    journal.wait_for_others(task.card.name)
    _check_failures(task, journal, tolerance)
    answered = [(key, sample) for key, sample in zip(keys, task.samples, strict=True) if key in journal.predictions]
    if not answered:
        raise UserError(f"{task.card.name}: not one sample could be answered; prepare it again")
    samples, predictions = [sample for _, sample in answered], [journal.predictions[key] for key, _ in answered]
    failures = [journal.failures[key] for key in keys if key in journal.failures]
    result = score_task(task, samples, predictions, seconds=time.perf_counter() - started, failures=failures)
    journal.finish(zip(samples, predictions, result.per_sample, strict=True))
    if folder is not None:
        remove_images(folder)
    return result if folder is None else replace(result, predictions_sha256=sha256_file(folder / PREDICTIONS))


def answer_share(
    model: Model,
    task: Task,
    read_image: ReadImage,
    *,
    batch_size: int,
    model_fingerprint: str,
    folder: Path,
    ranks: Ranks,
    tolerance: int = 0,
) -> None:
    """Answer the share of a rank that is not the first, into its journal; arguments and errors as `run_task`.

    Where it cannot, the first rank is told, which would wait for it.
    """
    keys = journal_keys(model_fingerprint, task)
    journal = Journal(folder, keys, ranks)
    try:
        _answer(model, task, read_image, journal, keys, batch_size, tolerance, show=False)
    except UserError as error:
        journal.give_up(str(error))
        raise


def blank_image(image_size: int) -> Tensor:
    """A mid-grey uint8 picture (3, H, W), which stands for an image that is withheld."""
    return torch.full((3, image_size, image_size), _GREY, dtype=torch.uint8)


def read_pixels(
    image_size: int, transform: str = "resize_square", *, upright: bool = True, transparency: str = "white"
) -> ReadImage:
    """A reader that decodes images, for use without a feature cache."""
    return partial(shard_pixels, image_size=image_size, transform=transform, upright=upright, transparency=transparency)


# --- cutting the work ------------------------------------------------------------------------------------------------


def cut_work(task: Task, keys: Sequence[str], batch_size: int) -> list[Chunk]:
    """The task's questions in stored order, in chunks of at least `_BATCHES_PER_CHUNK` batches; an image is in one chunk.

    With images withheld all samples share one image, a prompt is asked once, and a chunk may end after any question.
    """
    blind = task.protocol.images == "withheld"
    same: dict[tuple[str, str, tuple[str, ...]], list[tuple[str, EvaluationSample]]] = {}
    for key, sample in zip(keys, task.samples, strict=True):
        own = sample.record.choices if task.protocol.candidates_from == "choices" else ()
        same.setdefault(("" if blind else sample.image_key, sample.prompt, own), []).append((key, sample))
    questions = [Question(*zip(*pairs, strict=True)) for pairs in same.values()]
    by_image = groupby(questions, key=lambda question: question.sample.image_key)
    together = [[question] for question in questions] if blind else [list(group) for _, group in by_image]
    chunks: list[list[Question]] = []
    for group in together:
        if not chunks or len(chunks[-1]) >= _BATCHES_PER_CHUNK * batch_size:
            chunks.append([])
        chunks[-1] += group
    return list(chunks)


def cut_chunk(chunk: Chunk, batch_size: int) -> Iterator[Chunk]:
    """Batches of a chunk: one number of frames in each, and prompts of like length, so that little is padding."""
    in_order = sorted(chunk, key=lambda question: (question.sample.frames, len(question.sample.prompt)))
    for _, group in groupby(in_order, key=lambda question: question.sample.frames):
        alike = list(group)
        for start in range(0, len(alike), batch_size):
            yield alike[start : start + batch_size]


# --- answering -------------------------------------------------------------------------------------------------------


def _answer(
    model: Model,
    task: Task,
    read_image: ReadImage,
    journal: Journal,
    keys: Sequence[str],
    batch_size: int,
    tolerance: int,
    *,
    show: bool,
) -> None:
    """Answer the rank's share of the task, with the model in evaluation mode for the duration."""
    refuse_unable([task], model.SKILLS, type(model).__name__)
    training = model.training
    model.eval()
    try:
        with computing(task.protocol.precision, model.device):
            if task.protocol.mode == "retrieve":
                answer_pairs(model, task, read_image, journal, keys, batch_size=batch_size, show=show)
            else:
                chunks = cut_work(task, keys, batch_size)
                _answer_chunks(model, task, read_image, journal, chunks, batch_size, tolerance, show)
    finally:
        model.train(training)


def _answer_chunks(
    model: Model,
    task: Task,
    read_image: ReadImage,
    journal: Journal,
    chunks: Sequence[Chunk],
    batch_size: int,
    tolerance: int,
    show: bool,
) -> None:
    """Ask whatever of the rank's share of the chunks the journal has no answer to."""
    share = journal.ranks.share(chunks)
    left = [chunk for chunk in share if any(key not in journal for question in chunk for key in question.keys)]
    limit = BatchLimit(batch_size)
    # A language model that writes takes questions in as others end, so it is given several batches.
    given = _BATCHES_PER_CHUNK if task.protocol.mode == "generate" and "llm" in model.PARTS else 1
    blind = task.protocol.images == "withheld"
    samples = [[question.sample for question in chunk] for chunk in left]
    read = repeat({}) if blind else read_ahead(samples, read_image)
    with progress_bar("questions", show=show) as progress:
        bar = progress.add_task(_title(task, journal.ranks), total=sum(map(_samples, left)))
        for chunk, pixels in zip(left, read, strict=False):
            images = _blank(model, chunk) if blind else _images(model, chunk, pixels, journal, limit)
            _check_failures(task, journal, tolerance)
            for batch in cut_chunk(chunk, batch_size * given):
                journal.ranks.poll_stop()
                asked = [question for question in batch if question.sample.image_key in images]
                if any(key not in journal for question in asked for key in question.keys):
                    pairs = [(question, images[question.sample.image_key]) for question in asked]
                    answers = limit.run(pairs, lambda some: _ask(model, task, some, limit.size), given=given)
                    journal.append(_new_predictions(asked, answers, journal))
                progress.advance(bar, _samples(batch))


def _title(task: Task, ranks: Ranks) -> str:
    withheld = ", images withheld" if task.protocol.images == "withheld" else ""
    shared = f", share of process 1 of {ranks.world_size}" if ranks.world_size > 1 else ""
    return f"evaluating {task.card.name}{withheld}{shared}"


def _samples(questions: Chunk) -> int:
    return sum(len(question.keys) for question in questions)


def _blank(model: Model, chunk: Chunk) -> dict[str, Tensor]:
    """The tokens of a grey picture for every image of the chunk."""
    tokens = model.image_tokens(blank_image(model.vision.image_size)[None, None])[0]
    return {question.sample.image_key: tokens for question in chunk}


def _images(
    model: Model, chunk: Chunk, pixels: dict[str, Future[Tensor]], journal: Journal, limit: BatchLimit
) -> dict[str, Tensor]:
    """Tokens (F, P, V) of the chunk's images by key; the questions on damaged ones are noted as failures."""
    read: dict[str, Tensor] = {}
    for key, future in pixels.items():
        try:
            read[key] = future.result()
        except DamagedSample as error:
            lost = [question for question in chunk if question.sample.image_key == key]
            pairs = [pair for question in lost for pair in zip(question.keys, question.samples, strict=True)]
            failed = [Failure(name, sample.id, str(error)) for name, sample in pairs if name not in journal]
            journal.append([], failed)
    tokens: dict[str, Tensor] = {}
    for _, group in groupby(sorted(read, key=lambda key: len(read[key])), key=lambda key: len(read[key])):
        alike = list(group)
        encoded = limit.run(alike, lambda batch: list(model.image_tokens(torch.stack([read[key] for key in batch]))))
        tokens |= dict(zip(alike, encoded, strict=True))
    return tokens


@torch.inference_mode()
def _ask(model: Any, task: Task, batch: Sequence[tuple[Question, Tensor]], at_once: int) -> list[Answer]:
    """The model's answers to questions, from image tokens, of which at most `at_once` are worked on together.

    Raises:
        UserError: a question that the model cannot take, or answers with no numbers; names its sample.
    """
    try:
        return _answers(model, task, batch, at_once)
    except ValueError as error:
        raise of_samples(error, [question.sample.id for question, _ in batch]) from None


def _answers(model: Any, task: Task, batch: Sequence[tuple[Question, Tensor]], at_once: int) -> list[Answer]:
    protocol, samples = task.protocol, [question.sample for question, _ in batch]
    images, prompts = torch.stack([tokens for _, tokens in batch]), [sample.prompt for sample in samples]
    if protocol.mode == "match":
        return _judgements(model, task, images, samples)
    if protocol.mode == "generate":
        decoding = {name: getattr(protocol, name) for name in SEARCH}
        some = {"at_once": at_once} if "llm" in model.PARTS else {}
        if task.needs(model.SKILLS) == "caption":
            return [(cut_at(text, protocol.until), (), ()) for text in model.generate(images, **some, **decoding)]
        # Beams are counted in more ways than one by the released code of language models alone.
        counted = {"beam_lengths": protocol.beam_lengths} if "llm" in model.PARTS else {}
        written = model.generate(images, prompts, **some, **counted, **decoding)
        texts = [cut_at(text, protocol.until) for text in written]
        classes = {normalize_answer(text): label for text, label in protocol.verbalizers}
        return [(classes.get(normalize_answer(text), text), (), ()) for text in texts]
    candidates = [task.candidates(sample.record) for sample in samples]
    released = dict(model.RELEASED_RANKING) if protocol.preset == "lavis" else {}
    options = {"normalize": protocol.normalize, "include_eos": protocol.include_eos, **released}
    if "llm" in model.PARTS and min(map(len, candidates)) > _MOST_SCORES and not _adds_up(protocol):
        options["best"] = _BEST_SCORES  # more are not kept
    scores = model.rank(images, prompts, candidates, **options)
    for sample, row in zip(samples, scores, strict=True):
        # What a model did not choose to rank has -inf.
        numbers = row[row > -torch.inf] if {"preselect", "best"} & options.keys() else row
        if not numbers.isfinite().all() or row.isnan().any():
            raise _not_finite(sample)
    return [_ranked(task, texts, row.tolist()) for texts, row in zip(candidates, scores, strict=True)]


def _adds_up(protocol: Protocol) -> bool:
    """Whether a class has several texts whose likelihoods are added, so that each of them counts."""
    return protocol.aggregate == "sum" and len(set(protocol.classes)) < len(protocol.classes)


def _judgements(model: Any, task: Task, images: Tensor, samples: Sequence[EvaluationSample]) -> list[Answer]:
    """Whether each statement is true of its image, with the log-probabilities of no match and match.

    These are kept where `match` gives a probability, which is 1 in float32 for many a statement: AUROC orders them.
    """
    statements = [sample.prompt for sample in samples]
    texts = model.tokenize(statements, max_tokens=task.protocol.max_text_tokens)
    logits_B2 = model.encode_pairs(model.normalised(model.image_tokens(images)), *texts).logits_B2
    scores_B2 = logits_B2.float().log_softmax(dim=1)
    for sample, row in zip(samples, scores_B2, strict=True):
        if not row.isfinite().all():
            raise _not_finite(sample)
    return [
        _ranked(task, task.candidates(sample.record), row)
        for sample, row in zip(samples, scores_B2.tolist(), strict=True)
    ]


def _not_finite(sample: EvaluationSample) -> UserError:
    return UserError(
        f"{sample.id}: the model's log-likelihoods are not finite; weights are damaged, or overflow in their dtype"
    )


def _ranked(task: Task, candidates: Sequence[str], scores: list[float]) -> Answer:
    """The likeliest class, the first of equals, and the scores to keep."""
    names, values = class_scores(task.protocol, candidates, scores)
    best = names[values.index(max(values))]
    scored = [number for number, score in enumerate(scores) if score > -math.inf]
    if len(scored) == len(scores) <= _MOST_SCORES:
        return best, tuple(scores), ()
    ranked = sorted(scored, key=lambda number: -scores[number])[:_BEST_SCORES]
    return best, tuple(scores[number] for number in ranked), tuple(ranked)


def _new_predictions(asked: Chunk, answers: Sequence[Answer], journal: Journal) -> list[Prediction]:
    return [
        Prediction(key, sample.id, *answer)
        for question, answer in zip(asked, answers, strict=True)
        for key, sample in zip(question.keys, question.samples, strict=True)
        if key not in journal
    ]


def _check_failures(task: Task, journal: Journal, tolerance: int) -> None:
    if len(journal.failures) <= tolerance:
        return
    failures = list(journal.failures.values())
    more = f"{len(failures)} samples failed where tolerance={tolerance} allows no more, the first " if tolerance else ""
    hint = "" if tolerance else f"; or give tolerance={len(failures)} to count such samples and leave them out"
    raise UserError(f"{task.card.name}: {more}{failures[0].id}: {failures[0].reason}{hint}")
