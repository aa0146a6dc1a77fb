"""Made-up files of all datasets, small and in the layouts of the official ones, to try a whole run on before a long one.

`data=synthetic` writes and prepares them by themselves. Readers, templates, protocols and metrics meet what they will meet
in the official files; pictures and records are invented, and no score on them means anything.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from instructblip.data.cards import Card, load_card
from instructblip.data.synthetic.captioning import (
    write_coco_caption,
    write_flickr30k,
    write_nocaps,
    write_textcaps,
    write_web_capfilt,
)
from instructblip.data.synthetic.choices import write_hateful_memes, write_iconqa, write_scienceqa_img, write_vsr
from instructblip.data.synthetic.dialogs import (
    write_llava_conversation,
    write_llava_detail,
    write_llava_reasoning,
    write_visdial,
)
from instructblip.data.synthetic.questions import (
    write_aokvqa,
    write_gqa,
    write_ocr_vqa,
    write_okvqa,
    write_textvqa,
    write_vizwiz,
    write_vqav2,
)
from instructblip.data.synthetic.scenes import Scene, make_scenes
from instructblip.data.synthetic.videos import write_ivqa, write_msrvtt_qa, write_msvd_qa
from instructblip.errors import UserError

Writer = Callable[[Path, Mapping[str, Sequence[Scene]]], None]

# Dataset -> writes its raw folder, given the scenes of each split of its card.
WRITERS: dict[str, Writer] = {
    "aokvqa": write_aokvqa,
    "coco_caption": write_coco_caption,
    "flickr30k": write_flickr30k,
    "gqa": write_gqa,
    "hateful_memes": write_hateful_memes,
    "iconqa": write_iconqa,
    "ivqa": write_ivqa,
    "llava_conversation": write_llava_conversation,
    "llava_detail": write_llava_detail,
    "llava_reasoning": write_llava_reasoning,
    "msrvtt_qa": write_msrvtt_qa,
    "msvd_qa": write_msvd_qa,
    "nocaps": write_nocaps,
    "ocr_vqa": write_ocr_vqa,
    "okvqa": write_okvqa,
    "scienceqa_img": write_scienceqa_img,
    "textcaps": write_textcaps,
    "textvqa": write_textvqa,
    "visdial": write_visdial,
    "vizwiz": write_vizwiz,
    "vqav2": write_vqav2,
    "vsr": write_vsr,
    "web_capfilt": write_web_capfilt,
}
MADE_UP = "made up by instructblip.data.synthetic; no official file, and no score on it means anything"
NOTE = " (made-up data: scores mean nothing)"  # for titles of results
SCENES = 4  # pictures or clips a split
_NUMBERS_OF_A_SPLIT = 100
_NUMBERS_OF_A_DATASET = 1000


def write_synthetic(card: Card, raw: Path, scenes: int = SCENES) -> None:
    """Write the made-up raw folder of a dataset, all its splits; one that is there is whole and stays.

    Args:
        scenes: pictures or clips a split.

    Raises:
        UserError: the dataset has no made-up files.
    """
    if card.source not in WRITERS:
        raise UserError(f"{card.source} has no made-up files; leave out data=synthetic, or choose other datasets")
    if raw.is_dir():
        return
    first = _NUMBERS_OF_A_DATASET * list(WRITERS).index(card.source) + 1
    numbered = enumerate(load_card(card.source).splits)
    splits = {split: make_scenes(first + row * _NUMBERS_OF_A_SPLIT, scenes) for row, split in numbered}
    work = raw.with_name(f"{raw.name}.partial")
    shutil.rmtree(work, ignore_errors=True)  # left by a killed process
    work.mkdir(parents=True)
    WRITERS[card.source](work, splits)
    os.replace(work, raw)


def is_made_up(manifest: Mapping[str, Any]) -> bool:
    """Whether a prepared split, by its manifest, holds made-up data."""
    return manifest.get("licence") == MADE_UP


def synthetic_card(card: Card) -> Card:
    """The card of the made-up files: no counts to expect, and a source that says what they are."""
    splits = {
        name: replace(counts, images=None, records=None, records_by_kind={}) for name, counts in card.splits.items()
    }
    return replace(card, splits=splits, homepage=MADE_UP, licence=MADE_UP, how_to_get=MADE_UP)
