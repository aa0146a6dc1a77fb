"""The journal of an evaluation: each answer is appended as soon as it is known, keyed by content.

Each process writes its own `journal-<rank>.jsonl`. When all answers are there, they become `predictions.jsonl`; failed
samples stand in `failures.jsonl`. The key is a hash of model, sample and protocol but for the metric, so a killed evaluation
goes on where it stopped, on any number of processes, and no other question takes an answer up. Each line has a checksum: a
damaged one is no answer, and its sample is answered again.
"""

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from instructblip.distributed import ALONE, SILENCE_SECONDS, Ranks
from instructblip.errors import LostRankError, UserError
from instructblip.evaluation.heartbeat import watched
from instructblip.evaluation.outcomes import Failure, Prediction, Ranking
from instructblip.evaluation.protocol import UNSTATED, EvaluationSample, Task, as_json
from instructblip.evaluation.results_file import PREDICTIONS, RESULTS, StoredRun, read_run
from instructblip.files import (
    CHECKSUM,
    checksum_holds,
    claimed_folder,
    errors_for_users,
    read_json,
    with_checksum,
    write_atomically,
    write_json,
)

logger = logging.getLogger(__name__)

FAILURES = "failures.jsonl"
_JOURNALS = "journal-*.jsonl"
_GAVE_UP = "gave-up-*.json"
_ELSEWHERE = "move it away, or give another name="
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 2.0  # seconds between looks at the others' journals


def journal_keys(model_fingerprint: str, task: Task) -> list[str]:
    """The key of each sample's answer, in stored order.

    Of the model and of all that it is asked by; not of the metric: another one scores the same answers.
    """
    protocol = replace(task.protocol, metric="", metric_sha256="").sha256()
    contents = ("\n".join((model_fingerprint, protocol, sample.id)) for sample in task.samples)
    return [hashlib.sha256(content.encode()).hexdigest()[:32] for content in contents]


class _Place(NamedTuple):
    """Which file it was, and how many of its bytes were read: whole lines."""

    file: tuple[int, int, int]
    read_to: int


