"""The frozen protocol of an evaluation: samples, prompt, decoding or ranking, scoring."""

import hashlib
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from instructblip.config.schema import EvaluationPrecision, Mode
from instructblip.data.card_evaluation import (
    STATEMENT,
    Evaluation,
    finished_prompt,
    metric_name,
    metric_sha256,
    with_preset,
)
from instructblip.data.cards import Card, check_prepared_from
from instructblip.data.coverage import RecordCounts, prepared_counts
from instructblip.data.records import Record
from instructblip.data.shards import MANIFEST_NAME, PreparedSplit, ShardReader, open_split
from instructblip.data.synthetic import is_made_up
from instructblip.data.templates import MAX_OCR_TOKENS
from instructblip.data.text_processors import TEXT_PROCESSORS
from instructblip.errors import UserError
from instructblip.evaluation.metrics import METRICS, Metric
from instructblip.evaluation.metrics.metric import captions_of_record, one_of
from instructblip.evaluation.metrics.own import find_metric
from instructblip.evaluation.metrics.retrieval import chance_of_recall
from instructblip.files import errors_for_users, read_json
from instructblip.models.facts import RANKING_PRESETS, SEARCH, Skill

logger = logging.getLogger(__name__)
# What results of earlier versions do not state. The hash leaves these values out, so that it is the same for both.
UNSTATED: Mapping[str, Any] = {"precision": "fp32", "until": ()}


