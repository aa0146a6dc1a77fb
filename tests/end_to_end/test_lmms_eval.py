"""lmms-eval itself asks the model: its own tasks over local files, beside our evaluation of the same questions.

It runs where lmms-eval is installed (requirements-lmms-eval.txt says how), which wants an environment of its own.
"""

import importlib.util
import io
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import InstructBlipForConditionalGeneration
from transformers.utils import logging as transformers_logging

import instructblip
from instructblip.config.schema import EvaluateConfig
from instructblip.data.cards import load_card
from instructblip.data.prepare.convert import prepare_dataset
from instructblip.evaluation.run import evaluate
from tests.kit.raw_files import write_images, write_raw_json
from tests.kit.runs import compose, read_lines
from tests.kit.tiny import tiny_huggingface

HAS_LMMS_EVAL = importlib.util.find_spec("lmms_eval") is not None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_LMMS_EVAL, reason="lmms-eval is not installed (requirements-lmms-eval.txt)"),
]
ROOT = Path(__file__).parents[2]
GQA = {
    "0215": "Is the SKY dark?",
    "0216": "What is on the table?",
    "0217": "Who, if any, is left?",
    "0218": "Is it red?",
}
TEXTVQA = {34602: "what is the Brand of this camera?", 34603: "What does it say?", 34604: "who made it?"}
COLORS = ["red", "green", "light blue"]
GQA_PROMPT = "{}\nAnswer the question using a single word or phrase."
FOUND_IN = "what lmms-eval's own class answers under transformers 5"


@dataclass(frozen=True)
class Scored:
    """What an evaluation gave: each dataset's score between 0 and 1, and the answers by question id."""

    scores: Mapping[str, float]
    answers: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Local:
    """A folder of transformers, raw files of two datasets, and lmms-eval's tasks over the same pictures and answers."""

    folder: Path
    weights: Path
    tasks: Path


def few_words(model: InstructBlipForConditionalGeneration, tokenizer: Any) -> None:
    """Leave to a random model some letters and the end of the text: answers that a data set could have."""
    head = model.language_model.lm_head.weight
    kept = [
        token
        for token in range(len(tokenizer))
        if (text := tokenizer.decode([token])).strip().isalpha() and text.isascii() and text.islower() and len(text) > 1
    ]
    with torch.no_grad():
        mask = torch.zeros(len(head), 1)
        mask[kept], mask[tokenizer.eos_token_id] = 1.0, 1.5
        head.mul_(mask)


def write_weights(folder: Path) -> None:
    model = tiny_huggingface(folder, positions=2048)
    with torch.no_grad():
        few_words(model, instructblip.load(folder, device="cpu").llm.prompt_format.tokenizer)
    model.save_pretrained(folder)


def picture_rows(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    return [{"bytes": (folder / name).read_bytes(), "path": name} for name in names]


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    import datasets

    columns = {name: [row[name] for row in rows] for name in rows[0]}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).to_parquet(str(path))


