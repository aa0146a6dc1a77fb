"""What grows with a run, an evaluation or a dataset, and what must not: one table, each size in a process of its own.

    python benchmarks/growth.py                  100 and 60,000 steps, 1e3 and 2e5 questions, 1e5 and 3e7 records
    python benchmarks/growth.py --small          a tenth and less of all that, for a try

No model is run: what is timed is all that is done around it, in seconds of the processor, all threads together. Steps go
through train.py's own loop, with 128 samples of 13 datasets each, a validation and a checkpoint every 50 steps, the best of
them kept; batches, the model's pass and the scores of a validation are made up. Questions go through evaluate.py's own
runner, with one made-up answer for all. They are of 5 a picture, like GQA's, on pictures of 8 x 8.

A split of so many records is one shard of 1,000 pictures with a record each, hard-linked under as many names as it takes, as
3e7 would be terabytes. Tars are looked at and indexes are read as they would be, but from memory that the first has filled.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from measure import in_turns, provenance, resident_bytes
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import instructblip  # noqa: F401  declares what torchvision lacks on CPU, before it is imported
from instructblip.data.cards import load_card
from instructblip.data.loader import LoadedStep
from instructblip.data.lost import LostSamples
from instructblip.data.mixture import Mixture, MixtureEntry, MixtureSegment
from instructblip.data.mixture_dataset import MixtureDataset, TrainingSet, decoded
from instructblip.data.records import Record
from instructblip.data.shards import ShardReader, ShardWriter, index_path, open_split, shard_path
from instructblip.data.templates import TemplateSet
from instructblip.distributed import Ranks
from instructblip.evaluation import runner
from instructblip.evaluation.outcomes import score_task
from instructblip.evaluation.protocol import make_task
from instructblip.evaluation.report.table import as_text, score_table
from instructblip.evaluation.results_file import read_run
from instructblip.evaluation.suite import DatasetResult, results_json, write_results
from instructblip.files import write_json
from instructblip.objectives import make_objectives
from instructblip.tracking import Loggers
from instructblip.training import resume as resuming
from instructblip.training import run as training
from instructblip.training.curves import draw_curves
from instructblip.training.loop import StepResult
from instructblip.training.metrics_log import BestStep, MetricsLog
from instructblip.training.optim import make_adamw
from instructblip.training.parallel import StepContext
from instructblip.training.schedule import Phase, locate, rank_positions
from instructblip.training.signals import StopRequest
from instructblip.training.skipped import SkippedSteps
from instructblip.training.writer import CheckpointWriter
from instructblip.weights.checkpoint import checkpoint_folders, load_checkpoint, newest_whole
from instructblip.weights.start import Start

WHOLE = {"steps": (100, 60_000), "questions": (1_000, 200_000), "records": (100_000, 30_000_000)}
SMALL = {"steps": (100, 3_000), "questions": (200, 4_000), "records": (10_000, 1_000_000)}
BATCH, DATASETS, EVERY, KEPT = 128, 13, 50, 3
LAST = 50  # steps whose median is given
PER_PICTURE, SHARD = 5, 1_000
EXAMPLES = 60
MB = 1e6

Figures = dict[str, float]


@contextmanager
def timed(figures: Figures, name: str, scale: float = 1.0) -> Iterator[None]:
    """Note the seconds of the processor inside, times `scale`."""
    start = time.process_time()
    yield
    figures[name] = (time.process_time() - start) * scale


# --- steps --------------------------------------------------------------------------------------------------------------


def steps(folder: Path, count: int) -> Figures:
    """A run of so many steps, then what a resumed one does before its first step, and the curves."""
    figures: Figures = {}
    run = made_up_run(folder, count)
    plain, saving, added = take_steps(run, count)
    figures["a step, ms"] = 1e3 * statistics.median(plain)
    figures["a step with validation and checkpoint, ms"] = 1e3 * statistics.median(saving)
    figures["memory added, MB"] = added / MB
    shutil.rmtree(checkpoint_folders(folder / "checkpoints")[0])  # as if killed before it was written
    figures["resuming, ms"] = 1e3 * statistics.median(resume(made_up_run(folder, count)) for _ in range(5))
    with timed(figures, "looking for the best step, once, ms", 1e3):
        resuming.find_best(made_up_run(folder, count), count)
    before = resident_bytes()
    with timed(figures, "curves, s"):
        draw_curves(folder / "metrics.jsonl", folder / "curves.png", "growth")
    figures["memory of the curves, MB"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / MB
    return figures


def made_up_run(folder: Path, count: int) -> Any:
    """What the steps of a run share, with a model of one layer."""
    model = nn.Module()
    model.projection = nn.Linear(8, 8)
    model.held_state, model.device = model.state_dict, torch.device("cpu")
    model.trained_parts = model.full_parts = frozenset({"qformer"})
    model.adapters = {}
    optimizer = make_adamw(model.named_parameters(), weight_decay=0.05, betas=(0.9, 0.999))
    recipe = SimpleNamespace(
        validate_every=EVERY, checkpoint_every=EVERY, clip_norm=1.0, full_disk="stop", keep_best="mean"
    )
    phase = Phase("instruction", count, BATCH, None, 1e-5, 10, 1e-8, 0.0, 1.0, make_objectives({}))  # type: ignore[arg-type]
    console = Console(file=open(os.devnull, "w"))
    entries = [MixtureEntry(f"dataset_{number}", 10_000 * (number + 1)) for number in range(DATASETS)]
    return SimpleNamespace(
        config=SimpleNamespace(
            name="growth",
            recipe=recipe,
            seed=0,
            profile_step=None,
            data=SimpleNamespace(workers=0),
            parallel=SimpleNamespace(timeout=600.0, ahead="none", read_every=1),
        ),
        folder=folder,
        console=console,
        ranks=Ranks(),
        model=model,
        optimisation=SimpleNamespace(
            context=StepContext(),
            optimizer=optimizer,
            names={parameter: name for name, parameter in model.named_parameters()},
            average=None,
        ),
        phases=[phase],
        mixture=Mixture(entries, segments=[MixtureSegment(count * BATCH, 1)]),
        dataset=None,
        lost=LostSamples(fraction=0.01, samples=10, say=print),
        validation=[True],
        final=[True],
        frozen={"vision": "0", "llm": "0"},
        inputs={},
        start=Start(),
        shape=SimpleNamespace(total=lambda work, outputs: 1e12),
        peak_flops=1e15,
        metrics=MetricsLog(folder / "metrics.jsonl"),
        best=BestStep("mean"),
        skipped=SkippedSteps(10),
        logger=Loggers(),
        writer=CheckpointWriter(folder / "checkpoints", KEPT),
    )


def take_steps(run: Any, count: int) -> tuple[Sequence[float], Sequence[float], int]:
    """Take them all.

    Returns:
        Seconds of the last steps, from asking for the batch to the end of all that follows it; of the last that also
        validated and saved; resident bytes that were added since the first of those.
    """
    plain: deque[float] = deque(maxlen=LAST)
    saving: deque[float] = deque(maxlen=LAST // 5)
    names = [f"dataset_{number}" for number in range(DATASETS)]
    memory = 0

    def without_model(*arguments: Any, after_step: Callable[..., bool], **_: Any) -> int:
        nonlocal memory
        batches = arguments[3]
        while True:
            start = time.process_time()
            loaded = next(batches, None)
            if loaded is None:
                return count
            step, place = loaded[0], locate(run.phases, loaded[0])
            ids = [f"{names[row % DATASETS]}/{(step * BATCH + row) * 1000}" for row in range(BATCH)]
            loss = 2.0 + 1 / (step + 1)
            result = StepResult(
                loss, dict.fromkeys(names, 2.0), {"language_modeling": loss}, 0.5, BATCH, 10 * BATCH, ids
            )
            after_step(step, place, place.phase.rate(place.step), result)
            run.writer.wait()  # the disk's part belongs to the step that began it
            saved = (step + 1) % EVERY == 0
            (saving if saved else plain).append(time.process_time() - start)
            memory = memory or saved * resident_bytes()

    training.run_steps = without_model
    training.load_batches = lambda dataset, positions, **_: (LoadedStep(step, [], []) for step, _ in positions)
    training.run_validation = lambda run, step, stop: {"a": 50 + step % 7, "b": 40 + step % 11}
    with StopRequest() as stop:
        training._train_steps(run, 0, stop, None)
    added = resident_bytes() - memory
    run.metrics.close()
    return plain, saving, added


def resume(run: Any) -> float:
    """Seconds that a killed run takes to find its checkpoint and its place; its metrics are left as they were."""
    lines = run.metrics.path.read_bytes()
    start = time.process_time()
    newest, _ = newest_whole(run.folder / "checkpoints")
    assert newest is not None
    checkpoint = load_checkpoint(newest)
    assert run.best.restore(checkpoint.state["best"])
    run.lost.restore(checkpoint.state["lost"])
    run.metrics.truncate_after(checkpoint.step)
    _, positions = next(rank_positions(run.phases, checkpoint.step))
    for position in positions:
        run.mixture.draw(position)
    run.metrics.append({"step": checkpoint.step + 1})
    seconds = time.process_time() - start
    run.metrics.close()
    run.metrics.path.write_bytes(lines)
    return seconds


# --- questions ----------------------------------------------------------------------------------------------------------


class Answers(nn.Module):
    """What evaluation looks at of a model before it asks."""

    SKILLS, PARTS = frozenset({"generate"}), ()
    device = torch.device("cpu")

    def image_tokens(self, images: Tensor) -> Tensor:
        """The images themselves."""
        return images


def questions(folder: Path, count: int) -> Figures:
    """An evaluation of so many questions, answered once and opened again, its report and its line of the table."""
    figures: Figures = {}
    write_questions(folder / "shards/gqa/testdev", count)
    card, home = load_card("gqa"), folder / "evaluation"
    with timed(figures, "opening the task, s"):
        task = make_task(card, folder / "shards")
    model = Answers()
    runner._ask = lambda model, task, batch, at_once: [("left", (), ())] * len(batch)
    for name in ("answering, ms a question", "opening again, ms a question"):
        with timed(figures, name, 1e3 / count):
            result = runner.run_task(
                model, task, lambda shard, row: torch.zeros(1), batch_size=64, folder=home / "gqa", show_progress=False
            )
    with timed(figures, "score and interval, s"):
        score_task(task, result.samples, result.predictions, seconds=0.0)
    described = {"name": "made up", "dtype": "float32", "quantization": None, "image_size": 8}
    results = [DatasetResult(result, {})]
    summary = results_json(
        results, checkpoint="none", fingerprint="0", step=0, model={"llm": described, "vision": described}
    )
    with timed(figures, "report, s"):
        write_results(home, "growth", results, summary, EXAMPLES)
    with timed(figures, "table, ms", 1e3):
        as_text(score_table([read_run(home)]))
    figures["peak memory, MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB
    return figures


def write_questions(folder: Path, count: int) -> None:
    """A prepared split of so many questions, `PER_PICTURE` a picture."""
    folder.mkdir(parents=True)
    entries, picture, made = [], tiny_picture(), 0
    while made < count:
        path = shard_path(folder, len(entries))
        with ShardWriter.open(path) as writer:
            for _ in range(min(SHARD, (count - made) // PER_PICTURE)):
                tags = {"structural": ("query", "choose", "logical")[made % 3], "semantic": ("attr", "rel")[made % 2]}
                records = [
                    Record(
                        f"{made + place}",
                        "question",
                        "Is it left or right?",
                        ("left", "right")[made % 2 :][:1],
                        tags=tags,
                    )
                    for place in range(PER_PICTURE)
                ]
                writer.add(f"i{made}", {"png": picture}, f"{made}", records)
                made += PER_PICTURE
        entries.append(entry(path))
    write_manifest(folder, "gqa", "testdev", entries)


def tiny_picture() -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


# --- records ------------------------------------------------------------------------------------------------------------


def records(folder: Path, count: int) -> Figures:
    """A split of so many records beside a small one, opened and planned, and its first samples."""
    figures: Figures = {}
    write_records(folder / "large", count // SHARD)
    write_records(folder / "small", 10)
    before = resident_bytes()
    with timed(figures, "opening the splits, s"):
        splits = [open_split(folder / name) for name in ("large", "small")]
    templates = TemplateSet("one", "", ("{question}",))
    with timed(figures, "planning the mixture, s"):
        sets = [TrainingSet(name, split, (), templates) for name, split in zip(("large", "small"), splits, strict=True)]
        entries = [MixtureEntry(item.name, len(item), shards=item.shard_records) for item in sets]
        mixture = Mixture(entries, segments=[MixtureSegment(count, 1)])
    dataset = MixtureDataset(mixture, sets, decoded("resize_square", 8))
    for name, first in (("first batch, ms", 0), ("a late batch, ms", count - BATCH)):
        with timed(figures, name, 1e3):
            for position in range(first, first + BATCH):
                dataset[position]
    figures["memory added, MB"] = (resident_bytes() - before) / MB
    return figures


def write_records(folder: Path, shards: int) -> None:
    """A prepared split whose shards are all the first one under other names."""
    folder.mkdir(parents=True)
    first, picture = shard_path(folder, 0), tiny_picture()
    with ShardWriter.open(first) as writer:
        for number in range(SHARD):
            writer.add(
                f"i{number}", {"png": picture}, f"{number}", [Record(f"{number}", "caption", "what?", ("a square",))]
            )
    described = entry(first)
    entries = [described | {"name": shard_path(folder, number).name} for number in range(shards)]
    for number in range(1, shards):
        os.link(first, shard_path(folder, number))
        os.link(index_path(first), index_path(shard_path(folder, number)))
    write_manifest(folder, folder.name, "train", entries)


def entry(path: Path) -> dict[str, Any]:
    """A shard's entry in the manifest."""
    shard = ShardReader(path)
    counts = {"images": len(shard), "records_by_kind": shard.records_by_kind()}
    return {"name": path.name, "sha256": shard.tar_sha256, "bytes": shard.tar_bytes, **counts}


