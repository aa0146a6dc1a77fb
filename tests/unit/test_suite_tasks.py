"""What of a suite is evaluated: the modes that fit, what is not prepared, what cannot be asked; all of it named at once."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from instructblip.config.schema import DataConfig, SourcesConfig, SuiteConfig
from instructblip.data.cards import Card, load_card, load_cards
from instructblip.data.prepare.command import FoundShards, Needed, find_shards
from instructblip.data.prepare.convert import prepare_dataset
from instructblip.errors import UserError
from instructblip.evaluation.protocol import Task, make_task, needed_splits, watched_split
from instructblip.evaluation.suite_tasks import check_suite, fitting_modes, make_tasks, split_missing
from tests.kit.own_data import write_card, write_own_data
from tests.kit.own_tables import own_card, write_jsonl
from tests.kit.tiny import write_easy_vqa

RULES = {"preset": "paper", "llm_kind": "decoder"}


def cards_of(*names: str | Path) -> list[Card]:
    return [load_card(name) for name in names]


def look_for(shards: Path, cards: list[Card], **sources: SourcesConfig) -> FoundShards:
    needed = [Needed(card, needed_splits(card)) for card in cards]
    return find_shards(needed, DataConfig(shards=str(shards), sources=sources), Console(quiet=True))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A card of one's own, and the folder that its dataset is prepared in."""
    folder = tmp_path_factory.mktemp("own")
    path = write_own_data(folder / "data")
    prepare_dataset(load_card(path), path.parent, folder / "shards", progress=False)
    return path, folder / "shards"


# --- cards and modes -------------------------------------------------------------------------------------------------


def test_a_suite_names_each_dataset_once_however_it_is_written(own: tuple[Path, Path]) -> None:
    suite, path = SuiteConfig(name="s"), own[0]
    check_suite(suite, cards_of("vqav2", path, "vsr"))
    for twice in (["vsr", "vsr"], ["vsr", "datasets/vsr.yaml"], [path, path.parent / "photos/../mine.yaml"]):
        with pytest.raises(UserError, match=r"suite s names (vsr|mine) twice; name it once"):
            check_suite(suite, load_cards(twice))


def test_a_mode_is_taken_where_it_can_be_had() -> None:
    cards = cards_of("nocaps", "hateful_memes", "vsr", "visdial")
    modes, note = fitting_modes(cards, "generate", **RULES)
    assert modes == {"nocaps": "generate", "hateful_memes": None, "vsr": "generate", "visdial": None}
    assert note == "mode=generate cannot be had of hateful_memes, visdial: evaluated as the card says"
    modes, note = fitting_modes(cards, "rank", **RULES)
    assert modes == {"nocaps": None, "hateful_memes": "rank", "vsr": "rank", "visdial": "rank"}
    assert fitting_modes(cards, None, **RULES) == (dict.fromkeys(modes), "")


def test_a_mode_that_none_can_have_is_refused() -> None:
    with pytest.raises(
        UserError, match="hateful_memes: auroc needs the scores of candidates, which mode=generate does"
    ):
        fitting_modes(cards_of("hateful_memes", "visdial"), "generate", **RULES)
    with pytest.raises(UserError, match="nocaps has no candidates to rank; evaluate it with mode=generate"):
        fitting_modes(cards_of("nocaps"), "rank", **RULES)


def test_the_splits_that_are_opened_are_the_ones_that_are_looked_for(tmp_path: Path) -> None:
    assert needed_splits(load_card("vqav2")) == {"val"}
    assert needed_splits(load_card("vqav2"), split="test") == {"test"}
    assert watched_split(load_card("coco_caption")) == "val"
    ranked = load_card(write_card(tmp_path, evaluation={"mode": "rank"}))
    assert needed_splits(ranked) == {"val", "train"}  # whose answers are the candidates
    assert needed_splits(ranked, mode="generate") == {"val"}


# --- what is not prepared --------------------------------------------------------------------------------------------


def test_all_that_are_missing_are_named(own: tuple[Path, Path], tmp_path: Path) -> None:
    path, shards = own
    other = write_card(tmp_path, name="other")
    found = look_for(shards, cards_of("okvqa", path, "vsr", "aokvqa_multiple_choice", other))
    assert found.missing.keys() == {"okvqa", "vsr", "aokvqa_multiple_choice", "other"}
    with pytest.raises(UserError) as error:
        split_missing(cards_of("okvqa", path, "vsr"), found, "stop")
    line = str(error.value)
    assert f"okvqa (val), vsr (zeroshot_test), aokvqa (val), {other} (val) are not prepared in {shards}" in line
    assert f"run python prepare.py dataset=NAME out={shards} raw=FOLDER for each" in line
    assert "fetch=true downloads those of okvqa, vsr, aokvqa" in line
    assert line.endswith("or evaluate the others alone: suite.missing=skip")
    assert "\n" not in line


def test_one_that_is_missing_is_told_with_its_command(own: tuple[Path, Path], tmp_path: Path) -> None:
    path, shards = own
    words = (
        rf"okvqa .*is not prepared in {shards}; run python prepare.py dataset=okvqa out={shards} fetch=true, or python"
    )
    with pytest.raises(UserError, match=words):
        split_missing(cards_of("okvqa", path), look_for(shards, cards_of("okvqa", path)), "stop")
    other = write_card(tmp_path, name="other")
    with pytest.raises(
        UserError, match=rf"run python prepare.py dataset={other} out=\S+, with raw=FOLDER where its files"
    ):
        split_missing(cards_of(other), look_for(shards, cards_of(other)), "stop")


