"""The paper's Table 1 with rows of your own: `python -m instructblip.evaluation.report.table RUNS... [--csv F] [--html F]`.

Rows are evaluations and the paper's models, columns datasets in the paper's order, then held-in and other ones. Every score
of a run has its 95% interval, and a mark where it is not comparable with the paper's.
"""

import argparse
import csv
import io
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

from rich.console import Console

from instructblip.data.cards import Card, OwnCard, all_cards
from instructblip.data.coverage import RecordCounts
from instructblip.errors import UserError
from instructblip.evaluation.metrics import METRICS
from instructblip.evaluation.protocol import UNSTATED, expected_shard_fields, protocol_fields
from instructblip.evaluation.results_file import NotEvaluated, StoredRun, StoredScore, read_run
from instructblip.evaluation.seeds import groups_of_seeds
from instructblip.evaluation.statistics import spread
from instructblip.files import write_atomically
from instructblip.html import page_environment
from instructblip.startup import print_all_signs

_TEMPLATE = "table.html.jinja"
_HIDDEN, _ABSENT = "not public", "-"


@dataclass(frozen=True)
class ComparabilityNote:
    """Why a score is not like the paper's: `symbol` beside the number, `meaning` below the table."""

    symbol: str
    meaning: str


@dataclass(frozen=True)
class Cell:
    """One score; `low` and `high` are None for the paper's, `value` too where the answers are not public or it has none.

    `instead` stands there then. `deviation` is of a mean over seeds, between them.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    marks: tuple[tuple[ComparabilityNote, str], ...] = ()
    instead: str = _HIDDEN
    deviation: float | None = None

    @property
    def below(self) -> str:
        """What stands below the score: its interval, or how far seeds are apart."""
        if self.deviation is not None:
            return f"±{self.deviation:.1f}"
        return "" if self.low is None else f"{self.low:.1f}-{self.high:.1f}"

    @property
    def symbols(self) -> str:
        """The symbols of all marks."""
        return "".join(mark.symbol for mark, _ in self.marks)


@dataclass(frozen=True)
class Row:
    """An evaluation, the mean of some that differ by seed, or a model of the paper; `about` says where it comes from.

    `seeds` are those of a mean; the rows of its runs stand below it, `is_member`.
    """

    name: str
    about: str
    cells: dict[str, Cell]
    is_paper: bool = False
    seeds: tuple[int, ...] = ()
    is_member: bool = False


@dataclass(frozen=True)
class ScoreTable:
    """Datasets in the order of the columns, the rows, and the tokenizer of captions by (row, dataset).

    `lower_is_better` names the datasets whose metric is so.
    """

    datasets: list[str]
    rows: list[Row]
    tokenizers: dict[tuple[str, str], str]
    lower_is_better: frozenset[str] = frozenset()

    @property
    def marks(self) -> list[ComparabilityNote]:
        """Those that occur."""
        used = {mark for row in self.rows for cell in row.cells.values() for mark, _ in cell.marks}
        return [mark for mark in MARKS if mark in used]

    @property
    def notes(self) -> list[str]:
        """The caption tokenizers, which scores depend on, and where there are several, which score has which."""
        names = sorted(set(self.tokenizers.values()))
        if len(names) < 2:
            return [f"Captions tokenised by {name}." for name in names]
        found = []
        for name in names:
            cells = [key for key, tokenizer in self.tokenizers.items() if tokenizer == name]
            found.append(f"{name} ({', '.join(f'{heading(dataset)} of {row}' for row, dataset in cells)})")
        return [f"Captions tokenised by {' and by '.join(found)}: these scores are not comparable with each other."]


def score_table(runs: Sequence[StoredRun]) -> ScoreTable:
    """The table of some evaluations, the paper's rows below them, of the datasets that at least one of them has."""
    cards = {card.name: card for card in all_cards()}
    scored = in_table_order(name for run in runs for name in (*run.scores, *run.not_evaluated))
    datasets = [column for name in scored for column in (name, *_part_columns(cards.get(name)))]
    names = {run.folder: name for name, run in zip(_row_names(runs), runs, strict=True)}
    rows = [row for group in groups_of_seeds(runs) for row in _group_rows(group, names, cards)]
    tokenizers = {
        (names[run.folder], dataset): score.tokenizer
        for run in runs
        for dataset, score in run.scores.items()
        if score.tokenizer is not None
    }
    for key, model in MODELS.items():
        numbers: dict[str, Cell] = {}
        for card in (cards[name] for name in scored if name in cards and key in cards[name].published):
            numbers[card.name] = Cell(card.published[key])
            numbers |= {_part_column(card.name, part): Cell(n) for part, n in card.paper_parts.get(key, {}).items()}
        if numbers:
            rows.append(Row(model, "the paper", numbers, is_paper=True))
    scores = [(dataset, score) for run in runs for dataset, score in run.scores.items()]
    return ScoreTable(datasets, rows, tokenizers, frozenset(name for name, score in scores if _lower_is_better(score)))


