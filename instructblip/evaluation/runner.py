"""Run one evaluation task with a model: read images, encode, ask, append the answers to the journal, score them.

How the work is cut into chunks and batches depends on the task and the batch size alone, so an interruption or another
number of processes changes no answer. docs/evaluate.md, "Design", explains chunks and the journal.
"""

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from instructblip.data.feature_cache import ReadImage, shard_pixels
from instructblip.distributed import ALONE, Ranks
from instructblip.errors import DamagedSample, UserError
from instructblip.evaluation.journal import Journal, journal_keys
from instructblip.evaluation.metrics.accuracy import normalize_answer
from instructblip.evaluation.outcomes import Failure, Prediction, TaskResult, class_scores, score_task
from instructblip.evaluation.protocol import EvaluationSample, Task
from instructblip.evaluation.results_file import PREDICTIONS
from instructblip.files import sha256_file
from instructblip.models.instructblip import InstructBLIP
from instructblip.progress import progress_bar

logger = logging.getLogger(__name__)
Answer = tuple[str, tuple[float, ...], tuple[int, ...]]  # text, scores and what they are of, as in `Prediction`
Item = TypeVar("Item")
Result = TypeVar("Result")

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


class BatchLimit:
    """A batch size that is halved whenever memory runs out, and never raised again."""

    def __init__(self, size: int) -> None:
        self.size = size

    def run(self, items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]) -> list[Result]:
        """Apply `work` to all items, as many at a time as memory holds.

        Raises:
            UserError: memory does not hold a single item.
        """
        done: list[Result] = []
        while len(done) < len(items):
            batch = items[len(done) : len(done) + self.size]
            results = self._try(batch, work)
            if results is not None:
                done += results
            elif len(batch) == 1:
                raise UserError(
                    "one question alone does not fit into the GPU's memory; use a smaller model or another GPU"
                )
            else:
                self.size = len(batch) // 2
                logger.warning("out of memory with a batch of %d; going on with %d", len(batch), self.size)
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        return done

    @staticmethod
    def _try(batch: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]]) -> Sequence[Result] | None:
        try:
            return work(batch)
        except torch.OutOfMemoryError:
            return None  # its tensors are freed with its stack frame


