"""What goes wrong while a task runs: damaged images, too little memory, processes that die at any moment."""

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from instructblip.data.cards import load_card
from instructblip.data.prepare.convert import prepare_dataset
from instructblip.data.shards import ShardReader
from instructblip.distributed import Ranks
from instructblip.errors import DamagedSample, UserError
from instructblip.evaluation import journal
from instructblip.evaluation.outcomes import TaskResult
from instructblip.evaluation.protocol import Task, make_task
from instructblip.evaluation.runner import BatchLimit, answer_share, read_pixels, run_task
from instructblip.evaluation.suite import check_writes, evaluate_tasks
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.llm import LLMAbilities
from tests.kit.tiny import IMAGE_SIZE, tiny_model, write_easy_vqa

KILLS = 20  # by raising where the journal is written; tests/distributed and tests/faults kill real processes


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """48 yes/no questions on 12 images."""
    folder = tmp_path_factory.mktemp("prepared")
    write_easy_vqa(folder / "raw", images=24)
    prepare_dataset(load_card("easy_vqa"), folder / "raw", folder / "shards", progress=False)
    return make_task(load_card("easy_vqa_yes_no"), folder / "shards")


@pytest.fixture(scope="module")
def model() -> InstructBLIP:
    return tiny_model()


def answer(model: InstructBLIP, task: Task, **options: Any) -> TaskResult:
    options = {"batch_size": 2, "show_progress": False} | options
    return run_task(model, task, options.pop("read_image", read_pixels(IMAGE_SIZE)), **options)


# --- numbers that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["rank", "generate"])
def test_numbers_that_are_not_finite_stop_the_run_and_leave_no_answer(mode: str, task: Task, tmp_path: Path) -> None:
    broken = tiny_model()
    with torch.no_grad():
        broken.projection.weight[0, 0] = float("nan")
    asked = dataclasses.replace(task, protocol=dataclasses.replace(task.protocol, mode=mode))
    with pytest.raises(UserError, match=r"are not finite.*weights are damaged"):
        answer(broken, asked, folder=tmp_path)
    assert [line for file in tmp_path.rglob("*.jsonl") for line in file.read_text().splitlines()] == []


@pytest.mark.parametrize("mode", ["rank", "generate"])
def test_a_question_that_the_model_cannot_take_is_named_by_its_sample(mode: str, task: Task) -> None:
    short, longest = tiny_model(), max(task.samples, key=lambda sample: len(sample.prompt))
    samples = [dataclasses.replace(s, prompt=s.prompt * 9) if s is longest else s for s in task.samples]
    short.llm.model.config.max_position_embeddings = 5 * len(short.llm.prompt_format.prompt_ids(longest.prompt))
    asked = dataclasses.replace(task, samples=samples, protocol=dataclasses.replace(task.protocol, mode=mode))
    with pytest.raises(
        UserError, match=f"{longest.id}: its prompt needs .* the language model has .*: shorten the prompt"
    ):
        answer(short, asked, batch_size=4)


@pytest.mark.parametrize(
    ("abilities", "words"),
    [
        ({"tree": False, "generates": False}, "does not generate from embeddings"),
        ({"tree": False, "beams": False}, "set num_beams=1"),
        ({"tree": False}, "counts beam lengths as new_tokens"),
    ],
)
def test_texts_of_a_model_that_cannot_write_are_refused_before_the_first_task(
    abilities: dict[str, bool], words: str, task: Task, tmp_path: Path
) -> None:
    silent = tiny_model()
    silent.llm.abilities = LLMAbilities(**abilities)
    protocol = dataclasses.replace(task.protocol, mode="generate", num_beams=5, beam_lengths="transformers_4_33")
    written = dataclasses.replace(task, protocol=protocol)
    check_writes(silent, [task, task])  # which are ranked
    with pytest.raises(UserError, match=f"^easy_vqa_yes_no asks for texts: LlamaForCausalLM .*{words}"):
        evaluate_tasks(
            silent,
            [task, written],
            read_pixels(IMAGE_SIZE),
            shards=tmp_path,
            folder=tmp_path / "results",
            batch_size=2,
            blind=False,
            frozen={},
            trained="",
        )
    assert not (tmp_path / "results").exists()


