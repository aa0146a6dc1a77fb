"""Pairs of image and caption matched a second: `suite=retrieval` against transformers' class, one pair at a time.

    python benchmarks/retrieval.py                     a ViT of 12 layers of width 768
    python benchmarks/retrieval.py --published         EVA-CLIP-g, as Salesforce/blip2-itm-vit-g has it; 5 GB of memory
    python benchmarks/retrieval.py --tiny              a few seconds, for a try

The Q-Former is the published one in both, weights are random, and nothing is downloaded. The task is whole: images are
encoded, all pairs compared by contrast, each row's best, here all, re-ranked by matching. transformers' class
(`Blip2ForImageTextRetrieval`, with the same weights) is used as its users do: a forward pass with the matching head for each
pair, the image in it. A second baseline encodes each image once, before, and leaves that time out. All give the same scores.
"""

import argparse
import io
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from measure import provenance
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from train_step import WORDS, made_up_tokenizer
from transformers import Blip2ForImageTextRetrieval
from transformers.modeling_outputs import BaseModelOutputWithPooling

from instructblip.config.entry import compose_config
from instructblip.config.schema import EvaluateConfig, TrainConfig
from instructblip.data.cards import load_card
from instructblip.data.records import Record
from instructblip.data.shards import MANIFEST_FORMAT, ShardWriter, shard_path
from instructblip.evaluation.protocol import Task, make_task
from instructblip.evaluation.runner import read_pixels, run_task
from instructblip.files import sha256_file, write_json
from instructblip.models.blip2 import BLIP2
from instructblip.weights.modules import qformer_of_sizes, vision_encoder
from instructblip.weights.transformers_write import retrieval_model

CARD = "flickr30k_retrieval"
CAPTIONS = 5  # of an image
CAPTION_WORDS = (8, 16)
BATCH = EvaluateConfig.batch_size
OURS = "suite=retrieval"
BOUND = 1e-3  # between scores of the two, float32

_PARTS = ("experiment=blip2_stage1", "vision=eva_vit_g", "vision.dtype=float32", "qformer.dropout=0")
_EPS = "vision.norm_eps=1e-6"  # transformers' only one
_MEDIUM = ("++vision.options.embed_dim=768", "vision.options.depth=12", "++vision.options.num_heads=12")
_TINY = (
    "++vision.options.embed_dim=96",
    "vision.options.depth=2",
    "++vision.options.num_heads=3",
    "vision.image_size=56",
    "qformer.sizes.num_hidden_layers=2",
)


def transformers_model(model: BLIP2) -> Blip2ForImageTextRetrieval:
    """transformers' class with the weights of `model`, and what its constructor computes."""
    written = retrieval_model(model)  # to be saved: such buffers are empty there
    found = Blip2ForImageTextRetrieval(written.config)
    found.load_state_dict(written.state_dict(), assign=True)
    return found.eval()


class Pairs:
    """transformers' class, asked one pair of image and caption at a time.

    Args:
        model: whose weights it has.
        task: the pairs are those of its images and captions.
        encoded: encode each image once, before, and leave that time out.
    """

    def __init__(self, model: BLIP2, task: Task, *, encoded: bool) -> None:
        self.own, self.task, self.model = model, task, transformers_model(model)
        self.read = read_pixels(model.vision.image_size)
        self.mean, self.std = (
            torch.as_tensor(values).view(3, 1, 1) for values in (model.vision.mean, model.vision.std)
        )
        if encoded:
            numbers = range(len(task.samples))
            self.model.vision_model = _Encoded(self.model.vision_model, [self.pixels(number) for number in numbers])

    def pixels(self, image: int) -> Tensor:
        """What the class's processor gives for a picture (1, 3, H, W)."""
        sample = self.task.samples[image]
        return (self.read(sample.shard, sample.row).float() - self.mean) / self.std

    def logits(self, image: int, captions: Sequence[int]) -> list[float]:
        """Of these captions, one after the other."""
        return [self.logit(image, caption) for caption in captions]

    @torch.inference_mode()
    def logit(self, image: int, caption: int) -> float:
        """The matching head's logit of a match."""
        sees = torch.tensor([[image]]) if isinstance(self.model.vision_model, _Encoded) else self.pixels(image)
        ids, mask = self.own.tokenize([self.task.vocabulary[caption]], max_tokens=self.task.protocol.max_text_tokens)
        found = self.model(pixel_values=sees, input_ids=ids, attention_mask=mask, use_image_text_matching_head=True)
        return float(found.logits_per_image[0, 1])


class _Encoded(nn.Module):
    """In the place of the vision model: its outputs by an image's number."""

    @torch.inference_mode()
    def __init__(self, vision: nn.Module, pixels: Sequence[Tensor]) -> None:
        super().__init__()
        self.states = [vision(pixel_values=image).last_hidden_state for image in pixels]

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=self.states[int(pixel_values)])


