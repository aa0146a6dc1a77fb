"""Dataset cards: everything the project knows about one dataset, in `datasets/<name>.yaml`.

`python -m instructblip.data.cards` writes the table in `datasets/README.md` from the cards.
"""

import dataclasses
import difflib
import hashlib
import json
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml

from instructblip.data.templates import FIELDS
from instructblip.errors import UserError
from instructblip.files import write_atomically

CARDS_FOLDER = Path(__file__).parents[2] / "datasets"

# What a prompt of a card may name in braces: what a template may, without what would give the answer away.
PROMPT_FIELDS = tuple(name for name in FIELDS if name not in ("answer", "caption"))
_FIELD = re.compile(r"\{([^{}]*)\}")
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
TRAIN_SPLIT = "train"

Metric = Literal[
    "accuracy",
    "multiple_choice_accuracy",
    "exact_match",
    "gqa_accuracy",
    "vqa_accuracy",
    "textvqa_accuracy",
    "vizwiz_accuracy",
    "ivqa_accuracy",
    "aokvqa_direct_answer",
    "aokvqa_multiple_choice",
    "ocr_vqa_accuracy",
    "cider",
    "auroc",
    "visdial",
]


@dataclass(frozen=True)
class SplitCounts:
    """The raw files of a split and its expected numbers; None, or a kind left out: not known.

    Attributes:
        images, records: how many images (or videos) and records, of all kinds together.
        records_by_kind: record kind -> number of records.
        files: role (`questions`, `images`, as the reader calls it) -> places below `raw=` where that file or folder may
            lie, in the order they are tried.
    """

    images: int | None
    records: int | None
    records_by_kind: dict[str, int] = field(default_factory=dict)
    files: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """How a dataset is evaluated.

    Attributes:
        split: the split that is scored.
        prompt: instruction, with fields of the record in braces.
        mode: `rank` scores given answers by log-likelihood, `generate` writes one.
        normalize: log-likelihood of a candidate as the sum or the mean over its tokens.
        include_eos: whether the end-of-sequence token counts as one of them.
        max_new_tokens, num_beams: decoding in `generate` mode (tokens; beam size).
        metric: the score.
        candidates: the answers to rank, the same for all records.
        verbalizers: class -> the texts that stand for it.
        candidates_from: where the answers to rank come from: each record's own `choices`, or `train_answers`, all
            answers of the train split. With `rank`, exactly one of candidates, verbalizers and candidates_from.
        min_new_tokens, length_penalty: further decoding in `generate` mode (tokens; exponent of the length that a
            beam's log-likelihood is divided by).
        kinds: the record kinds that are scored; empty: the card's own.
    """

    split: str
    prompt: str
    mode: Literal["rank", "generate"]
    normalize: Literal["sum", "mean"]
    include_eos: bool
    max_new_tokens: int
    num_beams: int
    metric: Metric
    candidates: tuple[str, ...] = ()
    verbalizers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    candidates_from: Literal["choices", "train_answers"] | None = None
    min_new_tokens: int = 1
    length_penalty: float = 1.0
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Training:
    """What training on a dataset needs to know: `flip`, whether mirroring an image leaves its answers true."""

    flip: bool = True


# What a card need not say.
_DEFAULTS: dict[str, Any] = {
    "view_of": None,
    "kinds": [],
    "reader_options": {},
    "source_part": None,
    "image_source": None,
    "shared_images": {},
    "templates": None,
    "evaluation": None,
    "training": {},
    "paper": {},
}


@dataclass(frozen=True)
class Card:
    """One dataset, or one view of a dataset (other records of the same prepared images).

    A view says what it is a view of and is given its parent's source facts (`SOURCE_KEYS`) on loading.

    Attributes:
        name, title: short and full name; the name is the file's.
        task_group: the paper's group of tasks.
        role: whether the paper's way is to train on it (held-in) or to keep it for zero-shot evaluation (held-out).
        view_of: the parent's name, None for a dataset of its own.
        kinds: the record kinds this card is about, which training draws from; empty: all.
        reader: name of the raw format's reader in `instructblip.data.readers.READERS`.
        reader_options: what else that reader is told.
        homepage, licence, how_to_get: where it comes from, on which terms, and how a person gets the raw files.
        source_part: the part of `instructblip.weights.assets` that fetches the raw files by itself, if one does.
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
    view_of: str | None
    kinds: tuple[str, ...]
    reader: str
    reader_options: dict[str, Any]
    homepage: str
    licence: str
    how_to_get: str
    source_part: str | None
    splits: dict[str, SplitCounts]
    verified: bool
    image_source: Literal["coco", "openimages", "youtube"] | None
    shared_images: dict[str, str]
    templates: str | None
    evaluation: Evaluation | None
    training: Training
    paper: dict[str, float]

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
            nearest = _nearest(str(name_or_path), known)
            raise UserError(f"no dataset card {str(name_or_path)!r} in {CARDS_FOLDER}{nearest}")
    values = _read_yaml(path)
    if values.get("view_of") is not None:
        if said := [key for key in SOURCE_KEYS if key in values]:
            raise UserError(f"{path}: {said[0]} is the parent's to say; remove it, or view_of")
        parent = _load_parent(path, values["view_of"])
        values |= {key: parent[key] for key in SOURCE_KEYS if key in parent}
    card: Card = _build(Card, _DEFAULTS | values, str(path), "")
    _check_card(card, path)
    return card


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
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"card {path} cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"card {path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"card {path} must hold keys and values at its top level")
    return values


def _load_parent(path: Path, name: Any) -> dict[str, Any]:
    """The parent's keys as written, from the folder of the view; the parent itself is validated first."""
    folder = path.parent
    if not isinstance(name, str) or not (folder / f"{name}.yaml").is_file():
        known = [card.stem for card in sorted(folder.glob("*.yaml"))]
        raise UserError(f"{path}: view_of names no card: {name!r}{_nearest(str(name), known)}")
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
    if card.evaluation is not None:
        _check_evaluation(card.evaluation, card, path)


