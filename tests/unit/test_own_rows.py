"""Rows of people's own tables: what each task makes of them, and what is wrong with one, by its place."""

import base64
import csv
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from instructblip.data.readers import READERS, FileSlice
from instructblip.data.readers.columns import COLUMNS, NEEDED
from instructblip.data.records import Record
from instructblip.errors import UserError
from tests.kit.own_tables import read_own, write_csv, write_jsonl, write_parquet
from tests.kit.runs import REPOSITORY

PICTURES = ("a.png", "b.png", "ü.png")
LISTED = 'holds a list; write it as JSON does, ["a", "b"]'
ASKED = {"image": "a.png", "question": "what?", "answer": "this"}
CHOSEN = {"image": "a.png", "question": "which?", "choices": ["cat", "Dog", "10"]}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Three pictures."""
    for name in PICTURES:
        Image.effect_noise((20, 16), 80).convert("RGB").save(tmp_path / name)
    return tmp_path


def _read(raw: Path, *rows: Mapping[str, Any], task: str = "vqa", **more: Any) -> tuple[list[Record], dict[str, Any]]:
    """Records of all images, and reason -> records lost, of rows as JSON lines."""
    write_jsonl(raw / "a.jsonl", rows)
    media, lost, _ = read_own(raw, {"records": "a.jsonl"}, task=task, **more)
    return [record for item in media for record in item.records], {reason: count for reason, (_, count) in lost.items()}


# --- what a row gives ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "row", "record"),
    [
        ("vqa", ASKED, Record("0", "question", "what?", ("this",))),
        ("vqa", ASKED | {"answer": 3.0, "id": 17}, Record("17", "question", "what?", ("3",))),
        ("vqa", ASKED | {"id": "folder/a.png#1"}, Record("folder/a.png#1", "question", "what?", ("this",))),
        (
            "vqa",
            {
                "image": "a.png",
                "question": "q",
                "answers": ["b", "a", "b", "", None],
                "context": "c\nd",
                "ocr": "STOP 5",
            },
            Record("0", "question", "q", ("b", "a"), (2.0, 1.0), 5, context="c\nd", ocr_tokens=("STOP", "5")),
        ),
        ("vqa", {"image": "a.png", "question": "q", "answers": ["b", "a"]}, Record("0", "question", "q", ("b", "a"))),
        (
            "vqa",
            {"image": "a.png", "question": "q", "answers": [{"answer": "b", "answer_confidence": "yes"}] * 10},
            Record("0", "question", "q", ("b",), (10.0,)),
        ),
        ("captioning", {"image": "a.png", "caption": "a red\ncar"}, Record("0", "caption", answers=("a red\ncar",))),
        ("classification", {"image": "a.png", "label": 3}, Record("0", "classification", answers=("3",))),
        (
            "classification",
            {"image": "a.png", "label": "big  dog", "question": "what dog?"},
            Record("0", "classification", "what dog?", ("big dog",)),
        ),
        *[
            (
                "statement",
                {"image": "a.png", "question": "it is.", key: value},
                Record("0", "statement", "it is.", said, label=n),
            )
            for key, value, said, n in (
                ("label", 1, ("true",), 1),
                ("label", False, ("false",), 0),
                ("answer", "Yes", ("true",), 1),
                ("answer", "0", ("false",), 0),
            )
        ],
    ],
)
def test_a_row_gives_the_record_of_its_task(raw: Path, task: str, row: dict[str, Any], record: Record) -> None:
    found, lost = _read(raw, row, task=task)
    assert found == [record]
    assert sum(lost.values()) == 0


@pytest.mark.parametrize(
    ("said", "label"),
    [
        ({"answer": "dog"}, 1),
        ({"answer": " CAT "}, 0),
        ({"answer": "B"}, 1),
        ({"answer": "(b)"}, 1),
        ({"answer": "c."}, 2),
        ({"answer": 1}, 1),
        ({"answer": "1"}, 1),
        ({"answer": "10"}, 2),
        ({"label": 2}, 2),
        ({"label": "2", "answer": "cat"}, 2),
        ({"label": "A"}, 0),
    ],
)
def test_a_choice_is_said_by_number_letter_or_text(raw: Path, said: dict[str, Any], label: int) -> None:
    records, lost = _read(raw, CHOSEN | said, task="multiple_choice")
    assert records == [Record("0", "multiple_choice", "which?", choices=("cat", "Dog", "10"), label=label)]
    assert lost == {}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (CHOSEN | {"answer": 3}, "answer is none of the choices"),
        (CHOSEN | {"answer": -1}, "answer is none of the choices"),
        (CHOSEN | {"answer": "D"}, "answer is none of the choices"),
        (CHOSEN | {"answer": "bird"}, "answer is none of the choices"),
        (CHOSEN | {"label": 3}, "label is not from 0 to 2"),
        (
            CHOSEN | {"choices": [1, 2, 3], "answer": 1},
            "answer may mean two of the choices, by its number, letter or text",
        ),
        (
            CHOSEN | {"choices": ["B", "A"], "answer": "a"},
            "answer may mean two of the choices, by its number, letter or text",
        ),
        (CHOSEN | {"choices": ["a", ""], "answer": "a"}, "choices holds something else than text"),
        (CHOSEN | {"choices": [], "answer": "a"}, "choices is empty"),
        (CHOSEN | {"choices": "['cat' 'dog']", "answer": "cat"}, 'choices is no list as JSON writes it, ["a", "b"]'),
        (CHOSEN | {"choices": "cat, dog", "answer": "cat"}, "choices is a text where a list is due"),
        (CHOSEN | {"answer": None}, "answer is missing"),
    ],
)
def test_a_choice_that_is_not_sure_is_never_guessed(raw: Path, row: dict[str, Any], reason: str) -> None:
    good = CHOSEN | {"answer": "cat", "label": 0}
    assert _read(raw, good, row, task="multiple_choice")[1] == {reason: 1}


def test_choices_may_stand_in_columns_of_letters(raw: Path) -> None:
    rows = [{"image": "a.png", "question": "q", "A": "x", "B": 2, "C": "", "D": "y", "answer": "B"}, {"image": "a.png"}]
    rows[1] |= {"question": "q", "A": "x", "B": None, "C": None, "D": None, "answer": "A"}
    write_csv(raw / "a.tsv", rows, "\t")
    media, lost, _ = read_own(raw, {"records": "a.tsv"}, task="multiple_choice")
    assert [(record.choices, record.label) for record in media[0].records] == [(("x", "2"), 1)]
    assert lost == {"choices is missing": (1, 1)}


def test_captions_are_trained_on_one_by_one_and_scored_together(raw: Path) -> None:
    rows = [
        {"image": "a.png", "captions": ["one", "two"]},
        {"image": "b.png", "caption": "b"},
        {"image": "a.png", "caption": "three"},
    ]
    trained, _ = _read(raw, *rows, task="captioning")
    assert [(record.id, record.kind, *record.answers) for record in trained] == [
        ("0-0", "caption", "one"),
        ("0-1", "caption", "two"),
        ("2", "caption", "three"),
        ("1", "caption", "b"),
    ]
    scored, _ = _read(raw, *rows, task="captioning", split="val")
    assert [(record.id, record.kind, record.captions) for record in scored] == [
        ("0", "captions", ("one", "two", "three")),
        ("1", "captions", ("b",)),
    ]


def test_several_images_stand_together_and_a_video_is_one(raw: Path) -> None:
    rows = [
        ASKED | {"image": ["a.png", "b.png"]},
        ASKED | {"image": '["b.png", "a.png"]'},
        ASKED | {"image": ["a.png"]},
        ASKED,
    ]
    (raw / "a clip.mp4").write_bytes(b"not looked into here")
    rows.append({"video": ["a clip.mp4"], "question": "q", "answer": "a"})
    rows.append({"video": ["a clip.mp4", "b.mp4"], "question": "q", "answer": "a"})
    write_jsonl(raw / "a.jsonl", rows)
    media, lost, _ = read_own(raw, {"records": "a.jsonl"})
    assert [(item.media_id, len(item.records), item.video) for item in media] == [
        ("a.png b.png", 1, False),
        ("b.png a.png", 1, False),
        ("a.png", 2, False),
        ("a clip.mp4", 1, True),
    ]
    assert [item.media for item in media][:3] == [
        (raw / "a.png", raw / "b.png"),
        (raw / "b.png", raw / "a.png"),
        raw / "a.png",
    ]
    assert lost == {"row has several videos": (1, 1)}


# --- dialogues -------------------------------------------------------------------------------------------------------

TURNS = [
    {"from": "human", "value": "<image>\nwhat is it?"},
    {"from": "gpt", "value": "a car"},
    {"from": "human", "value": "its colour?"},
    {"from": "gpt", "value": "red"},
]
SYSTEM = {"role": "system", "content": "Be brief."}


def _talk(*turns: Any, image: Any = "a.png", **more: Any) -> dict[str, Any]:
    return {"image": image, "conversations": list(turns), **more}


def test_each_answer_of_a_dialogue_is_a_record_with_the_turns_before_it(raw: Path) -> None:
    records, lost = _read(raw, _talk(*TURNS, id="same"), _talk(*TURNS[:2], id="same"), task="conversation")
    assert records == [
        Record("0-0", "dialog", "what is it?", ("a car",)),
        Record("0-1", "dialog", "its colour?", ("red",), history=(("what is it?", "a car"),)),
        Record("1", "dialog", "what is it?", ("a car",)),
    ]
    assert lost == {}


def test_a_leading_system_turn_is_context_and_parts_of_content_are_joined(raw: Path) -> None:
    asked = [
        {"type": "image"},
        {"type": "image"},
        {"type": "text", "text": "which "},
        {"type": "text", "text": "is red?"},
    ]
    row = _talk(
        SYSTEM,
        {"role": "user", "content": asked},
        {"role": "assistant", "content": "the first"},
        image=["a.png", "b.png"],
    )
    assert _read(raw, row, task="conversation")[0] == [
        Record("0", "dialog", "which is red?", ("the first",), context="Be brief.")
    ]


ALTERNATES = "dialogue does not alternate between human and gpt"


@pytest.mark.parametrize(
    ("row", "reason", "count"),
    [
        (_talk(), ALTERNATES, 1),
        (_talk(*TURNS[1:]), ALTERNATES, 2),
        (_talk(TURNS[0], TURNS[2], TURNS[1]), ALTERNATES, 1),
        (_talk(*TURNS[:2], SYSTEM), ALTERNATES, 1),
        (_talk("hello"), ALTERNATES, 1),
        (_talk(*TURNS, image=["a.png", "b.png"]), "dialogue has another number of <image> than images", 2),
        (
            _talk({"from": "human", "value": "<image> or <image>?"}, TURNS[1]),
            "dialogue has another number of <image> than images",
            1,
        ),
        (
            _talk(*TURNS[:2], {"from": "human", "value": " "}, TURNS[3]),
            "turn is blank or no text, and so are lost those after it",
            1,
        ),
        (_talk(*TURNS[:3]), "last question has no answer", 0),
        (_talk(*TURNS, image=None), "image is missing", 2),
        ({"image": "a.png", "conversations": {"human": "q"}}, "conversations is an object where a list is due", 1),
    ],
)
def test_a_dialogue_that_is_not_one_is_counted_with_its_answers(raw: Path, row: Any, reason: str, count: int) -> None:
    records, lost = _read(raw, _talk(*TURNS), row, task="conversation")
    assert lost == {reason: count}
    assert len(records) == 2 + (reason.startswith(("turn", "last")))


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_first_answer_of_a_dialogue_may_be_a_caption(raw: Path, split: str) -> None:
    blank = {"from": "gpt", "value": " "}
    rows = [_talk(*TURNS), _talk(TURNS[0]), _talk(TURNS[0], blank, image="b.png")]
    write_jsonl(raw / "a.jsonl", rows)
    media, lost, _ = read_own(raw, {"records": "a.jsonl"}, task="captioning", split=split)
    assert [(item.media_id, record.answers + record.captions) for item in media for record in item.records] == [
        ("a.png", ("a car",))
    ]
    assert len(media) == 1, "a picture without a record is none"
    assert lost == {
        "dialogue has no answer": (1, 1),
        "last question has no answer": (1, 0),
        "turn is blank or no text, and so are lost those after it": (1, 1),
    }


def test_a_cell_of_a_table_may_hold_a_dialogue_as_json(raw: Path) -> None:
    write_csv(raw / "a.csv", [_talk(*TURNS)])
    media, lost, _ = read_own(raw, {"records": "a.csv"})
    assert [record.kind for record in media[0].records] == ["question", "question"]
    assert lost == {}


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("none.png", "image file is missing"),
        ("/etc/passwd", "image is an absolute path; give it as it is below its folder"),
        ("../secret.png", "image is no path below its folder"),
        ("photos/../../secret.png", "image is no path below its folder"),
        ("https://example.org/a.png", "image is a URL; download it, and give the path of the file"),
        ("data:image/png;base64,????", "image is neither a path nor base64"),
        ("x" * 2000 + "?", "image is neither a path nor base64"),
        ("x y" * 2000, "image is no path below its folder"),
        (7, "image is a number where a path is due"),
        (["a.png", "none.png"], "image file is missing"),
        (["a.png", None], "image is missing"),
        ([], "image is missing"),
        ({"path": None, "bytes": None}, "image is missing"),
        ({"path": "../a.png"}, "image is no path below its folder"),
        (True, "image is true or false where a path is due"),
        (None, "image is missing"),
        ("  ", "image is missing"),
    ],
)
def test_an_image_that_cannot_be_had_has_a_reason(raw: Path, image: Any, reason: str) -> None:
    (raw.parent / "secret.png").write_bytes((raw / "a.png").read_bytes())
    records, lost = _read(raw, ASKED, ASKED | {"image": image})
    assert (len(records), lost) == (1, {reason: 1})


def test_a_row_with_an_image_and_a_video_is_not_guessed(raw: Path) -> None:
    assert _read(raw, ASKED, ASKED | {"video": "a.mp4"})[1] == {"row has both an image and a video": 1}


def test_one_picture_under_two_forms_of_its_name_is_one_image(raw: Path) -> None:
    """Spelt with a letter of its own (NFC) and with a mark over another (NFD); in another case and format of extension."""
    (raw / "ü.png").rename(raw / "u\u0308.PNG")
    write_jsonl(raw / "a.jsonl", [ASKED | {"image": name} for name in ("\u00fc.png", "u\u0308.png", "./ü.png")])
    media, lost, _ = read_own(raw, {"records": "a.jsonl"})
    assert [(item.media, item.media_id, len(item.records)) for item in media] == [(raw / "u\u0308.PNG", "ü.png", 3)]
    assert lost == {}


@pytest.mark.slow
def test_pictures_in_cells_are_kept_once_and_read_from_their_place(raw: Path) -> None:
    """As base64, as a data: address and as an object with bytes; the same picture each time."""
    image = Image.effect_noise((40, 40), 90).convert("RGB")
    image.save(raw / "c.png")
    content = (raw / "c.png").read_bytes()
    text = base64.b64encode(content).decode()
    write_csv(raw / "a.csv", [ASKED | {"image": said} for said in (text, f"data:image/png;base64,{text}", "a.png")])
    media, lost, _ = read_own(raw, {"records": "a.csv"})
    assert (len(text) > 1000, lost) == (True, {})
    assert [len(item.records) for item in media] == [2, 1]
    part = media[0].media
    assert isinstance(part, FileSlice)
    assert part.path.read_bytes()[part.offset : part.offset + part.size] == content
    write_parquet(raw / "a.parquet", [ASKED | {"image": [{"bytes": content}, {"bytes": content}]}] * 2)
    (together,), lost, _ = read_own(raw, {"records": "a.parquet"})
    assert ([part.size for part in together.media], len(together.records), lost) == ([len(content)] * 2, 2, {})


def test_pictures_are_looked_for_where_the_card_says_or_beside_the_table(raw: Path) -> None:
    (raw / "tables").mkdir()
    (raw / "a.png").rename(raw / "tables/a.png")
    write_jsonl(raw / "tables/a.jsonl", [ASKED, ASKED | {"image": "b.png"}, ASKED | {"image": "tables/a.png"}])
    media, _, _ = read_own(raw, {"records": "tables/a.jsonl"})
    assert [item.media for item in media] == [raw / "tables/a.png", raw / "b.png", raw / "tables/a.png"]
    media, lost, _ = read_own(raw, {"records": "tables/a.jsonl", "images": "tables"})
    assert ([item.media for item in media], lost) == ([raw / "tables/a.png"], {"image file is missing": (2, 2)})
    with pytest.raises(UserError, match="lacks photos"):
        read_own(raw, {"records": "tables/a.jsonl", "images": "photos"})


# --- cells -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer": None}, "answer is missing"),
        ({"answer": math.nan}, "answer is missing"),
        ({"answer": " \n"}, "answer is missing"),
        ({"answer": True}, "answer is true or false where text is due"),
        ({"answer": {"a": 1}}, "answer is an object where text is due"),
        ({"answer": ["a"]}, "answer is a list where text is due"),
        *[
            ({"answer": text}, f"answer {LISTED}, and call its column answers")
            for text in ("['a', 'b']", '["a", "b"]', "['a' 'b']", " ['a']\n")
        ],
        ({"answer": None, "answers": "['a', 'b']"}, f"answers {LISTED}"),
        ({"answer": None, "answers": "['a' 'b']"}, f"answers {LISTED}"),
        ({"question": None}, "question is missing"),
        ({"question": "x" * 1_000_001}, "question is too long"),
        ({"id": "a\nb"}, "id is no id"),
        ({"id": "x" * 300}, "id is no id"),
        ({"ocr": "word " * 100_001}, "row holds a list of more than 100,000"),
    ],
)
def test_a_cell_that_does_not_hold_what_is_due_costs_its_row(raw: Path, change: dict[str, Any], reason: str) -> None:
    records, lost = _read(raw, ASKED, ASKED | change)
    assert ([record.id for record in records], lost) == (["0"], {reason: 1})


def test_brackets_in_an_answer_are_no_list(raw: Path) -> None:
    texts = ["[blank]", "[1, 2]", "['a'] or [b]", "it's [so]"]
    records, lost = _read(raw, *(ASKED | {"answer": text} for text in texts))
    assert ([record.answers for record in records], lost) == ([(text,) for text in texts], {})


def test_people_who_gave_no_answer_are_counted_and_cost_no_record(raw: Path) -> None:
    row = {"image": "a.png", "question": "q", "answers": ["a", math.nan, None]}
    records, lost = _read(raw, row, row | {"answers": [None, ""]})
    assert [(record.answers, record.annotators) for record in records] == [(("a",), 3)]
    assert lost == {"answer of one person is blank or no text": 0, "answers hold no answer with text": 1}


def test_the_place_of_a_row_is_said(raw: Path) -> None:
    rows = [ASKED | {"question": "two\nlines"}, ASKED | {"answer": ""}]
    for form, write, place in (
        ("csv", write_csv, "a.csv line 4"),
        ("jsonl", write_jsonl, "a.jsonl line 2"),
        ("json", lambda path, rows: path.write_text(json.dumps(rows)), "a.json entry 1"),
        ("parquet", write_parquet, "a.parquet row 1"),
    ):
        write(raw / f"a.{form}", rows)
        assert read_own(raw, {"records": f"a.{form}"})[1:] == ({"answer is missing": (1, 1)}, [place])


def test_several_tables_are_one_split_with_numbers_that_go_on(raw: Path) -> None:
    write_jsonl(raw / "part-1.jsonl", [ASKED, ASKED])
    write_csv(raw / "part-2.csv", [ASKED, ASKED | {"image": "b.png"}])
    media, _, _ = read_own(raw, {"records": "part-{1.jsonl,2.csv}"})
    assert [[record.id for record in item.records] for item in media] == [["0", "1", "2"], ["3"]]
    with pytest.raises(UserError, match=r"lacks part-3\.csv of part-\{1\.jsonl,3\.csv\}"):
        read_own(raw, {"records": "part-{1.jsonl,3.csv}"})
    with pytest.raises(UserError, match=r"lacks \*\.tsv \(records of split train\); put it there"):
        read_own(raw, {"records": "*.tsv"})


# --- columns ---------------------------------------------------------------------------------------------------------


def test_a_column_that_is_missing_is_named_with_those_that_are_there(raw: Path) -> None:
    renamed = {"file": "a.png", "q_text": "what?", "answer": "this"}
    write_jsonl(raw / "a.jsonl", [renamed])
    write_csv(raw / "a.csv", [renamed])
    for name, header in (("a.jsonl", ""), ("a.csv", " (the first line of a table names them)")):
        with pytest.raises(UserError) as caught:
            read_own(raw, {"records": name}, image="file")
        assert str(caught.value) == (
            f"{raw / name} has no column question or conversations, which task vqa needs; the columns there are: answer, "
            f"file, q_text{header}; name the right one in the card, as columns: {{question: NAME}}"
        )
        media, lost, _ = read_own(raw, {"records": name}, image="file", question="q_text")
        assert ([record.question for record in media[0].records], lost) == (["what?"], {})


@pytest.mark.parametrize(
    ("there", "meant"), [("Image", "image: Image"), ("images", "image: images"), ("VIDEO", "video: VIDEO")]
)
def test_a_column_that_is_called_almost_so_is_proposed(raw: Path, there: str, meant: str) -> None:
    write_jsonl(raw / "a.jsonl", [{there: "a.png", "question": "q", "answer": "b"}])
    with pytest.raises(UserError, match=rf"as columns: {{{meant}}}$"):
        read_own(raw, {"records": "a.jsonl"})


def test_a_column_of_the_card_that_no_row_has_is_noted(raw: Path) -> None:
    assert _read(raw, ASKED, context="hint")[1] == {"column of the card is not in the table": 0}


def test_one_column_may_serve_for_two(raw: Path) -> None:
    row = {"image": "a.png", "text": "STOP here"}
    records, _ = _read(raw, row, task="captioning", caption="text", ocr="text")
    assert (records[0].answers, records[0].ocr_tokens) == (("STOP here",), ("STOP", "here"))


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_byte_order_marks_and_line_ends_change_nothing(raw: Path, encoding: str, ending: str) -> None:
    texts = {
        "a.csv": 'image,question,answer\nü.png,"two\nlines, ""quoted""","größer"\n\nb.png,q,a\n',
        "a.jsonl": json.dumps(ASKED | {"image": "ü.png"}, ensure_ascii=False) + "\n\n" + json.dumps(ASKED) + "\n",
        "a.json": json.dumps([ASKED | {"image": "ü.png"}, ASKED], ensure_ascii=False, indent=1),
    }
    for name, text in texts.items():
        (raw / name).write_text(text, encoding="utf-8", newline=ending)
        wanted = read_own(raw, {"records": name})
        (raw / name).write_text(text, encoding=encoding, newline=ending)
        assert read_own(raw, {"records": name}) == wanted
        assert wanted[0][0].media_id == "ü.png"
    question = read_own(raw, {"records": "a.csv"})[0][0].records[0].question
    assert question == f'two{ending}lines, "quoted"'