def write_task(tasks: Path, name: str, given: str, **changes: Any) -> None:
    """The harness's own task file with its data turned to a local one."""
    import lmms_eval.tasks

    folder = Path(lmms_eval.tasks.__file__).parent
    tasks.mkdir(parents=True, exist_ok=True)
    lines = {"include": str(folder / given), "task": name, "dataset_path": "parquet", "dataset_name": None, **changes}
    (tasks / f"{name}.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items()))


def write_gqa(local: Local, model: Any) -> None:
    """Half of the answers are the model's own, in capitals and with a full stop."""
    raw, questions, rows = local.folder / "raw/gqa", {}, []
    for number, (key, question) in enumerate(GQA.items()):
        picture = f"n{number % 2}"
        image = Image.open(raw / f"images/{picture}.jpg").convert("RGB")
        (text,) = model.generate([image], [GQA_PROMPT.format(question)], max_new_tokens=16, min_new_tokens=0)
        answer = f"{text.upper()}." if number % 2 else "yes"
        questions[key] = {"question": question, "imageId": picture, "answer": answer, "isBalanced": True}
        (shown,) = picture_rows(raw / "images", [f"{picture}.jpg"])
        rows.append({"id": key, "imageId": picture, "question": question, "answer": answer, "image": shown})
    write_raw_json(raw / "testdev_balanced_questions.json", questions)
    write_parquet(local.folder / "parquet/gqa.parquet", rows)


def write_textvqa(local: Local, model: Any) -> None:
    """Of ten people none, two or four give the model's own answer."""
    raw, entries, rows = local.folder / "raw/textvqa", [], []
    for number, (key, question) in enumerate(TEXTVQA.items()):
        picture = f"00{number % 2}"
        image = Image.open(raw / f"train_images/{picture}.jpg").convert("RGB")
        prompt = GQA_PROMPT.format(question.capitalize())
        (text,) = model.generate([image], [prompt], max_new_tokens=1024, min_new_tokens=0)
        answers = [f"The {text}"] * (2 * number) + ["dakota"] * (10 - 2 * number)
        entry = {"question_id": key, "image_id": picture, "question": question, "answers": answers}
        entries.append(entry | {"set_name": "val", "image_classes": ["Camera"]})
        (shown,) = picture_rows(raw / "train_images", [f"{picture}.jpg"])
        rows.append(entry | {"image": shown})
    write_raw_json(raw / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": entries})
    ocr = [{"image_id": f"00{number}", "ocr_tokens": [], "ocr_info": []} for number in range(2)]
    write_raw_json(raw / "TextVQA_Rosetta_OCR_v0.2_val.json", {"dataset_type": "val", "data": ocr})
    write_parquet(local.folder / "parquet/textvqa.parquet", rows)


def write_choices(local: Local) -> None:
    rows = [
        {"image": shown, "question": "What color is it?", "choices": COLORS, "label": number}
        for number in range(2)
        for shown in picture_rows(local.folder / "raw/gqa/images", [f"n{number}.jpg"])
    ]
    write_parquet(local.folder / "parquet/choices.parquet", rows)
    task = {
        "task": "local_choices",
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(local.folder / "parquet/choices.parquet")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_visual": "image",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (local.tasks / "local_choices.yaml").write_text(json.dumps(task))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    """The files; lmms-eval finds our registration among installed packages, as pip leaves it there."""
    folder = tmp_path_factory.mktemp("lmms_eval")
    found = Local(folder, folder / "weights", folder / "tasks")
    with pytest.MonkeyPatch.context() as patch:
        write_registration(folder / "site")
        patch.syspath_prepend(str(folder / "site"))
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        transformers_logging.disable_progress_bar()
        write_weights(found.weights)
        write_images(folder / "raw/gqa/images", "n0.jpg", "n1.jpg")
        write_images(folder / "raw/textvqa/train_images", "000.jpg", "001.jpg")
        model = instructblip.load(found.weights, device="cpu")
        write_gqa(found, model)
        write_textvqa(found, model)
        files = {name: str(folder / f"parquet/{name}.parquet") for name in ("gqa", "textvqa")}
        gqa, textvqa = (
            {"data_files": {split: files[name]}} for name, split in (("gqa", "testdev"), ("textvqa", "validation"))
        )
        write_task(found.tasks, "local_gqa", "gqa/gqa.yaml", process_docs=None, dataset_kwargs=gqa)
        write_task(found.tasks, "local_textvqa", "textvqa/textvqa_val.yaml", dataset_kwargs=textvqa)
        write_choices(found)
        yield found


def write_registration(site: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = site / "instructblip-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: instructblip\nVersion: 0\n")
    points = project["entry-points"]["lmms_eval.models"].items()
    (info / "entry_points.txt").write_text(
        "[lmms_eval.models]\n" + "".join(f"{key} = {place}\n" for key, place in points)
    )


def asked_by_lmms_eval(local: Local, model: str, tasks: Sequence[str], batch_size: int) -> dict[str, Any]:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    return simple_evaluate(
        model=model,
        model_args=f"pretrained={local.weights}",
        tasks=list(tasks),
        device="cpu",
        batch_size=batch_size,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(local.tasks), include_defaults=False, model_name=model),
        cli_args=SimpleNamespace(output_path=str(local.folder / "lmms"), process_with_media=False, reasoning_tags=None),
        process_docs_parallel=1,
    )


def scored(found: Mapping[str, Any]) -> Scored:
    """lmms-eval's results of both generative tasks."""
    ids = {"local_gqa": list(GQA), "local_textvqa": [str(key) for key in TEXTVQA]}
    answers = {
        task: {ids[task][sample["doc_id"]]: sample["filtered_resps"][0] for sample in found["samples"][task]}
        for task in ids
    }
    return Scored({task: found["results"][task]["exact_match,none"] for task in ids}, answers)


@pytest.fixture(scope="module")
def through_the_plug_in(local: Local) -> dict[str, Any]:
    return asked_by_lmms_eval(local, "instructblip_native", ["local_gqa", "local_textvqa", "local_choices"], 3)


@pytest.fixture(scope="module")
def ours(local: Local) -> Scored:
    """`evaluate.py preset=lmms_eval` on shards of the same raw files."""
    for name, split in (("gqa", "testdev"), ("textvqa", "val")):
        prepare_dataset(
            load_card(name), local.folder / "raw" / name, local.folder / "shards", splits=[split], progress=False
        )
    arguments = [
        f"checkpoint={local.weights}",
        "suite=lmms_eval",
        "suite.held_out=[gqa,textvqa]",
        "preset=lmms_eval",
        f"data.shards={local.folder / 'shards'}",
        f"output={local.folder / 'evaluate'}",
        "blind_baseline=false",
        "batch_size=2",
        "device=cpu",
    ]
    config = compose("evaluate", EvaluateConfig, arguments)
    evaluate(config, Console(file=io.StringIO()))
    folder = local.folder / "evaluate" / config.name
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))["datasets"]
    tasks = {"local_gqa": "gqa", "local_textvqa": "textvqa"}
    answers = {
        task: {
            line["id"].partition("/")[2]: line["prediction"] for line in read_lines(folder / name / "predictions.jsonl")
        }
        for task, name in tasks.items()
    }
    return Scored({task: results[name]["value"] / 100 for task, name in tasks.items()}, answers)


def test_answers_and_scores_equal_those_of_our_own_evaluation(
    through_the_plug_in: dict[str, Any], ours: Scored
) -> None:
    found = scored(through_the_plug_in)
    assert found.answers == ours.answers
    assert all(text for answers in ours.answers.values() for text in answers.values())
    assert found.scores == pytest.approx(ours.scores)
    assert ours.scores == pytest.approx({"local_gqa": 2 / 4, "local_textvqa": (0 + 0.6 + 1.0) / 3})


def test_its_own_class_answers_otherwise(local: Local, ours: Scored) -> None:
    """Under transformers 5 what it calls an answer begins with the prompt, so nothing that it writes is ever right."""
    own = scored(asked_by_lmms_eval(local, "instructblip", ["local_gqa", "local_textvqa"], 1))
    print(f"\nlmms-eval's own class {dict(own.scores)}\ninstructblip_native  {dict(ours.scores)}")
    assert own.scores == {"local_gqa": 0.0, "local_textvqa": 0.0}
    for key, question in GQA.items():
        assert own.answers["local_gqa"][key].startswith(question), FOUND_IN


def test_a_multiple_choice_is_decided_by_the_likeliest_text(local: Local, through_the_plug_in: dict[str, Any]) -> None:
    model = instructblip.load(local.weights, device="cpu")
    images = [Image.open(local.folder / f"raw/gqa/images/n{number}.jpg").convert("RGB") for number in range(2)]
    rows = model.rank(images, ["What color is it?"] * 2, [COLORS] * 2, include_eos=False)
    right = [int(row.argmax()) == number for number, row in enumerate(rows)]
    assert through_the_plug_in["results"]["local_choices"]["acc,none"] == sum(right) / len(right)
    for row, sample in zip(rows, through_the_plug_in["samples"]["local_choices"], strict=True):
        losses = [loss for loss, _ in sample["filtered_resps"]]
        assert losses == pytest.approx((-row).tolist(), abs=1e-4)


_RANKS = """
import json, sys
from pathlib import Path
import instructblip
from tests.end_to_end.test_lmms_eval import Local, asked_by_lmms_eval, scored
folder, out = Path(sys.argv[1]), sys.argv[2]
found = asked_by_lmms_eval(Local(folder, folder / "weights", folder / "tasks"), "instructblip_native", ["local_gqa"], 2)
if found is not None:
    samples = {sample["doc_id"]: sample["filtered_resps"][0] for sample in found["samples"]["local_gqa"]}
    Path(out).write_text(json.dumps([found["results"]["local_gqa"]["exact_match,none"], samples]))
"""


def test_two_processes_share_the_questions_and_give_the_same_score(local: Local, ours: Scored, tmp_path: Path) -> None:
    script, out = tmp_path / "ask.py", tmp_path / "found.json"
    script.write_text(_RANKS)
    paths = [str(local.folder / "site"), str(ROOT), *sys.path]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run(
        [*start, str(script), str(local.folder), str(out)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        check=True,
        cwd=tmp_path,
        timeout=600,  # a rank that waits for another is no reason to wait on
    )
    score, answers = json.loads(out.read_text())
    assert score == pytest.approx(ours.scores["local_gqa"])
    assert {list(GQA)[int(number)]: text for number, text in answers.items()} == ours.answers["local_gqa"]
