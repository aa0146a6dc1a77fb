"""MSVD-QA and MSRVTT-QA: records equal what a person reads off the files; videos found by number or by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from instructblip.data.cards import load_card
from instructblip.data.readers import READERS, Losses, MediaRecords, RawSplit
from instructblip.data.readers.video_qa import read_mapping
from instructblip.errors import UserError
from tests.kit.videos import write_video

MSVD = {
    "train": [
        {"answer": "animal", "id": 0, "question": "what is chewing on a nut?", "video_id": 1},
        {"answer": "someone", "id": 1, "question": "who cuts a pepper?", "video_id": 3},
        {"answer": "nut", "id": 2, "question": "what is a small animal chewing on?", "video_id": 1},
    ],
    "val": [{"answer": "two", "id": 30933, "question": "how many men dance?", "video_id": 2}],
    "test": [{"answer": "none", "id": 37348, "question": "is anybody there?", "video_id": 4}],
}
# Neither column is in the order of the other, and one YouTube video gives two clips.
MAPPING = """\
-4wsuPCjDBc_5_15 vid1
-8y1Q0rA3n8_108_115 vid3
-8y1Q0rA3n8_95_102 vid2
b_BuSVZwq6M_1_9 vid4
"""
MSRVTT = {
    "train": [
        {"answer": "couch", "category_id": 14, "id": 0, "question": "what are three people sitting on?", "video_id": 0},
        {"answer": "cook", "category_id": 9, "id": 1, "question": "who stirs?", "video_id": 6512},
    ],
    "val": [{"answer": "game", "category_id": 2, "id": 158581, "question": "what is shown?", "video_id": 6513}],
    "test": [
        {"answer": "car", "category_id": 8, "id": 170859, "question": "what drives by?", "video_id": 7010},
        {"answer": "red", "category_id": 8, "id": 170860, "question": "what color is the car?", "video_id": 7010},
    ],
}


def write_msvd_qa(raw: Path) -> None:
    """The official layout: questions of three splits, the mapping, and AVI clips named by its left column."""
    for split, entries in MSVD.items():
        (raw / f"{split}_qa.json").write_text(json.dumps(entries))
    (raw / "youtube_mapping.txt").write_text(MAPPING)
    for number, line in enumerate(MAPPING.splitlines()):
        write_video(raw / f"YouTubeClips/{line.split()[0]}.avi", [["red", "green", "blue", "white"][number]] * 8)


def write_msrvtt_qa(raw: Path) -> None:
    """The official layout: questions of three splits; videos in two folders, one of train in that of test."""
    for split, entries in MSRVTT.items():
        (raw / f"{split}_qa.json").write_text(json.dumps(entries))
    places = {0: "TrainValVideo", 6512: "TestVideo", 6513: "TrainValVideo", 7010: "TestVideo"}
    for number, folder in places.items():
        write_video(raw / f"{folder}/video{number}.mp4", ["red", "green", "blue", "white"] * 3)


def _read(dataset: str, raw: Path, split: str) -> tuple[list[MediaRecords], Losses]:
    card, losses = load_card(dataset), Losses()
    source = RawSplit(raw, split, card.splits[split].files, card.reader_options)
    return list(READERS[card.reader](source, losses)), losses


def test_msvd_records(tmp_path: Path) -> None:
    write_msvd_qa(tmp_path)
    videos, losses = _read("msvd_qa", tmp_path, "train")
    assert losses.to_list() == []
    assert [(item.key, item.media_id, item.media, item.video) for item in videos] == [
        ("msvd_qa_-4wsuPCjDBc_5_15", "-4wsuPCjDBc_5_15", tmp_path / "YouTubeClips/-4wsuPCjDBc_5_15.avi", True),
        ("msvd_qa_-8y1Q0rA3n8_108_115", "-8y1Q0rA3n8_108_115", tmp_path / "YouTubeClips/-8y1Q0rA3n8_108_115.avi", True),
    ]
    assert [[record.to_dict() for record in item.records] for item in videos] == [
        [
            {
                "id": "0",
                "kind": "video_question",
                "question": "what is chewing on a nut?",
                "answers": ("animal",),
                "tags": {"question_type": "what"},
            },
            {
                "id": "2",
                "kind": "video_question",
                "question": "what is a small animal chewing on?",
                "answers": ("nut",),
                "tags": {"question_type": "what"},
            },
        ],
        [
            {
                "id": "1",
                "kind": "video_question",
                "question": "who cuts a pepper?",
                "answers": ("someone",),
                "tags": {"question_type": "who"},
            }
        ],
    ]


@pytest.mark.parametrize(
    ("split", "clip", "record_id", "answer", "question_type"),
    [
        ("val", "-8y1Q0rA3n8_95_102", "30933", "two", "how"),
        ("test", "b_BuSVZwq6M_1_9", "37348", "none", "other"),
    ],
)
def test_msvd_other_splits(
    tmp_path: Path, split: str, clip: str, record_id: str, answer: str, question_type: str
) -> None:
    write_msvd_qa(tmp_path)
    (item,), losses = _read("msvd_qa", tmp_path, split)
    assert (item.media_id, [record.id for record in item.records]) == (clip, [record_id])
    assert (item.records[0].answers, item.records[0].tags) == ((answer,), {"question_type": question_type})
    assert losses.to_list() == []


def test_msvd_clips_named_by_number_are_found_too(tmp_path: Path) -> None:
    write_msvd_qa(tmp_path)
    clips = tmp_path / "YouTubeClips"
    (clips / "-4wsuPCjDBc_5_15.avi").rename(clips / "vid1.mp4")
    videos, losses = _read("msvd_qa", tmp_path, "train")
    assert (videos[0].media_id, videos[0].media) == ("-4wsuPCjDBc_5_15", clips / "vid1.mp4")
    assert losses.to_list() == []


def test_msvd_losses(tmp_path: Path) -> None:
    write_msvd_qa(tmp_path)
    entries: list[Any] = [
        *MSVD["train"],
        {"answer": "a", "id": 2, "question": "what?", "video_id": 1},
        {"answer": "a", "id": 7, "question": "what?", "video_id": 99},
        {"answer": "a", "id": 8, "question": "what?", "video_id": 4},
        {"answer": "b", "id": 9, "question": "what?", "video_id": 4},
        {"answer": " ", "id": 10, "question": "what?", "video_id": 1},
        {"answer": "a", "id": 11, "video_id": 1},
        {"answer": "a", "id": 12, "question": "what?", "video_id": "../1"},
        {"answer": "a", "id": True, "question": "what?", "video_id": 1},
        "text",
    ]
    (tmp_path / "train_qa.json").write_text(json.dumps(entries))
    (tmp_path / "YouTubeClips/b_BuSVZwq6M_1_9.avi").unlink()
    videos, losses = _read("msvd_qa", tmp_path, "train")
    assert [record.id for item in videos for record in item.records] == ["0", "2", "1"]
    assert [(loss["reason"], loss["count"], loss["records"], loss["examples"][0]) for loss in losses.to_list()] == [
        ("entry lacks id, video_id, question or answer", 5, 5, "train_qa.json entry 7"),
        ("question repeats an id", 1, 1, "train_qa.json entry 3: 2"),
        ("video file is missing", 1, 2, "b_BuSVZwq6M_1_9"),
        ("video is not in youtube_mapping.txt", 1, 1, "vid99"),
    ]


def test_the_mapping_holds_each_number_and_each_name_once(tmp_path: Path) -> None:
    path, losses = tmp_path / "youtube_mapping.txt", Losses()
    path.write_bytes(
        b"\xef\xbb\xbfaaaaaaaaaaa_1_2 vid1\r\naaaaaaaaaaa_3_4\tvid2\nbbbbbbbbbbb_1_2 vid1\naaaaaaaaaaa_1_2 vid3\n"
        b"../../etc/passwd vid5\nccccccccccc_1_2\n\n"
    )
    assert read_mapping(path, losses) == {1: "aaaaaaaaaaa_1_2", 2: "aaaaaaaaaaa_3_4"}
    assert [(loss["reason"], loss["count"], loss["records"]) for loss in losses.to_list()] == [
        ("mapping line is not <clip> vid<number>", 2, 0),
        ("mapping line repeats a video", 2, 0),
    ]


def test_msrvtt_records_with_videos_in_two_folders(tmp_path: Path) -> None:
    write_msrvtt_qa(tmp_path)
    found = {split: _read("msrvtt_qa", tmp_path, split) for split in MSRVTT}
    assert [losses.to_list() for _, losses in found.values()] == [[], [], []]
    assert {split: [(item.key, item.media) for item in videos] for split, (videos, _) in found.items()} == {
        "train": [
            ("msrvtt_qa_video0", tmp_path / "TrainValVideo/video0.mp4"),
            ("msrvtt_qa_video6512", tmp_path / "TestVideo/video6512.mp4"),
        ],
        "val": [("msrvtt_qa_video6513", tmp_path / "TrainValVideo/video6513.mp4")],
        "test": [("msrvtt_qa_video7010", tmp_path / "TestVideo/video7010.mp4")],
    }
    assert all(item.video for videos, _ in found.values() for item in videos)
    assert [record.to_dict() for record in found["test"][0][0].records] == [
        {
            "id": "170859",
            "kind": "video_question",
            "question": "what drives by?",
            "answers": ("car",),
            "tags": {"question_type": "what", "category": "8"},
        },
        {
            "id": "170860",
            "kind": "video_question",
            "question": "what color is the car?",
            "answers": ("red",),
            "tags": {"question_type": "what", "category": "8"},
        },
    ]


def test_another_dataset_of_the_same_name_is_all_lost(tmp_path: Path) -> None:
    """A collection called msrvtt_qa goes round that has multiple-choice entries without answers of its own."""
    write_msrvtt_qa(tmp_path)
    (tmp_path / "test_qa.json").write_text(json.dumps([{"video": "video7010", "question": "what?", "options": ["a"]}]))
    videos, losses = _read("msrvtt_qa", tmp_path, "test")
    assert videos == []
    assert losses.to_list()[0]["reason"] == "entry lacks id, video_id, question or answer"


@pytest.mark.parametrize("dataset", ["msvd_qa", "msrvtt_qa"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'[{"answer": "a", "id"', "test_qa.json is not whole JSON"),
        (b'{"a": 1}', "test_qa.json must hold a list"),
        (b'["\xff"]', "UTF-8"),
        (None, "lacks test_qa.json"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, dataset: str, content: bytes | None, words: str) -> None:
    (write_msvd_qa if dataset == "msvd_qa" else write_msrvtt_qa)(tmp_path)
    (tmp_path / "test_qa.json").unlink()
    if content is not None:
        (tmp_path / "test_qa.json").write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        _read(dataset, tmp_path, "test")
    assert "\n" not in str(error.value)


def test_missing_mapping_and_folders_are_named(tmp_path: Path) -> None:
    write_msvd_qa(tmp_path)
    (tmp_path / "youtube_mapping.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"youtube_mapping.txt is not UTF-8"):
        _read("msvd_qa", tmp_path, "test")
    (tmp_path / "youtube_mapping.txt").unlink()
    with pytest.raises(UserError, match=r"lacks youtube_mapping.txt \(mapping of split test\)"):
        _read("msvd_qa", tmp_path, "test")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/test_qa.json").write_text(json.dumps(MSRVTT["test"]))
    with pytest.raises(UserError, match=r"lacks TrainValVideo or TestVideo or .* \(videos of split test\)"):
        _read("msrvtt_qa", tmp_path / "b", "test")