@dataclass(frozen=True)
class Protocol:
    """Everything that decides a score besides the model; stored in results.json.

    Attributes:
        preset: `paper`, `lavis` for what the released code computes, or `lmms_eval` for what that harness asks.
        candidates_from: where ranked texts come from: `card`, each record's `choices`, or a vocabulary of `vocabulary_size`
            texts with the hash `vocabulary_sha256`: `train_answers`, an `answer_list`, or the `captions` of the chosen
            samples; `none` when the model writes freely.
        candidates: the card's texts to rank; `classes` beside them names the class each text stands for (itself, without
            verbalizers).
        aggregate: a class's log-likelihood is that of any of its texts (`sum` of likelihoods) or of the best (`max`).
        verbalizers: (text, class) pairs; a freely generated text of one of them counts as its class.
        normalize, include_eos: of a candidate's token log-likelihoods.
        max_new_tokens, min_new_tokens, num_beams, length_penalty, repetition_penalty: of generation.
        beam_lengths: how lengths of beams are counted, one of `decoding.BEAM_LENGTHS`.
        until: texts that end what was generated, and are no part of it.
        rerank, max_text_tokens: of retrieval, the latter of matching too, see `card_evaluation.Evaluation`; 0 otherwise.
        text_processor: what is done to a question, or to a caption that is looked for, one of
            `text_processors.TEXT_PROCESSORS`.
        may_be_empty: fields that the prompt shows even where a record has none of them.
        transform: how an image becomes a square, one of `transforms.FITS`.
        upright: whether pictures are turned as their EXIF orientation says.
        transparency: what is seen where a picture is transparent: `white`, or, once that is `dropped`, what lies beneath.
        frames: pictures a sample, 1 but for videos.
        ocr: whose tokens the prompt shows and how many at most; empty where it shows none.
        metric: its name; of one's own, file and function.
        metric_sha256: of the file of a metric of one's own; else empty.
        samples: how many of the split's samples are scored; None is all. The subset is the first by SHA-256 of the sample
            id: it depends on nothing else.
        samples_sha256: of the chosen sample ids and of the shards they lie in.
        images: `shown`, or `withheld` for the blind baseline, where a mid-grey picture stands for every image.
        precision: of matrix products, see `precision.computing`.
    """

    dataset: str
    split: str
    preset: str
    prompt: str
    mode: Mode
    candidates_from: str
    candidates: tuple[str, ...]
    classes: tuple[str, ...]
    aggregate: str
    vocabulary_size: int
    vocabulary_sha256: str
    verbalizers: tuple[tuple[str, str], ...]
    normalize: str
    include_eos: bool
    max_new_tokens: int
    min_new_tokens: int
    num_beams: int
    length_penalty: float
    repetition_penalty: float
    beam_lengths: str
    rerank: int
    max_text_tokens: int
    text_processor: str
    may_be_empty: tuple[str, ...]
    transform: str
    upright: bool
    transparency: str
    frames: int
    ocr: str
    metric: str
    metric_sha256: str
    samples: int | None
    samples_sha256: str
    images: str
    precision: EvaluationPrecision = "fp32"
    until: tuple[str, ...] = ()

    def sha256(self) -> str:
        """Hash of the whole protocol."""
        stated = {name: value for name, value in asdict(self).items() if (name, value) not in UNSTATED.items()}
        return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()

    def describe(self) -> dict[str, str]:
        """Name and value of every choice, as a report shows them."""
        shown = {
            "split": self.split,
            "samples": "all" if self.samples is None else f"first {self.samples} by hash of id",
            "preset": self.preset,
            "prompt": self.prompt,
            "mode": self.mode,
            "metric": self.metric + (f" (sha256 {self.metric_sha256[:16]})" if self.metric_sha256 else ""),
            "images": f"{self.images}, {self.transform}"
            + ", not turned upright" * (not self.upright)
            + ", transparency dropped" * (self.transparency == "dropped")
            + f", {self.frames} frames a video" * (self.frames > 1),
            "precision": self.precision,
        }
        if self.text_processor != "none":
            shown["text processor"] = self.text_processor
        if self.ocr:
            shown["OCR tokens"] = self.ocr
        if self.mode == "rank":
            shown |= self._describe_ranking()
        elif self.mode == "retrieve":
            shown["ranking"] = (
                f"the {self.rerank} nearest by contrast, by logit of a match plus cosine; equal ones in order"
            )
            shown["captions"] = f"{self.vocabulary_size:,}, of {self.max_text_tokens} tokens at most"
        elif self.mode == "match":
            shown["matching"] = "true where the probability that statement and image match is above 0.5"
            shown["statements"] = f"of {self.max_text_tokens} tokens at most"
        else:
            tokens = f"{self.min_new_tokens} to {self.max_new_tokens} new tokens"
            penalties = f"length penalty {self.length_penalty:g}, repetition penalty {self.repetition_penalty:g}"
            lengths = "" if self.beam_lengths == "new_tokens" else f", beam lengths of {self.beam_lengths}"
            ends = f", until {' or '.join(map(repr, self.until))}" if self.until else ""
            shown["decoding"] = f"beam size {self.num_beams}, {tokens}, {penalties}{lengths}{ends}"
        return shown | {"samples sha256": self.samples_sha256[:16], "protocol sha256": self.sha256()[:16]}

    def _describe_ranking(self) -> dict[str, str]:
        candidates = {
            "choices": "each sample's own choices",
            "train_answers": f"{self.vocabulary_size:,} answers of the train split (sha256 {self.vocabulary_sha256[:16]})",
            "answer_list": f"a list of {self.vocabulary_size:,} answers (sha256 {self.vocabulary_sha256[:16]})",
        }.get(self.candidates_from, ", ".join(self.candidates))
        eos = "EOS counted" if self.include_eos else "EOS not counted"
        shown = {"candidates": candidates, "normalisation": f"{self.normalize} of token log-likelihoods, {eos}"}
        if self.verbalizers:
            shown["classes"] = f"{self.aggregate} of the likelihoods of a class's texts"
        return shown


@dataclass(frozen=True)
class EvaluationSample:
    """One question of an evaluation: where its image lies, its record and its finished prompt."""

    id: str
    shard: ShardReader
    row: int
    record: Record
    prompt: str

    @property
    def image_key(self) -> str:
        """Names the image, so that questions on one image can be resampled together."""
        return f"{self.shard.path.name}/{self.row}"

    @property
    def frames(self) -> int:
        """Pictures of this sample, 1 but for videos."""
        frames = self.shard.frames_of(self.row)
        return int(frames.stop - frames.start)