def write_manifest(folder: Path, dataset: str, split: str, entries: Sequence[dict[str, Any]]) -> None:
    kinds: dict[str, int] = {}
    for shard in entries:
        for kind, number in shard["records_by_kind"].items():
            kinds[kind] = kinds.get(kind, 0) + number
    manifest = {"format": 1, "dataset": dataset, "split": split, "shards": list(entries), "records_by_kind": kinds}
    write_json(folder / "manifest.json", manifest)


# --- the table ----------------------------------------------------------------------------------------------------------

MEASURED: dict[str, Callable[[Path, int], Figures]] = {"steps": steps, "questions": questions, "records": records}


def print_table(sizes: dict[str, tuple[int, int]], figures: dict[str, list[Figures]]) -> None:
    """A row for each figure, both sizes beside each other."""
    console = Console(width=140)
    for what, (small, large) in sizes.items():
        first, second = (figures[f"{what}={count}"][0] for count in (small, large))
        table = Table(title=f"{what}: {large / small:,.0f} times as many", title_justify="left")
        table.add_column("")
        for heading in (f"{small:,}", f"{large:,}", "times"):
            table.add_column(heading, justify="right")
        for name, value in first.items():
            ratio = f"{second[name] / value:.2f}" if value > 0 else "-"
            table.add_row(name, f"{value:,.3f}", f"{second[name]:,.3f}", ratio)
        console.print(table)
    console.print(provenance("1 thread"), highlight=False)


def main() -> None:
    """Measure each size in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--only", choices=list(MEASURED), nargs="*", default=list(MEASURED))
    parser.add_argument("--variant", help="measure one size, such as steps=100, and print its figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.variant is not None:
        what, _, count = arguments.variant.partition("=")
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(MEASURED[what](Path(folder), int(count))))
        return
    sizes = {what: counts for what, counts in (SMALL if arguments.small else WHOLE).items() if what in arguments.only}
    variants = [f"{what}={count}" for what, counts in sizes.items() for count in counts]
    print_table(sizes, in_turns(variants, 1))


if __name__ == "__main__":
    main()
