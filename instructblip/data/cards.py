"""Dataset cards: everything the project knows about one dataset.

An official card is `datasets/<name>.yaml` and states all of it. A card of one's own lies anywhere else, is given by its path
wherever a name is, and may be short: `card_defaults` says what holds where it says nothing.

`python -m instructblip.data.cards` writes the table in `datasets/README.md` from the official cards.
"""

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from statistics import fmean
from typing import Any, ClassVar, Literal, get_args

from instructblip.config.schema import CardTask, NotNegative, Section, Sha256
from instructblip.config.validate import build, differences, nearest, read_sections, unknown_key, valid_keys
from instructblip.data.card_defaults import TRAIN_SPLIT, completed
from instructblip.data.card_evaluation import Evaluation, check_evaluation, metric_name
from instructblip.data.readers import READERS
from instructblip.data.templates import TemplateSet, load_templates
from instructblip.errors import UserError
from instructblip.files import shipped, write_atomically

CARDS_FOLDER = shipped("datasets")

_URL = re.compile(r"https?://[^/\s]+/\S+")
_NAME = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}"
)  # of a folder on every file system, and in every file that names it
_RESERVED = ("mean",)  # recipe.keep_best=mean is no dataset
# What a view takes from its parent and may not say again.
SOURCE_KEYS = (
    "reader",
    "reader_options",
    "columns",
    "homepage",
    "licence",
    "how_to_get",
    "source_part",
    "splits",
    "verified",
    "image_source",
)
_SECTIONS = ("training", "evaluation")
# What a person wants to know of a card of one's own that settles the rest by itself.
_SETTLED = ("name", "task", "role", "reader", "reader_options", "columns", "kinds", "templates", *_SECTIONS)
# And how its files come to the disk, which says nothing about what is in them.
FETCH_KEYS = ("fetch", "not_fetched")


@dataclass(frozen=True)
class SplitCounts(Section):
    """The raw files of a split and its expected numbers; None, or a kind left out: not known.

    Attributes:
        images, records: how many images (or videos) and records, of all kinds together.
        records_by_kind: record kind -> number of records.
        files: role (`questions`, `images`, as the reader calls it) -> places below `raw=` where that file or folder may
            lie, in the order they are tried. Readers of people's own data read all of them.
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
        below: the folder in the archive that what is wanted lies in, where it has one around all; members are named, and
            unpacked, from there on.
        splits: those that need it; empty: all.
        bytes, sha256: of the file, where known; the server's file must have them.
    """

    url: str
    gives: tuple[str, ...]
    unpack: str | None = None
    members: tuple[str, ...] = ()
    flat: bool = False
    below: str = ""
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
        source_part: its name in `configs/sources`, if a run may fetch it without asking: the packaged part of that name, or,
            with `fetch`, those files.
        fetch: the official files, where they are public and their licence lets anybody download them.
        not_fetched: why they are not, where neither of the two is said.
        splits: split -> raw files and expected counts of the whole source.
        verified: whether the counts were checked against the official files.
        image_source: the collection whose ids its images carry, so that another dataset's use of the same image is found
            by id: COCO's number, OpenImages' 16 hexadecimal digits, YouTube's 11 characters. None: ids of its own.
        shared_images: held-in dataset -> why images of this held-out one occur in it, where that is known and accepted.
        templates: name of the template set in `datasets/templates/`, or path of one's own; None: never trained.
        evaluation: see there; None: never evaluated.
        training: see there.
        paper: model -> the paper's score in percent, where it gives one.
        paper_parts: model -> part of the score -> the same, where a paper gives the parts of which the score is the mean.
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
    paper_parts: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def published(self) -> dict[str, float]:
        """Model -> the published score; where a paper gives its parts, their mean."""
        return self.paper | {model: fmean(parts.values()) for model, parts in self.paper_parts.items()}

    @property
    def source(self) -> str:
        """Name of the dataset whose shards hold this card's records: the parent's for a view."""
        return self.view_of or self.name

    @property
    def reference(self) -> str:
        """What the commands call it."""
        return self.name

    @property
    def prepared_as(self) -> str:
        """What prepare.py calls the dataset whose shards hold its records."""
        return self.source

    @property
    def told(self) -> dict[str, Any]:
        """What the reader is told besides the places of files: its options, and the dataset's name."""
        return {"prefix": self.source, "dataset": self.source, "columns": {}, **self.reader_options}

    def template_set(self) -> TemplateSet:
        """What it is trained with.

        Raises:
            UserError: nothing, or as `load_templates`.
        """
        if self.templates is None:
            raise UserError(f"card {self.reference} names no templates and cannot be trained on")
        return load_templates(self.templates)

    def expected_records(self, split: str, kinds: Sequence[str] = ()) -> int | None:
        """Expected number of records in a split of these kinds (none given: the card's own); None: not known."""
        counts, kinds = self.splits[split], kinds or self.kinds
        if not kinds:
            return counts.records
        numbers = [counts.records_by_kind.get(kind) for kind in kinds]
        return None if None in numbers else sum(number for number in numbers if number is not None)


