"""Retrieval: LAVIS's numbers, recall as torchmetrics has it, one result for every batch size, rank count, interruption."""

import json
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.functional.retrieval import retrieval_hit_rate

from instructblip.data.cards import load_card
from instructblip.data.records import Record
from instructblip.distributed import Ranks
from instructblip.errors import DamagedSample, UserError
from instructblip.evaluation import journal, retrieval
from instructblip.evaluation.journal import Journal
from instructblip.evaluation.metrics import retrieval_recall
from instructblip.evaluation.metrics.retrieval import chance_of_recall
from instructblip.evaluation.outcomes import TaskResult
from instructblip.evaluation.protocol import EvaluationSample, Task, make_task
from instructblip.evaluation.retrieval import answer_pairs
from instructblip.evaluation.runner import answer_share, run_task
from instructblip.models.blip2 import BLIP2
from tests.kit.synthetic_tasks import synthetic_task
from tests.kit.tiny import tiny_model
from tests.kit.vectors import TOLERANCE, case, stage1_model

CARD = "flickr30k_retrieval"


@pytest.fixture(scope="module")
def model() -> BLIP2:
    return stage1_model()


# --- LAVIS's numbers -------------------------------------------------------------------------------------------------


def lavis_task(rerank: int) -> tuple[Task, Callable[[Any, int], Tensor]]:
    """The task of the vectors, and what reads its image tokens."""
    vectors = case("retrieval", "retrieval")
    samples = tuple(
        EvaluationSample(
            f"r/{number}",
            SimpleNamespace(path=Path("shard")),  # type: ignore[arg-type]
            number,
            Record(str(number), "captions", captions=tuple(vectors["texts"][text] for text in own)),
            "",
        )
        for number, own in enumerate(vectors["img2txt"])
    )
    protocol = SimpleNamespace(rerank=rerank, max_text_tokens=35, mode="retrieve", text_processor="none")
    texts = tuple(text for sample in samples for text in sample.record.captions)
    task = Task(SimpleNamespace(name="r"), protocol, samples, None, texts)  # type: ignore[arg-type]
    tokens = vectors["inputs"]["image_tokens"]
    return task, lambda shard, row: tokens[row][None]


def rows_of(scores_RC: Tensor, kept: int) -> list[list[tuple[int, float]]]:
    """(column, score) of what LAVIS ranked anew, best first."""
    rows = []
    for row in scores_RC.tolist():
        ranked = [(number, score) for number, score in enumerate(row) if score != -100]
        rows.append(sorted(ranked, key=lambda pair: -pair[1])[:kept])
    return rows


@pytest.mark.parametrize("rerank", [4, 8])
def test_scores_and_recalls_are_those_of_the_released_code(model: BLIP2, rerank: int) -> None:
    task, read = lavis_task(rerank)
    journal = Journal(None, keys := [sample.id for sample in task.samples])
    answer_pairs(model, task, read, journal, keys, batch_size=7, show=False)
    found = [journal.predictions[key] for key in keys]
    expected = case("retrieval", f"rerank_k{rerank}")["expected"]
    captions = [row for prediction in found for row in prediction.captions]
    for rankings, scores in ((found, expected["score_i2t"]), (captions, expected["score_t2i"])):
        for ranking, row in zip(rankings, rows_of(scores, 10), strict=True):
            assert list(ranking.ranked) == [number for number, _ in row]
            torch.testing.assert_close(
                torch.tensor(ranking.scores), torch.tensor([score for _, score in row]), **TOLERANCE
            )
    score = retrieval_recall(
        [prediction.rank for prediction in found], [[row.rank for row in item.captions] for item in found]
    )
    bounds = expected["recall_bounds_pessimistic_optimistic"]
    free = {name: low for name, (low, high) in bounds.items() if low == high}
    assert len(free) >= 2
    for name, value in free.items():
        assert score.parts[ours(name)].value == pytest.approx(value)
    assert all(score.parts[ours(name)].value == pytest.approx(low) for name, (low, _) in bounds.items())


def ours(name: str) -> str:
    """The part that LAVIS calls `txt_r5` or `img_r_mean`."""
    direction, k = name.split("_r", 1)
    return {"txt": "TR", "img": "IR"}[direction] + (" mean" if k == "_mean" else f"@{k}")


