"""`prepare.py show=`: a page of random samples of prepared splits as the model will see them."""

import base64
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from instructblip.data.card_evaluation import STATEMENT, Evaluation, finished_prompt
from instructblip.data.cards import TRAIN_SPLIT, Card, OwnCard, all_cards, check_prepared_from, settled
from instructblip.data.mixture import position_generator
from instructblip.data.prepare.audit import GIVE_CARDS
from instructblip.data.records import Record
from instructblip.data.shards import MANIFEST_NAME, PreparedSplit, open_split
from instructblip.data.templates import render_training
from instructblip.errors import UserError
from instructblip.files import write_atomically
from instructblip.html import page_environment
from instructblip.images import decode_image, resize_square

logger = logging.getLogger(__name__)

_TEMPLATE = "show.html.jinja"
_JPEG_QUALITY = 90  # for looking at


@dataclass(frozen=True)
class ShownSample:
    """One sample of the page: `pictures` are data URIs of its frames, `target` None where there is no public answer.

    `file` is the picture's name in its source, empty where the record is named after it.
    """

    id: str
    file: str
    pictures: tuple[str, ...]
    size: str
    instruction: str
    target: str | None
    note: str


@dataclass(frozen=True)
class ShownSplit:
    """One card's samples of one split, what they are drawn from, and of a card of one's own what it settles.

    `lost` says what of the source could not be kept, a line for each reason. `card` has (key, value, where that comes
    from); it is empty for an official card, which says all of it itself.
    """

    title: str
    about: str
    samples: tuple[ShownSample, ...]
    lost: tuple[str, ...] = ()
    card: tuple[tuple[str, str, str], ...] = ()


def write_samples(
    folder: Path,
    *,
    samples: int,
    seed: int,
    image_size: int,
    dataset: str | None = None,
    split: str | None = None,
    own: Sequence[Card] = (),
) -> Path:
    """Write `<folder>/samples.html` about the prepared splits below a folder and return its path.

    Training splits are shown as training renders them, others as evaluation asks them; each card of a dataset (its views
    too) has its own part.

    Args:
        samples: how many of each card and split, drawn at random.
        seed: decides which, and the templates.
        image_size: side of the square that the model gets, pixels.
        dataset: show this card only.
        split: show this split only.
        own: cards that are known besides the official ones.

    Raises:
        UserError: nothing prepared there, or nothing of that dataset or split; a damaged shard or image.
    """
    if samples < 1 or image_size < 1:
        raise UserError(f"samples={samples} and image_size={image_size} must be 1 or more")
    splits = [open_split(manifest.parent) for manifest in sorted(folder.rglob(MANIFEST_NAME))]
    known = [*all_cards(), *own]
    cards = [card for card in known if dataset in (None, card.name)]
    parts = [
        _show_split(opened, card, samples, seed, image_size)
        for opened in splits
        for card in cards
        if card.source == opened.dataset and split in (None, opened.split)
    ]
    shown = [part for part in parts if part is not None]
    unknown = sorted({opened.dataset for opened in splits} - {card.source for card in known})
    if not shown:
        what = " and ".join(text for text in (dataset, split) if text) or "any dataset"
        way_out = "give the folder that prepare.py wrote to"
        if unknown:
            way_out = f"no card of {', '.join(unknown)} is known: {GIVE_CARDS}"
        raise UserError(f"no prepared samples of {what} below {folder}; {way_out}")
    if unknown and dataset is None:
        logger.warning("not shown, for no card of it is known: %s; %s", ", ".join(unknown), GIVE_CARDS)
    page = page_environment(Path(__file__).parent).get_template(_TEMPLATE)
    path = folder / "samples.html"
    write_atomically(path, page.render(folder=str(folder), parts=shown, seed=seed, image_size=image_size))
    return path


