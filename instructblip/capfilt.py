"""CapFilt: captions for pictures of the web, and a filter for those captions and for the web's own texts.

    python -m instructblip.capfilt shards=WEB captioner=A filter=B out=WEB_CAPFILT

`variant=blip` (BLIP, section 3.3) draws one caption for each picture; it and the web's texts are kept where the filter says
that they match. `variant=blip2` (BLIP-2, section 3.4) draws ten, ranks them and the web's texts by CLIP, and keeps the best
two. `out` holds prepared shards of the dataset web_capfilt, `captions.json`, which its reader reads, and `report.json`.
docs/data.md, "Captions for web pictures", says more.

A caption is a function of seed, picture and models. Each shard has a journal, and the ranks share its pictures in chunks
that depend on the shard alone, so neither interruptions nor the number of ranks change a byte.

Shape legend: B pictures, H and W pixels, N pairs of a picture and a text.
"""

import hashlib
import json
import logging
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from instructblip.config.entry import main
from instructblip.config.schema import CapFiltConfig
from instructblip.data.cards import TRAIN_SPLIT
from instructblip.data.mixture import seeded_generator
from instructblip.data.prepare.convert import foreign_files, shard_entry, shards_manifest
from instructblip.data.readers import Losses
from instructblip.data.records import Record, parse_records
from instructblip.data.shards import (
    MANIFEST_NAME,
    PreparedSplit,
    ShardReader,
    ShardWriter,
    open_split,
    shard_path,
)
from instructblip.data.text_processors import TEXT_PROCESSORS
from instructblip.data.typed import WrongValueError
from instructblip.distributed import Ranks, choose_device
from instructblip.errors import DamagedSample, UserError
from instructblip.evaluation.heartbeat import watched
from instructblip.evaluation.journal import Journal
from instructblip.evaluation.outcomes import Failure, Prediction
from instructblip.evaluation.suite import model_identity
from instructblip.evaluation.work import BatchLimit, read_chunks
from instructblip.files import atomic_path, claimed_folder, errors_for_users, read_json, write_json
from instructblip.images import FITS, decode_image
from instructblip.models.base import Model
from instructblip.models.clip import CLIP
from instructblip.models.fingerprint import fingerprint, fingerprint_tensors
from instructblip.progress import progress_bar
from instructblip.weights.clip import find_clip, load_clip
from instructblip.weights.load import LoadedModel, Source, find_source, frozen_fingerprints, load_model
from instructblip.weights.parts import MODELS

logger = logging.getLogger(__name__)

DATASET = "web_capfilt"
REPORT, CAPTIONS = "report.json", "captions.json"
_WORK, _PLAN = ".work", "plan.json"
_TEXTS = ("synthetic", "web")

# How captioners draw as they were released, by kind of model; lengths are of new tokens. BLIP's own, 5 to 20, count its
# "[DEC] a picture of". Those of BLIP-2's second stage and of InstructBLIP are their defaults for captions.
_BLIP = {"max_new_tokens": 16, "min_new_tokens": 1, "repetition_penalty": 1.1}
_RELEASED: Mapping[str, Mapping[str, float]] = {
    "blip_caption": _BLIP,
    "blip_pretrain": _BLIP,
    "blip2_stage1": {"max_new_tokens": 29, "min_new_tokens": 9, "repetition_penalty": 1.0},
    "blip2": {"max_new_tokens": 30, "min_new_tokens": 1, "repetition_penalty": 1.0},
    "instructblip": {"max_new_tokens": 30, "min_new_tokens": 1, "repetition_penalty": 1.0},
}
# Of synthetic captions, how many the filter took away (BLIP, table 2); percent.
PAPER_NOISE = {"nucleus sampling": 25, "beam search": 19}

Fit = tuple[str, int]  # name in `FITS`, size


