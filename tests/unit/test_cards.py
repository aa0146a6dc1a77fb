"""Cards: all that are in the tree load and agree with the rest of it; mistakes are named with the nearest word."""

import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from instructblip.data import cards
from instructblip.data.cards import CARDS_FOLDER, all_cards, cards_table, load_card, main, source_sha256
from instructblip.data.readers import READERS
from instructblip.errors import UserError

VALID: dict[str, Any] = {
    "name": "tiny",
    "title": "Tiny",
    "task_group": "image question answering",
    "role": "held-in",
    "reader": "easy_vqa",
    "homepage": "https://example.org",
    "licence": "MIT",
    "how_to_get": "draw it",
    "not_fetched": "it is drawn",
    "splits": {"test": {"images": 3, "records": None, "records_by_kind": {"shape": 2, "color": 4}}},
    "verified": True,
    "templates": "vqa_short",
    "evaluation": {
        "split": "test",
        "prompt": "Question: {question} Short answer:",
        "mode": "rank",
        "candidates": ["yes", "no"],
        "normalize": "sum",
        "include_eos": True,
        "max_new_tokens": 10,
        "num_beams": 5,
        "metric": "accuracy",
    },
    "training": {"flip": True},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of that of the official cards."""
    monkeypatch.setattr(cards, "CARDS_FOLDER", tmp_path)
    return tmp_path


GOOD = {"url": "https://example.org/a.zip", "unpack": ".", "gives": ["images"]}  # a download


def _write(folder: Path, changes: dict[str, Any], name: str = "tiny") -> Path:
    """A card with `changes` made to the valid one: "a.b" is a nested key, the value `...` removes it."""
    card = yaml.safe_load(yaml.safe_dump(VALID))
    for key, value in changes.items():
        *parents, last = key.split(".")
        place = card
        for parent in parents:
            place = place[parent]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(card))
    return path


def test_every_card_of_the_tree_loads_and_names_things_that_exist() -> None:
    assert len(all_cards()) >= 5
    assert len(all_cards()) == len(list(CARDS_FOLDER.glob("*.yaml")))
    for card in all_cards():
        assert card.reader in READERS
        assert card.templates is None or (CARDS_FOLDER / "templates" / f"{card.templates}.yaml").is_file()
        for split in card.splits.values():
            assert set(card.kinds) <= split.records_by_kind.keys() or not split.records_by_kind
        for other in card.shared_images:
            assert load_card(other).role == "held-in"


def test_every_yaml_begins_with_how_it_is_used() -> None:
    files = sorted(CARDS_FOLDER.rglob("*.yaml"))
    assert len(files) >= 6
    for path in files:
        assert path.read_text().startswith("# "), path


def test_datasets_folder_holds_no_python() -> None:
    assert list(CARDS_FOLDER.rglob("*.py")) == []


@pytest.mark.slow
def test_readme_table_equals_the_cards() -> None:
    found = (CARDS_FOLDER / "README.md").read_text()
    assert found == cards_table(all_cards()), "run python -m instructblip.data.cards"


def test_main_writes_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cards, "CARDS_FOLDER", tmp_path)
    _write(tmp_path, {})
    assert main() == 0
    row = "| [`tiny`](https://example.org) | image question answering | held-in | - | ? (test) | accuracy, rank | MIT |"
    assert f"{row} yes | no |" in (tmp_path / "README.md").read_text().splitlines()
    _write(tmp_path, {"rol": 1})
    assert main() == 2
    assert "rol" in capsys.readouterr().err


def test_easy_vqa_counts_are_those_the_package_states() -> None:
    card = load_card("easy_vqa")
    splits = card.splits
    questions = {split: card.expected_records(split) or 0 for split in splits}
    assert questions["train"] + questions["validation"] == 38575
    assert questions["test"] == 9673
    assert splits["train"].images == 4000 - (splits["validation"].images or 0)
    for split in splits.values():
        kinds = split.records_by_kind
        assert split.records == sum(kinds.values())
        assert kinds["statement"] == kinds["present"] + kinds["absent"]


def test_statements_are_held_out_and_judged_by_verbalizers() -> None:
    card = load_card("easy_vqa_statements")
    assert (card.role, card.templates, card.kinds, card.source) == ("held-out", None, ("statement",), "easy_vqa")
    assert card.evaluation.verbalizers == {"true": ("yes", "true"), "false": ("no", "false")}
    prompt = card.evaluation.prompt.format(question="There is a circle.")
    assert prompt == 'Based on the image, is this statement true or false? "There is a circle." Answer:'


def test_views_rank_the_same_thirteen_answers() -> None:
    candidates = {load_card(f"easy_vqa{view}").evaluation.candidates for view in ("", "_yes_no", "_shape", "_color")}
    assert len(candidates) == 1
    assert len(set(candidates.pop())) == 13


def test_a_view_takes_the_source_from_its_parent(folder: Path) -> None:
    parent = load_card(_write(folder, {}))
    changes = dict.fromkeys(("reader", "homepage", "licence", "how_to_get", "not_fetched", "splits", "verified"), ...)
    view = load_card(_write(folder, {**changes, "name": "part", "view_of": "tiny", "kinds": ["color"]}, "part"))
    assert (view.source, view.reader, view.splits) == ("tiny", parent.reader, parent.splits)
    assert (view.expected_records("test"), parent.expected_records("test")) == (4, None)
    assert source_sha256(view) == source_sha256(parent)
    with pytest.raises(UserError, match="view_of must name a dataset of its own"):
        load_card(_write(folder, {**changes, "name": "part2", "view_of": "part"}, "part2"))
    with pytest.raises(UserError, match="names no card: 'tini'; did you mean 'tiny'"):
        load_card(_write(folder, {**changes, "name": "part2", "view_of": "tini"}, "part2"))
    with pytest.raises(UserError, match="reader is the parent's to say"):
        load_card(_write(folder, {"name": "part2", "view_of": "tiny"}, "part2"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"licens": "MIT"}, "unknown key licens; did you mean licence?"),
        ({"evaluation.promt": "x"}, "unknown key evaluation.promt; did you mean evaluation.prompt?"),
        ({"splits.test.image": 3}, "unknown key splits.test.image; did you mean splits.test.images?"),
        ({"task": "vqa"}, "unknown key task"),
        ({"splits.test.records": "test.jsonl"}, "splits.test.records must be a whole number, not 'test.jsonl'"),
        ({"reader": "jsonlines"}, "reader=jsonlines is none of aokvqa, coco_captions"),
        ({"reader": "vqa"}, "key splits.test.questions is missing; reader vqa needs it"),
        ({"templates": "vqa_shot"}, "templates: there is no template set 'vqa_shot'"),
        ({"evaluation.metric": "acuracy"}, "evaluation.metric is 'acuracy'; did you mean 'accuracy'?"),
        ({"evaluation.metric": "./a.py:score"}, "an official card names one of the metrics there are"),
        ({"homepage": ...}, "key homepage is missing"),
        ({"reader": ...}, "key reader is missing"),
        ({"evaluation.metric": ...}, "key evaluation.metric is missing"),
        ({"role": "heldin"}, "role=heldin is none of held-in, held-out; did you mean held-in?"),
        ({"evaluation.num_beams": "5"}, "evaluation.num_beams must be a whole number, not '5'"),
        ({"evaluation.include_eos": 1}, "evaluation.include_eos must be true or false, not 1"),
        ({"evaluation.candidates": [True, "no"]}, "evaluation.candidates.0 must be text, not True; put it in quotes"),
        ({"evaluation.candidates": "yes"}, "evaluation.candidates must be a list, not 'yes'"),
        ({"evaluation.verbalizers": {True: ["yes"]}}, "evaluation.verbalizers has the key True, which is not text"),
        ({"splits": []}, "splits must be keys and values, not []"),
        ({"training": True}, "training must be keys and values, not True"),
        ({"paper": {"x": "high"}}, "paper.x must be a number, not 'high'"),
        ({"name": "other"}, "name is 'other'; it must be the file's name, 'tiny'"),
        ({"evaluation.split": "tests"}, "evaluation.split 'tests' is not among splits; did you mean 'test'?"),
        ({"evaluation.candidates": ...}, "needs one of candidates, verbalizers and candidates_from to rank"),
        ({"evaluation.verbalizers": {"a": ["b"]}}, "needs one of candidates, verbalizers and candidates_from to rank"),
        ({"evaluation.mode": "generate"}, "none of them to generate"),
        (
            {"evaluation.mode": "generate", "evaluation.candidates": ..., "evaluation.min_new_tokens": 11},
            "evaluation.min_new_tokens 11 is more than max_new_tokens 10; lower it",
        ),
        ({"evaluation.candidates_from": "choices"}, "needs one of candidates, verbalizers and candidates_from to rank"),
        (
            {"evaluation.candidates_from": "options"},
            "candidates_from=options is none of choices, train_answers, answer_list, null",
        ),
        (
            {"evaluation.candidates": ..., "evaluation.candidates_from": "answer_list"},
            "candidates_from: answer_list and answer_list, its address, go together; give both",
        ),
        ({"evaluation.answer_list": "https://example.org/a.json"}, "go together; give both"),
        ({"evaluation": ..., "role": "held-out"}, "a held-out dataset needs the key evaluation"),
        ({"templates": ...}, "a held-in dataset needs templates"),
        ({"shared_images": {"vqav2": "why"}}, "shared_images is for held-out datasets to say"),
        ({"image_source": "flickr"}, "image_source=flickr is none of coco, openimages, youtube, null"),
        ({"splits.test.files": {"images": "img"}}, "splits.test.files.images must be a list, not 'img'"),
        ({"splits.test.files": {"images": ["img"]}}, "splits.test has 'images', which reader easy_vqa does not take"),
        ({"splits.test.files": {"images": []}}, "splits.test.files.images names no place"),
        ({"splits.test.files": {"images": ["a", "../b"]}}, "'../b' must be a path below the raw folder"),
        ({"splits.test.files": {"images": ["/b"]}}, "'/b' must be a path below the raw folder"),
        ({"not_fetched": ...}, "say one of source_part, fetch, and not_fetched"),
        ({"fetch": [GOOD]}, "say one of source_part, fetch, and not_fetched"),
        (
            {"not_fetched": ..., "fetch": [GOOD | {"url": "ftp://x/a.zip"}]},
            "fetch.0.url 'ftp://x/a.zip' is no address of",
        ),
        ({"not_fetched": ..., "fetch": [GOOD | {"url": "file:///etc/passwd"}]}, "is no address of http or https"),
        ({"not_fetched": ..., "fetch": [GOOD, GOOD | {"gives": ["../b"]}]}, "fetch.1: '../b' must be a path below"),
        ({"not_fetched": ..., "fetch": [GOOD | {"unpack": "/tmp"}]}, "fetch.0: '/tmp' must be a path below"),
        ({"not_fetched": ..., "fetch": [GOOD | {"gives": []}]}, "fetch.0.gives must name what is there afterwards"),
        ({"not_fetched": ..., "fetch": [GOOD | {"unpack": None, "flat": True}]}, "fetch.0.gives must name what is"),
        (
            {"not_fetched": ..., "fetch": [GOOD | {"sha256": "AB"}]},
            "fetch.0.sha256=AB: give the 64 hexadecimal digits",
        ),
        (
            {"not_fetched": ..., "fetch": [GOOD | {"splits": ["tests"]}]},
            "'tests' is not among splits; did you mean 'test'?",
        ),
        ({"not_fetched": ..., "fetch": [GOOD | {"size": 3}]}, "unknown key fetch.0.size"),
        (
            {"reader_options": {"prefix": "a"}},
            "reader_options has 'prefix', which reader easy_vqa does not take; remove",
        ),
        ({"reader_options": ["a"]}, "reader_options must be keys and values, not ['a']"),
        ({"reader_options": {"a": {1: 2}}}, "reader_options.a has the key 1, which is not text"),
        (
            {"reader_options": {"a": [datetime.date(2026, 1, 2)]}},
            "reader_options.a.0 is datetime.date(2026, 1, 2), which",
        ),
        ({"evaluation.prompt": "{qestion}"}, "unknown field 'qestion'; did you mean 'question'?"),
        ({"evaluation.prompt": "{question"}, "evaluation.prompt '{question' has a brace without"),
    ],
)
def test_a_mistake_is_named_with_file_and_key(folder: Path, changes: dict[str, Any], words: str) -> None:
    path = _write(folder, changes)
    with pytest.raises(UserError) as caught:
        load_card(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_what_a_reader_is_told_is_taken_as_it_stands(folder: Path) -> None:
    files = {"images": ["train2014", "val2014"], "questions": ["q.json"]}
    options = {"prefix": "a", "answer_field": {"test": "raw_answer"}}
    card = load_card(_write(folder, {"reader": "vqa", "splits.test.files": files, "reader_options": options}))
    assert card.splits["test"].files == {"images": ("train2014", "val2014"), "questions": ("q.json",)}
    assert card.reader_options == options
    assert {name: card.told[name] for name in options} == options
    plain = load_card(_write(folder, {}))
    assert (plain.splits["test"].files, plain.reader_options, plain.image_source) == ({}, {}, None)
    assert plain.told["prefix"] == "tiny"
    assert source_sha256(card) != source_sha256(plain)


def test_a_card_need_not_be_evaluated_and_may_score_other_kinds_than_it_trains_on(folder: Path) -> None:
    card = load_card(_write(folder, {"evaluation": ..., "training": ...}))
    assert (card.evaluation, card.training.flip) == (None, True)
    assert "| - | - | - | MIT | yes | no |" in cards_table([card])
    changes = {"kinds": ["shape"], "evaluation.kinds": ["color"], "splits": {"train": VALID["splits"]["test"]}}
    card = load_card(_write(folder, changes | {"evaluation.split": "train"}))
    assert "| 2 | 4 (train) |" in cards_table([card])


def test_whole_numbers_serve_as_scores(folder: Path) -> None:
    assert load_card(_write(folder, {"paper": {"vicuna_7b": 50, "flan_t5_xl": 44.5}})).paper == {
        "vicuna_7b": 50.0,
        "flan_t5_xl": 44.5,
    }


def test_a_name_that_there_is_not_names_the_nearest_one_and_the_way_to_ones_own() -> None:
    with pytest.raises(
        UserError, match=r"no dataset card 'easy_vga' .*did you mean 'easy_vqa'.* path, ./easy_vga.yaml"
    ):
        load_card("easy_vga")


def test_unreadable_cards(folder: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_card(folder / "none.yaml")
    for content, words in (("a: [", "not valid YAML"), ("- a", "keys and values at its top level")):
        (folder / "bad.yaml").write_text(content)
        with pytest.raises(UserError, match=words):
            load_card(folder / "bad.yaml")
