"""Intervals and tests over seeds and over samples, against scipy and numbers worked out by hand."""

import hashlib
import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from instructblip.config import folders
from instructblip.config.entry import compose_config
from instructblip.config.schema import StudyCommandConfig
from instructblip.data.coverage import RecordCounts
from instructblip.errors import UserError
from instructblip.evaluation.results_file import StoredRun, StoredScore
from instructblip.evaluation.statistics import spread
from instructblip.study.findings import Difference, Findings, Scores, _check_same_questions, _difference
from instructblip.study.plot import draw
from instructblip.study.report import _scores_table, _table, command
from tests.kit.runs import World
from tests.kit.studies import STUDY, study_config


def test_an_interval_over_seeds_is_students() -> None:
    found = spread([80.0, 90.0, 100.0])
    # t of two degrees of freedom at 97.5% is 4.3027, s = 10: 90 +- 4.3027 * 10 / sqrt(3)
    assert (found.mean, found.deviation) == (90.0, 10.0)
    assert found.low == pytest.approx(65.159, abs=1e-3)
    assert found.high == pytest.approx(114.841, abs=1e-3)


def test_the_test_over_seeds_is_scipys_paired_t_test() -> None:
    first, second = np.array([81.0, 79.5, 84.0, 80.0, 82.5]), np.array([83.0, 82.5, 84.5, 84.0, 83.0])
    found = spread(list(second - first))
    expected = stats.ttest_rel(second, first)
    assert found.p == pytest.approx(expected.pvalue)
    ends = expected.confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(ends.low), pytest.approx(ends.high))


def test_one_value_and_values_that_do_not_differ_have_no_interval() -> None:
    alone, alike = spread([71.0]), spread([33.3, 33.3, 33.3])
    assert (alone.mean, alone.deviation, alone.low, alone.p) == (71.0, None, None, None)
    assert (alike.mean, alike.deviation, alike.low, alike.high, alike.p) == (pytest.approx(33.3), 0.0, None, None, None)
    with pytest.raises(ValueError, match="no values"):
        spread([])


def test_values_that_differ_by_rounding_do_not_differ() -> None:
    found = spread([0.1 + 0.2, 0.3])
    assert (found.deviation, found.p) == (0.0, None)
    assert math.isclose(found.mean, 0.3)


def test_the_command_of_a_report_can_be_given_again(world: World, tmp_path: Path) -> None:
    given = {"seeds": [3, 4], "train": ["recipe.clip_norm=2.0", "qformer.extra_tokens=['[DEC]']"]}
    config = study_config(world, tmp_path, {**STUDY, "name": "queries"}, **given)
    line = command(config)
    *_, study, seeds, train = words = shlex.split(line)
    assert words[:3] == ["python", "-m", "instructblip.study"]
    again = compose_config("study", StudyCommandConfig, [study, seeds, train])
    assert {"seeds": again.seeds, "train": again.train} == given


def test_the_command_of_a_report_names_the_folder_that_its_study_is_in(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "further_folder", lambda: Path("/my studies"))
    assert shlex.split(command(study_config(world, tmp_path)))[3:] == ["-cd", "/my studies", "study=tiny"]


def test_where_data_lie_is_not_part_of_the_command(world: World, tmp_path: Path) -> None:
    config = study_config(world, tmp_path, train=["data.shards=/data"], evaluate=["data.sources.easy_vqa.path=/x"])
    assert command(config) == "python -m instructblip.study study=tiny"


def test_a_condition_may_be_called_what_would_end_a_cell() -> None:
    assert _table(["condition"], [["a|b"]]).splitlines()[-1] == r"| a\|b |"