def as_text(table: ScoreTable, width: int = 120) -> str:
    """The table in lines of at most `width` characters where a single column allows it; wide ones go on below."""
    label = max(len(row.name) for row in table.rows)
    columns = [_column(table, dataset) for dataset in table.datasets]
    blocks: list[list[list[str]]] = [[]]
    used = label
    for column in columns:
        needed = 2 + max(map(len, column))
        if blocks[-1] and used + needed > width:
            blocks.append([])
            used = label
        blocks[-1].append(column)
        used += needed
    names = ["", *(line for row in table.rows for line in ([row.name] if row.is_paper else [row.name, ""]))]
    parts = []
    for block in blocks:
        lines = []
        for number, name in enumerate(names):
            cells = "".join("  " + column[number].rjust(max(map(len, column))) for column in block)
            if cells.strip():  # a row without any score here is left out
                lines.append(f"{name:<{label}}{cells}".rstrip())
        parts.append("\n".join(lines))
    legend = [line for note in table.notes for line in textwrap.wrap(note, width)]
    legend += [f"{mark.symbol} {mark.meaning}" for mark in table.marks]
    legend.append("Below a score: 95% bootstrap interval, images resampled.")
    legend += [SPREAD] if any(row.seeds for row in table.rows) else []
    return "\n\n".join([*parts, "\n".join(legend)])


def as_csv(table: ScoreTable) -> str:
    """One line a row; for each dataset its value, the ends of the interval, and the marks."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    several = any(row.seeds for row in table.rows)
    fields = ("", "_low", "_high", "_marks", *(["_deviation"] if several else []))
    writer.writerow(["row", "source", *(f"{name}{field}" for name in table.datasets for field in fields)])
    for row in table.rows:
        line: list[object] = [row.name, row.about]
        for dataset in table.datasets:
            cell = row.cells.get(dataset)
            values = ("",) * 5 if cell is None else (cell.value, cell.low, cell.high, cell.symbols, cell.deviation)
            line += values[: len(fields)]
        writer.writerow(line)
    return buffer.getvalue()


def as_html(table: ScoreTable) -> str:
    """The table as a page that loads nothing."""
    page = page_environment(Path(__file__).parent).get_template(_TEMPLATE)
    best = {name: _best(table, name) for name in table.datasets}
    cells = ((name, row.cells[name]) for name in table.datasets for row in table.rows if name in row.cells)
    invented = dict.fromkeys(heading(name) for name, cell in cells if MADE_UP_DATA in dict(cell.marks))
    return page.render(
        table=table, heading=heading, best=best, made_up=MADE_UP_DATA, invented=list(invented), spread=SPREAD
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, or 2 after a line on standard error that says what to mend."""
    parser = argparse.ArgumentParser(prog="python -m instructblip.evaluation.report.table", description=__doc__)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of an evaluation, or its results.json")
    parser.add_argument("--csv", type=Path, help="also write it to this file, values separated by commas")
    parser.add_argument("--html", type=Path, help="also write it to this file, as a page")
    options = parser.parse_args(arguments)
    print_all_signs()
    console = Console(soft_wrap=True, highlight=False)
    try:
        table = score_table([read_run(place) for place in options.runs])
        console.print(as_text(table, console.width if console.is_terminal else 120), markup=False)
        for path, text in ((options.csv, as_csv), (options.html, as_html)):
            if path is not None:
                write_atomically(path, text(table))
                console.print(f"wrote {path}", markup=False)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _cell(score: StoredScore, card: Card | None) -> Cell:
    marks = {MADE_UP_DATA: ""} if score.made_up else {}
    if card is not None and score.value is not None:
        marks |= comparison_marks(card, score.protocol, score.records)
    return Cell(score.value, score.low, score.high, tuple(marks.items()))