# --- damaged images --------------------------------------------------------------------------------------------------


def read_but_three(shard: ShardReader, row: int) -> Tensor:
    if row == 3:
        raise DamagedSample("image 3 cannot be decoded")
    return read_pixels(IMAGE_SIZE)(shard, row)


def test_a_damaged_image_fails_the_run_and_says_how_to_go_on(model: InstructBLIP, task: Task, tmp_path: Path) -> None:
    lost = [sample.id for sample in task.samples if sample.row == 3]
    with pytest.raises(UserError, match=f"easy_vqa_yes_no: {lost[0]}: image 3 cannot be decoded; or give tolerance=4"):
        answer(model, task, read_image=read_but_three, folder=tmp_path)
    with pytest.raises(UserError, match="4 samples failed where tolerance=3 allows no more, the first"):
        answer(model, task, read_image=read_but_three, folder=tmp_path, tolerance=3)


@pytest.mark.slow
def test_tolerated_failures_are_counted_and_named_and_never_answered(
    model: InstructBLIP, task: Task, tmp_path: Path
) -> None:
    lost = [sample.id for sample in task.samples if sample.row == 3]
    result = answer(model, task, read_image=read_but_three, folder=tmp_path, tolerance=4)
    assert [failure.id for failure in result.failures] == lost
    assert [failed["id"] for failed in result.to_json()["failed"]] == lost
    assert result.to_json()["count"] == 44
    assert [sample.id for sample in result.samples] == [
        sample.id for sample in task.samples if sample.id not in set(lost)
    ]
    # Asked again, they are neither answered nor forgotten; without tolerance they stop the run.
    assert answer(model, task, folder=tmp_path, tolerance=4).failures == result.failures
    with pytest.raises(UserError, match="tolerance=4"):
        answer(model, task, folder=tmp_path)


