"""What is wrong with an evaluation is said in one line before a model is loaded; two do not write to one folder."""

import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest

from instructblip.distributed import ALONE
from instructblip.errors import UserError
from instructblip.evaluation import run as evaluation
from instructblip.evaluation.journal import claimed
from instructblip.evaluation.report import table
from instructblip.weights.load import FrozenPart, LoadedModel
from tests.kit.runs import World, evaluate_here, read_lines
from tests.kit.stored import entry, write_run


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test."""

    def load_model(*arguments: Any, **options: Any) -> NoReturn:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(evaluation, "load_model", load_model)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["preset=papr"], "preset=papr is none of paper, lavis, lmms_eval; did you mean paper"),
        (["mode=guess"], "mode=guess is none of rank, generate, retrieve, match, null"),
        (["split=dev"], r"easy_vqa has no split dev; choose among train, validation, test"),
        (["suite.held_in=[easy_vqa_shap]"], "no dataset card 'easy_vqa_shap'"),
        (["suite.held_in=[gqa]"], r"gqa \(testdev\) is not prepared in .*; run python prepare\.py dataset=gqa"),
        (
            ["suite.held_in=[]", "suite.held_out=[]"],
            r"nothing to evaluate; name a dataset in suite\.held_in or suite\.h",
        ),
        (["device=tpu9"], "device=tpu9: use auto, cpu or cuda"),
    ],
)
def test_a_mistake_costs_no_model(
    world: World, untrained_run: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        evaluate_here(world, untrained_run, tmp_path, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.usefixtures("no_model")
def test_hateful_memes_and_visdial_are_not_generated(
    world: World, untrained_run: Path, all_datasets: Path, tmp_path: Path
) -> None:
    shards = f"data.shards={all_datasets / 'shards'}"
    for name, metric in (("hateful_memes", "auroc"), ("visdial", "visdial")):
        suite = "suite.held_in=[]", f"suite.held_out=[{name}]"
        with pytest.raises(UserError, match=f"{name}: {metric} needs the scores of candidates, which mode=generate"):
            evaluate_here(world, untrained_run, tmp_path, shards, *suite, "mode=generate")
    with pytest.raises(UserError, match="hateful_memes: AUROC needs samples of both labels"):
        evaluate_here(
            world, untrained_run, tmp_path, shards, "suite.held_in=[]", "suite.held_out=[hateful_memes]", "samples=1"
        )


@pytest.mark.usefixtures("no_model")
def test_a_place_that_cannot_be_costs_no_model(world: World, untrained_run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/demo cannot be written: .*/file is not a folder; choose another"):
        evaluate_here(world, untrained_run, tmp_path / "file")
    with pytest.raises(UserError, match=r"/proc/nowhere/demo cannot be written \(No such file or directory\)"):
        evaluate_here(world, untrained_run, Path("/proc/nowhere"))
    with pytest.raises(UserError, match=r"cannot be written \(File name too long\)"):
        evaluate_here(world, untrained_run, tmp_path, f"name={'long' * 100}")


@pytest.mark.slow
def test_results_of_another_checkpoint_are_not_replaced(
    world: World, untrained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("suite.held_in=[easy_vqa_shape]", "suite.held_out=[]", "batch_size=2", "examples=2", "name=mine")
    folder = evaluate_here(world, untrained_run, tmp_path, *few, "samples=3")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = Path(shutil.copytree(untrained_run, tmp_path / "other"))
    load_model = evaluation.load_model
    monkeypatch.setattr(evaluation, "load_model", None)
    for checkpoint, changed, message in (
        (other, few, rf"mine holds the results of {untrained_run}.*\(asked for is {other}"),
        (untrained_run, (*few, "preset=lavis"), "easy_vqa_shape with preset paper, asked for is lavis"),
        (untrained_run, (*few, "suite.held_in=[easy_vqa_color]"), "with easy_vqa_shape, now left out"),
        (untrained_run, (*few, "samples=2"), "easy_vqa_shape with samples 3, asked for is 2"),
    ):
        samples = () if "samples=2" in changed else ("samples=3",)
        with pytest.raises(UserError, match=message):
            evaluate_here(world, checkpoint, tmp_path, *changed, *samples)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    def load_another(*arguments: Any, **options: Any) -> LoadedModel:
        found = load_model(*arguments, **options)
        return found._replace(parts=found.parts | {"llm": FrozenPart("flan_t5_xl", "")})

    monkeypatch.setattr(evaluation, "load_model", load_another)
    with pytest.raises(UserError, match=r"\(with LLM smollm2_135m, asked for is flan_t5_xl\)"):
        evaluate_here(world, untrained_run, tmp_path, *few, "samples=3")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    monkeypatch.setattr(evaluation, "load_model", load_model)
    for samples, count in (("samples=3", 3), ("samples=5", 5), ("samples=null", 12)):
        evaluate_here(world, untrained_run, tmp_path, *few, samples)
        assert len(read_lines(folder / "easy_vqa_shape/predictions.jsonl")) == count


@pytest.mark.usefixtures("no_model")
def test_a_second_evaluation_at_the_same_time_ends_at_once(world: World, untrained_run: Path, tmp_path: Path) -> None:
    journal = tmp_path / "demo/easy_vqa_shape/journal-0.jsonl"
    with claimed(tmp_path / "demo", ALONE):
        journal.parent.mkdir()
        journal.write_text("the first one's\n")
        with pytest.raises(
            UserError, match=r"another evaluation is writing to .*/demo; wait until it has ended, or give"
        ):
            evaluate_here(world, untrained_run, tmp_path)
    assert journal.read_text() == "the first one's\n"


@pytest.mark.slow
def test_a_table_is_not_written_over_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, page = write_run(tmp_path / "run", {"gqa": entry("gqa", 50.0)}), tmp_path / "page"
    page.mkdir()
    assert table.main([str(run), "--html", str(page)]) == 2
    printed = capsys.readouterr().err
    assert printed == f"error: {page} cannot be written: {page} is a folder; choose another name\n"
    assert {path.name for path in tmp_path.iterdir()} == {"run", "page"}
