"""Dataset cards: everything the project knows about one dataset, in `datasets/<name>.yaml`.

`python -m instructblip.data.cards` writes the table in `datasets/README.md` from the cards.
"""

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from instructblip.config.schema import NotNegative, Section, Sha256
from instructblip.config.validate import build, nearest, read_yaml
from instructblip.data.card_evaluation import Evaluation, check_evaluation
from instructblip.errors import UserError
from instructblip.files import shipped, write_atomically

CARDS_FOLDER = shipped("datasets")

_URL = re.compile(r"https?://[^/\s]+/\S+")
# What a view takes from its parent and may not say again.
SOURCE_KEYS = (
    "reader",
    "reader_options",
    "homepage",
    "licence",
    "how_to_get",
    "source_part",
    "splits",
    "verified",
    "image_source",
)
# And how its files come to the disk, which says nothing about what is in them.
FETCH_KEYS = ("fetch", "not_fetched")
TRAIN_SPLIT = "train"


@dataclass(frozen=True)
class SplitCounts(Section):
    """The raw files of a split and its expected numbers; None, or a kind left out: not known.

    Attributes:
        images, records: how many images (or videos) and records, of all kinds together.
        records_by_kind: record kind -> number of records.
        files: role (`questions`, `images`, as the reader calls it) -> places below `raw=` where that file or folder may
            lie, in the order they are tried.
    """

    images: NotNegative | None
    records: NotNegative | None
    records_by_kind: dict[str, NotNegative] = field(default_factory=dict)
    files: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Download(Section):
    """An official file that anybody may download.

    Attributes:
        url: http or https.
        gives: the files and folders below the raw folder that are there afterwards: the file itself under its place, or
            what is wanted of an archive. Where all of them are there already, nothing is fetched.
        unpack: the folder below the raw folder ("." for itself) that a zip or tar archive is unpacked in; None: the file
            is kept as it is.
        members: patterns (`*_balanced_questions.json`) of the archive's members that are unpacked; empty: all.
        flat: whether the members' own folders are left out, for archives whose folders differ or are not known.
        splits: those that need it; empty: all.
        bytes, sha256: of the file, where known; the server's file must have them.
    """

    url: str
    gives: tuple[str, ...]
    unpack: str | None = None
    members: tuple[str, ...] = ()
    flat: bool = False
    splits: tuple[str, ...] = ()
    bytes: NotNegative | None = None
    sha256: Sha256 | None = None


@dataclass(frozen=True)
class Training(Section):
    """What training on a dataset needs to know: `flip`, whether mirroring an image leaves its answers true."""

    flip: bool = True


@dataclass(frozen=True, kw_only=True)
class Card(Section):
    """One dataset, or one view of a dataset (other records of the same prepared images).

    A view says what it is a view of and is given its parent's source facts (`SOURCE_KEYS`, `FETCH_KEYS`) on loading.

    Attributes:
        name, title: short and full name; the name is the file's.
        task_group: the paper's group of tasks.
        role: whether the paper's way is to train on it (held-in) or to keep it for zero-shot evaluation (held-out).
        view_of: the parent's name, None for a dataset of its own.
        kinds: the record kinds this card is about, which training draws from; empty: all.
        reader: name of the raw format's reader in `instructblip.data.readers.READERS`.
        reader_options: what else that reader is told.
        homepage, licence, how_to_get: where it comes from, on which terms, and how a person gets the raw files.
        source_part: the part of `instructblip.fetch.parts` that fetches the raw files by itself, if one does.
        fetch: the official files, where they are public and their licence lets anybody download them.
        not_fetched: why they are not, else; exactly one of source_part, fetch and not_fetched is said.
        splits: split -> raw files and expected counts of the whole source.
        verified: whether the counts were checked against the official files.
        image_source: the collection whose ids its images carry, so that another dataset's use of the same image is found
            by id: COCO's number, OpenImages' 16 hexadecimal digits, YouTube's 11 characters. None: ids of its own.
        shared_images: held-in dataset -> why images of this held-out one occur in it, where that is known and accepted.
        templates: name of the template set in `datasets/templates/`; None: never trained.
        evaluation: see there; None: never evaluated.
        training: see there.
        paper: model -> the paper's score in percent, where it gives one.
    """

    name: str
    title: str
    task_group: str
    role: Literal["held-in", "held-out"]
    view_of: str | None = None
    kinds: tuple[str, ...] = ()
    reader: str
    reader_options: dict[str, Any] = field(default_factory=dict)
    homepage: str
    licence: str
    how_to_get: str
    source_part: str | None = None
    fetch: tuple[Download, ...] = ()
    not_fetched: str | None = None
    splits: dict[str, SplitCounts]
    verified: bool
    image_source: Literal["coco", "openimages", "youtube"] | None = None
    shared_images: dict[str, str] = field(default_factory=dict)
    templates: str | None = None
    evaluation: Evaluation | None = None
    training: Training = Training()
    paper: dict[str, float] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """Name of the dataset whose shards hold this card's records: the parent's for a view."""
        return self.view_of or self.name

    def expected_records(self, split: str, kinds: Sequence[str] = ()) -> int | None:
        """Expected number of records in a split of these kinds (none given: the card's own); None: not known."""
        counts, kinds = self.splits[split], kinds or self.kinds
        if not kinds:
            return counts.records
        numbers = [counts.records_by_kind.get(kind) for kind in kinds]
        return None if None in numbers else sum(number for number in numbers if number is not None)