@dataclass(frozen=True)
class Task:
    """A dataset card made ready to run on one split.

    Attributes:
        card, protocol, samples: what is run.
        records: how many there should be and are in the prepared split.
        vocabulary: the texts to rank where they come from the train split or a list, or the captions of all samples.
        answers_public: whether the samples can be scored here; a leaderboard's server does it otherwise.
        made_up: whether the prepared split holds made-up data, on which no score means anything.
        own_metric: what scores it where that is no metric of `METRICS`.
    """

    card: Card
    protocol: Protocol
    samples: tuple[EvaluationSample, ...]
    records: RecordCounts
    vocabulary: tuple[str, ...] = ()
    answers_public: bool = True
    made_up: bool = False
    own_metric: Metric | None = None

    @property
    def metric(self) -> Metric:
        """What scores it, with all that is particular to it."""
        return self.own_metric or METRICS[self.protocol.metric]

    def needs(self, skills: Collection[Skill]) -> Skill:
        """What a model of these skills is asked: a model that takes no prompt can still caption."""
        if self.protocol.mode != "generate":
            return self.protocol.mode
        captions = self.metric.references is captions_of_record
        return "caption" if captions and "generate" not in skills else "generate"

    def processed(self, texts: Iterable[str]) -> list[str]:
        """Texts as the model is shown them."""
        return [TEXT_PROCESSORS[self.protocol.text_processor](text) for text in texts]

    def candidates(self, record: Record) -> tuple[str, ...]:
        """The texts to rank for a record; none where the model writes freely."""
        if self.protocol.candidates_from == "choices":
            return record.choices
        return self.vocabulary or self.protocol.candidates


def make_task(
    card: Card,
    shards: Path,
    *,
    split: str | None = None,
    samples: int | None = None,
    mode: Mode | None = None,
    withhold_images: bool = False,
    preset: str = "paper",
    llm_kind: str = "decoder",
    answers: Path | None = None,
    precision: EvaluationPrecision = "fp32",
    **instead: Any,
) -> Task:
    """Open a card's split and settle its protocol.

    Args:
        card: the dataset.
        shards: folder of prepared datasets.
        split: instead of the card's own evaluation split.
        samples: how many to score; None is all.
        mode: instead of the card's own.
        withhold_images: the blind baseline.
        preset: `paper`, `lavis` for what the released code computes, or `lmms_eval` for what that harness asks.
        llm_kind: `decoder` or `encoder_decoder`; the released code treats them differently.
        answers: the list of a card that ranks one.
        precision: of matrix products.
        instead: of the card's own `rerank`, `normalize` or `include_eos`; None leaves that.

    Raises:
        UserError: no evaluation in the card, a split (its own, or the train split that candidates come from) that is not
            prepared or has no public answers, a mode or number of samples that does not suit the metric, no list of answers.
    """
    rules = _rules(card, preset, llm_kind, **instead)
    split, mode = split or rules.split, mode or rules.mode
    if reason := _unfit(card, rules, mode):
        raise UserError(reason)
    metric, choices = find_metric(rules.metric), protocol_fields(rules, mode)
    given = _given_answers(card, rules, answers) if choices["candidates_from"] == "answer_list" else ()
    opened = open_split(shards / card.source / split)
    check_prepared_from(card, opened.manifest)
    chosen = _choose(card, opened, replace(rules, prompt=choices["prompt"]), samples)
    if public := _answers_public(card, split, metric, chosen):
        _check_records(card, metric, chosen)
    if mode == "match":
        _check_statements(card, chosen)
    vocabulary = given or _vocabulary(card, shards, choices["candidates_from"], chosen)
    protocol = Protocol(
        dataset=card.name,
        split=split,
        preset=preset,
        metric_sha256=metric_sha256(rules.metric),
        vocabulary_size=len(vocabulary),
        vocabulary_sha256=hashlib.sha256("\n".join(vocabulary).encode()).hexdigest() if vocabulary else "",
        frames=max(sample.frames for sample in chosen),
        ocr=describe_ocr(opened.manifest.get("options", {}).get("ocr")) if shows_ocr(choices["prompt"]) else "",
        samples=samples,
        samples_sha256=_samples_sha256(opened, chosen),
        images="withheld" if withhold_images else "shown",
        precision=precision,
        **choices,
    )
    records = prepared_counts(card, opened, rules.kinds)
    if choices["candidates_from"] == "train_answers":
        records = replace(records, vocabulary=_vocabulary_counts(card, shards))
        if not is_made_up(opened.manifest):  # whose splits are not of one piece
            _note_unknown(card, frozenset(vocabulary), chosen)
    own = None if metric.name in METRICS else metric
    return Task(card, protocol, tuple(chosen), records, vocabulary, public, is_made_up(opened.manifest), own)


def _vocabulary_counts(card: Card, shards: Path) -> RecordCounts:
    """Records of the train split that candidates come from: all of them have answers."""
    train = prepared_counts(card, open_split(shards / card.source / "train"), ())
    return replace(train, answered=train.prepared)


