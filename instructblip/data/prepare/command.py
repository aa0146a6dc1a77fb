"""Have the prepared shards of some datasets in place: fetch and convert what is missing and may be fetched."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from instructblip.config import entry
from instructblip.config.schema import DataConfig, PrepareConfig, SourcesConfig
from instructblip.data.cards import CARDS_FOLDER, Card, load_card
from instructblip.data.prepare.audit import audit_prepared, audit_table
from instructblip.data.prepare.convert import check_prepared, prepare_dataset
from instructblip.data.prepare.fetch import fetch_raw
from instructblip.data.prepare.show import write_samples
from instructblip.data.shards import MANIFEST_NAME, read_manifest
from instructblip.data.synthetic import is_made_up, synthetic_card, write_synthetic
from instructblip.errors import UserError
from instructblip.fetch.parts import cache_folder, part_folder, sources
from instructblip.fetch.shard_cache import is_url, mirror_datasets
from instructblip.files import exclusive
from instructblip.progress import progress_bar

RAW_FOLDER = Path("data/raw")  # where official files are fetched to when raw= names no other folder
SHOWN_SIZE = 224  # the side of the square that the paper's models get, pixels


def ensure_prepared(
    cards: Sequence[Card], shards: Path, fetchable: Mapping[str, SourcesConfig], console: Console
) -> None:
    """Prepare every dataset of these cards that is not prepared yet.

    Args:
        cards: datasets or views.
        shards: folder of prepared datasets.
        fetchable: sources of raw files by part name.
        console: where a line a dataset is printed.

    Raises:
        UserError: datasets that are not prepared and cannot be fetched, all of them at once; says what prepares them.
    """
    missing = []
    for card in {card.source: card for card in cards}.values():
        prepared = [(shards / card.source / split / MANIFEST_NAME).is_file() for split in card.splits]
        # What nobody but the user can fetch he may have prepared in part; a split that is needed is missed on opening.
        if not (all(prepared) or (any(prepared) and card.source_part is None)):
            missing.append(card)
    asked_for = [card for card in missing if not _may_be_fetched(card, fetchable)]
    if len(asked_for) > 1:
        raise UserError(_how_to_prepare(asked_for, shards))
    for card in sorted(missing, key=lambda card: card not in asked_for):
        raw = raw_folder(card, fetchable, shards)
        console.print(f"preparing {card.source} in {shards / card.source}", highlight=False)
        prepare_dataset(card, raw, shards)


def ensure_synthetic(cards: Sequence[Card], shards: Path, console: Console) -> None:
    """Prepare made-up files of every dataset of these cards that is not prepared yet, and say what they are.

    Args:
        cards: datasets or views.
        shards: folder of prepared datasets, in which `raw/` takes the made-up files.
        console: where a line is printed.

    Raises:
        UserError: a dataset has no made-up files, or is there from its official ones.
    """
    what = f"{shards}: pictures and records are made up; no score on them means anything"
    console.print(what, highlight=False, soft_wrap=True)
    with exclusive(shards / ".synthetic.lock", "making up data"):  # one rank does, for all on its node
        missing = []
        for card in {card.source: card for card in cards}.values():
            folders = [shards / card.source / split for split in card.splits]
            found = [read_manifest(folder) for folder in folders if (folder / MANIFEST_NAME).is_file()]
            if not all(map(is_made_up, found)):
                raise UserError(
                    f"{shards} holds {card.source} from its official files; give made-up ones another data.shards=FOLDER"
                )
            if len(found) < len(folders):
                missing.append(card)
        with progress_bar("datasets", show=bool(missing), console=console) as bar:
            task = bar.add_task("preparing made-up data", total=len(missing))
            for card in missing:
                raw = shards / "raw" / card.source
                write_synthetic(card, raw)
                prepare_dataset(synthetic_card(card), raw, shards, progress=False)
                bar.advance(task)


def shards_folder(cards: Sequence[Card], data: DataConfig, console: Console) -> Path:
    """The folder that the prepared datasets of these cards can be opened from, wherever data.shards is.

    Raises:
        UserError: as `ensure_prepared`; a place elsewhere that cannot be read, or does not have one of them.
    """
    if data.synthetic:
        ensure_synthetic(cards, Path(data.shards), console)
        return Path(data.shards)
    if not is_url(data.shards):
        ensure_prepared(cards, Path(data.shards), data.sources, console)
        return Path(data.shards)
    wanted = {(card.source, split) for card in cards for split in card.splits}
    root, found = mirror_datasets(data.shards, sorted(wanted), cache_folder() / "shards", data.remote_cache_bytes)
    if missing := sorted({card.source for card in cards} - {source for source, _ in found}):
        raise UserError(
            f"{data.shards} has no prepared {', '.join(missing)}; prepare it with prepare.py and copy its folder there"
        )
    return root


def _how_to_prepare(cards: Sequence[Card], shards: Path) -> str:
    """The line about several datasets; `raw_folder` has that about one."""
    names = [card.source for card in cards]
    command = f"python prepare.py dataset=NAME out={shards}"
    line = (
        f"{', '.join(names)} are not prepared in {shards}; run for each {command} raw=FOLDER, with its files in FOLDER"
    )
    if fetched := [card.source for card in cards if card.fetch]:
        line += f", or for {', '.join(fetched)} {command} fetch=true"
    return f"{line}; what the files are, {CARDS_FOLDER}{os.sep}NAME.yaml says"


def _may_be_fetched(card: Card, fetchable: Mapping[str, SourcesConfig]) -> bool:
    return card.source_part is not None and card.source_part in fetchable


def raw_folder(card: Card, fetchable: Mapping[str, SourcesConfig], shards: Path) -> Path:
    """Fetch a card's raw files, when its source may be fetched without asking anybody."""
    if card.source_part is None or not _may_be_fetched(card, fetchable):
        command = f"python prepare.py dataset={card.source} out={shards}"
        fetched = f"{command} fetch=true, or " if card.fetch else ""
        raise UserError(
            f"{card.source} is not prepared in {shards}; run {fetched}{command} raw=FOLDER, "
            f"with its files in FOLDER: {card.how_to_get.strip()}"
        )
    part = card.source_part
    return part_folder(sources(part, fetchable[part]), setting=f"data.sources.{part}.path")


