"""The folder of an evaluation: one evaluation writes there at a time, and none puts its results in another's place."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from instructblip.errors import UserError
from instructblip.evaluation.distributed import Worker
from instructblip.evaluation.protocol import Task
from instructblip.evaluation.stored import RESULTS, StoredRun, read_run
from instructblip.files import errors_for_users, exclusive

_LOCK = ".lock"
# What a protocol may not differ in where its results are replaced.
_SAME = ("preset", "mode", "split", "images")


@contextlib.contextmanager
def claimed(folder: Path, worker: Worker) -> Iterator[None]:
    """Make an evaluation's folder and keep other evaluations out of it; of several processes the first does that for all.

    Raises:
        UserError: another evaluation is at work there, or the folder cannot be made or written.
    """
    with errors_for_users(folder):
        folder.mkdir(parents=True, exist_ok=True)
    busy = f"another evaluation is writing to {folder}; wait until it has ended, or give another name="
    lock = exclusive(folder / _LOCK, "evaluating", busy=busy) if worker.is_first else contextlib.nullcontext()
    with lock:
        yield


def refuse_others_results(folder: Path, checkpoint: str, tasks: Sequence[Task], llm: str | None = None) -> None:
    """Refuse to write where the results of another evaluation are. The same one may be done again, or with more samples.

    Args:
        folder: the evaluation's.
        checkpoint: path of what is evaluated, as results.json has it.
        tasks: what is evaluated.
        llm: name of the language model, once it is known.

    Raises:
        UserError: there are results of another checkpoint or LLM, preset, mode or split, of datasets that are left out
            now, or of more samples; or a results.json that cannot be read.
    """
    file = folder / RESULTS
    if not file.exists():
        return
    way_out = f"give another name=, or delete {folder}"
    try:
        held = read_run(file)
    except UserError:
        raise UserError(f"{file} is damaged, or of another version of this code; {way_out}") from None
    if difference := _difference(held, checkpoint, tasks, llm):
        raise UserError(f"{folder} holds the results of {held.checkpoint} ({difference}); {way_out}")


def _difference(held: StoredRun, checkpoint: str, tasks: Sequence[Task], llm: str | None) -> str | None:
    """What would be lost, or None."""
    if Path(held.checkpoint).resolve() != Path(checkpoint).resolve():
        return f"asked for is {checkpoint}"
    if llm not in (None, held.llm):
        return f"with LLM {held.llm}, asked for is {llm}"
    if left_out := sorted(held.scores.keys() - {task.card.name for task in tasks}):
        return f"with {', '.join(left_out)}, now left out"
    for task in tasks:
        if task.card.name not in held.scores:
            continue
        old, new = held.scores[task.card.name].protocol, task.protocol
        for name in _SAME:
            if old.get(name) != getattr(new, name):
                return f"{task.card.name} with {name} {old.get(name)}, asked for is {getattr(new, name)}"
        before = old.get("samples")
        if new.samples is not None and (before is None or before > new.samples):
            return f"{task.card.name} with samples {'all' if before is None else before}, asked for is {new.samples}"
    return None
