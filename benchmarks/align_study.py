"""What BLIP-2's two stages add before instruction tuning, beside the demo's alignment phase, over seeds: two tables.

    python benchmarks/align_study.py --seeds 1 2 3

Each seed has three runs that align (the first stage; the second, from the first; the demo's alignment phase alone) and four
that are tuned on the demo's instructions, all alike, from nothing and from each of the three. `--steps` shortens runs:
`--steps stage1=60`. Budgets are in steps; the processor's seconds are measured beside them and printed, start-up included.

What was measured is kept in the folder, a line a run: a study that was interrupted goes on with the same command. Spread and
intervals are over seeds, by Student's t; those over questions, in `results.json` of each run, know nothing of seeds.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from measure import provenance
from rich.console import Console
from rich.table import Table
from scipy import stats
from torch import Tensor

import instructblip
from instructblip.config.entry import compose_config
from instructblip.config.schema import EvaluateConfig, TrainConfig
from instructblip.data.cards import load_card
from instructblip.data.readers.easy_vqa import COLORS, SHAPES
from instructblip.evaluation.protocol import Task, make_task
from instructblip.evaluation.run import evaluate
from instructblip.evaluation.runner import read_pixels, run_task
from instructblip.models.blip2 import BLIP2
from instructblip.training.run import train

CAPTIONS = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]
HELD_OUT = "easy_vqa_statements"
DATASETS = {
    "easy_vqa_shape": "shape",
    "easy_vqa_color": "colour",
    "easy_vqa_yes_no": "yes/no",
    HELD_OUT: "statements (held out)",
}
TUNED = "tuned from "
_DEC = "qformer.extra_tokens=['[DEC]']"  # of all, so that all have one Q-Former
_FROM_BERT = ("qformer.init=bert", "qformer.query_init=cls", "init_from=[]")


@dataclass(frozen=True)
class Run:
    """A training run of the study.

    Attributes:
        overrides: of train.py.
        phase: the one that `--steps` shortens.
        after: the run that it starts from, if it does.
    """

    overrides: tuple[str, ...]
    phase: str
    after: str | None = None


RUNS: Mapping[str, Run] = {
    "stage1": Run(("experiment=align_demo_stage1",), "align"),
    "stage2": Run(("experiment=align_demo_stage2",), "align", "stage1"),
    "cosine": Run(("experiment=demo", "~recipe.phases.instruction", _DEC), "alignment"),
    f"{TUNED}cosine": Run(("experiment=align_demo",), "instruction", "cosine"),
    f"{TUNED}stage2": Run(("experiment=align_demo",), "instruction", "stage2"),
    f"{TUNED}nothing": Run(("experiment=align_demo", *_FROM_BERT), "instruction"),
    f"{TUNED}stage1": Run(("experiment=align_demo",), "instruction", "stage1"),
}
TITLES = {
    f"{TUNED}nothing": "nothing",
    f"{TUNED}cosine": "the demo's alignment phase",
    f"{TUNED}stage1": "stage 1",
    f"{TUNED}stage2": "stages 1 and 2",
}


class Study:
    """The runs of some seeds, in a folder, and what was measured of them.

    Args:
        folder: of runs, evaluations and `measured.jsonl`.
        steps: of runs by their kind (`stage1`, `stage2`, `cosine`, `tuned`), where they are not those of their recipes.
        samples: test questions a dataset, and test pictures.
        parts: overrides of train.py that choose other parts.
    """

    def __init__(self, folder: Path, *, steps: Mapping[str, int], samples: int, parts: Sequence[str]) -> None:
        self.folder, self.steps, self.samples, self.parts = folder, steps, samples, parts
        self.file = folder / "measured.jsonl"
        self.console = Console(stderr=True)

    def measured(self) -> dict[tuple[str, int], dict[str, Any]]:
        """(name, seed) -> what was measured of that run."""
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.is_file() else []
        found = [json.loads(line) for line in lines]
        return {(entry["run"], entry["seed"]): entry for entry in found}

    def config(self, name: str, seed: int) -> TrainConfig:
        """Of one run; nothing is evaluated in it."""
        run, place = RUNS[name], f"{name.replace(' ', '_')}_{seed}"
        overrides = [*run.overrides, *self._own_parts(name), "suite=none", f"seed={seed}", f"name={place}"]
        if run.after is not None:
            overrides.append(f"init_from={self.folder / f'{run.after}_{seed}'}")
        kind = "tuned" if name.startswith(TUNED) else name
        if kind in self.steps:
            overrides.append(f"recipe.phases.{run.phase}.steps={self.steps[kind]}")
        return compose_config("train", TrainConfig, [*overrides, f"output={self.folder}"])

    def _own_parts(self, name: str) -> list[str]:
        return [part for part in self.parts if name != "stage1" or not part.startswith("llm.")]

    def do(self, name: str, seed: int) -> None:
        """Train one run, ask what it has learned, and write that down."""
        self.console.print(f"seed {seed}: {name}", highlight=False)
        config, started = self.config(name, seed), time.process_time()
        train(config, Console(stderr=True, quiet=True))
        seconds = time.process_time() - started
        phase = config.recipe.phases[RUNS[name].phase]
        entry = {"run": name, "seed": seed, "steps": phase.steps, "batch": phase.batch_size, "cpu_seconds": seconds}
        run = self.folder / config.name
        learned = self._answers(run) if name.startswith(TUNED) else self._captions(name, config)
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry | {"scores": learned}) + "\n")

    def _answers(self, run: Path) -> dict[str, float]:
        """Accuracy on each of the demo's datasets, in percent."""
        given = (f"checkpoint={run}", "suite=demo", f"samples={self.samples}", f"name={run.name}")
        data = [part for part in self.parts if part.startswith("data.")]
        output = f"output={self.folder / 'evaluated'}"
        evaluate(compose_config("evaluate", EvaluateConfig, [*given, *data, output]), Console(quiet=True))
        results = json.loads((self.folder / "evaluated" / run.name / "results.json").read_text())
        return {name: results["datasets"][name]["value"] for name in DATASETS}

    @torch.inference_mode()
    def _captions(self, name: str, config: TrainConfig) -> dict[str, float]:
        """What an aligned model says of test pictures, in percent; the demo's alignment phase has taught none of it."""
        if name == "cosine":
            return {}
        model = instructblip.load(self.folder / config.name, device="cpu").eval()
        task = make_task(load_card("easy_vqa_caption"), Path(config.data.shards), samples=self.samples)
        read, own = read_pixels(model.vision.image_size), [sample.record.captions[0] for sample in task.samples]
        written = run_task(model, task, read, batch_size=64, show_progress=False).predictions
        pairs = zip(written, own, strict=True)
        scores = {"caption": share([found.prediction.strip() == text for found, text in pairs])}
        if isinstance(model, BLIP2):
            scores |= matched(model, task, read, own)
        return scores