@dataclass(frozen=True, kw_only=True)
class OwnCard(Card):
    """A card of one's own, its defaults filled in.

    Attributes:
        task: what is asked about an image; decides the defaults, and which columns a reader of tables takes.
        columns: column, as the reader calls it -> what it is called in the files, where that is another name.
        path: of the card's file, as it was given.
        said: the keys that the card says itself, those of its sections with a dot; all else is a default.
        read_as: the task that its records were read for: the parent's for a view.

    The last three the loader says, and no card.
    """

    NOT_SAID: ClassVar[tuple[str, ...]] = ("path", "said", "read_as")

    task: CardTask | None = None
    columns: dict[str, str] = field(default_factory=dict)
    path: str = ""
    said: tuple[str, ...] = ()
    read_as: CardTask | None = None

    @property
    def reference(self) -> str:
        """Its path."""
        return self.path

    @property
    def prepared_as(self) -> str:
        """Its path; of a view of an official dataset, that one's name."""
        return self.source if self.is_of_official else self.path

    @property
    def is_of_official(self) -> bool:
        """Whether it is a view of an official dataset, whose card says what the shards are made of."""
        return self.source in _official_names()

    @property
    def told(self) -> dict[str, Any]:
        """Its options, the dataset's name, and what a reader of people's own data goes by: task and columns.

        A view of an official dataset has its parent's task among the options.
        """
        return {"task": self.read_as} | super().told | {"columns": self.columns}


def load_card(name_or_path: str | Path) -> Card:
    """Load the official card of a name, or the card at a path: what ends in `.yaml` or names a folder.

    Raises:
        UserError: no such card, not YAML, an unknown or missing key, a wrong type, contradictory statements.
    """
    if not is_path(str(name_or_path)):
        path = CARDS_FOLDER / f"{name_or_path}.yaml"
        if not path.is_file():
            near = nearest(str(name_or_path), _official_names())
            raise UserError(
                f"no dataset card {str(name_or_path)!r} in {CARDS_FOLDER}{near}; a card of your own is given by its path, "
                f"./{name_or_path}.yaml"
            )
        return _load_official(path)
    path = Path(name_or_path).expanduser()
    return _load_official(path) if _is_official(path) else _load_own(path, str(name_or_path))


def is_path(name_or_path: str) -> bool:
    """Whether a card is given by its path, not by its name."""
    return "/" in name_or_path or name_or_path.endswith((".yaml", ".yml"))


def load_cards(names: Iterable[str | Path]) -> list[Card]:
    """Load several cards; what is wrong with all of them is said at once.

    Raises:
        UserError: as `load_card`; two of them have one name.
    """
    cards: list[Card] = []
    wrong = []
    for name in names:
        try:
            cards.append(load_card(name))
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        raise UserError("; ".join(dict.fromkeys(wrong)))
    for number, card in enumerate(cards):
        for other in cards[:number]:
            if card.name == other.name and _place(card) != _place(other):
                raise UserError(
                    f"{other.reference} and {card.reference} are both named {card.name}; rename one of them"
                )
    return cards