class Journal:
    """Answers of one task, in memory and below `folder`.

    Args:
        folder: None keeps nothing on disk.
        keys: of the task's samples; others' answers in the files are passed over.
        ranks: whose file is appended to.

    Attributes:
        ranks: see above.
        predictions, failures: what is known so far, by key.
    """

    def __init__(self, folder: Path | None, keys: Sequence[str], ranks: Ranks = ALONE) -> None:
        if folder is None and ranks.world_size > 1:
            raise ValueError("several processes need a folder to put their answers together in")
        self.folder = folder
        self.ranks = ranks
        self.predictions: dict[str, Prediction] = {}
        self.failures: dict[str, Failure] = {}
        self._keys = frozenset(keys)
        self._path = None if folder is None else folder / f"journal-{ranks.rank}.jsonl"
        self._places: dict[Path, _Place] = {}
        self._appended = False
        self.read()

    @property
    def missing(self) -> int:
        """Samples with neither an answer nor a failure."""
        return len(self._keys) - len(self.predictions) - len(self.failures)

    def __contains__(self, key: str) -> bool:
        return key in self.predictions or key in self.failures

    def read(self) -> None:
        """Read the new lines of every process's journal.

        Raises:
            UserError: a file that cannot be read, or that is no evaluation's.
        """
        if self.folder is None:
            return
        for path in sorted(self.folder.glob(_JOURNALS)):
            self._read_file(path)
        for name in (PREDICTIONS, FAILURES):
            self._read_file(self.folder / name)

    def append(self, predictions: Iterable[Prediction], failures: Iterable[Failure] = ()) -> None:
        """Add answers: to the file first, then to memory.

        Raises:
            UserError: the disk is full, the folder may not be written, or the file is not there any more.
        """
        predictions, failures = list(predictions), list(failures)
        lines = [*map(_prediction_line, predictions), *map(_failure_line, failures)]
        if self._path is not None:
            if self._appended and not self._path.exists():
                raise UserError(
                    f"{self._path} was deleted or moved while the evaluation was writing to it; run the same command again"
                )
            _append(self._path, lines)
            self._appended = True
        for prediction in predictions:
            self.predictions[prediction.key] = prediction
            self.failures.pop(prediction.key, None)  # it had failed before
        self.failures.update((item.key, item) for item in failures)

    def give_up(self, reason: str) -> None:
        """Tell the first rank that the share of this one will not come, and why."""
        if self.folder is not None:
            write_json(self.folder / f"gave-up-{self.ranks.rank}.json", reason)

    def _check_given_up(self) -> None:
        for path in sorted(self.folder.glob(_GAVE_UP)) if self.folder is not None else ():
            raise UserError(str(read_json(path)))

    def wait_for_others(self, what: str) -> None:
        """Return when all answers are there.

        Raises:
            UserError: as `wait_until_none`.
        """

        def missing() -> int:
            self.read()
            return self.missing

        self.wait_until_none(missing, f"answers of {what}")

    def wait_until_none(self, missing: Callable[[], int], what: str) -> None:
        """Return when nothing is missing that the other processes make.

        Raises:
            UserError: another process gave up this task; a LostRankError, that it is gone, or nothing new has come for
                `SILENCE_SECONDS`.
        """
        pause, since, before = _FIRST_PAUSE, time.monotonic(), missing()
        while before:
            time.sleep(pause)
            self.ranks.poll_stop()
            if now := missing():
                self._check_given_up()
            pause = min(2 * pause, _LONGEST_PAUSE)
            if now != before:
                since, before = time.monotonic(), now
            elif time.monotonic() - since > SILENCE_SECONDS:
                raise LostRankError(
                    f"{now} {what} are missing and none has come for {SILENCE_SECONDS / 60:g} minutes: "
                    "another process must have died; run the same command again, it goes on where it stopped"
                )

    def finish(self, samples: Iterable[tuple[EvaluationSample, Prediction, float | None]]) -> None:
        """Put all answers into predictions.jsonl, the failures beside them, and remove the journals.

        Args:
            samples: what was answered, in stored order, with its score on the scale of `TaskResult.value`.

        Raises:
            UserError: as `append`.
        """
        if self.folder is None:
            return
        lines = [_finished_line(sample, prediction, score) for sample, prediction, score in samples]
        write_atomically(self.folder / PREDICTIONS, "\n".join(lines) + "\n")
        if self.failures:
            write_atomically(self.folder / FAILURES, "\n".join(map(_failure_line, self.failures.values())) + "\n")
        old = [] if self.failures else [self.folder / FAILURES]
        with errors_for_users(self.folder):
            for path in (*old, *self.folder.glob(_JOURNALS), *self.folder.glob(_GAVE_UP)):
                path.unlink(missing_ok=True)

    def _read_file(self, path: Path) -> None:
        try:
            with open(path, "rb") as file:
                start = self._unread(path, os.fstat(file.fileno()))
                if start is None:
                    return
                file.seek(start)
                content = file.read()
        except FileNotFoundError:  # a journal that was put together and removed: predictions.jsonl has it
            return
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); {_ELSEWHERE}") from None
        whole = content.rfind(b"\n") + 1  # what follows may be half a line
        self._places[path] = self._places[path]._replace(read_to=start + whole)
        self._take_lines(path, content[:whole].decode("utf-8", "replace").split("\n"))

    def _unread(self, path: Path, state: os.stat_result) -> int | None:
        """Where the lines of a file begin that were not read yet; None where there are none.

        Journals only grow, what was put together is replaced as a whole: while it stays the same file it is read once.
        """
        grows = path.name not in (PREDICTIONS, FAILURES)
        known = self._places.get(path)
        place = _Place((state.st_dev, state.st_ino, 0 if grows else state.st_mtime_ns), 0)
        if known is None or known.file != place.file or state.st_size < known.read_to:
            self._places[path] = known = place
        return known.read_to if state.st_size > known.read_to else None

    def _take_lines(self, path: Path, lines: Iterable[str]) -> None:
        own = damaged = foreign = 0
        for line in filter(None, lines):
            try:
                entry = json.loads(line, parse_constant=_refuse_constant)
            except (ValueError, RecursionError):
                continue  # the last line of a killed process may be cut: its sample is simply answered again
            if _is_answer(entry) and checksum_holds(entry):
                own += 1
                self._take(entry)
            elif _is_answer(entry) or (isinstance(entry, dict) and CHECKSUM in entry):
                damaged += 1
            else:
                foreign += 1
        if foreign and not own + damaged:
            raise UserError(f"{path} has lines that are no answers of an evaluation; {_ELSEWHERE}")
        if count := damaged + foreign:
            logger.warning(
                "%s: lines that are damaged, or of another version: %d; they are answered again", path, count
            )

    def _take(self, entry: dict[str, Any]) -> None:
        key = entry["key"]
        if key not in self._keys or key in self.predictions:
            return
        if "error" in entry:
            self.failures[key] = Failure(key, entry["id"], entry["error"])
            return
        self.failures.pop(key, None)
        scores, ranked = tuple(entry.get("scores", ())), tuple(entry.get("ranked", ()))
        captions = tuple(
            Ranking(tuple(found["ranked"]), tuple(found["scores"]), found["rank"])
            for found in entry.get("captions", ())
        )
        self.predictions[key] = Prediction(
            key, entry["id"], entry["prediction"], scores, ranked, entry.get("rank"), captions
        )


