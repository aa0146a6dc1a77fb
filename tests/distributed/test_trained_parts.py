"""Vision encoder and LLM unfrozen, objectives of several kinds: ranks compute what one process computes, DDP and FSDP2."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from instructblip.weights.load import load_run
from tests.kit.objectives import register
from tests.kit.runs import World, read_lines, start_ranks

RECIPE = (
    "~recipe.phases",
    "recipe.phases={"
    "alignment: {steps: 2, batch_size: 8, micro_batch_size: 2, learning_rate: 1e-4, objectives: {alignment: 1.0}}, "
    "instruction: {steps: 4, batch_size: 8, micro_batch_size: 2, learning_rate: 1e-4, "
    "objectives: {language_modeling: 1.0, prompt_norm: 0.1, prompt_contrast: 0.5}}}",
    "recipe.validate_every=4",
    "recipe.checkpoint_every=3",
    "+recipe.average_decay=0.9",
    "suite.held_in=[easy_vqa_shape]",
    "suite.held_out=[]",
    "recipe.final_samples=2",
    "qformer.dropout=0",
    "data.cache_features=false",
)
ALL = ("train.vision=full", "train.llm=full", "+train.learning_rates.llm=3e-5")


def train(world: World, output: Path, *more: str, ranks: int = 1) -> Path:
    arguments = [*world.train, *RECIPE, f"output={output}", *more]
    commands = start_ranks(world, "train.py", *arguments, cwd=output, ranks=ranks, before=register)
    assert [command.wait() for command in commands] == [0] * ranks, "".join(command.output for command in commands)
    return output / "demo"


@pytest.fixture(scope="module")
def alone(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(world, tmp_path_factory.mktemp("alone"), *ALL)


def assert_like(found: Path, expected: Path) -> None:
    lines, others = read_lines(found / "metrics.jsonl"), read_lines(expected / "metrics.jsonl")
    assert [line["sample_ids"] for line in lines] == [line["sample_ids"] for line in others]
    for line, other in zip(lines, others, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=2e-6)
        assert line.get("loss_by_objective", {}) == pytest.approx(other.get("loss_by_objective", {}), rel=1e-5)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    for file in ("model", "average", "optimizer"):
        name = f"checkpoints/step_00000006/{file}.safetensors"
        tensors, their = load_file(found / name), load_file(expected / name)
        assert tensors.keys() == their.keys()
        for key, tensor in their.items():
            torch.testing.assert_close(tensors[key], tensor, rtol=1e-3, atol=2e-5, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "parallel"), [(2, ("parallel=ddp",)), (4, ("parallel=fsdp", "parallel.shard_size=2"))]
)
def test_trained_parts_are_like_one_process(
    world: World, alone: Path, tmp_path: Path, ranks: int, parallel: tuple[str, ...]
) -> None:
    assert_like(train(world, tmp_path, *ALL, *parallel, ranks=ranks), alone)


@pytest.mark.slow
def test_shards_are_like_one_process_and_their_checkpoint_goes_on_in_one(
    world: World, alone: Path, tmp_path: Path
) -> None:
    run = train(world, tmp_path, *ALL, "parallel=fsdp", ranks=2)
    assert_like(run, alone)
    shutil.rmtree(run / "checkpoints/step_00000006")
    shutil.rmtree(run / "evaluation")
    assert_like(train(world, tmp_path, *ALL, "resume=auto"), alone)


@pytest.mark.slow
def test_what_trains_moves_and_is_loaded_and_what_is_frozen_stays_bit_equal(
    world: World, alone: Path, tmp_path: Path
) -> None:
    only_llm = train(world, tmp_path, "train.llm=full", "train.qformer=frozen", "parallel=fsdp", ranks=2)
    first, second = (load_file(only_llm / f"checkpoints/step_0000000{step}/model.safetensors") for step in (3, 6))
    moved = {name.partition(".")[0] for name in first if not torch.equal(first[name], second[name])}
    assert moved == {"llm"}
    assert {name.partition(".")[0] for name in first} == {"vision_norm", "qformer", "projection", "llm"}
    everything = load_file(alone / "checkpoints/step_00000006/model.safetensors")
    assert {name.partition(".")[0] for name in everything} == {"vision", "vision_norm", "qformer", "projection", "llm"}
    with world.here():
        loaded = load_run(only_llm, device="cpu").model
        whole = load_run(alone, device="cpu").model
    averages = [load_file(run / "checkpoints/step_00000006/average.safetensors") for run in (only_llm, alone)]
    assert loaded.trained_parts == {"llm"}
    assert whole.trained_parts == {"vision", "qformer", "llm"}
    for model, tensors, average in zip((loaded, whole), (second, everything), averages, strict=True):
        assert average.keys() == tensors.keys()
        for name, tensor in average.items():
            assert torch.equal(model.state_dict()[name], tensor), name
