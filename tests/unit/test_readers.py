"""All readers, driven by files: each case's `expected.json` says what its raw files give; and what the same files give
after editors, cameras and copying have been at them.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from instructblip.data.readers import READERS, Losses, RawSplit
from instructblip.data.readers.easy_vqa import STATEMENT_OF_QUESTION, caption_of, split_of_image, statement_of
from instructblip.data.readers.files import PICTURE_EXTENSIONS
from instructblip.data.readers.web_capfilt import file_of_url
from instructblip.errors import UserError
from tests.kit.raw_files import (
    CASES,
    expected_of,
    read_case,
    read_raw,
    source_of,
    write_case,
    write_raw,
    write_raw_json,
)

ANNOTATIONS = (".json", ".jsonl", ".csv", ".txt", ".token")
# The official layouts; the other cases have faults of their own.
LAYOUTS = [case for case in CASES if case.name == expected_of(case).get("dataset")]


def _case_id(case: Path) -> str:
    return f"{case.parent.name}-{case.name}"


def _assert_as_expected(case: Path, raw: Path) -> None:
    for split, expected in expected_of(case)["splits"].items():
        assert read_case(case, raw, split) == expected, split


def test_every_reader_has_a_case() -> None:
    assert {case.parent.name for case in CASES} == READERS.keys()


@pytest.mark.parametrize("case", CASES, ids=_case_id)
def test_records_and_losses_are_those_beside_the_raw_files(case: Path, tmp_path: Path) -> None:
    write_case(case, tmp_path)
    _assert_as_expected(case, tmp_path)


@pytest.mark.parametrize("case", LAYOUTS, ids=_case_id)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_changes_nothing(case: Path, tmp_path: Path, encoding: str) -> None:
    write_case(case, tmp_path)
    for path in tmp_path.rglob("*"):
        if path.suffix in ANNOTATIONS:
            path.write_text(path.read_text(encoding="utf-8-sig"), encoding=encoding, newline="")
    _assert_as_expected(case, tmp_path)


@pytest.mark.parametrize("case", LAYOUTS, ids=_case_id)
@pytest.mark.parametrize("change", [str.upper, {"jpg": "png", "png": "jpeg"}.get], ids=["upper case", "another format"])
def test_pictures_are_found_under_another_extension(case: Path, tmp_path: Path, change: Callable[[str], str]) -> None:
    write_case(case, tmp_path)
    renamed = {}
    for path in [*tmp_path.rglob("*.jpg"), *tmp_path.rglob("*.png")]:
        if re.fullmatch("[0-9a-f]{64}", path.stem):  # a url's, whose name is a rule
            continue
        new = path.with_suffix(f".{change(path.suffix[1:])}")
        renamed[str(path.relative_to(tmp_path))] = str(new.relative_to(tmp_path))
        path.rename(new)
    for split, expected in expected_of(case)["splits"].items():
        found = read_case(case, tmp_path, split)
        assert found["lost"] == expected["lost"]
        for item, wanted in zip(found["media"], expected["media"], strict=True):
            assert item == wanted | {"file": renamed.get(wanted["file"], wanted["file"])}


@pytest.mark.parametrize("case", LAYOUTS, ids=_case_id)
def test_numbers_that_stand_there_as_text_are_numbers(case: Path, tmp_path: Path) -> None:
    """Whole numbers become texts, and texts of digits alone numbers, where that does not change the text."""
    write_case(case, tmp_path)
    for path in tmp_path.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r"(?<=: )(-?\d+)(?=[,}\]\n])", r'"\1"', text), encoding="utf-8")
    if case.name != "visdial":  # whose test rounds hold lists of numbers
        _assert_as_expected(case, tmp_path)


@pytest.mark.parametrize("case", LAYOUTS, ids=_case_id)
def test_an_archive_that_is_still_packed_is_named(case: Path, tmp_path: Path) -> None:
    split = next(iter(expected_of(case)["splits"]))
    (tmp_path / "all of it.zip").touch()
    (tmp_path / "more.tar.gz").touch()
    with pytest.raises(UserError) as caught:
        list(READERS[case.parent.name](source_of(case, tmp_path, split), Losses()))
    if case.name != "easy_vqa":  # whose package is never packed
        assert "unpack all of it.zip, more.tar.gz, which lies there still packed" in str(caught.value)


# --- what cannot be said by files beside each other -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "split", "file", "content", "words"),
    [
        ("vizwiz", "val", "Annotations/val.json", b'{"questions": []}', "must hold a list"),
        ("gqa", "testdev", "testdev_balanced_questions.json", b"[]", "must hold an object"),
        ("gqa", "testdev", "testdev_balanced_questions.json", b'{"01": {', "not whole"),
        ("coco_caption", "val", "dataset_coco.json", b"version https://git-lfs.github.com/spec/v1\n", "a list under"),
        ("web_capfilt", "train", "ccs_synthetic_filtered.json", b'[{"url": "a", "caption": "b"}, {"ur', "not whole"),
        ("scienceqa_img", "test", "pid_splits.json", b'{"test": ["a"]}', "a list of numbers under 'test'"),
        ("iconqa", "test", "iconqa_data/pid_splits.json", b'{"choose_txt_test": []}', "a list of numbers"),
        ("flickr30k", "test", "results_20130124.token", b"1.jpg#0\t\xff\n", "is not UTF-8"),
        ("vsr", "zeroshot_test", "data/splits/zeroshot/test.jsonl", b"\xff", "is not UTF-8"),
        ("msvd_qa", "train", "youtube_mapping.txt", b"\xff", "is not UTF-8"),
        ("ivqa", "test", "test.csv", b"video_id,question,answer1\n", "has no column answer2"),
        ("ivqa", "test", "test.csv", b"<html></html>\n", "has no column video_id"),
        ("visdial", "val", "visdial_1.0_val.json", b'{"data": {"questions": "x"}}', "must hold a list"),
        ("easy_vqa", "test", "test/questions.json", b'[["is there a circle?", "y', "not whole JSON"),
    ],
)
def test_a_file_of_another_form_is_one_line(
    dataset: str, split: str, file: str, content: bytes, words: str, tmp_path: Path
) -> None:
    write_raw(dataset, tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        read_raw(dataset, tmp_path, split)
    assert Path(file).name in str(caught.value)


@pytest.mark.parametrize(
    ("dataset", "split", "file"),
    [
        ("textcaps", "val", "TextVQA_Rosetta_OCR_v0.2_val.json"),
        ("textvqa", "val", "TextVQA_Rosetta_OCR_v0.2_val.json"),
        ("flickr30k", "test", "dataset_flickr30k.json"),
        ("msvd_qa", "train", "youtube_mapping.txt"),
        ("easy_vqa", "test", "test/questions.json"),
    ],
)
def test_a_missing_file_is_named(dataset: str, split: str, file: str, tmp_path: Path) -> None:
    write_raw(dataset, tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(UserError, match=re.escape(Path(file).name)):
        read_raw(dataset, tmp_path, split)


@pytest.mark.parametrize("file", ["OpenEnded_mscoco_train2014_questions.json", "mscoco_train2014_annotations.json"])
def test_a_file_of_vqa_1_in_the_folder_of_okvqa_is_refused(tmp_path: Path, file: str) -> None:
    write_raw("okvqa", tmp_path)
    path = tmp_path / file
    path.write_text(path.read_text().replace("v1.0 of the OK-VQA", "v1.0 of the VQA"))
    with pytest.raises(UserError, match=f"{file} says 'This is v1.0 of the VQA dataset.', which is not OKVQA"):
        read_raw("okvqa", tmp_path, "train")
    with pytest.raises(UserError, match=r"lacks v2_OpenEnded_mscoco_train2014_questions\.json"):
        read_raw("vqav2", tmp_path, "train")


def test_a_file_of_another_split_is_refused(tmp_path: Path) -> None:
    write_raw("vqav2", tmp_path)
    name = "v2_OpenEnded_mscoco_{}2014_questions.json"
    (tmp_path / name.format("val")).replace(tmp_path / name.format("train"))
    with pytest.raises(UserError, match="says it is of val2014, not of split train"):
        read_raw("vqav2", tmp_path, "train")


@pytest.mark.parametrize(("reader", "split"), [("easy_vqa", "dev"), ("ocr_vqa", "dev")])
def test_a_split_that_a_format_does_not_have_is_refused(tmp_path: Path, reader: str, split: str) -> None:
    with pytest.raises(UserError, match="has no split 'dev'"):
        list(READERS[reader](RawSplit(tmp_path, split), Losses()))


def test_a_full_disk_in_sorting_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_raw("web_capfilt", tmp_path)
    setup = "instructblip.data.readers.web_capfilt._SETUP"
    monkeypatch.setattr(setup, "PRAGMA max_page_count = 1; CREATE TABLE captions (a); CREATE TABLE files (b);")
    with pytest.raises(UserError, match="set TMPDIR to a folder with twice the lists' size free"):
        read_raw("web_capfilt", tmp_path, "train")


def test_the_rule_from_url_to_file_never_changes() -> None:
    digest = "d19383cfbbc0cd5a3457d41a83fb21feb0c0a5a7d64aa67eacf2d5c380601dd9"  # of sha256sum
    assert file_of_url("http://a.org/cat.jpg?x=1&y") == f"d1/{digest}.jpg"


def test_a_dead_link_lists_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 256 folders of tens of thousands of pictures each, and millions of dead links, that would take days."""
    write_raw("web_capfilt", tmp_path)
    (tmp_path / "images" / file_of_url("http://c.org/gone.jpg")).parent.mkdir()
    listed: list[Path] = []
    monkeypatch.setattr(
        "instructblip.data.readers.files._names_in", lambda folder, changed: listed.append(folder) or {}
    )
    _, losses = read_raw("web_capfilt", tmp_path, "train")
    assert any("its link is dead" in reason for reason in losses) and not listed


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


