"""Statements judged by matching: true where the probability that statement and image match is above one half."""

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image

from instructblip.data.cards import Card, load_card
from instructblip.data.prepare.convert import prepare_dataset
from instructblip.distributed import Ranks
from instructblip.errors import UserError
from instructblip.evaluation.metrics import auroc
from instructblip.evaluation.outcomes import TaskResult
from instructblip.evaluation.protocol import Task, as_json, chance_level, make_task, refuse_unable, unfit
from instructblip.evaluation.report.content import report_row, report_section
from instructblip.evaluation.report.table import OTHER_PROTOCOL, comparison_marks
from instructblip.evaluation.runner import answer_share, read_pixels, run_task
from instructblip.evaluation.suite import baselines
from instructblip.evaluation.suite_tasks import fitting_modes
from instructblip.models.base import Model
from tests.kit.blip import SIDE, tiny_pretrain, tiny_retrieval, tiny_vqa
from tests.kit.own_data import write_card
from tests.kit.stage1 import tiny_stage1
from tests.kit.synthetic_tasks import Oracle, read_number, synthetic_task
from tests.kit.tiny import IMAGE_SIZE, write_easy_vqa

STATEMENTS = ("vsr", "easy_vqa_statements")
SIGMAS = 4.0


def first_stage() -> Any:
    return tiny_stage1().eval()


MODELS = {tiny_retrieval: SIDE, tiny_pretrain: SIDE, first_stage: IMAGE_SIZE}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    write_easy_vqa(folder / "raw", images=12)
    prepare_dataset(load_card("easy_vqa"), folder / "raw", folder / "shards", progress=False)
    return folder / "shards"


def judge(model: Model, task: Task, side: int = SIDE, **options: Any) -> TaskResult:
    return run_task(model, task, read_pixels(side), show_progress=False, **{"batch_size": 8, **options})


def statements(shards: Path, **options: Any) -> Task:
    return make_task(load_card("easy_vqa_statements"), shards, mode="match", **options)


def matching_half(task: Task, make: Callable[[], Any] = tiny_retrieval, side: int = SIDE) -> Any:
    """A model of random weights whose bias is moved so that it takes half of the statements for true."""
    model = make()
    scores = [item.scores for item in judge(model, task, side).predictions]
    differences = torch.tensor([match - other for other, match in scores])
    with torch.no_grad():
        model.matching_head.bias[1] -= differences.median() + 1e-4
    return model


def pictures(task: Task) -> list[Image.Image]:
    return [
        Image.fromarray(read_pixels(SIDE)(sample.shard, sample.row)[0].permute(1, 2, 0).numpy())
        for sample in task.samples
    ]


@pytest.mark.parametrize("preset", ["paper", "lavis"])
@pytest.mark.parametrize("name", STATEMENTS)
def test_a_model_that_knows_scores_the_maximum(name: str, preset: str, tmp_path: Path) -> None:
    task = synthetic_task(load_card(name), tmp_path, 60, mode="match", preset=preset)
    oracle = Oracle(task)
    result = run_task(cast(Model, oracle), task, read_number, batch_size=7, show_progress=False)
    assert result.value == 100
    assert {sample.record.answers for sample in task.samples} == {("false",), ("true",)}
    assert sorted(oracle.asked) == sorted(sample.prompt for sample in task.samples)  # the statements and nothing else
    wanted = {f"what is item {number}?" for number in range(60)}
    assert {sample.prompt for sample in task.samples} == wanted


@pytest.mark.slow
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("name", STATEMENTS)
def test_random_weights_score_near_chance(name: str, make: Callable[[], Any], tmp_path: Path) -> None:
    task = synthetic_task(load_card(name), tmp_path, 100, mode="match")
    model = matching_half(task, make, MODELS[make])
    result = judge(model, task, MODELS[make], batch_size=50)
    assert chance_level(task) == 50
    said = [item.prediction for item in result.predictions]
    assert 20 < said.count("true") < 80
    assert result.value is not None
    assert abs(result.value - 50) <= SIGMAS * 100 * (0.25 / 100) ** 0.5


