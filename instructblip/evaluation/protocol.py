"""A frozen evaluation protocol: which samples, which prompt, how an answer is had, how it is scored."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from instructblip.data.cards import Card, Evaluation
from instructblip.data.sample import Record
from instructblip.data.shards import PreparedSplit, ShardReader, open_split
from instructblip.data.templates import render_prompt
from instructblip.errors import UserError

SCORED_METRICS = ("accuracy",)  # what `runner` computes so far


@dataclass(frozen=True)
class Protocol:
    """Everything that decides a score besides the model; stored in results.json.

    Attributes:
        candidates: texts to rank; `classes` beside them names the class each text stands for (itself, without verbalizers).
            A class's score is the log of the summed likelihoods of its texts.
        verbalizers: (text, class) pairs; a freely generated text of one of them counts as its class.
        samples: how many of the split's samples are scored; None is all. The subset is the first by SHA-256 of the sample
            id: it depends on nothing else.
        samples_sha256: of the chosen sample ids and of the shards they lie in.
        images: `shown`, or `withheld` for the blind baseline, where a mid-grey picture stands for every image.
    """

    dataset: str
    split: str
    prompt: str
    mode: str
    candidates: tuple[str, ...]
    classes: tuple[str, ...]
    verbalizers: tuple[tuple[str, str], ...]
    normalize: str
    include_eos: bool
    max_new_tokens: int
    min_new_tokens: int
    num_beams: int
    length_penalty: float
    metric: str
    samples: int | None
    samples_sha256: str
    images: str

    def sha256(self) -> str:
        """Hash of the whole protocol."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def describe(self) -> dict[str, str]:
        """Name and value of every choice, as a report shows them."""
        shown = {
            "split": self.split,
            "samples": "all" if self.samples is None else f"first {self.samples} by hash of id",
        }
        shown |= {"prompt": self.prompt, "mode": self.mode, "metric": self.metric, "images": self.images}
        if self.mode == "rank":
            shown["candidates"] = ", ".join(self.candidates)
            eos = "EOS counted" if self.include_eos else "EOS not counted"
            shown["normalisation"] = f"{self.normalize} of token log-likelihoods, {eos}"
        else:
            tokens = f"{self.min_new_tokens} to {self.max_new_tokens} new tokens"
            shown["decoding"] = f"beam size {self.num_beams}, {tokens}, length penalty {self.length_penalty:g}"
        return shown | {"samples sha256": self.samples_sha256[:16], "protocol sha256": self.sha256()[:16]}


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


@dataclass(frozen=True)
class Task:
    """A dataset card made ready to run on one split."""

    card: Card
    protocol: Protocol
    samples: tuple[EvaluationSample, ...]


def make_task(
    card: Card,
    shards: Path,
    *,
    split: str | None = None,
    samples: int | None = None,
    mode: str | None = None,
    withhold_images: bool = False,
) -> Task:
    """Open a card's split and settle its protocol.

    Args:
        card: the dataset.
        shards: folder of prepared datasets.
        split: instead of the card's own evaluation split.
        samples: how many to score; None is all.
        mode: `rank` or `generate` instead of the card's own.
        withhold_images: the blind baseline.

    Raises:
        UserError: the card says nothing of evaluation or asks for what cannot be done yet, the split is not prepared or
            has no public answers, or the mode does not suit the card.
    """
    rules = _rules(card)
    split = split or rules.split
    opened = open_split(shards / card.source / split)
    chosen = _choose(card, opened, rules.kinds or card.kinds, rules.prompt, samples)
    for sample in chosen:
        if not sample.record.answers:
            raise UserError(f"{card.name}: the answers of split {split!r} are not public; evaluate another split")
    mode = mode or rules.mode
    if mode not in ("rank", "generate"):
        raise UserError(f"mode is rank or generate, not {mode!r}")
    texts = [(text, text) for text in rules.candidates]
    verbalizers = tuple((text, label) for label, synonyms in rules.verbalizers.items() for text in synonyms)
    texts += verbalizers
    if mode == "rank" and not texts:
        raise UserError(f"{card.name} has no candidates to rank; evaluate it with mode=generate")
    protocol = Protocol(
        dataset=card.name,
        split=split,
        prompt=rules.prompt,
        mode=mode,
        candidates=tuple(text for text, _ in texts) if mode == "rank" else (),
        classes=tuple(label for _, label in texts) if mode == "rank" else (),
        verbalizers=verbalizers,
        normalize=rules.normalize,
        include_eos=rules.include_eos,
        max_new_tokens=rules.max_new_tokens,
        min_new_tokens=rules.min_new_tokens,
        num_beams=rules.num_beams,
        length_penalty=rules.length_penalty,
        metric=rules.metric,
        samples=samples,
        samples_sha256=_samples_sha256(opened, chosen),
        images="withheld" if withhold_images else "shown",
    )
    return Task(card, protocol, tuple(chosen))


def withheld(task: Task) -> Task:
    """The same task as a blind baseline."""
    return replace(task, protocol=replace(task.protocol, images="withheld"))


def majority_answers(card: Card, shards: Path) -> dict[str, str]:
    """The most frequent training answer to each question text, and under the empty string to any question.

    What a model can know without looking at any image.
    """
    rules, opened = _rules(card), open_split(shards / card.source / "train")
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in _choose(card, opened, rules.kinds or card.kinds, rules.prompt, None):
        answer = sample.record.answers[0]
        counts[sample.record.question or ""][answer] += 1
        counts[""][answer] += 1
    return {question: min(seen, key=lambda answer: (-seen[answer], answer)) for question, seen in counts.items()}


def _rules(card: Card) -> Evaluation:
    """How a card is evaluated.

    Raises:
        UserError: it is not, or not in a way that is built yet.
    """
    rules = card.evaluation
    if rules is None:
        raise UserError(f"{card.name} is a dataset to train on: its card has no evaluation; take it out of the suite")
    if rules.metric not in SCORED_METRICS:
        raise UserError(f"{card.name} is scored by {rules.metric}, which evaluation cannot compute yet")
    if rules.candidates_from is not None:
        raise UserError(f"{card.name} ranks {rules.candidates_from}, which evaluation cannot do yet")
    return rules


def _choose(
    card: Card, opened: PreparedSplit, kinds: Sequence[str], prompt: str, limit: int | None
) -> list[EvaluationSample]:
    records_at: dict[tuple[int, int], list[Record]] = {}
    found = []
    for number, row, place in opened.records(kinds).tolist():
        if (number, row) not in records_at:
            records_at[number, row] = opened.shards[number].read_records(row)
        record = records_at[number, row][place]
        shard = opened.shards[number]
        found.append(EvaluationSample(f"{card.name}/{record.id}", shard, row, record, render_prompt(prompt, record)))
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


def as_json(protocol: Protocol) -> dict[str, Any]:
    """The protocol and its hash as JSON values."""
    return {**asdict(protocol), "sha256": protocol.sha256()}
