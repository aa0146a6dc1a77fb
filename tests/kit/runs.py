"""Run the entry points on tiny parts and data, in this process or in real ones that start fast.

Processes are forked from a server that has already imported the package, so one starts in a moment instead of seconds.
They are processes like any other: they have their own folder and environment, and they can be killed.
"""

import json
import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from instructblip.config.entry import compose_config
from instructblip.config.schema import EvaluateConfig, Schema, TrainConfig
from instructblip.data.cards import load_card
from instructblip.data.prepare.convert import prepare_dataset
from instructblip.evaluation import runner
from instructblip.evaluation.run import evaluate
from instructblip.training.run import train
from tests.kit.tiny import tiny_parts, write_coco_captions, write_easy_vqa

REPOSITORY = Path(__file__).parents[2]
DATASETS = ("easy_vqa_yes_no", "easy_vqa_shape", "easy_vqa_color", "easy_vqa_statements")
STEPS = 24
FINAL_SAMPLES = 10
SECONDS = 400  # a process that takes longer hangs

_RECIPE = (
    "~recipe.phases",
    "recipe.phases={"
    "alignment: {steps: 9, batch_size: 4, learning_rate: 3e-3, warmup_steps: 2, objectives: {alignment: 1.0}}, "
    "instruction: {steps: 15, batch_size: 4, batching: fixed, micro_batch_size: 2, "
    "learning_rate: 1e-3}}",
    "recipe.checkpoint_every=4",
    "recipe.validate_every=5",
    "recipe.validation_samples=3",
    f"recipe.final_samples={FINAL_SAMPLES}",
    "qformer.dropout=0.1",  # a random stream that a resumed run has to find again
)


@dataclass(frozen=True)
class World:
    """What runs need besides an output folder: tiny parts, raw data, prepared shards and a cache.

    Attributes:
        train, evaluate: overrides that point the entry points there.
    """

    folder: Path
    train: tuple[str, ...]
    evaluate: tuple[str, ...]

    @property
    def raw(self) -> Path:
        """The raw easy-VQA folder."""
        return self.folder / "raw"

    @property
    def shards(self) -> Path:
        """The prepared datasets."""
        return self.folder / "shards"

    @property
    def environment(self) -> dict[str, str]:
        """For this process or another: the cache, and no network."""
        return {"INSTRUCTBLIP_CACHE": str(self.folder / "cache"), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}

    @contextmanager
    def here(self) -> Iterator[None]:
        """Put this process into the world's environment."""
        before = dict(os.environ)
        os.environ.update(self.environment)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def make_world(folder: Path) -> World:
    """Write a world: 24 images to train and validate on, 12 to test on."""
    parts = tiny_parts(folder / "parts")
    write_easy_vqa(folder / "raw", images=24)
    prepare_dataset(load_card("easy_vqa"), folder / "raw", folder / "shards", progress=False)
    data = (f"data.shards={folder / 'shards'}", f"data.sources.easy_vqa.path={folder / 'raw'}")
    return World(folder, (*(f"{key}={value}" for key, value in parts.items()), *data, *_RECIPE), data)


_FIRST_STAGE = (
    "experiment=blip2_stage1",
    "vision=efficientnet_lite0",
    "vision.norm=layer",
    "qformer=minilm",
    "qformer.layers=3",
    "qformer.cross_attention_every=2",
    "qformer.extra_tokens=['[DEC]']",
    "qformer.dropout=0.1",  # a random stream that a resumed run has to find again
    "mixture.datasets=[{name: coco_caption}]",
    "suite.held_in=[coco_retrieval]",
    "suite.held_out=[]",
    "model.feature_width=16",
    "~recipe.phases",
    "recipe.phases={align: {steps: 12, batch_size: 8, micro_batch_size: 3, learning_rate: 1e-3, warmup_steps: 2, "
    "objectives: {contrastive: 1.0, matching: 1.0, captioning: 1.0}}}",
    "recipe.precision=fp32",
    "recipe.checkpoint_every=3",
    "recipe.validate_every=4",
    "data.workers=0",
    "data.transform=blip2_image_train",
)


