"""`prepare.py audit=`: do images or questions that are evaluated on occur in training data?

Images are compared by the SHA-256 of their stored bytes and, where cards say whose ids they carry (`image_source`), by
these ids in any of their written forms: one picture of COCO stands in files of different names and, re-encoded, of
different bytes. A question is found again when the same words stand on the same image.

Compared is what a card evaluates on (its evaluation split and kinds) with what the held-in cards train on (their train
split and kinds). Hashes are cut to 16 bytes, so that 14 million images need 224 MB.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.table import Table

from instructblip.data.cards import TRAIN_SPLIT, Card, all_cards
from instructblip.data.records import Record, parse_records
from instructblip.data.shards import MANIFEST_NAME, PreparedSplit, open_split
from instructblip.data.typed import WrongValueError
from instructblip.errors import UserError
from instructblip.progress import progress_bar

Hashes = npt.NDArray[np.bytes_]
GIVE_CARDS = "give its path, cards=[./mine.yaml]"  # to a command that looks at prepared datasets
_EXAMPLES = 3


@dataclass(frozen=True)
class UsedImages:
    """The images of one split that some card trains or evaluates on.

    Attributes:
        cards: the cards that do.
        names: image ids in the source, N.
        by_bytes, by_id: 16 bytes each; `by_id` is empty where the card does not say whose ids they are.
        questions: 16 bytes for each question on its image, by both ways of naming the image.
    """

    cards: tuple[Card, ...]
    split: str
    names: tuple[str, ...]
    by_bytes: Hashes
    by_id: Hashes
    questions: tuple[Hashes, Hashes]

    @property
    def title(self) -> str:
        """`vsr, test`; views are named by their parent."""
        return f"{self.cards[0].source}, {self.split}"

    @property
    def held_out(self) -> bool:
        """Whether a card evaluates zero-shot on it."""
        return any(card.role == "held-out" for card in self.cards)


@dataclass(frozen=True)
class Overlap:
    """What one evaluated split shares with one training split: numbers of images and of questions on them.

    `accepted` is why the card takes it for granted, None where it does not.
    """

    evaluated: UsedImages
    trained: UsedImages
    by_bytes: int
    by_id: int
    images: int
    questions: int
    examples: tuple[str, ...]
    accepted: str | None

    @property
    def is_leak(self) -> bool:
        """Held-out images in training data that no card accounts for."""
        return self.evaluated.held_out and self.images > 0 and self.accepted is None


@dataclass
class Audit:
    """All splits that were read, and what they share."""

    evaluated: list[UsedImages] = field(default_factory=list)
    trained: list[UsedImages] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)  # splits that cards use and that are not prepared
    unknown: list[str] = field(default_factory=list)  # datasets that no card says the use of
    overlaps: list[Overlap] = field(default_factory=list)

    def leaks(self) -> list[Overlap]:
        """Held-out images in training data that no card accounts for."""
        return [overlap for overlap in self.overlaps if overlap.is_leak]

    def summary(self) -> list[str]:
        """What was compared and what came out, a line each."""
        names = {"evaluated": self.evaluated, "trained on": self.trained}
        lines = [
            f"{what}: {'; '.join(f'{used.title} ({len(used.names):,} images)' for used in sorted(splits, key=_title))}"
            for what, splits in names.items()
        ]
        if self.absent:
            lines.append(f"not prepared there, so not compared: {', '.join(self.absent)}")
        if self.unknown:
            lines.append(f"not compared, for no card of it is known: {', '.join(self.unknown)}; {GIVE_CARDS}")
        pairs = len(self.evaluated) * len(self.trained)
        lines.append(f"{pairs - len(self.overlaps)} of {pairs} pairs share no image")
        lines += [
            f"stated: {overlap.evaluated.title} in {overlap.trained.cards[0].source}: {overlap.accepted}"
            for overlap in self.overlaps
            if overlap.accepted is not None
        ]
        for leak in self.leaks():
            title, other = leak.evaluated.title, leak.trained.cards[0].source
            lines.append(
                f"held-out {title} has {leak.images:,} images in the training data of {other}, e.g. {leak.examples[0]}; "
                f"leave them out, or state the reason in its card under shared_images.{other}"
            )
        return lines


def _title(used: UsedImages) -> str:
    return used.title


def audit_prepared(folders: Sequence[Path], cards: Iterable[Card] | None = None, *, own: Iterable[Card] = ()) -> Audit:
    """Compare all prepared datasets below some folders.

    Args:
        folders: what prepare.py wrote to.
        cards: what the datasets are used for; None: all official cards.
        own: cards that are known besides.

    Raises:
        UserError: nothing prepared there, no training data or nothing that is evaluated; a damaged shard.
    """
    known = [*(all_cards() if cards is None else cards), *own]
    manifests = [manifest for folder in folders for manifest in sorted(folder.rglob(MANIFEST_NAME))]
    if not manifests:
        raise UserError(
            f"no {MANIFEST_NAME} below {', '.join(map(str, folders))}; give the folders prepare.py wrote to"
        )
    audit = Audit()
    splits = {manifest.resolve(): open_split(manifest.parent) for manifest in manifests}
    found = {(opened.dataset, opened.split) for opened in splits.values()}
    audit.unknown = sorted({name for name, _ in found} - {card.source for card in known})
    with progress_bar("images") as progress:
        task = progress.add_task("reading images", total=sum(opened.manifest["images"] for opened in splits.values()))
        for opened in splits.values():
            _add_split(audit, opened, [card for card in known if card.source == opened.dataset])
            progress.advance(task, opened.manifest["images"])
    if not audit.trained or not audit.evaluated:
        missing = "train split of a held-in dataset" if not audit.trained else "split that a card evaluates on"
        unknown = f"; no card of {', '.join(audit.unknown)} is known: {GIVE_CARDS}" if audit.unknown else ""
        where = ", ".join(map(str, folders))
        raise UserError(f"there is no prepared {missing} below {where}, so nothing to compare{unknown}")
    audit.absent = sorted({f"{name} {split}" for name, split in _uses(known) - found})
    for evaluated in audit.evaluated:
        for trained in audit.trained:
            if (overlap := _overlap(evaluated, trained)) is not None:
                audit.overlaps.append(overlap)
    return audit


def _uses(cards: Iterable[Card]) -> set[tuple[str, str]]:
    """(dataset, split) of all that is trained and evaluated on."""
    trained = {(card.source, TRAIN_SPLIT) for card in cards if card.role == "held-in"}
    return trained | {(card.source, card.evaluation.split) for card in cards if card.evaluation is not None}


def _add_split(audit: Audit, opened: PreparedSplit, cards: Sequence[Card]) -> None:
    trains = [card for card in cards if card.role == "held-in" and opened.split == TRAIN_SPLIT]
    if trains:
        kinds = {kind for card in trains for kind in card.kinds} if all(card.kinds for card in trains) else set()
        audit.trained.append(_read_split(opened, trains, kinds))
    # Those who evaluate zero-shot and those who do not are judged differently.
    for role in ("held-out", "held-in"):
        uses = [card for card in cards if card.role == role and _evaluates_on(card, opened.split)]
        if uses:
            wanted = [card.evaluation.kinds or card.kinds for card in uses if card.evaluation is not None]
            kinds = {kind for part in wanted for kind in part} if all(wanted) else set()
            audit.evaluated.append(_read_split(opened, uses, kinds))


def _evaluates_on(card: Card, split: str) -> bool:
    return card.evaluation is not None and card.evaluation.split == split


def _read_split(opened: PreparedSplit, cards: Sequence[Card], kinds: set[str]) -> UsedImages:
    names: list[str] = []
    by_bytes, by_id = bytearray(), bytearray()
    questions = bytearray(), bytearray()
    for shard in opened.shards:
        for row in range(len(shard)):
            frames, text = shard.read_encoded(row)
            try:
                image_id, stored = parse_records(text)
                records = [record for record in map(Record.from_dict, stored) if not kinds or record.kind in kinds]
            except WrongValueError as error:
                where = f"{shard.path} has damaged records at {shard.keys[row]} ({error})"
                raise UserError(f"{where}; prepare it again") from None
            if not records:
                continue
            names.append(image_id)
            images = [_content_hash(frames), _id_hash(cards[0], image_id)]
            by_bytes += images[0]
            by_id += images[1]
            asked = dict.fromkeys(normalize_question(record.question) for record in records if record.question)
            for image, found in zip(images, questions, strict=True):
                for question in asked if image else ():
                    found += _cut(image + question.encode("utf-8", "surrogatepass"))
    return UsedImages(
        tuple(cards),
        opened.split,
        tuple(names),
        _hashes(by_bytes),
        _hashes(by_id),
        (_hashes(questions[0]), _hashes(questions[1])),
    )


def _overlap(evaluated: UsedImages, trained: UsedImages) -> Overlap | None:
    same_bytes = np.isin(evaluated.by_bytes, trained.by_bytes)
    same_id = np.isin(evaluated.by_id, trained.by_id)
    either = same_bytes.copy()
    if len(same_id):
        either |= same_id
    if not either.any():
        return None
    questions = max(
        int(np.isin(one, other).sum()) for one, other in zip(evaluated.questions, trained.questions, strict=True)
    )
    source = trained.cards[0].source
    stated = [card.shared_images.get(source) for card in evaluated.cards if card.role == "held-out"]
    accepted = None if None in stated or not stated else stated[0]
    return Overlap(
        evaluated,
        trained,
        by_bytes=int(same_bytes.sum()),
        by_id=int(same_id.sum()),
        images=int(either.sum()),
        questions=questions,
        examples=tuple(evaluated.names[row] for row in np.flatnonzero(either)[:_EXAMPLES].tolist()),
        accepted=accepted,
    )


# --- naming what is compared -----------------------------------------------------------------------------------------


def source_id(collection: str, image_id: str) -> str | None:
    """The id of an image in `coco`, `openimages` or `youtube`, out of any of the forms that datasets write it in.

    `COCO_val2014_000000391895.jpg`, `000000391895` and `391895` are one image of COCO, its number, whichever of its splits
    the file lies in. A clip of a YouTube video (`<id>_<start>_<end>`) counts as the video. None for anything else.
    """
    name = image_id.rsplit("/", 1)[-1]
    forms = {
        "coco": r"(?:.*_)?0*(\d+)(?:\.\w+)?",
        "openimages": r"([0-9a-fA-F]{16})(?:\.\w+)?",
        "youtube": r"([A-Za-z0-9_-]{11})(?:_\d+(?:\.\d+)?_\d+(?:\.\d+)?)?(?:\.[a-z0-9]+)?",
    }
    match = re.fullmatch(forms[collection], name)
    if match is None:
        return None
    return match[1].lower() if collection == "openimages" else match[1]


def normalize_question(question: str) -> str:
    """Lower-case words without punctuation."""
    return " ".join(re.findall(r"\w+", question.lower()))


def _content_hash(frames: Sequence[bytes]) -> bytes:
    if len(frames) == 1:
        return _cut(frames[0])
    return _cut(b"".join(hashlib.sha256(frame).digest() for frame in frames))


def _id_hash(card: Card, image_id: str) -> bytes:
    """16 bytes, of an id that no other image has where its form is not the collection's; none for ids of its own."""
    if card.image_source is None:
        return b""
    number = source_id(card.image_source, image_id)
    return _cut(f"{card.source} {image_id}" if number is None else f"{card.image_source}:{number}")


