"""The ten best of a vocabulary: without what a bound rules out (`rank(best=10)`), against all candidates scored in one tree.

    python benchmarks/vocabulary.py --checkpoint outputs/train/demo
    python benchmarks/vocabulary.py --checkpoint outputs/train/photos --dataset clothing_what

A trained checkpoint is asked the test questions of a prepared dataset. The vocabularies hold the dataset's own answers and
words of BERT's token table, every fourth entry two of them, as the answers of MSVD-QA (2,423) and MSRVTT-QA (some thousands)
are words. What is saved depends on how sure the model is, so random weights would say nothing. Both ways are taken in turns
in one process and must give the same ten.
"""

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from measure import provenance
from rich.console import Console
from rich.table import Table
from torch import Tensor

from instructblip.data.cards import load_card
from instructblip.evaluation.protocol import make_task
from instructblip.evaluation.runner import read_pixels
from instructblip.models.instructblip import InstructBLIP
from instructblip.weights.load import load_model

BEST = 10


def vocabulary(model: InstructBLIP, own: tuple[str, ...], size: int) -> list[str]:
    """So many answers: the dataset's, and drawn words, one in four of them a pair."""
    draw, table = random.Random(0), model.qformer_tokenizer.get_vocab()
    words = sorted(word for word in table if word.isascii() and word.isalpha() and len(word) > 2)
    found = dict.fromkeys(own)
    while len(found) < size:
        text = " ".join(draw.choices(words, k=2 if len(found) % 4 == 3 else 1))
        # Where a table is so small that its words are used up, three of them make something new.
        found[text if text not in found else " ".join(draw.choices(words, k=3))] = None
    return list(found)[:size]


def questions(model: InstructBLIP, dataset: str, shards: Path, count: int) -> tuple[Tensor, list[str], tuple[str, ...]]:
    """Image tokens and prompts of a dataset's first test questions, and its answers."""
    task = make_task(load_card(dataset), shards, samples=count, mode="rank")
    read = read_pixels(model.vision.image_size)
    pixels = torch.stack([read(sample.shard, sample.row) for sample in task.samples])
    with torch.inference_mode():
        tokens = model.image_tokens(pixels)
    return tokens, [sample.prompt for sample in task.samples], task.protocol.candidates


def timed(work: Callable[[], list[Tensor]]) -> tuple[float, list[Tensor]]:
    """Seconds that `work` takes, and what it gives."""
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


def check(whole: list[Tensor], best: list[Tensor]) -> None:
    """Both have the same ten; equal to within what the size of a pass changes, 1e-3 nats."""
    for all_C, best_C in zip(whole, best, strict=True):
        expected, found = all_C.topk(BEST), best_C.topk(BEST)
        torch.testing.assert_close(found.values, expected.values, rtol=0, atol=1e-3)
        if set(found.indices.tolist()) != set(expected.indices.tolist()):
            raise RuntimeError(f"other answers: {found.indices.tolist()} and {expected.indices.tolist()}")


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--checkpoint", default="outputs/train/demo", help="a run, as of evaluate.py")
    parser.add_argument("--dataset", default="easy_vqa_shape", help="whose test questions are asked")
    parser.add_argument("--shards", type=Path, default=Path("data/shards"), help="folder of prepared datasets")
    parser.add_argument("--sizes", type=int, nargs="*", default=[300, 1000, 4000], help="candidates")
    parser.add_argument("--questions", type=int, default=4, help="in one batch")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load_model(arguments.checkpoint, device="cpu").model.eval()
    if model.qformer_tokenizer is None:
        sys.exit(f"{arguments.checkpoint} has a Q-Former that reads no instruction, so no table of words; take another")
    images, prompts, own = questions(model, arguments.dataset, arguments.shards, arguments.questions)
    table = Table(title="Questions a second, one process", title_justify="left")
    for heading in ("candidates", "all scored", "best ten", "times faster", "min-max"):
        table.add_column(heading, justify="right")
    model.rank(images[:1], prompts[:1], [list(own)])  # not timed: first use
    for size in arguments.sizes:
        candidates = [vocabulary(model, own, size)] * len(prompts)
        rounds = []
        for _ in range(arguments.rounds):
            slow, whole = timed(lambda candidates=candidates: model.rank(images, prompts, candidates))
            fast, best = timed(lambda candidates=candidates: model.rank(images, prompts, candidates, best=BEST))
            check(whole, best)
            rounds.append((slow, fast))
        rates = [f"{len(prompts) / statistics.median(seconds):.3f}" for seconds in zip(*rounds, strict=True)]
        ratios = [slow / fast for slow, fast in rounds]
        table.add_row(f"{size:,}", *rates, f"{statistics.median(ratios):.1f}", f"{min(ratios):.1f}-{max(ratios):.1f}")
    console = Console(width=120)
    console.print(table)
    console.print(f"{len(prompts)} questions a batch; the same ten best in every case.", highlight=False)
    console.print(provenance(f"{arguments.threads} threads"), highlight=False)


if __name__ == "__main__":
    main()
