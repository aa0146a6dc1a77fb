"""Metrics of one's own: a function in a file beside the card; whatever it does but score is one line."""

from pathlib import Path

import pytest

from instructblip.data.records import Record
from instructblip.errors import UserError
from instructblip.evaluation.metrics import METRICS, Interval, ModelOutput, Outcome
from instructblip.evaluation.metrics.own import find_metric
from instructblip.evaluation.outcomes import check_finite

OUTPUTS = [ModelOutput("red"), ModelOutput("blue")]
RECORDS = [Record("1", "question", "?", answers=("red",)), Record("2", "question", "?", answers=("teal",))]
EQUAL = "def score(outputs, records):\n    return [100.0 * (o.text in r.answers) for o, r in zip(outputs, records)]\n"


def write(folder: Path, text: str, name: str = "score") -> str:
    """A metric file, and what a card calls the function in it."""
    path = folder / "my_metric.py"
    path.write_text(text)
    return f"{path}:{name}"


def test_a_function_gives_a_number_a_sample(tmp_path: Path) -> None:
    metric = find_metric(write(tmp_path, EQUAL))
    score = metric(OUTPUTS, RECORDS)
    assert (score.value, score.per_sample, score.count) == (50.0, (100.0, 0.0), 2)
    assert (metric.name, metric.title, metric.chance) == ("my_metric.py:score", "my_metric.py:score", None)
    assert (metric.interval, metric.outcome) == (Interval.MEAN, Outcome.NONE)


def test_it_may_use_the_metrics_there_are_and_give_arrays_or_a_score(tmp_path: Path) -> None:
    texts = [
        "import numpy as np\ndef score(outputs, records):\n    return np.float32([1, 2])\n",
        "import torch\ndef score(outputs, records):\n    return torch.tensor([1, 2])\n",
        "import numpy as np\ndef score(outputs, records):\n    return [np.int64(1), True + True]\n",
        "from instructblip.evaluation.metrics.score import mean_score\n"
        "def score(outputs, records):\n    return mean_score([1.0, 2.0], metric='mine', details={'more': 1})\n",
    ]
    scores = [find_metric(write(tmp_path, text))(OUTPUTS, RECORDS) for text in texts]
    assert [score.per_sample for score in scores] == [(1.0, 2.0)] * 4
    assert [type(value) for score in scores for value in score.per_sample] == [float] * 8
    assert scores[3].details == {"more": 1}


def test_a_metric_with_facts_of_its_own_is_taken_as_it_is(tmp_path: Path) -> None:
    text = (
        f"from instructblip.evaluation.metrics import Metric, Outcome\n{EQUAL}"
        "ERRORS = Metric('x', 'My errors', score, higher_is_better=False, needs_scores=True, outcome=Outcome.SCORE)\n"
    )
    metric = find_metric(write(tmp_path, text, "ERRORS"))
    assert (metric.name, metric.title, metric.higher_is_better) == ("my_metric.py:ERRORS", "My errors", False)
    assert (metric.needs_scores, metric.outcome) == (True, Outcome.SCORE)
    assert metric(OUTPUTS, RECORDS).value == 50.0


def test_what_is_compared_with_is_whatever_a_record_has(tmp_path: Path) -> None:
    references = find_metric(write(tmp_path, EQUAL)).references
    records = [
        Record("1", "q", answers=("a",)),
        Record("2", "c", captions=("b",)),
        Record("3", "m", label=0),
        Record("4", "q"),
    ]
    assert [references(record) for record in records] == [("a",), ("b",), (0,), ()]


def test_a_changed_file_is_run_anew_and_an_unchanged_one_is_not(tmp_path: Path) -> None:
    counted = "import pathlib\nwith open(pathlib.Path(__file__).with_name('runs'), 'a') as file: file.write('x')\n"
    for text, runs in ((EQUAL, "x"), (EQUAL, "x"), (EQUAL + "\n", "xx")):
        metric = find_metric(write(tmp_path, counted + text))
        assert metric(OUTPUTS, RECORDS).value == 50.0
        assert (tmp_path / "runs").read_text() == runs


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def score(:\n", "my_metric.py cannot be run (SyntaxError: "),
        (
            "import nothing_of_this_name\n",
            "cannot be run (ModuleNotFoundError: No module named 'nothing_of_this_name', line 1)",
        ),
        ("\n\n1 / 0\n", "cannot be run (ZeroDivisionError: division by zero, line 3)"),
        ("raise SystemExit('bye')\n", "cannot be run (SystemExit: bye, line 1)"),
        ("def scores(outputs, records): ...\n", "has no score; define a function of that name"),
        ("score = 3\n", "metric my_metric.py:score is no function but int"),
    ],
)
def test_a_file_that_cannot_be_run_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        find_metric(write(tmp_path, text))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise KeyError('x')", "metric my_metric.py:score fails (KeyError: 'x', line 2)"),
        ("return [r.answers[7] for r in records]", "fails (IndexError: tuple index out of range, line 2)"),
        ("raise SystemExit(3)", "fails (SystemExit: 3, line 2)"),
        ("return None", "must give a list with one number a sample, or a Score, not None"),
        ("return 50.0", "must give a list with one number a sample, or a Score, not 50.0"),
        ("return {'a': 1}", "must give a list with one number a sample"),
        ("return 'ab'", "must give a list with one number a sample"),
        ("return [1.0]", "must give one finite number a sample, 2 of them, not [1.0]"),
        ("return [1.0, 2.0, 3.0]", "must give one finite number a sample, 2 of them"),
        ("return [1.0, None]", "must give one finite number a sample"),
        ("return ['1', '2']", "must give one finite number a sample"),
        ("return [1.0, float('nan')]", "must give one finite number a sample"),
        ("return [1.0, float('inf')]", "must give one finite number a sample"),
        ("return [[1.0], [2.0]]", "must give one finite number a sample"),
        ("return []", "must give one finite number a sample, 2 of them, not []"),
    ],
)
def test_nonsense_is_one_line_that_names_the_function(tmp_path: Path, body: str, words: str) -> None:
    metric = find_metric(write(tmp_path, f"def score(outputs, records):\n    {body}\n"))
    with pytest.raises(UserError) as caught:
        metric(OUTPUTS, RECORDS)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_score_whose_value_is_not_finite_is_refused_as_of_any_metric(tmp_path: Path) -> None:
    text = "from instructblip.evaluation.metrics import Score\ndef score(outputs, records):\n"
    metric = find_metric(write(tmp_path, f"{text}    return Score(float('nan'), (1.0, 2.0), 2)\n"))
    with pytest.raises(ValueError, match="the score is nan"):
        check_finite(metric(OUTPUTS, RECORDS))


def test_a_name_is_looked_up() -> None:
    assert find_metric("cider") is METRICS["cider"]
    with pytest.raises(UserError, match=r"evaluation.metric is 'sider'; did you mean 'cider'"):
        find_metric("sider")
