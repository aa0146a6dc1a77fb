"""Compare two evaluations sample by sample: `python -m instructblip.evaluation.report.compare RUN_A RUN_B`.

Prints, for each dataset that both have, both scores, the difference with its 95% interval, and the probability of one as
large if the two were equally good. Runs with different protocols or samples are refused, but for the precision that they
computed in: a difference of that is marked.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from instructblip.errors import UserError
from instructblip.evaluation.metrics import METRICS
from instructblip.evaluation.protocol import UNSTATED
from instructblip.evaluation.report.table import MADE_UP_DATA, OTHER_PRECISION, in_table_order
from instructblip.evaluation.results_file import StoredPrediction, StoredRun, read_predictions, read_run
from instructblip.evaluation.statistics import Paired, compare_paired
from instructblip.startup import print_all_signs

_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class Comparison:
    """One dataset of two runs: both scores on the table's scale, samples, images, and how they compare.

    `made_up`: the samples are made up, and no score means anything. `precisions`: what each run computed in.
    """

    dataset: str
    first: float
    second: float
    count: int
    images: int
    paired: Paired
    made_up: bool = False
    precisions: tuple[str, str] = ("fp32", "fp32")

    @property
    def symbols(self) -> str:
        """What marks the dataset."""
        marks = {MADE_UP_DATA: self.made_up, OTHER_PRECISION: len(set(self.precisions)) > 1}
        return "".join(f" {mark.symbol}" for mark, holds in marks.items() if holds)


def compare_runs(first: StoredRun, second: StoredRun) -> list[Comparison]:
    """Compare every dataset that both runs have a score of, in the order of the paper's table.

    Raises:
        UserError: no such dataset, protocols, samples or caption tokenizers that differ (names the difference), or
            predictions that are damaged or another evaluation's.
    """
    common = [name for name in in_table_order(first.scores) if name in second.scores]
    scored = [name for name in common if first.scores[name].value is not None and second.scores[name].value is not None]
    if not scored:
        raise UserError(
            f"{first.folder} ({', '.join(first.scores)}) and {second.folder} ({', '.join(second.scores)}) have no scored "
            "dataset in common; evaluate both on one suite"
        )
    for name in scored:
        _check_same_protocol(name, first, second)
    return [_compare(name, first, second) for name in scored]


def comparison_table(found: Sequence[Comparison]) -> Table:
    """The comparison for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("dataset", no_wrap=True)
    for name in ("A", "B", "B - A", "95%", "p", "images"):
        table.add_column(name, justify="right", no_wrap=True)
    for item in found:
        paired = item.paired
        p = "<0.001" if paired.p < 0.001 else f"{paired.p:.3f}"
        interval = "-" if paired.low is None else f"{paired.low:+.1f} to {paired.high:+.1f}"
        scores = (f"{item.first:.1f}", f"{item.second:.1f}", f"{paired.difference:+.1f}")
        table.add_row(item.dataset + item.symbols, *scores, interval, p, f"{item.images:,}")
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, or 2 after a line on standard error that says what to mend."""
    parser = argparse.ArgumentParser(prog="python -m instructblip.evaluation.report.compare", description=__doc__)
    parser.add_argument("run_a", metavar="RUN_A", help="folder of an evaluation, or its results.json")
    parser.add_argument("run_b", metavar="RUN_B", help="another on the same suite")
    options = parser.parse_args(arguments)
    print_all_signs()
    console = Console(soft_wrap=True, highlight=False)
    try:
        first, second = read_run(options.run_a), read_run(options.run_b)
        found = compare_runs(first, second)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for letter, run in (("A", first), ("B", second)):
        console.print(f"{letter}  {run.about}", markup=False)
    console.print(comparison_table(found))
    if any(item.made_up for item in found):
        console.print(f"{MADE_UP_DATA.symbol} {MADE_UP_DATA.meaning}", markup=False)
    for first_in, second_in in dict.fromkeys(item.precisions for item in found if len(set(item.precisions)) > 1):
        console.print(f"{OTHER_PRECISION.symbol} A computed in {first_in}, B in {second_in}", markup=False)
    tests = dict.fromkeys(item.paired.test for item in found)
    console.print(f"95%: bootstrap of the difference by image. p: two-sided, {', or '.join(tests)}.")
    left_out = sorted(first.scores.keys() ^ second.scores.keys())
    if left_out:
        console.print(f"in one run only: {', '.join(left_out)}")
    return 0


def _check_same_protocol(dataset: str, first: StoredRun, second: StoredRun) -> None:
    """Refuse scores of different protocols or samples, or of captions that were cut into words differently."""
    one, other = ({**UNSTATED, **run.scores[dataset].protocol} for run in (first, second))
    tokenizers = [run.scores[dataset].tokenizer for run in (first, second)]
    names = {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
    if one["sha256"] == other["sha256"] or names == {"precision", "sha256"}:
        if tokenizers[0] != tokenizers[1]:
            raise UserError(
                f"{dataset}: captions were tokenised by {tokenizers[0]} in {first.folder} and by {tokenizers[1]} in "
                f"{second.folder}; evaluate both again on one machine: their answers are kept and scored anew"
            )
        return
    # The split and how many samples say more than the hash that follows from them.
    told = sorted(names - {"sha256", "samples_sha256"}) or sorted(names - {"sha256"}) or ["sha256"]
    texts = [f"{name} ({_shown(one, name)} and {_shown(other, name)})" for name in told]
    raise UserError(
        f"{dataset}: {first.folder} and {second.folder} differ in {', '.join(texts)}; "
        "evaluate both with the same protocol on the same samples"
    )


def _shown(protocol: Mapping[str, Any], name: str) -> str:
    text = repr(protocol.get(name))
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


@dataclass(frozen=True)
class PairedScores:
    """The scores of two runs on the samples that both have one of, and the image of each."""

    first: list[float]
    second: list[float]
    images: list[str]


def paired_scores(dataset: str, first: StoredRun, second: StoredRun) -> PairedScores:
    """What `compare_paired` compares; the protocols may differ, the samples may not.

    Raises:
        UserError: other samples, or predictions that are damaged or another evaluation's.
    """
    ours, theirs = read_predictions(first, dataset), read_predictions(second, dataset)
    if ours.keys() != theirs.keys():
        stray = min(ours.keys() ^ theirs.keys())
        raise UserError(f"{dataset}: only one of {first.folder} and {second.folder} has {stray}; evaluate both again")
    pairs = [(ours[name], theirs[name]) for name in ours]
    chosen = [(one, other) for one, other in pairs if one.score is not None and other.score is not None]
    metric = first.scores[dataset].metric
    values = [_sample_values(list(side), metric) for side in zip(*chosen, strict=True)]
    return PairedScores(values[0], values[1], [one.image for one, _ in chosen])


def _compare(dataset: str, first: StoredRun, second: StoredRun) -> Comparison:
    found = paired_scores(dataset, first, second)
    paired = compare_paired(found.first, found.second, found.images)
    scores = [run.scores[dataset].value for run in (first, second)]
    assert scores[0] is not None and scores[1] is not None
    made_up = first.scores[dataset].made_up or second.scores[dataset].made_up
    stated = [run.scores[dataset].protocol.get("precision", UNSTATED["precision"]) for run in (first, second)]
    precisions, count, images = (stated[0], stated[1]), len(found.images), len(set(found.images))
    return Comparison(dataset, scores[0], scores[1], count, images, paired, made_up, precisions)


def _sample_values(predictions: Sequence[StoredPrediction], metric: str) -> list[float]:
    """A value a sample whose mean is the score and whose spread over samples is the score's.

    For AUROC a sample's placement value, weighed by how rare its class is: the linear form on which DeLong, DeLong and
    Clarke-Pearson's test (Biometrics 44, 1988) of two correlated curves rests. All other scores are means already, recall
    of retrieval too: an image's value is what it adds.
    """
    values = [prediction.score or 0.0 for prediction in predictions]
    if metric not in METRICS or not METRICS[metric].needs_both_labels:
        return values
    classes = [prediction.answers for prediction in predictions]
    mean, count = sum(values) / len(values), len(values)
    sizes = {name: classes.count(name) for name in set(classes)}
    return [mean + count / sizes[name] * (value - mean) for value, name in zip(values, classes, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