def matched(model: BLIP2, task: Task, read: Callable[..., Tensor], own: Sequence[str]) -> dict[str, float]:
    """How often a picture's own caption is the best of the 24, by contrast and by matching, in percent."""
    pixels = torch.stack([read(sample.shard, sample.row) for sample in task.samples])
    best: dict[str, list[str]] = {"itc": [], "itm": []}
    for tokens_1PU in model.image_tokens(pixels):
        repeated = tokens_1PU.expand(len(CAPTIONS), *tokens_1PU.shape)
        best["itc"].append(CAPTIONS[int(model.match(repeated, CAPTIONS, head="itc").argmax())])
        best["itm"].append(CAPTIONS[int(model.match(repeated, CAPTIONS).argmax())])
    return {head: share([a == b for a, b in zip(found, own, strict=True)]) for head, found in best.items()}


def share(right: Sequence[bool]) -> float:
    """In percent."""
    return 100 * sum(right) / len(right)


def summary(values: Sequence[float]) -> str:
    """Mean, standard deviation over seeds, and the 95% interval of the mean by Student's t; one value alone as it is."""
    if len(values) < 2:
        return each(values)
    deviation = statistics.stdev(values)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return f"{mean:.1f} ± {deviation:.1f} [{mean - half:.1f}, {mean + half:.1f}]"


