"""What CapFilt makes of pictures half of whose texts are another picture's, with a small BLIP, by seed: one table.

    python benchmarks/capfilt_study.py --seeds 1 2

Each seed pre-trains a model on the demo's training pictures (`experiment=blip_demo`), tunes a captioner and a filter from
it, each for itself (`blip_demo_caption`, `blip_demo_retrieval`), and filters test pictures. The seed also draws which of
them have a wrong text, and whose. `--steps` shortens runs: `--steps pretrain=60`. Budgets are in steps; seconds of the
processor are measured beside them and printed, start-up included.

What was measured is kept in the folder, a line a seed: a study that was interrupted goes on with the same command. Intervals
are Wilson's, of one seed's texts; they know nothing of seeds.
"""

import argparse
import io
import json
import random
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from measure import provenance
from rich.console import Console
from rich.table import Table

from instructblip.capfilt.command import capfilt
from instructblip.config.entry import compose_config
from instructblip.config.schema import CapFiltConfig, TrainConfig
from instructblip.data.cards import load_card
from instructblip.data.prepare.convert import prepare_dataset
from instructblip.data.readers.easy_vqa import COLORS, SHAPES
from instructblip.data.shards import open_split
from instructblip.evaluation.statistics import wilson_interval
from instructblip.training.run import train

WEB = "cc3m"  # a card of pictures with one text each, as img2dataset writes them


@dataclass(frozen=True)
class Run:
    """A training run of the study: its experiment, its phase, and the run that it starts from, if it does."""

    experiment: str
    phase: str
    after: str | None = None


RUNS: Mapping[str, Run] = {
    "pretrain": Run("blip_demo", "pretrain"),
    "captioner": Run("blip_demo_caption", "finetune", "pretrain"),
    "filter": Run("blip_demo_retrieval", "finetune", "pretrain"),
}


class Picture(NamedTuple):
    """A picture, what it shows, and what the web says of it."""

    content: bytes
    caption: str
    text: str


class Study:
    """The runs of some seeds, in a folder, and what was measured of them.

    Args:
        folder: of runs, pictures, results and `measured.jsonl`.
        steps: of runs by their names in `RUNS`, where they are not those of their recipes.
        pictures: how many are filtered, at most.
        threshold: of the filter's probability, above which a text stays.
        parts: overrides of train.py that choose other parts.
    """

    def __init__(
        self, folder: Path, *, steps: Mapping[str, int], pictures: int, threshold: float, parts: Sequence[str]
    ) -> None:
        self.folder, self.steps, self.pictures, self.threshold, self.parts = folder, steps, pictures, threshold, parts
        self.file = folder / "measured.jsonl"
        self.console, self.quiet = Console(stderr=True), Console(stderr=True, quiet=True)

    def measured(self) -> dict[int, dict[str, Any]]:
        """Seed -> what was measured."""
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.is_file() else []
        return {entry["seed"]: entry for entry in map(json.loads, lines)}

    def config(self, name: str, seed: int) -> TrainConfig:
        """Of one run; nothing is evaluated in it."""
        run = RUNS[name]
        overrides = [f"experiment={run.experiment}", *self.parts, "suite=none", f"seed={seed}", f"name={name}_{seed}"]
        if run.after is not None:
            overrides.append(f"init_from={self.folder / f'{run.after}_{seed}'}")
        if name in self.steps:
            overrides.append(f"recipe.phases.{run.phase}.steps={self.steps[name]}")
        return compose_config("train", TrainConfig, [*overrides, f"output={self.folder}"])

    def do(self, seed: int) -> None:
        """Train the three, filter, and write down what became of the texts."""
        entry: dict[str, Any] = {"seed": seed, "runs": {}}
        for name, run in RUNS.items():
            self.console.print(f"seed {seed}: {name}", highlight=False)
            config, started = self.config(name, seed), time.process_time()
            train(config, self.quiet)
            phase, seconds = config.recipe.phases[run.phase], time.process_time() - started
            entry["runs"][name] = {"steps": phase.steps, "batch": phase.batch_size, "cpu_seconds": seconds}
        self.console.print(f"seed {seed}: capfilt", highlight=False)
        started = time.process_time()
        entry["texts"], entry["report"] = self._filter(seed, Path(config.data.shards) / "easy_vqa/test")
        entry["runs"]["capfilt"] = {"cpu_seconds": time.process_time() - started}
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _filter(self, seed: int, split: Path) -> tuple[dict[str, list[int]], dict[str, Any]]:
        """What CapFilt leaves of the pictures' texts, by `counts`, and its report."""
        pictures = shuffled(read_pictures(split)[: self.pictures], seed)
        web, out = self.folder / f"web_{seed}", self.folder / f"capfilt_{seed}"
        write_web(web, pictures)
        models = (f"captioner={self.folder / f'captioner_{seed}'}", f"filter={self.folder / f'filter_{seed}'}")
        given = [f"shards={web / 'shards'}", *models, f"out={out}", f"seed={seed}", f"threshold={self.threshold}"]
        capfilt(compose_config("capfilt", CapFiltConfig, given), self.quiet)
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        listed = json.loads((out / "captions.json").read_text(encoding="utf-8"))
        return counts(pictures, listed), {name: report[name] for name in ("pictures", "synthetic", "web")}