def test_what_failed_takes_no_name_and_no_place_from_the_rest() -> None:
    """The reference has failed with every seed, another condition with the first."""
    scores = {
        (name, dataset): Scores(name, dataset, {seed: 10.0 * seed for seed in seeds}, {}, 50)
        for name, seeds in {"b": [2, 3], "c": [1, 2, 3]}.items()
        for dataset in ("shapes", "colours")
    }
    found = Findings(["shapes", "colours"], ["a", "b", "c"], [1, 2, 3], scores, {}, [], [], made_up=False)
    cells = [[cell.strip() for cell in row.split("|")[1:4]] for row in _scores_table(found).splitlines()[2:]]
    assert cells == [
        ["shapes", "b", "-, 20.0, 30.0"],
        ["", "c", "10.0, 20.0, 30.0"],
        ["colours", "b", "-, 20.0, 30.0"],
        ["", "c", "10.0, 20.0, 30.0"],
    ]


def test_a_name_with_dollars_is_drawn_as_it_stands(tmp_path: Path) -> None:
    name = "costs $_$"  # no formula that could be set
    scores = {(name, "mine"): Scores(name, "mine", {1: 10.0, 2: 30.0}, {}, 50)}
    draw(Findings(["mine"], [name], [1, 2], scores, {}, [], [], made_up=False), f"What {name}?", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# --- differences -----------------------------------------------------------------------------------------------------


def stored(
    folder: Path, scores: Mapping[str, float], *, value: float | None = None, samples: str = "x", better: bool = True
) -> StoredRun:
    """An evaluation of one dataset, one sample an image; the score is the mean unless `value` says otherwise."""
    lines = [json.dumps({"id": name, "image": name, "answers": [], "score": one}) for name, one in scores.items()]
    content = "\n".join(lines).encode()
    (folder / "mine").mkdir(parents=True)
    (folder / "mine/predictions.jsonl").write_bytes(content)
    mean = sum(scores.values()) / len(scores) if value is None else value
    score = StoredScore(
        None if math.isnan(mean) else mean,
        None,
        None,
        len(scores),
        "mine",
        {"samples_sha256": samples},
        RecordCounts(None, len(scores), 0),
        hashlib.sha256(content).hexdigest(),
        None,
        higher_is_better=better,
    )
    return StoredRun(folder, "a checkpoint", None, {"mine": score})


def difference(runs: Mapping[tuple[str, int], StoredRun]) -> Difference:
    found = _difference("other", "reference", "mine", runs)
    assert found is not None
    return found


@pytest.mark.parametrize("higher", [True, False])
def test_fewer_mistakes_are_better(tmp_path: Path, higher: bool) -> None:
    few, many = ({f"sample {number}": value for number in range(12)} for value in (0.0, 1.0))
    runs = {
        (name, seed): stored(tmp_path / f"{name} {seed}", scores, better=higher)
        for name, scores in {"reference": many, "other": few}.items()
        for seed in (1, 2)
    }
    found = difference(runs)
    assert (found.by_seed, found.by_sample.difference) == ({1: -1.0, 2: -1.0}, -1.0)
    assert (found.better, found.worse) == ((0, 2) if higher else (2, 0))


def test_a_seed_without_a_score_on_one_side_is_no_difference(tmp_path: Path) -> None:
    scores = {"a": 60.0, "b": 80.0}
    runs = {
        ("reference", 1): stored(tmp_path / "reference 1", scores),
        ("reference", 2): stored(tmp_path / "reference 2", scores, value=math.nan),
        ("other", 2): stored(tmp_path / "other 2", scores),
    }
    assert _difference("other", "reference", "mine", runs) is None
    runs["other", 1] = stored(tmp_path / "again", {"b": 81.0, "a": 60.0})  # in another order
    assert difference(runs).by_seed == {1: 0.5}


def test_runs_that_were_asked_about_other_versions_of_the_samples_are_not_compared(tmp_path: Path) -> None:
    """Labels that were corrected between two seeds: the names of the samples are the same."""
    runs = [stored(tmp_path / name, {"a": 1.0, "b": 0.0}, samples=name) for name in ("before", "after")]
    _check_same_questions(["mine"], [runs[0], runs[0]])
    with pytest.raises(
        UserError, match=r"mine: .*before and .*after were asked about other samples, or other versions"
    ):
        _check_same_questions(["mine"], [runs[0], *runs])
