"""Have the prepared shards of some datasets in place: fetch and convert what is missing and may be fetched."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from instructblip.config import entry
from instructblip.config.schema import DataConfig, PrepareConfig, SourcesConfig
from instructblip.data.cards import Card, OwnCard, load_card, load_cards
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


@dataclass(frozen=True)
class Needed:
    """A dataset, or a view of one, and the splits of it that are read; `streamed`: without their indexes."""

    card: Card
    splits: frozenset[str]
    streamed: bool = False


@dataclass(frozen=True)
class FoundShards:
    """Where the prepared splits lie, and those that do not.

    Attributes:
        folder: to open them from, wherever data.shards is.
        place: as data.shards has it.
        missing: what of the needed is not there, by the name of its card; and why, where there is more to say: it could not
            be fetched, or the card has no such split.
    """

    folder: Path
    place: str
    missing: dict[str, tuple[Needed, str]]

    def refusal(self, *names: str, hint: str = "") -> UserError:
        """What to do about the missing ones: all of them, or those of some cards.

        Args:
            names: of the cards; none: all.
            hint: how to go without them.
        """
        lacking = [item for name, item in self.missing.items() if not names or name in names]
        by_source = {needed.card.source: (needed, why) for needed, why in lacking}
        if is_url(self.place):
            found = (
                f"{self.place} has no prepared {_listed(lacking)}; prepare it with prepare.py and copy its folder there"
            )
        elif len(by_source) == 1:
            needed, why = lacking[0]
            found = why or _how_to_prepare(needed, self.place)
        else:
            fetched = [source for source, (needed, _) in by_source.items() if needed.card.fetch]
            found = (
                f"{_listed(lacking)} are not prepared in {self.place}; run python prepare.py dataset=NAME out={self.place} "
                "raw=FOLDER for each, with its files in FOLDER as how_to_get in its card says"
                + (f" (fetch=true downloads those of {', '.join(fetched)})" if fetched else "")
                + "".join(f"; {why}" for _, why in by_source.values() if why)
            )
        return UserError(found + hint)


def find_shards(needed: Sequence[Needed], data: DataConfig, console: Console) -> FoundShards:
    """Look for prepared splits; what may be fetched without asking anybody is fetched and prepared.

    Raises:
        UserError: a place elsewhere that cannot be read; data that cannot be made up.
    """
    cards = [item.card for item in needed]
    if data.synthetic:
        ensure_synthetic(cards, Path(data.shards), console)
        return FoundShards(Path(data.shards), data.shards, {})
    failed: dict[str, str] = {}
    if is_url(data.shards):
        indexed, streamed = (
            {(item.card.source, split) for item in needed if item.streamed == kind for split in _mirrored(item)}
            for kind in (False, True)
        )
        root, found = mirror_datasets(
            data.shards,
            sorted(indexed | streamed),
            cache_folder() / "shards",
            data.remote_cache_bytes,
            streamed - indexed,
        )
    else:
        root, failed = Path(data.shards), ensure_prepared(cards, Path(data.shards), data.sources, console)
        found = {
            (item.card.source, split)
            for item in needed
            for split in item.splits
            if (root / item.card.source / split / MANIFEST_NAME).is_file()
        }
    missing = {}
    for item in needed:
        if lacking := frozenset(split for split in item.splits if (item.card.source, split) not in found):
            why = _no_such_split(item.card, lacking) or failed.get(item.card.source, "")
            missing[item.card.name] = Needed(item.card, lacking), why
    return FoundShards(root, data.shards, missing)


def _mirrored(item: Needed) -> Iterable[str]:
    return item.splits if item.streamed else (*item.card.splits, *item.splits)


def shards_folder(needed: Sequence[Needed], data: DataConfig, console: Console) -> Path:
    """The folder that these splits can be opened from, wherever data.shards is.

    Raises:
        UserError: as `find_shards`; some of them are not prepared, all of which it names.
    """
    found = find_shards(needed, data, console)
    if found.missing:
        raise found.refusal()
    return found.folder


def ensure_prepared(
    cards: Sequence[Card], shards: Path, fetchable: Mapping[str, SourcesConfig], console: Console
) -> dict[str, str]:
    """Prepare every dataset of these cards that may be fetched without asking anybody, and is not prepared yet.

    Args:
        cards: datasets or views.
        shards: folder of prepared datasets.
        fetchable: sources of raw files by part name.
        console: where a line a dataset is printed.

    Returns:
        Dataset -> why it could not be fetched or prepared.
    """
    failed = {}
    for card in {card.source: card for card in cards}.values():
        prepared = all((shards / card.source / split / MANIFEST_NAME).is_file() for split in card.splits)
        if prepared or card.source_part is None or card.source_part not in fetchable:
            continue
        try:
            raw = _fetched(card, fetchable[card.source_part], console)
            console.print(f"preparing {card.source} in {shards / card.source}", highlight=False)
            prepare_dataset(card, raw, shards)
        except UserError as error:
            failed[card.source] = str(error)
    return failed


def _no_such_split(card: Card, splits: Iterable[str]) -> str:
    unknown = [split for split in splits if split not in card.splits]
    return f"{card.source} has no split {unknown[0]}; choose among {', '.join(card.splits)}" if unknown else ""


def _listed(lacking: Iterable[tuple[Needed, str]]) -> str:
    """Each dataset once; with its splits where the card has others."""
    splits: dict[str, set[str]] = {}
    others: dict[str, set[str]] = {}
    for needed, _ in lacking:
        name = needed.card.prepared_as
        splits.setdefault(name, set()).update(needed.splits)
        others.setdefault(name, set(needed.card.splits)).difference_update(needed.splits)
    return ", ".join(f"{name} ({', '.join(sorted(said))})" if others[name] else name for name, said in splits.items())


def _how_to_prepare(needed: Needed, shards: str) -> str:
    card = needed.card
    command = f"python prepare.py dataset={card.prepared_as} out={shards}"
    if isinstance(card, OwnCard):
        how = f"{command}, with raw=FOLDER where its files do not lie beside the card"
    else:
        fetched = f"{command} fetch=true, or " if card.fetch else ""
        how = f"{fetched}{command} raw=FOLDER, with its files in FOLDER: {card.how_to_get.strip()}"
    return f"{_listed([(needed, '')])} is not prepared in {shards}; run {how}"


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
            if isinstance(card, OwnCard):
                raise UserError(
                    f"{card.path} is a card of your own, and only official files have made-up ones in their place; "
                    "leave out data=synthetic, or leave out the card"
                )
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


def _fetched(card: Card, source: SourcesConfig, console: Console) -> Path:
    """The raw files of a dataset that is fetched without asking: the folder that is given, the packaged part, or what the
    card says to download."""
    assert card.source_part is not None
    setting = f"data.sources.{card.source_part}.path"
    if source.path is not None or not card.fetch:
        return part_folder(sources(card.source_part, source), setting=setting)
    raw = RAW_FOLDER / card.source
    try:
        fetch_raw(card, raw, console)
    except UserError as error:
        raise UserError(f"{error}; then set {setting}=FOLDER") from None
    return raw


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
    named = load_cards([*config.cards, *([] if config.dataset is None else [config.dataset])])
    chosen = None if config.dataset is None else named[-1]
    own = list({card.name: card for card in named if isinstance(card, OwnCard)}.values())
    if config.check is not None:
        return _check(Path(config.check), chosen, config.split, console)
    if config.show is not None:
        path = write_samples(
            Path(config.show),
            samples=config.samples,
            seed=config.seed,
            image_size=config.image_size or SHOWN_SIZE,
            dataset=None if chosen is None else chosen.name,
            split=config.split,
            own=own,
        )
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
        return 0
    if config.audit is not None:
        return _audit([Path(folder) for folder in config.audit], own, console)
    if chosen is None:
        raise UserError(
            "name a dataset: python prepare.py dataset=NAME raw=FOLDER out=SHARDS; or give check=SHARDS, show= or audit="
        )
    return _convert(chosen, config, console)


def _check(folder: Path, card: Card | None, split: str | None, console: Console) -> int:
    problems = check_prepared(folder, card, split)
    for line in problems:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"{folder}: {len(problems)} problems" if problems else f"{folder}: all shards are whole")
    return int(bool(problems))


def _audit(folders: Sequence[Path], own: Sequence[Card], console: Console) -> int:
    result = audit_prepared(folders, own=own)
    if result.overlaps:
        console.print(audit_table(result))
    for line in result.summary():
        console.print(line, highlight=False, soft_wrap=True)
    return int(bool(result.leaks()))


def _convert(card: Card, config: PrepareConfig, console: Console) -> int:
    if isinstance(card, OwnCard) and card.is_of_official:
        card = load_card(card.source)
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
    if config.fetch and (card.fetch or card.source_part is None):
        raw = RAW_FOLDER / card.source if config.raw is None else Path(config.raw).expanduser()
        fetch_raw(card, raw, console, splits=[] if config.split is None else [config.split])
        return raw
    if config.raw is not None:
        return Path(config.raw).expanduser()
    if card.source_part in config.sources:
        return _fetched(card, config.sources[card.source_part], console)
    if isinstance(card, OwnCard) and card.view_of is None:
        return Path(card.path).expanduser().parent
    raise UserError(_how_to_prepare(Needed(card, frozenset(card.splits)), config.out))