def _cut(content: bytes | str) -> bytes:
    return hashlib.sha256(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content).digest()[
        :16
    ]


def _hashes(content: bytearray) -> Hashes:
    return np.frombuffer(bytes(content), dtype="S16")


# --- table -----------------------------------------------------------------------------------------------------------


def audit_table(audit: Audit) -> Table:
    """A row for each pair of splits that share images; questions are those on the shared images that are the same.

    Verdicts: `LEAK`; `stated`, a card says why; `held-in`, an evaluation that is not zero-shot anyway.
    """
    table = Table(title="Evaluated images in training data", title_justify="left")
    table.add_column("evaluated", no_wrap=True)
    table.add_column("trained on", no_wrap=True)
    for name in ("images", "by bytes", "by id", "questions"):
        table.add_column(name, justify="right")
    table.add_column("examples", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    for overlap in audit.overlaps:
        verdict = "LEAK" if overlap.is_leak else "stated" if overlap.accepted else "held-in"
        table.add_row(
            overlap.evaluated.title,
            overlap.trained.cards[0].source,
            f"{overlap.images:,} of {len(overlap.evaluated.names):,}",
            f"{overlap.by_bytes:,}",
            f"{overlap.by_id:,}",
            f"{overlap.questions:,}",
            ", ".join(overlap.examples),
            verdict,
        )
    return table
