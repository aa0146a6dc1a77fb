"""BLIP through the evaluation's protocols: LAVIS's retrieval scores, captions, answers, whatever the batch."""

import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from instructblip.data.cards import load_card
from instructblip.data.prepare.convert import prepare_dataset
from instructblip.data.records import Record
from instructblip.distributed import Ranks
from instructblip.evaluation.journal import Journal
from instructblip.evaluation.outcomes import TaskResult
from instructblip.evaluation.protocol import EvaluationSample, Task, make_task
from instructblip.evaluation.retrieval import answer_pairs
from instructblip.evaluation.runner import answer_share, read_pixels, run_task
from instructblip.models.base import Model
from tests.kit.blip import SIDE, tiny_caption, tiny_pretrain, tiny_retrieval, tiny_vqa
from tests.kit.synthetic_tasks import synthetic_task
from tests.kit.tiny import write_easy_vqa
from tests.kit.vectors import TOLERANCE, blip_images, blip_pretrain, blip_retrieval, case


def released_task(rerank: int) -> Task:
    """Six images and their captions, as in the vectors."""
    samples = tuple(
        EvaluationSample(
            f"r/{number}",
            SimpleNamespace(path=Path("shard")),  # type: ignore[arg-type]
            number,
            Record(str(number), "captions", captions=(text,)),
            "",
        )
        for number, text in enumerate(case("blip_med", "match")["texts"])
    )
    protocol = SimpleNamespace(rerank=rerank, max_text_tokens=35, mode="retrieve", text_processor="none")
    texts = tuple(text for sample in samples for text in sample.record.captions)
    return Task(SimpleNamespace(name="r"), protocol, samples, None, texts)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [blip_retrieval, blip_pretrain])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_scores_of_retrieval_are_the_released_code_s(make: Callable[[], Any], batch_size: int) -> None:
    model, vectors = make(), case("blip_med", "rerank_k3")
    with torch.no_grad():
        tokens: Tensor = blip_images(model, vectors)
    task = released_task(vectors["k_test"])
    journal = Journal(None, keys := [sample.id for sample in task.samples])
    answer_pairs(model, task, lambda shard, row: tokens[row], journal, keys, batch_size=batch_size, show=False)
    found = [journal.predictions[key] for key in keys]
    captions = [row for prediction in found for row in prediction.captions]
    for rankings, name in ((found, "score_i2t"), (captions, "score_t2i")):
        for ranking, row_C in zip(rankings, vectors["expected"][name], strict=True):
            best = row_C.sort(descending=True)
            assert list(ranking.ranked) == best.indices[:3].tolist()
            torch.testing.assert_close(torch.tensor(ranking.scores), best.values[:3], **TOLERANCE)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    write_easy_vqa(folder / "raw", images=12)
    prepare_dataset(load_card("easy_vqa"), folder / "raw", folder / "shards", progress=False)
    return folder / "shards"


def answer(model: Model, task: Task, **options: Any) -> TaskResult:
    return run_task(model, task, read_pixels(SIDE), show_progress=False, **options)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["paper", "lavis"])
def test_ranked_answers_do_not_depend_on_the_batch(preset: str, shards: Path) -> None:
    model, task = tiny_vqa(), make_task(load_card("easy_vqa_yes_no"), shards, samples=20, preset=preset)
    alone, together = answer(model, task, batch_size=1), answer(model, task, batch_size=16)
    assert len({item.scores for item in alone.predictions}) > 5
    for ours, theirs in zip(alone.predictions, together.predictions, strict=True):
        assert ours.prediction == theirs.prediction
        assert ours.scores == pytest.approx(theirs.scores, abs=1e-4)


def test_the_released_ranking_smooths_and_leaves_out_what_begins_unlikely(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_vqa()
    assert model.RELEASED_RANKING == {"label_smoothing": 0.1, "preselect": 128}
    plain = answer(model, make_task(load_card("easy_vqa_shape"), shards, samples=6), batch_size=6)
    released = make_task(load_card("easy_vqa_shape"), shards, samples=6, preset="lavis")
    whole = answer(model, released, batch_size=6)
    assert all(len(item.scores) > 2 for item in whole.predictions)
    assert all(math.isfinite(score) for item in whole.predictions for score in item.scores)
    assert all(
        ours.scores != pytest.approx(theirs.scores)
        for ours, theirs in zip(whole.predictions, plain.predictions, strict=True)
    )
    monkeypatch.setattr(type(model), "RELEASED_RANKING", {"label_smoothing": 0.1, "preselect": 2})
    few = answer(model, released, batch_size=6, folder=tmp_path)
    for item, row in zip(few.predictions, whole.predictions, strict=True):
        assert len(item.scores) == len(item.ranked) == 2
        assert item.scores == pytest.approx([row.scores[place] for place in item.ranked])
    for line in (tmp_path / "predictions.jsonl").read_text().splitlines():
        assert all(math.isfinite(score) for score in json.loads(line)["scores"])


@pytest.mark.slow
def test_answers_and_captions_are_written(shards: Path, tmp_path: Path) -> None:
    asked = make_task(load_card("easy_vqa_shape"), shards, samples=5, mode="generate")
    alone, together = (answer(tiny_vqa(), asked, batch_size=size) for size in (1, 5))
    assert [item.prediction for item in alone.predictions] == [item.prediction for item in together.predictions]
    shown = synthetic_task(load_card("nocaps"), tmp_path / "shards", 3)
    for model in (tiny_caption(), tiny_pretrain()):
        assert shown.needs(model.SKILLS) == "caption"
        assert all(item.prediction for item in answer(model, shown, batch_size=2).predictions)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nocaps", "flickr30k_retrieval", "easy_vqa_shape"])
def test_one_and_two_ranks_write_the_same_answers_twice(name: str, shards: Path, tmp_path: Path) -> None:
    """The three tasks: captions, retrieval, answers ranked."""
    make = {"nocaps": tiny_caption, "flickr30k_retrieval": tiny_retrieval, "easy_vqa_shape": tiny_vqa}[name]
    model: Any = make()
    if name == "easy_vqa_shape":
        task = make_task(load_card(name), shards, samples=12)
    else:
        task = synthetic_task(load_card(name), tmp_path / "shards", 10)
    found = []
    for run, world_size in enumerate((1, 1, 2)):
        options: dict[str, Any] = {"batch_size": 4, "folder": tmp_path / str(run), "model_fingerprint": ""}
        others = [
            threading.Thread(
                target=answer_share, args=(model, task, read_pixels(SIDE)), kwargs=options | {"ranks": Ranks(1, 2)}
            )
        ][: world_size - 1]
        for other in others:
            other.start()
        result = run_task(model, task, read_pixels(SIDE), ranks=Ranks(0, world_size), show_progress=False, **options)
        for other in others:
            other.join(60)
        found.append((result.value, result.low, result.high, (tmp_path / str(run) / "predictions.jsonl").read_bytes()))
    assert found[0] == found[1] == found[2]


def test_more_of_the_nearest_may_be_matched_than_a_card_says(tmp_path: Path) -> None:
    card = load_card("coco_retrieval")
    few, more = (synthetic_task(card, tmp_path / str(count), 3, rerank=count) for count in (1, 256))
    assert (few.protocol.rerank, more.protocol.rerank) == (1, 256)
    assert synthetic_task(card, tmp_path / "own", 3).protocol.rerank == 128
    found = [answer(tiny_retrieval(), task, batch_size=8) for task in (few, more)]
    assert [len(item.ranked) for item in found[0].predictions] == [1] * 3
    assert all(len(item.ranked) > 1 for item in found[1].predictions)
