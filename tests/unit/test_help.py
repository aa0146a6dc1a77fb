"""`--help`: what each choice and setting is for, in the words of the files' own comments."""

from pathlib import Path

import pytest
import yaml

from instructblip.config.entry import print_help
from instructblip.config.help import read_comments, read_head
from instructblip.config.schema import CONFIGS, PrepareConfig, StudyCommandConfig, TrainConfig

COMMANDS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
OPTIONS = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent != CONFIGS)


def head(path: Path) -> tuple[list[str], str]:
    found = read_head(path.read_text(encoding="utf-8").splitlines())
    return found.commands, found.sentence


def test_every_file_says_its_commands_and_what_it_is_for() -> None:
    assert len(OPTIONS) > 100
    silent = [str(path) for path in (*OPTIONS, *CONFIGS.glob("*.yaml")) if not all(head(path))]
    assert silent == []
    assert [str(path) for path in OPTIONS if len(head(path)[1]) > 260] == []  # a paragraph helps nobody to choose


def test_help_shows_every_choice_with_its_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    print_help("train", TrainConfig, ["--help", "llm=opt_2_7b", "seed=7"])
    printed = capsys.readouterr().out
    words = " ".join(printed.split())
    defaults = yaml.safe_load((CONFIGS / "train.yaml").read_text(encoding="utf-8"))["defaults"]
    groups = [key.partition("@")[0] for entry in defaults if isinstance(entry, dict) for key in entry]
    groups = [group for group in groups if not group.startswith("override")]
    assert len(groups) == 14
    for group in groups:
        assert f"\n{group}=   " in printed
        for path in (CONFIGS / group).glob("*.yaml"):
            assert f"{path.stem} {' '.join(head(path)[1].split())}" in words
    assert "  * opt_2_7b " in printed  # what the line chooses, not the default
    assert "  * smollm2_135m" not in printed
    assert "\n  seed: 7\n" in printed
    assert "resume: null # auto: continue the newest whole checkpoint of this run" in words
    assert "temperature: null # T of p_d ~ n_d ** (1 / T)" in words  # of the chosen mixture's file
    prose = [line for line in printed.splitlines() if "  # " in line or line.startswith("    ")]
    assert [line for line in prose if len(line) > 120 and " #" in line] == []


def test_a_command_that_needs_a_choice_helps_before_it_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    print_help("study", StudyCommandConfig, ["--help"])
    printed = capsys.readouterr().out
    assert "int8 " in printed
    assert "jobs: 1  # runs at a time" in printed


def test_a_sweep_and_quoted_values_are_helped_too(capsys: pytest.CaptureFixture[str]) -> None:
    print_help("prepare", PrepareConfig, ["-m", "-h", "workers=1,2", "raw='a: # b'"])
    printed = capsys.readouterr().out
    assert "workers: 1" in printed
    assert "raw: 'a: # b'" in printed


def test_comments_beside_below_and_above_a_key_are_its_own() -> None:
    lines = """# python train.py x=y
# The file.
a: 1  # first
  # goes on
# Of b,
# all of it.
b:
  c: "x # y"  # inside
  # of d
  d: 2
e: 3
"""
    assert read_comments(lines.splitlines(), ("p",)) == {
        ("p", "a"): "first goes on",
        ("p", "b"): "Of b, all of it.",
        ("p", "b", "c"): "inside",
        ("p", "b", "d"): "of d",
    }