# --- what is asked for -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What decides the texts, beside models and pictures; as `CapFiltConfig`, with its defaults filled in.

    `threshold` is None where the best `kept` are taken, and the other way round.
    """

    variant: str
    captions: int
    prompt: str | None
    top_p: float
    max_new_tokens: int
    min_new_tokens: int
    repetition_penalty: float
    threshold: float | None
    kept: int | None
    text_processor: str
    seed: int

    @property
    def refusal(self) -> str:
        """What is said of a text that the filter does not keep."""
        return f"does not match: at most {self.threshold:g}" if self.kept is None else f"not among the best {self.kept}"


def settle(config: CapFiltConfig, captioner_kind: str) -> Settings:
    """Fill in what the configuration leaves to the variant and to the captioner.

    Raises:
        UserError: limits of length that contradict each other.
    """
    by_filter = config.variant == "blip"
    given = {name: getattr(config, name) for name in _BLIP}
    drawing: dict[str, Any] = {**_RELEASED[captioner_kind], **{k: v for k, v in given.items() if v is not None}}
    if drawing["min_new_tokens"] > drawing["max_new_tokens"]:
        raise UserError(
            f"the captioner writes {drawing['min_new_tokens']} tokens at least and {drawing['max_new_tokens']} at most; "
            "set min_new_tokens= and max_new_tokens="
        )
    return Settings(
        variant=config.variant,
        captions=config.captions or (1 if by_filter else 10),
        prompt=config.prompt,
        top_p=config.top_p,
        threshold=(0.5 if config.threshold is None else config.threshold) if by_filter else None,
        kept=None if by_filter else config.kept or 2,
        text_processor=config.text_processor or ("blip_caption" if by_filter else "none"),
        seed=config.seed,
        **drawing,
    )


def web_splits(folder: Path, split: str) -> list[PreparedSplit]:
    """The prepared splits of a name below a folder, in the order of their paths.

    Raises:
        UserError: there is none.
    """
    if not folder.is_dir():
        raise UserError(f"shards={folder} is no folder; give one that prepare.py wrote to")
    found = [open_split(manifest.parent) for manifest in sorted(folder.rglob(MANIFEST_NAME))]
    wanted = [opened for opened in found if opened.split == split]
    if not wanted:
        others = ", ".join(sorted({opened.split for opened in found}))
        way_out = f"it has {others}: set split=" if others else "prepare web pictures first (prepare.py)"
        raise UserError(f"shards={folder} has no prepared split {split}; {way_out}")
    return wanted


# --- models ----------------------------------------------------------------------------------------------------------


class Judge(Protocol):
    """Says how well pictures and texts go together."""

    fit: Fit

    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """Whatever it needs of each picture: a tensor of B rows."""

    def score(self, encoded: Tensor, texts: Sequence[str]) -> Tensor:
        """A number (N,) for each row and its text."""


class MatchingJudge:
    """A model of this project, by the probability of its matching head."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.fit = ("resize_square", model.vision.image_size)

    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """Image tokens."""
        return self.model.image_tokens(pixels_B3HW[:, None])

    def score(self, encoded: Tensor, texts: Sequence[str]) -> Tensor:
        """Probabilities."""
        return self.model.match(encoded, list(texts))


class ClipJudge:
    """A CLIP, by the cosine."""

    def __init__(self, clip: CLIP) -> None:
        self.clip = clip
        self.fit = ("center_crop", clip.image_size)

    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """Features of the pictures."""
        return self.clip.encode_images(pixels_B3HW)

    def score(self, encoded: Tensor, texts: Sequence[str]) -> Tensor:
        """Cosines."""
        return (encoded * self.clip.encode_texts(texts)).sum(dim=1)


class Found(NamedTuple):
    """Captioner and filter before anything of their weights is read."""

    captioner: Source
    filter: Source | Path


def find_models(config: CapFiltConfig) -> Found:
    """Find both models.

    Raises:
        UserError: there is none, or one that cannot do its part; a prompt that is missing, or that nothing reads.
    """
    captioner = find_source(config.captioner, config.llm)
    if captioner.kind not in _RELEASED:
        raise _unable(
            captioner, f"captioner={config.captioner}", "caption", [kind for kind in MODELS if kind in _RELEASED]
        )
    if captioner.kind == "instructblip" and config.prompt is None:
        raise UserError(f"captioner={config.captioner} reads a prompt; give one: prompt='A short image caption:'")
    if captioner.kind == "blip2_stage1" and config.prompt is not None:
        raise UserError(f"captioner={config.captioner} captions without a prompt; leave prompt= out")
    if config.variant == "blip2":
        return Found(captioner, find_clip(config.filter))
    judge = find_source(config.filter)
    able = [kind for kind, model in MODELS.items() if model.match is not Model.match]
    if judge.kind not in able:
        raise _unable(judge, f"filter={config.filter}", "match", able)
    return Found(captioner, judge)