def _cells(scores: Mapping[str, StoredScore], cards: Mapping[str, Card]) -> dict[str, Cell]:
    """A run's cell of each dataset, and of those parts of it that papers give."""
    cells: dict[str, Cell] = {}
    for dataset, score in scores.items():
        cells[dataset] = cell = _cell(score, score.card or cards.get(dataset))
        for part, numbers in score.parts.items():
            if (column := _part_column(dataset, part)) in _part_columns(cards.get(dataset)):
                cells[column] = Cell(*numbers, cell.marks)
    return cells


def _group_rows(runs: Sequence[StoredRun], names: Mapping[Path, str], cards: Mapping[str, Card]) -> Iterator[Row]:
    """The row of a run; of several that differ by seed alone, their mean's before theirs."""
    rows = [
        Row(
            names[run.folder],
            run.about,
            _cells(run.scores, cards) | {dataset: _no_cell(item) for dataset, item in run.not_evaluated.items()},
            is_member=len(runs) > 1,
        )
        for run in runs
    ]
    if len(runs) > 1:
        yield _mean_row(rows, tuple(sorted(run.seed for run in runs if run.seed is not None)))
    yield from rows


def _mean_row(rows: Sequence[Row], seeds: tuple[int, ...]) -> Row:
    cells = {}
    for dataset in rows[0].cells:
        found = [row.cells[dataset] for row in rows if dataset in row.cells]
        values = [cell.value for cell in found if cell.value is not None]
        if len(values) == len(rows):
            over = spread(values)
            marks = {mark: detail for cell in found for mark, detail in cell.marks}
            cells[dataset] = Cell(over.mean, marks=tuple(marks.items()), deviation=over.deviation)
    told = f"seeds {', '.join(map(str, seeds))}, alike in all else"
    return Row(f"mean of {len(seeds)} seeds", told, cells, seeds=seeds)


def _part_columns(card: Card | None) -> list[str]:
    """The columns of the parts that papers give of a dataset's score."""
    if card is None:
        return []
    return [_part_column(card.name, part) for part in dict.fromkeys(chain(*card.paper_parts.values()))]


def _part_column(dataset: str, part: str) -> str:
    return f"{dataset} {part}"


def _lower_is_better(score: StoredScore) -> bool:
    metric = METRICS.get(score.metric)
    return not (score.higher_is_better if metric is None else metric.higher_is_better)


def _no_cell(item: NotEvaluated) -> Cell:
    return Cell(None, marks=((NO_SCORE, item.reason),), instead=_ABSENT)