# --- recall ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["similarity_only", "rerank_all_pairs"])
def test_recall_is_lavis_s_and_torchmetrics(of: str) -> None:
    vectors = case("retrieval", "retrieval")
    scores_NC = vectors["expected"]["sims_i2t"]
    if of == "rerank_all_pairs":
        scores_NC = scores_NC + vectors["expected"]["itm_logit_all_pairs"]
    own = vectors["img2txt"]
    right_NC = torch.zeros_like(scores_NC, dtype=torch.bool)
    for image, texts in enumerate(own):
        right_NC[image, texts] = True
    places_NC = scores_NC.argsort(dim=1, descending=True).argsort(dim=1)
    text_ranks = [int(places_NC[image, texts].min()) for image, texts in enumerate(own)]
    places_CN = scores_NC.T.argsort(dim=1, descending=True).argsort(dim=1)
    image_ranks = [[int(places_CN[text, image]) for text in texts] for image, texts in enumerate(own)]
    score = retrieval_recall(text_ranks, image_ranks)
    lavis = case("retrieval", of)["expected"]["recall"]
    assert score.value == pytest.approx(lavis["r_mean"])
    for name in ("txt_r1", "txt_r5", "txt_r10", "txt_r_mean", "img_r1", "img_r5", "img_r10", "img_r_mean"):
        assert score.parts[ours(name)].value == pytest.approx(lavis[name])
    for k in (1, 5, 10):
        for direction, scores, right in (("TR", scores_NC, right_NC), ("IR", scores_NC.T, right_NC.T)):
            hits = [retrieval_hit_rate(row, target, top_k=k) for row, target in zip(scores, right, strict=True)]
            assert score.parts[f"{direction}@{k}"].value == pytest.approx(100 * float(torch.stack(hits).mean()))


def test_an_image_with_more_captions_weighs_more_and_resamples_draw_it_whole() -> None:
    score = retrieval_recall([0, None], [[0, 0, 0], [3]])
    assert score.parts["IR@1"].value == 75
    assert score.parts["IR@5"].value == 100
    assert score.parts["TR@10"].value == 50
    assert sum(score.per_sample) / 2 == pytest.approx(score.value)
    part = score.parts["IR@1"]
    assert part.resampled is not None
    assert part.resampled(np.array([[2, 0], [0, 2], [1, 1]])) == pytest.approx([100, 0, 75])


@pytest.mark.slow
def test_chance_is_that_of_random_orders() -> None:
    captions = [5, 1, 3, 2, 4, 5, 5, 5, 2, 3, 1, 4]
    texts, first = sum(captions), [sum(captions[:number]) for number in range(len(captions))]
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(300):
        text_ranks, image_ranks = [], []
        for number, count in enumerate(captions):
            places = torch.randperm(texts, generator=generator)
            text_ranks.append(int(places[first[number] : first[number] + count].min()))
            image_ranks.append([int(torch.randperm(len(captions), generator=generator)[number]) for _ in range(count)])
        values.append(retrieval_recall(text_ranks, image_ranks).value)
    assert sum(values) / len(values) == pytest.approx(chance_of_recall(captions), abs=1.0)