def _unable(source: Source, given: str, call: str, able: Sequence[str]) -> UserError:
    return UserError(f"{given} is of model={source.kind}, which does not {call}; give one of {', '.join(able)}")


@dataclass(frozen=True)
class Models:
    """Both models at work.

    Attributes:
        captioner, judge: see above.
        names: what each was loaded from.
        identities: SHA-256 of all that their answers depend on.
    """

    captioner: Any
    judge: Judge
    names: Mapping[str, str]
    identities: Mapping[str, str]

    @property
    def fits(self) -> set[Fit]:
        """How pictures are shown to them."""
        return {("resize_square", self.captioner.vision.image_size), self.judge.fit}


def load_models(config: CapFiltConfig, found: Found, device: str) -> Models:
    """Load both models; once, where they are the same.

    Raises:
        UserError: files that do not fit, a part that was never trained, or no head for what is asked.
    """
    captioner = _load(found.captioner, config, device, llm=True)
    _refuse_headless(captioner, "generate", f"captioner={config.captioner}")
    names, identities = {"captioner": captioner.name}, {"captioner": _identity(captioner.model)}
    judge: Judge
    if isinstance(found.filter, Path):
        clip = load_clip(found.filter, device)
        names["filter"], identities["filter"] = config.filter, fingerprint(clip.model)
        judge = ClipJudge(clip)
    else:
        same = found.filter == found.captioner
        if same:
            logger.warning("captioner and filter are one model: the paper saw it keep most of its own mistakes")
        other = captioner if same else _load(found.filter, config, device, llm=False)
        _refuse_headless(other, "match", f"filter={config.filter}")
        names["filter"], identities["filter"] = other.name, _identity(other.model)
        judge = MatchingJudge(other.model)
    return Models(captioner.model, judge, names, identities)


def _load(source: Source, config: CapFiltConfig, device: str, *, llm: bool) -> LoadedModel:
    # A transformers folder has all of its parts.
    paths = {"vision_path": config.vision_path, "qformer_path": config.qformer_path}
    given = {} if source.format == "huggingface" else paths
    return load_model(source, llm=config.llm if llm else None, device=device, **given)


def _refuse_headless(loaded: LoadedModel, call: str, given: str) -> None:
    if call not in loaded.model.calls():
        raise UserError(f"{given} has no head to {call} with; it can {', '.join(loaded.model.calls())}")
    if loaded.standing.untrained:
        raise UserError(f"{given}: {', '.join(loaded.standing.untrained)} was never trained; train it first")


def _identity(model: Model) -> str:
    return model_identity(model, frozen_fingerprints(model), fingerprint_tensors(model.held_state()))


# --- texts of a picture ----------------------------------------------------------------------------------------------


class Text(NamedTuple):
    """A text about a picture, and whether it is `synthetic` or of the `web`."""

    text: str
    source: str


class Scored(NamedTuple):
    """A text with what the filter says of it."""

    text: str
    source: str
    score: float


def web_texts(records: Sequence[Record]) -> list[str]:
    """What the web says of a picture: the captions among its records, in one line each."""
    said = [
        text for record in records for text in record.captions or (record.answers if record.kind == "caption" else ())
    ]
    return [_line(text) for text in said]


def _line(text: str) -> str:
    return " ".join(text.split())


