"""Made-up files of the question answering datasets, in the layouts of the official ones."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from instructblip.data.readers import aokvqa, easy_vqa, gqa, textvqa, vizwiz
from instructblip.data.readers.ocr_vqa import SPLIT_NUMBER
from instructblip.data.synthetic.captioning import write_rosetta
from instructblip.data.synthetic.scenes import COLORS, MadeUpSplit, write_coco_picture, write_picture
from instructblip.files import write_json


def ten_answers(answer: str) -> list[str]:
    """What ten people say: eight the same, two something else."""
    return [answer] * 8 + ["unsure"] * 2


def write_vqa(splits: Sequence[MadeUpSplit]) -> None:
    """Questions and, where the card has a file for them, annotations; answers as typed beside their stems."""
    for split in splits:
        questions, annotations = [], []
        for scene in split.scenes:
            write_coco_picture(split.place("images"), scene)
            for number, (question, answer) in enumerate(scene.asked("color", "count", "side")):
                ids = {"image_id": scene.number, "question_id": 1000 * scene.number + number}
                questions.append({**ids, "question": question})
                annotations.append(ids | _annotation(question, answer))
        known = split.source.options.get("description", "VQA")
        info = {"description": f"Made-up records in the layout of {known}", "version": "2.0"}
        header = {"info": info, "task_type": "Open-Ended", "data_type": "mscoco", "data_subtype": split.name}
        write_json(split.place("questions"), header | {"questions": questions})
        if split.has("annotations"):
            write_json(split.place("annotations"), header | {"annotations": annotations})


def _annotation(question: str, answer: str) -> dict[str, Any]:
    people = [
        {"answer": said, "raw_answer": said, "answer_confidence": "yes", "answer_id": number}
        for number, said in enumerate(ten_answers(answer), 1)
    ]
    kind = "number" if answer.isdecimal() else "yes/no" if answer in ("yes", "no") else "other"
    fields = {"answer_type": kind, "question_type": " ".join(question.lower().split()[:2])}
    return fields | {"answers": people, "multiple_choice_answer": answer}


def write_aokvqa(splits: Sequence[MadeUpSplit]) -> None:
    """Direct answers beside four choices; test has no answers."""
    for split in splits:
        entries = []
        for scene in split.scenes:
            ((question, answer),) = scene.asked("color")
            choices = [answer, *(color for color in COLORS if color != answer)][:4]
            shift = scene.number % 4
            choices = choices[shift:] + choices[:shift]
            entry = {"split": split.name, "image_id": scene.number, "question_id": f"synthetic{scene.number}"}
            entry |= {"question": question, "choices": choices, "difficult_direct_answer": False}
            if split.name != aokvqa.HIDDEN_SPLIT:
                entry |= {"correct_choice_idx": choices.index(answer), "direct_answers": ten_answers(answer)}
                entry["rationales"] = [text.lower() for text in scene.captions(3)]
            entries.append(entry)
            write_coco_picture(split.place("images"), scene)
        write_json(split.place("annotations"), entries)


def write_ocr_vqa(splits: Sequence[MadeUpSplit]) -> None:
    """One object of all covers, each with parallel lists of questions and answers."""
    files: dict[Path, dict[str, Any]] = {}
    for split in splits:
        books = files.setdefault(split.place("annotations"), {})
        for scene in split.scenes:
            book_id = f"{scene.number:010d}"
            books[book_id] = {
                "imageURL": f"http://covers.example/{scene.number}.jpg",
                "title": scene.word,
                "authorName": f"The author of {scene.word}",
                "genre": "Picture Books",
                "split": SPLIT_NUMBER[split.name],
                "questions": ["What is the title of this book?", "Is this a travel book?"],
                "answers": [scene.word, "No"],
            }
            write_picture(split.place("images") / f"{book_id}.jpg", scene)
    for path, books in files.items():
        write_json(path, books)


def write_gqa(splits: Sequence[MadeUpSplit]) -> None:
    """Balanced questions by their ids; test and challenge without answers; one file where the card names a folder."""
    types = {"color": ("query", "attr"), "side": ("verify", "rel"), "shape": ("query", "obj")}
    for split in splits:
        questions = {}
        for scene in split.scenes:
            for number, (topic, kinds) in enumerate(types.items()):
                ((question, answer),) = scene.asked(topic)
                entry: dict[str, Any] = {"question": question, "imageId": f"n{scene.number}", "isBalanced": True}
                if split.name not in gqa.UNLABELLED_SPLITS:
                    entry |= {"answer": answer, "fullAnswer": f"{answer.capitalize()}, that is so."}
                    entry["types"] = {"structural": kinds[0], "semantic": kinds[1], "detailed": f"{kinds[0]}{topic}"}
                questions[f"{scene.number}{number}"] = entry
            write_picture(split.place("images") / f"n{scene.number}.jpg", scene)
        path = split.place("questions")
        write_json(path if path.suffix else path / f"{path.name}_0.json", questions)


def write_textvqa(splits: Sequence[MadeUpSplit]) -> None:
    """Questions whose answer is written in the picture, and OCR tokens in a file of their own; test without answers."""
    for split in splits:
        entries = []
        for scene in split.scenes:
            image_id = f"{scene.number:016x}"
            for number, (question, answer) in enumerate(scene.asked("word", "color")):
                entry = {"question": question, "image_id": image_id, "question_id": 10 * scene.number + number}
                entry |= {"question_tokens": question.lower().split(), "set_name": split.name}
                hidden = split.name == textvqa.UNLABELLED_SPLIT
                entries.append(entry if hidden else entry | {"answers": ten_answers(answer)})
            write_picture(split.place("images") / f"{image_id}.jpg", scene)
        header = {"dataset_type": split.name, "dataset_name": "textvqa", "dataset_version": "0.5.1"}
        write_json(split.place("questions"), {**header, "data": entries})
        write_rosetta(split)


def write_vizwiz(splits: Sequence[MadeUpSplit]) -> None:
    """One question an image; every third cannot be answered; test without answers."""
    for split in splits:
        entries = []
        for row, scene in enumerate(split.scenes):
            name, answerable = f"VizWiz_{split.name}_{scene.number:08d}.jpg", row % 3 != 2
            ((question, answer),) = scene.asked("word")
            entry: dict[str, Any] = {"image": name, "question": question if answerable else "What brand is this?"}
            if split.name != vizwiz.UNLABELLED_SPLIT:
                said = ten_answers(answer) if answerable else ["unanswerable"] * 10
                entry["answers"] = [{"answer": text, "answer_confidence": "yes"} for text in said]
                entry |= {"answer_type": "other" if answerable else "unanswerable", "answerable": int(answerable)}
            entries.append(entry)
            write_picture(split.place("images") / name, scene)
        write_json(split.place("questions"), entries)


def write_easy_vqa(splits: Sequence[MadeUpSplit]) -> None:
    """The package's two folders; train and validation share one, where a picture's number decides whose it is."""
    files: dict[Path, list[list[Any]]] = {}
    for split in splits:
        package = easy_vqa.PACKAGE_SPLIT[split.name]
        folder, number = split.source.raw / package, split.scenes[0].number
        asked = files.setdefault(folder / "questions.json", [])
        for scene in split.scenes:
            while easy_vqa.split_of_image(package, number) != split.name:
                number += 1
            shape = "rectangle" if scene.shape == "square" else scene.shape
            color = (
                scene.color if scene.color in easy_vqa.COLORS else "black"
            )  # the package knows neither purple nor orange
            asked += [["what shape is in the image?", shape, number], ["what color is the shape?", color, number]]
            asked += [[f"is there a {shape}?", "yes", number], ["is there not a gray shape?", "yes", number]]
            write_picture(folder / "images" / f"{number}.png", replace(scene, color=color))
            number += 1
    for path, questions in files.items():
        write_json(path, questions)


WRITERS = {
    "aokvqa": write_aokvqa,
    "easy_vqa": write_easy_vqa,
    "gqa": write_gqa,
    "ocr_vqa": write_ocr_vqa,
    "textvqa": write_textvqa,
    "vizwiz": write_vizwiz,
    "vqa": write_vqa,
}