def make_caption_world(folder: Path) -> World:
    """Write a world for BLIP-2's first stage: 24 pictures with two captions each to train on, 8 to validate on."""
    parts = {key: value for key, value in tiny_parts(folder / "parts").items() if not key.startswith("llm.")}
    write_coco_captions(folder / "raw")
    prepare_dataset(load_card("coco_caption"), folder / "raw", folder / "shards", progress=False)
    data = (f"data.shards={folder / 'shards'}",)
    return World(folder, (*_FIRST_STAGE, *(f"{key}={value}" for key, value in parts.items()), *data), data)


_BLIP = (
    "vision=vit_b16",
    "vision.init=scratch",
    "vision.image_size=32",
    "vision.options={embed_dim: 32, depth: 2, num_heads: 4, drop_path_rate: 0.1}",
    "text.dropout=0.1",  # random streams that a resumed run has to find again
    "train.vision=full",
    "recipe.precision=fp32",
    "recipe.checkpoint_every=3",
    "recipe.validate_every=6",
    "recipe.validation_samples=4",
    "recipe.keep_best=null",
    "data.workers=0",
    "parallel.activation_checkpointing=false",
)
_BLIP_PHASE = "batch_size: 8, micro_batch_size: 3, learning_rate: 1e-3, warmup_steps: 2"
# experiment -> what of it is made small; the queue is none that the batch divides
BLIP_RUNS: dict[str, tuple[str, ...]] = {
    "blip_pretrain": (
        "mixture.datasets=[{name: coco_caption}]",
        "suite.held_in=[coco_retrieval]",
        "suite.held_out=[]",
        "model.feature_width=16",
        "model.queue_size=20",
        "~recipe.phases",
        f"recipe.phases={{pretrain: {{steps: 12, {_BLIP_PHASE}, soft_targets_ramp: 6, negatives_among: 4, "
        "objectives: {pair_distillation: 1.0, pair_matching: 1.0, captioning: 1.0}}}",
    ),
    "blip_retrieval_coco": (
        "suite.held_in=[coco_retrieval]",
        "suite.held_out=[]",
        "model.feature_width=16",
        "model.queue_size=20",
        "~recipe.phases",
        f"recipe.phases={{finetune: {{steps: 3, {_BLIP_PHASE}, soft_targets_ramp: 6, "
        "objectives: {distillation: 1.0, matching: 1.0}}}",
    ),
    "blip_caption_coco": (
        "~recipe.phases",
        f"recipe.phases={{finetune: {{steps: 3, {_BLIP_PHASE}, objectives: {{captioning: 1.0}}}}}}",
    ),
    "blip_vqa": (
        "mixture.datasets=[{name: easy_vqa_color}]",
        "mixture.templates=bare",
        "suite.held_in=[easy_vqa_color]",
        "~recipe.phases",
        f"recipe.phases={{finetune: {{steps: 3, {_BLIP_PHASE}, objectives: {{answering: 1.0}}}}}}",
    ),
}


def make_blip_world(folder: Path) -> World:
    """Write a world for BLIP: the pictures and captions of `make_caption_world`; `train` is to follow an experiment."""
    text = tiny_parts(folder / "parts")["qformer.sources.path"]
    write_coco_captions(folder / "raw")
    prepare_dataset(load_card("coco_caption"), folder / "raw", folder / "shards", progress=False)
    data = (f"data.shards={folder / 'shards'}",)
    return World(folder, (*_BLIP, f"text.sources.path={text}", *data), data)


# --- in this process -------------------------------------------------------------------------------------------------


def compose(name: str, schema: type[Schema], overrides: Sequence[str]) -> Schema:
    """A validated configuration, as an entry point makes it of its command line."""
    return compose_config(name, schema, list(overrides))


def train_here(world: World, output: Path, *overrides: str) -> Path:
    """Train to the end and return the run's folder."""
    config = compose("train", TrainConfig, [*world.train, f"output={output}", *overrides])
    with world.here(), one_thread():
        assert train(config, Console(quiet=True)).status == 0
    return output / config.name


def evaluate_here(world: World, checkpoint: Path, output: Path, *overrides: str) -> Path:
    """Evaluate a checkpoint and return the evaluation's folder."""
    arguments = [*world.evaluate, f"checkpoint={checkpoint}", f"output={output}", *overrides]
    config = compose("evaluate", EvaluateConfig, arguments)
    with world.here(), one_thread():
        evaluate(config, Console(quiet=True))
    return output / config.name


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order, so that this process and others get the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- in another process ----------------------------------------------------------------------------------------------