def _row_names(runs: Sequence[StoredRun]) -> list[str]:
    """The folders' own names, with as many parents as it takes to tell them apart, without what all begin with.

    The jobs of a sweep, `held_out-llm_vicuna_7b` and `held_out-llm_flan_t5_xl`, are `llm_vicuna_7b` and `llm_flan_t5_xl`.
    """
    for length in range(1, 1 + max(len(run.folder.parts) for run in runs)):
        names = ["/".join(run.folder.parts[-length:]) for run in runs]
        if len(set(names)) == len({run.folder for run in runs}):
            break
    pieces = [list(filter(None, re.split(r"(?<=[-/])", name))) for name in names]
    common = list(takewhile(lambda column: len(set(column)) == 1, zip(*pieces, strict=False)))
    start = min(len(common), min(map(len, pieces)) - 1) if len(names) > 1 else 0
    return ["".join(parts[start:]) for parts in pieces]


def _column(table: ScoreTable, dataset: str) -> list[str]:
    """Heading, then for each row its score, and below a run's its interval."""
    lines = [heading(dataset)]
    room = max((len(row.cells[dataset].symbols) for row in table.rows if dataset in row.cells), default=0)
    for row in table.rows:
        cell = row.cells.get(dataset)
        if cell is None:
            lines += [""] if row.is_paper else ["", ""]
            continue
        value = cell.instead if cell.value is None else f"{cell.value:.1f}"
        lines.append(value + cell.symbols.ljust(room))
        if not row.is_paper:
            lines.append(cell.below + " " * room if cell.below else "")
    return lines


def _best(table: ScoreTable, dataset: str) -> float | None:
    """The best score without marks."""
    cells = [row.cells[dataset] for row in table.rows if dataset in row.cells]
    best = min if dataset in table.lower_is_better else max
    return best((cell.value for cell in cells if cell.value is not None and not cell.marks), default=None)


# Names of cards and the headings of their columns, in the order of Table 1 (Dai et al., "InstructBLIP", 2023).
HELD_OUT = {
    "nocaps": "NoCaps",
    "flickr30k": "Flickr30K",
    "gqa": "GQA",
    "vsr": "VSR",
    "iconqa": "IconQA",
    "textvqa": "TextVQA",
    "visdial": "VisDial",
    "hateful_memes": "HM",
    "vizwiz": "VizWiz",
    "scienceqa_img": "SciQA-IMG",
    "msvd_qa": "MSVD-QA",
    "msrvtt_qa": "MSRVTT-QA",
    "ivqa": "iVQA",
}
HELD_IN = {
    "coco_caption": "COCO",
    "textcaps": "TextCaps",
    "vqav2": "VQAv2",
    "okvqa": "OKVQA",
    "aokvqa": "A-OKVQA",
    "aokvqa_multiple_choice": "A-OKVQA MC",
    "ocr_vqa": "OCR-VQA",
}
RETRIEVAL = {"coco_retrieval": "COCO", "flickr30k_retrieval": "Flickr30K"}  # of table 5 of BLIP-2's paper
# Keys of a card's `paper`, and the names of Table 1's rows.
INSTRUCTBLIP = {
    "flan_t5_xl": "InstructBLIP FlanT5-XL",
    "flan_t5_xxl": "InstructBLIP FlanT5-XXL",
    "vicuna_7b": "InstructBLIP Vicuna-7B",
    "vicuna_13b": "InstructBLIP Vicuna-13B",
}
BLIP = {  # and of other papers
    "blip2_opt_2_7b": "BLIP-2 OPT-2.7B",
    "blip2_opt_6_7b": "BLIP-2 OPT-6.7B",
    "blip2_flan_t5_xl": "BLIP-2 FlanT5-XL",
    "blip_14m": "BLIP 14M",
    "blip_129m": "BLIP 129M",
    "blip_capfilt_l": "BLIP CapFilt-L",
    "blip_vit_l": "BLIP ViT-L",
    "blip_lavis": "BLIP, run again by LAVIS",
    "blip2_vit_l": "BLIP-2 ViT-L",
    "blip2_vit_g": "BLIP-2 ViT-g",
}
MODELS = INSTRUCTBLIP | BLIP
# Where the paper's numbers are of another split than the one that its card can score.
PAPER_SPLITS = {"vizwiz": "test-dev", "vqav2_blip": "test-dev"}