def run_task(
    model: InstructBLIP,
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
    _answer_chunks(
        model, task, read_image, journal, cut_work(task, keys, batch_size), batch_size, tolerance, show_progress
    )
    journal.wait_for_others(task.card.name)
    _check_failures(task, journal, tolerance)
    answered = [(key, sample) for key, sample in zip(keys, task.samples, strict=True) if key in journal.predictions]
    if not answered:
        raise UserError(f"{task.card.name}: not one sample could be answered; prepare it again")
    samples, predictions = [sample for _, sample in answered], [journal.predictions[key] for key, _ in answered]
    failures = [journal.failures[key] for key in keys if key in journal.failures]
    result = score_task(task, samples, predictions, seconds=time.perf_counter() - started, failures=failures)
    journal.finish(zip(samples, predictions, result.per_sample, strict=True))
    return result if folder is None else replace(result, predictions_sha256=sha256_file(folder / PREDICTIONS))


def answer_share(
    model: InstructBLIP,
    task: Task,
    read_image: ReadImage,
    *,
    batch_size: int,
    model_fingerprint: str,
    folder: Path,
    ranks: Ranks,
    tolerance: int = 0,
) -> None:
    """Answer the share of a rank that is not the first, into its journal; arguments and errors as `run_task`."""
    keys = journal_keys(model_fingerprint, task)
    journal = Journal(folder, keys, ranks)
    _answer_chunks(
        model, task, read_image, journal, cut_work(task, keys, batch_size), batch_size, tolerance, show=False
    )


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


def _answer_chunks(
    model: InstructBLIP,
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
    limit, training = BatchLimit(batch_size), model.training
    blind = task.protocol.images == "withheld"
    with progress_bar("questions", show=show) as progress:
        bar = progress.add_task(_title(task, journal.ranks), total=sum(map(_samples, left)))
        model.eval()
        try:
            for chunk, pixels in _read_ahead(left, None if blind else read_image):
                images = _blank(model, chunk) if blind else _images(model, chunk, pixels, journal, limit)
                _check_failures(task, journal, tolerance)
                for batch in cut_chunk(chunk, batch_size):
                    journal.ranks.poll_stop()
                    asked = [question for question in batch if question.sample.image_key in images]
                    if any(key not in journal for question in asked for key in question.keys):
                        pairs = [(question, images[question.sample.image_key]) for question in asked]
                        answers = limit.run(pairs, partial(_ask, model, task))
                        journal.append(_new_predictions(asked, answers, journal))
                    progress.advance(bar, _samples(batch))
        finally:
            model.train(training)


def _title(task: Task, ranks: Ranks) -> str:
    withheld = ", images withheld" if task.protocol.images == "withheld" else ""
    shared = f", share of process 1 of {ranks.world_size}" if ranks.world_size > 1 else ""
    return f"evaluating {task.card.name}{withheld}{shared}"


def _samples(questions: Chunk) -> int:
    return sum(len(question.keys) for question in questions)


def _blank(model: InstructBLIP, chunk: Chunk) -> dict[str, Tensor]:
    """The tokens of a grey picture for every image of the chunk."""
    tokens = model.image_tokens(blank_image(model.vision.image_size)[None, None])[0]
    return {question.sample.image_key: tokens for question in chunk}


def _read_ahead(
    chunks: Sequence[Chunk], read_image: ReadImage | None
) -> Iterator[tuple[Chunk, dict[str, Future[Tensor]]]]:
    """Each chunk with its images by key, the next chunk's being read meanwhile; none when images are withheld."""
    if read_image is None:
        yield from ((chunk, {}) for chunk in chunks)
        return
    with ThreadPoolExecutor(_READERS) as pool:

        def start(chunk: Chunk) -> dict[str, Future[Tensor]]:
            samples = {question.sample.image_key: question.sample for question in chunk}
            return {key: pool.submit(read_image, sample.shard, sample.row) for key, sample in samples.items()}

        try:
            following = start(chunks[0]) if chunks else {}
            for number, chunk in enumerate(chunks):
                current, following = following, start(chunks[number + 1]) if number + 1 < len(chunks) else {}
                yield chunk, current
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _images(
    model: InstructBLIP, chunk: Chunk, pixels: dict[str, Future[Tensor]], journal: Journal, limit: BatchLimit
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
def _ask(model: InstructBLIP, task: Task, batch: Sequence[tuple[Question, Tensor]]) -> list[Answer]:
    """The model's answers to questions, from image tokens."""
    protocol, samples = task.protocol, [question.sample for question, _ in batch]
    images, prompts = torch.stack([tokens for _, tokens in batch]), [sample.prompt for sample in samples]
    if protocol.mode == "generate":
        texts = model.generate(
            images,
            prompts,
            num_beams=protocol.num_beams,
            max_new_tokens=protocol.max_new_tokens,
            min_new_tokens=protocol.min_new_tokens,
            length_penalty=protocol.length_penalty,
            repetition_penalty=protocol.repetition_penalty,
            beam_lengths=protocol.beam_lengths,
        )
        classes = {normalize_answer(text): label for text, label in protocol.verbalizers}
        return [(classes.get(normalize_answer(text), text), (), ()) for text in texts]
    candidates = [task.candidates(sample.record) for sample in samples]
    scores = model.rank(images, prompts, candidates, normalize=protocol.normalize, include_eos=protocol.include_eos)
    for sample, row in zip(samples, scores, strict=True):
        if not row.isfinite().all():
            raise _not_finite(sample)
    return [_ranked(task, texts, row.tolist()) for texts, row in zip(candidates, scores, strict=True)]


def _not_finite(sample: EvaluationSample) -> UserError:
    return UserError(
        f"{sample.id}: the model's log-likelihoods are not finite; weights are damaged, or overflow in their dtype"
    )


def _ranked(task: Task, candidates: Sequence[str], scores: list[float]) -> Answer:
    """The likeliest class, the first of equals, and the scores to keep."""
    names, values = class_scores(task.protocol, candidates, scores)
    best = names[values.index(max(values))]
    if len(scores) <= _MOST_SCORES:
        return best, tuple(scores), ()
    ranked = sorted(range(len(scores)), key=lambda number: -scores[number])[:_BEST_SCORES]
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