def test_a_shard_that_is_gone_is_no_damaged_sample(model: InstructBLIP, task: Task) -> None:
    def gone(shard: ShardReader, row: int) -> Tensor:
        raise UserError("shard is gone")

    with pytest.raises(UserError, match="shard is gone"):
        answer(model, task, read_image=gone, tolerance=100)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_out_of_memory_halves_the_batch_and_changes_no_answer(
    model: InstructBLIP, task: Task, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rank, sizes = InstructBLIP.rank, []

    def small_memory(self: InstructBLIP, images: Tensor, prompts: Sequence[str], *rest: Any, **options: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 3:
            raise torch.OutOfMemoryError("too much")
        return rank(self, images, prompts, *rest, **options)

    expected = answer(model, task, batch_size=1)
    monkeypatch.setattr(InstructBLIP, "rank", small_memory)
    found = answer(model, task, batch_size=16)
    assert [item.prediction for item in found.predictions] == [item.prediction for item in expected.predictions]
    assert sizes[:4] == [16, 8, 4, 2]
    assert set(sizes[4:]) == {2}
    messages = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert messages[0] == "out of memory with a batch of 16; going on with 8"
    assert len(messages) == 3


@pytest.mark.slow
def test_too_little_memory_for_one_is_said_in_one_line() -> None:
    def hopeless(batch: Sequence[int]) -> list[int]:
        raise torch.OutOfMemoryError("too much")

    with pytest.raises(UserError, match="one question alone does not fit into the GPU's memory"):
        BatchLimit(5).run(range(7), hopeless)


# --- kills -----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process is gone."""


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_nothing(
    model: InstructBLIP, task: Task, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"batch_size": 2, "model_fingerprint": "m"}
    expected = answer(model, task, folder=tmp_path / "whole", **options)
    stream, append, asked = random.Random(0), journal._append, 0
    rank = InstructBLIP.rank

    def counting(self: InstructBLIP, images: Tensor, prompts: Sequence[str], *rest: Any, **others: Any) -> Any:
        nonlocal asked
        asked += len(prompts)
        return rank(self, images, prompts, *rest, **others)

    monkeypatch.setattr(InstructBLIP, "rank", counting)
    folder, kills, attempts = tmp_path / "killed", 0, 0
    while kills < KILLS:
        attempts += 1
        assert attempts < 20 * KILLS
        count = stream.randint(1, 3)
        ranks, left = Ranks(stream.randrange(count), count), stream.randint(1, 2)

        def dying(path: Path, lines: Sequence[str]) -> None:
            nonlocal left
            append(path, lines)
            left -= 1
            if left == 0:
                whole = path.read_bytes()
                path.write_bytes(whole[: len(whole) - stream.choice([0, 1, 30])])  # the last line may be cut
                raise Killed

        monkeypatch.setattr(journal, "_append", dying)
        try:
            if ranks.is_first and count == 1:
                answer(model, task, folder=folder, **options)
            else:
                answer_share(model, task, read_pixels(IMAGE_SIZE), folder=folder, ranks=ranks, **options)
        except Killed:
            kills += 1
    monkeypatch.setattr(journal, "_append", append)
    found = answer(model, task, folder=folder, **options)
    assert found.predictions == expected.predictions
    assert (found.value, found.low, found.high) == (expected.value, expected.low, expected.high)
    assert [path.name for path in folder.iterdir()] == ["predictions.jsonl"]
    written = (folder / "predictions.jsonl").read_bytes()
    assert written == (tmp_path / "whole/predictions.jsonl").read_bytes()
    assert len(task.samples) <= asked <= len(task.samples) + 2 * KILLS


@pytest.mark.slow
def test_a_silent_process_is_given_up_with_one_line(
    model: InstructBLIP, task: Task, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(journal, "SILENCE_SECONDS", 0.05)
    with pytest.raises(UserError, match=r"answers of easy_vqa_yes_no are missing and none has come for .* minutes"):
        answer(model, task, folder=tmp_path, ranks=Ranks(0, 2))
    # Its own share stays, and alone it answers the rest.
    assert answer(model, task, folder=tmp_path).predictions == answer(model, task).predictions


@pytest.mark.slow
def test_a_process_that_gives_up_ends_the_wait_of_the_first_with_its_reason(
    model: InstructBLIP, task: Task, tmp_path: Path
) -> None:
    def broken(shard: ShardReader, row: int) -> Tensor:
        raise UserError("the disk fails")

    options: dict[str, Any] = {"batch_size": 2, "model_fingerprint": "", "folder": tmp_path}
    with pytest.raises(UserError, match=r"^the disk fails$"):
        answer_share(model, task, broken, ranks=Ranks(1, 2), **options)
    with pytest.raises(UserError, match=r"^the disk fails$"):
        answer(model, task, folder=tmp_path, ranks=Ranks(0, 2))
    assert "prediction" in (tmp_path / "journal-0.jsonl").read_text()  # its own share stays
    journal.forget_given_up(tmp_path.parent)  # as the next evaluation does, of whose ranks none has answered yet
    assert answer(model, task, folder=tmp_path).predictions == answer(model, task).predictions
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_several_processes_need_a_folder(model: InstructBLIP, task: Task) -> None:
    with pytest.raises(ValueError, match="need a folder"):
        answer(model, task, ranks=Ranks(0, 2))


@pytest.mark.parametrize(
    "line", ['{"question_id": 1, "answer": "yes"}', '["yes"]', '"yes"', '{"key": [], "id": "1", "prediction": "yes"}']
)
@pytest.mark.parametrize("name", ["predictions.jsonl", "journal-7.jsonl"])
def test_a_file_of_another_origin_is_named_and_kept(
    model: InstructBLIP, task: Task, tmp_path: Path, line: str, name: str
) -> None:
    (tmp_path / name).write_text(line + "\n")
    with pytest.raises(
        UserError, match=rf"{name} has lines that are no answers of an evaluation; move it away, or give"
    ):
        answer(model, task, folder=tmp_path)
    assert (tmp_path / name).read_text() == line + "\n"


def test_places_that_cannot_be_read_or_written_are_one_line(model: InstructBLIP, task: Task, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"predictions\.jsonl cannot be read \(Not a directory\)"):
        answer(model, task, folder=tmp_path / "file")
    with pytest.raises(UserError, match=r"journal-0\.jsonl cannot be written \(No such file or directory\)"):
        answer(model, task, folder=Path("/proc/nowhere"))
