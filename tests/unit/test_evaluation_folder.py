"""An evaluation's folder: whose results may be replaced there, and who may write at the same time."""

import json
from pathlib import Path
from typing import Any

import pytest

from instructblip.data.cards import load_card
from instructblip.distributed import ALONE, Ranks
from instructblip.errors import UserError
from instructblip.evaluation.journal import claimed, refuse_others_results
from instructblip.evaluation.protocol import Task, as_json, blind_task
from instructblip.evaluation.results_file import read_run
from tests.kit.stored import entry, write_run
from tests.kit.synthetic_tasks import synthetic_task

CHECKPOINT = "outputs/train/x"  # what `write_run` names


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Task]:
    """Two datasets, 4 of 6 samples each."""
    folder = tmp_path_factory.mktemp("shards")
    return [synthetic_task(load_card(name), folder, 6, samples=4) for name in ("gqa", "vsr")]


def store(folder: Path, tasks: list[Task], **changed: Any) -> Path:
    """The results of an evaluation of these tasks, their protocols changed."""
    entries = {}
    for task in tasks:
        protocol = {key: value for key, value in as_json(task.protocol).items() if key != "dataset"}
        entries[task.card.name] = entry(task.card.name, 50.0, **(protocol | changed))
    return write_run(folder, entries)


def test_the_same_evaluation_goes_on(tasks: list[Task], tmp_path: Path) -> None:
    refuse_others_results(tmp_path / "nowhere", CHECKPOINT, tasks)
    folder = store(tmp_path / "demo", tasks)
    refuse_others_results(folder, CHECKPOINT, tasks)
    refuse_others_results(folder, str(Path(CHECKPOINT).absolute()), tasks)
    refuse_others_results(store(tmp_path / "fewer", tasks, samples=2), CHECKPOINT, tasks)
    refuse_others_results(store(tmp_path / "one", tasks[:1]), CHECKPOINT, tasks)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"preset": "lavis"}, "gqa with preset lavis, asked for is paper"),
        ({"mode": "rank"}, "gqa with mode rank, asked for is generate"),
        ({"split": "train"}, "gqa with split train, asked for is testdev"),
        ({"images": "withheld"}, "gqa with images withheld, asked for is shown"),
        ({"normalize": "mean"}, "gqa with normalize mean, asked for is sum"),
        ({"samples": 5}, "gqa with samples 5, asked for is 4"),
        ({"samples": None}, "gqa with samples all, asked for is 4"),
    ],
)
def test_another_protocol_is_refused(tasks: list[Task], tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    folder = store(tmp_path / "demo", tasks, **changed)
    before = (folder / "results.json").read_bytes()
    with pytest.raises(UserError) as error:
        refuse_others_results(folder, CHECKPOINT, tasks)
    assert str(error.value) == (
        f"{folder} holds the results of {CHECKPOINT} ({message}); give another name=, or delete {folder}"
    )
    assert (folder / "results.json").read_bytes() == before


def test_other_checkpoints_and_datasets_are_refused(tasks: list[Task], tmp_path: Path) -> None:
    folder = store(tmp_path / "demo", tasks)
    with pytest.raises(UserError, match=r"holds the results of outputs/train/x \(asked for is outputs/train/y\); give"):
        refuse_others_results(folder, "outputs/train/y", tasks)
    with pytest.raises(UserError, match=r"\(with vsr, now left out\); give another name=, or delete"):
        refuse_others_results(folder, CHECKPOINT, tasks[:1])
    refuse_others_results(folder, CHECKPOINT, tasks, llm="vicuna")
    with pytest.raises(UserError, match=r"\(with LLM vicuna, asked for is flan_t5_xl\)"):
        refuse_others_results(folder, CHECKPOINT, tasks, llm="flan_t5_xl")
    with pytest.raises(UserError, match="images shown, asked for is withheld"):
        refuse_others_results(folder, CHECKPOINT, [blind_task(task) for task in tasks])


def test_other_adapters_on_a_checkpoint_are_refused(tasks: list[Task], tmp_path: Path) -> None:
    plain = store(tmp_path / "plain", tasks)
    with pytest.raises(UserError, match=r"\(with adapter None, asked for is mine/llm\); give another name="):
        refuse_others_results(plain, CHECKPOINT, tasks, adapter="mine/llm")
    adapted = store(tmp_path / "adapted", [])
    found = json.loads((plain / "results.json").read_text())
    found["checkpoint"]["adapter"] = "mine/llm"
    (adapted / "results.json").write_text(json.dumps(found))
    refuse_others_results(adapted, CHECKPOINT, tasks, adapter=str(Path("mine/llm").absolute()))
    with pytest.raises(UserError, match=r"\(with adapter mine/llm, asked for is None\)"):
        refuse_others_results(adapted, CHECKPOINT, tasks)
    assert read_run(adapted).about.endswith("checkpoint outputs/train/x, adapter mine/llm, LLM vicuna")


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"format": 1, "datasets": {"gqa": {}}})])
def test_results_that_cannot_be_read_are_not_replaced(tasks: list[Task], tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(
        UserError, match=r"results\.json is damaged, or of another version of this code; give another name="
    ):
        refuse_others_results(tmp_path, CHECKPOINT, tasks)


def test_one_evaluation_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "outputs/demo"
    busy = f"^another evaluation is writing to {folder}; wait until it has ended, or give another name=$"
    for _ in range(2):  # the lock's file stays, and is in nobody's way
        with (
            claimed(folder, Ranks(0, 2)),
            claimed(folder, Ranks(1, 2)),
            claimed(tmp_path / "other", ALONE),
            pytest.raises(UserError, match=busy),
            claimed(folder, ALONE),
        ):
            pass


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file/demo"):
        with pytest.raises(UserError, match=r"cannot be written: .*/file is not a folder"), claimed(place, ALONE):
            pass
    missing = r"^/proc/a/b cannot be written \(No such file or directory\); choose another place$"
    with pytest.raises(UserError, match=missing), claimed(Path("/proc/a/b"), ALONE):
        pass
