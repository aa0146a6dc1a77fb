"""Shards are answered by all ranks together, and each is put together by one of them."""

import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from instructblip.capfilt.captioning import Captioning
from instructblip.capfilt.foreign import ForeignTar
from instructblip.capfilt.job import Job
from instructblip.capfilt.pictures import Part, Seen, look
from instructblip.capfilt.settings import Settings
from instructblip.capfilt.texts import SOURCES, Scored, choose_texts, texts_to_judge, web_texts
from instructblip.data.prepare.convert import shard_entry
from instructblip.data.readers import Losses
from instructblip.data.records import Record, parse_records
from instructblip.data.shards import ShardReader, ShardWriter, shard_path
from instructblip.data.typed import WrongValueError
from instructblip.distributed import Ranks
from instructblip.errors import DamagedSample, UserError
from instructblip.evaluation.journal import Journal
from instructblip.evaluation.outcomes import Failure, Prediction
from instructblip.evaluation.work import read_chunks
from instructblip.files import errors_for_users, write_json
from instructblip.progress import progress_bar


def make_captions(job: Job, parts: Sequence[Part], captioning: Captioning, ranks: Ranks) -> None:
    """Caption and filter all shards together with the other ranks; each is put together by one of them.

    Raises:
        UserError: a shard cannot be read or written; a rank is lost.
    """
    total = parts[-1].first + len(parts[-1].reader) if parts else 0
    with progress_bar("pictures", show=ranks.is_first) as progress:
        bar = progress.add_task("captioning", total=total)
        for part in parts:
            progress.update(bar, completed=part.first)
            # In this order: the first rank removes the one after it has written the other.
            if job.done(part).is_file() or job.is_finished():
                continue
            journal = Journal(job.journal(part), keys := job.keys(part), ranks)
            again = set(journal.failures)  # each is looked at again, here or by the rank that puts the shard together
            for answered in _answer_left(part, keys, captioning, journal):
                again.difference_update(answered)
                _check_damage(journal, job.tolerance, again)
                progress.advance(bar, len(answered) * ranks.world_size)
            if _puts_together(ranks, part):
                journal.wait_for_others(f"pictures of {part.reader.path.name}")
                _check_damage(journal, job.tolerance)
                _put_together(job, part, keys, journal)
        progress.update(bar, completed=total)


def _answer_left(part: Part, keys: Sequence[str], captioning: Captioning, journal: Journal) -> Iterator[list[str]]:
    """Answer what is left of a shard's pictures to this rank into the journal; give the keys of each chunk."""
    ranks, size = journal.ranks, captioning.pictures
    chunks = [range(start, min(start + size, len(keys))) for start in range(0, len(keys), size)]
    numbers = _left_to(ranks, part, [[keys[row] for row in chunk] for chunk in chunks], journal)
    left = [chunks[number] for number in numbers]
    rows = [{row: row for row in chunk} for chunk in left]
    see = partial(look, part, captioning.models.fits)
    for chunk, looks in zip(left, read_chunks(rows, see), strict=True):
        ranks.poll_stop()
        seen, failures = _seen(part, keys, looks)
        answers = captioning.answer(list(seen.values())) if seen else []
        predictions = [
            Prediction(keys[row], picture.name, "\n".join(answer.captions), tuple(answer.scores))
            for (row, picture), answer in zip(seen.items(), answers, strict=True)
        ]
        journal.append(
            [item for item in predictions if item.key not in journal.predictions],
            [item for item in failures if item.key not in journal],
        )
        yield [keys[row] for row in chunk]


def _left_to(ranks: Ranks, part: Part, chunks: Sequence[Sequence[str]], journal: Journal) -> list[int]:
    """The numbers of those chunks, of keys, that a rank answers.

    A chunk that was interrupted, or that damaged pictures are left out of, is answered anew, so that each picture stands
    beside the same others. The latter by the rank that puts the shard together: it waits for no answer of theirs.
    """
    left = []
    for number, own in enumerate(chunks):
        if not all(key in journal for key in own):
            # Shards of few pictures would all begin with the first rank.
            answers = (number + part.number) % ranks.world_size == ranks.rank
        else:
            answers = _puts_together(ranks, part) and any(key in journal.failures for key in own)
        left += [number] if answers else []
    return left


def _puts_together(ranks: Ranks, part: Part) -> bool:
    return ranks.rank == part.number % ranks.world_size


def _check_damage(journal: Journal, tolerance: int, again: Collection[str] = ()) -> None:
    """Refuse a shard with more damaged pictures than are tolerated, but for those that are to be looked at `again`.

    Raises:
        UserError: names the first of them.
    """
    damaged = [failure for key, failure in journal.failures.items() if key not in again]
    if len(damaged) > tolerance:
        first = min(damaged, key=lambda failure: failure.id)
        raise UserError(f"{first.reason}; or give tolerance={len(damaged)}, to leave so many pictures of a shard out")