def test_a_statement_is_true_where_the_probability_of_a_match_is_above_one_half(shards: Path) -> None:
    task = statements(shards)
    model = matching_half(task)
    result = judge(model, task)
    probabilities = model.match(pictures(task), [sample.record.question for sample in task.samples]).tolist()
    found = [torch.tensor(item.scores).exp().tolist() for item in result.predictions]
    assert [match for _, match in found] == pytest.approx(probabilities, abs=1e-6)
    assert [sum(pair) for pair in found] == pytest.approx([1] * len(found))
    said = [item.prediction for item in result.predictions]
    assert said == ["true" if probability > 0.5 else "false" for probability in probabilities]
    assert set(said) == {"false", "true"}
    right = [answer == sample.record.answers[0] for answer, sample in zip(said, task.samples, strict=True)]
    assert result.value == pytest.approx(100 * sum(right) / len(right))


def test_a_tie_is_no_match(shards: Path) -> None:
    model = tiny_retrieval()
    torch.nn.init.zeros_(model.matching_head.weight)
    torch.nn.init.zeros_(model.matching_head.bias)
    assert {item.prediction for item in judge(model, statements(shards)).predictions} == {"false"}


def auroc_card(name: str = "easy_vqa_statements") -> Card:
    card = load_card(name)
    assert card.evaluation is not None
    return replace(card, evaluation=replace(card.evaluation, metric="auroc"))


def test_auroc_is_of_the_probabilities(shards: Path) -> None:
    task = make_task(auroc_card(), shards, mode="match")
    model = tiny_retrieval()
    probabilities = model.match(pictures(task), [sample.prompt for sample in task.samples]).double().tolist()
    labels = [int(sample.record.answers == ("true",)) for sample in task.samples]
    assert judge(model, task).value == pytest.approx(auroc(probabilities, labels).table_value, abs=1e-6)


def test_auroc_orders_what_is_certain_to_float32(shards: Path, tmp_path: Path) -> None:
    task = make_task(auroc_card(), shards, mode="match")
    model = tiny_retrieval()
    expected = judge(model, task).value
    with torch.no_grad():
        model.matching_head.bias[1] += 24
    assert (model.match(pictures(task), [sample.prompt for sample in task.samples]) == 1).all()
    found = judge(model, task, folder=tmp_path)
    assert found.value == pytest.approx(expected, abs=1)
    assert found.value != 50  # as it is where all are equal
    for line in (tmp_path / "predictions.jsonl").read_text().splitlines():
        assert len(json.loads(line)["scores"]) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_judgements_do_not_depend_on_the_batch_in_any_type(dtype: torch.dtype, shards: Path) -> None:
    task = statements(shards)
    model = tiny_retrieval().to(dtype)
    alone, together = (judge(model, task, batch_size=size) for size in (1, 16))
    exact = judge(tiny_retrieval(), task, batch_size=16)
    within = 1e-4 if dtype == torch.float32 else 0.05
    for one, other, reference in zip(alone.predictions, together.predictions, exact.predictions, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=within)
        assert one.scores == pytest.approx(reference.scores, abs=4 * within)
    assert len({item.scores for item in together.predictions}) > 5


def test_a_score_that_is_not_finite_is_no_judgement(shards: Path) -> None:
    model = tiny_retrieval()
    with torch.no_grad():
        model.matching_head.bias[0] = torch.nan
    with pytest.raises(UserError, match=r"easy_vqa_statements/.*are not finite"):
        judge(model, statements(shards))


@pytest.mark.parametrize("make", [tiny_retrieval, tiny_pretrain])
def test_twice_and_on_two_ranks_the_results_are_the_same(make: Callable[[], Any], shards: Path, tmp_path: Path) -> None:
    model, task, found = make(), statements(shards), []
    for run, world_size in enumerate((1, 1, 2)):
        options: dict[str, Any] = {"batch_size": 2, "folder": tmp_path / str(run), "model_fingerprint": ""}
        other = threading.Thread(
            target=answer_share, args=(model, task, read_pixels(SIDE)), kwargs=options | {"ranks": Ranks(1, 2)}
        )
        if world_size == 2:
            other.start()
        result = judge(model, task, ranks=Ranks(0, world_size), **options)
        if world_size == 2:
            other.join(60)
        found.append((json.dumps(result.to_json()), (tmp_path / str(run) / "predictions.jsonl").read_bytes()))
    assert found[0] == found[1] == found[2]