def each(values: Sequence[float]) -> str:
    """One value a seed."""
    return ", ".join(f"{value:.1f}" for value in values)


class Found:
    """What was measured, by run and seed; of seeds that a run was not measured with nothing is said."""

    def __init__(self, measured: Mapping[tuple[str, int], Mapping[str, Any]], seeds: Sequence[int]) -> None:
        self.runs = {name: {seed: measured[name, seed] for seed in seeds if (name, seed) in measured} for name in RUNS}

    def budget(self, run: str) -> tuple[str, str]:
        """Steps and batch, and the processor's seconds of each seed."""
        entries = list(self.runs[run].values())
        steps = ", ".join(dict.fromkeys(f"{entry['steps']} x {entry['batch']}" for entry in entries))
        return steps, ", ".join(f"{entry['cpu_seconds']:.0f}" for entry in entries)

    def scores(self, run: str, name: str) -> list[float]:
        """One a seed."""
        return [entry["scores"][name] for entry in self.runs[run].values()]

    def gains(self, run: str, base: str, name: str) -> list[float]:
        """Of each seed that both were measured with, the first minus the second."""
        own, other = self.runs[run], self.runs[base]
        return [own[seed]["scores"][name] - other[seed]["scores"][name] for seed in own if seed in other]


def tables(found: Found) -> list[Table]:
    """What each stage has learned by itself, what tuning makes of it, and the differences to the demo's way by seed."""
    learned = Table(title="After aligning, test pictures right, % (chance 4.2)", title_justify="left")
    for heading in ("run", "steps x batch", "CPU seconds", "what", "each seed", "mean ± SD [95%]"):
        learned.add_column(heading)
    for run, name in (("stage1", "itc"), ("stage1", "itm"), ("stage1", "caption"), ("stage2", "caption")):
        learned.add_row(run, *found.budget(run), name, each(found.scores(run, name)), summary(found.scores(run, name)))
    learned.add_row("cosine", *found.budget("cosine"), "", "", "")
    tuned = Table(title="After instruction tuning, accuracy, %", title_justify="left")
    for heading in ("tuned from", "steps x batch", "dataset", "each seed", "mean ± SD [95%]", "minus the demo's"):
        tuned.add_column(heading)
    base = f"{TUNED}cosine"
    for run, title in TITLES.items():
        for name, shown in DATASETS.items():
            own = found.scores(run, name)
            gain = "" if run == base else summary(found.gains(run, base, name))
            tuned.add_row(title, found.budget(run)[0], shown, each(own), summary(own), gain)
    return [learned, tuned]


def main() -> None:
    """Do what is left of the study and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", nargs="*", default=[], metavar="RUN=N", help="stage1, stage2, cosine, tuned")
    parser.add_argument("--samples", type=int, default=200, help="test questions a dataset, and test pictures")
    parser.add_argument("--folder", type=Path, default=Path("outputs/align_study"))
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--show", action="store_true", help="train nothing, print what there is")
    parser.add_argument("--parts", nargs="*", default=[], help="overrides of train.py that choose other parts")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    steps = {name: int(count) for name, _, count in (item.partition("=") for item in arguments.steps)}
    arguments.folder.mkdir(parents=True, exist_ok=True)
    study = Study(arguments.folder, steps=steps, samples=arguments.samples, parts=arguments.parts)
    for seed in () if arguments.show else arguments.seeds:
        for name in RUNS:
            if (name, seed) not in study.measured():
                study.do(name, seed)
    console = Console(width=150)
    for table in tables(Found(study.measured(), arguments.seeds)):
        console.print(table)
    console.print(provenance(f"{arguments.threads} threads"), highlight=False)


if __name__ == "__main__":
    main()