def _check_files(files: Mapping[str, Sequence[str]], key: str) -> None:
    """Each role has places, and all of them are below the raw folder."""
    for role, places in files.items():
        if not places:
            raise UserError(f"{key}.{role} names no place; give one, or remove it")
        for place in places:
            if PurePosixPath(place).is_absolute() or ".." in PurePosixPath(place).parts:
                raise UserError(f"{key}.{role}: {place!r} must be a path below the raw folder")


def _check_evaluation(evaluation: Evaluation, card: Card, path: Path) -> None:
    if evaluation.split not in card.splits:
        nearest = _nearest(evaluation.split, card.splits)
        raise UserError(f"{path}: evaluation.split {evaluation.split!r} is not among splits{nearest}")
    stated = bool(evaluation.candidates) + bool(evaluation.verbalizers) + (evaluation.candidates_from is not None)
    if stated != (evaluation.mode == "rank"):
        ways = "candidates, verbalizers and candidates_from"
        raise UserError(f"{path}: evaluation needs one of {ways} to rank, none of them to generate")
    if set("{}") & set(_FIELD.sub("", evaluation.prompt)):
        raise UserError(f"{path}: evaluation.prompt {evaluation.prompt!r} has a brace without its partner")
    for name in _FIELD.findall(evaluation.prompt):
        if name not in PROMPT_FIELDS:
            raise UserError(f"{path}: evaluation.prompt names an unknown field {name!r}{_nearest(name, PROMPT_FIELDS)}")


def _nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error line: the known word nearest to `word`, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def _build(kind: Any, value: Any, file: str, key: str) -> Any:
    """Turn a value read from YAML into the annotated type, or say which key of which file is wrong.

    Nothing is converted but list to tuple and int to float: an unquoted `yes` (a bool in YAML) is an error, not "True".
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return _plain(value, file, key)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, file, key)
    if origin in (types.UnionType, typing.Union):  # only "X | None" occurs
        return None if value is None else _build(arguments[0], value, file, key)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{file}: {key} is {value!r}{_nearest(str(value), arguments)}")
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_build(arguments[0], item, file, f"{key}[{row}]") for row, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        _check_keys_are_text(value, file, key)
        return {name: _build(arguments[1], item, file, f"{key}.{name}") for name, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        expected = {tuple: "a list", dict: "keys and values", str: "text", int: "a whole number"}.get(origin or kind)
        hint = "; put it in quotes" if kind is str and value is not None and not isinstance(value, list | dict) else ""
        raise UserError(f"{file}: {key} must be {expected or kind.__name__}, not {value!r}{hint}")
    return value


def _plain(value: Any, file: str, key: str) -> Any:
    """A value that JSON can hold, as it is."""
    if isinstance(value, dict):
        _check_keys_are_text(value, file, key)
        return {name: _plain(item, file, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, file, f"{key}[{row}]") for row, item in enumerate(value)]
    if value is None or type(value) in (str, int, float, bool):
        return value
    raise UserError(f"{file}: {key} is {value!r}, which YAML reads as {type(value).__name__}; put it in quotes")


def _build_dataclass(kind: Any, value: Any, file: str, key: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{file}: {key} must be keys and values, not {value!r}")
    _check_keys_are_text(value, file, key)
    hints = typing.get_type_hints(kind)
    prefix = f"{key}." if key else ""
    for name in value:
        if name not in hints:
            raise UserError(f"{file}: unknown key {prefix}{name}{_nearest(name, hints)}")
    for part in dataclasses.fields(kind):
        required = part.default is dataclasses.MISSING and part.default_factory is dataclasses.MISSING
        if required and part.name not in value:
            raise UserError(f"{file}: key {prefix}{part.name} is missing")
    return kind(**{name: _build(hints[name], item, file, prefix + name) for name, item in value.items()})


def _check_keys_are_text(value: Mapping[Any, Any], file: str, key: str) -> None:
    for name in value:
        if not isinstance(name, str):
            raise UserError(f"{file}: {key or 'the card'} has the key {name!r}, which is not text; put it in quotes")


# --- table -----------------------------------------------------------------------------------------------------------


def cards_table(cards: Iterable[Card]) -> str:
    """`datasets/README.md`: one row a card, made from the cards alone."""
    lines = [
        "# Datasets",
        "",
        "One YAML card per dataset, or per view of a dataset (other records of the same images); template sets are in",
        "`templates/`. Train and evaluation: expected records of the kinds that are drawn and scored; `?` is a number that",
        "is not known, `-` no such split. Verified: whether the numbers were checked against the official files.",
        "This file is written by `python -m instructblip.data.cards`.",
        "",
        "| name | task group | role | train | evaluation | metric | licence | verified |",
        "|---|---|---|---:|---:|---|---|---|",
    ]
    return "\n".join([*lines, *(_table_row(card) for card in cards)]) + "\n"


def _table_row(card: Card) -> str:
    rules = card.evaluation
    train = _number(card.expected_records(TRAIN_SPLIT)) if TRAIN_SPLIT in card.splits else "-"
    scored = "-" if rules is None else f"{_number(card.expected_records(rules.split, rules.kinds))} ({rules.split})"
    name = f"[`{card.name}`]({card.homepage})" + (f", view of `{card.view_of}`" if card.view_of else "")
    metric = "-" if rules is None else f"{rules.metric}, {rules.mode}"
    verified = "yes" if card.verified else "no"
    return "| " + " | ".join([name, card.task_group, card.role, train, scored, metric, card.licence, verified]) + " |"


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
