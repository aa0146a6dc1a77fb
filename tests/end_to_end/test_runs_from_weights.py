"""Runs that start from other weights: the losses of their first steps, what they remember, how they go on."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from instructblip.config.schema import EvaluateConfig, TrainConfig
from instructblip.config.validate import read_model_config
from instructblip.data.loader import load_batches
from instructblip.distributed import ALONE
from instructblip.errors import UserError
from instructblip.evaluation.run import evaluate
from instructblip.models.base import Model
from instructblip.models.instructblip import InstructBLIP
from instructblip.training.loop import StepResult, run_steps
from instructblip.training.planned import print_plan
from instructblip.training.run import train
from instructblip.training.schedule import StepPosition, rank_positions, step_batching
from instructblip.training.setup import TrainingRun, make_optimisation, set_up
from instructblip.weights import init_sources
from instructblip.weights.__main__ import main as convert
from instructblip.weights.init_from import start_from
from instructblip.weights.init_sources import find_start, read_start
from instructblip.weights.load import load_model
from instructblip.weights.parts import build_model
from tests.kit.blip2 import write_captioner
from tests.kit.families import write_llm
from tests.kit.runs import World, compose, one_thread, read_lines, run_ranks, train_here
from tests.kit.tiny import tiny_huggingface, tiny_llama, tiny_llm_tokenizer

TEN_STEPS = (
    "~recipe.phases",
    "recipe.phases={instruction: {steps: 10, batch_size: 4, micro_batch_size: 2, learning_rate: 1e-3}}",
    "recipe.validate_every=50",
    "recipe.checkpoint_every=4",
    "suite=none",
    "data.cache_features=false",
)


THREE = ("recipe.phases.instruction.steps=3", "qformer.dropout=0")


@dataclass(frozen=True)
class Source:
    """The same weights in several formats, and a configuration whose parts they fit.

    Attributes:
        config: of a run of ten steps.
        places: by format.
        model: with the weights, read by `load_model`.
    """

    config: TrainConfig
    places: dict[str, Path]
    model: InstructBLIP


@pytest.fixture(scope="module")
def instructblip(world: World, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return make_source(world, tmp_path_factory.mktemp("instructblip"), tiny_huggingface, lavis=True)


@pytest.fixture(scope="module")
def blip2(world: World, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return make_source(world, tmp_path_factory.mktemp("blip2"), partial(write_captioner, llm="opt"), lavis=True)


def make_source(world: World, folder: Path, write: Callable[[Path], object], *, lavis: bool) -> Source:
    places = {name: folder / name for name in ("transformers", "run")} | {"lavis": folder / "model.pth"}
    write(places["transformers"])
    assert convert([str(places["transformers"]), str(places["run"]), "--to", "native"]) == 0
    assert convert([str(places["run"]), str(places["lavis"]), "--to", "lavis"]) == 0
    parts = read_model_config(places["run"] / "config.yaml")
    config = compose("train", TrainConfig, [*world.train, *TEN_STEPS])
    qformer = replace(parts.qformer, init="given", dropout=0.1)
    config = replace(config, model=parts.model, vision=parts.vision, qformer=qformer, llm=parts.llm)
    model = load_model(places["transformers"], device="cpu").model
    assert isinstance(model, InstructBLIP)
    return Source(config, places, model)


def first_losses(world: World, config: TrainConfig, folder: Path, by_hand: Model | None = None) -> list[float]:
    """The losses of a run's ten steps, its weights replaced by those of `by_hand` where that is given."""
    with world.here(), one_thread():
        run, _ = set_up(config, folder, ALONE, Console(quiet=True))
        if by_hand is not None:
            run.model.load_state_dict(by_hand.state_dict())
        return _take_steps(run)


