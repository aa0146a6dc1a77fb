"""Low-rank adapters over ranks: those of DDP and FSDP2 compute what one process computes, and a killed run goes on."""

import json
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from instructblip.distributed import Ranks
from instructblip.models.adapters import Adapter, is_adapter
from instructblip.objectives import make_objectives
from instructblip.training.layout import is_sharded
from instructblip.training.loop import train_step
from instructblip.training.optim import make_adamw
from instructblip.training.parallel import StepContext, parallelize
from instructblip.weights.load import load_model
from instructblip.weights.parts import train_parts
from tests.faults.test_kill_resume import die_saving
from tests.kit.ranks import on_ranks
from tests.kit.runs import World, evaluate_here, read_lines, run, scores, start, train_here
from tests.kit.tiny import tiny_encoder_decoder_llm, tiny_llm, tiny_model, tiny_released_model
from tests.unit.test_parallel import batches

pytestmark = pytest.mark.slow

pytest.importorskip("peft", reason="adapters need requirements-lora.txt")

ADAPTER = Adapter(rank=4, alpha=8.0, dropout=0.0, targets=("all-linear",))


def three_steps(ranks: Ranks, kind: str, llm: str, recompute: bool) -> dict[str, Any]:
    """Losses, and the adapters after steps on this rank's micro-batches: three on one rank, two and one on two."""
    torch.manual_seed(1)
    if llm == "with a ViT":
        model, parts = tiny_released_model(), ("vision", "qformer", "llm")
    else:
        model = tiny_model(llm=tiny_llm() if llm == "decoder" else tiny_encoder_decoder_llm())
        parts = ("qformer", "llm")
    train_parts(model, parts, dict.fromkeys(parts, ADAPTER))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # with zeros there A would have no gradient, and Adam makes steps of what rounding leaves
            parameter.data.normal_(std=0.1)
    wrapped = parallelize(model, ranks, kind=kind, activation_checkpointing=recompute)
    sharded = is_sharded(kind, ranks.world_size)
    context = StepContext(ranks=ranks, wrapped=wrapped, equal_passes=sharded)
    named = list(model.named_parameters())
    optimizer = make_adamw(named, weight_decay=0.05, betas=(0.9, 0.999), part_of=model.part_of)
    size, language, losses = model.vision.image_size, make_objectives({"language_modeling": 1.0}), []
    own = [
        batch._replace(images=batch.images[..., :size, :size]) for batch in batches()[ranks.rank :: ranks.world_size]
    ]
    for _ in range(3):
        done = train_step(model.train(), optimizer, own, objectives=language, rate=1e-2, clip_norm=1.0, context=context)
        losses.append(done.loss)
    shards = {name for name, parameter in named if isinstance(parameter, DTensor)}
    assert bool(shards) == sharded and not any(map(is_adapter, shards))
    return {"losses": losses, "adapters": {name: p.detach() for name, p in named if is_adapter(name)}}


@pytest.mark.parametrize(
    ("kind", "llm", "recompute"),
    [
        ("ddp", "decoder", False),
        ("fsdp", "decoder", True),
        ("fsdp", "with a ViT", False),
        ("fsdp", "encoder_decoder", False),
    ],
)
def test_two_ranks_compute_what_one_computes(kind: str, llm: str, recompute: bool) -> None:
    alone = three_steps(Ranks(), kind, llm, False)
    for found in on_ranks(2, three_steps, kind, llm, recompute):
        assert found["losses"] == pytest.approx(alone["losses"], rel=2e-6)
        for name, tensor in alone["adapters"].items():
            torch.testing.assert_close(found["adapters"][name], tensor, atol=2e-5, rtol=1e-3, msg=name)


# --- runs --------------------------------------------------------------------------------------------------------------

SHORT = (
    "~recipe.phases",
    "recipe.phases={instruction: {steps: 6, batch_size: 4, micro_batch_size: 2, learning_rate: 1e-2, batching: packed}}",
    "recipe.checkpoint_every=2",
    "recipe.validate_every=6",
    "+recipe.average_decay=0.9",
    "suite.held_in=[easy_vqa_shape]",
    "suite.held_out=[]",
    "recipe.final_samples=3",
    "train.llm=lora",
    "train.lora.llm={rank: 4, dropout: 0.3, targets: [q_proj, v_proj, down_proj]}",
    "+train.learning_rates.llm=3e-2",
    "llm.quantization=int8",
)


