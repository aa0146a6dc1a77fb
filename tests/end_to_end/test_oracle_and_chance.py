"""Every protocol: a model that answers from the labels scores the maximum, one of random parts scores near chance.

This catches swapped labels, classes in another order than the labels', wrong splits, and prompts that give the answer away.
"""

import math
from pathlib import Path
from typing import cast

import pytest

from instructblip.data.cards import load_card
from instructblip.evaluation.protocol import Task, chance_level
from instructblip.evaluation.runner import read_pixels, run_task
from instructblip.models.blip2 import BLIP2
from instructblip.models.instructblip import InstructBLIP
from tests.kit.all_datasets import official_cards
from tests.kit.stage1 import tiny_stage1
from tests.kit.synthetic_tasks import Oracle, read_number, synthetic_task
from tests.kit.tiny import IMAGE_SIZE, tiny_model

EVALUATED = [card.name for card in official_cards() if card.evaluation is not None]
BEST = {"cider": 1000.0}  # CIDEr-D is 10 at most, and papers print it times 100
SIGMAS = 4.0


@pytest.fixture(scope="module")
def random_models() -> tuple[InstructBLIP, BLIP2]:
    """Nothing in them was ever trained."""
    return tiny_model(seed=3), tiny_stage1().eval()


def task_of(name: str, folder: Path, **options: str) -> Task:
    card = load_card(name)
    assert card.evaluation is not None
    writes = options.get("preset") == "lavis" or card.evaluation.mode == "generate"
    several = name == "visdial" or card.evaluation.mode == "retrieve"  # a sample asks for a hundred of scores
    return synthetic_task(card, folder, 24 if writes else 40 if several else 100, **options)


@pytest.mark.parametrize("preset", ["paper", "lavis"])
@pytest.mark.parametrize("name", EVALUATED)
def test_an_oracle_scores_the_maximum(name: str, preset: str, tmp_path: Path) -> None:
    task = task_of(name, tmp_path, preset=preset)
    oracle = Oracle(task)
    result = run_task(cast(InstructBLIP, oracle), task, read_number, batch_size=7, show_progress=False)
    assert result.value == pytest.approx(BEST.get(task.protocol.metric, 100.0))
    assert len(oracle.asked) == len(task.vocabulary if task.protocol.mode == "retrieve" else task.samples)
    for sample in task.samples:
        said = sample.prompt.replace("{question}", "")
        answers = {answer for answer in sample.record.answers if not sample.record.choices}
        assert not any(f" {answer} " in f" {said} " for answer in answers - {"true", "false"})


# One card of each mode and number of candidates stands among the fast tests; the others are asked alike.
QUICK = (
    *("easy_vqa_shape", "easy_vqa_statements", "clothing_what", "scienceqa_img", "iconqa", "hateful_memes"),
    *("msvd_qa", "visdial", "gqa", "flickr30k", "flickr30k_retrieval"),
)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in EVALUATED]
)
def test_a_model_of_random_parts_scores_near_chance(
    name: str, random_models: tuple[InstructBLIP, BLIP2], tmp_path: Path
) -> None:
    task = task_of(name, tmp_path)
    model = random_models[task.protocol.mode == "retrieve"]
    result = run_task(model, task, read_pixels(IMAGE_SIZE), batch_size=40, show_progress=False)
    chance, count = chance_level(task), len(task.samples)
    assert result.value is not None
    if task.protocol.mode == "generate":
        assert chance is None
        assert result.value <= 0.01 * BEST.get(task.protocol.metric, 100.0)  # of all texts there are, the right one
        return
    assert chance is not None
    assert abs(result.value - chance) <= SIGMAS * deviation(task, chance / 100, count)


def deviation(task: Task, chance: float, count: int) -> float:
    """Standard deviation of the score of a guess, on the scale of 0 to 100."""
    if task.protocol.metric == "auroc":  # Hanley and McNeil 1982, two classes of about half of the samples each
        return 100 * math.sqrt((count + 1) / (12 * (count / 2) ** 2))
    if task.protocol.metric == "visdial":
        options = len(task.samples[0].record.choices)
        squares = sum(1 / rank**2 for rank in range(1, options + 1)) / options
        return 100 * math.sqrt((squares - chance**2) / count)
    return 100 * math.sqrt(chance * (1 - chance) / count)