def _take_steps(run: TrainingRun) -> list[float]:
    losses: list[float] = []

    def after_step(step: int, place: StepPosition, rate: float, result: StepResult) -> bool:
        losses.append(result.loss)
        return False

    run.optimisation = make_optimisation(run, lambda: 0)
    batches = load_batches(
        run.dataset, rank_positions(run.phases, 0), batching=partial(step_batching, run.phases), workers=0
    )
    run_steps(
        run.model,
        run.optimisation.optimizer,
        run.phases,
        ((loaded.step, loaded.batches) for loaded in batches),
        start_step=0,
        seed=run.config.seed,
        clip_norm=run.config.recipe.clip_norm,
        after_step=after_step,
        context=run.optimisation.context,
    )
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["instructblip", "blip2"])
def test_ten_steps_are_those_of_a_model_whose_weights_were_put_in_by_hand(
    kind: str, world: World, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source: Source = request.getfixturevalue(kind)
    scratch = replace(source.config, qformer=replace(source.config.qformer, init="scratch"))
    expected = first_losses(world, scratch, tmp_path, source.model)
    assert len(set(expected)) == 10
    assert first_losses(world, scratch, tmp_path) != pytest.approx(expected, rel=1e-2)
    checkpoint = source.places["run"] / "checkpoints/step_00000000"
    for place in (*source.places.values(), checkpoint):
        found = first_losses(world, replace(source.config, init_from=[str(place)]), tmp_path)
        assert found == pytest.approx(expected, rel=1e-6), place


@pytest.mark.slow
def test_a_folders_own_parts_are_compared_by_their_weights(
    instructblip: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' folders name no LLM; their ViT is taken where it is another than the configured files'."""
    config, folder = instructblip.config, instructblip.places["transformers"]
    monkeypatch.setattr(init_sources, "hub_folder", {"Someone/instructblip-tiny": folder}.__getitem__)
    weights = [read_start(find_start("Someone/instructblip-tiny"))]
    assert weights[0].source.name == "Someone/instructblip-tiny"
    model = build_model(config)
    assert isinstance(model, InstructBLIP)
    begun = start_from(model, weights, config.qformer, config.llm)
    assert (begun.start.aligned_to, model.held_parts, len(begun.lines)) == (None, {"qformer"}, 1)
    with torch.no_grad():
        model.vision.backbone.blocks[0].norm1.weight.add_(1)
        model.llm.embeddings.weight.mul_(2)
    begun = start_from(model, weights, config.qformer, config.llm)
    assert torch.equal(
        model.vision.backbone.blocks[0].norm1.weight, instructblip.model.vision.backbone.blocks[0].norm1.weight
    )
    assert (begun.start.aligned_to, model.held_parts) == ("the LLM of Someone/instructblip-tiny", {"qformer", "vision"})
    assert begun.lines[1].startswith("taken too: the vision encoder of Someone/instructblip-tiny, which differs")


# --- a whole run -----------------------------------------------------------------------------------------------------


def metrics_of(run: Path) -> list[dict[str, Any]]:
    keys = ("step", "loss", "grad_norm", "lr", "sample_ids")
    return [{key: line[key] for key in keys} for line in read_lines(run / "metrics.jsonl")]


@pytest.mark.slow
def test_a_run_goes_on_exactly_without_its_source_and_remembers_it(
    world: World, finished_run: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(finished_run, tmp_path / "source"))
    arguments = (*TEN_STEPS, f"init_from={source}", "suite.held_out=[easy_vqa_statements]")
    with pytest.raises(UserError, match="init_sha256 wants abc"):
        train_here(world, tmp_path / "pinned", *arguments, "init_sha256=abc")
    whole = train_here(world, tmp_path / "whole", *arguments)
    assert read_lines(whole / "metrics.jsonl")[0]["lr"] == pytest.approx(1e-3)  # step 0, a new schedule
    cut = Path(shutil.copytree(whole, tmp_path / "cut/demo", ignore=shutil.ignore_patterns("evaluation")))
    shutil.rmtree(cut / "checkpoints/step_00000010")
    shutil.rmtree(source)
    again = train_here(world, tmp_path / "cut", *arguments, "resume=auto")
    assert metrics_of(again) == metrics_of(whole)
    for name in ("model", "optimizer"):
        found, expected = (load_file(run / f"checkpoints/step_00000010/{name}.safetensors") for run in (again, whole))
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    for run in (whole, again):
        state = json.loads((run / "checkpoints/step_00000010/state.json").read_text())
        (weights,) = state["start"]["weights"]
        assert (weights["source"], weights["name"], len(weights["sha256"])) == (str(source), "source", 64)
        assert (state["start"]["new"], state["untrained"]) == ([], [])
        written = yaml.safe_load((run / "config.yaml").read_text())
        assert (written["init_from"], written["init_sha256"]) == ([str(source)], [weights["sha256"]])
        assert json.loads((run / "evaluation/results.json").read_text())["started_from"] == [weights]
    with pytest.raises(UserError, match=r"init_from=.*source is no run, transformers folder, hub id or \.pth file"):
        train_here(world, tmp_path / "new", *arguments)


@pytest.mark.slow
def test_what_was_taken_and_what_is_new_is_printed_and_planned(
    world: World, finished_run: Path, tmp_path: Path
) -> None:
    write_llm("vicuna_7b", tmp_path / "llm")
    others = [item for item in world.train if not item.startswith("llm.")]
    other = (*others, *TEN_STEPS, "llm=vicuna_7b", f"llm.sources.path={tmp_path / 'llm'}", "llm.dtype=float32")
    aligned_to = "Q-Former and projection were aligned to smollm2_135m; llm=vicuna_7b needs them trained"

    def printed(*overrides: str) -> str:
        config = compose("train", TrainConfig, [*other, f"init_from={finished_run}", f"output={tmp_path}", *overrides])
        text = StringIO()
        with world.here(), one_thread():
            console = Console(file=text, width=200)
            assert (print_plan(config, console) if config.plan else train(config, console).status) == 0
        return text.getvalue()

    lines = printed("recipe.phases.instruction.steps=1").splitlines()
    (sha256,) = yaml.safe_load((tmp_path / "demo/config.yaml").read_text())["init_sha256"]
    assert lines[0] == (
        f"starting from {finished_run} (sha256 {sha256[:12]}): vision norm, Q-Former, text branch, projection"
    )
    assert aligned_to in lines
    assert (
        f"At the start: {aligned_to}." in printed("plan=true").splitlines()
    )  # by the folder, whatever the YAML states


@pytest.fixture(scope="module")
def tuned_llm(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps that trained its LLM too."""
    return train_here(world, tmp_path_factory.mktemp("tuned"), *TEN_STEPS, *THREE, "train.llm=full")


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_start_alike_and_hold_what_no_other_file_has(
    parallel: str, world: World, tuned_llm: Path, tmp_path: Path
) -> None:
    """The LLM that another run trained is frozen here; each checkpoint holds it, whole, though its blocks are sharded."""
    arguments = (*TEN_STEPS, *THREE, f"init_from={tuned_llm}")
    alone = train_here(world, tmp_path / "alone", *arguments)
    ranks = (f"parallel={parallel}", f"output={tmp_path / 'ranks'}")
    run_ranks(world, "train.py", *world.train, *arguments, *ranks, cwd=tmp_path)
    found, expected = (
        [line["loss"] for line in read_lines(run / "metrics.jsonl")] for run in (tmp_path / "ranks/demo", alone)
    )
    assert found == pytest.approx(expected, rel=5e-6)
    place = "checkpoints/step_00000003/model.safetensors"
    held, source = load_file(tmp_path / "ranks/demo" / place), load_file(tuned_llm / place)
    assert held.keys() == source.keys()
    llm = {name for name in source if name.startswith("llm.")}
    assert len(llm) > 10 and not [name for name in llm if not torch.equal(held[name], source[name])]
    assert [name for name in source.keys() - llm if not torch.equal(held[name], source[name])]


# --- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_untrained_projection_is_evaluated_only_when_that_is_allowed(
    world: World, finished_run: Path, tmp_path: Path
) -> None:
    tokenizer = tiny_llm_tokenizer()
    tiny_llama(len(tokenizer), tokenizer.eos_token_id, width=48).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")

    def ask(*overrides: str, name: str) -> dict[str, Any]:
        arguments = [*world.evaluate, f"checkpoint={finished_run}", f"output={tmp_path}", f"name={name}", *overrides]
        config = compose("evaluate", EvaluateConfig, [*arguments, "samples=2", "suite.held_out=[]"])
        with world.here():
            evaluate(config, Console(quiet=True))
        return json.loads((tmp_path / name / "results.json").read_text())

    wide = ("llm=smollm2_135m", "llm.name=wide", f"llm.sources.path={tmp_path / 'llm'}")
    with pytest.raises(UserError) as error:
        ask(*wide, name="refused")
    assert str(error.value) == (
        f"projection of {finished_run.name} with llm=wide was never trained; train it first (train.py "
        f"init_from={finished_run}/checkpoints/step_00000024), or evaluate it as it is with allow_untrained=true"
    )
    assert not (tmp_path / "refused/results.json").exists()
    model = ask(*wide, "allow_untrained=true", name="allowed")["model"]
    assert (model["aligned_to"], model["untrained"], model["allow_untrained"]) == ("smollm2_135m", ["projection"], True)
    assert "never trained: projection" in (tmp_path / "allowed/report.html").read_text()
    model = ask(name="own")["model"]
    assert (model["aligned_to"], model["untrained"], model["allow_untrained"]) == (None, [], False)


# --- from stage to stage ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_weights_pass_unchanged_from_stage_1_over_stage_2_to_instruction_tuning(world: World, tmp_path: Path) -> None:
    """Stage 1 learns; the steps of the two others are too small to change a weight."""
    without_llm = replace(world, train=tuple(item for item in world.train if not item.startswith("llm.")))

    def stage(world: World, name: str, rate: str, objectives: str, *overrides: str) -> Path:
        phase = f"{{steps: 2, batch_size: 4, learning_rate: {rate}, objectives: {objectives}}}"
        recipe = ("~recipe.phases", f"recipe.phases={{only: {phase}}}", "suite=none", "vision.norm=layer")
        return train_here(world, tmp_path, *recipe, f"name={name}", *overrides)

    pairs, tokens = "{contrastive: 1.0, matching: 1.0, captioning: 1.0}", "qformer.extra_tokens=['[DEC]']"
    stage1 = stage(without_llm, "stage1", "1e-2", pairs, "model=blip2_stage1", "llm=null", tokens)
    deaf = ("model=blip2", "qformer.instruction_aware=false", f"init_from={stage1}")
    stage2 = stage(world, "stage2", "1e-12", "{}", *deaf)
    tuned = stage(world, "tuned", "1e-12", "{}", f"init_from={stage2}")

    first, second, third = (
        load_file(run / "checkpoints/step_00000002/model.safetensors") for run in (stage1, stage2, tuned)
    )
    text = {name for name in third if "text_ffn" in name or "word_emb" in name or "position_emb" in name}
    kept = load_file(stage2 / "text_branch.safetensors")
    assert kept.keys() == text
    assert [name for name in text if not torch.equal(kept[name], first[name])] == []
    assert third.keys() == second.keys() | text
    for name, tensor in third.items():
        origin = second[name] if name.startswith("projection.") else first[name][: len(tensor)]  # but for [DEC]
        torch.testing.assert_close(tensor, origin, rtol=0, atol=1e-9, msg=name)
    starts = [
        json.loads((run / "checkpoints/step_00000002/state.json").read_text())["start"] for run in (stage2, tuned)
    ]
    assert [(start["new"], start["aligned_to"]) for start in starts] == [
        (["projection"], "no language model"),
        ([], None),
    ]
