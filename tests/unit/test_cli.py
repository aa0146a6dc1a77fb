"""The command line: what cannot be understood is said in one line, status 2; what can be is handed over as it is meant."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from rich.console import Console

from instructblip.config import entry
from instructblip.config.entry import _named_after, check_overrides, compose_config, main, print_help
from instructblip.config.schema import CONFIGS, EvaluateConfig, PrepareConfig, TrainConfig
from instructblip.errors import UserError
from instructblip.files import is_disk_full, write_atomically
from tests.kit.runs import REPOSITORY


def _refused(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        check_overrides("train", TrainConfig, list(overrides))
    assert "\n" not in str(error.value)
    return str(error.value)


# --- whole processes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_process_ends_with_one_line_and_status_2() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HYDRA")}
    command = [sys.executable, "train.py", "recipe.lerning_rate=1"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    expected = "unknown key recipe.lerning_rate; did you mean recipe.phases.NAME.learning_rate?"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {expected}\n")


# --- in this process -------------------------------------------------------------------------------------------------


def _main(monkeypatch: pytest.MonkeyPatch, task: object, *arguments: str) -> object:
    """Run `main` for prepare.py; return its exit status."""
    monkeypatch.setattr(sys, "argv", ["prepare.py", *arguments])
    try:
        main("prepare", PrepareConfig, task)  # type: ignore[arg-type]
    except SystemExit as end:
        return end.code
    return 0


def test_the_task_gets_a_validated_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[PrepareConfig] = []
    status = _main(monkeypatch, lambda config, console: seen.append(config), "dataset=easy_vqa", "workers=3")
    assert status == 0
    assert isinstance(seen[0], PrepareConfig)
    assert (seen[0].dataset, seen[0].workers) == ("easy_vqa", 3)


def test_the_tasks_status_is_the_process_status(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _main(monkeypatch, lambda config, console: 143) == 143
    assert _main(monkeypatch, lambda config, console: 0) == 0


def test_what_ends_a_job_of_a_sweep_ends_the_others_only_if_a_signal_did(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The status of a plan that does not fit is 1."""
    monkeypatch.chdir(tmp_path)
    seen: list[int] = []

    def task(config: PrepareConfig, console: Console) -> int:
        seen.append(config.workers)
        return {1: 1, 2: 0, 3: 143}.get(config.workers, 0)

    assert _main(monkeypatch, task, "-m", "dataset=easy_vqa", "workers=1,2,4") == 1
    assert seen == [1, 2, 4]
    assert _main(monkeypatch, task, "-m", "dataset=easy_vqa", "workers=3,4") == 143
    assert seen[3:] == [3]


