"""Readers fed with damaged files: counted losses or one clear line, whatever stands where; never another exception."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from instructblip.errors import UserError
from tests.kit.raw_files import CASES, expected_of, read_raw, write_raw

DAMAGES = 20
DATASETS = [case.name for case in CASES if case.name == expected_of(case).get("dataset")]
JUNK: tuple[Any, ...] = (
    *(
        None,
        True,
        0,
        -1,
        1.0,
        1e300,
        10**30,
        float("nan"),
        "",
        "  ",
        "x",
        "../../x",
        "/etc/passwd",
        "a.b",
        "é",
        "\ud800",
    ),
    *("9" * 5000, [], {}, [[]], [None], [1], ["\ud800"], {"a": 1}),
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value within a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _places(item, (*path, key))


def _with_junk(value: Any, chance: random.Random) -> Any:
    """The value with one of its parts replaced, or a field removed; no entry is, for nobody could tell."""
    path = chance.choice(list(_places(value)))
    if not path:
        return chance.choice(JUNK)
    part = value
    for key in path[:-1]:
        part = part[key]
    if chance.random() < 0.2 and isinstance(path[-1], str) and not path[-1].isdecimal():
        del part[path[-1]]
    else:
        part[path[-1]] = chance.choice(JUNK)
    return value


def _damaged(path: Path, chance: random.Random) -> bytes:
    content = path.read_bytes()
    if path.suffix not in (".json", ".jsonl") or chance.random() < 0.15:
        cut = chance.randrange(len(content) + 1)
        return chance.choice([content[:cut], content[:cut] + b"\xff\x00" + content[cut:], b"<html>404</html>", b""])
    if path.suffix == ".json":
        return json.dumps(_with_junk(json.loads(content), chance)).encode()
    lines = content.decode().splitlines()
    place = chance.randrange(len(lines))
    lines[place] = json.dumps(_with_junk(json.loads(lines[place]), chance))
    return "\n".join(lines).encode()


@pytest.mark.parametrize("dataset", DATASETS)
def test_damaged_files_end_in_losses_or_one_line(dataset: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == dataset)
    splits = list(expected_of(case)["splits"])
    write_raw(dataset, tmp_path)
    whole = {split: sum(len(item.records) for item in read_raw(dataset, tmp_path, split)[0]) for split in splits}
    files = sorted(path for path in tmp_path.rglob("*") if path.suffix in (".json", ".jsonl", ".token", ".csv", ".txt"))
    chance, messages = random.Random(dataset), []
    for _ in range(DAMAGES):
        path, split = chance.choice(files), chance.choice(splits)
        before = path.read_bytes()
        path.write_bytes(_damaged(path, chance))
        try:
            media, losses = read_raw(dataset, tmp_path, split)
        except UserError as error:
            messages.append(str(error))
        else:
            records = [record for item in media for record in item.records]
            assert all(re.fullmatch(r"[A-Za-z0-9_-]+", item.key) for item in media)
            assert len({item.key for item in media}) == len(media)
            assert len({record.id for record in records}) == len(records)
            assert len(records) in (0, whole[split]) or losses  # the engine refuses a split that has nothing in it
            texts = [text for record in records for text in (record.question, *record.answers, *record.captions)]
            assert all(text is None or text.strip() for text in texts)
            json.dumps([record.to_dict() for record in records], ensure_ascii=False).encode()
        path.write_bytes(before)
    assert all(len(message) < 600 for message in messages)
