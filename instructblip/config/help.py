"""What `--help` prints: commands, the choices of each group, and all settings, in the words of the YAML files' comments.

A file's first comment lines are the commands that use it; those after them say what it is for, and the first sentence of
that is shown. A comment beside or above a key says what the key is. In a list of defaults it says what the group is.
"""

import json
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import dropwhile
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from instructblip.config.schema import CONFIGS
from instructblip.config.validate import group_options, read_yaml

FLAGS = ("--help", "-h")
_COMMAND = re.compile(r"# (python|torchrun) ")
_BESIDE = re.compile(r"""(?:"(?:\\.|[^"])*"|'[^']*'|[^"'#]|(?<!\s)\#)*\s\#\s+(.*)$""")  # not a sign within quotes
_KEY = re.compile(r"( *)([\w.]+):(?=\s|$)")
_SWEEPS = {"hydra/launcher": "what starts the jobs of a sweep (-m)", "hydra/sweeper": "what chooses their values"}


class Head(NamedTuple):
    """The comment that a YAML file begins with: commands that use it, and what it is for."""

    commands: list[str]
    purpose: str

    @property
    def sentence(self) -> str:
        """The first of what it is for."""
        return re.split(r"(?<=[.?!)])\s+(?=[A-Z])", self.purpose, maxsplit=1)[0]


def read_head(lines: Sequence[str]) -> Head:
    """What the first comment of a YAML file says."""
    commands, words = [], []
    for line in lines:
        if not line.startswith("#"):
            break
        if _COMMAND.match(line):
            commands.append(line[2:].rstrip())
        elif not line.startswith("# @package"):
            words.append(line[1:].strip())
    return Head(commands, " ".join(words))