def test_skip_leaves_out_what_is_missing_and_says_why(own: tuple[Path, Path]) -> None:
    path, shards = own
    cards = cards_of("okvqa", path, "vsr")
    present, absent = split_missing(cards, look_for(shards, cards), "skip")
    assert [card.name for card in present] == ["mine"]
    assert [(item.name, item.why) for item in absent] == [("okvqa", "missing"), ("vsr", "missing")]
    assert "run python prepare.py dataset=vsr" in absent[1].reason
    with pytest.raises(UserError, match=r"okvqa \(val\), vsr \(zeroshot_test\) are not prepared"):
        split_missing(cards_of("okvqa", "vsr"), look_for(shards, cards), "skip")


def test_what_is_trained_on_is_never_skipped(own: tuple[Path, Path]) -> None:
    path, shards = own
    found = look_for(shards, cards_of("okvqa", path, "vsr"))
    with pytest.raises(UserError, match=r"okvqa \(val\), vsr \(zeroshot_test\) are not prepared") as error:
        split_missing(cards_of(path, "vsr"), found, "skip", "okvqa")
    assert "suite.missing" not in str(error.value)


def test_a_split_that_the_card_has_not_is_told_so(own: tuple[Path, Path]) -> None:
    card = load_card(own[0])
    found = find_shards([Needed(card, frozenset({"tset"}))], DataConfig(shards=str(own[1])), Console(quiet=True))
    with pytest.raises(UserError, match="mine has no split tset; choose among train, val"):
        split_missing([card], found, "stop")


def test_what_may_be_fetched_is_and_a_failure_there_is_the_reason(tmp_path: Path) -> None:
    card = load_card("easy_vqa_color")
    write_easy_vqa(tmp_path / "raw", images=12)
    fetched = SourcesConfig(path=str(tmp_path / "raw"))
    assert look_for(tmp_path / "shards", [card], easy_vqa=fetched).missing == {}
    nowhere = SourcesConfig(path=str(tmp_path / "nowhere"))
    found = look_for(tmp_path / "others", [card], easy_vqa=nowhere)
    assert "nowhere" in found.missing["easy_vqa_color"][1]
    assert "nowhere" in str(found.refusal())


def test_a_folder_of_shards_is_given_where_all_is_there(own: tuple[Path, Path]) -> None:
    path, shards = own
    data, console = DataConfig(shards=str(shards)), Console(file=io.StringIO())
    found = find_shards([Needed(load_card(path), frozenset({"train"}))], data, console)
    assert (found.folder, found.missing) == (shards, {})
    missing = find_shards([Needed(load_card("vsr"), frozenset({"zeroshot_test"}))], data, console)
    assert re.search(r"vsr .*is not prepared", str(missing.refusal()))


# --- what cannot be asked --------------------------------------------------------------------------------------------


def test_shards_of_another_card_are_refused(own: tuple[Path, Path], tmp_path: Path) -> None:
    path, shards = own
    changed = write_card(tmp_path, columns={"question": "q"})
    words = rf"mine/val was prepared from another card than {changed} now is \(options.columns.question: None -> q\)"
    with pytest.raises(UserError, match=words):
        make_task(load_card(changed), shards)
    assert make_task(load_card(path), shards).protocol.metric == "accuracy"


def test_tasks_that_cannot_be_made_are_all_told_or_left_out(own: tuple[Path, Path]) -> None:
    path, shards = own
    good = load_card(path)
    assert good.evaluation is not None
    rules = replace(good.evaluation, prompt="{context}")
    bad = [replace(good, name=name, view_of="mine", evaluation=rules) for name in ("one", "two")]

    def make(card: Card) -> Task:
        return make_task(card, shards)

    with pytest.raises(UserError, match=r"one: record 0 has no context .*; two: record 0 has no context"):
        make_tasks([good, *bad], make, "stop")
    tasks, absent = make_tasks([good, *bad], make, "skip")
    assert [task.card.name for task in tasks] == ["mine"]
    assert [(item.name, item.why) for item in absent] == [("one", "failed"), ("two", "failed")]
    with pytest.raises(UserError, match="one: record 0"):
        make_tasks(bad, make, "skip")


def classes_in(folder: Path, **classes: str) -> Card:
    """A card of pictures that have one class each; `test` has those of its keys."""
    for split, names in classes.items():
        rows = [{"image": f"{number}.png", "label": name} for number, name in enumerate(names)]
        for number in range(len(names)):
            Image.new("RGB", (8, 8 + number), "red").save(folder / f"{number}.png")
        write_jsonl(folder / f"{split}.jsonl", rows)
    card = own_card(folder, {split: {"records": f"{split}.jsonl"} for split in classes}, task="classification")
    prepare_dataset(card, folder, folder / "shards", progress=False)
    return card


def test_a_choice_of_one_is_no_score(tmp_path: Path) -> None:
    card = classes_in(tmp_path, train="hh", test="hs")
    with pytest.raises(
        UserError, match=r"mine ranks all answers of its train split, and that has one alone, 'h', which"
    ):
        make_task(card, tmp_path / "shards")
    assert make_task(card, tmp_path / "shards", mode="generate").samples


def test_classes_that_training_has_not_are_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    card = classes_in(tmp_path, train="hst", test="hHst")
    make_task(card, tmp_path / "shards")
    assert "mine: 1 of 4 samples have an answer that the train split has not" in caplog.text
    assert "the first is mine/1, 'H'" in caplog.text
    caplog.clear()
    make_task(card, tmp_path / "shards", split="train")
    assert caplog.text == ""
