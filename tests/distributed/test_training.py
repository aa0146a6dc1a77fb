"""Several ranks compute what one process computes: same sample ids, losses and weights within rounding, DDP and FSDP2."""

import gc
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from instructblip.models.base import blocks_of
from instructblip.training import run as run_module
from instructblip.training import setup as run_setup
from tests.kit.runs import World, read_lines, run, run_ranks, scores, start_ranks

STEPS = 20
SAVED = (5, 10, 15, 20)
ENCODING = "data.cache_features=false"
RECIPE = (
    "~recipe.phases",
    "recipe.phases={"
    "alignment: {steps: 5, batch_size: 8, micro_batch_size: null, learning_rate: 1e-4, objectives: {alignment: 1.0}}, "
    "instruction: {steps: 15, batch_size: 8, batching: fixed, micro_batch_size: null, learning_rate: 1e-4}}",
    "recipe.validate_every=10",
    "recipe.checkpoint_every=5",
    "recipe.keep_checkpoints=4",
    "+recipe.keep_best=mean",
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


@pytest.fixture(scope="module")
def alone_encoding(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that encodes its images anew in every step."""
    output = tmp_path_factory.mktemp("alone_encoding")
    run(world, "train.py", *overrides(world, output, ENCODING), cwd=output)
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
    for step in SAVED:
        file = f"checkpoints/step_{step:08d}/model.safetensors"
        weights, their = load_file(found / file), load_file(expected / file)
        assert weights.keys() == their.keys()
        assert max(float((weights[name].double() - their[name].double()).abs().max()) for name in weights) < 1e-5
    assert scores(found / "evaluation") == scores(expected / "evaluation")


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel",
    [
        ("parallel=fsdp",),
        ("parallel=ddp", "recipe.phases.alignment.micro_batch_size=2", "recipe.phases.instruction.micro_batch_size=1"),
        ("parallel=fsdp", "parallel.shard_size=1", "recipe.phases.instruction.batching=bucketed"),
    ],
)
def test_two_ranks_are_like_one(world: World, alone: Path, tmp_path: Path, parallel: tuple[str, ...]) -> None:
    printed = run_ranks(world, "train.py", *overrides(world, tmp_path, *parallel), cwd=tmp_path)
    assert_like(tmp_path / "demo", alone)
    assert printed[1] == ""  # the first rank speaks and writes for all
    assert "metrics.jsonl" in printed[0]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "shard_size"), [(2, 2), (4, 2)])
def test_ranks_that_share_the_encoder_too_are_like_one(
    world: World, alone_encoding: Path, tmp_path: Path, ranks: int, shard_size: int
) -> None:
    """Whatever one rank does to save a checkpoint, all of them gather the same blocks in the steps that follow."""
    sharded = (ENCODING, "parallel=fsdp", f"parallel.shard_size={shard_size}", "parallel.timeout=60")
    arguments = overrides(world, tmp_path, *sharded)
    commands = start_ranks(world, "train.py", *arguments, cwd=tmp_path, ranks=ranks, before=watch_the_passes)
    ends = [command.wait() for command in commands]
    assert ends == [0] * ranks, "".join(command.output for command in commands)
    assert_like(tmp_path / "demo", alone_encoding)


def watch_the_passes() -> None:
    """No block stays gathered between steps, and FSDP's notes of the passes do not grow with the steps."""
    save = run_module._save

    def watched(training: Any, step: int, **options: Any) -> None:
        model = training.model
        for root in (model.vision.backbone, model.llm.model.base_model):
            assert all(isinstance(parameter, DTensor) for block in blocks_of(root) for parameter in block.parameters())
            assert not getattr(root._get_fsdp_state()._comm_ctx, "post_forward_order", [])  # none before the first pass
        save(training, step, **options)

    run_module._save = watched


def watch_the_sharding() -> None:
    """What the run holds after sharding: no whole block of the LLM; groups that wait as long as the run says."""
    original = run_setup.parallelize

    def watched(model: Any, *arguments: Any, **options: Any) -> Any:
        blocks = blocks_of(model.llm.model)
        whole = [weakref.ref(parameter) for block in blocks for parameter in block.parameters()]
        wrapped = original(model, *arguments, **options)
        gc.collect()
        assert whole
        assert [ref for ref in whole if ref() is not None] == []
        mesh = next(iter(blocks[0].parameters())).device_mesh
        assert mesh.size() == options["shard_size"]
        backend: Any = mesh.get_group()._get_backend(torch.device("cpu"))
        assert backend.options._timeout == timedelta(seconds=77)
        return wrapped

    run_setup.parallelize = watched  # type: ignore[assignment]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_sharding_leaves_no_whole_block(world: World, tmp_path: Path, size: int) -> None:
    few = "~recipe.phases", "recipe.phases={instruction: {steps: 1, batch_size: 2, learning_rate: 1e-4}}"
    options = ("parallel=fsdp", f"parallel.shard_size={size}", "parallel.timeout=77", "suite.held_in=[]", *few)
    arguments = overrides(world, tmp_path, *options)
    commands = start_ranks(world, "train.py", *arguments, cwd=tmp_path, before=watch_the_sharding)
    ends = [command.wait() for command in commands]
    assert ends == [0, 0], commands[0].output + commands[1].output
