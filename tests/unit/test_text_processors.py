"""LAVIS's text processors of questions."""

import pytest

from instructblip.data.text_processors import TEXT_PROCESSORS, blip_caption, blip_question


@pytest.mark.parametrize(
    ("text", "caption", "question"),
    [
        ('What is the "Big Ben" (London) used for?', "what is the big ben london used for?", None),
        ("WHAT color?", "what color?", "what color?"),
        ("Is it 3.5 m?", "is it 3 5 m?", "is it 35 m?"),
        ("one;two:three~", "one two three", "onetwothree"),
        (" It's a cat. \n", "it's a cat", " it's a cat \n"),
        ("a  b", "a b", "a  b"),
        ("", "", ""),
        (" ".join(["word"] * 60), " ".join(["word"] * 50), " ".join(["word"] * 50)),
    ],
)
def test_questions_as_lavis_cleans_them(text: str, caption: str, question: str | None) -> None:
    assert blip_caption(text) == caption
    assert blip_question(text) == (caption if question is None else question)


def test_capitalize_is_what_lmms_eval_does_to_questions() -> None:
    assert TEXT_PROCESSORS["capitalize"]("what is the Brand, NASA?") == "What is the brand, nasa?"


def test_none_leaves_a_question_as_it_is() -> None:
    assert TEXT_PROCESSORS["none"]('"A" ?') == '"A" ?'
