"""Running one evaluation task: the answers, their order, the journal, and what must not matter."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from instructblip.data.cards import load_card
from instructblip.data.prepare.convert import prepare_dataset
from instructblip.data.shards import ShardReader
from instructblip.evaluation.outcomes import TaskResult
from instructblip.evaluation.protocol import Task, blind_task, make_task
from instructblip.evaluation.results_file import PREDICTIONS
from instructblip.evaluation.runner import blank_image, read_pixels, run_task
from instructblip.models.instructblip import InstructBLIP
from tests.kit.tiny import IMAGE_SIZE, tiny_model, write_easy_vqa


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    write_easy_vqa(folder / "raw", images=24)
    prepare_dataset(load_card("easy_vqa"), folder / "raw", folder / "shards", progress=False)
    return folder / "shards"


@pytest.fixture(scope="module")
def model() -> InstructBLIP:
    """A tiny model, not to be changed by a test."""
    return tiny_model()


@pytest.fixture(scope="module")
def yes_no(shards: Path) -> Task:
    return make_task(load_card("easy_vqa_yes_no"), shards)


def answer(model: InstructBLIP, task: Task, **options: Any) -> TaskResult:
    options = {"batch_size": 8, "show_progress": False} | options
    return run_task(model, task, options.pop("read_image", read_pixels(IMAGE_SIZE)), **options)


def lines_of(folder: Path, name: str = PREDICTIONS) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines() if line]


class Scripted:
    """Stands for a model's `rank` and `generate`: gives set answers, keeps the prompts it was asked and the last options."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, scores: Sequence[float] = (), text: str = "") -> None:
        self.asked: list[str] = []
        self.options: dict[str, Any] = {}

        def rank(_: Any, images: Tensor, prompts: Sequence[str], *rest: Any, **options: Any) -> list[Tensor]:
            self.asked += prompts
            return [torch.tensor(scores)] * len(prompts)

        def generate(_: Any, images: Tensor, prompts: Sequence[str], **options: Any) -> list[str]:
            self.asked += prompts
            self.options = options
            return [text] * len(prompts)

        monkeypatch.setattr(InstructBLIP, "rank", rank)
        monkeypatch.setattr(InstructBLIP, "generate", generate)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["easy_vqa_yes_no", "easy_vqa_statements"])
def test_batch_size_changes_no_score(model: InstructBLIP, shards: Path, name: str) -> None:
    task = make_task(load_card(name), shards, samples=30)
    alone = answer(model, task, batch_size=1)
    assert len({item.scores for item in alone.predictions}) > 10  # the model does see the questions
    for batch_size in (7, 64):
        together = answer(model, task, batch_size=batch_size)
        assert [item.prediction for item in together.predictions] == [item.prediction for item in alone.predictions]
        for ours, theirs in zip(together.predictions, alone.predictions, strict=True):
            assert ours.scores == pytest.approx(theirs.scores, abs=1e-4)
        assert (together.value, together.low, together.high) == (alone.value, alone.low, alone.high)


@pytest.mark.slow
def test_generation_does_not_depend_on_the_batch_either(model: InstructBLIP, shards: Path) -> None:
    task = make_task(load_card("easy_vqa_yes_no"), shards, samples=8, mode="generate")
    alone, together = answer(model, task, batch_size=1), answer(model, task, batch_size=8)
    assert [item.prediction for item in alone.predictions] == [item.prediction for item in together.predictions]


def test_a_score_is_that_of_the_image_and_prompt(model: InstructBLIP, yes_no: Task) -> None:
    read = read_pixels(IMAGE_SIZE)
    sample = yes_no.samples[13]
    image = read(sample.shard, sample.row)[None]
    expected = model.rank(image, [sample.prompt], [yes_no.protocol.candidates], include_eos=False)[0]
    found = answer(model, yes_no).predictions[13]
    assert found.scores == pytest.approx(expected.tolist(), abs=1e-4)
    assert found.prediction == yes_no.protocol.candidates[int(expected.argmax())]


