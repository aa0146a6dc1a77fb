"""The 13 held-in datasets from their raw folders to shards: records in, out and lost, by their own cards."""

import json
from pathlib import Path

import numpy as np
import pytest

from instructblip.data.cards import load_card
from instructblip.data.prepare.convert import check_prepared, prepare_dataset
from instructblip.data.shards import open_split
from instructblip.data.templates import load_templates, render_prompt, render_training
from tests.kit.raw_files import read_raw, records_of, write_raw

# dataset -> split -> (images, records, records lost)
HELD_IN: dict[str, dict[str, tuple[int, int, int]]] = {
    "coco_caption": {"train": (2, 3, 0), "val": (1, 3, 0), "test": (1, 1, 0)},
    "web_capfilt": {"train": (2, 4, 3)},
    "textcaps": {"train": (2, 3, 0), "val": (1, 6, 0), "test": (1, 1, 0)},
    "vqav2": {"train": (2, 3, 0), "val": (1, 1, 0), "test-dev": (1, 1, 0), "test": (2, 2, 0)},
    "okvqa": {"train": (1, 1, 0), "val": (1, 1, 0)},
    "aokvqa": {"train": (2, 2, 0), "val": (1, 1, 0), "test": (1, 1, 0)},
    "ocr_vqa": {"train": (2, 4, 0), "val": (1, 2, 0), "test": (1, 2, 0)},
    "vqav2_question_generation": {"train": (2, 3, 0)},
    "okvqa_question_generation": {"train": (1, 1, 0)},
    "aokvqa_question_generation": {"train": (2, 2, 0)},
    "llava_conversation": {"train": (2, 5, 0)},
    "llava_detail": {"train": (1, 1, 0)},
    "llava_reasoning": {"train": (1, 1, 0)},
}


@pytest.mark.parametrize("name", HELD_IN)
def test_shards_hold_what_the_reader_read(tmp_path: Path, name: str) -> None:
    card, table = load_card(name), HELD_IN[name]
    assert card.role == "held-in"
    write_raw(card.source, tmp_path / "raw")
    manifests = prepare_dataset(card, tmp_path / "raw", tmp_path / "out", splits=list(table), progress=False)
    counts = {}
    for path in manifests:
        manifest = json.loads(path.read_text())
        lost = sum(loss["records"] for loss in manifest["lost"])
        counts[manifest["split"]] = (manifest["images"], manifest["records"], lost)
        split = open_split(path.parent)
        stored = [records for shard in split.shards for row in range(len(shard)) for records in [shard.read(row)[1]]]
        media, _ = read_raw(name, tmp_path / "raw", manifest["split"])
        expected = list(records_of(media).values())
        assert [[record.to_dict() for record in records] for records in stored] == expected
        assert path.parent == tmp_path / "out" / card.source / manifest["split"]
    assert counts == table
    assert check_prepared(tmp_path / "out") == []


@pytest.mark.parametrize("name", HELD_IN)
def test_each_record_can_be_taught_and_scored_as_the_card_says(tmp_path: Path, name: str) -> None:
    card = load_card(name)
    write_raw(card.source, tmp_path)
    assert card.templates is not None
    templates, random = load_templates(card.templates), np.random.default_rng(0)
    records = [record for item in read_raw(name, tmp_path, "train")[0] for record in item.records]
    assert records and {record.kind for record in records} <= (set(card.kinds) or {records[0].kind})
    taught = [render_training(record, templates, random) for record in records]
    assert all(instruction and target for instruction, target, _ in taught)
    if card.evaluation is None:
        return
    rules = card.evaluation
    scored = [record for item in read_raw(name, tmp_path, rules.split)[0] for record in item.records]
    prompts = [
        render_prompt(rules.prompt, record) for record in scored if record.kind in (rules.kinds or {record.kind})
    ]
    assert prompts and all(prompts)
    assert not any("{" in prompt or "[" in prompt for prompt in prompts)