@pytest.mark.parametrize(
    ("text_ranks", "image_ranks", "says"),
    [([], [], "no images"), ([0], [[]], "no captions"), ([0], [[0], [0]], "one entry a sample")],
)
def test_what_has_no_recall_is_refused(
    text_ranks: Sequence[int], image_ranks: Sequence[Sequence[int]], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        retrieval_recall(text_ranks, image_ranks)


# --- whole tasks -----------------------------------------------------------------------------------------------------

COUNT = 70  # more than one file of images


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    task = synthetic_task(load_card(CARD), tmp_path_factory.mktemp("shards"), COUNT)
    return replace(task, protocol=replace(task.protocol, rerank=12))


def read_tokens(shard: Any, row: int) -> Tensor:
    """Image tokens (1, P, U) of a row, in the place of its pixels."""
    return torch.randn(1, 7, 24, generator=torch.Generator().manual_seed(row))


def predictions(folder: Path) -> str:
    return (folder / "predictions.jsonl").read_text()


@pytest.fixture(scope="module")
def alone(model: BLIP2, task: Task, tmp_path_factory: pytest.TempPathFactory) -> tuple[TaskResult, str]:
    folder = tmp_path_factory.mktemp("alone")
    result = run_task(model, task, read_tokens, batch_size=16, folder=folder, show_progress=False)
    assert sorted(path.name for path in folder.iterdir()) == ["predictions.jsonl"]
    return result, predictions(folder)


@pytest.mark.slow
def test_a_task_is_scored_with_intervals_and_parts(alone: tuple[TaskResult, str]) -> None:
    result, text = alone
    assert result.low < result.value < result.high  # type: ignore[operator]
    assert result.to_json()["protocol"]["vocabulary_size"] == sum(len(s.record.captions) for s in result.samples)
    first = json.loads(text.splitlines()[0])
    assert len(first["ranked"]) == 10
    assert len(first["captions"]) == len(result.samples[0].record.captions)
    assert first["prediction"] == result.task.vocabulary[first["ranked"][0]]


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 64])
def test_the_batch_size_changes_nothing(
    model: BLIP2, task: Task, alone: tuple[TaskResult, str], batch_size: int
) -> None:
    result = run_task(model, task, read_tokens, batch_size=batch_size, show_progress=False)
    for found, expected in zip(result.predictions, alone[0].predictions, strict=True):
        assert (found.ranked, found.rank) == (expected.ranked, expected.rank)
        assert found.scores == pytest.approx(expected.scores, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_images_and_rows(
    model: BLIP2, task: Task, alone: tuple[TaskResult, str], tmp_path: Path, world_size: int
) -> None:
    reads: list[int] = []

    def read(shard: Any, row: int) -> Tensor:
        reads.append(row)
        return read_tokens(shard, row)

    options: dict[str, Any] = {"batch_size": 16, "folder": tmp_path, "model_fingerprint": ""}
    others = [
        threading.Thread(
            target=answer_share, args=(model, task, read), kwargs=options | {"ranks": Ranks(rank, world_size)}
        )
        for rank in range(1, world_size)
    ]
    for other in others:
        other.start()
    run_task(model, task, read, ranks=Ranks(0, world_size), show_progress=False, **options)
    for other in others:
        other.join()
    assert sorted(reads) == list(range(COUNT))
    assert predictions(tmp_path) == alone[1]


class Stopped(Exception):  # noqa: N818
    """A process that ends here."""


@pytest.mark.slow
@pytest.mark.parametrize("calls", [1, 2, 3, 9])
def test_an_interrupted_task_goes_on_where_it_stopped(
    model: BLIP2, task: Task, alone: tuple[TaskResult, str], tmp_path: Path, calls: int
) -> None:
    left = calls

    def stop() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Stopped

    options: dict[str, Any] = {"batch_size": 16, "folder": tmp_path, "show_progress": False}
    with pytest.raises(Stopped):
        run_task(model, task, read_tokens, ranks=Ranks(poll_stop=stop), **options)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("images-*/*.safetensors")}
    assert bool(kept) is (calls > 0)
    reads: list[int] = []

    def read(shard: Any, row: int) -> Tensor:
        reads.append(row)
        return read_tokens(shard, row)

    run_task(model, task, read, **options)
    assert len(reads) == COUNT - sum(64 if path.stem == "000000" else COUNT - 64 for path in kept)
    assert predictions(tmp_path) == alone[1]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ten_kills_leave_the_same_results(
    model: BLIP2,
    task: Task,
    alone: tuple[TaskResult, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    world_size: int,
) -> None:
    """Of any of the ranks, behind each file of encoded images and each chunk of answers, whose last line may be cut."""
    stream, save, append, kills = random.Random(world_size), retrieval.save_file, journal._append, 0

    def saving(tensors: dict[str, Tensor], path: str) -> None:
        save(tensors, path)
        raise Stopped  # before it has its name

    def appending(path: Path, lines: Sequence[str]) -> None:
        append(path, lines)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) - stream.choice([0, 1, 30])])
        raise Stopped

    def waiting(self: Journal, missing: Callable[[], int], what: str) -> None:
        if missing():
            raise Stopped  # those that it waits for are gone, too

    options: dict[str, Any] = {"batch_size": 16, "folder": tmp_path, "model_fingerprint": ""}
    with monkeypatch.context() as patch:
        patch.setattr(journal, "_append", appending)
        patch.setattr(Journal, "wait_until_none", waiting)
        while kills < 10:
            with patch.context() as first:
                if kills < 2:
                    first.setattr(retrieval, "save_file", saving)
                try:
                    rank = stream.randrange(world_size)
                    answer_share(model, task, read_tokens, ranks=Ranks(rank, world_size), **options)
                except Stopped:
                    kills += 1
    others = [
        threading.Thread(
            target=answer_share, args=(model, task, read_tokens), kwargs=options | {"ranks": Ranks(rank, world_size)}
        )
        for rank in range(1, world_size)
    ]
    for other in others:
        other.start()
    result = run_task(model, task, read_tokens, ranks=Ranks(0, world_size), show_progress=False, **options)
    for other in others:
        other.join()
    assert predictions(tmp_path) == alone[1]
    assert result.to_json() == alone[0].to_json()


