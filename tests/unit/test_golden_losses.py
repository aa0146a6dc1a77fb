"""Ten steps of a tiny run have the losses that are kept here: an edit that claims to change no result changes none of these.

Whoever changes them says in the commit why results change. They were computed in float32 on one thread of x86-64; another
processor may round differently, hence the tolerance.
"""

from pathlib import Path

import pytest

from tests.kit.runs import World, read_lines, train_here

LOSSES = [10.1879, 9.202068, 9.638503, 5.731471, 7.054394, 7.102716, 6.200763, 6.751642, 6.820188, 6.262082]
GRAD_NORMS = [83.1178, 59.4123, 75.37791, 58.5919, 9.561777, 9.765509, 10.06771, 7.839208, 12.2057, 9.539372]
RECIPE = (
    "~recipe.phases",
    "recipe.phases={"
    "alignment: {steps: 4, batch_size: 4, learning_rate: 3e-3, warmup_steps: 2, objectives: {alignment: 1.0}}, "
    "instruction: {steps: 6, batch_size: 4, micro_batch_size: 2, learning_rate: 1e-3}}",
    "recipe.validate_every=50",
    "recipe.checkpoint_every=50",
    "suite.held_in=[]",
    "suite.held_out=[]",
    "mixture.templates=bare",
    "llm.prompt_suffix=''",
)


def test_the_losses_of_ten_steps(world: World, tmp_path: Path) -> None:
    lines = read_lines(train_here(world, tmp_path, *RECIPE) / "metrics.jsonl")
    assert [line["loss"] for line in lines] == pytest.approx(LOSSES, rel=2e-6)
    assert [line["grad_norm"] for line in lines] == pytest.approx(GRAD_NORMS, rel=1e-4)
