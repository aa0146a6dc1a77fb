"""Made-up samples of every evaluated dataset, in shards, and models that answer them: one that knows, one that guesses."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from instructblip.data.card_evaluation import Evaluation
from instructblip.data.cards import Card
from instructblip.data.records import Record
from instructblip.data.shards import MANIFEST_FORMAT, ShardReader, ShardWriter, shard_path
from instructblip.evaluation.protocol import Task, make_task
from instructblip.files import sha256_file, write_json

WORDS = ("cat", "dog", "house", "tree", "river", "stone", "cloud", "bread", "chair", "glass")
PICTURE = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x02\x00\x00\x00\x90wS\xde"
    b"\x00\x00\x00\x0cIDATx\x9cc\xf8\xcf\xc0\x00\x00\x03\x01\x01\x00\xc9\xfe\x92\xef\x00\x00\x00\x00IEND\xaeB`\x82"
)
_OPTIONS = 100  # of a VisDial round


def synthetic_task(card: Card, shards: Path, count: int, **options: Any) -> Task:
    """Write `count` samples of a card's evaluation split (and of train, where answers come from there) and open them.

    Answers are drawn evenly and have nothing to do with anything that a model is shown.
    """
    assert card.evaluation is not None
    stream = random.Random(card.name)
    for split in {card.evaluation.split, *(["train"] if card.evaluation.candidates_from == "train_answers" else [])}:
        _write_split(card, shards / card.source / split, count, stream)
    if card.evaluation.candidates_from == "answer_list" and "mode" not in options:
        write_json(shards / "answers.json", list(WORDS))
        options = {"answers": shards / "answers.json"} | options
    return make_task(card, shards, **options)


def _write_split(card: Card, folder: Path, count: int, stream: random.Random) -> None:
    assert card.evaluation is not None
    kinds = card.evaluation.kinds or card.kinds or ("question",)
    records = [_record(card.evaluation, kinds[number % len(kinds)], number, stream) for number in range(count)]
    with ShardWriter.open(shard_path(folder, 0)) as writer:
        for number, record in enumerate(records):
            writer.add(f"image_{number:04d}", {"png": PICTURE}, str(number), [record])
    shard = shard_path(folder, 0)
    manifest = {
        "format": MANIFEST_FORMAT,
        "dataset": card.source,
        "split": folder.name,
        "records_by_kind": dict(Counter(record.kind for record in records)),
        "shards": [{"name": shard.name, "sha256": sha256_file(shard)}],
    }
    write_json(folder / "manifest.json", manifest)


def _record(rules: Evaluation, kind: str, number: int, stream: random.Random) -> Record:
    fields: dict[str, Any] = {
        "id": str(number),
        "kind": kind,
        "question": f"what is item {number}?",
        "context": "a hint",
        "ocr_tokens": ("exit",),
        "history": (("is it big", "no"),),
    }
    if rules.metric == "cider":
        # Words that no other image has: a perfect caption scores 10, and none of the others' words help.
        return Record(**fields, captions=(" ".join(f"{word}{number}" for word in WORDS[:6]),) * 5)
    if rules.metric == "retrieval_recall":
        places = range(stream.randint(1, 4))
        return Record(**fields, captions=tuple(" ".join([*stream.sample(WORDS, 3), f"{number}.{p}"]) for p in places))
    if rules.verbalizers:
        label = stream.randrange(len(rules.verbalizers))
        return Record(**fields, label=label, answers=(list(rules.verbalizers)[label],))
    if rules.candidates_from == "choices":
        visdial = rules.metric == "visdial"
        choices = [f"option {place}" for place in range(_OPTIONS)] if visdial else list(WORDS[:4])
        stream.shuffle(choices)
        label = stream.randrange(len(choices))
        relevance = tuple(float(place == label) for place in range(len(choices))) if visdial else ()
        return Record(**fields, choices=tuple(choices), label=label, answers=(choices[label],), relevance=relevance)
    answer = stream.choice(rules.candidates or WORDS)
    annotators = {"ivqa_accuracy": 5.0, "exact_match": 1.0, "gqa_accuracy_lavis": 1.0}.get(rules.metric, 10.0)
    return Record(**fields, answers=(answer,), answer_weights=(annotators,))


def read_number(shard: ShardReader, row: int) -> Tensor:
    """In place of an image (F, P, V): its row, so that a made-up model knows which sample it is asked about."""
    return torch.full((1, 1, 1), float(row))


class Oracle:
    """Stands for a model and answers from the labels; with `asked`, also notes the prompts."""

    training = False
    device = torch.device("cpu")
    SKILLS = frozenset({"rank", "generate", "retrieve", "match"})
    PARTS: Mapping[str, tuple[str, ...]] = {}
    RELEASED_RANKING: Mapping[str, Any] = {}

    def __init__(self, task: Task) -> None:
        self.judges = task.protocol.mode == "match"
        self.records = {sample.row: sample.record for sample in task.samples}
        self.asked: list[str] = []

    def eval(self) -> None:
        """As a module's."""

    def train(self, mode: bool) -> None:
        """As a module's."""

    def image_tokens(self, images: Tensor) -> Tensor:
        """Tokens are what `read_number` gives."""
        return images

    def generate(self, images: Tensor, prompts: Sequence[str], **options: Any) -> list[str]:
        """The record's first answer or caption."""
        self.asked += prompts
        return [(record.answers or record.captions)[0] for record in self._records(images)]

    def rank(
        self, images: Tensor, prompts: Sequence[str], candidates: Sequence[Sequence[str]], **options: Any
    ) -> list[Tensor]:
        """The right candidate before all others."""
        self.asked += prompts
        return [
            torch.tensor([-1.0 if text == self._right(record) else -9.0 for text in texts])
            for record, texts in zip(self._records(images), candidates, strict=True)
        ]

    def encode_images(self, images: Tensor) -> SimpleNamespace:
        """Each image's own direction."""
        return SimpleNamespace(projected_BQE=torch.eye(len(self.records))[images.flatten().long()][:, None])

    def tokenize(self, texts: Sequence[str], *, max_tokens: int) -> tuple[Tensor, Tensor]:
        """One token a text: its number."""
        ids = torch.arange(len(texts))[:, None]
        self.asked += texts
        self.images = torch.tensor([row for row, record in sorted(self.records.items()) for _ in record.captions])
        return ids, torch.ones_like(ids)

    def encode_texts(self, ids: Tensor, mask: Tensor) -> SimpleNamespace:
        """The direction of the image that it is a caption of."""
        return SimpleNamespace(projected_BE=torch.eye(len(self.records))[self.images[ids[:, 0]]])

    def normalised(self, images: Tensor) -> Tensor:
        """As they are."""
        return images

    def encode_pairs(self, images: Tensor, ids: Tensor, mask: Tensor, rows: Tensor | None = None) -> SimpleNamespace:
        """A match where the caption is the image's, or the statement true."""
        images = images if rows is None else images[rows]
        if self.judges:
            match = torch.tensor([float(record.answers == ("true",)) for record in self._records(images)])
            return SimpleNamespace(logits_B2=torch.stack([0.5 - match, match - 0.5], dim=1))
        match = (images.flatten().long() == self.images[ids[:, 0]]).float()
        return SimpleNamespace(logits_B2=torch.stack([-match, match], dim=1))

    def _records(self, images: Tensor) -> list[Record]:
        return [self.records[int(row)] for row in images.flatten().tolist()]

    @staticmethod
    def _right(record: Record) -> str:
        return record.choices[record.label] if record.choices and record.label is not None else record.answers[0]
