"""Whole runs of BLIP-2's first stage: killed ones go on bit for bit, what they leave is loaded, mistakes are one line."""

import os
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

import instructblip
from instructblip.config.schema import EvaluateConfig, TrainConfig
from instructblip.errors import UserError
from instructblip.evaluation.run import evaluate
from instructblip.files import read_json
from instructblip.models.blip2 import BLIP2
from instructblip.training.metrics_log import MetricsLog
from instructblip.training.run import train
from tests.faults.test_kill_resume import die_saving
from tests.kit.runs import World, compose, read_lines, run_ranks, start, train_here

pytestmark = pytest.mark.slow

STEPS = 12
EXACT = ("step", "loss", "loss_by_objective", "loss_by_dataset", "lr", "grad_norm", "sample_ids", "validation")


@pytest.fixture(scope="module")
def finished(caption_world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_here(caption_world, tmp_path_factory.mktemp("finished"))


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [{key: line.get(key) for key in EXACT} for line in read_lines(folder / "metrics.jsonl")]


def last(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoints/step_{STEPS:08d}/{name}.safetensors")


def test_a_run_logs_each_objective_and_validates_by_recall_to_its_last_step(finished: Path) -> None:
    lines = read_lines(finished / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(line["loss_by_objective"].keys() == {"contrastive", "matching", "captioning"} for line in lines)
    assert [line["step"] for line in lines if "validation" in line] == [4, 8, 12]
    assert all(0 <= line["validation"]["coco_retrieval"] <= 100 for line in lines if "validation" in line)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    assert (
        read_json(finished / "evaluation/results.json")["datasets"]["coco_retrieval"]["parts"]["TR@1"]["value"] == 100
    )


def test_a_checkpoint_holds_what_trains_and_knows_what_does_not(finished: Path) -> None:
    held = last(finished, "model")
    assert {name.partition(".")[0] for name in held} == {
        "vision_norm",
        "qformer",
        "vision_projection",
        "text_projection",
        "matching_head",
        "temperature",
    }
    state = read_json(finished / f"checkpoints/step_{STEPS:08d}/state.json")
    assert state["frozen"].keys() == {"vision"}


def die_logging(step: int) -> None:
    """Kill this process when a step stands in metrics.jsonl."""
    append = MetricsLog.append

    def dying(self: MetricsLog, entry: dict[str, Any]) -> None:
        append(self, entry)
        if entry["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)

    MetricsLog.append = dying  # type: ignore[method-assign]


def be_killed(arguments: Sequence[str], kills: Sequence[Callable[[], None]]) -> None:
    """Before train.py begins: as many processes that began it, went on where the last one was, and were killed."""
    config = compose("train", TrainConfig, arguments)
    for before in kills:
        if not (child := os.fork()):
            before()
            train(config, Console(quiet=True))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_ten_kills_leave_no_trace(caption_world: World, finished: Path, tmp_path: Path) -> None:
    """In other processes, eight between steps and two while saving: same samples, negatives, losses, scores and weights."""
    arguments, folder = [*caption_world.train, f"output={tmp_path}", "resume=auto"], tmp_path / "blip2_stage1"
    kills = {step: partial(die_logging, step) for step in (1, 2, 3, 4, 5, 7, 8, 11)}
    kills |= {step: partial(die_saving, step) for step in (6, STEPS)}
    before = partial(be_killed, arguments, [kills[step] for step in sorted(kills)])
    command = start(caption_world, "train.py", *arguments, cwd=tmp_path, before=before)
    assert command.wait() == 0, command.output
    assert "continuing" in command.output
    assert metrics_of(folder) == metrics_of(finished)
    for name in ("model", "optimizer"):
        tensors, expected = last(folder, name), last(finished, name)
        assert tensors.keys() == expected.keys()
        assert [key for key, tensor in tensors.items() if not torch.equal(tensor, expected[key])] == []


def test_two_ranks_and_other_micro_batches_are_like_one_process(caption_world: World, tmp_path: Path) -> None:
    steady = ("qformer.dropout=0", "recipe.phases.align.steps=4")
    alone = train_here(caption_world, tmp_path / "alone", *steady)
    other = ("recipe.phases.align.micro_batch_size=1", "parallel=fsdp")
    options = [*caption_world.train, *steady, f"output={tmp_path}/two", *other]
    run_ranks(caption_world, "train.py", *options, cwd=tmp_path)
    lines, others = (read_lines(folder / "metrics.jsonl") for folder in (tmp_path / "two/blip2_stage1", alone))
    for line, other in zip(lines, others, strict=True):
        assert line["sample_ids"] == other["sample_ids"]
        assert line["loss_by_objective"] == pytest.approx(other["loss_by_objective"], rel=2e-5)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert line.get("validation") == other.get("validation")


def test_an_empty_suite_validates_nothing(caption_world: World, tmp_path: Path) -> None:
    nothing = ("suite=none", "suite.held_in=[]")  # the world names a dataset of its own
    folder = train_here(caption_world, tmp_path, *nothing, "recipe.phases.align.steps=1", "recipe.validate_every=1")
    assert ["validation" in line for line in read_lines(folder / "metrics.jsonl")] == [False]


def test_a_run_is_loaded_and_matches_and_captions(caption_world: World, finished: Path) -> None:
    with caption_world.here():
        model = instructblip.load(finished, device="cpu")
    assert isinstance(model, BLIP2)
    held = last(finished, "model")
    assert all(torch.equal(tensor, held[name]) for name, tensor in model.held_state().items())
    pictures = [Image.new("RGB", (40, 40), color) for color in ("red", "blue")]
    assert model.match(pictures, ["a red circle", "a blue circle"]).shape == (2,)
    assert len(model.generate(pictures, max_new_tokens=5, min_new_tokens=1)) == 2


def test_it_is_no_model_to_ask_questions_of(caption_world: World, finished: Path, tmp_path: Path) -> None:
    config = compose("evaluate", EvaluateConfig, [f"checkpoint={finished}", "suite=demo", f"output={tmp_path}"])
    with pytest.raises(UserError, match="has no language model to rank candidates with"):
        evaluate(config, Console(quiet=True))
    with caption_world.here(), pytest.raises(UserError, match="has no language model to replace"):
        instructblip.load(finished, llm="smollm2_135m")


MISTAKES = {
    "llm=smollm2_135m": "model=blip2_stage1 has no language model, and llm=smollm2_135m is one; set llm=null",
    "qformer.instruction_aware=false": "set qformer.instruction_aware=true",
    "qformer.init=blip2": "qformer.init=blip2 is none of bert, given, scratch",
    "train.llm=full": "has no LLM to train",
    "recipe.phases.align.batch_size=1": "batch_size=1 leaves contrastive nothing to compare a sample with",
    "recipe.phases.align.objectives={alignment: 1.0}": "choose from language_modeling, contrastive, matching, captioning",
    "recipe.phases.align.batching=packed": "needs a decoder-only LLM, model=blip2_stage1 has none",
    "qformer.extra_tokens=[]": r"the tokenizer has no \[DEC\]",
    "suite.held_in=[easy_vqa_shape]": "model=blip2_stage1 has no language model to rank candidates with",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_mistakes_are_one_line(caption_world: World, tmp_path: Path, override: str) -> None:
    with pytest.raises(UserError, match=MISTAKES[override]) as error:
        train_here(caption_world, tmp_path, override)
    assert "\n" not in str(error.value)


def test_settings_of_one_model_are_refused_with_another() -> None:
    for override, line in {
        "model.feature_width=8": "model.feature_width is none of model=instructblip",
        "llm=null": "model=instructblip needs a language model",
    }.items():
        with pytest.raises(UserError, match=line):
            compose("train", TrainConfig, [override])
    config = compose("train", TrainConfig, ["recipe.phases.instruction.gather=detached"])
    with pytest.raises(UserError, match="gather=detached is of objectives over the whole batch"):
        train(config, Console(quiet=True))
    config = compose("train", TrainConfig, ["recipe.phases.instruction.objectives={matching: 1.0}"])
    with pytest.raises(UserError, match="matching needs match_logits, which model=instructblip does not give"):
        train(config, Console(quiet=True))