def _place(card: Card) -> Path | None:
    """Where a card of one's own lies, however its path was written."""
    return Path(card.path).expanduser().resolve() if isinstance(card, OwnCard) else None


def _load_official(path: Path) -> Card:
    values = read_sections(path, "card")
    if values.get("view_of") is not None:
        values |= _parents_facts(values, path, lambda name: path.with_name(f"{name}.yaml"))
    card: Card = build(Card, values, str(path))
    _check_official(card, path)
    _check_card(card, path)
    return card


def _load_own(path: Path, given: str) -> OwnCard:
    if not path.is_file():
        raise UserError(f"there is no card at {given}; a card's path ends in .yaml")
    values = read_sections(path, "card")
    if hidden := [key for key in OwnCard.NOT_SAID if key in values]:
        raise UserError(f"{path}: {unknown_key(hidden[0], valid_keys(OwnCard))}")
    said, read_as = _said(values), values.get("task")
    if values.get("view_of") is not None:
        facts = _parents_facts(values, path, lambda name: _own_parent(path, name))
        read_as, values = facts.pop("task", None), values | facts
    by_loader = {"path": given, "said": said, "read_as": read_as if read_as in get_args(CardTask) else None}
    card: OwnCard = build(OwnCard, completed(values, path) | by_loader, str(path))
    _check_own(card, path)
    _check_card(card, path)
    return card


def all_cards() -> list[Card]:
    """All cards in `datasets/`, sorted by name."""
    return [load_card(path) for path in sorted(CARDS_FOLDER.glob("*.yaml"))]