@pytest.fixture(scope="module")
def finished(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_here(world, tmp_path_factory.mktemp("adapted"), *SHORT)


def tensors(folder: Path, step: int = 6) -> dict[str, dict[str, torch.Tensor]]:
    checkpoint = folder / f"checkpoints/step_{step:08d}"
    return {file: load_file(checkpoint / f"{file}.safetensors") for file in ("model", "optimizer", "average")}


def test_a_killed_run_goes_on_bit_equal(world: World, finished: Path, tmp_path: Path) -> None:
    arguments = [*world.train, *SHORT, f"output={tmp_path}"]
    command = start(world, "train.py", *arguments, cwd=tmp_path, before=partial(die_saving, 4))
    assert command.wait() == -signal.SIGKILL, command.output
    assert "continuing" in run(world, "train.py", *arguments, "resume=auto", cwd=tmp_path)
    for line, other in zip(
        read_lines(tmp_path / "demo/metrics.jsonl"), read_lines(finished / "metrics.jsonl"), strict=True
    ):
        assert {key: line[key] for key in ("step", "loss", "grad_norm", "sample_ids")} == {
            key: other[key] for key in ("step", "loss", "grad_norm", "sample_ids")
        }
    for file, expected in tensors(finished).items():
        found = tensors(tmp_path / "demo")[file]
        assert found.keys() == expected.keys()
        assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []
    assert scores(tmp_path / "demo/evaluation") == scores(finished / "evaluation")


def test_a_checkpoint_holds_the_adapters_and_no_other_weight_of_the_language_model(finished: Path) -> None:
    stored = tensors(finished)
    names = {name for name in stored["model"] if name.startswith("llm.")}
    assert names and all(map(is_adapter, names))
    assert len(names) == 2 * 2 * 3  # A and B of three layers in two blocks
    assert any(stored["model"][name].abs().max() > 0 for name in names if "lora_B" in name)
    assert {key.rpartition("|")[0] for key in stored["optimizer"]} >= names
    assert all(not torch.equal(stored["average"][name], stored["model"][name]) for name in names)


def test_the_run_is_loaded_and_evaluated_with_its_adapters(world: World, finished: Path, tmp_path: Path) -> None:
    with world.here():
        loaded = load_model(finished, device="cpu").model
    for name, tensor in tensors(finished)["average"].items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.adapters["llm"].targets == ("down_proj", "q_proj", "v_proj")
    with world.here():  # the same from a base and the folder that peft would read
        base = train_here(world, tmp_path, *SHORT[:-4], "llm.quantization=int8", "name=base", "resume=null")
        other = load_model(base, adapter=newest(finished) / "adapters/llm", device="cpu").model
    assert all(
        torch.equal(other.state_dict()[name], tensor)
        for name, tensor in loaded.state_dict().items()
        if is_adapter(name)
    )
    folder = evaluate_here(
        world, finished, tmp_path, "suite=demo", "suite.held_in=[easy_vqa_shape]", "suite.held_out=[]"
    )
    assert scores(folder)
    weights = [
        json.loads((place / "results.json").read_text())["checkpoint"]["trainable_sha256"]
        for place in (folder, finished / "evaluation")
    ]
    assert weights[0] == weights[1]


def newest(folder: Path) -> Path:
    return folder / "checkpoints/step_00000006"


def test_another_base_below_the_adapters_is_refused(world: World, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "demo", ignore=shutil.ignore_patterns("evaluation", "step_00000006"))
    text = run(
        world,
        "train.py",
        *world.train,
        *SHORT[:-1],
        f"output={tmp_path}",
        "resume=auto",
        "resume_allow=[llm.quantization]",
        cwd=tmp_path,
        status=2,
    )
    assert "frozen llm" in text


def test_a_run_goes_on_from_anothers_adapters_or_says_how(world: World, finished: Path, tmp_path: Path) -> None:
    arguments = [*world.train, f"output={tmp_path}", f"init_from={finished}", "plan=false"]
    text = run(world, "train.py", *arguments, *SHORT[:-4], "llm.quantization=int8", cwd=tmp_path, status=2)
    assert "train.llm=lora train.lora.llm.rank=4" in text
    printed = run(world, "train.py", *arguments, *SHORT, "name=second", cwd=tmp_path)
    assert "taken too: the adapters on the llm" in printed
    first = read_lines(tmp_path / "second/metrics.jsonl")[0]["loss"]
    assert first < read_lines(finished / "metrics.jsonl")[0]["loss"]
