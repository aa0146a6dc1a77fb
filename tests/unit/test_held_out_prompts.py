"""What the model is asked on the held-out image datasets: the paper's prompts (appendix E) word for word; the protocol."""

from pathlib import Path

import pytest

from instructblip.data.cards import load_card
from instructblip.data.templates import render_prompt
from instructblip.errors import UserError
from instructblip.evaluation.protocol import make_task
from tests.kit.all_datasets import prepare_source
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


ONE_WORD = "Answer the question using a single word or phrase."
# What lmms-eval 0.7.3 asks of the same records (`doc_to_text` of its tasks), its most new tokens, and its scorer.
LMMS_EVAL: list[tuple[str, str, str, int, str]] = [
    ("nocaps", "0", "Provide a one-sentence caption for the provided image.", 64, "cider"),
    ("flickr30k", "2199200615", "Provide a one-sentence caption for the provided image.", 64, "cider"),
    ("gqa", "02930152", f"Is the sky dark?\n{ONE_WORD}", 16, "gqa_accuracy_lmms_eval"),
    (
        "iconqa",
        "7",
        "Given a set of images and a question, please provide the answer to the question.\nQuestion: How many dots?.\n"
        "Options:\nA. 3\nB. 10\nC. 0.5\nPlease answer with the option letter from the given choices directly.",
        32,
        "anls_lmms_eval",
    ),
    ("textvqa", "34602", f"What is the brand of this camera?\n{ONE_WORD}", 1024, "textvqa_accuracy"),
    (
        "vizwiz",
        "VizWiz_val_00000001",
        "Can you tell me what this medicine is please?\n"
        f"When the provided information is insufficient, respond with 'Unanswerable'.\n{ONE_WORD}",
        1024,
        "vizwiz_accuracy_lmms_eval",
    ),
    (
        "scienceqa_img",
        "10",
        "Context: A passage.\nIts second line.\nWhich one?\nA. a\nB. b\nC. c\n"
        "Answer with the option's letter from the given choices directly.",
        16,
        "letter_accuracy_lmms_eval",
    ),
    (
        "scienceqa_img",
        "2",
        "Which of these states is farthest north?\nA. West Virginia\nB. Louisiana\n"
        "Answer with the option's letter from the given choices directly.",
        16,
        "letter_accuracy_lmms_eval",
    ),
]


@pytest.mark.parametrize(("dataset", "record_id", "prompt", "tokens", "metric"), LMMS_EVAL)
def test_preset_of_lmms_eval(
    dataset: str, record_id: str, prompt: str, tokens: int, metric: str, tmp_path: Path
) -> None:
    """Greedy decoding of each dataset, a choice of several too; the shards are prepared as for any preset."""
    write_raw(dataset, tmp_path / "raw")
    rules = load_card(dataset).evaluation
    assert rules is not None
    prepare_source(dataset, tmp_path / "raw", tmp_path, splits=[rules.split])
    task = make_task(load_card(dataset), tmp_path, preset="lmms_eval")
    assert {sample.record.id: sample.prompt for sample in task.samples}[record_id] == prompt
    protocol = task.protocol
    assert (protocol.mode, protocol.max_new_tokens, protocol.metric) == ("generate", tokens, metric)
    assert (protocol.num_beams, protocol.min_new_tokens, protocol.repetition_penalty) == (1, 0, 1.0)
    assert protocol.until == (("ASSISTANT:",) if tokens == 1024 else ("\n\n",))
    assert (protocol.upright, protocol.transparency, protocol.ocr) == (True, "dropped", "")


def test_a_dataset_that_lmms_eval_is_not_asked_about_here_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vsr has no presets\.lmms_eval .* suite=lmms_eval has the datasets that do"):
        make_task(load_card("vsr"), tmp_path, preset="lmms_eval")


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