def read_comments(lines: Sequence[str], package: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    """What a YAML file says of each of its keys, in a comment beside the key, and below that, or above it.

    Args:
        lines: of the file.
        package: the keys below which the file's own are composed.
    """
    lines = list(dropwhile(lambda line: line.startswith("#"), lines))  # of the file as a whole
    found: dict[tuple[str, ...], str] = {}
    above: list[str] = []
    beside: tuple[str, ...] | None = None  # whose comment goes on in the next line
    for (path, depth), line in zip(_paths(lines), lines, strict=True):
        text = line.strip()
        if text.startswith("#"):
            if beside and len(line) - len(line.lstrip()) > depth:
                found[beside] += " " + text.lstrip("# ")
            else:
                above, beside = [*above, text.lstrip("# ")], None
            continue
        if path is not None:
            told = _BESIDE.match(line)
            words = [*above, *([told[1]] if told else [])]
            beside = (*package, *path) if told else None
            if words:
                found[(*package, *path)] = " ".join(words)
        above = []
    return found


def _paths(lines: Sequence[str]) -> Iterator[tuple[tuple[str, ...] | None, int]]:
    """The path of the key that stands in each line, None where none does, and the indentation of the last that did."""
    stack: list[tuple[int, str]] = []
    for line in lines:
        key = _KEY.match(line)
        if key:
            depth = len(key[1])
            stack = [*(item for item in stack if item[0] < depth), (depth, key[2])]
        yield (tuple(name for _, name in stack) if key else None), (stack[-1][0] if stack else 0)


def command_help(
    name: str, settings: Mapping[str, Any], choices: Mapping[str, str | None], folders: Sequence[Path], *, width: int
) -> str:
    """The help of a command.

    Args:
        name: of its file in `configs/`.
        settings: the composed configuration.
        choices: what is chosen of each group, None: nothing; `group@package` where it is composed elsewhere.
        folders: with the groups, `configs/` first.
        width: characters of a line.
    """
    lines = _lines(CONFIGS / f"{name}.yaml")
    head, told = read_head(lines), _group_comments(lines) | _SWEEPS
    groups = dict.fromkeys(told) | {key.partition("@")[0]: option for key, option in choices.items()}
    ordered = [group for group in (*told, *groups) if group in groups]
    parts = [head.purpose, "\n".join(f"  {line}" for line in head.commands)]
    parts += ["CHOICES, as GROUP=NAME; * stands at what is chosen now"]
    parts += [_group(group, folders, groups[group], told.get(group, ""), width) for group in dict.fromkeys(ordered)]
    parts += ["SETTINGS, as KEY=VALUE, with the values that they have now; a key below another is OUTER.INNER=VALUE"]
    own = {key: settings[key] for key in own_settings(name) if key in settings}  # before those of the parts
    parts += ["\n".join(_annotated({**own, **settings}, _all_comments(lines, choices, folders), width))]
    return "\n\n".join(filter(None, parts))


def _lines(path: Path) -> list[str]:
    """Of a file that anybody may have written, and nobody may read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _group_comments(lines: Sequence[str]) -> dict[str, str]:
    """The groups of a file's list of defaults in their order, and what it says of each."""
    found: dict[str, str] = {}
    for line in lines:
        if entry := re.match(r"  - ([\w/]+)(?:@[\w.]+)?: [^#]*(?:#\s+(.*))?$", line):
            found.setdefault(entry[1], entry[2] or "")  # a group may be composed twice
    return found


def _group(group: str, folders: Sequence[Path], chosen: str | None, told: str, width: int) -> str:
    """A group's options, each with what it is for."""
    options = group_options(group, *folders)
    column = 4 + max(map(len, options), default=0) + 2
    rows = [f"{group}=" + (f"   {told}" if told else "")]
    for option, path in sorted(options.items()):
        label = f"  {'*' if option == chosen else ' '} {option}".ljust(column)
        rows += _wrapped(label, read_head(_lines(path)).sentence, width)
    return "\n".join(rows)


def _wrapped(label: str, text: str, width: int) -> list[str]:
    """Text behind a label, further lines of it below its first."""
    return textwrap.wrap(
        text,
        max(width, len(label) + 30),
        initial_indent=label,
        subsequent_indent=" " * len(label),
        break_on_hyphens=False,
    ) or [label.rstrip()]


def _all_comments(
    own: Sequence[str], choices: Mapping[str, str | None], folders: Sequence[Path]
) -> dict[tuple[str, ...], str]:
    """The comments of every file that is composed; a command's own go over those of what is chosen."""
    found: dict[tuple[str, ...], str] = {}
    for key, option in choices.items():
        group, _, package = key.partition("@")
        path = group_options(group, *folders).get(option or "")
        if path is None:
            continue
        lines = _lines(path)
        globally = any(line.startswith("# @package _global_") for line in lines)
        found |= read_comments(lines, () if globally else tuple((package or group).replace("/", ".").split(".")))
    return found | read_comments(own)


def _annotated(
    settings: Mapping[str, Any], comments: Mapping[tuple[str, ...], str], width: int, path: tuple[str, ...] = ()
) -> Iterator[str]:
    """Settings as YAML, with a comment behind each key that has one."""
    for key, value in settings.items():
        here = (*path, str(key))
        section = isinstance(value, Mapping) and bool(value)
        line = f"{'  ' * len(here)}{key}:" + ("" if section else f" {_one_line(value)}")
        yield from _wrapped(f"{line}  # ", comments[here], width) if here in comments else [line]
        if section:
            yield from _annotated(value, comments, width, here)


def _one_line(value: Any) -> str:
    """A value as YAML has it on the command line's one line."""
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value, ensure_ascii=False)
    return yaml.safe_dump([value], default_flow_style=True, width=math.inf, allow_unicode=True, sort_keys=False)[1:-2]


def own_settings(name: str) -> dict[str, Any]:
    """What a command's own file sets, for help on a command that lacks a choice it cannot be composed without."""
    return {
        key: value for key, value in read_yaml(CONFIGS / f"{name}.yaml").items() if key not in ("defaults", "hydra")
    }
