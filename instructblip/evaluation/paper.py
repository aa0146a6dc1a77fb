"""The paper's Table 1 beside one's own numbers: its order, its rows, and where a score must not be compared with it.

The numbers themselves stand in the dataset cards (`paper`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from instructblip.data.cards import Card
from instructblip.evaluation.card_protocol import of_the_shards, stated
from instructblip.evaluation.counts import RecordCounts

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
# Keys of a card's `paper` and the names of Table 1's rows.
MODELS = {
    "flan_t5_xl": "InstructBLIP FlanT5-XL",
    "flan_t5_xxl": "InstructBLIP FlanT5-XXL",
    "vicuna_7b": "InstructBLIP Vicuna-7B",
    "vicuna_13b": "InstructBLIP Vicuna-13B",
}
# Where the paper's numbers are of another split than the one that its card can score.
PAPER_SPLITS = {"vizwiz": "test-dev"}


@dataclass(frozen=True)
class Mark:
    """Why a score is not like the paper's: `symbol` beside the number, `meaning` below the table."""

    symbol: str
    meaning: str


SUBSET = Mark("*", "part of the split's samples")
OTHER_SPLIT = Mark("†", "another split than the paper's")
OTHER_PROTOCOL = Mark("‡", "another protocol than the card's")
MARKS = (SUBSET, OTHER_SPLIT, OTHER_PROTOCOL)


def in_table_order(datasets: Iterable[str]) -> list[str]:
    """Held-out datasets in Table 1's order, then held-in ones, then all others as they came; each once."""
    given = dict.fromkeys(datasets)
    known = [name for name in (*HELD_OUT, *HELD_IN) if name in given]
    return known + [name for name in given if name not in known]


def heading(dataset: str) -> str:
    """What a dataset's column is called; its own name where the paper has no column for it."""
    return {**HELD_OUT, **HELD_IN}.get(dataset, dataset)


def comparison_marks(card: Card, protocol: Mapping[str, Any], records: RecordCounts | None = None) -> dict[Mark, str]:
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
    rules = card.evaluation
    if rules is None:
        return found
    split = PAPER_SPLITS.get(card.name, rules.split)
    if protocol["split"] != split:
        found[OTHER_SPLIT] = f"{protocol['split']}, the paper: {split}"
    changed = _changes(stated(rules, rules.mode) | of_the_shards(rules), protocol)
    if records is not None and records.vocabulary is not None and (short := records.vocabulary.shortfall()):
        changed.append(f"candidates from {short} of train")
    if protocol.get("images", "shown") != "shown":
        changed.append("images withheld")
    if changed:
        found[OTHER_PROTOCOL] = "; ".join(changed)
    return found


def _changes(stated: Mapping[str, Any], protocol: Mapping[str, Any]) -> list[str]:
    """One text for each choice that a protocol makes otherwise; lists, as JSON has them, are like tuples."""
    found = [name for name, value in stated.items() if name in protocol and _plain(protocol[name]) != _plain(value)]
    if "mode" in found:  # says it all: what is ranked follows from it
        found = [name for name in found if name not in ("candidates_from", "candidates", "classes")]
    return [
        f"other {name}"
        if isinstance(stated[name], tuple)
        else f"{name} {protocol[name]!r} in place of {stated[name]!r}"
        for name in found
    ]


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
