"""Data of one's own in every command, in this process: a card's path where a name is, suites that go on, own metrics."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from instructblip.config.schema import InspectConfig, PrepareConfig, TrainConfig
from instructblip.data.cards import load_card
from instructblip.data.prepare.command import prepare
from instructblip.errors import UserError
from instructblip.evaluation import journal, runner
from instructblip.evaluation.protocol import make_task
from instructblip.evaluation.report import compare, table
from instructblip.training import inspection
from instructblip.training import run as run_module
from instructblip.training.run import train
from tests.kit.own_data import write_card, write_own_data
from tests.kit.runs import World, compose, evaluate_here, one_thread, read_lines, run, train_here
from tests.kit.stored import entry, read_results, write_run

EXACT = "def score(outputs, records):\n    return [100.0 * (o.text in r.answers) for o, r in zip(outputs, records)]\n"
ALWAYS = "def score(outputs, records):\n    return [25.0 for _ in outputs]\n"


def command(**values: Any) -> tuple[int, str]:
    """Status and output of prepare.py."""
    console = Console(file=io.StringIO(), width=200)
    status = prepare(PrepareConfig(**values), console)
    return status, console.file.getvalue()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `mine.yaml`, its raw files, and its shards; a path with a space and an umlaut in it."""
    folder = tmp_path_factory.mktemp("own") / "meine Bilder (groß)"
    card = write_own_data(folder)
    assert command(dataset=str(card), out=str(folder / "shards"))[0] == 0
    return folder


def shards_of(home: Path) -> str:
    """The override that names them, in quotes of Hydra's for the brackets and letters in the path."""
    return f"data.shards='{home / 'shards'}'"


def suite(*names: str | Path, held_in: tuple[str | Path, ...] = ()) -> tuple[str, ...]:
    """Overrides: these cards, quoted as a shell's user would for Hydra."""
    lists = {"held_in": held_in, "held_out": names}
    return tuple(f"suite.{key}=[{','.join(repr(str(name)) for name in found)}]" for key, found in lists.items())


# --- prepare, look, check, audit -------------------------------------------------------------------------------------


def test_the_raw_files_are_looked_for_beside_the_card_or_in_raw(home: Path, tmp_path: Path) -> None:
    card = write_card(tmp_path, name="elsewhere")
    with pytest.raises(UserError, match=r"lacks photos|lacks train.jsonl"):
        command(dataset=str(card), out=str(tmp_path / "shards"))
    status, printed = command(dataset=str(card), raw=str(home), out=str(tmp_path / "shards"))
    assert (status, printed.count("6 images, 6 records, 0 records lost")) == (0, 2)


@pytest.mark.slow
def test_the_page_of_samples_shows_what_the_card_leaves_to_defaults(home: Path) -> None:
    with pytest.raises(UserError, match=r"no card of mine is known: give its path, cards=\[./mine.yaml\]"):
        command(show=str(home / "shards"))
    for chosen in ({"dataset": str(home / "mine.yaml")}, {"cards": [str(home / "mine.yaml")]}):
        assert command(show=str(home / "shards"), **chosen)[0] == 0
        page = (home / "shards/samples.html").read_text()
        assert "<h2>mine, train</h2>" in page and "<h2>mine, val</h2>" in page
        row = '<tr><th>{}</th><td class="value">{}</td><td class="origin">{}</td></tr>'
        assert row.format("task", "vqa", "card") in page
        assert row.format("templates", "vqa", "default of task vqa") in page
        assert row.format("evaluation.num_beams", "5", "default of task vqa") in page


def test_check_looks_at_one_dataset_and_whether_it_is_the_cards(home: Path, tmp_path: Path) -> None:
    shards = str(home / "shards")
    assert command(check=shards, dataset=str(home / "mine.yaml")) == (0, f"{shards}: all shards are whole\n")
    changed = write_card(tmp_path, columns={"id": "number"})
    status, printed = command(check=shards, dataset=str(changed), split="val")
    assert status == 1
    assert (
        f"mine/val was prepared from another card than {changed} now is (options.columns.id: None -> number)" in printed
    )
    with pytest.raises(UserError, match=r"no manifest.json of vsr below"):
        command(check=shards, dataset="vsr")