def needed_splits(
    card: Card, *, split: str | None = None, mode: Mode | None = None, preset: str = "paper", llm_kind: str = "decoder"
) -> frozenset[str]:
    """The prepared splits that `make_task` opens.

    Raises:
        UserError: the card says nothing of evaluation.
    """
    rules = _rules(card, preset, llm_kind)
    ranked = protocol_fields(rules, mode or rules.mode)["candidates_from"]
    return frozenset({split or rules.split, *(["train"] if ranked == "train_answers" else [])})


def unfit(card: Card, mode: Mode, *, preset: str = "paper", llm_kind: str = "decoder") -> str:
    """Why a card cannot be evaluated in a mode; empty where it can.

    Raises:
        UserError: the card says nothing of evaluation.
    """
    return _unfit(card, _rules(card, preset, llm_kind), mode)


def _unfit(card: Card, rules: Evaluation, mode: Mode) -> str:
    metric, choices = find_metric(rules.metric), protocol_fields(rules, mode)
    if metric.needs_ranks != (mode == "retrieve"):
        return (
            f"{card.name}: {metric.title} is {'' if metric.needs_ranks else 'not '}made of what mode=retrieve finds, and "
            f"mode={mode} was asked for; leave mode to the card, or take it out of the suite"
        )
    if mode == "generate" and metric.needs_scores:
        return (
            f"{card.name}: {metric.name} needs the scores of candidates, which mode=generate does not give; "
            "rank, or take it out of the suite"
        )
    if choices["candidates_from"] == "card" and not choices["candidates"]:
        return f"{card.name} has no candidates to rank; evaluate it with mode=generate"
    if mode == "match" and not _has_statements(rules):
        return (
            f"{card.name} has no statements, which are true or false of an image, and mode=match judges those alone; leave "
            "mode to the card, or take it out of the suite"
        )
    return ""


def _has_statements(rules: Evaluation) -> bool:
    """Whether what is asked of an image is a statement, to be judged true or false."""
    return rules.mode == "match" or set(rules.verbalizers) == set(STATEMENT_CLASSES)


def watched_split(card: Card) -> str:
    """The split that training watches.

    Raises:
        UserError: the card says nothing of evaluation.
    """
    rules = _rules(card, "paper", "decoder")
    return rules.validation_split or rules.split


def make_validation_task(card: Card, shards: Path, *, samples: int | None) -> Task:
    """The task that training watches: the card's protocol on its validation split.

    Raises:
        UserError: as `make_task`.
    """
    return make_task(card, shards, split=watched_split(card), samples=samples, mode=mode_in_training(card))


def mode_in_training(card: Card) -> Mode | None:
    """The mode that a run which trains evaluates a card in; None: the card's own.

    A list of thousands of answers is ranked by evaluate.py, which is told where it is; a run lets the model write.
    """
    return "generate" if card.evaluation and card.evaluation.candidates_from == "answer_list" else None


def blind_task(task: Task) -> Task:
    """The same task as a blind baseline."""
    return replace(task, protocol=replace(task.protocol, images="withheld"))


def train_answers(card: Card, shards: Path) -> tuple[str, ...]:
    """Every answer of the prepared train split, the most frequent first, equally frequent ones by text.

    Raises:
        UserError: that split is not prepared, or has one answer alone.
    """
    folder = shards / card.source / "train"
    if not (folder / MANIFEST_NAME).is_file():
        raise UserError(
            f"{card.name} ranks all answers of its train split, which is not prepared in {shards}; run python prepare.py "
            f"dataset={card.prepared_as} split=train raw=FOLDER out={shards}, or evaluate with mode=generate"
        )
    counts = Counter(answer for record in _card_records(card, open_split(folder)) for answer in record.answers)
    if len(counts) == 1:
        raise UserError(
            f"{card.name} ranks all answers of its train split, and that has one alone, {next(iter(counts))!r}, which would "
            "always be chosen; add other classes, list them under evaluation.candidates, or evaluate with mode=generate"
        )
    return tuple(sorted(counts, key=lambda answer: (-counts[answer], answer)))


