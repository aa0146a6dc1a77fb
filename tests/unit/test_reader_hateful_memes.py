"""Hateful Memes: ids of five digits in whatever form they come, labels only where they are public. The texts are made up."""

import json
from pathlib import Path
from typing import Any

import pytest

from instructblip.errors import UserError
from tests.kit.raw_files import read_raw, records_of, write_images


def _write_lines(path: Path, *lines: Any) -> None:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))


def write_hateful_memes(raw: Path) -> None:
    """Two memes of dev_seen, whose ids are a string and an integer, and one of a test split without labels."""
    write_images(raw / "img", "08291.png", "01234.png", "16395.png", mode="RGBA")
    _write_lines(
        raw / "dev_seen.jsonl",
        {"id": "08291", "img": "img/08291.png", "label": 1, "text": "a line of text"},
        {"id": 1234, "img": "img/01234.png", "label": 0, "text": " another line "},
    )
    _write_lines(raw / "test_unseen.jsonl", {"id": 16395, "img": "img/16395.png", "text": "a third line"})


def test_dev_seen(tmp_path: Path) -> None:
    write_hateful_memes(tmp_path)
    media, losses = read_raw("hateful_memes", tmp_path, "dev_seen")
    assert [(item.key, item.media) for item in media] == [
        ("hateful_memes_08291", tmp_path / "img/08291.png"),
        ("hateful_memes_01234", tmp_path / "img/01234.png"),
    ]
    assert records_of(media) == {
        "08291": [{"id": "08291", "kind": "meme", "question": "a line of text", "answers": ("yes",), "label": 1}],
        "01234": [{"id": "01234", "kind": "meme", "question": "another line", "answers": ("no",), "label": 0}],
    }
    assert losses == {}


def test_a_test_split_without_labels_has_none(tmp_path: Path) -> None:
    write_hateful_memes(tmp_path)
    media, losses = read_raw("hateful_memes", tmp_path, "test_unseen")
    assert records_of(media) == {"16395": [{"id": "16395", "kind": "meme", "question": "a third line"}]}
    assert losses == {}


def test_files_of_the_first_phase(tmp_path: Path) -> None:
    write_hateful_memes(tmp_path)
    (tmp_path / "dev_seen.jsonl").rename(tmp_path / "dev.jsonl")
    assert len(read_raw("hateful_memes", tmp_path, "dev_seen")[0]) == 2
    with pytest.raises(UserError, match=r"lacks test_seen.jsonl or test.jsonl"):
        read_raw("hateful_memes", tmp_path, "test_seen")


def test_losses(tmp_path: Path) -> None:
    write_hateful_memes(tmp_path)
    meme = {"id": "08291", "img": "img/08291.png", "label": 1, "text": "text"}
    _write_lines(
        tmp_path / "train.jsonl",
        meme,
        {**meme, "id": 8291},
        {**meme, "id": "00001", "img": "img/00001.png"},
        {**meme, "id": "2", "img": "../../secret.png/.."},
        {"id": "3", "img": "img/01234.png", "text": "no label"},
        {**meme, "id": "4", "label": "1"},
        {**meme, "id": "5", "label": 2},
        {**meme, "id": "six"},
        {**meme, "id": -7},
        {**meme, "id": "8", "img": None},
        {**meme, "id": "9", "text": ""},
        "[]\n",
        '{"id": 10',
    )
    media, losses = read_raw("hateful_memes", tmp_path, "train")
    assert [item.media_id for item in media] == ["08291"]
    assert losses == {
        "image file is missing": (2, 2),
        "label is neither 0 nor 1": (2, 2),
        "line is not JSON": (1, 1),
        "line lacks id, img or text": (5, 5),
        "meme has no label": (1, 1),
        "meme repeats an id": (1, 1),
    }