def _refuse_constant(name: str) -> float:
    """Python's JSON knows NaN and Infinity: an answer with one of them, of an older version, is made anew."""
    raise ValueError(f"{name} is no number of a score")


def _is_answer(entry: Any) -> bool:
    """Whether a line of JSON is one that a journal writes."""
    if not isinstance(entry, dict) or not isinstance(entry.get("key"), str):
        return False
    return "id" in entry and ("prediction" in entry or "error" in entry)


def _answer_fields(prediction: Prediction) -> dict[str, Any]:
    answer: dict[str, Any] = {"prediction": prediction.prediction, "scores": list(prediction.scores)}
    answer |= {"ranked": list(prediction.ranked)} if prediction.ranked else {}
    if prediction.captions:
        answer |= {"rank": prediction.rank, "captions": [asdict(found) for found in prediction.captions]}
    return answer


def _prediction_line(prediction: Prediction) -> str:
    return _json_line({"key": prediction.key, "id": prediction.id} | _answer_fields(prediction))


def _failure_line(failure: Failure) -> str:
    return _json_line({"key": failure.key, "id": failure.id, "error": failure.reason})


def _finished_line(sample: EvaluationSample, prediction: Prediction, score: float | None) -> str:
    """A line of predictions.jsonl."""
    head = {"key": prediction.key, "id": prediction.id, "image": sample.image_key, "prompt": sample.prompt}
    answers = list(sample.record.answers or sample.record.captions)
    return _json_line(head | {"answers": answers, "score": score} | _answer_fields(prediction))


def _json_line(line: dict[str, Any]) -> str:
    # A number that is not finite is never an answer.
    return json.dumps(with_checksum(line), ensure_ascii=False, allow_nan=False)