def texts_to_judge(
    captions: Sequence[str], web: Sequence[str], text_processor: str
) -> tuple[list[Text], list[tuple[str, str]]]:
    """The texts of a picture that differ and say something, the web's first; and (source, reason) of the others."""
    found: dict[str, Text] = {}
    left_out = []
    for source, texts in (("web", web), ("synthetic", captions)):
        for text in texts:
            if not TEXT_PROCESSORS[text_processor](text).strip():
                left_out.append((source, "empty"))
            elif text in found:
                left_out.append((source, "repeats another text"))
            else:
                found[text] = Text(text, source)
    return list(found.values()), left_out


def choose_texts(texts: Sequence[Scored], settings: Settings) -> list[Scored]:
    """The texts that are kept, in their order, or the best ones first; of equals the first."""
    if settings.threshold is not None:
        return [item for item in texts if item.score > settings.threshold]
    return sorted(texts, key=lambda item: -item.score)[: settings.kept]


# --- pictures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A shard of web pictures: the `place`-th of its split, the `number`-th of all; `first` pictures stand before it."""

    number: int
    split: PreparedSplit
    place: int
    first: int

    @property
    def reader(self) -> ShardReader:
        """Of the shard."""
        return self.split.shards[self.place]

    def picture(self, row: int) -> str:
        """What a picture is called, whatever shard it stands in: its captions are drawn by that."""
        return f"{self.split.dataset}/{self.split.split}/{self.reader.keys[row]}"


def parts_of(splits: Sequence[PreparedSplit]) -> list[Part]:
    """The shards of all splits, in order; no index is opened for it."""
    parts: list[Part] = []
    first = 0
    for split in splits:
        for place, entry in enumerate(split.manifest["shards"]):
            parts.append(Part(len(parts), split, place, first))
            first += entry.get("images", 0)
    return parts


class Seen(NamedTuple):
    """A picture as the models see it: pixels (3, H, W) by how they were fitted, and the web's texts."""

    name: str
    web: list[str]
    pixels: Mapping[Fit, Tensor]


def _look(part: Part, fits: set[Fit], row: int) -> Seen:
    """Read a picture.

    Raises:
        DamagedSample: it or its records cannot be read.
    """
    frames, records = part.reader.read(row)
    where = f"{part.reader.keys[row]} of {part.reader.path}"
    if len(frames) != 1:
        raise DamagedSample(f"{where} has {len(frames)} frames, and a caption is of one picture")
    image = decode_image(frames[0], where)
    return Seen(part.picture(row), web_texts(records), {fit: FITS[fit[0]](image, fit[1]) for fit in fits})


class Answer(NamedTuple):
    """The captions that were drawn for a picture, and the scores of its texts in the order of `texts_to_judge`."""

    captions: list[str]
    scores: list[float]


