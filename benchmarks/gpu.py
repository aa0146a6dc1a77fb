"""Full-size models on a GPU, in one table: training step, generation, ranking, number formats, two GPUs.

    benchmarks/gpu.sh                    all rows, at most eight minutes on an H200
    benchmarks/gpu.sh --tiny             the same rows in small, on a CPU: whether it runs
    benchmarks/gpu.sh --models vicuna_7b --rows packed,fp8

Models have the published sizes and random weights, which are drawn on the device: nothing is downloaded. Each row is
printed as it ends. One that fails gives its reason in one line, one that takes longer than its share of the time is ended,
and the next goes on; what no time is left for is named at the end. benchmarks/train_step.py says what a step is.

A process works through the rows of one model. The one above it only listens, and starts another where that one ends early.
"""

import argparse
import contextlib
import gc
import itertools
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import train_step as steps
from measure import provenance
from torch import Tensor

from instructblip.data.loader import LoadedStep
from instructblip.distributed import Ranks, start_ranks, whole_tensors
from instructblip.models.instructblip import InstructBLIP
from instructblip.objectives import make_objectives
from instructblip.training.ahead import Ahead
from instructblip.training.loop import launch_step, train_step
from instructblip.training.optim import make_adamw
from instructblip.training.parallel import StepContext, forget_gathered, parallelize
from instructblip.training.reading import LaunchedStep, read_steps
from instructblip.training.timer import peak_memory
from instructblip.training.writer import CheckpointWriter
from instructblip.weights.checkpoint import load_checkpoint, optimizer_tensors, restore_optimizer

MODELS = ("vicuna_7b", "flan_t5_xl")
TOGETHER = 4  # steps whose results are read together
NEW_TOKENS, BEAMS, CANDIDATES = 10, 5, 100
Cells = dict[str, float | str]


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        measure: gives its cells.
        seconds: that it may take.
        models: that it is measured with.
    """

    measure: Callable[[argparse.Namespace], Cells]
    seconds: int
    models: tuple[str, ...] = MODELS


# --- training --------------------------------------------------------------------------------------------------------


def training(prepare: Callable[[InstructBLIP, Any], steps.Step], options: argparse.Namespace) -> Cells:
    """Samples a second of a variant of benchmarks/train_step.py."""
    model = steps.build(steps.configuration(options), options.device)
    step = prepare(model, options)
    begin = time.perf_counter()
    loss = step()
    first = time.perf_counter() - begin
    for _ in range(options.warm - 1):
        step()
    seconds = seconds_of(step, options)
    return {
        "per second": options.batch / seconds,
        "unit": "samples",
        "seconds": seconds,
        "peak": peak_memory(torch.device(options.device)),
        "note": f"loss {loss:.4f}, first step {first:.0f} s",
    }


def seconds_of(work: Callable[[], object], options: argparse.Namespace) -> float:
    """Seconds of one call, over as many as `--runs` says; steps that are read together count together."""
    wait(options)
    begin = time.perf_counter()
    for _ in range(options.runs):
        work()
    wait(options)
    return (time.perf_counter() - begin) / options.runs


def wait(options: argparse.Namespace) -> None:
    """Until the device has done all that it was given."""
    if options.device == "cuda":
        torch.cuda.synchronize()


def overlapped(model: InstructBLIP, options: Any) -> steps.Step:
    """Packed by length; the next step's images encoded on a stream beside, results read every fourth step."""
    optimizer = make_adamw(model.named_parameters(), weight_decay=0.05, betas=(0.9, 0.999))
    model.attend_by_length()
    context = StepContext(autocast=autocast(options))
    batches = steps.batches_of(model, options, "packed")
    loaded = Ahead(model, context, encodes=True).steps(LoadedStep(n, batches, []) for n in itertools.count())
    unread: list[LaunchedStep] = []
    loss = [float("nan")]

    def step() -> float:
        unread.append(launch_step(model, optimizer, next(loaded).batches, packed=True, context=context, **settings()))
        if len(unread) == TOGETHER or loss[0] != loss[0]:
            loss[0] = read_steps(unread, context)[-1].loss
            unread.clear()
        return loss[0]

    return step