def majority_answers(card: Card, shards: Path) -> dict[str, str]:
    """The most frequent training answer to each question text, and under the empty string to any question.

    What a model can know without looking at any image. Empty where the train split is not prepared or has no answers.
    """
    folder = shards / card.source / "train"
    if not (folder / MANIFEST_NAME).is_file():
        return {}
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for record in _card_records(card, open_split(folder)):
        if record.answers:
            counts[record.question or ""][record.answers[0]] += 1
            counts[""][record.answers[0]] += 1
    return {question: min(seen, key=lambda answer: (-seen[answer], answer)) for question, seen in counts.items()}


def chance_level(task: Task) -> float | None:
    """The expected score of drawing evenly among the candidates, on the scale of papers' tables; None: not known."""
    if task.protocol.candidates_from == "captions":
        return chance_of_recall([len(sample.record.captions) for sample in task.samples])
    chance = task.metric.chance
    if chance is None or (chance is one_of and not task.metric.higher_is_better):  # it counts right answers
        return None
    if task.protocol.candidates_from == "choices":
        return fmean(chance(len(sample.record.choices)) for sample in task.samples)
    classes = set(task.protocol.classes or task.vocabulary)
    return chance(len(classes)) if classes else None


def refuse_unable(tasks: Iterable[Task], skills: Collection[Skill], what: str) -> None:
    """Refuse tasks that a model cannot be asked.

    Args:
        skills: the model's.
        what: it is, for the message.

    Raises:
        UserError: names all of them.
    """
    for need, reason in _LACKS.items():
        if asked := [task.card for task in tasks if task.needs(skills) == need and need not in skills]:
            names = ", ".join(card.name for card in asked)
            judged = need == "rank" and "match" in skills
            statements = judged and all(card.evaluation and _has_statements(card.evaluation) for card in asked)
            hint = "let evaluate.py judge its statements with mode=match, or " if statements else ""
            raise UserError(f"{what} {reason}, which {names} asks for; {hint}take it out of the suite")


_LACKS: dict[Skill, str] = {
    "rank": "has no language model to rank candidates with",
    "generate": "has no language model to answer a prompt with",
    "caption": "writes no captions",
    "retrieve": "has no matching head to retrieve with",
    "match": "has no matching head to judge statements with",
}


def as_json(protocol: Protocol) -> dict[str, Any]:
    """The protocol and its hash as JSON values."""
    return {**asdict(protocol), "sha256": protocol.sha256()}


def _rules(card: Card, preset: str, llm_kind: str, **instead: Any) -> Evaluation:
    """How a card is evaluated under a preset; what is given and not None stands in for the card's own.

    Raises:
        UserError: it is not evaluated, or not by that harness.
    """
    if card.evaluation is None:
        raise UserError(f"{card.name} is a dataset to train on: its card has no evaluation; take it out of the suite")
    if preset == "lmms_eval" and preset not in card.evaluation.presets:
        raise UserError(
            f"{card.name} has no presets.lmms_eval that says what that harness asks of it; suite=lmms_eval has the datasets "
            "that do"
        )
    rules = with_preset(card.evaluation, preset, llm_kind)
    rules = as_in_lmms_eval(rules) if preset == "lmms_eval" else rules
    rules = as_released(rules, llm_kind) if preset == "lavis" else rules
    return replace(rules, **{name: value for name, value in instead.items() if value is not None})


def as_in_lmms_eval(rules: Evaluation) -> Evaluation:
    """What lmms-eval does with every dataset, whatever its card says: greedy decoding, pictures by `convert("RGB")`."""
    return replace(
        rules,
        num_beams=1,
        min_new_tokens=0,
        length_penalty=1.0,
        repetition_penalty=1.0,
        transparency="dropped",
    )


def as_released(rules: Evaluation, llm_kind: str) -> Evaluation:
    """What the released code does with every dataset, whatever its card says: LAVIS 506965b on transformers 4.33."""
    most, fewest = released_lengths(rules.max_new_tokens, rules.min_new_tokens, llm_kind)
    if rules.mode == "rank" and rules.candidates_from != "answer_list":  # which BLIP ranks, with the end of each
        rules = replace(rules, **RANKING_PRESETS["lavis"][llm_kind])
    return replace(
        rules,
        max_new_tokens=most,
        min_new_tokens=fewest,
        beam_lengths="transformers_4_33",
        text_processor="blip_caption" if rules.text_processor == "none" else rules.text_processor,
        may_be_empty=("context",),  # it compares a list with an empty string
        upright=False,
        transparency="dropped",
    )