def main() -> None:
    """The command: `prepare.py` and `instructblip-prepare`."""
    entry.main("prepare", PrepareConfig, prepare)


def prepare(config: PrepareConfig, console: Console) -> int:
    """Run prepare.py with a validated configuration: convert a dataset, or check, show or audit what was converted.

    Returns:
        0, or 1 when `check` found problems or `audit` found held-out images in training data.

    Raises:
        UserError: unknown dataset or split, raw files missing or broken, disk full.
    """
    if config.check is not None:
        return _check(Path(config.check), console)
    if config.show is not None:
        path = write_samples(
            Path(config.show),
            samples=config.samples,
            seed=config.seed,
            image_size=config.image_size or SHOWN_SIZE,
            dataset=config.dataset,
            split=config.split,
        )
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
        return 0
    if config.audit is not None:
        return _audit([Path(folder) for folder in config.audit], console)
    return _convert(config, console)


def _check(folder: Path, console: Console) -> int:
    problems = check_prepared(folder)
    for line in problems:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"{folder}: {len(problems)} problems" if problems else f"{folder}: all shards are whole")
    return int(bool(problems))


def _audit(folders: Sequence[Path], console: Console) -> int:
    result = audit_prepared(folders)
    if result.overlaps:
        console.print(audit_table(result))
    for line in result.summary():
        console.print(line, highlight=False, soft_wrap=True)
    return int(bool(result.leaks()))


def _convert(config: PrepareConfig, console: Console) -> int:
    if config.dataset is None:
        raise UserError(
            "name a dataset: python prepare.py dataset=NAME raw=FOLDER out=SHARDS; or give check=SHARDS, show= or audit="
        )
    card = load_card(config.dataset)
    raw = _raw(card, config, console)
    manifests = prepare_dataset(
        card,
        raw,
        Path(config.out),
        splits=None if config.split is None else [config.split],
        workers=config.workers,
        images_per_shard=config.images_per_shard,
        image_size=config.image_size,
        frames=config.frames,
        ocr=config.ocr,
    )
    for path in manifests:
        manifest = read_manifest(path.parent)
        lost = sum(item["records"] for item in manifest["lost"])
        console.print(
            f"wrote {path}: {manifest['images']:,} images, {manifest['records']:,} records, {lost:,} records lost",
            highlight=False,
            soft_wrap=True,
        )
    done = {path.parent.name for path in manifests}
    if config.split is None and (skipped := [split for split in card.splits if split not in done]):
        console.print(f"skipped, as {raw} has no files of them: {', '.join(skipped)}", highlight=False, soft_wrap=True)
    return 0


def _raw(card: Card, config: PrepareConfig, console: Console) -> Path:
    """The folder of the raw files; with `fetch`, what it lacks is downloaded."""
    if not config.fetch or card.source_part is not None:
        return raw_folder(card, config.sources, Path(config.out)) if config.raw is None else Path(config.raw)
    raw = RAW_FOLDER / card.source if config.raw is None else Path(config.raw)
    fetch_raw(card, raw, console, splits=[] if config.split is None else [config.split])
    return raw