def settings() -> dict[str, Any]:
    """What all steps have in common."""
    return {
        "objectives": make_objectives({"language_modeling": 1.0}),
        "rate": steps.RATE,
        "clip_norm": steps.CLIP,
    }


def autocast(options: argparse.Namespace) -> torch.dtype | None:
    """The type that matrix products of what trains are computed in."""
    return torch.bfloat16 if options.device == "cuda" else None


# --- answers ---------------------------------------------------------------------------------------------------------


def questions(
    options: argparse.Namespace, asked: int, layers: int | None = None
) -> tuple[InstructBLIP, Tensor, list[str]]:
    """A model that answers, pictures, and prompts of training's lengths."""
    model = steps.build(steps.configuration(options, layers), options.device).eval()
    if options.device == "cuda":
        model.to(torch.bfloat16)
    drawn = steps.samples(asked, 0, model.vision.image_size)
    return model, torch.stack([image for _, image in drawn]), [sample.instruction for sample, _ in drawn]


def generation(options: argparse.Namespace) -> Cells:
    """Five beams and ten new tokens, all questions in one batch; transformers' class, one by one, for a few of them."""
    model, images, prompts = questions(options, options.asked)
    length = {"num_beams": BEAMS, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    model.generate(images[:2], prompts[:2], **length)
    seconds = seconds_of(lambda: model.generate(images, prompts, **length), options) / len(prompts)
    theirs, inputs = transformers_questions(model, images, prompts[:2])
    with torch.inference_mode():
        theirs.generate(**inputs[0], **length)
        plain = seconds_of(lambda: [theirs.generate(**one, **length) for one in inputs], options) / len(inputs)
    return answers(options, seconds, plain, f"{len(prompts)} in a batch")


def ranking(options: argparse.Namespace) -> Cells:
    """A hundred candidates for each question; transformers' class, a forward pass for each of a few."""
    asked = options.asked // 4
    model, images, prompts = questions(options, asked)
    words = [f"w{number} w{2 * number % steps.WORDS}" for number in range(CANDIDATES)]
    rows = images, prompts, [words] * asked
    model.rank(images[:1], prompts[:1], [words])
    seconds = seconds_of(lambda: model.rank(*rows), options) / asked
    theirs, inputs = transformers_questions(model, images, prompts[:1], answer=words[1])
    with torch.inference_mode():
        theirs(**inputs[0])
        plain = CANDIDATES * seconds_of(lambda: theirs(**inputs[0]), options)
    return answers(options, seconds, plain, f"{CANDIDATES} candidates")


def transformers_questions(
    model: InstructBLIP, images: Tensor, prompts: Sequence[str], answer: str | None = None
) -> tuple[Any, list[dict[str, Tensor]]]:
    """transformers' class around the same language model, and each question as it takes it."""
    theirs, form = steps.around_same_weights(model).eval(), model.llm.prompt_format
    visual = [len(model.llm.embeddings.weight) - 1] * model.qformer.query_tokens.shape[1]
    given = []
    for image, prompt in zip(images, prompts, strict=False):
        ids, target = visual + form.prompt_ids(prompt), [] if answer is None else form.target_ids(answer)
        if model.llm.kind == "decoder":
            ids, target = ids + target, [-100] * len(ids) + target
        text = model.qformer_tokenizer([prompt], return_tensors="pt")
        pixels = (image - model.vision.mean.cpu()) / model.vision.std.cpu()
        taken = {
            "pixel_values": pixels.to(model.projection.weight.dtype),
            "qformer_input_ids": text["input_ids"],
            "qformer_attention_mask": text["attention_mask"],
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        } | ({"labels": torch.tensor([target])} if answer else {})
        given.append({name: value.to(model.device) for name, value in taken.items()})
    return theirs, given


def answers(options: argparse.Namespace, seconds: float, plain: float, note: str) -> Cells:
    """The cells of a row of questions, with transformers' own time in them."""
    return {
        "per second": 1 / seconds,
        "unit": "questions",
        "seconds": seconds,
        "peak": peak_memory(torch.device(options.device)),
        "times": plain / seconds,
        "note": f"{note}; transformers, one by one: {1 / plain:.2f} a second",
    }


# --- number formats --------------------------------------------------------------------------------------------------


def number_format(dtype: torch.dtype, options: argparse.Namespace) -> Cells:
    """How far a batch of eight moves the scores and texts of its questions, and how far the format moves them."""
    found: dict[torch.dtype, list[Tensor]] = {}
    words, moved, same = [f"w{number}" for number in range(10)], 0.0, 0
    for kind in dict.fromkeys((torch.float32, dtype)):
        model, images, prompts = questions(options, 8, layers=4)
        model.to(kind)
        found[kind] = model.rank(images, prompts, [words] * len(prompts))
        for row, prompt in enumerate(prompts if kind == dtype else []):
            alone = model.rank(images[row : row + 1], [prompt], [words])[0]
            moved = max(moved, float((alone - found[kind][row]).abs().max()))
            texts = [model.generate(images[rows], prompts[rows]) for rows in (slice(row, row + 1), slice(None))]
            same += texts[0][0] == texts[1][row]
        del model
    off = max(float((a - b).abs().max()) for a, b in zip(found[torch.float32], found[dtype], strict=True))
    note = f"batch moves scores by {moved:.1e} nats, {same} of 8 texts equal; float32 is {off:.1e} away (4 layers)"
    return {"note": note, "peak": peak_memory(torch.device(options.device))}


# --- two GPUs --------------------------------------------------------------------------------------------------------


def two_ranks(kind: str, options: argparse.Namespace) -> Cells:
    """Two processes under torchrun, with a checkpoint in mid-run that is gone back to."""
    if options.device == "cuda" and torch.cuda.device_count() < 2:
        raise RuntimeError(f"needs two GPUs, there are {torch.cuda.device_count()}")
    with tempfile.TemporaryDirectory() as folder:
        own = [*worker_command(options), "--rank-row", kind, "--folder", folder]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *own[1:]]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if re.search(r"(Error|error): ", line)]
        raise RuntimeError((said or ["no word"])[0])
    cells: Cells = json.loads(done.stdout.splitlines()[-1])
    return cells


