"""LLaVA-Instruct: a record an answer, with the turns before it; the place of the image removed; answers untouched."""

from pathlib import Path
from typing import Any

import pytest

from instructblip.data.readers.common import MISSING_IMAGE
from instructblip.errors import UserError
from tests.kit.raw_files import read_raw, records_of, write_images, write_raw_json

LONG = " The bus is WHITE and red. \n\nIt has " + "very " * 60 + "many windows.\n"


def _dialogue(image: str, *turns: str, **more: Any) -> dict[str, Any]:
    speakers = ("human", "gpt")
    conversation = [{"from": speakers[number % 2], "value": text} for number, text in enumerate(turns)]
    return {"id": image.partition(".")[0], "image": image, "conversations": conversation, **more}


def write_llava_conversation(raw: Path) -> None:
    """Two dialogues about one image, and one about another that lies in train2014 under the longer name."""
    entries = [
        _dialogue("000000442786.jpg", "What is it?\n<image>", LONG, "Is it moving?", "Yes.", "Where?\n", "In town."),
        _dialogue("000000033471.jpg", "<image>\nWhat color?", "Red."),
        _dialogue("000000442786.jpg", "What is it?\n<image>", "A bus."),
    ]
    write_raw_json(raw / "conversation_58k.json", entries)
    write_images(raw, "train2017/000000442786.jpg", "train2014/COCO_train2014_000000033471.jpg")


def write_llava_detail(raw: Path) -> None:
    """One question and one long answer, untouched."""
    write_raw_json(raw / "detail_23k.json", [_dialogue("000000442786.jpg", "Describe it.\n<image>", LONG)])
    write_images(raw, "train2017/000000442786.jpg")


def write_llava_reasoning(raw: Path) -> None:
    """As the detail part, with the place of the image before the question."""
    entries = [_dialogue("000000215677.jpg", "<image>\nWhat skill set might someone need?", "Balance.")]
    write_raw_json(raw / "complex_reasoning_77k.json", entries)
    write_images(raw, "train2017/000000215677.jpg")


def test_each_answer_is_a_record_with_its_history(tmp_path: Path) -> None:
    write_llava_conversation(tmp_path)
    media, lost = read_raw("llava_conversation", tmp_path, "train")
    assert [(item.key, item.media) for item in media] == [
        ("llava_conversation_000000033471", tmp_path / "train2014/COCO_train2014_000000033471.jpg"),
        ("llava_conversation_000000442786", tmp_path / "train2017/000000442786.jpg"),
    ]
    first, second = ("What is it?", LONG), ("Is it moving?", "Yes.")
    assert records_of(media) == {
        "33471": [{"id": "33471-0-0", "kind": "dialog", "question": "What color?", "answers": ("Red.",)}],
        "442786": [
            {"id": "442786-0-0", "kind": "dialog", "question": "What is it?", "answers": (LONG,)},
            {
                "id": "442786-0-1",
                "kind": "dialog",
                "question": "Is it moving?",
                "answers": ("Yes.",),
                "history": (first,),
            },
            {
                "id": "442786-0-2",
                "kind": "dialog",
                "question": "Where?\n",
                "answers": ("In town.",),
                "history": (first, second),
            },
            {"id": "442786-1-0", "kind": "dialog", "question": "What is it?", "answers": ("A bus.",)},
        ],
    }
    assert lost == {}


def test_first_turn_only(tmp_path: Path) -> None:
    write_llava_conversation(tmp_path)
    media, lost = read_raw("llava_conversation", tmp_path, "train", first_turn_only=True)
    assert [record.id for item in media for record in item.records] == ["33471-0-0", "442786-0-0", "442786-1-0"]
    assert lost == {}


def test_detail_and_reasoning_share_the_reader(tmp_path: Path) -> None:
    write_llava_detail(tmp_path)
    write_llava_reasoning(tmp_path)
    (detail,), _ = read_raw("llava_detail", tmp_path, "train")
    (reasoning,), _ = read_raw("llava_reasoning", tmp_path, "train")
    assert (detail.key, detail.records[0].question, detail.records[0].answers) == (
        "llava_detail_000000442786",
        "Describe it.",
        (LONG,),
    )
    assert (reasoning.key, reasoning.records[0].question, reasoning.records[0].answers) == (
        "llava_reasoning_000000215677",
        "What skill set might someone need?",
        ("Balance.",),
    )


@pytest.mark.parametrize(
    ("turn", "question"),
    [
        ("<image>\nWhat?", "What?"),
        ("What?\n<image>", "What?"),
        ("Look.\n<image>\nWhat?", "Look.\nWhat?"),
        ("<image> What?", "What?"),
        ("What?", "What?"),
        ("<image>\nSay <b>\nWhat?", "Say <b>\nWhat?"),
    ],
)
def test_the_place_of_the_image_goes_with_its_newline(tmp_path: Path, turn: str, question: str) -> None:
    write_llava_reasoning(tmp_path)
    entries = [_dialogue("000000215677.jpg", turn, "The tag <image>\n stays.")]
    write_raw_json(tmp_path / "complex_reasoning_77k.json", entries)
    record = read_raw("llava_reasoning", tmp_path, "train")[0][0].records[0]
    assert (record.question, record.answers) == (question, ("The tag <image>\n stays.",))


def test_dialogues_that_are_not_whole_are_counted(tmp_path: Path) -> None:
    write_llava_conversation(tmp_path)
    image = "000000442786.jpg"
    two_humans = _dialogue(image, "a?", "b", "c?", "d")
    two_humans["conversations"][1]["from"] = "human"
    entries = [
        _dialogue(image, "a?", "b", "c?"),
        _dialogue(image, "a?", "b", " ", "d", "e?", "f"),
        _dialogue(image, "<image>\n", "b", "c?", "d"),
        two_humans,
        _dialogue(image),
        _dialogue("../x.jpg", "a?", "b"),
        _dialogue("000000000077.jpg", "a?", "b", "c?", "d"),
        "x",
    ]
    write_raw_json(tmp_path / "conversation_58k.json", entries)
    media, lost = read_raw("llava_conversation", tmp_path, "train")
    assert [(record.id, record.answers) for item in media for record in item.records] == [
        ("442786-0-0", ("b",)),
        ("442786-1-0", ("b",)),
    ]
    assert lost == {
        "last question has no answer": (1, 0),
        "turn is blank or no text, and so are lost those after it": (2, 4),
        "dialogue does not alternate between human and gpt": (2, 1),
        "dialogue names no COCO image": (2, 1),
        MISSING_IMAGE: (1, 2),
    }


def test_a_cut_file_is_one_line(tmp_path: Path) -> None:
    write_llava_detail(tmp_path)
    path = tmp_path / "detail_23k.json"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"detail_23k\.json is not whole JSON"):
        read_raw("llava_detail", tmp_path, "train")