@pytest.mark.slow
def test_memory_does_not_grow_with_a_list_of_web_captions(tmp_path: Path) -> None:
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


def test_easy_vqa_divides_the_images_of_train_by_a_golden_rule(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    entries = [["what shape is present?", "circle", number] for number in range(200)]
    write_raw_json(tmp_path / "train/questions.json", entries)
    ids = [
        [int(item.media_id) for item in READERS["easy_vqa"](RawSplit(tmp_path, split), Losses())]
        for split in ("train", "validation")
    ]
    assert sorted(ids[0] + ids[1]) == list(range(200))
    assert ids[1] == [number for number in range(200) if split_of_image("train", number) == "validation"]
    assert ids[1][:5] == [7, 11, 18, 19, 23]  # the split is part of every published number


def test_the_formats_of_easy_vqas_questions_give_statements_and_others_are_never_guessed() -> None:
    assert len(STATEMENT_OF_QUESTION) == 8  # each of a shape and of a colour
    for question, statement in (
        ("is there not a red shape in the image?", "There is not a red shape in the image."),
        ("does the image contain a circle?", "The image contains a circle."),
        ("does the image not contain a teal shape?", "The image does not contain a teal shape."),
        ("is no triangle present?", "No triangle is present."),
        ("is a brown shape present?", "A brown shape is present."),
    ):
        assert statement_of(question) == statement
    for other in ("is there a purple shape?", "is there a circle", "Is there a circle?", "is there a red circle?"):
        assert statement_of(other) is None


def test_captions_say_what_the_questions_of_a_picture_tell_and_nothing_that_they_do_not() -> None:
    shape, color = ("what is the blue shape?", "circle"), ("what color is the shape?", "blue")
    there, not_there = ("does the image not contain a blue shape?", "no"), ("is there a triangle?", "no")
    for questions in ([shape], [color, ("is a circle present?", "yes")], [there, ("what shape is present?", "circle")]):
        assert caption_of([*questions, not_there]) == "a blue circle"
    assert caption_of([color, not_there, ("is there not a red shape?", "yes")]) is None  # no shape is told
    assert caption_of([shape, ("what is the color of the circle?", "red")]) is None  # the source contradicts itself


def test_extensions_of_pictures_are_known_in_lower_case() -> None:
    assert all(extension == extension.lower() for extension in PICTURE_EXTENSIONS)