@pytest.mark.slow
def test_equal_captions_have_equal_scores_and_stand_in_their_order(model: BLIP2, tmp_path: Path) -> None:
    task = synthetic_task(load_card(CARD), tmp_path, 12)
    twice = replace(task.samples[7], record=replace(task.samples[7].record, captions=task.samples[2].record.captions))
    samples = (*task.samples[:7], twice, *task.samples[8:])
    vocabulary = tuple(text for sample in samples for text in sample.record.captions)
    result = run_task(
        model,
        replace(task, samples=samples, vocabulary=vocabulary),
        read_tokens,
        batch_size=5,
        show_progress=False,
    )
    pairs = 0
    for prediction in result.predictions:
        scores = dict(zip(prediction.ranked, prediction.scores, strict=True))
        for place, number in enumerate(prediction.ranked):
            for later in prediction.ranked[place + 1 :]:
                if vocabulary[number] == vocabulary[later]:
                    assert scores[number] == scores[later]
                    assert number < later
                    pairs += 1
    assert pairs


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_a_damaged_picture_is_named(model: BLIP2, task: Task) -> None:
    def read(shard: Any, row: int) -> Tensor:
        raise DamagedSample("image is truncated")

    with pytest.raises(UserError, match=rf"{CARD}/\d+: image is truncated; retrieval compares all pictures"):
        run_task(model, task, read, batch_size=16, show_progress=False)


@pytest.mark.parametrize("damaged", [0, 1])
def test_a_damaged_picture_of_one_rank_ends_the_task_of_both(
    model: BLIP2, task: Task, tmp_path: Path, damaged: int
) -> None:
    ends: list[str] = []

    def work(rank: int) -> None:
        def read(shard: Any, row: int) -> Tensor:
            if rank == damaged:
                raise DamagedSample("image is truncated")
            return read_tokens(shard, row)

        options: dict[str, Any] = {"batch_size": 16, "folder": tmp_path, "model_fingerprint": ""}
        with pytest.raises(UserError) as error:
            (answer_share if rank else run_task)(model, task, read, ranks=Ranks(rank, 2), **options)
        ends.append(str(error.value))

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(ends) == 2
    assert all("image is truncated" in line for line in ends)


def test_a_picture_with_two_entries_is_refused(model: BLIP2, task: Task) -> None:
    twice = Task(task.card, task.protocol, (task.samples[0], *task.samples), task.records, task.vocabulary)
    with pytest.raises(UserError, match="have one image, which would look for itself"):
        run_task(model, twice, read_tokens, batch_size=16, show_progress=False)


def test_modes_and_metrics_that_do_not_go_together_are_refused(task: Task) -> None:
    shards = task.samples[0].shard.path.parents[2]
    with pytest.raises(UserError, match="mean recall is made of what mode=retrieve finds, and mode=generate"):
        make_task(load_card(CARD), shards, mode="generate")
    with pytest.raises(UserError, match="CIDEr is not made of what mode=retrieve finds"):
        make_task(load_card("flickr30k"), shards, mode="retrieve")


def test_a_model_without_a_matching_head_says_so(task: Task) -> None:
    with pytest.raises(
        UserError, match="InstructBLIP has no matching head to retrieve with, which flickr30k_retrieval asks for"
    ):
        run_task(tiny_model(), task, read_tokens, batch_size=16, show_progress=False)