def read_pictures(split: Path) -> list[Picture]:
    """The pictures of a prepared split of easy-VQA that have a caption, which is their text."""
    found = []
    for shard in open_split(split).shards:
        for row in range(len(shard)):
            captions = [caption for record in shard.read_records(row) for caption in record.captions]
            if captions:
                found.append(Picture(shard.read_encoded(row)[0][0], captions[0], captions[0]))
    return found


def shuffled(pictures: Sequence[Picture], seed: int) -> list[Picture]:
    """The pictures, of which half have the text of one that shows something else."""
    stream = random.Random(seed)
    wrong = set(stream.sample(range(len(pictures)), len(pictures) // 2))
    result = list(pictures)
    for row in sorted(wrong):
        others = [other.caption for other in pictures if other.caption != pictures[row].caption]
        result[row] = pictures[row]._replace(text=stream.choice(others))
    return result


def url(row: int) -> str:
    """Where a picture would lie on the web."""
    return f"http://web.example/{row}.png"


def write_web(folder: Path, pictures: Sequence[Picture]) -> None:
    """Write pictures and texts as img2dataset does, and prepare them below `shards`."""
    (folder / "raw").mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "raw/00000.tar", "w") as tar:
        for row, picture in enumerate(pictures):
            facts = {"caption": picture.text, "url": url(row), "key": f"{row:09d}"}
            for extension, content in (("png", picture.content), ("json", json.dumps(facts).encode())):
                member = tarfile.TarInfo(f"{row:09d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    prepare_dataset(load_card(WEB), folder / "raw", folder / "shards", progress=False)


def counts(pictures: Sequence[Picture], listed: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Of the web's wrong texts those that are gone, of its right ones those that are left, each beside all of them; of the
    drawn captions that are left, and of all texts before and after, those that are right, word for word.

    A drawn caption that has a stray word is not right, but may name the colour and shape that are shown, and no others.
    """
    row_of = {url(row): row for row in range(len(pictures))}
    kept: dict[str, set[int]] = {"web": set(), "synthetic": set()}
    right, named = {"web": 0, "synthetic": 0}, 0
    for item in listed:
        row = row_of[item["url"]]
        kept[item["source"]].add(row)
        right[item["source"]] += item["caption"] == pictures[row].caption
        named += item["source"] == "synthetic" and things(item["caption"]) == things(pictures[row].caption)
    wrong = {row for row, picture in enumerate(pictures) if picture.text != picture.caption}
    sound = set(range(len(pictures))) - wrong
    return {
        "wrong texts of the web that go": [len(wrong - kept["web"]), len(wrong)],
        "right texts of the web that stay": [len(sound & kept["web"]), len(sound)],
        "right among captions that stay": [right["synthetic"], len(kept["synthetic"])],
        "colour and shape right among those": [named, len(kept["synthetic"])],
        "right among all texts before": [len(sound), len(pictures)],
        "right among all texts after": [sum(right.values()), len(listed)],
    }


def things(text: str) -> set[str]:
    """The colours and shapes that a text names."""
    return set(text.split()) & {*COLORS, *SHAPES}


def share(correct: int, count: int) -> str:
    """A share in percent with its 95% interval."""
    if not count:
        return "-"
    low, high = wilson_interval(correct, count)
    return f"{100 * correct / count:.1f} [{100 * low:.1f}, {100 * high:.1f}]  {correct} of {count}"


def table(found: Mapping[int, Mapping[str, Any]], seeds: Sequence[int]) -> Table:
    """What became of the texts, a column a seed."""
    made = Table(title="CapFilt on pictures of which half have a wrong text, % [95%]", title_justify="left")
    made.add_column("texts")
    for seed in seeds:
        made.add_column(f"seed {seed}")
    for name in found[seeds[0]]["texts"]:
        made.add_row(name, *(share(*found[seed]["texts"][name]) for seed in seeds))
    budgets = []
    for name in RUNS:
        first = found[seeds[0]]["runs"][name]
        seconds = ", ".join(f"{found[seed]['runs'][name]['cpu_seconds']:.0f}" for seed in seeds)
        budgets.append(f"{name} {first['steps']} x {first['batch']} ({seconds} CPU seconds)")
    seconds = ", ".join(f"{found[seed]['runs']['capfilt']['cpu_seconds']:.0f}" for seed in seeds)
    made.caption = f"steps x batch: {'; '.join(budgets)}; capfilt ({seconds} CPU seconds)"
    return made


def main() -> None:
    """Do what is left of the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", nargs="*", default=[], metavar="RUN=N", help=", ".join(RUNS))
    parser.add_argument("--pictures", type=int, default=400, help="test pictures that are filtered")
    parser.add_argument("--threshold", type=float, default=0.5, help="probability above which a text stays")
    parser.add_argument("--folder", type=Path, default=Path("outputs/capfilt_study"))
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--parts", nargs="*", default=[], help="overrides of train.py that choose other parts")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    steps = {name: int(count) for name, _, count in (item.partition("=") for item in arguments.steps)}
    arguments.folder.mkdir(parents=True, exist_ok=True)
    given = {"pictures": arguments.pictures, "threshold": arguments.threshold, "parts": arguments.parts}
    study = Study(arguments.folder, steps=steps, **given)
    for seed in arguments.seeds:
        if seed not in study.measured():
            study.do(seed)
    console = Console(width=150)
    console.print(table(study.measured(), arguments.seeds))
    console.print(provenance(f"{arguments.threads} threads"), highlight=False)


if __name__ == "__main__":
    main()
