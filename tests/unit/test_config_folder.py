"""`-cd FOLDER`: whatever the folder is called and holds, its files are chosen as ours, and a line names the one at fault."""

import os
import sys
from pathlib import Path

import pytest
from rich.console import Console

from instructblip.config.entry import check_overrides, main, print_help
from instructblip.config.folders import further_folder, stamp
from instructblip.config.schema import CONFIGS, EvaluateConfig, PrepareConfig
from instructblip.errors import UserError

MINE = (CONFIGS / "llm/smollm2_135m.yaml").read_text(encoding="utf-8")
GIVEN = ("checkpoint=a", "llm=mine")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where commands run."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, content: str | bytes = MINE) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


def evaluated(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[tuple[str, str, Path | None]]:
    """Of each job of evaluate.py its language model, its name and the further folder."""
    seen: list[tuple[str, str, Path | None]] = []

    def task(config: EvaluateConfig, console: Console) -> None:
        assert config.llm is not None
        seen.append((config.llm.name, config.name, further_folder()))

    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    main("evaluate", EvaluateConfig, task)  # type: ignore[arg-type]
    return seen


def refused(*arguments: str) -> str:
    with pytest.raises(UserError) as error:
        check_overrides("evaluate", EvaluateConfig, list(arguments))
    return str(error.value)


# --- which folder ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a=b", "a b, 'c' \"d\"", "a\\b", "a${b}", "no\u00a0break", os.fsdecode(b"\xff")])
def test_a_folder_may_have_any_name(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(f"{name}/llm/mine.yaml")
    assert [job[0] for job in evaluated(monkeypatch, "llm=mine", "-cd", name, "checkpoint=a")] == ["smollm2_135m"]
    assert evaluated(monkeypatch, *GIVEN, f"--config-dir={name}")[0][2] == place / name


@pytest.mark.slow
def test_a_sweep_knows_the_folder_wherever_the_options_stand(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("a=b/llm/mine.yaml")
    found = evaluated(monkeypatch, "checkpoint=a", "-cd", "a=b", "llm=mine,vicuna_7b", "-m", "name=x")
    assert found == [("smollm2_135m", "x-llm_mine", place / "a=b"), ("vicuna_7b", "x-llm_vicuna_7b", place / "a=b")]


def test_what_is_no_folder() -> None:
    write("mine/llm/mine.yaml")
    place = Path.cwd()
    wrong = {
        "none": f"-cd: there is no folder {place}/none; correct its name",
        "~/none": f"-cd: there is no folder {Path.home()}/none; correct its name",
        "mine/llm/mine.yaml": f"-cd: {place}/mine/llm/mine.yaml is a file; give FOLDER where it is FOLDER/GROUP/NAME.yaml",
        "": "-cd lacks its value; give -cd=VALUE",
    }
    for given, expected in wrong.items():
        assert refused("-cd", given, *GIVEN) == expected
    assert refused(*GIVEN, "-cd") == "-cd lacks its value; give -cd=VALUE"


@pytest.mark.parametrize("options", [["-cd", "mine"], ["-cd=mine", "-m"]])
def test_a_word_that_is_no_setting_is_refused_beside_a_folder_too(options: list[str]) -> None:
    write("mine/llm/mine.yaml")
    assert refused(*options, *GIVEN, "preset", "=lavis").startswith("preset cannot be understood")
    assert refused(*GIVEN, "held_in", *options).startswith("held_in cannot be understood")


def test_only_files_of_groups_are_looked_at() -> None:
    """A folder of one's work holds runs and data, too, and links of editors to nowhere."""
    for path in ("llm/mine.yaml", "hydra/launcher/mine.yaml", "outputs/train/demo/config.yaml"):
        write(path)
    Path("llm/.#mine.yaml").symlink_to("me@host.1")
    assert {path for path, _ in stamp([Path()])} == {"llm/mine.yaml", "hydra/launcher/mine.yaml"}


@pytest.mark.slow
def test_a_folder_of_ones_work_is_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    write("llm/mine.yaml")
    Path("output").mkdir()
    assert len(evaluated(monkeypatch, "-cd", ".", "output=output", "~data.sources", *GIVEN)) == 1
    assert "a sweep takes output= for a choice of the files in " in refused("-cd", ".", "-m", *GIVEN, "output=output")


# --- which files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"# caf\xe9", "is not valid YAML: it is not UTF-8 text (byte 0xe9 at 5); save it as UTF-8"),
        ("a: 1\n\tb: 2", "is not valid YAML: while scanning a plain scalar in line 1, column 4 found a tab"),
        ("- a", "must hold keys and values at its top level"),
        ("3", "must hold keys and values at its top level"),
        ("# @package a b\na: 1", "cannot be composed: Too many components in '@package a b'"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(content: str | bytes, expected: str, place: Path) -> None:
    write("mine/llm/mine.yaml", content)
    assert refused("-cd", "mine", *GIVEN).startswith(f"{place}/mine/llm/mine.yaml {expected}")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("defaults: [mine]", "chooses itself in its defaults, or over others; take that choice out"),
        (
            "defaults: {a: b}",
            "cannot be composed together (Invalid defaults list in 'llm/mine', defaults must be a list",
        ),
    ],
)
def test_defaults_that_cannot_be_followed(content: str, expected: str) -> None:
    write("mine/llm/mine.yaml", content)
    assert expected in refused("-cd", "mine", *GIVEN)


def test_defaults_that_choose_again_what_is_chosen() -> None:
    write("mine/suite/mine.yaml", "# @package _global_\ndefaults: [/llm: vicuna_7b]\n")
    expected = "a file's defaults choose llm a second time; write `override /llm: vicuna_7b` there"
    assert refused("-cd", "mine", "checkpoint=a", "suite=mine") == expected


@pytest.mark.slow
def test_a_file_that_would_not_be_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two files of one name Hydra takes that of configs/, and says nothing."""
    write("mine/llm/smollm2_135m.yaml")
    given = ("-cd", "mine", "checkpoint=a", "llm=smollm2_135m")
    assert evaluated(monkeypatch, *given)[0][0] == "smollm2_135m"  # a copy
    write("mine/llm/smollm2_135m.yaml", MINE + "\n")
    assert "/mine/llm/smollm2_135m.yaml would not be read, since configs/llm/smollm2_135m.yaml has its" in refused(
        *given
    )


def test_a_file_is_chosen_by_its_name() -> None:
    write("mine/llm/mine.yml")
    assert refused("-cd", "mine", *GIVEN).endswith("/mine/llm/mine.yml must be called mine.yaml")
    message = refused("checkpoint=a", "llm=./mine/llm/mine.yaml")
    assert message.startswith("there is no llm=./mine/llm/mine.yaml; configs/llm has: ")
    assert message.endswith("of a file elsewhere give folder and name: -cd FOLDER llm=NAME is FOLDER/llm/NAME.yaml")


@pytest.mark.slow
def test_a_group_of_ones_own_is_chosen_as_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    write("mine/size/small.yaml", "# @package _global_\nsuite: {name: small}\n")
    write("mine/size/large.yaml", "# @package _global_\nsuite: {name: large}\n")
    ours = "# @package _global_\ndefaults: [_self_, /size: small]\nsuite: {name: a, held_out: [gqa]}\n"
    write("mine/suite/ours.yaml", ours)
    given = ("-cd", "mine", "checkpoint=a", "llm=vicuna_7b")
    assert evaluated(monkeypatch, *given, "suite=ours", "size=large")[0][1] == "large"
    assert evaluated(monkeypatch, *given, "+size=large")[0][1] == "large"
    assert refused(*given, "size=large").startswith(
        "evaluate makes no choice of size; leave size= out, or give +size=NAME to"
    )
    assert refused(*given, "study=large").startswith("evaluate makes no choice of study; leave study= out")
    assert "there is no size=largo; did you mean large? " in refused(*given, "suite=ours", "size=largo")


@pytest.mark.slow
def test_help_and_choices_leave_out_what_is_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    write("a=b/llm/mine.yaml")
    write("a=b/llm/._mine.yaml", b"\x00\x05\xff")  # as macOS writes beside each file of a foreign disk
    Path("a=b/llm/.#mine.yaml").symlink_to("me@host.1")
    Path("a=b/llm/folder.yaml").mkdir()
    write("a=b/llm/latin.yaml", b"# caf\xe9")
    print_help("evaluate", EvaluateConfig, ["--help", *GIVEN, "-cd", "a=b"])
    printed = capsys.readouterr().out
    assert "\n  * mine " in printed
    assert "folder" not in refused("-cd", "a=b", "checkpoint=a", "llm=mien")
    assert "._mine" not in printed


def test_the_completion_of_shells_is_hydras(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare.py", "-sc", "install=bash"])
    with pytest.raises(SystemExit) as end:
        main("prepare", PrepareConfig, lambda config, console: None)
        raise SystemExit(0)
    assert end.value.code == 0
    assert "complete -o nospace" in capsys.readouterr().out