@pytest.mark.parametrize(("more", "times"), [((), 1), (("hydra.verbose=false",), 3)])
def test_a_plain_command_is_composed_once_and_hydras_own_settings_are_left_to_hydra(
    more: tuple[str, ...], times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    composed: list[object] = []
    load = ConfigLoaderImpl.load_configuration
    monkeypatch.setattr(
        ConfigLoaderImpl, "load_configuration", lambda *args, **options: composed.append(0) or load(*args, **options)
    )
    seen: list[PrepareConfig] = []
    entry._compose_choices.cache_clear()
    arguments = ("dataset=easy_vqa", "workers=3", *more)
    assert _main(monkeypatch, lambda config, console: seen.append(config), *arguments) == 0
    assert (len(composed), seen[0].dataset, seen[0].workers) == (times, "easy_vqa", 3)


def test_a_users_mistake_is_one_line_however_long(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    long = "[bold]" + " ".join(["word"] * 100) + " /a/b[c]/d"

    def task(config: PrepareConfig, console: Console) -> None:
        raise UserError(f"{long}\n  and\tmore")

    assert _main(monkeypatch, task) == 2
    assert capfd.readouterr().err == f"error: {long} and more\n"


def test_signs_that_the_terminal_has_not_are_printed_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The line of a damaged picture whose name is Latin-1, in a terminal that knows ASCII."""
    name = os.fsdecode(b"caf\xe9.png")
    with open(tmp_path / "printed", "w", encoding="ascii") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert _main(monkeypatch, lambda config, console: console.print(f"left out: {name}, Müller")) == 0
    assert (tmp_path / "printed").read_text() == "left out: caf\\udce9.png, M\\xfcller\n"


def test_a_job_in_a_process_of_its_own_prints_them_so_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def task(config: PrepareConfig, console: Console) -> None:
        console.print("left out: Müller")

    with open(tmp_path / "printed", "w", encoding="ascii") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        entry._run_job(entry._compose("prepare", []), PrepareConfig, task, entry._Job())
    assert (tmp_path / "printed").read_text() == "left out: M\\xfcller\n"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("checkpoint=a/b,a_b", "checkpoint=a/b and a_b would be jobs of one name and folder; start one of"),
        ("answers='what is it?','what is it!'", "answers='what is it?' and 'what is it!' would be jobs of one name"),
    ],
)
def test_jobs_of_a_sweep_that_would_share_a_folder_are_refused(values: str, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        check_overrides("evaluate", EvaluateConfig, ["-m", "checkpoint=a", values])
    check_overrides("evaluate", EvaluateConfig, ["-m", "checkpoint=a/b,a/c", "samples=1,1", "output=a/b,a_b"])


@pytest.mark.parametrize(
    ("name", "schema", "given", "words"),
    [
        ("evaluate", EvaluateConfig, ["checkpoint=a", "suite=demo,held_out", "data.workers=4"], "data.workers= is of"),
        ("evaluate", EvaluateConfig, ["checkpoint=a", "data.workers=4,8"], "data.workers= is of training"),
        ("train", TrainConfig, ["connector=mlp,linear", "qformer.queries=16"], "qformer.queries= is of a Q-Former"),
        ("train", TrainConfig, ["connector=mlp", "qformer.dropout=interval(0,0.2)"], "qformer.dropout= is of a Q-"),
    ],
)
def test_keys_that_no_job_of_a_sweep_reads_are_refused(name: str, schema: Any, given: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_overrides(name, schema, ["-m", *given])


def test_a_key_that_one_job_of_a_sweep_reads_is_not_refused() -> None:
    for given in (
        ["connector=qformer,mlp", "qformer.queries=16"],
        ["connector=mlp,qformer", "qformer.dropout=interval(0,1)"],
    ):
        check_overrides("train", TrainConfig, ["-m", *given])


def test_the_name_of_a_job_fits_a_file_system_in_any_writing() -> None:
    config = compose_config("evaluate", EvaluateConfig, ["checkpoint=a", "name=x"])
    named = [_named_after(replace(config), f"answers={end * 150}").name for end in "aäß京都"]
    assert named[0] == f"x-answers_{'a' * 150}"
    assert all(len(name.encode()) <= 180 for name in named)
    assert len(set(named)) == 5


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def task(config: PrepareConfig, console: Console) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(sys, "gettrace", lambda: None)  # under coverage Hydra would take us for a debugger and raise
    assert _main(monkeypatch, task) == 1
    assert "Traceback" in capfd.readouterr().err


def test_an_interrupt_is_one_line_and_status_130(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def task(config: PrepareConfig, console: Console) -> None:
        raise KeyboardInterrupt

    assert _main(monkeypatch, task) == 130
    error = capfd.readouterr().err
    assert error.startswith("error: interrupted; ")
    assert error.count("\n") == 1


def test_nothing_is_written_where_the_command_is_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert _main(monkeypatch, lambda config, console: None, "dataset=easy_vqa") == 0
    assert list(tmp_path.iterdir()) == []


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "recipe.lerning_rate=1",
            "unknown key recipe.lerning_rate; did you mean recipe.phases.NAME.learning_rate?",
        ),
        (
            "recipe.phases.alignment.stepps=1",
            "unknown key recipe.phases.alignment.stepps; did you mean recipe.ph",
        ),
        ("llms=smollm2_135m", "unknown key llms; did you mean llm?"),
        ("llm=smollm", "there is no llm=smollm; did you mean smollm2_135m? configs/llm has: flan_t5_base, "),
        ("experiment=papr", "there is no experiment=papr; "),
        ("zzz=1", "unknown key zzz; the keys there are: seed, model, vision, connector, qformer, text, llm, name"),
        ("seed", "seed cannot be understood; write each setting as key=value"),
        ("a b", "a b cannot be understood; "),
        (
            "recipe.phases.0.steps=1",
            "recipe.phases.0 is none of them; did you mean recipe.phases.alignment.steps?",
        ),
        ("recipe.phases.aligment.steps=1", "did you mean recipe.phases.alignment.steps?"),
        ("recipe.phases.9.steps=1", "key recipe.phases.9.batch_size is missing"),
        ("recipe=null", "key recipe is missing; give recipe=..."),
        ("sources=x", "sources= is chosen for a part each; write sources@"),
        ("study=x", "train makes no choice of study; leave study= out"),
    ],
)
def test_what_cannot_be_composed(override: str, expected: str) -> None:
    message = _refused(override)
    assert expected in message
    if "understood" in message:
        assert "write each setting as key=value" in message


@pytest.mark.slow
@pytest.mark.parametrize("option", [["-cd", "{folder}"], ["--config-dir={folder}"]])
def test_files_of_a_further_folder_stand_beside_ours(
    option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a folder, 'mine'"
    (folder / "llm").mkdir(parents=True)
    text = (CONFIGS / "llm/smollm2_135m.yaml").read_text()
    (folder / "llm/mine.yaml").write_text(text[text.index("name:") :])  # without a comment
    given = [word.format(folder=folder) for word in option]
    check_overrides("train", TrainConfig, [*given, "llm=mine", "experiment=demo"])
    check_overrides("train", TrainConfig, [*given, "-m", "llm=mine,vicuna_7b"])
    print_help("train", TrainConfig, [*given, "llm=mine", "--help"])
    assert "  * mine\n" in capsys.readouterr().out
    wrong = {
        "llm=mien": f"did you mean mine? configs/llm and {folder}/llm have: flan_t5_base, ",
        "lllm=mine": "unknown key lllm; did you mean llm?",
        "vision.norm=foo": "vision.norm=foo is none of layer, channel, none",
    }
    for override, expected in wrong.items():
        assert expected in _refused(*given, override)
        assert expected in _refused(*given, "--cfg", "job", override)
    (folder / "llm/mine.yaml").write_text("a: [1\nb: 2\n")
    assert f"{folder}/llm/mine.yaml is not valid YAML: while parsing a flow sequence in line 1" in _refused(
        *given, "llm=mine"
    )
    assert (
        _refused("-cd", str(tmp_path / "none"), "seed=1")
        == f"-cd: there is no folder {tmp_path}/none; correct its name"
    )


def test_options_that_do_not_go_together() -> None:
    assert _refused("-m", "--cfg", "job", "seed=1,2") == "-m and --cfg do not go together; give one of them"
    assert _refused("--resolve", "seed=1") == "--resolve is for --cfg; give --cfg job --resolve"


@pytest.mark.slow
def test_what_can_be_composed_passes() -> None:
    check_overrides("train", TrainConfig, ["seed=3", "experiment=demo", "mixture.datasets=[{name: a}]", "name='a b'"])
    check_overrides("evaluate", EvaluateConfig, ["checkpoint=a/b", "suite=demo"])
    check_overrides("train", TrainConfig, ["-m", "seed=1,2"])  # a sweep is Hydra's to split


# --- what the commands share to write files --------------------------------------------------------------------------


def test_a_file_in_the_way_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("file")
    for path in (tmp_path / "a/b", tmp_path / "a/b/c"):
        with pytest.raises(UserError, match=r"cannot be written: .*/a.* is not a folder; choose another"):
            write_atomically(path, b"x")
    assert (tmp_path / "a").read_text() == "file"


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UserError, match=r"disk full while writing .*/a; free some space and run the same command again"
    ):
        write_atomically(path, "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a", "old")]


def test_a_really_full_disk(small_disk: Path) -> None:
    write_atomically(small_disk / "a", bytes(100_000))
    with pytest.raises(UserError, match="disk full"):
        write_atomically(small_disk / "a", bytes(300_000))
    assert [(file.name, file.stat().st_size) for file in small_disk.iterdir()] == [("a", 100_000)]


def test_which_errors_mean_a_full_disk() -> None:
    assert is_disk_full(OSError(28, "x"))
    assert is_disk_full(OSError(122, "quota"))
    assert is_disk_full(RuntimeError("IoError(No space left on device (os error 28))"))
    assert not is_disk_full(OSError(5, "Input/output error"))