def as_rank(kind: str, options: argparse.Namespace) -> None:
    """One of the two: steps, a checkpoint, a step, back to the checkpoint, and that step again."""
    with start_ranks(torch.device(options.device), 300.0) as ranks:
        options.device = ranks.device(options.device)
        model = steps.build(steps.configuration(options), options.device)
        own = steps.batches_of(model, options, "bucketed")[ranks.rank :: 2]
        wrapped = parallelize(model, ranks, kind=kind, some_unused=not model.uses_every_weight({"answer_logits"}))
        optimizer = make_adamw(model.named_parameters(), weight_decay=0.05, betas=(0.9, 0.999))
        context = StepContext(ranks, wrapped, autocast(options), equal_passes=kind == "fsdp")
        step = partial(train_step, model, optimizer, own, context=context, **settings())
        step()
        save = checkpointed(model, optimizer, ranks, Path(options.folder))
        expected = step()
        save()
        found = step()
        off = abs(found.loss - expected.loss)
        if not off < 1e-4 * expected.loss:
            raise RuntimeError(f"back at the checkpoint the loss is {found.loss}, before it was {expected.loss}")
        seconds = seconds_of(step, options)
        cells = {"per second": found.samples / seconds, "unit": "samples", "seconds": seconds}
        if ranks.is_first:
            note = f"back at a checkpoint the loss is {off:.0e} away"
            print(json.dumps({**cells, "peak": peak_memory(model.device), "note": note}), flush=True)


