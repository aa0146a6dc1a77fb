"""Caption scores: what CIDEr must do whatever the tokenizer, the Java-free tokenizer, and errors."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from instructblip.errors import UserError
from instructblip.evaluation.metrics import caption_tokenizer as java
from instructblip.evaluation.metrics import caption_tokenizer as ptb
from instructblip.evaluation.metrics import cider, rouge
from instructblip.evaluation.metrics.captions import PUNCTUATION, cider_d

VECTORS = Path(__file__).parent.parent / "metric_vectors" / "captions_coco.json"
needs_java = pytest.mark.skipif(java.missing() is not None, reason=f"{java.missing()}")
REFERENCES = [
    ["a red dog runs", "the dog is running"],
    ["two cats sleep", "cats on a bed"],
    ["a red car", "one car runs"],
]

# Tokens as CoreNLP 3.4.1's PTBTokenizer gave them.
TOKENS = {
    "A dog.": "a dog .",
    "the man's dogs' don't can't it's": "the man 's dogs ' do n't ca n't it 's",
    "cannot gonna wanna gimme": "can not gon na wan na gim me",
    "mr. Smith at 5 p.m. in the U.S. etc.": "mr. smith at 5 p.m. in the u.s. etc.",
    "a t-shirt, state-of-the-art (red) [x] {y}": "a t-shirt , state-of-the-art -lrb- red -rrb- -lsb- x -rsb- -lcb- y -rcb-",
    "$5.00 and 50% of 1,000 at 7:30am": "$ 5.00 and 50 % of 1,000 at 7:30 am",
    "red/white w/o 24/7 3/4-inch 2.5-inch 2.5cm": "red/white w/o 24/7 3/4-inch 2.5-inch 2.5 cm",
    "\u00bd cup, \u00a35, \u20ac10, 5\u00a2": "1/2 cup , # 5 , $ 10 , 5 cents",
    "wow!!! what?! no... a -- b --- c": "wow !!! what ?! no ... a -- b -- c",
    "rock 'n' roll o'clock O'Neil's y'all ma'am": "rock 'n' roll o'clock o'neil 's y' all ma'am",
    "see www.x.com, a@b.com, @me #you hello.world": "see www.x.com , a@b.com, @me #you hello.world",
    "No. 5 is no. good": "no. 5 is no . good",
    "plan B. The end": "plan b . the end",
    "plan B. is": "plan b. is",
    "AT&T p&g <b> &amp; :)": "at&t p & g <b> & :-rrb-",
    "it is 5 1/2 feet": "it is 5\u00a01/2 feet",
    "\U0001f600 caf\u00e9 \u65e5\u672c": "caf\u00e9 \u65e5\u672c",
    "it\u2019s 3 o\u2019clock": "it 's 3 o\u2019clock",
}


def test_java_free_tokens_are_those_of_the_java_tokenizer() -> None:
    for text, expected in TOKENS.items():
        (tokens,) = ptb.tokenize([text])
        assert drop_quotes(tokens) == drop_quotes(expected.split(" "))


def drop_quotes(tokens: list[str]) -> list[str]:
    """Without quotation marks, which are told apart by direction and never scored."""
    return [token for token in tokens if token not in ("'", "`", "''", "``")]


def test_java_free_tokens_of_every_vector() -> None:
    cases = json.loads(VECTORS.read_text(encoding="utf-8"))["cases"]
    captions = [case[0] for case in cases] + [text for case in cases for text in case[1]]
    expected = [case[2] for case in cases] + [text for case in cases for text in case[3]]
    words = [" ".join(word for word in tokens if word not in PUNCTUATION) for tokens in ptb.tokenize(captions)]
    assert len(words) == 811
    assert words == expected


def test_java_free_cider_of_the_vectors_is_the_official_one() -> None:
    data = json.loads(VECTORS.read_text(encoding="utf-8"))
    score = cider([case[0] for case in data["cases"]], [case[1] for case in data["cases"]], tokenizer="python")
    assert score.value == pytest.approx(data["overall"]["CIDEr"], abs=1e-12)
    assert score.details["METEOR"] is None and "no Java" in score.details["tokenizer"]


def test_java_free_rouge_of_the_vectors_is_the_official_one() -> None:
    data = json.loads(VECTORS.read_text(encoding="utf-8"))
    score = rouge([case[0] for case in data["cases"]], [case[1] for case in data["cases"]], tokenizer="python")
    assert score.value == pytest.approx(data["overall"]["ROUGE_L"], abs=1e-12)
    assert score.table_value == pytest.approx(100 * score.value)
    assert "no Java" in score.details["tokenizer"]


@needs_java
def test_the_java_tokenizer_keeps_captions_apart_that_hold_line_breaks() -> None:
    assert java.ptb_tokenize(["a\rb", "", "c\u2028d\ne", "\v"]) == [["a", "b"], [""], ["c", "d", "e"], [""]]


@needs_java
def test_the_given_tokens_are_those_of_the_java_tokenizer_here() -> None:
    lines = java.ptb_tokenize([text for pair in TOKENS for text in (pair, "x")])[::2]
    assert [drop_quotes(line) for line in lines] == [drop_quotes(value.split(" ")) for value in TOKENS.values()]


def test_a_copy_of_its_only_reference_scores_ten_and_an_empty_caption_nothing() -> None:
    captions = ["a red dog runs fast today", "two cats sleep on a bed", "the blue car is parked"]
    score = cider(captions, [[caption] for caption in captions], tokenizer="python")
    assert score.per_sample == pytest.approx([10, 10, 10]) and score.table_value == pytest.approx(1000)
    emptied = cider(["...", *captions[1:]], [[caption] for caption in captions], tokenizer="python")
    assert emptied.per_sample[0] == 0 and emptied.count == 3
    assert emptied.value == pytest.approx(20 / 3)


def test_a_one_word_copy_scores_a_quarter() -> None:
    assert cider_d([["dog"], ["cat"]], [[["dog"]], [["cat"]]]) == pytest.approx([2.5, 2.5])


def test_cider_depends_on_the_images_scored_together_and_not_on_their_order() -> None:
    predictions = ["a red dog", "two cats", "a car"]
    whole = cider(predictions, REFERENCES, tokenizer="python", groups=["x", "x", "y"])
    turned = cider(predictions[::-1], REFERENCES[::-1], tokenizer="python")
    assert turned.per_sample == pytest.approx(whole.per_sample[::-1])
    pair = cider(predictions[:2], REFERENCES[:2], tokenizer="python")
    assert whole.details["groups"]["x"] == {"CIDEr": pytest.approx(pair.value), "count": 2}
    assert pair.value != pytest.approx(sum(whole.per_sample[:2]) / 2)
    assert whole.details["groups"]["y"]["CIDEr"] == 0  # one image alone: every word is everywhere


def test_bad_input_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="1 predictions for 3 lists of reference captions"):
        cider(["a dog"], REFERENCES)
    with pytest.raises(ValueError, match="sample 1 needs a list of at least one of its reference captions, got \\[\\]"):
        cider(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match="of no images"):
        cider([], [])
    with pytest.raises(ValueError, match="auto, java or python, not 'nltk'"):
        cider(["a"], [["a"]], tokenizer="nltk")
    monkeypatch.setenv("PATH", "")
    assert java.missing() == "no java on the PATH"
    with pytest.raises(UserError, match="no java on the PATH; install a Java runtime and `pip install pycocoevalcap`"):
        cider(["a"], [["a"]], tokenizer="java")
    assert "no Java" in cider(["a"], [["a"]]).details["tokenizer"]


@needs_java
def test_java_text_does_not_depend_on_the_locale() -> None:
    code = "from instructblip.evaluation.metrics import java; print(ascii(java.ptb_tokenize(['caf\\u00e9 \\u65e5'])))"
    environment = {"LC_ALL": "C", "PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[['caf\\xe9', '\\u65e5']]"
