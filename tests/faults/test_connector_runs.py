"""Whole runs of connectors that are no Q-Former: killed ones go on bit for bit, two ranks are like one, others start so."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

import instructblip
from instructblip.config.schema import ConnectorKind, TrainConfig
from instructblip.config.validate import read_model_config
from instructblip.errors import UserError
from instructblip.files import read_json
from instructblip.models.llava import LLaVA
from instructblip.training.metrics_log import MetricsLog
from instructblip.training.planned import print_plan
from instructblip.training.run import train
from instructblip.training.start import begin_run
from instructblip.weights.__main__ import main as convert
from instructblip.weights.parts import build_model
from tests.kit.connectors import KINDS, connector_overrides
from tests.kit.runs import World, compose, evaluate_here, one_thread, read_lines, run_ranks, train_here
from tests.kit.tiny import tiny_images

pytestmark = pytest.mark.slow

STEPS = 4
EXACT = ("step", "loss", "loss_by_objective", "loss_by_dataset", "lr", "grad_norm", "sample_ids")
_SHORT = (
    "~recipe.phases",
    f"recipe.phases={{one: {{steps: {STEPS}, batch_size: 4, batching: packed, micro_batch_size: 2, learning_rate: 1e-3, "
    "objectives: {language_modeling: 1.0, alignment: 0.5}}}",
    "recipe.checkpoint_every=2",
    "recipe.average_decay=0.9",
    "suite.held_in=[]",
    "suite.held_out=[]",
)


class Killed(BaseException):
    """Ends a run in this process as a kill would: nothing of it is written afterwards."""


@pytest.fixture(scope="module")
def connector_world(world: World) -> World:
    """Without what a Q-Former is told."""
    return replace(world, train=tuple(item for item in world.train if not item.startswith("qformer.")))


@pytest.fixture(scope="module", params=KINDS)
def finished(request: pytest.FixtureRequest, connector_world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each kind, in a folder of its name."""
    output = tmp_path_factory.mktemp(request.param)
    return train_here(connector_world, output, *connector_overrides(connector_world, request.param, *_SHORT))


def kind_of(run: Path) -> ConnectorKind:
    return read_model_config(run / "config.yaml").connector.kind


def last(run: Path, name: str = "model") -> dict[str, Tensor]:
    return load_file(run / f"checkpoints/step_{STEPS:08d}/{name}.safetensors")


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [{key: line.get(key) for key in EXACT} for line in read_lines(run / "metrics.jsonl")]


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """The run within the block dies when a step stands in metrics.jsonl."""
    append = MetricsLog.append

    def dying(self: MetricsLog, entry: dict[str, Any]) -> None:
        append(self, entry)
        if entry["step"] == step:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(MetricsLog, "append", dying)
        yield


def test_a_killed_run_goes_on_bit_for_bit(finished: Path, connector_world: World, tmp_path: Path) -> None:
    overrides = connector_overrides(connector_world, kind_of(finished), *_SHORT)
    config = compose("train", TrainConfig, [*connector_world.train, f"output={tmp_path}", *overrides, "resume=auto"])
    for step in (1, 3):
        with connector_world.here(), one_thread(), killed_at(step):
            train(config, Console(quiet=True))
    with connector_world.here(), one_thread():
        assert train(config, Console(quiet=True)).status == 0
    run = tmp_path / config.name
    assert metrics_of(run) == metrics_of(finished)
    for name in ("model", "optimizer", "average"):
        tensors, expected = last(run, name), last(finished, name)
        assert tensors.keys() == expected.keys()
        assert [key for key, tensor in tensors.items() if not torch.equal(tensor, expected[key])] == []


def test_a_checkpoint_holds_the_connector_and_knows_the_rest(finished: Path) -> None:
    assert {name.partition(".")[0] for name in last(finished)} == {"vision_norm", "connector"}
    state = read_json(finished / f"checkpoints/step_{STEPS:08d}/state.json")
    assert state["frozen"].keys() == {"vision", "llm"}
    assert state["untrained"] == []


def test_a_run_is_loaded_with_what_it_learned(finished: Path, connector_world: World) -> None:
    with connector_world.here():
        model = instructblip.load(finished, device="cpu")
    assert isinstance(model, LLaVA)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in last(finished, "average").items())
    assert len(model.generate(tiny_images(2), ["what?", ""], max_new_tokens=3)) == 2
    with pytest.raises(UserError, match=f"a model of connector={kind_of(finished)} has no head to match"):
        model.match(tiny_images(1), ["a"])


def test_a_run_starts_from_another_of_its_connector(finished: Path, connector_world: World) -> None:
    overrides = connector_overrides(connector_world, kind_of(finished), f"init_from={finished}")
    with connector_world.here():
        config = compose("train", TrainConfig, [*connector_world.train, *overrides])
        model = build_model(config, trained=config.train.parts(config))
        begun = begin_run(model, config)
    assert (begun.start.new, begun.start.aligned_to) == ((), None)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in last(finished, "average").items())