def load_card(name_or_path: str | Path) -> Card:
    """Load `datasets/<name>.yaml`, or a card at a path that ends in `.yaml`.

    Raises:
        UserError: no such card, not YAML, an unknown or missing key, a wrong type, contradictory statements.
    """
    path = Path(name_or_path)
    if path.suffix != ".yaml":
        path = CARDS_FOLDER / f"{name_or_path}.yaml"
        if not path.is_file():
            known = [card.stem for card in sorted(CARDS_FOLDER.glob("*.yaml"))]
            near = nearest(str(name_or_path), known)
            raise UserError(f"no dataset card {str(name_or_path)!r} in {CARDS_FOLDER}{near}")
    values = _read_yaml(path)
    if values.get("view_of") is not None:
        if said := [key for key in SOURCE_KEYS + FETCH_KEYS if key in values]:
            raise UserError(f"{path}: {said[0]} is the parent's to say; remove it, or view_of")
        parent = _load_parent(path, values["view_of"])
        values |= {key: parent[key] for key in SOURCE_KEYS + FETCH_KEYS if key in parent}
    card: Card = build(Card, values, str(path))
    _check_card(card, path)
    return card


def load_cards(names: Iterable[str]) -> list[Card]:
    """Load several cards.

    Raises:
        UserError: as `load_card`, of all that are wrong at once.
    """
    cards, wrong = [], []
    for name in names:
        try:
            cards.append(load_card(name))
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        raise UserError("; ".join(dict.fromkeys(wrong)))
    return cards


def all_cards() -> list[Card]:
    """All cards in `datasets/`, sorted by name."""
    return [load_card(path) for path in sorted(CARDS_FOLDER.glob("*.yaml"))]