def test_what_was_judged_is_not_judged_again(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = tiny_retrieval(), statements(shards)
    first = judge(model, task, folder=tmp_path)
    monkeypatch.setattr(type(model), "encode_pairs", None)
    assert judge(model, task, folder=tmp_path).predictions == first.predictions


def test_the_protocol_holds_nothing_of_a_language_model(shards: Path) -> None:
    protocol = statements(shards).protocol
    assert (protocol.mode, protocol.prompt, protocol.verbalizers) == ("match", "{question}", ())
    assert protocol.candidates == protocol.classes == ("false", "true")
    assert (protocol.candidates_from, protocol.max_text_tokens, protocol.rerank) == ("card", 35, 0)
    shown = protocol.describe()
    assert shown["matching"] == "true where the probability that statement and image match is above 0.5"
    assert not {"decoding", "candidates", "normalisation"} & shown.keys()
    ranked = make_task(load_card("easy_vqa_statements"), shards).protocol
    assert ranked.sha256() != protocol.sha256()


def test_the_released_code_cleans_a_statement_and_the_paper_s_way_leaves_it(shards: Path) -> None:
    shown, cleaned = (statements(shards, preset=preset) for preset in ("paper", "lavis"))
    assert [sample.prompt for sample in shown.samples] == [sample.record.question for sample in shown.samples]
    texts = [sample.prompt for sample in cleaned.samples]
    assert all(text == text.lower() and "." not in text for text in texts)
    assert texts != [sample.prompt for sample in shown.samples]


def test_the_report_and_the_table_say_that_it_is_matching(shards: Path) -> None:
    task = statements(shards)
    blind = statements(shards, withhold_images=True)
    model = matching_half(task)
    result, withheld = judge(model, task), judge(model, blind)
    found = baselines(task, shards, withheld)
    assert found == {"images withheld": withheld.value, "chance": 50.0}
    row = report_row(result, found)
    assert (row.mode, row.metric, row.count) == ("matching", "accuracy", len(task.samples))
    section = report_section(result, 4)
    assert section.breakdowns["answer"]
    assert [name for name, _ in section.examples[0].scores] == ["false", "true"]
    stored = json.loads(json.dumps(as_json(task.protocol)))
    assert comparison_marks(task.card, stored) == {OTHER_PROTOCOL: "mode 'match' in place of 'rank'"}


@pytest.mark.parametrize("name", ["gqa", "hateful_memes", "nocaps", "easy_vqa_yes_no", "vqav2_blip"])
def test_a_dataset_without_statements_is_refused(name: str, shards: Path) -> None:
    card = load_card(name)
    assert unfit(card, "match").startswith(f"{name} has no statements, which are true or false of an image")
    with pytest.raises(UserError, match=f"{name} has no statements"):
        make_task(card, shards, mode="match")
    modes, note = fitting_modes([load_card("vsr"), card], "match", preset="paper", llm_kind="decoder")
    assert modes == {"vsr": "match", name: None}
    assert note == f"mode=match cannot be had of {name}: evaluated as the card says"


def test_a_model_says_what_it_lacks_and_what_it_could_do(shards: Path) -> None:
    with pytest.raises(UserError, match="m has no matching head to judge statements with, which easy_vqa_statements"):
        refuse_unable([statements(shards)], tiny_vqa().SKILLS, "m")
    ranked = make_task(load_card("easy_vqa_statements"), shards)
    other = make_task(load_card("easy_vqa_shape"), shards)
    asked = "m has no language model to rank candidates with, which easy_vqa_statements asks for; "
    with pytest.raises(UserError, match=f"{asked}let evaluate.py judge its statements with mode=match, or take it"):
        refuse_unable([ranked], tiny_retrieval().SKILLS, "m")
    with pytest.raises(UserError, match="easy_vqa_shape asks for; take it out of the suite"):
        refuse_unable([ranked, other], tiny_retrieval().SKILLS, "m")


def test_a_card_of_one_s_own_may_say_that_it_is_matched(shards: Path, tmp_path: Path) -> None:
    path = write_card(tmp_path, task="statement", evaluation={"mode": "match", "split": "val"})
    rules = load_card(path).evaluation
    assert rules is not None
    assert (rules.mode, rules.verbalizers) == ("match", {})
    card = load_card("easy_vqa_statements")
    own = replace(card, evaluation=replace(rules, split="test"))
    assert make_task(own, shards).protocol.prompt == "{question}"


def test_what_is_neither_true_nor_false_is_named(shards: Path) -> None:
    card = load_card("easy_vqa_shape")
    assert card.evaluation is not None
    matched = replace(card, evaluation=replace(card.evaluation, mode="match", candidates=()))
    with pytest.raises(UserError, match=r"easy_vqa_shape/\S+ has the answer '\w+', and mode=match judges statements"):
        make_task(matched, shards)