class Captioning:
    """Answers pictures.

    Args:
        models, settings: see there.
        batch_size: captions, or pairs, at a time.
    """

    def __init__(self, models: Models, settings: Settings, batch_size: int) -> None:
        self.models = models
        self.settings = settings
        self.pictures = max(1, batch_size // settings.captions)  # of a chunk
        self._drawing, self._judging = BatchLimit(self.pictures), BatchLimit(batch_size)

    @torch.inference_mode()
    def answer(self, pictures: Sequence[Seen]) -> list[Answer]:
        """Draw and score the captions of pictures.

        Raises:
            UserError: scores that are not finite numbers.
        """
        captions = self._drawing.run(pictures, self._draw)
        texts = [
            texts_to_judge(own, picture.web, self.settings.text_processor)[0]
            for own, picture in zip(captions, pictures, strict=True)
        ]
        scores = iter(self._score(pictures, texts))
        return [Answer(own, [next(scores) for _ in judged]) for own, judged in zip(captions, texts, strict=True)]

    def _draw(self, pictures: Sequence[Seen]) -> list[list[str]]:
        captioner, settings = self.models.captioner, self.settings
        pixels_B3HW = _stacked(pictures, ("resize_square", captioner.vision.image_size))
        tokens = captioner.image_tokens(pixels_B3HW[:, None]).repeat_interleave(settings.captions, dim=0)
        noise = [self._noise(picture.name, number) for picture in pictures for number in range(settings.captions)]
        texts = captioner.generate(
            tokens,
            None if settings.prompt is None else [settings.prompt] * len(tokens),
            do_sample=True,
            num_beams=1,
            top_p=settings.top_p,
            max_new_tokens=settings.max_new_tokens,
            min_new_tokens=settings.min_new_tokens,
            repetition_penalty=settings.repetition_penalty,
            noise=torch.from_numpy(np.stack(noise)),
        )
        lines = [_line(text) for text in texts]
        return [lines[start : start + settings.captions] for start in range(0, len(lines), settings.captions)]

    def _noise(self, picture: str, number: int) -> np.ndarray:
        stream = seeded_generator(self.settings.seed, "caption", picture, number)
        return stream.random(self.settings.max_new_tokens)

    def _score(self, pictures: Sequence[Seen], texts: Sequence[Sequence[Text]]) -> list[float]:
        """Of all texts of all pictures, one picture's after the other's."""
        judge, process = self.models.judge, TEXT_PROCESSORS[self.settings.text_processor]
        encoded = judge.encode(_stacked(pictures, judge.fit))
        pairs = [(row, process(item.text)) for row, own in enumerate(texts) for item in own]

        def score(batch: Sequence[tuple[int, str]]) -> list[float]:
            rows = torch.tensor([row for row, _ in batch], device=encoded.device)
            return judge.score(encoded[rows], [text for _, text in batch]).float().tolist()

        scores = self._judging.run(pairs, score)
        if not all(map(math.isfinite, scores)):
            raise UserError("the filter's scores are not finite numbers; its weights are damaged: fetch them again")
        return scores


def _stacked(pictures: Sequence[Seen], fit: Fit) -> Tensor:
    return torch.stack([picture.pixels[fit] for picture in pictures])


# --- shards ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What is made where.

    Attributes:
        out: the folder of the results.
        settings: see there.
        plan: all that decides what is written, as JSON values.
        names: of the models.
    """

    out: Path
    settings: Settings
    plan: Mapping[str, Any]
    names: Mapping[str, str]

    @property
    def split(self) -> Path:
        """The folder of the shards."""
        return self.out / DATASET / TRAIN_SPLIT

    @property
    def work(self) -> Path:
        """The folder of what is not finished."""
        return self.out / _WORK

    def done(self, part: Part) -> Path:
        """The file that says what a finished shard holds."""
        return self.work / f"{part.number:06d}.json"

    def journal(self, part: Part) -> Path:
        """The folder of an unfinished shard's journal."""
        return self.work / f"{part.number:06d}"

    def keys(self, part: Part) -> list[str]:
        """The journal's, of a shard's pictures."""
        plan = json.dumps(self.plan, sort_keys=True)
        names = (f"{plan}\n{part.picture(row)}" for row in range(len(part.reader)))
        return [hashlib.sha256(name.encode()).hexdigest()[:32] for name in names]

    def is_finished(self) -> bool:
        """Whether all is written."""
        return (self.out / REPORT).is_file()

    def clear_up(self) -> None:
        """Remove what is not needed once all is written, and what a killed run left."""
        with errors_for_users(self.out):
            for path in self.out.glob("*.partial"):
                path.unlink(missing_ok=True)
            shutil.rmtree(self.work, ignore_errors=True)

    def claim(self, ranks: Ranks) -> None:
        """Say what is made here; refuse a folder in which something else is, or was begun.

        Raises:
            UserError: names what differs.
        """
        way_out = f"give another out=, or delete {self.out}"
        held = None
        for path, key in ((self.out / REPORT, "plan"), (self.work / _PLAN, None)):
            if held is None and path.is_file():
                found = read_json(path)
                held = found if key is None else found.get(key)
        if held is None and self.split.exists():
            raise UserError(f"{self.split} was not made by capfilt, and would be overwritten; {way_out}")
        if held is not None and held != self.plan:
            changed = [name for name in self.plan if not isinstance(held, dict) or held.get(name) != self.plan[name]]
            raise UserError(f"{self.out} holds captions of another {' and '.join(changed)}; {way_out}")
        if held is None and ranks.is_first:
            write_json(self.work / _PLAN, self.plan)


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
            for answered in _answer_share(part, keys, captioning, journal):
                progress.advance(bar, answered * ranks.world_size)
            if ranks.rank == part.number % ranks.world_size:
                journal.wait_for_others(f"pictures of {part.reader.path.name}")
                _put_together(job, part, keys, journal)
        progress.update(bar, completed=total)


def _answer_share(part: Part, keys: Sequence[str], captioning: Captioning, journal: Journal) -> Iterator[int]:
    """Answer this rank's share of a shard's pictures into the journal; give the number of each chunk.

    A chunk that was interrupted is answered anew, so that each picture stands beside the same others.
    """
    ranks, size = journal.ranks, captioning.pictures
    chunks = [range(start, min(start + size, len(keys))) for start in range(0, len(keys), size)]
    # Shards of few pictures would all begin with the first rank.
    own = chunks[(ranks.rank - part.number) % ranks.world_size :: ranks.world_size]
    left = [chunk for chunk in own if any(keys[row] not in journal for row in chunk)]
    rows = [{row: row for row in chunk} for chunk in left]
    look = partial(_look, part, captioning.models.fits)
    for chunk, looks in zip(left, read_chunks(rows, look), strict=True):
        ranks.poll_stop()
        seen, failures = _seen(part, keys, looks)
        answers = captioning.answer(list(seen.values())) if seen else []
        predictions = [
            Prediction(keys[row], picture.name, "\n".join(answer.captions), tuple(answer.scores))
            for (row, picture), answer in zip(seen.items(), answers, strict=True)
        ]
        journal.append(
            [item for item in predictions if item.key not in journal],
            [item for item in failures if item.key not in journal],
        )
        yield len(chunk)


def _seen(part: Part, keys: Sequence[str], looks: Mapping[int, Future[Seen]]) -> tuple[dict[int, Seen], list[Failure]]:
    """The pictures of a chunk that can be read, by row, and the others."""
    seen, failures = {}, []
    for row, look in looks.items():
        try:
            seen[row] = look.result()
        except DamagedSample as error:
            failures.append(Failure(keys[row], part.picture(row), str(error)))
    return seen, failures


def _put_together(job: Job, part: Part, keys: Sequence[str], journal: Journal) -> None:
    """Write the shard of a part whose pictures are all answered, say what it holds, and remove its journal."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("pictures", *_TEXTS)}
    losses = Losses()
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
            key, (extension,) = _key(part, row), reader.extensions[reader.frames_of(row)]
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


# --- the whole -------------------------------------------------------------------------------------------------------


def finish(job: Job, parts: Sequence[Part], ranks: Ranks) -> None:
    """Wait for all shards, then write manifest, list and report, in this order.

    Raises:
        UserError: a rank is lost; the disk is full.
    """

    def missing() -> int:
        return sum(not job.done(part).is_file() for part in parts)

    Journal(job.work, (), ranks).wait_until_none(missing, "shards")
    entries, losses = [], Losses()
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("pictures", *_TEXTS)}
    with atomic_path(job.out / CAPTIONS) as partial_list, open(partial_list, "w", encoding="utf-8") as file:
        file.write("[")
        before = "\n"
        for part in parts:
            found = read_json(job.done(part))
            entries += [found["shard"]] if found["shard"] else []
            losses.merge(found["lost"])
            for name, own in found["counts"].items():
                counts[name].update(own)
            for caption in found["captions"]:
                file.write(before + json.dumps(caption, ensure_ascii=False))
                before = ",\n"
        file.write("\n]\n")
    _write_manifest(job, parts, entries, losses)
    write_json(job.out / REPORT, _report(job, counts, losses))


def _write_manifest(job: Job, parts: Sequence[Part], entries: Sequence[dict[str, Any]], losses: Losses) -> None:
    manifest = shards_manifest(DATASET, TRAIN_SPLIT, entries)
    licences = sorted({str(part.split.manifest["licence"]) for part in parts if "licence" in part.split.manifest})
    manifest |= {"lost": losses.to_list(), "source": {"capfilt": job.plan}, "licence": "; ".join(licences)}
    job.split.mkdir(parents=True, exist_ok=True)
    for path in foreign_files(job.split, {job.split / entry["name"] for entry in entries}):
        path.unlink()
    write_json(job.split / MANIFEST_NAME, manifest)


def _report(job: Job, counts: Mapping[str, Counter[str]], losses: Losses) -> dict[str, Any]:
    report: dict[str, Any] = {name: dict(own) for name, own in counts.items()}
    report |= {"plan": job.plan, "models": dict(job.names), "lost": losses.to_list()}
    if job.settings.kept is None:
        report["noise_percent"] = {name: _noise_ratio(counts[name], job.settings) for name in _TEXTS}
        report["paper_noise_percent"] = PAPER_NOISE
    return report


def _noise_ratio(counts: Mapping[str, int], settings: Settings) -> float | None:
    """Of the texts that the filter saw, how many it refused, in percent; None where there were none."""
    refused, kept = counts.get(settings.refusal, 0), counts.get("kept", 0)
    return round(100 * refused / (refused + kept), 2) if refused + kept else None


def summary(report: Mapping[str, Any]) -> list[str]:
    """A report in a few lines."""
    lines = []
    for name, what in (("pictures", "pictures"), ("synthetic", "captions drawn"), ("web", "texts of the web")):
        own = report[name]
        others = ", ".join(f"{count:,} {reason}" for reason, count in sorted(own.items()) if reason != "kept")
        lines.append(f"{sum(own.values()):,} {what}: {own.get('kept', 0):,} kept" + (f"; {others}" if others else ""))
    if "noise_percent" in report:
        shown = {name: "-" if ratio is None else f"{ratio:.1f}%" for name, ratio in report["noise_percent"].items()}
        paper = ", ".join(f"{ratio}% by {how}" for how, ratio in PAPER_NOISE.items())
        lines.append(
            f"noise, the share that the filter took away: {shown['synthetic']} of the captions (BLIP's paper: {paper}), "
            f"{shown['web']} of the web's texts"
        )
    return lines


def capfilt(config: CapFiltConfig, console: Console) -> None:
    """Write captions as configured. Everything that may be wrong is checked before a model is loaded.

    Raises:
        UserError: no such models or shards, a folder with other results, a lost rank, a full disk; nothing was kept.
    """
    ranks = Ranks.from_environment()
    if not ranks.is_first:
        console = Console(quiet=True)
    shards, out = Path(config.shards).expanduser(), Path(config.out).expanduser()
    inner, outer = out.resolve(), shards.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise UserError(f"out={out} and shards={shards} lie within each other; give another out=")
    splits = web_splits(shards, config.split)
    found = find_models(config)
    settings = settle(config, found.captioner.kind)
    device = str(choose_device(ranks.device(config.device)))
    with (
        claimed_folder(out, "capfilt", locked=ranks.is_first, setting="out"),
        watched(out, ranks, "capfilt") as ranks,
    ):
        models = load_models(config, found, device)
        pictures = [[split.dataset, split.split, split.fingerprint] for split in splits]
        plan = {**asdict(settings), **models.identities, "pictures": pictures}
        job = Job(out, settings, plan, models.names)
        job.claim(ranks)
        parts = parts_of(splits)
        if not job.is_finished():
            make_captions(job, parts, Captioning(models, settings, config.batch_size), ranks)
        if ranks.is_first:
            if not job.is_finished():
                finish(job, parts, ranks)
            job.clear_up()
    if ranks.is_first:
        _say(job, console)


def _say(job: Job, console: Console) -> None:
    """Print what there is now.

    Raises:
        UserError: no text of any picture was kept.
    """
    say = partial(console.print, highlight=False, soft_wrap=True, markup=False)
    report = read_json(job.out / REPORT)
    for line in summary(report):
        say(line)
    for path in (job.split / MANIFEST_NAME, job.out / CAPTIONS, job.out / REPORT):
        say(f"wrote {path}")
    if not report["pictures"].get("kept"):
        raise UserError(f"no text of any picture was kept, so {job.split} is empty; {job.out / REPORT} says why")
    say(f"look at them: python prepare.py show={job.out}")


if __name__ == "__main__":
    main("capfilt", CapFiltConfig, capfilt)
