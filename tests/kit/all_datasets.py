"""Hand-made raw folders of all 23 datasets that have files of their own, in their official layout, and their shards."""

import functools
import logging
from pathlib import Path
from typing import Any

from instructblip.data.cards import Card, all_cards, load_card
from instructblip.data.prepare.convert import prepare_dataset
from tests.kit.raw_files import write_raw

# Sources of cards that are not among the paper's 26: the demo's, photos in folders, and those of BLIP-2's pre-training.
OTHERS = ("easy_vqa", "clothing_small", "cc3m", "cc12m", "sbu", "laion", "vg_caption")
# Views that ask one of the 26 in another way.
OTHER_WAYS = (
    "aokvqa_multiple_choice",
    "coco_retrieval",
    "flickr30k_retrieval",
    "coco_caption_blip2",
    "coco_caption_blip",
    "vqav2_blip",
    "okvqa_blip",
    "aokvqa_blip",
    "nocaps_blip",
)
# dataset -> split -> (images, frames, records, records lost)
SOURCES: dict[str, dict[str, tuple[int, int, int, int]]] = {
    "coco_caption": {"train": (2, 2, 3, 0), "val": (1, 1, 3, 0), "test": (1, 1, 1, 0)},
    "web_capfilt": {"train": (2, 2, 4, 3)},
    "textcaps": {"train": (2, 2, 3, 0), "val": (1, 1, 6, 0), "test": (1, 1, 1, 0)},
    "vqav2": {"train": (2, 2, 3, 0), "val": (1, 1, 1, 0), "test-dev": (1, 1, 1, 0), "test": (2, 2, 2, 0)},
    "okvqa": {"train": (1, 1, 1, 0), "val": (1, 1, 1, 0)},
    "aokvqa": {"train": (2, 2, 2, 0), "val": (1, 1, 1, 0), "test": (1, 1, 1, 0)},
    "ocr_vqa": {"train": (2, 2, 4, 0), "val": (1, 1, 2, 0), "test": (1, 1, 2, 0)},
    "llava_conversation": {"train": (2, 2, 5, 0)},
    "llava_detail": {"train": (1, 1, 1, 0)},
    "llava_reasoning": {"train": (1, 1, 1, 0)},
    "nocaps": {"val": (2, 2, 2, 0), "test": (1, 1, 1, 0)},
    "flickr30k": {"train": (1, 1, 5, 5), "val": (1, 1, 1, 0), "test": (1, 1, 1, 0)},
    "gqa": {"testdev": (2, 2, 3, 0), "test": (1, 1, 1, 0)},
    "vsr": {"zeroshot_test": (2, 2, 3, 0), "random_test": (1, 1, 1, 0)},
    "iconqa": {"test": (2, 2, 2, 0)},
    "textvqa": {"val": (2, 2, 3, 0), "test": (1, 1, 1, 0)},
    "visdial": {"train": (2, 2, 2, 0), "val": (1, 1, 3, 0), "test": (1, 1, 1, 0)},
    "hateful_memes": {"dev_seen": (2, 2, 2, 0), "test_unseen": (1, 1, 1, 0)},
    "vizwiz": {"val": (2, 2, 2, 0), "test": (1, 1, 1, 0)},
    "scienceqa_img": {"train": (1, 1, 1, 0), "test": (2, 2, 2, 0)},
    "msvd_qa": {"train": (2, 8, 3, 0), "val": (1, 4, 1, 0), "test": (1, 4, 1, 0)},
    "msrvtt_qa": {"train": (2, 8, 2, 0), "val": (1, 4, 1, 0), "test": (1, 4, 2, 0)},
    "ivqa": {"train": (1, 4, 1, 0), "val": (1, 4, 1, 0), "test": (3, 12, 3, 0)},
}


@functools.cache
def official_cards() -> tuple[Card, ...]:
    """All cards in `datasets/`, read once for the files whose tests go by them."""
    return tuple(all_cards())


def prepare_source(name: str, raw: Path, out: Path, **options: Any) -> list[Path]:
    """Convert all splits of a dataset that `SOURCES` names, one image a shard."""
    options = {"splits": list(SOURCES[name]), "progress": False, "images_per_shard": 1} | options
    return prepare_dataset(load_card(name), raw, out, **options)


def prepare_all(folder: Path) -> None:
    """Write `raw/<dataset>` and `shards/<dataset>/<split>` of all of them."""
    logging.disable(logging.WARNING)  # the counts are those of the real files
    for name in SOURCES:
        write_raw(name, folder / "raw" / name)
        prepare_source(name, folder / "raw" / name, folder / "shards")
    logging.disable(logging.NOTSET)