def source_sha256(card: Card) -> str:
    """Hash of what a card says about its source; the same for a dataset and all its views."""
    facts = dataclasses.asdict(card)
    text = json.dumps([card.source, *(facts[key] for key in SOURCE_KEYS)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


# --- reading and validating ------------------------------------------------------------------------------------------


def _read_yaml(path: Path) -> dict[str, Any]:
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"card {path} must hold keys and values at its top level")
    return values


def _load_parent(path: Path, name: Any) -> dict[str, Any]:
    """The parent's keys as written, from the folder of the view; the parent itself is validated first."""
    folder = path.parent
    if not isinstance(name, str) or not (folder / f"{name}.yaml").is_file():
        known = [card.stem for card in sorted(folder.glob("*.yaml"))]
        raise UserError(f"{path}: view_of names no card: {name!r}{nearest(str(name), known)}")
    if load_card(folder / f"{name}.yaml").view_of is not None:
        raise UserError(f"{path}: view_of must name a dataset of its own, but {name} is a view too")
    return _read_yaml(folder / f"{name}.yaml")


def _check_card(card: Card, path: Path) -> None:
    """Statements that are well-typed one by one but do not go together."""
    if card.name != path.stem:
        raise UserError(f"{path}: name is {card.name!r}; it must be the file's name, {path.stem!r}")
    if card.role == "held-in" and card.templates is None:
        raise UserError(f"{path}: a held-in dataset needs templates, the name of a set in datasets/templates")
    if card.role == "held-in" and card.shared_images:
        raise UserError(f"{path}: shared_images is for held-out datasets to say; remove it")
    if card.role == "held-out" and card.evaluation is None:
        raise UserError(f"{path}: a held-out dataset needs the key evaluation")
    for split, counts in card.splits.items():
        _check_files(counts.files, f"{path}: splits.{split}.files")
    _check_fetch(card, path)
    if card.evaluation is not None:
        check_evaluation(card.evaluation, card.splits, path)


def _check_files(files: Mapping[str, Sequence[str]], key: str) -> None:
    """Each role has places, and all of them are below the raw folder."""
    for role, places in files.items():
        if not places:
            raise UserError(f"{key}.{role} names no place; give one, or remove it")
        for place in places:
            _check_place(place, f"{key}.{role}")


def _check_place(place: str, key: str) -> None:
    if PurePosixPath(place).is_absolute() or ".." in PurePosixPath(place).parts:
        raise UserError(f"{key}: {place!r} must be a path below the raw folder")


def _check_fetch(card: Card, path: Path) -> None:
    """Each dataset says how its files come to the disk, and each download is complete."""
    if (card.source_part is not None) + bool(card.fetch) + (card.not_fetched is not None) != 1:
        raise UserError(f"{path}: say one of source_part, fetch, and not_fetched (why its files are not fetched)")
    for number, item in enumerate(card.fetch):
        key = f"{path}: fetch.{number}"
        if not _URL.fullmatch(item.url):
            raise UserError(f"{key}.url {item.url!r} is no address of http or https")
        if not item.gives or (item.unpack is None and (len(item.gives) != 1 or item.members or item.flat)):
            raise UserError(
                f"{key}.gives must name what is there afterwards: one file, or, with unpack, some of a folder"
            )
        for place in (*item.gives, item.unpack or "."):
            _check_place(place, key)
        for split in item.splits:
            if split not in card.splits:
                raise UserError(f"{key}.splits: {split!r} is not among splits{nearest(split, card.splits)}")


# --- table -----------------------------------------------------------------------------------------------------------


def cards_table(cards: Iterable[Card]) -> str:
    """`datasets/README.md`: one row a card, made from the cards alone."""
    lines = [
        "# Datasets",
        "",
        "One YAML card per dataset, or per view of a dataset (other records of the same images); template sets are in",
        "`templates/`. Train and evaluation: expected records of the kinds that are drawn and scored; `?` is a number that",
        "is not known, `-` no such split. Verified: whether the numbers were checked against the official files. Fetched:",
        "whether `prepare.py dataset=NAME fetch=true` downloads the official files; the cards of the others say why not,",
        "and all of them how to get the files by hand.",
        "This file is written by `python -m instructblip.data.cards`.",
        "",
        "| name | task group | role | train | evaluation | metric | licence | verified | fetched |",
        "|---|---|---|---:|---:|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_table_row(card) for card in cards)]) + "\n"


def _table_row(card: Card) -> str:
    rules = card.evaluation
    train = _number(card.expected_records(TRAIN_SPLIT)) if TRAIN_SPLIT in card.splits else "-"
    scored = "-" if rules is None else f"{_number(card.expected_records(rules.split, rules.kinds))} ({rules.split})"
    name = f"[`{card.name}`]({card.homepage})" + (f", view of `{card.view_of}`" if card.view_of else "")
    metric = "-" if rules is None else f"{rules.metric}, {rules.mode}"
    verified, fetched = ("yes" if said else "no" for said in (card.verified, card.not_fetched is None))
    cells = [name, card.task_group, card.role, train, scored, metric, card.licence, verified, fetched]
    return "| " + " | ".join(cells) + " |"


def _number(count: int | None) -> str:
    return "?" if count is None else f"{count:,}"


def main() -> int:
    """Write `datasets/README.md`; a card that is not valid is one line on standard error and status 2."""
    path = CARDS_FOLDER / "README.md"
    try:
        write_atomically(path, cards_table(all_cards()))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
