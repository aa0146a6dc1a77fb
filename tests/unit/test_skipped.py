"""Too many skipped steps end a run: all in a row, or here and there, and over restarts alike."""

import pytest

from instructblip.errors import UserError
from instructblip.training.skipped import WINDOW, SkippedSteps


def test_few_enough_of_any_hundred_are_skipped_for_ever() -> None:
    skipped = SkippedSteps(limit=3)
    for step in range(1, 30 * WINDOW):
        if step % WINDOW in (7, 8, 60):
            skipped.add(step)
    assert skipped.state() == [29 * WINDOW + k for k in (7, 8, 60)]


@pytest.mark.parametrize("apart", [1, WINDOW // 3 - 1])
def test_one_more_ends_the_run(apart: int) -> None:
    skipped = SkippedSteps(limit=3)
    steps = [1000 + apart * number for number in range(4)]
    for step in steps[:3]:
        skipped.add(step)
    resumed = SkippedSteps(limit=3)
    resumed.restore(skipped.state())
    line = (
        f"^4 of the last 100 steps were skipped, the last {steps[3]}, where recipe.non_finite_limit=3 allows no more; "
    )
    for counted in (skipped, resumed):
        with pytest.raises(UserError, match=line):
            counted.add(steps[3])


def test_a_young_run_counts_its_own_steps() -> None:
    skipped = SkippedSteps(limit=1)
    skipped.add(1)
    with pytest.raises(UserError, match=r"^2 of the last 2 steps"):
        skipped.add(2)
