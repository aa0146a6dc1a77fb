"""What the model is asked on the held-out image datasets: the paper's prompts (appendix E) word for word; the protocol."""

from pathlib import Path

import pytest

from instructblip.data.cards import load_card
from instructblip.data.templates import render_prompt
from tests.kit.raw_files import read_raw, write_raw

PROMPTS: list[tuple[str, str, str]] = [
    ("nocaps", "0", "A short image description:"),
    ("flickr30k", "2199200615", "A short image description:"),
    ("gqa", "02930152", "Question: Is the sky dark? Short answer:"),
    (
        "vsr",
        "17697-0",
        'Based on the image, is this statement true or false? "The cat is under the bed." Answer:',
    ),
    ("iconqa", "7", "Question: How many dots? Options: (a) 3 (b) 10 (c) 0.5. Short answer:"),
    (
        "textvqa",
        "34602",
        "OCR tokens: DAKOTA, café, 35. Question: what is the brand of this camera? Short answer:",
    ),
    ("textvqa", "34603", "Question: what does it say? Short answer:"),
    ("visdial", "185565-1", "Question: is it sunny Short answer:"),
    (
        "visdial",
        "185565-3",
        "Dialog history: Q: is it sunny A: yes\nQ: how many dogs A: 2 \n Question: any people Short answer:",
    ),
    (
        "hateful_memes",
        "08291",
        'This is an image with: "a line of text" written on it. Is it hateful? Answer:',
    ),
    (
        "vizwiz",
        "VizWiz_val_00000001",
        "Question: Can you tell me what this medicine is please? Short answer:",
    ),
    (
        "scienceqa_img",
        "10",
        "Context: A passage.\nIts second line. Question: Which one? Options: (a) a (b) b (c) c. Answer:",
    ),
    (
        "scienceqa_img",
        "2",
        "Question: Which of these states is farthest north? Options: (a) West Virginia (b) Louisiana. Answer:",
    ),
]


@pytest.mark.parametrize(("dataset", "record_id", "prompt"), PROMPTS)
def test_prompt(dataset: str, record_id: str, prompt: str, tmp_path: Path) -> None:
    write_raw(dataset, tmp_path)
    rules = load_card(dataset).evaluation
    assert rules is not None
    records = {record.id: record for item in read_raw(dataset, tmp_path, rules.split)[0] for record in item.records}
    assert render_prompt(rules.prompt, records[record_id]) == prompt
    if rules.candidates_from == "choices":
        assert len(records[record_id].choices) > 1


# Split, mode, metric, and the paper's zero-shot number of InstructBLIP with Vicuna-7B (table 1).
PROTOCOLS = {
    "nocaps": ("val", "generate", "cider", 123.1),
    "flickr30k": ("test", "generate", "cider", 82.4),
    "gqa": ("testdev", "generate", "gqa_accuracy_lavis", 49.2),
    "vsr": ("zeroshot_test", "rank", "accuracy", 54.3),
    "iconqa": ("test", "rank", "multiple_choice_accuracy", 43.1),
    "textvqa": ("val", "generate", "textvqa_accuracy", 50.1),
    "visdial": ("val", "rank", "visdial", 45.2),
    "hateful_memes": ("dev_seen", "rank", "auroc", 59.6),
    "vizwiz": ("val", "generate", "vizwiz_accuracy", 34.5),
    "scienceqa_img": ("test", "rank", "multiple_choice_accuracy", 60.5),
}


@pytest.mark.parametrize("dataset", PROTOCOLS)
def test_protocol(dataset: str) -> None:
    card = load_card(dataset)
    rules = card.evaluation
    assert rules is not None and card.role == "held-out"
    assert (rules.split, rules.mode, rules.metric, card.paper["vicuna_7b"]) == PROTOCOLS[dataset]
    assert set(card.paper) == {"flan_t5_xl", "flan_t5_xxl", "vicuna_7b", "vicuna_13b"}
    assert card.expected_records(rules.split, rules.kinds) is not None
    # The classes stand in the order of the labels.
    if rules.verbalizers:
        assert [texts[0] for texts in rules.verbalizers.values()] == ["no", "yes"]