def _seen(part: Part, keys: Sequence[str], looks: Mapping[int, Future[Seen]]) -> tuple[dict[int, Seen], list[Failure]]:
    """The pictures of a chunk that can be read, by row, and the others."""
    seen, failures = {}, []
    for row, seeing in looks.items():
        try:
            seen[row] = seeing.result()
        except DamagedSample as error:
            failures.append(Failure(keys[row], part.picture(row), str(error)))
    return seen, failures


def _put_together(job: Job, part: Part, keys: Sequence[str], journal: Journal) -> None:
    """Write the shard of a part whose pictures are all answered, say what it holds, and remove its journal."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("pictures", *SOURCES)}
    losses = Losses()
    if isinstance(part.reader, ForeignTar):
        losses.merge(part.reader.losses.to_list())
    kept: dict[int, list[Scored]] = {}
    for row, key in enumerate(keys):
        if key in journal.failures:
            counts["pictures"]["cannot be read"] += 1
            losses.add("picture cannot be read", journal.failures[key].reason)
            continue
        web = web_texts(part.reader.read_records(row))
        chosen = _chosen(journal.predictions[key], web, job.settings, counts)
        counts["pictures"]["kept" if chosen else "no text is kept"] += 1
        if chosen:
            kept[row] = chosen
    entry, listed = _write_shard(job, part, kept) if kept else (None, [])
    values = {"shard": entry, "counts": counts, "lost": losses.to_list(), "captions": listed}
    write_json(job.done(part), values)
    with errors_for_users(job.work):
        shutil.rmtree(job.journal(part), ignore_errors=True)


def _chosen(
    prediction: Prediction, web: Sequence[str], settings: Settings, counts: Mapping[str, Counter[str]]
) -> list[Scored]:
    """The texts of a picture that are kept; all are counted."""
    captions = prediction.prediction.split("\n")
    texts, left_out = texts_to_judge(captions, web, settings.text_processor)
    scored = [Scored(*item, score) for item, score in zip(texts, prediction.scores, strict=True)]
    chosen = choose_texts(scored, settings)
    for source, reason in left_out:
        counts[source][reason] += 1
    for item in scored:
        counts[item.source]["kept" if item in chosen else settings.refusal] += 1
    return chosen


def _write_shard(
    job: Job, part: Part, kept: Mapping[int, Sequence[Scored]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write the pictures that have texts; what a manifest says of the shard, and the entries of the list."""
    reader, listed = part.reader, []
    path = shard_path(job.split, part.number)
    with ShardWriter.open(path) as writer:
        for row, texts in kept.items():
            frames, content = reader.read_encoded(row)
            try:
                image_id, records = parse_records(content)
                before = [Record.from_dict(record) for record in records]
            except WrongValueError as error:  # which was sound when it was captioned
                raise UserError(
                    f"{reader.path} has changed: {reader.keys[row]} has damaged records ({error})"
                ) from None
            key, extension = _key(part, row), reader.extension(row)
            url = next((record.tags["url"] for record in before if "url" in record.tags), None)
            writer.add(key, {extension: frames[0]}, image_id, _records(key, texts, url, together=job.settings.kept))
            named = _named(image_id, url, extension)
            listed += [{**named, "caption": item.text, "source": item.source, "score": _round(item)} for item in texts]
    return shard_entry(ShardReader(path)), listed


def _key(part: Part, row: int) -> str:
    """A name for a picture that pictures of other datasets do not have."""
    key, prefix = part.reader.keys[row], f"{part.split.dataset}_"
    return key if key.startswith(prefix) else prefix + key


def _records(key: str, texts: Sequence[Scored], url: str | None, *, together: int | None) -> list[Record]:
    """A record for each text; or one for all, of which training draws one at each step."""
    tags = {} if url is None else {"url": url}
    if together is None:
        return [
            Record(
                f"{key}-{number}",
                "caption",
                answers=(item.text,),
                tags={**tags, "source": item.source, "score": f"{_round(item):.4f}"},
            )
            for number, item in enumerate(texts)
        ]
    tags["source"] = ", ".join(item.source for item in texts)
    tags["score"] = ", ".join(f"{_round(item):.4f}" for item in texts)
    return [Record(f"{key}-0", "caption", captions=tuple(item.text for item in texts), tags=tags)]


def _round(item: Scored) -> float:
    """A score without the digits that other neighbours in a batch would change."""
    return round(item.score, 4)


def _named(image_id: str, url: str | None, extension: str) -> dict[str, str]:
    """A picture as lists of captions name it: by its url, or else by the path that its id is."""
    if url is not None or image_id.startswith(("http://", "https://")):
        return {"url": url or image_id}
    suffix = "" if Path(image_id).suffix else f".{extension}"
    return {"image": image_id + suffix}
