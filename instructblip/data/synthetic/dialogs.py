"""Made-up files of the datasets of dialogues, in the layouts of the official ones."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from instructblip.data.readers.visdial import OPTIONS
from instructblip.data.synthetic.scenes import COLORS, Scene, write_picture
from instructblip.files import write_json

_VISDIAL_TOPICS = ("color", "count", "side")
_VISDIAL_ANSWERS = [*COLORS, "1", "2", "3", "yes", "no"]
_VISDIAL_ANSWERS += [f"maybe {number}" for number in range(4, 4 + OPTIONS)]  # enough to make the options of


def write_llava_conversation(raw: Path, splits: Mapping[str, Sequence[Scene]]) -> None:
    """Three questions and answers a dialogue."""
    dialogues = []
    for scene in splits["train"]:
        turns = []
        for question, answer in scene.asked("shape", "color", "word"):
            turns += [question, f"The answer is {answer}, as the picture shows {scene.things}."]
        dialogues.append(_dialogue(raw, scene, turns))
    write_json(raw / "conversation_58k.json", dialogues)


def write_llava_detail(raw: Path, splits: Mapping[str, Sequence[Scene]]) -> None:
    """One long answer."""
    dialogues = [
        _dialogue(raw, scene, ["Describe the picture in detail.", " ".join(scene.captions(3))])
        for scene in splits["train"]
    ]
    write_json(raw / "detail_23k.json", dialogues)


def write_llava_reasoning(raw: Path, splits: Mapping[str, Sequence[Scene]]) -> None:
    """One answer that gives its reasons."""
    dialogues = []
    for scene in splits["train"]:
        question = f"Would somebody who looks for {scene.things} be content with this picture?"
        reasons = (
            f"Yes. {scene.statement(true=True)} Nothing else of that kind is to be seen.\n\nSo the search can end."
        )
        dialogues.append(_dialogue(raw, scene, [question, reasons]))
    write_json(raw / "complex_reasoning_77k.json", dialogues)


def _dialogue(raw: Path, scene: Scene, turns: Sequence[str]) -> dict[str, Any]:
    """An entry; the place of the image stands before or after its first question, as in the official files."""
    name = f"{scene.number:012d}.jpg"
    write_picture(raw / "train2017" / name, scene)
    said = [f"<image>\n{turns[0]}" if scene.number % 2 else f"{turns[0]}\n<image>", *turns[1:]]
    conversation = [{"from": ("human", "gpt")[row % 2], "value": text} for row, text in enumerate(said)]
    return {"id": f"{scene.number:012d}", "image": name, "conversations": conversation}


def write_visdial(raw: Path, splits: Mapping[str, Sequence[Scene]]) -> None:
    """Dialogs of three rounds with 100 options each; the last round of test has no answer; one round of the others is
    annotated densely."""
    for split, scenes in splits.items():
        questions: list[str] = []
        dialogs, dense = [], []
        for scene in scenes:
            rounds = []
            for question, answer in scene.asked(*_VISDIAL_TOPICS):
                if question not in questions:
                    questions.append(question)
                rounds.append(_round(questions.index(question), _VISDIAL_ANSWERS.index(answer), scene.number))
            if split == "test":
                del rounds[-1]["answer"], rounds[-1]["gt_index"]
            else:
                scores = [0.0] * OPTIONS
                scores[rounds[1]["gt_index"]], scores[(rounds[1]["gt_index"] + 1) % OPTIONS] = 1.0, 0.4
                key = "relevance" if split == "train" else "gt_relevance"
                dense.append({"image_id": scene.number, "round_id": 2, key: scores})
            dialogs.append({"image_id": scene.number, "caption": scene.captions(1)[0].lower(), "dialog": rounds})
            folder, name = ("train2014", "COCO_train2014") if split == "train" else (f"VisualDialog_{split}2018",) * 2
            write_picture(raw / folder / f"{name}_{scene.number:012d}.jpg", scene)
        data = {"questions": questions, "answers": _VISDIAL_ANSWERS, "dialogs": dialogs}
        write_json(raw / f"visdial_1.0_{split}.json", {"version": "1.0", "split": split, "data": data})
        if dense:
            write_json(raw / f"visdial_1.0_{split}_dense_annotations.json", dense)


def _round(question: int, answer: int, place: int) -> dict[str, Any]:
    """A round whose right option stands at a place that its dialog's number decides."""
    options = [number for number in range(len(_VISDIAL_ANSWERS)) if number != answer][: OPTIONS - 1]
    gt_index = 7 * place % OPTIONS
    options.insert(gt_index, answer)
    return {"question": question, "answer": answer, "answer_options": options, "gt_index": gt_index}
