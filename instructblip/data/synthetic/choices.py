"""Made-up files of the datasets whose answers are chosen among given ones, in the layouts of the official ones."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from instructblip.data.synthetic.scenes import SHAPES, Scene, write_picture
from instructblip.files import write_atomically, write_json


def _write_lines(path: Path, lines: Sequence[Any]) -> None:
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))


def write_vsr(raw: Path, splits: Mapping[str, Sequence[Scene]]) -> None:
    """A true statement and a false one about each image, by split: `zeroshot_test` is splits/zeroshot/test.jsonl."""
    for split, scenes in splits.items():
        lines = []
        for scene in scenes:
            name = f"{scene.number:012d}.jpg"
            write_picture(raw / "data/images" / name, scene)
            for true in (True, False):
                side = scene.side if true else scene.other_side
                fields = {"image": name, "image_link": f"http://images.cocodataset.org/train2017/{name}"}
                fields |= {"caption": scene.statement(true=true), "relation": f"at the {side} side of"}
                lines.append(fields | {"label": int(true), "subj": scene.named, "obj": "word"})
        _write_lines(raw / f"data/splits/{split.replace('_', '/')}.jsonl", lines)


def write_iconqa(raw: Path, splits: Mapping[str, Sequence[Scene]]) -> None:
    """A folder a problem with its picture, choices in words or in numbers."""
    listed = {}
    for split, scenes in splits.items():
        listed[f"choose_txt_{split}"] = [str(scene.number) for scene in scenes]
        for row, scene in enumerate(scenes):
            topic, choices = (("shape", list(SHAPES)), ("count", [1, 2, 3]))[row % 2]
            ((question, answer),) = scene.asked(topic)
            label = [str(choice) for choice in choices].index(answer)
            problem = {"question": question, "choices": choices, "answer": label, "ques_type": "choose_txt"}
            folder = raw / f"iconqa_data/iconqa/{split}/choose_txt/{scene.number}"
            write_json(folder / "data.json", {**problem, "grade": f"grade{row % 3 + 1}", "label": "S2"})
            write_picture(folder / "image.png", scene)
    write_json(raw / "iconqa_data/pid_splits.json", listed)


def write_scienceqa_img(raw: Path, splits: Mapping[str, Sequence[Scene]]) -> None:
    """Problems with a picture, every other one with a hint, and one without a picture in each split."""
    subjects = ("natural science", "social science", "language science")
    problems, listed = {}, {}
    for split, scenes in splits.items():
        listed[split] = [str(scene.number) for scene in scenes]
        for row, scene in enumerate(scenes):
            ((question, answer),) = scene.asked("shape")
            problem = {"question": question, "choices": list(SHAPES), "answer": SHAPES.index(answer), "split": split}
            problem |= {"hint": scene.captions(1)[0] if row % 2 else "", "image": "image.png", "task": "closed choice"}
            problem |= {"grade": f"grade{3 * (row % 3) + 2}", "subject": subjects[row % 3], "topic": "shapes"}
            problems[str(scene.number)] = problem | {"lecture": "", "solution": ""}
            write_picture(raw / "images" / split / str(scene.number) / "image.png", scene)
        without = str(scenes[-1].number + 1)
        listed[split].append(without)
        problems[without] = problem | {"image": None, "hint": ""}
    write_json(raw / "problems.json", problems)
    write_json(raw / "pid_splits.json", listed)


def write_hateful_memes(raw: Path, splits: Mapping[str, Sequence[Scene]]) -> None:
    """Harmless texts with labels in turn, which mean nothing; the test splits without labels."""
    for split, scenes in splits.items():
        lines = []
        for row, scene in enumerate(scenes):
            name = f"img/{scene.number:05d}.png"
            line = {"id": scene.number, "img": name, "text": f"the weather is {scene.color} today"}
            lines.append(line if split.startswith("test") else line | {"label": row % 2})
            write_picture(raw / name, scene)
        _write_lines(raw / f"{split}.jsonl", lines)