def released_lengths(max_len: int, min_len: int, llm_kind: str) -> tuple[int, int]:
    """The most and fewest new tokens of the released code's `max_len` and `min_len`.

    Under transformers 4.33 a decoder-only model's output begins with a token that both lengths count. An encoder-decoder
    model is given `max_new_tokens`, but its `min_length` counts the decoder's start token. One token is always written: the
    length is looked at behind it.
    """
    return max(1, max_len - 1) if llm_kind == "decoder" else max_len, max(0, min_len - 1)


def _vocabulary(card: Card, shards: Path, source: str, samples: Sequence[EvaluationSample]) -> tuple[str, ...]:
    """The texts that all samples are ranked among."""
    if source == "train_answers":
        return train_answers(card, shards)
    return tuple(text for sample in samples for text in sample.record.captions) if source == "captions" else ()


def _given_answers(card: Card, rules: Evaluation, path: Path | None) -> tuple[str, ...]:
    """The list of answers that a card ranks.

    Raises:
        UserError: it is not given, or is no list of several texts.
    """
    if path is None:
        raise UserError(
            f"{card.name} ranks a list of answers; fetch {rules.answer_list} and give its path as answers=, or evaluate "
            "with mode=generate"
        )
    with errors_for_users(path):
        answers = read_json(path)
    if not isinstance(answers, list) or not all(isinstance(text, str) and text.strip() for text in answers):
        raise UserError(f"{path} is no JSON list of texts; answers= takes what is at {rules.answer_list}")
    different = tuple(dict.fromkeys(answers))  # of equals the first would be taken anyway
    if len(different) < 2:
        raise UserError(
            f"{path} lists {len(different)} answers, and ranking needs two; answers= takes what is at {rules.answer_list}"
        )
    return different


def _note_unknown(card: Card, vocabulary: frozenset[str], samples: Sequence[EvaluationSample]) -> None:
    """Say how many samples no answer of the train split is right for: a class that is written otherwise there, say."""
    unknown = [sample for sample in samples if sample.record.answers and vocabulary.isdisjoint(sample.record.answers)]
    if unknown:
        logger.warning(
            "%s: %s of %s samples have an answer that the train split has not, so that none can be chosen which is right; "
            "the first is %s, %r",
            card.name,
            f"{len(unknown):,}",
            f"{len(samples):,}",
            unknown[0].id,
            unknown[0].record.answers[0],
        )


def _answers_public(card: Card, split: str, metric: Metric, samples: Sequence[EvaluationSample]) -> bool:
    """Whether every sample has what the metric compares with; a leaderboard may do the scoring where none has."""
    known = [bool(metric.references(sample.record)) for sample in samples]
    if all(known):
        return True
    if any(known):
        first = samples[known.index(False)].id
        raise UserError(f"{card.name}: some answers of split {split!r} are not there ({first}); prepare it again")
    if card.name not in metric.submissions:
        raise UserError(f"{card.name}: the answers of split {split!r} are not public; evaluate another split")
    return False


def _check_records(card: Card, metric: Metric, samples: Sequence[EvaluationSample]) -> None:
    """Refuse, before a model is asked anything, what the metric cannot score."""
    try:
        metric.count_fewer_annotators([sample.record for sample in samples])
    except ValueError as error:
        raise UserError(f"{card.name}: {error}") from None
    if not metric.needs_both_labels:
        return
    found = {sample.record.label for sample in samples}
    if not {0, 1} <= found:
        shown = ", ".join(map(str, sorted(label for label in found if label is not None)))
        raise UserError(
            f"{card.name}: {metric.title} needs samples of both labels, and all chosen ones ({len(samples)}) have label "
            f"{shown}; give more with samples="
        )


def _check_statements(card: Card, samples: Sequence[EvaluationSample]) -> None:
    """Refuse what cannot be true or false."""
    for sample in samples:
        if not sample.record.question or not set(sample.record.answers) <= set(STATEMENT_CLASSES):
            said = "no text" if not sample.record.question else f"the answer {sample.record.answers[0]!r}"
            raise UserError(
                f"{card.name}: {sample.id} has {said}, and mode=match judges statements whose answers are true and false; "
                "evaluate it in another mode"
            )


