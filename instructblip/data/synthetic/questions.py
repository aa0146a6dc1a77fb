"""Made-up files of the question answering datasets, in the layouts of the official ones."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from instructblip.data.readers.ocr_vqa import SPLIT_NUMBER
from instructblip.data.synthetic.captioning import write_rosetta
from instructblip.data.synthetic.scenes import COLORS, Scene, write_picture
from instructblip.files import write_json


def ten_answers(answer: str) -> list[str]:
    """What ten people say: eight the same, two something else."""
    return [answer] * 8 + ["unsure"] * 2


def write_vqav2(raw: Path, splits: Mapping[str, Sequence[Scene]]) -> None:
    """Questions and annotations in files of their own; test-dev is part of test, and neither has annotations."""
    for split, scenes in splits.items():
        if split == "test":
            scenes = [*splits["test-dev"], *scenes]
        year = {"train": "train2014", "val": "val2014"}.get(split, f"{split}2015")
        entries = _vqa_entries(raw, "test2015" if split.startswith("test") else year, scenes, "color", "count", "side")
        write_json(raw / f"v2_OpenEnded_mscoco_{year}_questions.json", _vqa_file("questions", year, entries))
        if not split.startswith("test"):
            annotations = _vqa_file("annotations", year, entries)
            write_json(raw / f"v2_mscoco_{year}_annotations.json", annotations)


def write_okvqa(raw: Path, splits: Mapping[str, Sequence[Scene]]) -> None:
    """As VQA 1.0's files, which the description tells them from; answers as typed beside their stems."""
    for split, scenes in splits.items():
        year = f"{split}2014"
        entries = _vqa_entries(raw, year, scenes, "shape", "word")
        for kind, name in (("questions", "OpenEnded_mscoco_{}_questions"), ("annotations", "mscoco_{}_annotations")):
            write_json(raw / f"{name.format(year)}.json", _vqa_file(kind, year, entries, "OK-VQA"))


def _vqa_entries(raw: Path, folder: str, scenes: Sequence[Scene], *topics: str) -> list[dict[str, Any]]:
    """Questions with their answers; the images are written on the way."""
    entries = []
    for scene in scenes:
        write_picture(raw / folder / f"COCO_{folder}_{scene.number:012d}.jpg", scene)
        for number, (question, answer) in enumerate(scene.asked(*topics)):
            ids = {"image_id": scene.number, "question_id": 1000 * scene.number + number}
            entries.append({**ids, "question": question, "answer": answer})
    return entries


