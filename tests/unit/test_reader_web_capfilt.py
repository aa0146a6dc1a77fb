"""Web CapFilt: lists streamed and sorted on disk, our own rule from url to file, dead links counted, memory flat."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from instructblip.data.readers.common import MISSING_IMAGE
from instructblip.data.readers.web_capfilt import file_of_url
from instructblip.errors import UserError
from tests.kit.raw_files import read_raw, records_of, write_images, write_raw_json

CAT, DOG, GONE = "http://a.org/cat.jpg?x=1&y", "https://b.org/dög.png", "http://c.org/gone.jpg"
DEAD = "url has no file: its link is dead or was never fetched"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_web_capfilt(raw: Path) -> None:
    """Two lists with the captions of one picture in both, pictures under our rule and by a mapping, one dead link."""
    filtered = [
        {"url": DOG, "caption": "a dog"},
        {"url": CAT, "caption": "a cat "},
        {"url": GONE, "caption": "gone"},
        {"url": CAT, "caption": "a cat\non a mat"},
    ]
    write_raw_json(raw / "ccs_filtered.json", filtered)
    synthetic = [{"url": url, "caption": text} for url, text in ((CAT, "the pet"), (GONE, "gone too"), (CAT, "a cat"))]
    write_raw_json(raw / "ccs_synthetic_filtered.json", synthetic)
    write_images(raw / "images", file_of_url(CAT), "00000/000000012.jpg")
    line = json.dumps({"url": DOG, "file": "00000/000000012.jpg", "status": "success"})
    (raw / "url_to_file.jsonl").write_text(line + "\n")


def test_captions_of_one_url_come_together(tmp_path: Path) -> None:
    write_web_capfilt(tmp_path)
    media, lost = read_raw("web_capfilt", tmp_path, "train")
    cat, dog = _digest(CAT), _digest(DOG)
    assert [(item.key, item.media_id, item.media) for item in media] == [
        (f"web_capfilt_{cat[:32]}", CAT, tmp_path / f"images/{cat[:2]}/{cat}.jpg"),
        (f"web_capfilt_{dog[:32]}", DOG, tmp_path / "images/00000/000000012.jpg"),
    ]
    captions = ("a cat", "a cat on a mat", "the pet")
    assert records_of(media) == {
        CAT: [{"id": f"{cat[:32]}-{n}", "kind": "caption", "answers": (c,)} for n, c in enumerate(captions)],
        DOG: [{"id": f"{dog[:32]}-0", "kind": "caption", "answers": ("a dog",)}],
    }
    assert lost == {DEAD: (1, 2), "caption repeats for its picture": (1, 1)}


def test_the_rule_from_url_to_file_never_changes() -> None:
    digest = (
        "15620dcc0adeba77382350facf71c928eca23619bb0bfedbc885d25d43de9cc5"  # of `printf "http://a.org/é" | sha256sum`
    )
    assert file_of_url("http://a.org/é") == f"{digest[:2]}/{digest}.jpg"


def test_entries_with_paths(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("x")
    entries = [
        {"image": "images/b.jpg", "caption": "b"},
        {"image": "a.jpg", "caption": "a"},
        {"image": "./a.jpg", "caption": "a again"},
        {"image": "gone.jpg", "caption": "c"},
    ]
    write_raw_json(tmp_path / "captions.json", entries)
    write_images(tmp_path / "images", "a.jpg", "b.jpg")
    media, lost = read_raw("web_capfilt", tmp_path, "train")
    assert [(item.media_id, item.media, [record.answers[0] for record in item.records]) for item in media] == [
        ("a.jpg", tmp_path / "images/a.jpg", ["a", "a again"]),
        ("images/b.jpg", tmp_path / "images/b.jpg", ["b"]),
    ]
    assert lost == {MISSING_IMAGE: (1, 1)}


def test_what_cannot_be_kept_is_counted(tmp_path: Path) -> None:
    write_web_capfilt(tmp_path)
    entries: list[Any] = [
        {"url": CAT, "caption": "a cat"},
        {"url": CAT, "caption": ""},
        {"url": CAT},
        {"url": " ", "caption": "x"},
        {"caption": "x"},
        {"image": "/etc/passwd", "caption": "x"},
        {"image": "../../secret.jpg", "caption": "x"},
        {"image": 3, "caption": "x"},
        {"url": "http://half \ud800", "caption": "x"},
        [],
    ]
    (tmp_path / "ccs_filtered.json").write_text(json.dumps(entries))
    (tmp_path / "ccs_synthetic_filtered.json").unlink()
    lines = ["not json", '{"url": "u"}', '{"url": "u", "file": "../x.jpg"}', "[1]"]
    (tmp_path / "url_to_file.jsonl").write_text("\n".join(lines))
    media, lost = read_raw("web_capfilt", tmp_path, "train")
    assert [item.media_id for item in media] == [CAT]
    assert lost == {
        "caption is blank or no text": (3, 3),
        "entry has neither url nor image": (2, 2),
        "image is no path below the raw folder": (3, 3),
        DEAD: (1, 1),  # the url that is half of a surrogate pair, which the parser replaces
        "line does not give a url its file": (4, 0),
    }


@pytest.mark.parametrize("content", [b'[{"url": "a", "caption": "b"}, {"ur', b"<html>", b'{"url": "a"}', b'["\xff"]'])
def test_a_bad_list_is_one_line_before_anything_is_yielded(tmp_path: Path, content: bytes) -> None:
    write_web_capfilt(tmp_path)
    (tmp_path / "ccs_synthetic_filtered.json").write_bytes(content)
    with pytest.raises(UserError, match=r"ccs_synthetic_filtered\.json"):
        read_raw("web_capfilt", tmp_path, "train")


def test_no_list_or_no_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"lacks captions\.json or ccs_filtered\.json"):
        read_raw("web_capfilt", tmp_path, "train")
    write_raw_json(tmp_path / "captions.json", [])
    with pytest.raises(UserError, match=r"lacks images \(images of split train\)"):
        read_raw("web_capfilt", tmp_path, "train")


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_web_capfilt(tmp_path)
    setup = "instructblip.data.readers.web_capfilt._SETUP"
    monkeypatch.setattr(setup, "PRAGMA max_page_count = 1; CREATE TABLE captions (a); CREATE TABLE files (b);")
    with pytest.raises(UserError, match="set TMPDIR to a folder with twice the lists' size free"):
        read_raw("web_capfilt", tmp_path, "train")


_MEASURE = """
import sys, resource
from pathlib import Path
from instructblip.data.cards import load_card
from instructblip.data.readers import READERS, Losses, RawSplit
source = RawSplit(Path(sys.argv[1]), "train", load_card("web_capfilt").splits["train"].files, {})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
losses = Losses()
assert not list(READERS["web_capfilt"](source, losses))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, losses.to_list()[0]["records"])
"""


def test_memory_does_not_grow_with_the_list(tmp_path: Path) -> None:
    """A list of 30 MB, which as Python objects would take more than 100 MB: 38 MB more, of which SQLite has 32, as for ten
    times the list."""
    (tmp_path / "images").mkdir()
    count = 100_000
    with open(tmp_path / "captions.json", "w") as file:
        file.write("[")
        for number in range(count):
            url = f"http://example.org/{number * 7919 % count}/" + "p" * 100
            fields = {"url": url, "caption": f"c{number} " + "w" * 140}
            file.write(("," if number else "") + json.dumps(fields))
        file.write("]")
    command = [sys.executable, "-c", _MEASURE, str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout
    grown, records = map(int, output.split())
    assert records == count
    assert grown < 60 * 1024