@pytest.mark.slow
def test_an_audit_finds_ones_own_benchmark_in_ones_own_training_data(home: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    files = {"records": "train.jsonl", "images": "photos"}
    benchmark = write_card(tmp_path, "benchmark.yaml", name="benchmark", splits={"test": files})
    assert command(dataset=str(benchmark), raw=str(home), out=str(shards))[0] == 0
    folders = [str(home / "shards"), str(shards)]
    with pytest.raises(UserError, match=r"nothing to compare; no card of benchmark, mine is known"):
        command(audit=folders)
    status, printed = command(audit=folders, cards=[str(home / "mine.yaml")])
    assert "not compared, for no card of it is known: benchmark; give its path, cards=[./mine.yaml]" in printed
    status, printed = command(audit=folders, cards=[str(home / "mine.yaml"), str(benchmark)])
    assert status == 1
    assert "held-out benchmark, test has 6 images in the training data of mine" in printed


def test_shards_of_another_card_of_the_name_are_replaced_with_a_word(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    card, out = write_own_data(tmp_path / "data", 3), str(tmp_path / "shards")
    command(dataset=str(card), out=out)
    command(dataset=str(card), out=out)
    assert "replaces" not in caplog.text
    write_card(tmp_path / "data", splits={"train": {"records": ["train.jsonl"], "images": "./photos"}})
    command(dataset=str(card), out=out)
    assert "mine/train: replaces what another card gave (files.images: ['photos'] -> ['./photos'])" in caplog.text


# --- train -----------------------------------------------------------------------------------------------------------


def own_run(world: World, home: Path, output: Path, *overrides: str) -> Path:
    """Train two steps on the card and easy-VQA, watched and scored on the card."""
    path = home / "mine.yaml"
    return train_here(
        world,
        output,
        "mixture=own",
        "suite=own",
        f"mixture.datasets=[{{name: '{path}', multiplier: 2.0}}, {{name: easy_vqa_color}}]",
        shards_of(home),
        *suite(held_in=(path,)),
        "recipe.phases.alignment.steps=2",
        "recipe.phases.instruction.steps=4",
        "recipe.keep_best=mine",
        "recipe.validate_every=2",
        *overrides,
    )


@pytest.mark.slow
def test_a_card_is_trained_on_beside_an_official_one_watched_and_scored(
    world: World, home: Path, tmp_path: Path
) -> None:
    folder = own_run(world, home, tmp_path)
    lines = read_lines(folder / "metrics.jsonl")
    drawn = {sample.split("/")[0] for line in lines for sample in line["sample_ids"]}
    assert drawn == {"mine", "easy_vqa_color"}
    assert [line["validation"].keys() for line in lines if "validation" in line] == [{"mine"}] * 2  # 4 and 6
    found = read_results(folder / "evaluation")
    assert found["datasets"].keys() == {"mine"}
    assert (folder / "checkpoints/step_00000004").is_dir()  # the best by that dataset
    assert f"name: {home / 'mine.yaml'}" in (folder / "config.yaml").read_text()
    kept = found["datasets"]["mine"]["card"]
    assert (kept["name"], kept["task"], kept["templates"], kept["path"]) == ("mine", "vqa", "vqa", "mine.yaml")
    assert kept["evaluation"]["prompt"] == "Question: {question} Short answer:"
    assert "task" in kept["said"] and "templates" not in kept["said"]


@pytest.mark.slow
def test_the_step_with_the_fewest_mistakes_is_kept(
    world: World, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = "MISTAKES = Metric('x', 'mistakes', score, higher_is_better=False)\n"
    (home / "mistakes.py").write_text(f"from instructblip.evaluation.metrics import Metric\n{EXACT}{counted}")
    card = write_card(home, "counted.yaml", evaluation={"metric": "./mistakes.py:MISTAKES"})
    monkeypatch.setattr(run_module, "run_validation", lambda run, step, stop: {"mine": {4: 10.0, 6: 30.0}[step]})
    folder = own_run(
        world,
        home,
        tmp_path,
        f"mixture.datasets=[{{name: '{card}'}}]",
        *suite(held_in=(card,)),
        "recipe.checkpoint_every=100",
        "recipe.keep_checkpoints=1",
    )
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_00000004", "step_00000006"]


@pytest.mark.slow
def test_a_run_goes_on_from_another_folder_and_notices_a_changed_card(
    world: World, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "asking.yaml").write_text("templates: ['Q: {question}']\n")
    card = write_card(tmp_path, templates="./asking.yaml", evaluation={"num_beams": 1})

    def go_on(written: str, *overrides: str) -> Path:
        mixture = f"mixture.datasets=[{{name: '{written}'}}]"
        return own_run(world, home, tmp_path / "out", mixture, *suite(held_in=(written,)), *overrides)

    monkeypatch.chdir(tmp_path)
    folder = go_on("./mine.yaml")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "asking.yaml").write_text("templates: ['Question: {question}']\n")
    with pytest.raises(UserError, match=r"card mine changed since .* or allow it: resume_allow=\[mixture.datasets\]"):
        go_on(str(card), "resume=auto")
    assert go_on("../mine.yaml", "resume=auto", "resume_allow=[mixture.datasets]") == folder
    write_card(tmp_path, templates="./asking.yaml", evaluation={"num_beams": 2})
    with pytest.raises(UserError, match=r"protocol mine changed since .* or allow it: resume_allow=.*suite.held_in"):
        go_on(str(card), "resume=auto", "resume_allow=[mixture.datasets]")


@pytest.mark.slow
def test_inspect_takes_a_path(world: World, home: Path) -> None:
    mixture = "mixture=own", f"mixture.datasets=[{{name: '{home / 'mine.yaml'}'}}]"
    config = compose("inspect", InspectConfig, [*mixture, shards_of(home), "timed=2", "samples=2"])
    console = Console(file=io.StringIO(), width=200)
    with world.here(), one_thread():
        inspection.inspect(config, console)
    assert "0: mine/" in console.file.getvalue()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["mixture.datasets=[{name: '{card}'}, {name: '{card}'}]"], "mixture own names mine twice"),
        (["mixture.datasets=[{name: '{card}'}, {name: okvqa}]"], "okvqa (train) is not prepared in"),
        (
            ["suite.held_in=[okvqa,'{card}']", "suite.held_out=[vsr]"],
            "okvqa (val), vsr (zeroshot_test) are not prepared in",
        ),
        (["suite.held_in=['{card}']", "suite.held_out=['{card}']"], "suite own names mine twice"),
        (
            ["suite.held_in=['{card}']", "recipe.keep_best=yours"],
            "recipe.keep_best=yours is no dataset of suite.held_in",
        ),
        (
            ["suite.held_in=[okvqa,'{card}']", "suite.missing=skip", "recipe.keep_best=okvqa"],
            "keep_best=okvqa is not prepared",
        ),
        (["data.synthetic=true", "data.shards={tmp}"], "mine.yaml is a card of your own, and only official files have"),
        (["mixture.datasets=[{name: '{scored}'}]"], "scored.yaml has no split train to train on, but val"),
    ],
)
def test_a_mistake_is_one_line_before_a_model_is_built(
    world: World, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], words: str
) -> None:
    monkeypatch.setattr("instructblip.training.setup.build_model", None)
    scored = write_card(tmp_path, "scored.yaml", name="scored", splits={"val": {"records": "val.jsonl"}})
    places = {"card": home / "mine.yaml", "tmp": tmp_path / "made_up", "scored": scored}
    for name, place in places.items():
        overrides = [override.replace(f"{{{name}}}", str(place)) for override in overrides]
    first = ["mixture=own", "suite=own", f"mixture.datasets=[{{name: '{places['card']}'}}]", shards_of(home)]
    last = {override.partition("=")[0]: override for override in (*world.train, *first, *overrides)}
    config = compose("train", TrainConfig, [*last.values(), f"output={tmp_path / 'out'}"])
    with world.here(), pytest.raises(UserError) as caught:
        train(config, Console(quiet=True))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