def checkpointed(model: InstructBLIP, optimizer: Any, ranks: Ranks, folder: Path) -> Callable[[], None]:
    """Write a checkpoint of all ranks; give a function that goes back to it."""
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    held = model.held_state()
    tensors = whole_tensors(held, keep=ranks.is_first)
    moments = whole_tensors(optimizer_tensors(optimizer, names), keep=ranks.is_first)
    writer = CheckpointWriter(folder / "checkpoints", 1)
    if ranks.is_first:
        writer.save(1, model=tensors, optimizer=moments, state={})
        writer.wait()
    ranks.gather(None)

    def back() -> None:
        loaded = load_checkpoint(folder / "checkpoints/step_00000001")
        with torch.no_grad():
            for name, value in loaded.model.items():
                held[name].copy_(value)
        forget_gathered(model)
        restore_optimizer(optimizer, names, loaded.path)

    return back


# --- rows ------------------------------------------------------------------------------------------------------------

DECODER = ("vicuna_7b",)
ROWS: dict[str, Row] = {
    "transformers": Row(partial(training, steps.transformers), 60),
    "fixed": Row(partial(training, steps.this_code("fixed")), 45, DECODER),
    "bucketed": Row(partial(training, steps.this_code("bucketed")), 45, ("flan_t5_xl",)),
    "packed": Row(partial(training, steps.this_code("packed")), 45, DECODER),
    "by_length": Row(partial(training, steps.this_code("packed", by_length=True)), 45, DECODER),
    "overlapped": Row(partial(training, overlapped), 45, DECODER),
    "compiled": Row(partial(training, steps.this_code("best", compiled=True)), 120),
    "fp8": Row(partial(training, steps.this_code("best", fp8=True)), 60),
    "compiled_fp8": Row(partial(training, steps.this_code("best", compiled=True, fp8=True)), 120),
    "generation": Row(generation, 60),
    "ranking": Row(ranking, 60),
    "float32": Row(partial(number_format, torch.float32), 45),
    "bfloat16": Row(partial(number_format, torch.bfloat16), 45),
    "float16": Row(partial(number_format, torch.float16), 45),
    "ddp": Row(partial(two_ranks, "ddp"), 90),
    "fsdp": Row(partial(two_ranks, "fsdp"), 90),
}


def work_through(options: argparse.Namespace) -> None:
    """A worker: measure the rows of one model, and print a JSON object as each ends."""
    for name in options.rows:
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            cells = ROWS[name].measure(options)
        except Exception as error:
            cells = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        print(json.dumps({"row": name, **cells}), flush=True)
        gc.collect()
        torch._dynamo.reset()
        if options.device == "cuda":
            torch.cuda.empty_cache()


# --- the table -------------------------------------------------------------------------------------------------------


class Report:
    """Prints rows of a Markdown table as they end."""

    def __init__(self) -> None:
        self._baselines: dict[str, float] = {}
        print(
            "| model | row | a second | times | ms | peak, GB | remarks |\n|---|---|---:|---:|---:|---:|---|",
            flush=True,
        )

    def add(self, model: str, name: str, cells: Cells) -> None:
        """Print one."""
        if "error" in cells:
            print(f"| {model} | {name} | | | | | failed: {cells['error']} |", flush=True)
            return
        seconds, times = cells.get("seconds"), cells.get("times")
        if name == steps.BASELINE:
            self._baselines[model] = float(seconds or 0)
        if times is None and cells.get("unit") == "samples" and model in self._baselines and "fsdp ddp".find(name) < 0:
            times = self._baselines[model] / float(seconds or 1)
        shown = [
            f"{cells['per second']:.2f} {cells['unit']}" if "unit" in cells else "",
            "" if times is None else f"{times:.2f}",
            "" if seconds is None else f"{float(seconds) * 1e3:.1f}",
            f"{float(cells['peak']) / 1e9:.1f}",
            str(cells["note"]),
        ]
        print(f"| {model} | {name} | {' | '.join(shown)} |", flush=True)


