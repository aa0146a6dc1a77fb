"""Cards that rank a list of answers, as BLIP does: the list is given by its path, and it is part of the protocol."""

from pathlib import Path
from typing import Any

import pytest

from instructblip.config.schema import EvaluateConfig
from instructblip.data.cards import load_card
from instructblip.errors import UserError
from instructblip.evaluation.protocol import Task, chance_level, make_task, make_validation_task, unfit
from instructblip.evaluation.report.table import MODELS, OTHER_SPLIT, comparison_marks
from instructblip.evaluation.runner import read_pixels, run_task
from instructblip.evaluation.suite_tasks import check_answers
from instructblip.files import write_json
from tests.kit.blip import SIDE, tiny_vqa
from tests.kit.runs import compose
from tests.kit.synthetic_tasks import WORDS, synthetic_task

LISTED = ("vqav2_blip", "okvqa_blip", "aokvqa_blip")


def listed_task(folder: Path, answers: Any = WORDS, name: str = "vqav2_blip", **options: Any) -> Task:
    """Twelve made-up questions, and a list of answers in a file."""
    card = load_card(name)
    synthetic_task(card, folder, 12)
    write_json(folder / "list.json", answers)
    return make_task(card, folder, answers=folder / "list.json", **options)


@pytest.mark.parametrize("name", LISTED)
def test_every_question_is_answered_from_the_list(name: str, tmp_path: Path) -> None:
    task = listed_task(tmp_path, name=name)
    assert (task.protocol.mode, task.protocol.candidates_from) == ("rank", "answer_list")
    assert task.vocabulary == WORDS
    result = run_task(tiny_vqa(), task, read_pixels(SIDE), batch_size=4, show_progress=False)
    assert {item.prediction for item in result.predictions} <= set(WORDS)
    assert all(len(item.scores) == len(WORDS) for item in result.predictions)
    assert chance_level(task) == pytest.approx(100 / len(WORDS))
    assert task.protocol.describe()["candidates"].startswith(f"a list of {len(WORDS)} answers (sha256 ")


def test_another_list_is_another_protocol(tmp_path: Path) -> None:
    first, again = (listed_task(tmp_path / name).protocol.sha256() for name in ("a", "b"))
    other = listed_task(tmp_path / "c", WORDS[:-1]).protocol
    assert first == again != other.sha256()
    assert listed_task(tmp_path / "d", [*WORDS, WORDS[0]]).vocabulary == WORDS


@pytest.mark.parametrize("name", LISTED)
def test_a_list_that_is_not_given_is_asked_for_by_its_address(name: str, tmp_path: Path) -> None:
    card = load_card(name)
    listed_task(tmp_path, name=name)
    with pytest.raises(UserError) as error:
        make_task(card, tmp_path)
    assert card.evaluation is not None
    says = f"{name} ranks a list of answers; fetch {card.evaluation.answer_list} and give its path as answers="
    assert str(error.value) == f"{says}, or evaluate with mode=generate"
    assert make_task(card, tmp_path, mode="generate").protocol.candidates_from == "none"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 1}, "is no JSON list of texts; answers= takes what is at https://"),
        (["a", 3], "is no JSON list of texts"),
        (["a", " "], "is no JSON list of texts"),
        (["a", "a"], "lists 1 answers, and ranking needs two"),
        ([], "lists 0 answers"),
    ],
)
def test_what_is_no_list_of_answers_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"list\.json {message}"):
        listed_task(tmp_path, content)


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    card = load_card("vqav2_blip")
    listed_task(tmp_path)
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(UserError, match=str(path)):
            make_task(card, tmp_path, answers=path)


def test_training_watches_answers_that_are_written(tmp_path: Path) -> None:
    listed_task(tmp_path)
    assert make_validation_task(load_card("vqav2_blip"), tmp_path, samples=5).protocol.mode == "generate"


def test_a_list_is_of_one_dataset(tmp_path: Path) -> None:
    cards = [load_card(name) for name in (*LISTED, "gqa")]
    check_answers([cards[0], cards[3]], "list.json")
    check_answers(cards, None)
    with pytest.raises(
        UserError, match="vqav2_blip, okvqa_blip, aokvqa_blip rank lists of their own, and answers= gives"
    ):
        check_answers(cards, "list.json")
    assert compose("evaluate", EvaluateConfig, ["checkpoint=x", "answers=list.json"]).answers == "list.json"


@pytest.mark.parametrize("name", LISTED)
def test_the_released_code_ranks_answers_to_their_end_after_a_cleaned_question(name: str, tmp_path: Path) -> None:
    protocol = listed_task(tmp_path, name=name, preset="lavis").protocol
    assert (protocol.include_eos, protocol.normalize) == (True, "sum")
    assert protocol.text_processor == "blip_question"
    assert (protocol.max_new_tokens, protocol.min_new_tokens) == (9, 0)  # its 10 and 1 count the start token
    written = listed_task(tmp_path, name=name, preset="lavis", mode="generate").protocol
    assert (written.max_new_tokens, written.num_beams) == (9, 3)


@pytest.mark.parametrize("name", ["coco_caption_blip", "nocaps_blip"])
def test_captions_are_as_long_under_both_presets(name: str, tmp_path: Path) -> None:
    for preset in ("paper", "lavis"):
        protocol = synthetic_task(load_card(name), tmp_path / preset, 2, preset=preset).protocol
        assert (protocol.prompt, protocol.num_beams) == ("", 3)
        assert (protocol.max_new_tokens, protocol.min_new_tokens) == (16, 1)  # behind the 4 tokens of the prompt


def test_published_rows_stand_beside_scores_of_their_protocol(tmp_path: Path) -> None:
    for name in (*LISTED, "coco_caption_blip", "nocaps_blip"):
        card = load_card(name)
        assert card.paper.keys() <= MODELS.keys()
        assert unfit(card, "rank" if name in LISTED else "generate") == ""
    assert load_card("nocaps_blip").paper["blip_capfilt_l"] == 109.6
    assert load_card("aokvqa_blip").paper == {}  # LAVIS scores other questions than the official scorer
    task = listed_task(tmp_path)
    marks = comparison_marks(task.card, {"split": "val", "mode": "rank"})
    assert marks == {OTHER_SPLIT: "val, the paper: test-dev"}
