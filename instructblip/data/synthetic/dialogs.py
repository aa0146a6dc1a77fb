"""Made-up files of the datasets of dialogues, in the layouts of the official ones."""

from collections.abc import Sequence
from typing import Any

from instructblip.data.readers.visdial import OPTIONS, UNLABELLED_SPLIT
from instructblip.data.synthetic.scenes import COLORS, MadeUpSplit, write_coco_picture
from instructblip.files import write_json

_VISDIAL_TOPICS = ("color", "count", "side")
_VISDIAL_ANSWERS = [*COLORS, "1", "2", "3", "yes", "no"]
_VISDIAL_ANSWERS += [f"maybe {number}" for number in range(4, 4 + OPTIONS)]  # enough to make the options of


def write_llava(splits: Sequence[MadeUpSplit]) -> None:
    """Dialogues of two short answers and a long one; the image's mark stands before or after the first question."""
    for split in splits:
        dialogues = []
        for scene in split.scenes:
            turns = []
            for question, answer in scene.asked("shape", "color"):
                turns += [question, f"The answer is {answer}, as the picture shows {scene.things}."]
            turns += [
                "Describe the picture in detail.",
                f"{' '.join(scene.captions(3))}\n\nNothing else is to be seen.",
            ]
            turns[0] = f"<image>\n{turns[0]}" if scene.number % 2 else f"{turns[0]}\n<image>"
            conversation = [{"from": ("human", "gpt")[row % 2], "value": text} for row, text in enumerate(turns)]
            name = write_coco_picture(split.place("images"), scene)
            dialogues.append({"id": f"{scene.number:012d}", "image": name, "conversations": conversation})
        write_json(split.place("annotations"), dialogues)


def write_visdial(splits: Sequence[MadeUpSplit]) -> None:
    """Dialogs of three rounds with 100 options each; the last round of test has no answer; one round of each dialog is
    annotated densely where the card has a file for it."""
    for split in splits:
        questions: list[str] = []
        dialogs, dense = [], []
        for scene in split.scenes:
            rounds = []
            for question, answer in scene.asked(*_VISDIAL_TOPICS):
                if question not in questions:
                    questions.append(question)
                rounds.append(_round(questions.index(question), _VISDIAL_ANSWERS.index(answer), scene.number))
            if split.name == UNLABELLED_SPLIT:
                del rounds[-1]["answer"], rounds[-1]["gt_index"]
            scores = [0.0] * OPTIONS
            scores[rounds[1]["gt_index"]], scores[(rounds[1]["gt_index"] + 1) % OPTIONS] = 1.0, 0.4
            key = "relevance" if split.name == "train" else "gt_relevance"
            dense.append({"image_id": scene.number, "round_id": 2, key: scores})
            dialogs.append({"image_id": scene.number, "caption": scene.captions(1)[0].lower(), "dialog": rounds})
            write_coco_picture(split.place("images"), scene)
        data = {"questions": questions, "answers": _VISDIAL_ANSWERS, "dialogs": dialogs}
        write_json(split.place("dialogs"), {"version": "1.0", "split": split.name, "data": data})
        if split.has("dense"):
            write_json(split.place("dense"), dense)


def _round(question: int, answer: int, place: int) -> dict[str, Any]:
    """A round whose right option stands at a place that its dialog's number decides."""
    options = [number for number in range(len(_VISDIAL_ANSWERS)) if number != answer][: OPTIONS - 1]
    gt_index = 7 * place % OPTIONS
    options.insert(gt_index, answer)
    return {"question": question, "answer": answer, "answer_options": options, "gt_index": gt_index}


WRITERS = {"llava": write_llava, "visdial": write_visdial}