def test_texts_of_a_class_add_their_likelihoods(
    model: InstructBLIP, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(load_card("easy_vqa_statements"), shards, samples=2)
    # yes, true | no, false: "yes" is the likeliest text, but e^-1.2 + e^-1.3 > e^-1.0 + e^-5.0
    Scripted(monkeypatch, scores=[-1.0, -5.0, -1.2, -1.3])
    assert {item.prediction for item in answer(model, task).predictions} == {"false"}
    Scripted(monkeypatch, scores=[-1.0, -1.2, -1.1, -5.0])
    assert {item.prediction for item in answer(model, task).predictions} == {"true"}


def test_of_equal_classes_the_first_is_taken(
    model: InstructBLIP, yes_no: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scripted(monkeypatch, scores=[-2.0] * 13)
    assert {item.prediction for item in answer(model, yes_no).predictions} == {"yes"}


def test_a_generated_verbalizer_counts_as_its_class(
    model: InstructBLIP, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scripted(monkeypatch, text="Yes.")
    result = answer(model, make_task(load_card("easy_vqa_statements"), shards, mode="generate"))
    assert {prediction.prediction for prediction in result.predictions} == {"true"}
    truth = [sample.record.answers == ("true",) for sample in result.task.samples]
    assert result.per_sample == tuple(100.0 * right for right in truth)
    assert len(set(truth)) == 2


def test_texts_are_written_as_the_protocol_says(
    model: InstructBLIP, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: dict[str, Any] = {"num_beams": 4, "max_new_tokens": 7, "min_new_tokens": 2, "length_penalty": -1.0}
    said |= {"repetition_penalty": 1.5, "beam_lengths": "transformers_4_33"}
    scripted = Scripted(monkeypatch, text="yes")
    task = make_task(load_card("easy_vqa_yes_no"), shards, mode="generate", samples=2)
    answer(model, dataclasses.replace(task, protocol=dataclasses.replace(task.protocol, **said)))
    assert {name: scripted.options.get(name) for name in said} == said
    assert scripted.options.keys() - said.keys() == {"at_once"}


def test_generated_text_is_compared_without_case_and_full_stop(
    model: InstructBLIP, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scripted(monkeypatch, text="Yes.")
    result = answer(model, make_task(load_card("easy_vqa_yes_no"), shards, mode="generate"))
    assert result.value == 50.0
    assert {item.prediction for item in result.predictions} == {"Yes."}


def test_predictions_stand_in_stored_order_with_all_they_need(
    model: InstructBLIP, yes_no: Task, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = Scripted(monkeypatch, scores=[0.0, *[-1.0] * 12])
    result = answer(model, yes_no, folder=tmp_path)
    assert script.asked != [sample.prompt for sample in yes_no.samples]  # asked by length
    lines = lines_of(tmp_path)
    assert [line["id"] for line in lines] == [sample.id for sample in yes_no.samples]
    assert [line["prompt"] for line in lines] == [sample.prompt for sample in yes_no.samples]
    assert [line["answers"] for line in lines] == [list(sample.record.answers) for sample in yes_no.samples]
    assert [line["score"] for line in lines] == list(result.per_sample)
    assert [line["score"] for line in lines] == [100.0 * (line["answers"] == ["yes"]) for line in lines]
    assert len({line["key"] for line in lines}) == len(lines)
    assert result.value == 50.0
    assert (result.low, result.high) == (None, None)  # every image has as many right answers as wrong ones


def test_an_interrupted_run_goes_on(
    model: InstructBLIP, yes_no: Task, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = Scripted(monkeypatch, scores=[float(-number) for number in range(13)])
    read, reads = read_pixels(IMAGE_SIZE), 0

    def breaking(shard: ShardReader, row: int) -> Tensor:
        nonlocal reads
        reads += 1
        if reads > 6:  # one image a chunk of 4 questions
            raise RuntimeError("the power fails")
        return read(shard, row)

    model.train()
    with pytest.raises(RuntimeError, match="power"):
        answer(model, yes_no, folder=tmp_path, read_image=breaking, batch_size=1)
    assert model.training  # whatever happens, the model is given back as it came
    model.eval()
    answered = len(script.asked)
    assert answered == 24
    assert len(lines_of(tmp_path, "journal-0.jsonl")) == answered
    result = answer(model, yes_no, folder=tmp_path, batch_size=1)
    assert len(script.asked) == len(yes_no.samples)
    assert [line["id"] for line in lines_of(tmp_path)] == [sample.id for sample in yes_no.samples]
    assert not (tmp_path / "journal-0.jsonl").exists()
    assert result.predictions == answer(model, yes_no).predictions


def test_a_journal_is_used_by_the_same_model_and_protocol_only(
    model: InstructBLIP, shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = Scripted(monkeypatch, scores=[-1.0] * 13)
    task = make_task(load_card("easy_vqa_shape"), shards)
    # 12 images with one question in the same words: withheld, it need be asked but once.
    for fingerprint, asked, total in (("a", task, 12), ("b", task, 24), ("b", blind_task(task), 25)):
        answer(model, asked, folder=tmp_path, model_fingerprint=fingerprint)
        assert len(script.asked) == total
    answer(model, blind_task(task), folder=tmp_path, model_fingerprint="b")
    assert len(script.asked) == 25
    assert len(lines_of(tmp_path)) == 12


def test_withheld_images_are_never_read(model: InstructBLIP, yes_no: Task) -> None:
    def forbidden(shard: ShardReader, row: int) -> Tensor:
        raise AssertionError("looked")

    result = answer(model, blind_task(yes_no), read_image=forbidden)
    by_prompt: dict[str, tuple[float, ...]] = {}
    for sample, item in zip(yes_no.samples, result.predictions, strict=True):
        assert item.scores == by_prompt.setdefault(sample.prompt, item.scores)
    assert 1 < len(by_prompt) < len(yes_no.samples)
    shown = answer(model, yes_no)
    assert any(
        ours.scores != pytest.approx(theirs.scores, abs=1e-2)
        for ours, theirs in zip(shown.predictions, result.predictions, strict=True)
    )


def test_the_blank_image_is_one_grey() -> None:
    assert blank_image(8).shape == (3, 8, 8)
    assert blank_image(8).dtype == torch.uint8
    assert blank_image(8).unique().tolist() == [127]


def test_an_image_is_read_once_for_all_its_questions_in_a_batch(model: InstructBLIP, yes_no: Task) -> None:
    read, rows = read_pixels(IMAGE_SIZE), []

    def noting(shard: ShardReader, row: int) -> Tensor:
        rows.append(row)
        return read(shard, row)

    answer(model, yes_no, batch_size=48, read_image=noting)
    assert sorted(rows) == list(range(12))