def run_all(options: argparse.Namespace) -> None:
    """Rows of each model in turn, as long as there is time."""
    report, end = Report(), time.monotonic() + options.seconds
    left_out = []
    for model in options.models:
        wanted = [name for name in options.rows if model in ROWS[name].models]
        while wanted and time.monotonic() < end:
            for name, cells in worker(model, tuple(wanted), options, end):
                report.add(model, name, cells)
                wanted.remove(name)
        left_out += [f"{model}: {name}" for name in wanted]
    if left_out:
        print(f"No time was left for {', '.join(left_out)}.")
    place = torch.cuda.get_device_name() if options.device == "cuda" else None
    about = f"batches of {options.batch} in passes of {options.micro_batch}"
    print(f"\nTimes are to transformers' class in the same run; {about}. {provenance(place=place)}", flush=True)


def worker(model: str, rows: Sequence[str], options: argparse.Namespace, end: float) -> Iterator[tuple[str, Cells]]:
    """The rows' cells as a process gives them, until it is through, ends early or a row takes too long."""
    command = [*worker_command(options), "--models", model, "--rows", ",".join(rows), "--worker"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines: queue.Queue[str | None] = queue.Queue()
    said: list[str] = []
    threading.Thread(target=_listen, args=(process.stdout, lines.put), daemon=True).start()
    threading.Thread(target=_listen, args=(process.stderr, said.append), daemon=True).start()
    try:
        for number, name in enumerate(rows):
            start = options.start_seconds * (number == 0)  # imports, and the first touch of the device
            limit = min(start + ROWS[name].seconds, end - time.monotonic())
            try:
                line = _next_object(lines, time.monotonic() + limit)
            except queue.Empty:
                yield name, {"error": f"ended after {limit:.0f} s"}
                return
            if line is None:
                why = next((text for text in reversed(said) if text), "no word")
                yield name, {"error": f"the process ended: {why.strip()[:200]}"}
                return
            yield line.pop("row"), line
    finally:
        process.kill()
        process.wait()


def _listen(stream: Any, take: Callable[[Any], None]) -> None:
    for line in stream:
        take(line)
    take(None)


def _next_object(lines: "queue.Queue[str | None]", until: float) -> dict[str, Any] | None:
    """The next JSON object that a worker prints; None when it has ended."""
    while True:
        line = lines.get(timeout=max(until - time.monotonic(), 0.01))
        if line is None:
            return None
        with contextlib.suppress(json.JSONDecodeError):
            found = json.loads(line)
            if isinstance(found, dict) and "row" in found:
                return found


def worker_command(options: argparse.Namespace) -> list[str]:
    """This script with the same sizes."""
    sizes = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in _SIZES]
    return [sys.executable, __file__, *sizes, *(["--tiny"] if options.tiny else [])]


# --- command line ----------------------------------------------------------------------------------------------------

# name: (full size on a GPU, --tiny on a CPU)
_SIZES = {
    "batch": (128, 4),
    "micro_batch": (32, 2),
    "questions": (1, 1),
    "asked": (16, 4),
    "runs": (4, 1),
    "warm": (2, 1),
    "threads": (16, 1),
}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Full-size models on a GPU")
    parser.add_argument("--tiny", action="store_true", help="parts of two small layers on the CPU, for a try")
    parser.add_argument("--models", default=",".join(MODELS), help="of configs/llm, a comma between them")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--seconds", type=float, default=460, help="for all; rows that do not fit are left out")
    parser.add_argument("--start-seconds", type=float, default=60, help="that a process may take before its first row")
    for name, (full, tiny) in _SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"{full}; {tiny} with --tiny")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rank-row", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    for name, sizes in _SIZES.items():
        if getattr(options, name) is None:
            setattr(options, name, sizes[options.tiny])
    options.models, options.rows = options.models.split(","), options.rows.split(",")
    if unknown := [name for name in options.rows if name not in ROWS]:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    options.llm, options.device = options.models[0], "cpu" if options.tiny else "cuda"
    options.long = 0
    return options


def main() -> None:
    """All rows, or those of one process."""
    options = parse()
    torch.set_num_threads(min(options.threads, os.cpu_count() or 1))
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU that this torch can use; --tiny tries all rows on the CPU")
    if options.rank_row:
        as_rank(options.rank_row, options)
    elif options.worker:
        work_through(options)
    else:
        run_all(options)


if __name__ == "__main__":
    main()
