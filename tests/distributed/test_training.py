"""Two ranks compute what one process computes: same sample ids, losses and weights within rounding, DDP and FSDP2."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.runs import World, read_lines, run, run_ranks, scores

STEPS = 20
RECIPE = (
    "recipe.phases=["
    "{name: alignment, steps: 5, batch_size: 6, micro_batch_size: null, learning_rate: 1e-4, through_llm: false}, "
    "{name: instruction, steps: 15, batch_size: 6, batching: fixed, micro_batch_size: null, learning_rate: 1e-4}]",
    "recipe.validate_every=10",
    "recipe.checkpoint_every=8",
    "suite.held_in=[easy_vqa_shape]",
    "suite.held_out=[]",
    "recipe.final_samples=2",
    "qformer.dropout=0",  # its masks are drawn by rank
)


def overrides(world: World, output: Path, *more: str) -> list[str]:
    return [*world.train, *RECIPE, f"output={output}", *more]


@pytest.fixture(scope="module")
def alone(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    output = tmp_path_factory.mktemp("alone")
    run(world, "train.py", *overrides(world, output), cwd=output)
    return output / "demo"


def assert_like(found: Path, expected: Path) -> None:
    lines, others = read_lines(found / "metrics.jsonl"), read_lines(expected / "metrics.jsonl")
    for key in ("step", "sample_ids", "tokens", "lr", "phase"):
        assert [line[key] for line in lines] == [line[key] for line in others]
    assert len(lines) == STEPS
    for line, other in zip(lines, others, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-6 * max(1, other["loss"]))
        assert line["loss_by_dataset"] == pytest.approx(other["loss_by_dataset"], rel=1e-5)
        assert line.get("validation") == other.get("validation")
    file = f"checkpoints/step_{STEPS:08d}/model.safetensors"
    weights, their = load_file(found / file), load_file(expected / file)
    assert weights.keys() == their.keys()
    assert max(float((weights[name].double() - their[name].double()).abs().max()) for name in weights) < 1e-5
    assert scores(found / "evaluation") == scores(expected / "evaluation")


@pytest.mark.parametrize(
    "parallel",
    [
        ("parallel=fsdp",),
        ("parallel=ddp", "recipe.phases.0.micro_batch_size=2", "recipe.phases.1.micro_batch_size=1"),
        ("parallel=fsdp", "parallel.shard_size=1", "recipe.phases.1.batching=bucketed"),
    ],
)
def test_two_ranks_are_like_one(world: World, alone: Path, tmp_path: Path, parallel: tuple[str, ...]) -> None:
    printed = run_ranks(world, "train.py", *overrides(world, tmp_path, *parallel), cwd=tmp_path)
    assert_like(tmp_path / "demo", alone)
    assert printed[1] == ""  # the first rank speaks and writes for all
    assert "metrics.jsonl" in printed[0]