def test_a_line_that_tells_the_delimiter_is_none_of_the_table(raw: Path) -> None:
    (raw / "a.csv").write_text("sep=;\r\nimage;question;answer\r\na.png;q, r;b\r\nnone.png;q;c\r\n")
    media, lost, places = read_own(raw, {"records": "a.csv"})
    assert [(record.question, record.answers) for record in media[0].records] == [("q, r", ("b",))]
    assert (lost, places) == ({"image file is missing": (1, 1)}, ["a.csv line 4: none.png"])


def test_paths_from_windows_and_names_without_an_extension_are_found(raw: Path) -> None:
    (raw / "sub").mkdir(exist_ok=True)
    for name in ("sub/1.png", "sub/2.png", "sub/2.jpg", "sub/3.txt"):
        (raw / name).write_bytes((raw / "a.png").read_bytes())
    rows = [ASKED | {"image": image} for image in (r"sub\1.png", "sub/1", "sub/2", "sub/3", "a")]
    write_jsonl(raw / "a.jsonl", rows)
    media, lost, _ = read_own(raw, {"records": "a.jsonl"})
    assert [item.media for item in media] == [raw / "sub/1.png", raw / "sub/1.png", raw / "a.png"]
    assert lost == {"image file is missing": (2, 2)}, "of two pictures none is chosen, and a text is none"