# --- evaluate --------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many questions each batch had that a model was asked."""
    counts: list[int] = []
    ask = runner._ask

    def counted(model: Any, task: Any, batch: Any, at_once: int) -> Any:
        counts.append(len(batch))
        return ask(model, task, batch, at_once)

    monkeypatch.setattr(runner, "_ask", counted)
    return counts


@pytest.mark.slow
def test_another_metric_scores_the_same_answers(
    world: World, untrained_run: Path, home: Path, tmp_path: Path, asked: list[int]
) -> None:
    (tmp_path / "score.py").write_text(EXACT)
    card = write_card(tmp_path, evaluation={"metric": "./score.py:score", "num_beams": 1})
    arguments = shards_of(home), *suite(card), "suite=own"
    folder = evaluate_here(world, untrained_run, tmp_path / "out", *arguments)
    first = read_results(folder)["datasets"]["mine"]
    assert (first["metric"], first["value"], sum(asked)) == ("score.py:score", 0.0, 6)
    assert len(first["protocol"]["metric_sha256"]) == 64
    (tmp_path / "score.py").write_text(ALWAYS)
    assert "its score in" in journal.replaced_results(folder, [make_task(load_card(card), home / "shards")])[0]
    second = read_results(evaluate_here(world, untrained_run, tmp_path / "out", *arguments))["datasets"]["mine"]
    assert (second["value"], sum(asked)) == (25.0, 6)
    assert second["protocol"]["sha256"] != first["protocol"]["sha256"]