@pytest.mark.parametrize("finished", ["mlp"], indirect=True)
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["connector=linear"], "choose the connector= that it was trained with"),
        (
            ["connector=mlp", "connector.hidden_width=8"],
            "choose the connector= and connector.* that it was trained with",
        ),
        (["connector=qformer"], "holds no Q-Former; give weights of one"),
    ],
)
def test_weights_of_another_connector_are_no_start(
    finished: Path, overrides: list[str], words: str, connector_world: World
) -> None:
    arguments = [*connector_world.train, f"init_from={finished}", *overrides]
    with connector_world.here():
        config = compose("train", TrainConfig, arguments)
        with pytest.raises(UserError, match=re.escape(words)) as error:
            begin_run(build_model(config), config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("finished", ["resampler"], indirect=True)
def test_weights_of_as_many_numbers_in_other_heads_are_no_start(finished: Path, connector_world: World) -> None:
    heads = read_model_config(finished / "config.yaml").connector.heads
    overrides = connector_overrides(
        connector_world, "resampler", f"init_from={finished}", f"connector.heads={2 * heads}"
    )
    with connector_world.here():
        config = compose("train", TrainConfig, [*connector_world.train, *overrides])
        with pytest.raises(UserError, match=f"was trained with connector.heads={heads}, and {2 * heads} would read"):
            begin_run(build_model(config), config)


def test_a_run_is_converted_to_another_run_and_says_why_not_to_a_llava(
    finished: Path, connector_world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with connector_world.here():
        assert convert([str(finished), str(tmp_path / "run"), "--to", "native", "--bound", "0"]) == 0
        assert convert([str(finished), str(tmp_path / "llava"), "--to", "huggingface"]) == 2
        model = instructblip.load(tmp_path / "run", device="cpu")
    said = {"mlp": "its vision tower is CLIP's ViT", "linear": "connector=linear", "resampler": "connector=resampler"}
    line = capsys.readouterr().err.strip()
    assert said[kind_of(finished)] in line
    assert line.count("\n") == 0
    assert not (tmp_path / "llava").exists()
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in last(finished, "average").items())


def test_weights_of_a_qformer_are_no_start(untrained_run: Path, connector_world: World) -> None:
    arguments = [*connector_world.train, f"init_from={untrained_run}", "connector=mlp"]
    with connector_world.here():
        config = compose("train", TrainConfig, arguments)
        with pytest.raises(UserError, match="holds no connector but a Q-Former; give weights of one"):
            begin_run(build_model(config), config)


def test_two_ranks_are_like_one(connector_world: World, tmp_path: Path) -> None:
    overrides = connector_overrides(connector_world, "resampler", *_SHORT, "parallel.activation_checkpointing=true")
    alone = train_here(connector_world, tmp_path / "alone", *overrides)
    both = [*connector_world.train, *overrides, f"output={tmp_path / 'both'}"]
    run_ranks(connector_world, "train.py", *both, cwd=tmp_path)
    run = tmp_path / "both" / alone.name
    for line, other in zip(read_lines(run / "metrics.jsonl"), read_lines(alone / "metrics.jsonl"), strict=True):
        assert line["sample_ids"] == other["sample_ids"]
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-6 * max(1, other["loss"]))
    weights, expected = last(run), last(alone)
    assert max(float((weights[name] - expected[name]).abs().max()) for name in expected) < 1e-5


def test_a_run_of_an_equal_budget_says_it_evaluates_and_is_evaluated(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = (
        "suite.held_in=[easy_vqa_shape]",
        "recipe.final_samples=4",
        "recipe.validate_every=4",
        "~qformer.sizes",
        "~llm.sizes",
    )
    arguments = [*world.train, *_SHORT, *suite, "connector=mlp", "connector.match=[tokens,parameters]"]
    config = compose("train", TrainConfig, [*arguments, f"output={tmp_path}"])
    with world.here(), one_thread():
        assert train(config, Console()).status == 0
    assert (
        "connector=mlp has the tokens and parameters of the Q-Former minilm with connector." in capsys.readouterr().out
    )
    stored = read_model_config(tmp_path / config.name / "config.yaml").connector
    assert stored.tokens == 4
    assert stored.hidden_width is not None
    evaluated = evaluate_here(
        world, tmp_path / config.name, tmp_path / "evaluate", "suite.held_in=[easy_vqa_shape]", "suite.held_out=[]"
    )
    results = read_json(evaluated / "results.json")
    assert results["model"]["kind"] == "LLaVA"
    with world.here():
        plan = compose("train", TrainConfig, [*arguments, "plan=true", f"init_from={tmp_path / config.name}"])
        assert print_plan(plan, Console()) == 0
    assert "At the start" not in capsys.readouterr().out  # it was trained beside this LLM