SUBSET = ComparabilityNote("*", "part of the split's samples")
OTHER_SPLIT = ComparabilityNote("†", "another split than the paper's")
OTHER_PROTOCOL = ComparabilityNote("‡", "another protocol than the card's")
MADE_UP_DATA = ComparabilityNote("§", "made-up data: the score means nothing")
NO_SCORE = ComparabilityNote("¶", "no score: it was not prepared, or failed")
OTHER_PRECISION = ComparabilityNote("‖", "computed in bf16 or TF32, presets in float32")
SPREAD = "Below a mean of seeds: the standard deviation between them."
MARKS = (SUBSET, OTHER_SPLIT, OTHER_PROTOCOL, OTHER_PRECISION, MADE_UP_DATA, NO_SCORE)


def in_table_order(datasets: Iterable[str]) -> list[str]:
    """Held-out datasets in Table 1's order, then held-in ones, then all others as they came; each once."""
    given = dict.fromkeys(datasets)
    known = [name for name in (*HELD_OUT, *HELD_IN, *RETRIEVAL) if name in given]
    return known + [name for name in given if name not in known]


def heading(dataset: str) -> str:
    """What the column of a dataset, or of a part of its score, is called; its own name where the paper has none."""
    name, _, part = dataset.partition(" ")
    return " ".join(filter(None, ({**HELD_OUT, **HELD_IN, **RETRIEVAL}.get(name, name), part)))


def comparison_marks(
    card: Card, protocol: Mapping[str, Any], records: RecordCounts | None = None
) -> dict[ComparabilityNote, str]:
    """Where a score is not of what the paper's number stands for; with details.

    Args:
        card: the dataset.
        protocol: the score's, as results.json has it.
        records: how many it is of; None: not known.
    """
    found = {}
    samples = protocol.get("samples")
    parts = ["" if samples is None else f"{samples} samples", "" if records is None else records.shortfall()]
    if any(parts):
        found[SUBSET] = "; ".join(filter(None, parts))
    if (precision := protocol.get("precision", UNSTATED["precision"])) != UNSTATED["precision"]:
        found[OTHER_PRECISION] = precision
    rules = card.evaluation
    if rules is None:
        return found
    wanted, vocabulary = protocol_fields(rules, rules.mode), None if records is None else records.vocabulary
    if isinstance(card, OwnCard):  # which no paper has a number of, nor of its rows
        wanted |= {"split": rules.split}
        vocabulary = None
    else:
        wanted |= expected_shard_fields(rules)
        split = PAPER_SPLITS.get(card.name, rules.split)
        if protocol["split"] != split:
            found[OTHER_SPLIT] = f"{protocol['split']}, the paper: {split}"
    changed = _changes(wanted, protocol)
    if vocabulary is not None and (short := vocabulary.shortfall()):
        changed.append(f"candidates from {short} of train")
    if protocol.get("images", "shown") != "shown":
        changed.append("images withheld")
    if changed:
        found[OTHER_PROTOCOL] = "; ".join(changed)
    return found


def _changes(protocol_fields: Mapping[str, Any], protocol: Mapping[str, Any]) -> list[str]:
    """One text for each choice that a protocol makes otherwise; lists, as JSON has them, are like tuples."""
    found = [
        name for name, value in protocol_fields.items() if name in protocol and _plain(protocol[name]) != _plain(value)
    ]
    if "mode" in found:  # says it all: what is ranked follows from it
        follows = {"candidates_from", "candidates", "classes"}
        follows |= {"prompt", "verbalizers", "max_text_tokens"} if protocol["mode"] == "match" else set()
        found = [name for name in found if name not in follows]
    return [
        f"other {name}"
        if isinstance(protocol_fields[name], tuple)
        else f"{name} {protocol[name]!r} in place of {protocol_fields[name]!r}"
        for name in found
    ]


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    sys.exit(main())
