"""iVQA: five answers with their weights, cells that are text and nothing else, clips found by id, start and end."""

from pathlib import Path

import pytest

from instructblip.data.cards import load_card
from instructblip.data.readers import READERS, Losses, MediaRecords, RawSplit
from instructblip.errors import UserError
from tests.kit.videos import write_video

HEADER = "video_id,start,end,question,answer1,answer2,answer3,answer4,answer5\n"
TEST_ROWS = (
    HEADER
    + "-abcDEF_123,35,45,What is poured?,milk,milk,water,milk,Water\n"
    + 'bbbbbbbbbbb,5.0,12.0,"Which tool, if any, is used?",none,NA,none,nan,\n'
    + "ccccccccccc,0,9,Qu'est-ce que c'est ?,crème brûlée,null,0,1.0,true\n"
)


def write_ivqa(raw: Path) -> None:
    """The authors' layout: one CSV a split; clips named by id, start and end, one by its id alone."""
    raw.mkdir(parents=True, exist_ok=True)
    (raw / "train.csv").write_text(HEADER + "ddddddddddd,1,2,What is cut?,an onion,onion,onion,onions,onion\n")
    (raw / "val.csv").write_text(
        "video_id,question,answer1,answer2,answer3,answer4,answer5\neeeeeeeeeee,Who?,a,a,a,a,b\n"
    )
    (raw / "test.csv").write_bytes(b"\xef\xbb\xbf" + TEST_ROWS.replace("\n", "\r\n").encode())
    names = ("ddddddddddd_1_2", "eeeeeeeeeee", "-abcDEF_123_35_45", "bbbbbbbbbbb_5_12", "ccccccccccc_0_9")
    for name in names:
        write_video(raw / f"videos/{name}.mp4", ["red", "green", "blue", "white"] * 2)


def _read(raw: Path, split: str) -> tuple[list[MediaRecords], Losses]:
    card, losses = load_card("ivqa"), Losses()
    source = RawSplit(raw, split, card.splits[split].files, card.reader_options)
    return list(READERS[card.reader](source, losses)), losses


def test_records_equal_what_a_person_reads_off_the_file(tmp_path: Path) -> None:
    write_ivqa(tmp_path)
    clips, losses = _read(tmp_path, "test")
    assert [(clip.key, clip.media_id, clip.media, clip.video) for clip in clips] == [
        ("ivqa_-abcDEF_123", "-abcDEF_123", tmp_path / "videos/-abcDEF_123_35_45.mp4", True),
        ("ivqa_bbbbbbbbbbb", "bbbbbbbbbbb", tmp_path / "videos/bbbbbbbbbbb_5_12.mp4", True),
        ("ivqa_ccccccccccc", "ccccccccccc", tmp_path / "videos/ccccccccccc_0_9.mp4", True),
    ]
    assert [[record.to_dict() for record in clip.records] for clip in clips] == [
        [
            {
                "id": "-abcDEF_123",
                "kind": "video_question",
                "question": "What is poured?",
                "answers": ("milk", "water", "Water"),
                "answer_weights": (3.0, 1.0, 1.0),
            }
        ],
        [
            {
                "id": "bbbbbbbbbbb",
                "kind": "video_question",
                "question": "Which tool, if any, is used?",
                "answers": ("none", "NA", "nan"),
                "answer_weights": (2.0, 1.0, 1.0),
            }
        ],
        [
            {
                "id": "ccccccccccc",
                "kind": "video_question",
                "question": "Qu'est-ce que c'est ?",
                "answers": ("crème brûlée", "null", "0", "1.0", "true"),
                "answer_weights": (1.0,) * 5,
            }
        ],
    ]
    assert losses.to_list() == [
        {
            "reason": "answer of one person is blank or no text",
            "count": 1,
            "records": 0,
            "examples": ["test.csv line 3"],
        }
    ]


def test_files_without_start_and_end(tmp_path: Path) -> None:
    write_ivqa(tmp_path)
    (clip,), losses = _read(tmp_path, "val")
    assert clip.media == tmp_path / "videos/eeeeeeeeeee.mp4"
    assert (clip.records[0].answers, clip.records[0].answer_weights) == (("a", "b"), (4.0, 1.0))
    assert losses.to_list() == []


def test_a_clip_that_is_not_named_by_its_span_is_kept_and_said(tmp_path: Path) -> None:
    write_ivqa(tmp_path)
    videos = tmp_path / "videos"
    (videos / "ddddddddddd_1_2.mp4").rename(videos / "ddddddddddd.webm")
    (clip,), losses = _read(tmp_path, "train")
    assert clip.media == videos / "ddddddddddd.webm"
    assert [(loss["reason"], loss["records"]) for loss in losses.to_list()] == [
        ("clip is not named by its start and end (kept, taken to be cut already)", 0)
    ]


def test_losses(tmp_path: Path) -> None:
    write_ivqa(tmp_path)
    (tmp_path / "test.csv").write_text(
        TEST_ROWS
        + "-abcDEF_123,35,45,Again?,a,a,a,a,a\n"
        + "fffffffffff,1,2,No answer?,, ,,,\n"
        + "ggggggggggg,1,2,No video?,a,a,a,a,a\n"
        + "hhhhhhhhhhh,1,2,,a,a,a,a,a\n"
        + "../etc/passwd,1,2,Where?,a,a,a,a,a\n"
        + "iiiiiiiiiii,1,2\n",
        encoding="utf-8",
    )
    clips, losses = _read(tmp_path, "test")
    assert [clip.media_id for clip in clips] == ["-abcDEF_123", "bbbbbbbbbbb", "ccccccccccc"]
    assert [(loss["reason"], loss["count"], loss["records"], loss["examples"][0]) for loss in losses.to_list()] == [
        ("answer of one person is blank or no text", 1, 0, "test.csv line 3"),
        ("row has no answer", 1, 1, "test.csv line 6: fffffffffff"),
        ("row lacks video_id or question", 3, 3, "test.csv line 8"),
        ("row repeats a video_id", 1, 1, "test.csv line 5: -abcDEF_123"),
        ("video file is missing", 1, 1, "ggggggggggg"),
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"video_id,question,answer1\n", "has no column answer2"),
        (b"", "has no column video_id"),
        (b"<html></html>\n", "has no column video_id"),
        (HEADER.encode() + b'aaaaaaaaaaa,1,2,"Whi', r"is not CSV \(after line 1: unexpected end of data\)"),
        (b"video_id\xff", "is not UTF-8"),
        (None, r"lacks test.csv \(questions of split test\)"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, content: bytes | None, words: str) -> None:
    write_ivqa(tmp_path)
    (tmp_path / "test.csv").unlink()
    if content is not None:
        (tmp_path / "test.csv").write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        _read(tmp_path, "test")
    assert "\n" not in str(error.value)