def source_sha256(card: Card) -> str:
    """Hash of what a card says about its source; the same for a dataset and all its views."""
    facts = dataclasses.asdict(card)
    text = json.dumps([card.source, *(facts[key] for key in SOURCE_KEYS if key in facts)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def source_facts(card: Card, split: str) -> dict[str, Any]:
    """What decides the content of a split's shards besides the raw files: who reads them, and what it is told."""
    facts: dict[str, Any] = _as_yaml_has(
        {"reader": card.reader, "options": card.told, "files": card.splits[split].files}
    )
    return facts


def changed_source(card: Card, manifest: Mapping[str, Any]) -> list[str]:
    """What a card of one's own says otherwise of a prepared split than the card that it was prepared from.

    That was another one of the same name, or this one before it was changed. An official card changes with the code.
    """
    if not isinstance(card, OwnCard) or card.is_of_official or manifest["split"] not in card.splits:
        return []
    now, then = source_facts(card, manifest["split"]), manifest.get("source", {})
    return differences({key: then.get(key) for key in now}, now, ignore=())


def check_prepared_from(card: Card, manifest: Mapping[str, Any]) -> None:
    """Refuse shards of another card of one's own.

    Raises:
        UserError: names what differs.
    """
    if changed := changed_source(card, manifest):
        raise UserError(
            f"{card.source}/{manifest['split']} was prepared from another card than {card.reference} now is "
            f"({'; '.join(changed)}); run python prepare.py dataset={card.reference} again, or rename one of them"
        )


def as_stored(card: OwnCard) -> dict[str, Any]:
    """A card of one's own as results keep it, with its defaults: files by name alone, wherever they lie here."""
    facts: dict[str, Any] = _as_yaml_has(dataclasses.asdict(card))
    templates, evaluation = card.templates, facts["evaluation"]
    named = {} if templates is None else {"templates": card.template_set().name}
    scored = {} if evaluation is None else {"evaluation": _with_metric_names(evaluation)}
    return facts | named | scored | {"path": Path(card.path).name}


def _with_metric_names(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation, and its presets, with metrics of one's own by the name of their file."""
    found = {key: _with_metric_names(value) if isinstance(value, dict) else value for key, value in evaluation.items()}
    metric = found.get("metric")
    return found | {"metric": metric_name(metric)} if isinstance(metric, str) else found


def settled(card: OwnCard) -> list[tuple[str, Any, bool]]:
    """What holds for a card of one's own: (key, value, whether the card says it itself); without what is empty."""
    facts = _as_yaml_has(dataclasses.asdict(card))
    rows = []
    for key in _SETTLED:
        inner = (
            {f"{key}.{name}": value for name, value in facts[key].items()} if key in _SECTIONS and facts[key] else {}
        )
        rows += [(name, value, name in card.said) for name, value in (inner or {key: facts[key]}).items()]
    return [row for row in rows if row[1] not in (None, [], {})]


def _said(values: Mapping[str, Any]) -> list[str]:
    """The keys of a card as written, those of its sections with a dot."""
    sections = {key: values[key] for key in _SECTIONS if isinstance(values.get(key), dict)}
    return [key for key in values if key not in sections] + [
        f"{key}.{name}" for key, section in sections.items() for name in section
    ]


def _as_yaml_has(values: Any) -> Any:
    """Values of a card with lists for its tuples."""
    return json.loads(json.dumps(values))


# --- reading and validating ------------------------------------------------------------------------------------------


def _official_names() -> list[str]:
    return sorted(card.stem for card in CARDS_FOLDER.glob("*.yaml"))


def _is_official(path: Path) -> bool:
    """Whether a card lies in the folder of official ones, itself or as a link."""
    return path.parent.resolve() == CARDS_FOLDER.resolve()


def _own_parent(path: Path, name: str) -> Path:
    """What a card of one's own is a view of: a card beside it, by name or path, or else an official one."""
    if is_path(name):
        return path.parent / Path(name).expanduser()
    beside = path.with_name(f"{name}.yaml")
    return beside if beside.is_file() or name not in _official_names() else CARDS_FOLDER / f"{name}.yaml"


def _parents_facts(values: Mapping[str, Any], path: Path, place_of: Callable[[str], Path]) -> dict[str, Any]:
    """What a view takes from its parent: its name, and what the parent says of the files."""
    if said := [key for key in SOURCE_KEYS + FETCH_KEYS if key in values]:
        raise UserError(f"{path}: {said[0]} is the parent's to say; remove it, or view_of")
    name = values["view_of"]
    if not isinstance(name, str) or not place_of(name).is_file():
        known = [card.stem for card in sorted(path.parent.glob("*.yaml"))]
        raise UserError(f"{path}: view_of names no card: {name!r}{nearest(str(name), known)}")
    if read_sections(place_of(name), "card").get("view_of") is not None:
        raise UserError(f"{path}: view_of must name a dataset of its own, but {name} is a view too")
    parent = load_card(place_of(name))
    facts = _as_yaml_has(dataclasses.asdict(parent))
    taken = {key: facts[key] for key in (*SOURCE_KEYS, *FETCH_KEYS) if key in facts}
    return {"view_of": parent.name} | taken | ({"task": parent.task} if isinstance(parent, OwnCard) else {})


def _check_official(card: Card, path: Path) -> None:
    """An official card is named as its file, and says what its role asks for."""
    if card.name != path.stem:
        raise UserError(f"{path}: name is {card.name!r}; it must be the file's name, {path.stem!r}")
    if card.role == "held-in" and card.templates is None:
        raise UserError(f"{path}: a held-in dataset needs templates, the name of a set in datasets/templates")
    if card.role == "held-out" and card.evaluation is None:
        raise UserError(f"{path}: a held-out dataset needs the key evaluation")


def _check_own(card: OwnCard, path: Path) -> None:
    """A card of one's own has a name that a folder can have and no official card has, and something is done with it."""
    if not _NAME.fullmatch(card.name):
        what = "folders are named after it: give letters, digits, _ and -, 100 at most"
    elif card.name in _RESERVED:
        what = "that means something else in recipe.keep_best; give another"
    elif card.name in _official_names():
        what = "that is an official card's; give another"
    else:
        what = ""
    if what:
        raise UserError(f"{path}: name is {card.name!r}; {what}")
    if not card.splits:
        raise UserError(f"{path}: splits has none; give one, such as train")
    if card.templates is None and card.evaluation is None:
        raise UserError(f"{path}: nothing is done with it; give templates to train on it, or evaluation to score it")


def _check_card(card: Card, path: Path) -> None:
    """Statements that are well-typed one by one but do not go together."""
    if card.role == "held-in" and card.shared_images:
        raise UserError(f"{path}: shared_images is for held-out datasets to say; remove it")
    for split, counts in card.splits.items():
        _check_files(counts.files, f"{path}: splits.{split}.files")
    _check_reader(card, path)
    _check_fetch(card, path)
    if card.templates is not None:
        try:
            load_templates(card.templates)
        except UserError as error:
            raise UserError(f"{path}: templates: {error}") from None
    if card.evaluation is not None:
        check_evaluation(card.evaluation, card.splits, path, own=isinstance(card, OwnCard))


def _check_reader(card: Card, path: Path) -> None:
    """A reader that there is is told of the files that it needs, and of nothing that it does not read."""
    if card.reader not in READERS:
        raise UserError(f"{path}: reader={card.reader} is none of {', '.join(sorted(READERS))}")
    reader = READERS[card.reader]
    for split, counts in card.splits.items():
        if missing := [role for role in reader.needs if role not in counts.files]:
            raise UserError(f"{path}: key splits.{split}.{missing[0]} is missing; reader {card.reader} needs it")
        _check_told(counts.files, (*reader.needs, *reader.may_name), f"{path}: splits.{split}", card.reader)
    _check_told(card.reader_options, reader.options, f"{path}: reader_options", card.reader)
    _check_told(card.told["columns"], reader.columns, f"{path}: columns", card.reader)
    if reader.tasks and (task := card.told.get("task")) not in reader.tasks:
        given = "key task is missing" if task is None else f"task={task} is not what reader {card.reader} reads for"
        raise UserError(f"{path}: {given}; give {' or '.join(reader.tasks)}")


def _check_told(said: Iterable[str], known: Sequence[str], key: str, reader: str) -> None:
    for name in said:
        if name not in known:
            end = nearest(name, known) if known else "; remove it"
            raise UserError(f"{key} has {name!r}, which reader {reader} does not take{end}")


def _check_files(files: Mapping[str, Sequence[str]], key: str) -> None:
    """Each role has places, and all of them are below the raw folder."""
    for role, places in files.items():
        if not places:
            raise UserError(f"{key}.{role} names no place; give one, or remove it")
        for place in places:
            _check_place(place, f"{key}.{role}")


def _check_place(place: str, key: str) -> None:
    if PurePosixPath(place).is_absolute() or ".." in PurePosixPath(place).parts:
        raise UserError(
            f"{key}: {place!r} must be a path below the raw folder; put a link there to what lies elsewhere"
        )


def _check_fetch(card: Card, path: Path) -> None:
    """Each dataset says how its files come to the disk, and each download is complete."""
    # A source_part without fetch is a packaged one; with it, the card's downloads are made without asking.
    if (card.source_part is not None or bool(card.fetch)) + (card.not_fetched is not None) != 1:
        raise UserError(f"{path}: say one of source_part, fetch, and not_fetched (why its files are not fetched)")
    for number, item in enumerate(card.fetch):
        key = f"{path}: fetch.{number}"
        if not _URL.fullmatch(item.url):
            raise UserError(f"{key}.url {item.url!r} is no address of http or https")
        of_archive = item.members or item.flat or item.below
        if not item.gives or (item.unpack is None and (len(item.gives) != 1 or of_archive)):
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