def _append(path: Path, lines: Sequence[str]) -> None:
    with errors_for_users(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write("\n" + "\n".join(lines) + "\n")  # the leading line break ends a cut line


def forget_given_up(folder: Path) -> None:
    """Remove what ranks of an earlier evaluation in this folder gave up for, before those of this one begin to answer."""
    with errors_for_users(folder):
        for path in folder.rglob(_GAVE_UP):
            path.unlink(missing_ok=True)


# Choices in which the new protocol must equal that of the results it replaces.
_SAME = ("preset", "mode", "split", "images", "precision", "normalize", "include_eos")
_SAMPLES = ("samples", "samples_sha256", "sha256")  # of the protocol: which samples, and the hash of all of it


@contextlib.contextmanager
def claimed(folder: Path, ranks: Ranks) -> Iterator[Ranks]:
    """Make an evaluation's folder and keep other evaluations out of it; of several processes the first does that for all.

    Give the ranks as they watch each other there, see `heartbeat`.

    Raises:
        UserError: another evaluation is at work there, or the folder cannot be made or written.
    """
    with claimed_folder(folder, "evaluation", locked=ranks.is_first), watched(folder, ranks) as watching:
        if ranks.is_first:
            forget_given_up(folder)
        yield watching


def refuse_others_results(
    folder: Path, checkpoint: str, tasks: Sequence[Task], *, adapter: str | None = None, llm: str | None = None
) -> None:
    """Refuse to overwrite the results of another evaluation. The same one may run again, or with more samples.

    Args:
        folder: the evaluation's.
        checkpoint: path of what is evaluated, as results.json has it.
        tasks: what is evaluated.
        adapter: folder of adapters that come onto it.
        llm: name of the language model, once it is known.

    Raises:
        UserError: there are results of another checkpoint, adapter or LLM, preset, mode or split, of datasets that are left
            out now, or of more samples; or a results.json that cannot be read.
    """
    file = folder / RESULTS
    if not file.exists():
        return
    way_out = f"give another name=, or delete {folder}"
    try:
        held = read_run(file)
    except UserError:
        raise UserError(f"{file} is damaged, or of another version of this code; {way_out}") from None
    if difference := _difference(held, checkpoint, tasks, adapter, llm):
        raise UserError(f"{folder} holds the results of {held.checkpoint} ({difference}); {way_out}")


def replaced_results(folder: Path, tasks: Sequence[Task]) -> list[str]:
    """A line for each dataset whose stored score, which will be replaced, is of another protocol than it is asked by now."""
    if not (folder / RESULTS).exists():
        return []
    scores, lines = read_run(folder / RESULTS).scores, []
    for task in tasks:
        if task.card.name not in scores:
            continue
        old, new = {**UNSTATED, **scores[task.card.name].protocol}, json.loads(json.dumps(as_json(task.protocol)))
        changed = [name for name in new if old.get(name) != new[name] and name not in _SAMPLES]
        if changed:
            lines.append(f"{task.card.name}: its score in {folder} is replaced, for its {', '.join(changed)} changed")
    return lines


def _place(path: str | None) -> Path | None:
    return None if path is None else Path(path).expanduser().resolve()


def _difference(
    held: StoredRun, checkpoint: str, tasks: Sequence[Task], adapter: str | None, llm: str | None
) -> str | None:
    """Why the stored results must stay, or None."""
    if Path(held.checkpoint).resolve() != Path(checkpoint).resolve():
        return f"asked for is {checkpoint}"
    if _place(held.adapter) != _place(adapter):
        return f"with adapter {held.adapter}, asked for is {adapter}"
    if llm is not None and llm != held.llm:
        return f"with LLM {held.llm}, asked for is {llm}"
    if left_out := sorted(held.scores.keys() - {task.card.name for task in tasks}):
        return f"with {', '.join(left_out)}, now left out"
    for task in tasks:
        if task.card.name not in held.scores:
            continue
        old, new = {**UNSTATED, **held.scores[task.card.name].protocol}, task.protocol
        for name in _SAME:
            if old.get(name) != getattr(new, name):
                return f"{task.card.name} with {name} {old.get(name)}, asked for is {getattr(new, name)}"
        before = old.get("samples")
        if new.samples is not None and (before is None or before > new.samples):
            return f"{task.card.name} with samples {'all' if before is None else before}, asked for is {new.samples}"
    return None