def _card_records(card: Card, opened: PreparedSplit) -> Iterable[Record]:
    """The records that a card draws from a split, in stored order."""
    row_read, records = (-1, -1), []
    for number, row, place in opened.records(card.kinds).tolist():
        if (number, row) != row_read:
            row_read, records = (number, row), opened.shards[number].read_records(row)
        yield records[place]


def _choose(card: Card, opened: PreparedSplit, rules: Evaluation, limit: int | None) -> list[EvaluationSample]:
    kinds = rules.kinds or card.kinds
    records_at: dict[tuple[int, int], list[Record]] = {}
    found = []
    for number, row, place in opened.records(kinds).tolist():
        if (number, row) not in records_at:
            records_at[number, row] = opened.shards[number].read_records(row)
        record = records_at[number, row][place]
        shard = opened.shards[number]
        try:
            asked = finished_prompt(rules, record)
        except ValueError as error:
            raise UserError(f"{card.name}: {error}; change evaluation.prompt of its card") from None
        found.append(EvaluationSample(f"{card.name}/{record.id}", shard, row, record, asked))
    if not found:
        raise UserError(f"{card.name}: split {opened.split!r} has nothing to evaluate; prepare it again")
    if limit is None or limit >= len(found):
        return found
    by_hash = sorted(found, key=lambda sample: hashlib.sha256(sample.id.encode()).digest())
    chosen = {sample.id for sample in by_hash[:limit]}
    return [sample for sample in found if sample.id in chosen]  # in stored order, as when all are taken


def _samples_sha256(opened: PreparedSplit, samples: Sequence[EvaluationSample]) -> str:
    digest = hashlib.sha256(opened.sha256.encode())
    for sample in samples:
        digest.update(sample.id.encode() + b"\n")
    return digest.hexdigest()


# The classes of statements in the order of the matching head's logits: no match, match. Of equals the first is taken, so a
# statement is true where the probability of a match is above 0.5.
STATEMENT_CLASSES = ("false", "true")
_OWN_OCR = "the dataset's own"
_FROM_CARD = (
    *SEARCH,
    "prompt",
    "aggregate",
    "normalize",
    "include_eos",
    "beam_lengths",
    "until",
    "text_processor",
    "may_be_empty",
    "transform",
    "upright",
    "transparency",
)


def protocol_fields(rules: Evaluation, mode: str) -> dict[str, Any]:
    """The choices of a `Protocol`, by name, that follow from a card's evaluation in this mode."""
    if mode == "match":
        rules = replace(rules, prompt=STATEMENT, candidates=STATEMENT_CLASSES, verbalizers={}, candidates_from=None)
    source = {"rank": rules.candidates_from or "card", "retrieve": "captions", "match": "card"}.get(mode, "none")
    verbalizers = tuple((text, label) for label, synonyms in rules.verbalizers.items() for text in synonyms)
    ranked = source == "card"
    return {name: getattr(rules, name) for name in _FROM_CARD} | {
        "mode": mode,
        "metric": metric_name(rules.metric),
        "candidates_from": source,
        "candidates": rules.candidates + tuple(text for text, _ in verbalizers) if ranked else (),
        "classes": rules.candidates + tuple(label for _, label in verbalizers) if ranked else (),
        "verbalizers": verbalizers,
        "rerank": rules.rerank if mode == "retrieve" else 0,
        "max_text_tokens": rules.max_text_tokens if mode in ("retrieve", "match") else 0,
    }


def expected_shard_fields(rules: Evaluation) -> dict[str, Any]:
    """What a card expects of choices that the prepared shards make; without those that it leaves open."""
    expected: dict[str, Any] = {"frames": rules.frames}
    if rules.ocr is not None or not shows_ocr(rules.prompt):
        expected["ocr"] = describe_ocr(None) if shows_ocr(rules.prompt) else ""
    return expected


def shows_ocr(prompt: str) -> bool:
    """Whether OCR tokens stand in a prompt."""
    return "{ocr_tokens}" in prompt


def describe_ocr(made_by: Mapping[str, Any] | None) -> str:
    """Whose OCR tokens a prompt shows and how many at most; `made_by` is `options.ocr` of a manifest, None for own ones."""
    made = "{library} {version} on {runtime}, lines of score {threshold} and above"
    source = _OWN_OCR if made_by is None else made.format_map(made_by)
    return f"{source}, the first {MAX_OCR_TOKENS}"