def _show_split(opened: PreparedSplit, card: Card, samples: int, seed: int, image_size: int) -> ShownSplit | None:
    """None where the split has no records of the card's kinds, or the card neither trains nor evaluates on it."""
    rules = card.evaluation
    training = card.templates is not None and opened.split == TRAIN_SPLIT
    if not training and rules is None:
        return None
    check_prepared_from(card, opened.manifest)
    wanted = card.kinds if training or rules is None else rules.kinds or card.kinds
    present = opened.manifest["records_by_kind"]
    kinds = [kind for kind in present if not wanted or kind in wanted]
    if not kinds:
        return None
    locations = opened.records(kinds)
    chosen = np.sort(np.random.default_rng(seed).permutation(len(locations))[:samples])
    shown = []
    for number, (shard, row, place) in enumerate(locations[chosen].tolist()):
        frames, records = opened.read(shard, row)
        image_id = opened.shards[shard].image_id(row)
        where = f"{opened.shards[shard].keys[row]} of {opened.shards[shard].path}"
        pictures, size = _pictures(frames, where, image_size)
        record = records[place]
        if training or rules is None:
            texts = _as_trained(record, card, position_generator(seed, number))
        else:
            texts = _as_evaluated(record, rules)
        file = "" if record.id.startswith(image_id) else image_id
        shown.append(ShownSample(f"{card.name}/{record.id}", file, pictures, size, *texts))
    use = f"templates {card.template_set().name}" if training else "evaluation prompt"
    about = (
        f"{len(shown)} of {len(locations):,} records ({', '.join(kinds)}), {opened.manifest['images']:,} images; {use}"
    )
    lost = _lost(opened.manifest.get("lost", []))
    return ShownSplit(f"{card.name}, {opened.split}", about, tuple(shown), lost, _card_rows(card))


def _lost(losses: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    return tuple(
        f"{loss['records']:,} x {loss['reason']}: {'; '.join(loss['examples'])}"
        + ("; ..." if loss["count"] > len(loss["examples"]) else "")
        for loss in losses
    )


def _card_rows(card: Card) -> tuple[tuple[str, str, str], ...]:
    if not isinstance(card, OwnCard):
        return ()
    default = "default" if card.task is None else f"default of task {card.task}"
    return tuple(
        (key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), "card" if said else default)
        for key, value, said in settled(card)
    )


def _as_trained(record: Record, card: Card, random: np.random.Generator) -> tuple[str, str | None, str]:
    """Instruction, target and note."""
    try:
        instruction, target, template = render_training(record, card.template_set(), random)
    except ValueError as error:
        return record.question or "", None, str(error)
    return instruction, target, f"template {template}"


def _as_evaluated(record: Record, rules: Evaluation) -> tuple[str, str | None, str]:
    """Instruction, target and note."""
    try:
        instruction = finished_prompt(replace(rules, prompt=STATEMENT) if rules.mode == "match" else rules, record)
    except ValueError as error:
        return record.question or "", None, str(error)
    answers: Sequence[Any] = record.captions or record.answers
    if record.label is not None and record.choices:
        answers = [record.choices[record.label]]
    elif not answers and record.label is not None:
        answers = [f"class {record.label}"]
    note = f"{rules.mode}, {rules.metric}"
    if rules.candidates_from == "choices":
        note += f"; {len(record.choices)} choices"
    return instruction, " | ".join(map(str, answers)) or None, note


def _pictures(frames: Sequence[bytes], where: str, image_size: int) -> tuple[tuple[str, ...], str]:
    """The frames as the model gets them, as data URIs, and their size before."""
    images = [decode_image(frame, where) for frame in frames]
    uris = []
    for image in images:
        buffer = io.BytesIO()
        pixels = resize_square(image, image_size).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=_JPEG_QUALITY)
        uris.append(f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}")
    size = f"{images[0].width} x {images[0].height}" + (f", {len(images)} frames" if len(images) > 1 else "")
    return tuple(uris), size