def build(parts: Sequence[str]) -> BLIP2:
    """The model with random weights, always the same ones."""
    config = compose_config("train", TrainConfig, [*_PARTS, *parts, _EPS])
    torch.manual_seed(0)
    vision = vision_encoder(config.vision)
    qformer = qformer_of_sizes(config.qformer, vision_width=vision.width, reads_and_writes=True)
    tokenizer = made_up_tokenizer(["[PAD]", "[CLS]", "[SEP]", "[DEC]"], around="[CLS] $A [SEP]")
    norm = nn.LayerNorm(vision.width, eps=config.vision.norm_eps)
    return BLIP2(vision=vision, vision_norm=norm, qformer=qformer, tokenizer=tokenizer).eval()


def make_pictures(shards: Path, images: int, side: int) -> Task:
    """Pictures of noise with captions of noise, as a prepared split."""
    card, draw = load_card(CARD), random.Random(0)
    assert card.evaluation is not None
    folder = shards / card.source / card.evaluation.split
    noise = torch.randint(
        0, 256, (images, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    with ShardWriter.open(shard_path(folder, 0)) as writer:
        for number, pixels in enumerate(noise):
            content = io.BytesIO()
            Image.fromarray(pixels.numpy()).save(content, "png")
            captions = tuple(
                " ".join(f"w{draw.randrange(WORDS)}" for _ in range(draw.randint(*CAPTION_WORDS)))
                for _ in range(CAPTIONS)
            )
            record = Record(str(number), card.evaluation.kinds[0], captions=captions)
            writer.add(f"image_{number:04d}", {"png": content.getvalue()}, str(number), [record])
    path = shard_path(folder, 0)
    manifest = {
        "format": MANIFEST_FORMAT,
        "dataset": card.source,
        "split": folder.name,
        "records_by_kind": {card.evaluation.kinds[0]: images},
        "shards": [{"name": path.name, "sha256": sha256_file(path)}],
    }
    write_json(folder / "manifest.json", manifest)
    return make_task(card, shards)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that `work` takes, and what it gives."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def cosines(model: BLIP2, task: Task, image: int, captions: Sequence[int]) -> Tensor:
    """Of an image with these captions, which stand in its scores beside the matching head's logits."""
    pixels = read_pixels(model.vision.image_size)(task.samples[image].shard, task.samples[image].row)
    texts = [task.vocabulary[number] for number in captions]
    return model.match(pixels.expand(len(texts), *pixels.shape), texts, head="itc")


def measure(model: BLIP2, task: Task, few: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a pair of the three ways, round by round.

    Raises:
        RuntimeError: they do not give the same scores.
    """
    read, pairs = read_pixels(model.vision.image_size), len(task.samples) * len(task.vocabulary)
    if pairs > task.protocol.rerank * len(task.samples):
        raise RuntimeError(f"{len(task.vocabulary)} captions are not all re-ranked")
    plain, encoded = Pairs(model, task, encoded=False), Pairs(model, task, encoded=True)
    ways = {"transformers": plain, "transformers, images encoded before": encoded}
    seconds: dict[str, list[float]] = {name: [] for name in (*ways, OURS)}
    for _ in range(rounds):
        took, found = timed(lambda: run_task(model, task, read, batch_size=BATCH, show_progress=False))
        seconds[OURS].append(took / pairs)
        first = found.predictions[0]
        best = first.ranked[:few]
        for name, way in ways.items():
            took, logits = timed(partial(way.logits, 0, best))
            seconds[name].append(took / len(best))
            expected = torch.tensor(first.scores[:few]) - cosines(model, task, 0, best)
            if (apart := float((torch.tensor(logits) - expected).abs().max())) > BOUND:
                raise RuntimeError(f"{name} gives other scores, by {apart:.2g}")
    return seconds


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--published", action="store_true", help="EVA-CLIP-g")
    size.add_argument("--tiny", action="store_true", help="tiny parts, 2 images, one round, for a try")
    parser.add_argument("--images", type=int, default=8, help=f"with {CAPTIONS} captions each")
    parser.add_argument("--few", type=int, default=4, help="pairs that are matched one at a time, 10 at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.tiny:
        arguments.images, arguments.rounds = 2, 1
    model = build(() if arguments.published else _TINY if arguments.tiny else _MEDIUM)
    with tempfile.TemporaryDirectory() as folder:
        task = make_pictures(Path(folder), arguments.images, model.vision.image_size)
        seconds = measure(model, task, arguments.few, arguments.rounds)
    table = Table(title="Pairs matched, one process", title_justify="left")
    for heading in ("way", "pairs/s", "times faster", "min-max"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for name, values in seconds.items():
        ratios = [before / after for before, after in zip(seconds["transformers"], values, strict=True)]
        row = (f"{1 / statistics.median(values):.2f}", f"{statistics.median(ratios):.1f}")
        table.add_row(name, *row, f"{min(ratios):.1f}-{max(ratios):.1f}")
    console, captions = Console(width=120), len(task.vocabulary)
    console.print(table)
    console.print(
        f"{arguments.images} images, {captions} captions, all {arguments.images * captions} pairs, batches of {BATCH}; "
        f"one at a time {arguments.few} pairs, of the same scores.",
        highlight=False,
    )
    console.print(provenance(f"{arguments.threads} threads"), highlight=False)


if __name__ == "__main__":
    main()
