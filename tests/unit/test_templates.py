"""Templates turn a record into instruction and target, drawn from the position's own stream."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from instructblip.data.mixture import position_generator
from instructblip.data.sample import Record
from instructblip.data.templates import TEMPLATE_FOLDER, TemplateSet, load_templates, render_prompt, render_training
from instructblip.errors import UserError

SET = TemplateSet("three", "question answering", ("{question}", "Q: {question} A:", "Question: {question}"))
RECORD = Record("7", "color", "what color?", answers=("red", "crimson"), answer_weights=(3.0, 1.0))


def _write(folder: Path, text: str) -> Path:
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    return folder


def test_every_set_of_the_repository_loads() -> None:
    names = sorted(path.stem for path in TEMPLATE_FOLDER.glob("*.yaml"))
    assert names
    for name in names:
        loaded = load_templates(name)
        assert loaded.name == name
        assert loaded.task_group
        assert len(set(loaded.templates)) == len(loaded.templates) >= 1


def test_render_prompt_puts_the_question_in_verbatim() -> None:
    odd = Record("1", "color", "is {this} a {question}? 100%s")
    assert render_prompt("Q: {question} A:", odd) == "Q: is {this} a {question}? 100%s A:"
    assert render_prompt('"{question}" {other}', RECORD) == '"what color?" {other}'


def test_render_prompt_without_a_question() -> None:
    with pytest.raises(ValueError, match=r"record 7 has no question for the template 'Q: \{question\}'"):
        render_prompt("Q: {question}", Record("7", "caption"))


def test_render_training_is_a_function_of_its_stream() -> None:
    first = [render_training(RECORD, SET, position_generator(0, position)) for position in range(20)]
    again = [render_training(RECORD, SET, position_generator(0, position)) for position in reversed(range(20))]
    assert first == again[::-1]
    for instruction, target, template in first:
        assert instruction == template.replace("{question}", "what color?")
        assert target in RECORD.answers


def test_templates_are_drawn_evenly_and_answers_by_weight() -> None:
    drawn = [render_training(RECORD, SET, position_generator(3, position)) for position in range(1500)]
    templates, answers = Counter(row[2] for row in drawn), Counter(row[1] for row in drawn)
    assert set(templates) == set(SET.templates)
    assert all(abs(count - 500) < 75 for count in templates.values())  # four standard deviations
    assert abs(answers["red"] - 1125) < 70


def test_without_weights_all_answers_are_equal() -> None:
    record = Record("1", "color", "?", answers=("a", "b"))
    drawn = Counter(render_training(record, SET, np.random.default_rng(seed))[1] for seed in range(400))
    assert abs(drawn["a"] - 200) < 45


def test_a_record_without_answer_cannot_be_trained_on() -> None:
    with pytest.raises(ValueError, match="record 9 has no answer"):
        render_training(Record("9", "color", "what?"), SET, np.random.default_rng(0))


def test_load_templates(tmp_path: Path) -> None:
    folder = _write(tmp_path, 'name: mine\ntask_group: captions\ntemplates: ["{question}!", "{question}"]\n')
    assert load_templates("mine", folder) == TemplateSet("mine", "captions", ("{question}!", "{question}"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("templates: []\n", ["mine.yaml", "needs a list `templates`"]),
        ("- a\n", ["mine.yaml", "needs a list `templates`"]),
        ("templates: [yes, '{question}']\n", ["mine.yaml", "of strings", "quotes"]),
        ('templates: ["{question}", "no placeholder"]\n', ["'no placeholder'", "lacks the placeholder {question}"]),
        ('templates: ["{question}\n', ["mine.yaml", "not valid YAML"]),
    ],
)
def test_broken_sets(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_templates("mine", _write(tmp_path, text))
    assert all(word in str(error.value) for word in words)


def test_unknown_set_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no template set 'vqa_shrt'.*choose one of: .*vqa_short"):
        load_templates("vqa_shrt")