@pytest.mark.slow
def test_a_set_that_fails_does_not_lose_the_others(
    world: World, untrained_run: Path, home: Path, tmp_path: Path, asked: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "score.py").write_text("def score(outputs, records):\n    raise KeyError('colour')\n")
    failing = write_card(
        tmp_path,
        name="failing",
        reader=...,
        splits=...,
        view_of=str(home / "mine.yaml"),
        evaluation={"metric": "./score.py:score"},
    )
    arguments = shards_of(home), *suite(home / "mine.yaml", failing), "suite=own"
    with pytest.raises(UserError) as caught:
        evaluate_here(world, untrained_run, tmp_path / "out", *arguments)
    assert str(caught.value) == (
        f"failing could not be evaluated, as said above; the scores of the others are in "
        f"{tmp_path}/out/own/results.json; once that is mended, the same command goes on where it stopped"
    )
    folder = tmp_path / "out/own"
    found = read_results(folder)
    reason = "metric score.py:score fails (KeyError: 'colour', line 2)"
    assert found["datasets"].keys() == {"mine"}
    assert found["not_evaluated"] == {"failing": {"why": "failed", "reason": reason}}
    page = (folder / "report.html").read_text()
    assert "No score of failing, failed: metric score.py:score fails (KeyError: &#39;colour&#39;, line 2)" in page
    assert table.main([str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "¶ no score: it was not prepared, or failed" in printed
    assert [line.split() for line in printed.splitlines() if line.startswith("own")] == [["own", "0.0", "-¶"]]
    before = sum(asked)
    (tmp_path / "score.py").write_text(ALWAYS)
    again = read_results(evaluate_here(world, untrained_run, tmp_path / "out", *arguments))
    assert (again["datasets"]["failing"]["value"], again["not_evaluated"], sum(asked)) == (25.0, {}, before)


@pytest.mark.slow
def test_where_nothing_can_be_scored_the_reason_is_the_error(
    world: World, untrained_run: Path, home: Path, tmp_path: Path
) -> None:
    (tmp_path / "score.py").write_text("def score(outputs, records):\n    return 'good'\n")
    card = write_card(tmp_path, evaluation={"metric": "./score.py:score"})
    with pytest.raises(
        UserError, match=r"^metric score.py:score must give a list with one number a sample, or a Score"
    ):
        evaluate_here(world, untrained_run, tmp_path / "out", shards_of(home), *suite(card))
    assert not (tmp_path / "out/demo/results.json").exists()


@pytest.mark.slow
def test_what_is_not_prepared_is_skipped_where_that_is_asked_for(
    world: World, untrained_run: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = shards_of(home), *suite("gqa", home / "mine.yaml", "vsr"), "suite.name=own"
    with pytest.raises(UserError, match=r"gqa \(testdev\), vsr \(zeroshot_test\) are not prepared in"):
        evaluate_here(world, untrained_run, tmp_path, *arguments)
    folder = evaluate_here(world, untrained_run, tmp_path, *arguments, "suite.missing=skip")
    found = read_results(folder)
    assert (found["datasets"].keys(), found["not_evaluated"].keys()) == ({"mine"}, {"gqa", "vsr"})
    assert found["not_evaluated"]["vsr"]["why"] == "missing"
    assert "No score of vsr, missing: vsr (zeroshot_test) is not prepared in" in (folder / "report.html").read_text()
    assert table.main([str(folder), "--csv", str(tmp_path / "table.csv")]) == 0
    assert "gqa,gqa_low,gqa_high,gqa_marks" in (tmp_path / "table.csv").read_text()
    assert compare.main([str(folder), str(folder)]) == 0


@pytest.mark.slow
def test_a_sweep_over_cards_gives_each_a_folder(world: World, untrained_run: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        card = write_own_data(tmp_path / name, 2, name=name, evaluation={"candidates": ["red", "blue"]})
        command(dataset=str(card), out=str(tmp_path / "data/shards"))
    cards = "suite.held_out=[./one/mine.yaml],[./two/mine.yaml]"
    run(world, "evaluate.py", "-m", f"checkpoint={untrained_run}", "suite=own", cards, cwd=tmp_path)
    found = {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "outputs").rglob("results.json")}
    assert [list(results["datasets"]) for _, results in sorted(found.items())] == [["one"], ["two"]]
    assert sorted(found) == ["own-held_out_._one_mine.yaml_", "own-held_out_._two_mine.yaml_"]


@pytest.mark.slow
def test_a_score_of_ones_own_is_marked_where_it_is_not_as_the_card_says(
    world: World, untrained_run: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table knows the card by the results alone, wherever its file is."""
    card = write_card(tmp_path, evaluation={"candidates": ["red", "blue", "teal"]})
    plain = shards_of(home), *suite(card)
    folders = [
        evaluate_here(world, untrained_run, tmp_path / "out", *plain, "name=plain"),
        evaluate_here(world, untrained_run, tmp_path / "out", *plain, "name=written", "mode=generate"),
        evaluate_here(world, untrained_run, tmp_path / "out", *plain, "name=some", "samples=4"),
    ]
    card.unlink()
    assert table.main([str(folder) for folder in folders]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {words[0]: words[1] for words in lines if words and words[0] in ("plain", "written", "some")}
    assert [rows[name][-1] for name in ("plain", "written", "some")] == [rows["plain"][-1], "‡", "*"]
    assert rows["plain"][-1].isdecimal()


@pytest.mark.parametrize("stored", [{"name": "mine"}, {"evaluation": 3}, [], "mine.yaml"])
def test_a_damaged_card_in_results_is_one_line(
    home: Path, tmp_path: Path, stored: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", {"mine": entry("vqav2", 50.0) | {"card": stored}})
    assert table.main([str(folder)]) == 2
    error = capsys.readouterr().err
    assert "results.json: " in error and "datasets.mine.card" in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_no_code_of_a_run_is_run_by_what_is_stored_with_it(
    world: World, untrained_run: Path, home: Path, tmp_path: Path
) -> None:
    """A run's configuration and results may name cards and metrics; nobody who opens the run reads or runs them."""
    (tmp_path / "score.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n{ALWAYS}")
    card = write_card(tmp_path, evaluation={"metric": "./score.py:score"})
    arguments = shards_of(home), *suite(card)
    folder = evaluate_here(world, untrained_run, tmp_path / "out", *arguments)
    (tmp_path / "ran").unlink()
    found = json.loads((folder / "results.json").read_text())
    found["datasets"]["mine"]["card"]["evaluation"]["metric"] = f"{tmp_path / 'score.py'}:score"
    (folder / "results.json").write_text(json.dumps(found))
    assert table.main([str(folder)]) == 0
    assert compare.main([str(folder), str(folder)]) == 0
    assert not (tmp_path / "ran").exists()
