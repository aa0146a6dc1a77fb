"""GQA: both ids are text; the short answer, not the sentence; test without answers; a folder of files as one."""

from pathlib import Path
from typing import Any

import pytest

from instructblip.data.readers import READERS, Losses, RawSplit
from instructblip.errors import UserError
from tests.kit.raw_files import read_raw, records_of, write_images, write_raw_json


def _question(image_id: Any, question: str, answer: Any = None, balanced: bool = True) -> dict[str, Any]:
    if answer is None:
        return {"isBalanced": balanced, "question": question, "imageId": image_id}
    return {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "sky (2486325)"}],
        "entailed": ["02930160"],
        "equivalent": ["02930152"],
        "question": question,
        "imageId": image_id,
        "isBalanced": balanced,
        "groups": {"global": None, "local": "06-sky_dark"},
        "answer": answer,
        "semanticStr": "select: sky (2486325)->verify color: dark [0]",
        "annotations": {"answer": {}, "question": {"2": "2486325"}, "fullAnswer": {"2": "2486325"}},
        "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
        "fullAnswer": f"{answer.capitalize()}, that is so.",
    }


def write_gqa(raw: Path) -> None:
    """Three questions of testdev on two images, whose ids differ by a letter, and one of test without its answer."""
    testdev = {
        "02930152": _question("161313", "Is the sky dark?", "yes"),
        "2930152": _question("n161313", "What is on the table?", "cell phone"),
        "20293015": _question("161313", "Is it red or blue? ", "blue"),
    }
    write_raw_json(raw / "testdev_balanced_questions.json", testdev)
    write_raw_json(raw / "test_balanced_questions.json", {"201640614": _question("n100012", "Who is it?")})
    write_images(raw / "images", "161313.jpg", "n161313.jpg", "n100012.jpg")


TAGS = {"structural": "verify", "semantic": "attr", "detailed": "verifyAttr", "balanced": "true"}


def test_testdev(tmp_path: Path) -> None:
    write_gqa(tmp_path)
    media, losses = read_raw("gqa", tmp_path, "testdev")
    assert [(item.key, item.media) for item in media] == [
        ("gqa_161313", tmp_path / "images/161313.jpg"),
        ("gqa_n161313", tmp_path / "images/n161313.jpg"),
    ]
    question = {"kind": "question", "tags": TAGS}
    assert records_of(media) == {
        "161313": [
            {**question, "id": "02930152", "question": "Is the sky dark?", "answers": ("yes",)},
            {**question, "id": "20293015", "question": "Is it red or blue?", "answers": ("blue",)},
        ],
        "n161313": [{**question, "id": "2930152", "question": "What is on the table?", "answers": ("cell phone",)}],
    }
    assert losses == {}


def test_test_split_has_no_answers(tmp_path: Path) -> None:
    write_gqa(tmp_path)
    media, losses = read_raw("gqa", tmp_path, "test")
    assert records_of(media) == {
        "n100012": [{"id": "201640614", "kind": "question", "question": "Who is it?", "tags": {"balanced": "true"}}]
    }
    assert losses == {}


def test_a_folder_of_files_is_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "train_all_questions"
    write_raw_json(folder / "train_all_questions_1.json", {"0002": _question("7", "Second?", "no", balanced=False)})
    write_raw_json(folder / "train_all_questions_0.json", {"0001": _question("7", "First?", "yes")})
    write_images(tmp_path / "images", "7.jpg")
    files = {"questions": ("train_all_questions",), "images": ("images",)}
    (image,) = READERS["gqa"](RawSplit(tmp_path, "train_all", files), Losses())
    assert [(record.id, record.tags["balanced"]) for record in image.records] == [("0001", "true"), ("0002", "false")]
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="holds no JSON file"):
        list(READERS["gqa"](RawSplit(tmp_path, "train_all", files), Losses()))


def test_losses(tmp_path: Path) -> None:
    write_images(tmp_path / "images", "7.jpg", "8.jpg")
    entries = {
        "01": _question("7", "Kept?", "yes"),
        "02": _question("7", "No answer?"),
        "03": _question(7, "Image id as a number?", "yes"),
        "04": _question("../7", "Elsewhere?", "yes"),
        "0.5": _question("7", "Id with a dot?", "yes"),
        "06": _question("7", " ", "yes"),
        "07": _question("9", "No image?", "yes"),
        "08": _question("9", "Nor here?", "yes"),
        "09": "x",
    }
    write_raw_json(tmp_path / "val_balanced_questions.json", entries)
    path = tmp_path / "val_balanced_questions.json"
    twice = path.read_text()[:-1] + ', "01": {"question": "Again?", "imageId": "8", "answer": "no"}}'
    path.write_text(twice)
    media, losses = read_raw("gqa", tmp_path, "val")
    assert [(item.media_id, [record.question for record in item.records]) for item in media] == [("7", ["Kept?"])]
    assert losses == {
        "image file is missing": (1, 2),
        "question has no answer": (1, 1),
        "question lacks an id, imageId or question": (5, 5),
        "question repeats an id": (1, 1),
    }


@pytest.mark.parametrize(
    ("content", "words"), [('[{"question": "x"}]', "must hold an object"), ('{"01": {', "not whole")]
)
def test_files_of_another_form_are_one_line(tmp_path: Path, content: str, words: str) -> None:
    write_gqa(tmp_path)
    (tmp_path / "testdev_balanced_questions.json").write_text(content)
    with pytest.raises(UserError, match=words):
        read_raw("gqa", tmp_path, "testdev")
