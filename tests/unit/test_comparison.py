"""Where a score stands marked beside the paper's: shards prepared otherwise, another protocol, records that are missing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from instructblip.data.cards import Card, all_cards, load_card
from instructblip.data.sample import Record
from instructblip.data.shards import MANIFEST_FORMAT, ShardWriter, shard_path
from instructblip.errors import UserError
from instructblip.evaluation.paper import OTHER_PROTOCOL, OTHER_SPLIT, Mark, comparison_marks
from instructblip.evaluation.protocol import Task, as_json, make_task
from instructblip.files import sha256_file, write_json
from tests.synthetic_tasks import PICTURE, synthetic_task

RAPIDOCR = {"library": "rapidocr", "version": "9.9", "runtime": "onnxruntime 8.8", "threshold": 0.5}


def write_split(card: Card, shards: Path, records: list[Record], *, frames: int = 1, **manifest: Any) -> None:
    """The card's evaluation split, an image or video a record; `manifest` is what else it says."""
    assert card.evaluation is not None
    path = shard_path(shards / card.source / card.evaluation.split, 0)
    names = ["png"] if frames == 1 else [f"{number}.png" for number in range(frames)]
    with ShardWriter.open(path) as writer:
        for number, record in enumerate(records):
            writer.add(f"image_{number}", dict.fromkeys(names, PICTURE), str(number), [record])
    fields = {"format": MANIFEST_FORMAT, "dataset": card.source, "split": path.parent.name}
    counts = {"records_by_kind": {kind: len(records) for kind in {record.kind for record in records}}}
    shards_listed = [{"name": path.name, "sha256": sha256_file(path)}]
    write_json(path.parent / "manifest.json", {**fields, **counts, "shards": shards_listed, **manifest})


def stored(task: Task) -> dict[str, Any]:
    """A protocol as results.json gives it back."""
    found: dict[str, Any] = json.loads(json.dumps(as_json(task.protocol)))
    return found


def protocol_marks(card: Card, task: Task) -> dict[Mark, str]:
    return {mark: text for mark, text in comparison_marks(card, stored(task)).items() if mark != OTHER_SPLIT}


def test_a_cards_own_protocol_is_never_another_one(tmp_path: Path) -> None:
    for card in all_cards():
        if card.evaluation is not None:
            task = synthetic_task(card, tmp_path, 8)
            expected = replace(task, protocol=replace(task.protocol, frames=card.evaluation.frames))
            assert protocol_marks(card, expected) == {}, card.name


@pytest.mark.parametrize("name", ["ivqa", "msvd_qa", "msrvtt_qa"])
def test_videos_of_other_frames_than_the_papers_are_another_protocol(tmp_path: Path, name: str) -> None:
    card = load_card(name)
    assert card.evaluation is not None
    open_ended = replace(card, evaluation=replace(card.evaluation, mode="generate", candidates_from=None))
    records = [Record("1", "video_question", "what is it?", ("cat",), (5.0,))]
    for frames, expected in [(4, {}), (1, {OTHER_PROTOCOL: "frames 1 in place of 4"})]:
        write_split(card, tmp_path / str(frames), records, frames=frames)
        assert protocol_marks(open_ended, make_task(open_ended, tmp_path / str(frames))) == expected


@pytest.mark.parametrize("name", ["textvqa", "textcaps"])
def test_ocr_tokens_of_another_system_are_another_protocol(tmp_path: Path, name: str) -> None:
    card, captions = load_card(name), ("a sign that says exit",) * 5
    kind = "captions" if name == "textcaps" else "question"
    record = Record("1", kind, "what?", ("exit",), (10.0,), captions=captions, ocr_tokens=("exit",))
    for made_by, symbols in [(None, []), (RAPIDOCR, [OTHER_PROTOCOL])]:
        write_split(card, tmp_path, [record], options={"ocr": made_by})
        task = make_task(card, tmp_path)
        found = protocol_marks(card, task)
        assert list(found) == symbols
    assert found[OTHER_PROTOCOL].startswith("ocr 'rapidocr 9.9 on onnxruntime 8.8, lines of score 0.5 and above, the ")
    assert "in place of \"the dataset's own, the first" in found[OTHER_PROTOCOL]


def test_no_ocr_system_is_another_than_one_that_nobody_knows(tmp_path: Path) -> None:
    card = load_card("ocr_vqa")
    record = Record("1", "question", "who wrote it?", ("him",), ocr_tokens=("him",))
    write_split(card, tmp_path, [record], options={"ocr": RAPIDOCR})
    assert protocol_marks(card, make_task(card, tmp_path)) == {}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"verbalizers": {"false": ("no",), "true": ("yes",)}}, "other candidates; other classes; other verbalizers"),
        ({"verbalizers": {"true": ("no", "false"), "false": ("yes", "true")}}, "other classes; other verbalizers"),
        ({"verbalizers": {}, "candidates": ("false", "true")}, "other candidates; other classes; other verbalizers"),
        ({"aggregate": "max"}, "aggregate 'max' in place of 'sum'"),
    ],
)
def test_other_candidates_are_another_protocol(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    card = load_card("vsr")
    assert card.evaluation is not None
    synthetic_task(card, tmp_path, 8)
    other = make_task(replace(card, evaluation=replace(card.evaluation, **changed)), tmp_path)
    assert protocol_marks(card, other) == {OTHER_PROTOCOL: told}


def test_another_mode_is_told_without_what_follows_from_it(tmp_path: Path) -> None:
    card = load_card("vsr")
    written = synthetic_task(card, tmp_path, 8, mode="generate")
    assert protocol_marks(card, written) == {OTHER_PROTOCOL: "mode 'generate' in place of 'rank'"}


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("textvqa", "  ocr: rosetta\n", "evaluation.ocr is 'rosetta'; known: own"),
        ("vqav2", "  ocr: own\n", "evaluation.ocr is said where the prompt shows no {ocr_tokens}"),
        ("vqav2", "  frames: 0\n", "evaluation.frames is 0; it must be 1 or more"),
    ],
)
def test_a_card_cannot_name_what_is_not_there(tmp_path: Path, name: str, text: str, told: str) -> None:
    content = (Path("datasets") / f"{name}.yaml").read_text().replace("  ocr: own  # Rosetta's\n", "")
    (tmp_path / f"{name}.yaml").write_text(content.replace("evaluation:\n", f"evaluation:\n{text}"))
    with pytest.raises(UserError) as error:
        load_card(tmp_path / f"{name}.yaml")
    assert told in str(error.value)