class Command:
    """A running entry point, a script or a module, with `arguments` in the folder `cwd`, its output in a file."""

    def __init__(
        self,
        environment: dict[str, str],
        script: str,
        arguments: Sequence[str],
        cwd: Path,
        before: Callable[[], None],
    ) -> None:
        self.log = cwd / f"{script}.log"
        self.process: ForkServerProcess = multiprocessing.get_context("forkserver").Process(
            target=_run_script, args=(script, list(arguments), cwd, environment, self.log, before)
        )
        self.process.start()

    @property
    def output(self) -> str:
        """What it has printed so far, both streams."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def wait(self) -> int:
        """Its exit status; negative for the signal that killed it."""
        self.process.join(SECONDS)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"no end after {SECONDS} s:\n{self.output}")
        return self.process.exitcode

    def wait_for_lines(self, path: Path, count: int) -> None:
        """Return as soon as a file has at least `count` whole lines."""
        deadline = time.monotonic() + SECONDS
        while not path.exists() or path.read_bytes().count(b"\n") < count:
            assert self.process.is_alive(), f"ended before line {count} of {path}:\n{self.output}"
            assert time.monotonic() < deadline, f"no line {count} in {path} after {SECONDS} s:\n{self.output}"
            time.sleep(0.001)


def nothing() -> None:
    """The default of `start`'s `before`."""


def signal_in_evaluation(number: int, signal_number: int) -> None:
    """A `before`: send this process a signal when it is to answer its n-th batch of questions."""
    calls = 0
    ask = runner._ask

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal_number)
        return ask(*arguments)

    runner._ask = interrupted


def start(world: World, script: str, *arguments: str, cwd: Path, before: Callable[[], None] = nothing) -> Command:
    """Start an entry point. `before`, a module's function, is called in the new process first."""
    cwd.mkdir(parents=True, exist_ok=True)
    return Command(world.environment, script, arguments, cwd, before)


def start_ranks(
    world: World, script: str, *arguments: str, cwd: Path, ranks: int = 2, before: Callable[[], None] = nothing
) -> list[Command]:
    """Start an entry point on several processes, as torchrun would; rank r works in the folder `cwd/rank<r>`."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    commands = []
    for rank in range(ranks):
        folder = cwd / f"rank{rank}"
        folder.mkdir(parents=True, exist_ok=True)
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        commands.append(Command({**world.environment, **place, **where}, script, arguments, folder, before))
    return commands


def run_ranks(world: World, script: str, *arguments: str, cwd: Path, ranks: int = 2) -> list[str]:
    """Run an entry point on several processes to their ends, which must be good; return what each printed."""
    commands = start_ranks(world, script, *arguments, cwd=cwd, ranks=ranks)
    ends = [command.wait() for command in commands]
    assert ends == [0] * ranks, "\n".join(f"rank {r} ended with {ends[r]}:\n{c.output}" for r, c in enumerate(commands))
    return [command.output for command in commands]


def run(world: World, script: str, *arguments: str, cwd: Path, status: int = 0) -> str:
    """Run an entry point to its end, check its exit status, and return what it printed."""
    command = start(world, script, *arguments, cwd=cwd)
    found = command.wait()
    assert found == status, f"{script} {' '.join(arguments)} ended with {found}:\n{command.output}"
    return command.output


def _run_script(
    script: str, arguments: list[str], cwd: Path, environment: dict[str, str], log: Path, before: Callable[[], None]
) -> None:
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    os.environ.update(environment)
    os.chdir(cwd)
    torch.set_num_threads(1)
    before()
    sys.argv = [script, *arguments]
    if script.endswith(".py"):
        runpy.run_path(str(REPOSITORY / script), run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


# --- what runs leave -------------------------------------------------------------------------------------------------


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def scores(folder: Path) -> dict[str, dict[str, Any]]:
    """Value, interval and count of each dataset in an evaluation's results.json."""
    datasets = json.loads((folder / "results.json").read_text())["datasets"]
    return {name: {key: found[key] for key in ("value", "low", "high", "count")} for name, found in datasets.items()}


def predictions(folder: Path, *parts: str) -> dict[str, list[tuple[Any, ...]]]:
    """(sample id, prediction, score) of every line of each dataset's predictions.jsonl, in the file's order."""
    return {
        name: [
            (line["id"], line["prediction"], line["score"])
            for line in read_lines(folder.joinpath(name, *parts, "predictions.jsonl"))
        ]
        for name in DATASETS
    }
