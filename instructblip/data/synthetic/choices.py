"""Made-up files of the datasets whose answers are chosen among given ones, in the layouts of the official ones."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from instructblip.data.readers.hateful_memes import UNLABELLED_SPLITS
from instructblip.data.synthetic.scenes import SHAPES, MadeUpSplit, write_coco_picture, write_picture
from instructblip.files import write_atomically, write_json


def _write_lines(path: Path, lines: Sequence[Any]) -> None:
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))


def write_vsr(splits: Sequence[MadeUpSplit]) -> None:
    """A true statement and a false one about each image."""
    for split in splits:
        lines = []
        for scene in split.scenes:
            name = write_coco_picture(split.place("images"), scene)
            for true in (True, False):
                side = scene.side if true else scene.other_side
                fields = {"image": name, "image_link": f"http://images.cocodataset.org/train2017/{name}"}
                fields |= {"caption": scene.statement(true=true), "relation": f"at the {side} side of"}
                lines.append(fields | {"label": int(true), "subj": scene.named, "obj": "word"})
        _write_lines(split.place("statements"), lines)


def write_iconqa(splits: Sequence[MadeUpSplit]) -> None:
    """A folder a problem with its picture, choices in words or in numbers."""
    listed: dict[Path, dict[str, list[str]]] = {}
    for split in splits:
        pids = [str(scene.number) for scene in split.scenes]
        listed.setdefault(split.place("pid_splits"), {})[f"choose_txt_{split.name}"] = pids
        for row, scene in enumerate(split.scenes):
            topic, choices = (("shape", list(SHAPES)), ("count", [1, 2, 3]))[row % 2]
            ((question, answer),) = scene.asked(topic)
            label = [str(choice) for choice in choices].index(answer)
            problem = {"question": question, "choices": choices, "answer": label, "ques_type": "choose_txt"}
            folder = split.place("problems") / str(scene.number)
            write_json(folder / "data.json", {**problem, "grade": f"grade{row % 3 + 1}", "label": "S2"})
            write_picture(folder / "image.png", scene)
    for path, keys in listed.items():
        write_json(path, keys)


def write_scienceqa_img(splits: Sequence[MadeUpSplit]) -> None:
    """Problems with a picture, every other one with a hint, and one without a picture in each split."""
    subjects = ("natural science", "social science", "language science")
    problems: dict[Path, dict[str, Any]] = {}
    listed: dict[Path, dict[str, list[str]]] = {}
    for split in splits:
        found = problems.setdefault(split.place("problems"), {})
        pids = listed.setdefault(split.place("pid_splits"), {}).setdefault(split.name, [])
        for row, scene in enumerate(split.scenes):
            ((question, answer),) = scene.asked("shape")
            problem = {"question": question, "choices": list(SHAPES), "answer": SHAPES.index(answer)}
            problem |= {"hint": scene.captions(1)[0] if row % 2 else "", "image": "image.png", "task": "closed choice"}
            problem |= {"grade": f"grade{3 * (row % 3) + 2}", "subject": subjects[row % 3], "topic": "shapes"}
            found[str(scene.number)] = problem | {"split": split.name, "lecture": "", "solution": ""}
            pids.append(str(scene.number))
            write_picture(split.place("images") / str(scene.number) / "image.png", scene)
        without = str(split.scenes[-1].number + 1)
        pids.append(without)
        found[without] = found[pids[0]] | {"image": None, "hint": ""}
    for path, content in (*problems.items(), *listed.items()):
        write_json(path, content)


def write_hateful_memes(splits: Sequence[MadeUpSplit]) -> None:
    """Harmless texts with labels in turn, which mean nothing; the test splits without labels."""
    for split in splits:
        lines = []
        for row, scene in enumerate(split.scenes):
            name = f"{scene.number:05d}.png"
            line = {"id": scene.number, "img": f"img/{name}", "text": f"the weather is {scene.color} today"}
            lines.append(line if split.name in UNLABELLED_SPLITS else line | {"label": row % 2})
            write_picture(split.place("images") / name, scene)
        _write_lines(split.place("memes"), lines)


def write_folders(splits: Sequence[MadeUpSplit]) -> None:
    """A folder for each shape; for each class where the card names them, the novel ones first."""
    for split in splits:
        options = split.source.options
        classes = [*options.get("novel", []), *options.get("named", [])]
        for row, scene in enumerate(split.scenes):
            name = classes[row % len(classes)] if classes else scene.shape
            write_picture(split.place("folder") / name / f"{scene.number}.png", scene)


WRITERS = {
    "folders": write_folders,
    "hateful_memes": write_hateful_memes,
    "iconqa": write_iconqa,
    "scienceqa_img": write_scienceqa_img,
    "vsr": write_vsr,
}