def _vqa_file(kind: str, year: str, entries: Sequence[dict[str, Any]], name: str = "VQA") -> dict[str, Any]:
    info = {"description": f"Made-up records in the layout of {name}", "version": "2.0"}
    content = [_annotation(entry) if kind == "annotations" else _without_answer(entry) for entry in entries]
    return {"info": info, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": year, kind: content}


def _without_answer(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "answer"}


def _annotation(entry: dict[str, Any]) -> dict[str, Any]:
    answer = entry["answer"]
    people = [
        {"answer": said, "raw_answer": said, "answer_confidence": "yes", "answer_id": number}
        for number, said in enumerate(ten_answers(answer), 1)
    ]
    kind = "number" if answer.isdecimal() else "yes/no" if answer in ("yes", "no") else "other"
    fields = {"answer_type": kind, "question_type": " ".join(entry["question"].lower().split()[:2]), "answers": people}
    return {
        "image_id": entry["image_id"],
        "question_id": entry["question_id"],
        "multiple_choice_answer": answer,
        **fields,
    }


def write_aokvqa(raw: Path, splits: Mapping[str, Sequence[Scene]]) -> None:
    """Direct answers beside four choices; test has no answers."""
    for split, scenes in splits.items():
        entries = []
        for scene in scenes:
            ((question, answer),) = scene.asked("color")
            choices = [answer, *(color for color in COLORS if color != answer)][:4]
            shift = scene.number % 4
            choices = choices[shift:] + choices[:shift]
            entry = {"split": split, "image_id": scene.number, "question_id": f"synthetic{scene.number}"}
            entry |= {"question": question, "choices": choices, "difficult_direct_answer": False}
            if split != "test":
                entry |= {"correct_choice_idx": choices.index(answer), "direct_answers": ten_answers(answer)}
                entry["rationales"] = [text.lower() for text in scene.captions(3)]
            entries.append(entry)
            write_picture(raw / f"{split}2017" / f"{scene.number:012d}.jpg", scene)
        write_json(raw / f"aokvqa_v1p0_{split}.json", entries)


def write_ocr_vqa(raw: Path, splits: Mapping[str, Sequence[Scene]]) -> None:
    """One object of all covers, each with parallel lists of questions and answers."""
    books = {}
    for split, scenes in splits.items():
        for scene in scenes:
            book_id = f"{scene.number:010d}"
            books[book_id] = {
                "imageURL": f"http://covers.example/{scene.number}.jpg",
                "title": scene.word,
                "authorName": f"The author of {scene.word}",
                "genre": "Picture Books",
                "split": SPLIT_NUMBER[split],
                "questions": ["What is the title of this book?", "Is this a travel book?"],
                "answers": [scene.word, "No"],
            }
            write_picture(raw / "images" / f"{book_id}.jpg", scene)
    write_json(raw / "dataset.json", books)


def write_gqa(raw: Path, splits: Mapping[str, Sequence[Scene]]) -> None:
    """Balanced questions by their ids; test and challenge without answers."""
    types = {"color": ("query", "attr"), "side": ("verify", "rel"), "shape": ("query", "obj")}
    for split, scenes in splits.items():
        questions = {}
        for scene in scenes:
            for number, (topic, kinds) in enumerate(types.items()):
                ((question, answer),) = scene.asked(topic)
                entry: dict[str, Any] = {"question": question, "imageId": f"n{scene.number}", "isBalanced": True}
                if split not in ("test", "challenge"):
                    entry |= {"answer": answer, "fullAnswer": f"{answer.capitalize()}, that is so."}
                    entry["types"] = {"structural": kinds[0], "semantic": kinds[1], "detailed": f"{kinds[0]}{topic}"}
                questions[f"{scene.number}{number}"] = entry
            write_picture(raw / "images" / f"n{scene.number}.jpg", scene)
        write_json(raw / f"{split}_balanced_questions.json", questions)


def write_textvqa(raw: Path, splits: Mapping[str, Sequence[Scene]]) -> None:
    """Questions whose answer is written in the picture, and OCR tokens in a file of their own; test without answers."""
    for split, scenes in splits.items():
        entries = []
        for scene in scenes:
            image_id = f"{scene.number:016x}"
            for number, (question, answer) in enumerate(scene.asked("word", "color")):
                entry = {"question": question, "image_id": image_id, "question_id": 10 * scene.number + number}
                entry |= {"question_tokens": question.lower().split(), "image_classes": ["Sign"], "set_name": split}
                entries.append(entry if split == "test" else entry | {"answers": ten_answers(answer)})
            write_picture(raw / ("test_images" if split == "test" else "train_images") / f"{image_id}.jpg", scene)
        header = {"dataset_type": split, "dataset_name": "textvqa", "dataset_version": "0.5.1"}
        write_json(raw / f"TextVQA_0.5.1_{split}.json", {**header, "data": entries})
        write_rosetta(raw, split, scenes)


def write_vizwiz(raw: Path, splits: Mapping[str, Sequence[Scene]]) -> None:
    """One question an image; every third cannot be answered; test without answers."""
    for split, scenes in splits.items():
        entries = []
        for row, scene in enumerate(scenes):
            name, answerable = f"VizWiz_{split}_{scene.number:08d}.jpg", row % 3 != 2
            ((question, answer),) = scene.asked("word")
            entry: dict[str, Any] = {"image": name, "question": question if answerable else "What brand is this?"}
            if split != "test":
                said = ten_answers(answer) if answerable else ["unanswerable"] * 10
                entry["answers"] = [{"answer": text, "answer_confidence": "yes"} for text in said]
                entry |= {"answer_type": "other" if answerable else "unanswerable", "answerable": int(answerable)}
            entries.append(entry)
            write_picture(raw / split / name, scene)
        write_json(raw / f"Annotations/{split}.json", entries)
