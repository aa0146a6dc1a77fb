"""docs/data.md, "Your own data in five minutes": its commands in order, in an empty folder, with data as people have it."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.end_to_end.test_readme import FIVE_MINUTES, IN_ORDER
from tests.kit.own_tables import RowOf, write_csv
from tests.kit.runs import World, run

COLORS = {"hat": "red", "dress": "blue", "t-shirt": "teal"}
SHORT = (
    "recipe.phases.alignment.steps=3",
    "recipe.phases.instruction.steps=3",
    "recipe.phases.alignment.batch_size=4",
    "recipe.phases.instruction.batch_size=4",
)


def write_photos(folder: Path) -> None:
    """`photos` with spaces and umlauts, and the three tables; one row is broken, and one picture is missing."""
    for split, count in (("train", 6), ("val", 3), ("test", 6)):
        rows: list[RowOf] = []
        for number in range(count):
            answer = list(COLORS)[number % len(COLORS)]
            name = f"{('Sommer 2025/', '')[number % 2]}{split} Größe {number}.JPG"
            (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (60, 40 + number), COLORS[answer]).save(folder / "photos" / name, "JPEG")
            rows.append({"image": name, "question": "Which garment is this?", "answer": answer})
        write_csv(folder / f"{split}.csv", rows)
    with open(folder / "train.csv", "a", encoding="utf-8") as file:
        file.write("gibt es nicht.jpg,Which garment is this?,hat\na.jpg,Which garment, if any, is this?,hat\n")


def card_of_the_section() -> str:
    """The YAML that the section shows, with its indentation taken out."""
    (block,) = re.findall(r"^ *```yaml\n(.*?)^ *```", FIVE_MINUTES, flags=re.DOTALL | re.MULTILINE)
    return "".join(line.removeprefix("   ") for line in block.splitlines(keepends=True))


def test_the_way_is_seven_commands_and_a_dozen_lines_of_yaml() -> None:
    assert len(IN_ORDER) + FIVE_MINUTES.count("`pip install -r requirements.txt && python train.py`") == 7
    assert 5 < len(card_of_the_section().splitlines()) <= 12
    assert yaml.safe_load(card_of_the_section())["name"] == "mine"
    assert "```python" not in FIVE_MINUTES


@pytest.mark.slow
def test_photos_and_a_table_become_a_report(world: World, finished_run: Path, tmp_path: Path) -> None:
    write_photos(tmp_path)
    (tmp_path / "mine.yaml").write_text(card_of_the_section(), encoding="utf-8")
    shutil.copytree(finished_run, tmp_path / "outputs/train/demo")
    tiny = tuple(item for item in world.train if item.split(".")[0] in ("vision", "qformer", "llm"))
    printed = []
    for line in IN_ORDER:
        words = shlex.split(line)[1:]
        script, arguments = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
        short = (*tiny, *SHORT) if script == "train.py" else ()
        printed.append(run(world, script, *short, *arguments, cwd=tmp_path))
    made, shown, _, trained, _, compared = printed
    assert "lost 1 x image file is missing (1 records), first train.csv line 8: gibt es nicht.jpg" in made
    assert "lost 1 x row has more cells than the table has columns (1 records), first train.csv line 9: 5 for 3" in made
    assert "data/shards/mine/train/manifest.json: 6 images, 6 records, 2 records lost" in made
    assert "wrote data/shards/samples.html" in shown
    assert "starting from outputs/train/demo" in trained
    results = {
        name: json.loads((tmp_path / f"outputs/evaluate/{name}/results.json").read_text())
        for name in ("before", "after")
    }
    assert [results[name]["datasets"]["mine"]["count"] for name in results] == [6, 6]
    assert results["before"]["model"] != results["after"]["model"]
    assert re.findall(r"^(before|after) ", compared, flags=re.MULTILINE) == ["before", "after"]
    report = (tmp_path / "outputs/evaluate/after/report.html").read_text(encoding="utf-8")
    assert len(re.findall(r"data:image/\w+;base64,", report)) == 6