def test_rows_of_csv_that_cannot_be_read_are_counted_and_the_rest_is_kept(raw: Path) -> None:
    lines = ["image,question,answer", "a.png,q,a", 'a.png,"q" and more,a', "a.png,q,a,b,c", "a.png,q", "a.png,q,a,,"]
    (raw / "a.csv").write_text("\n".join(lines))
    media, lost, examples = read_own(raw, {"records": "a.csv"})
    assert [record.id for record in media[0].records] == ["0", "4"]
    assert lost == {
        "answer is missing": (1, 1),
        "row has more cells than the table has columns": (1, 1),
        "row is not CSV": (1, 1),
    }
    assert [example.partition(":")[0] for example in examples] == ["a.csv line 5", "a.csv line 4", "a.csv line 3"]


def test_a_quote_that_is_not_closed_ends_at_the_largest_cell(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instructblip.data.readers.tables.MAX_CELL", 1000)
    rows = [f"a.png,q{number},a" for number in range(400)]
    rows[3] = 'a.png,"q,a'
    (raw / "a.csv").write_text("\n".join(["image,question,answer", *rows]))
    media, lost, examples = read_own(raw, {"records": "a.csv"})
    assert lost == {"row is not CSV": (1, 1)}
    assert examples == ["a.csv line 5: field larger than field limit (1000)"]
    assert len(media[0].records) > 300
    csv.field_size_limit(1 << 26)


def test_a_large_cell_is_read(raw: Path) -> None:
    write_csv(raw / "a.csv", [ASKED | {"answer": "x" * 500_000}])
    media, _, _ = read_own(raw, {"records": "a.csv"})
    assert len(media[0].records[0].answers[0]) == 500_000


@pytest.mark.slow
@pytest.mark.parametrize(("codec", "rows"), [("zstd", None), ("snappy", 10)])
def test_a_parquet_file_does_not_fill_the_memory(
    raw: Path, codec: str, rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text of 25 million letters takes a kilobyte or two megabytes of the file, and stands in each row."""
    asked = [ASKED | {"context": "x" * 25_000_000, "id": str(number)} for number in range(2)]
    parquet.write_table(pyarrow.Table.from_pylist(asked), raw / "a.parquet", compression=codec)
    sizes = []
    iter_batches = parquet.ParquetFile.iter_batches
    monkeypatch.setattr(
        parquet.ParquetFile,
        "iter_batches",
        lambda file, batch_size, **options: (sizes.append(batch_size), iter_batches(file, batch_size, **options))[1],
    )
    if rows is None:
        with pytest.raises(UserError, match=r"a\.parquet would unpack to 25,\d+,\d+ bytes; it is not to be trusted"):
            read_own(raw, {"records": "a.parquet"})
    else:
        read_own(raw, {"records": "a.parquet"})
        assert sizes == [rows]


def test_columns_of_parquet_that_nobody_reads_may_hold_anything(raw: Path) -> None:
    import datetime
    from decimal import Decimal

    nested = {"a": [{"b": [1, None]}], "c": None}
    rows = [ASKED | {"meta": nested, "when": datetime.datetime(2026, 1, 2), "price": Decimal("1.5"), "answer": 7}]
    rows.append(rows[0] | {"answer": None})
    write_parquet(raw / "a.parquet", rows)
    media, lost, _ = read_own(raw, {"records": "a.parquet"})
    assert ([record.answers for record in media[0].records], lost) == ([("7",)], {"answer is missing": (1, 1)})
    write_parquet(raw / "a.parquet", [row | {"answer": Decimal("1.5")} for row in rows])
    assert read_own(raw, {"records": "a.parquet"})[1] == {"answer is Decimal where text is due": (2, 2)}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", r"a\.jsonl is empty"),
        ("a.csv", b"\n \n", r"a\.csv is empty"),
        ("a.csv", b"image,question,answer\n", r"a\.csv has no rows below its header"),
        ("a.json", b"[]", r"a\.json has no rows"),
        (
            "a.json",
            b'{\n"data": []\n}',
            r"a\.json must hold a list of objects, or an object on each line; a\.json line 1 is none",
        ),
        ("a.json", b'[{"image": "a.png", "question": "q", "answer": "a"}, {"ima', r"a\.json is not whole JSON"),
        ("a.jsonl", b"\xff\xffabc", r"a\.jsonl is not UTF-8"),
        ("a.csv", b"image,question,answer\na.png,\xe9,a\n", r"a\.csv is not UTF-8"),
        ("a.csv", b"image,question,question,answer\na.png,q,q,a\n", r"a\.csv has two columns question"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\0", r"a\.jsonl\.gz is packed with gzip; unpack it"),
        (
            "a.xlsx",
            b"PK\x03\x04\0",
            r"a\.xlsx is packed with zip \(or is a spreadsheet\); unpack it, or save it as CSV",
        ),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet cannot be read \("),
        ("a.txt", b"image question", r"a\.txt is no table that is read; give \.jsonl"),
    ],
)
def test_a_file_that_is_no_table_is_one_line(raw: Path, name: str, content: bytes, words: str) -> None:
    (raw / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read_own(raw, {"records": name})
    assert "\n" not in str(caught.value)


def test_rows_of_json_that_are_no_objects_are_counted(raw: Path) -> None:
    (raw / "a.json").write_text(json.dumps([1, ASKED, ["a"]]))
    media, lost, _ = read_own(raw, {"records": "a.json"})
    assert ([record.id for record in media[0].records], lost) == (
        ["1"],
        {"row is no object of keys and values": (2, 2)},
    )


def test_json_lines_are_read_under_the_name_of_json(raw: Path) -> None:
    write_jsonl(raw / "a.json", [ASKED, ASKED])
    assert [len(item.records) for item in read_own(raw, {"records": "a.json"})[0]] == [2]


def test_a_folder_is_read_as_save_to_disk_writes_it_or_refused(raw: Path) -> None:
    (raw / "hf/train").mkdir(parents=True)
    with pytest.raises(
        UserError, match=r"hf is a folder without state\.json, which save_to_disk writes; or name the files"
    ):
        read_own(raw, {"records": "hf"})
    (raw / "hf/dataset_dict.json").write_text('{"splits": ["test", "validation"]}')
    with pytest.raises(UserError, match="hf has no split train, but test, validation; name one: hf/SPLIT"):
        read_own(raw, {"records": "hf"})
    (raw / "hf/train/state.json").write_text('{"_data_files": [{"filename": "../../a.arrow"}]}')
    with pytest.raises(UserError, match=r"state\.json names no files of rows"):
        read_own(raw, {"records": "hf/train"})
    (raw / "hf/train/state.json").write_text('{"_data_files": [{"filename": "a.arrow"}]}')
    (raw / "hf/train/a.arrow").write_bytes(b"half of a file")
    with pytest.raises(UserError, match=r"a\.arrow cannot be read \("):
        read_own(raw, {"records": "hf/train"})


def test_without_pyarrow_parquet_is_one_line(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    write_parquet(raw / "a.parquet", [ASKED])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        UserError, match=r"a\.parquet needs pyarrow; install it with: pip install -r requirements-records\.txt"
    ):
        read_own(raw, {"records": "a.parquet"})


# --- what is written of it -------------------------------------------------------------------------------------------


def test_the_documentation_lists_every_column_task_and_reader() -> None:
    text = (REPOSITORY / "docs/data.md").read_text(encoding="utf-8")
    section = text.partition("\n## Own data\n")[2].partition("\n## ")[0]
    listed = {
        name for row in re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    own = {name for name, reader in READERS.items() if reader.tasks}
    assert listed == {*COLUMNS, *NEEDED, *own}
