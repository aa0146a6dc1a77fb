"""Templates turn a record into instruction and target, drawn from the position's own stream."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from instructblip.data.cards import all_cards
from instructblip.data.mixture import position_generator
from instructblip.data.records import Record
from instructblip.data.templates import (
    TEMPLATE_FOLDER,
    TemplateSet,
    cut_prefix,
    fields_of,
    load_templates,
    render_prompt,
    render_training,
)
from instructblip.errors import UserError

SET = TemplateSet("three", "question answering", ("{question}", "Q: {question} A:", "Question: {question}"))
RECORD = Record("7", "color", "what color?", answers=("red", "crimson"), answer_weights=(3.0, 1.0))

# (target, template) at positions 0, 1, ... of seed 5, in turn from vqa_short and bare.
GOLDEN_DRAWS = [
    ("crimson", "Question: {question}"),
    ("red", "{question}"),
    ("red", "Question: {question} Short answer:"),
    ("red", "{question}"),
    ("crimson", "{question}"),
    ("red", "{question}"),
    ("crimson", "Question: {question}"),
    ("red", "{question}"),
    ("red", "Question: {question}"),
    ("crimson", "{question}"),
    ("red", "Question: {question}"),
    ("red", "{question}"),
]


HALF_BARE = ("half_bare", "what_is_this")  # their first form makes up half of the set


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
        bare = loaded.templates.count(loaded.templates[0])
        assert len(set(loaded.templates)) == len(loaded.templates) - bare + 1
        assert bare == (len(loaded.templates) // 2 if name in HALF_BARE else 1)


def test_render_prompt_puts_the_question_in_verbatim() -> None:
    odd = Record("1", "color", "is {this} a {question}? 100%s")
    assert render_prompt("Q: {question} A:", odd) == "Q: is {this} a {question}? 100%s A:"
    assert render_prompt('"{question}" {} {x1} [sic]', RECORD) == '"what color?" {} {x1} [sic]'
    odd = Record("1", "color", "[{context}]?", context="{answer} [{caption}]")
    assert render_prompt("[{context}: ]{question}", odd) == "{answer} [{caption}]: [{context}]?"


FULL = Record(
    "8",
    "question",
    "what is it?",
    answers=("a cat", "cat"),
    answer_weights=(1.0, 3.0),
    captions=("a cat sits", "one cat"),
    choices=("a dog", "a cat", "(c)"),
    label=1,
    context="It purrs.",
    ocr_tokens=tuple(f"t{number}" for number in range(40)),
    history=(("is it red?", "yes"), ("sure?", "no")),
)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("Question: {question}", "Question: what is it?"),
        ("{answer}", "a cat"),
        ("Options: {choices}.", "Options: (a) a dog (b) a cat (c) (c)."),
        ("Context: {context} Q", "Context: It purrs. Q"),
        ("OCR tokens: {ocr_tokens}.", "OCR tokens: " + ", ".join(f"t{number}" for number in range(30)) + "."),
        ("{history}\n{question}", "Q: is it red? A: yes\nQ: sure? A: no\nwhat is it?"),
        ("{caption}.", "a cat sits."),
    ],
)
def test_every_field(template: str, text: str) -> None:
    assert render_prompt(template, FULL) == text
    assert render_prompt(f"[{template} ]Hm?", FULL) == f"{text} Hm?"
    assert render_prompt(f"[{template} ]Hm?", Record("9", "question")) == "Hm?"
    with pytest.raises(ValueError, match="record 9 has no"):
        render_prompt(template, Record("9", "question"))


def test_optional_part_with_two_fields_needs_both() -> None:
    template = "{question}[ ({context}; {ocr_tokens})]"
    assert render_prompt(template, Record("1", "q", "?", context="c")) == "?"
    assert render_prompt(template, Record("1", "q", "?", context="c", ocr_tokens=("t",))) == "? (c; t)"
    assert fields_of(template) == (("question",), ("context", "ocr_tokens"))


def test_arguments_of_render_prompt() -> None:
    assert render_prompt("{answer}: {ocr_tokens}", FULL, answer="cat", max_ocr_tokens=2) == "cat: t0, t1"


def test_prompts_of_all_cards_are_filled_by_the_same_rules() -> None:
    prompts = [card.evaluation.prompt for card in all_cards() if card.evaluation is not None]
    assert len(prompts) > 4
    for prompt in prompts:
        assert not set("{}[]") & set(render_prompt(prompt, FULL))


def test_unknown_fields_and_too_many_choices() -> None:
    with pytest.raises(ValueError, match=r"unknown field 'qestion'; known: question, answer, choices"):
        render_prompt("[{qestion}]", RECORD)
    with pytest.raises(ValueError, match=r"27 choices"):
        render_prompt("{choices}", Record("1", "q", choices=("x",) * 27))


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


def test_the_draws_of_the_first_sets_stay_as_they_are() -> None:
    """Golden: other random calls would change every training run."""
    sets = (load_templates("vqa_short"), load_templates("bare"))
    drawn = [render_training(RECORD, sets[position % 2], position_generator(5, position)) for position in range(12)]
    assert [(target, template) for _, target, template in drawn] == GOLDEN_DRAWS


def test_a_choice_is_the_target_in_its_own_words() -> None:
    drawn = {render_training(FULL, load_templates("multiple_choice"), position_generator(0, n)) for n in range(99)}
    assert {row[1] for row in drawn} == {"a cat"}
    assert len(drawn) == 7
    assert all("Options: (a) a dog (b) a cat (c) (c)." in row[0] for row in drawn)
    assert all(row[0].startswith("Context: It purrs. ") for row in drawn)
    with pytest.raises(ValueError, match="record 7 has no right choice"):
        render_training(RECORD, load_templates("multiple_choice"), position_generator(0, 0))


def test_a_question_is_generated_from_an_answer_drawn_by_weight() -> None:
    rows = [render_training(FULL, load_templates("question_generation"), position_generator(0, n)) for n in range(400)]
    assert {row[1] for row in rows} == {"what is it?"}
    assert all(row[0] in (row[2].replace("{answer}", "cat"), row[2].replace("{answer}", "a cat")) for row in rows)
    assert abs(sum(row[0] == row[2].replace("{answer}", "cat") for row in rows) - 300) < 35
    with pytest.raises(ValueError, match="record 1 has no question"):
        render_training(
            Record("1", "caption", answers=("x",)), load_templates("question_generation"), position_generator(0, 0)
        )


def test_captions_are_drawn_from_either_kind_of_record() -> None:
    captioning = load_templates("captioning")
    one = Record("1", "caption", answers=("a bird",))
    assert render_training(one, captioning, position_generator(0, 3))[1] == "a bird"
    drawn = Counter(render_training(FULL, captioning, position_generator(0, n))[1] for n in range(400))
    assert set(drawn) == {"a cat sits", "one cat"}
    assert abs(drawn["one cat"] - 200) < 45


def test_ocr_tokens_come_before_every_template_of_the_other_set() -> None:
    few = TemplateSet("few", "", load_templates("ocr_vqa").templates, max_ocr_tokens=2)
    rows = [render_training(FULL, few, position_generator(0, n)) for n in range(200)]
    assert {row[0] for row in rows} == {
        "OCR tokens: t0, t1. " + text.replace("{question}", "what is it?") for text in load_templates("vqa").templates
    }
    plain = render_training(RECORD, load_templates("ocr_vqa"), position_generator(0, 0))[0]
    assert "OCR" not in plain


@pytest.mark.parametrize(
    ("name", "count", "target"),
    [
        ("captioning", 13, "caption"),
        ("vqa", 10, "answer"),
        ("question_generation", 6, "question"),
        ("ocr_captioning", 13, "caption"),
        ("ocr_vqa", 10, "answer"),
        ("multiple_choice", 7, "choice"),
        ("statement", 4, "answer"),
    ],
)
def test_sizes_and_targets_of_the_sets(name: str, count: int, target: str) -> None:
    loaded = load_templates(name)
    assert (len(loaded.templates), loaded.target, loaded.max_ocr_tokens) == (count, target, 30)


def test_the_functional_forms_are_as_published() -> None:
    captioning, vqa = load_templates("captioning").templates, load_templates("vqa").templates
    assert captioning[:4] == (
        "A short image caption:",
        "A short image description:",
        "A photo of",
        "An image that shows",
    )
    assert vqa[:5] == load_templates("vqa_short").templates
    assert sum(text.endswith("Question:") for text in load_templates("question_generation").templates) == 3
    short = ("short", "brief", "few words")
    assert all(any(word in text.lower() for word in short) for text in captioning if text not in captioning[2:4])


def test_the_earlier_turns_stand_before_a_question_as_it_is() -> None:
    as_is = load_templates("as_is")
    assert render_training(RECORD, as_is, position_generator(0, 0))[0] == "what color?"
    assert render_prompt(as_is.templates[0], FULL) == "Q: is it red? A: yes\nQ: sure? A: no\nwhat is it?"
    first = Record("1", "dialog", "is it?", answers=("no",))
    texts = {render_prompt(text, first) for text in load_templates("dialog").templates}
    assert texts == {
        "Question: is it? Short answer:",
        "Q: is it? A:",
        "Reply to the next question in a few words. is it?",
    }


def test_without_weights_all_answers_are_equal() -> None:
    record = Record("1", "color", "?", answers=("a", "b"))
    drawn = Counter(render_training(record, SET, np.random.default_rng(seed))[1] for seed in range(400))
    assert abs(drawn["a"] - 200) < 45


def test_a_record_without_answer_cannot_be_trained_on() -> None:
    with pytest.raises(ValueError, match="record 9 has no answer"):
        render_training(Record("9", "color", "what?"), SET, np.random.default_rng(0))
    unwanted = Record("9", "color", "what?", answers=("a", "b"), answer_weights=(0.0, 0.0))
    with pytest.raises(ValueError, match="record 9 has no answer of a weight above 0"):
        render_training(unwanted, SET, np.random.default_rng(0))


def test_load_templates(tmp_path: Path) -> None:
    folder = _write(tmp_path, 'name: mine\ntask_group: captions\ntemplates: ["{question}!", "{question}"]\n')
    assert load_templates("mine", folder) == TemplateSet("mine", "captions", ("{question}!", "{question}"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("templates: []\n", ["mine.yaml", "needs a list `templates`"]),
        ("- a\n", ["mine.yaml", "must hold keys and values"]),
        ("a: &a [*a]\n", ["mine.yaml", "nested too deep, or holds itself"]),
        ("target: [answer]\ntemplates: ['{question}']\n", ["target is ['answer']"]),
        ("templates: [yes, '{question}']\n", ["mine.yaml", "of strings", "quotes"]),
        ('templates: ["{question}", "no placeholder"]\n', ["'no placeholder'", "lacks the placeholder {question}"]),
        ('templates: ["{question}\n', ["mine.yaml", "not valid YAML"]),
        ("templates: [['{question}']]\n", ["needs a list `templates` of strings"]),
        ("templates: '{question}'\n", ["needs a list `templates` of strings"]),
        ("template: ['{question}']\n", ["unknown key 'template'", "templates"]),
        ("target: reply\ntemplates: ['{question}']\n", ["target is 'reply'", "answer, choice"]),
        ("templates: ['[{question}]']\n", ["lacks the placeholder {question}"]),
        ("templates: ['{question} {qestion}']\n", ["unknown field 'qestion'"]),
        ("templates: ['{question}[{answer}]']\n", ["gives away the target by {answer}"]),
        ("target: question\ntemplates: ['{question} {answer}']\n", ["gives away the target by {question}"]),
        ("target: question\ntemplates: ['ask']\n", ["lacks the placeholder {answer}"]),
        ("max_ocr_tokens: 0\ntemplates: ['{question}']\n", ["max_ocr_tokens must be a whole number"]),
        ("prefix: a\ntemplates: ['{question}']\n", ["prefix belongs to templates_of"]),
        ("templates_of: vqa\ntemplates: ['{question}']\n", ["keep one of them"]),
        ("templates_of: mine\n", ["a set with templates of its own"]),
        ("templates_of: other\n", ["no template set 'other'"]),
    ],
)
def test_broken_sets(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_templates("mine", _write(tmp_path, text))
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_unknown_set_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no template set 'vqa_shrt'.*choose one of: .*vqa_short"):
        load_templates("vqa_shrt")


def test_a_prefix_ends_between_the_first_word_and_the_middle() -> None:
    text = "a man  riding a horse on\tthe grass."
    cuts = Counter(cut_prefix(text, position_generator(0, place)) for place in range(400))
    assert set(cuts) == {
        ("a", "man  riding a horse on\tthe grass."),
        ("a man", "riding a horse on\tthe grass."),
        ("a man  riding", "a horse on\tthe grass."),
        ("a man  riding a", "horse on\tthe grass."),
    }
    assert min(cuts.values()) > 70  # evenly
    assert [cut_prefix(text, position_generator(0, place)) for place in (3, 4)] == [
        cut_prefix(text, position_generator(0, place)) for place in (3, 4)
    ]
    assert cut_prefix("two dogs", position_generator(0, 0)) == ("two", "dogs")
    for short in ("snow", "", " "):
        assert cut_prefix(short, position_generator(0, 0)) == ("", short)
