"""The official files of a dataset, downloaded where its card says that anybody may."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from rich.console import Console

from instructblip.data.cards import Card, Download
from instructblip.errors import UserError
from instructblip.fetch.archives import ArchiveError, unpack
from instructblip.fetch.download import Wanted, download
from instructblip.fetch.streams import DownloadError
from instructblip.files import exclusive, write_json
from instructblip.progress import bytes_bar

WORK_FOLDER = ".fetch"  # below the raw folder: archives, half downloaded or half unpacked


def fetch_raw(card: Card, raw: Path, console: Console, *, splits: Sequence[str] = ()) -> None:
    """Download the official files of a dataset to `raw`, and unpack those that are archives.

    What is there already is left as it is, whoever put it there; what an earlier call began is gone on with. An archive
    is deleted once it is unpacked.

    Args:
        splits: whose files; empty: those of all.

    Raises:
        UserError: the card says why its files are not fetched; a file cannot be had, or is not the expected one (both name
            the way to get it by hand); an archive that is not to be trusted; disk full.
    """
    if not card.fetch:
        raise UserError(f"{card.source} is not fetched: {card.not_fetched}; get it yourself: {card.how_to_get}")
    if unknown := [split for split in splits if split not in card.splits]:
        raise UserError(f"{card.source} has no split {unknown[0]!r}; choose among {', '.join(card.splits)}")
    console.print(f"{card.source}: licence {card.licence}; {card.homepage}", highlight=False, soft_wrap=True)
    with exclusive(raw / WORK_FOLDER / "lock", f"fetching {card.source}"):
        for item in card.fetch:
            if not splits or not item.splits or set(splits) & set(item.splits):
                try:
                    _fetch(item, raw, console)
                except DownloadError as error:
                    raise UserError(f"{error}; or get it yourself: {card.how_to_get}") from None


def _fetch(item: Download, raw: Path, console: Console) -> None:
    work = raw / WORK_FOLDER / sha256(item.url.encode()).hexdigest()[:8]  # several datasets may share a raw folder
    begun = work / "begun.json"
    if all((raw / place).exists() for place in item.gives) and not begun.is_file():
        console.print(f"{', '.join(item.gives)}: there already", highlight=False, soft_wrap=True)
        return
    if item.unpack is None:
        download(Wanted(item.url, size=item.bytes, sha256=item.sha256), raw / item.gives[0])
    else:
        archive = work / PurePosixPath(urlsplit(item.url).path).name
        if not archive.is_file():
            download(Wanted(item.url, size=item.bytes, sha256=item.sha256), archive)
        write_json(begun, asdict(item))  # what the archive gives may be there and not be whole until this is gone
        _unpack(item, archive, raw)
        shutil.rmtree(work)
    console.print(f"fetched {', '.join(item.gives)}", highlight=False, soft_wrap=True)


def _unpack(item: Download, archive: Path, raw: Path) -> None:
    assert item.unpack is not None
    try:
        with bytes_bar(f"unpacking {archive.name}", None) as (bar, task):
            folder = raw / item.unpack
            unpack(
                archive,
                folder,
                members=item.members,
                flat=item.flat,
                below=item.below,
                advance=lambda done: bar.advance(task, done),
            )
        if missing := [place for place in item.gives if not (raw / place).exists()]:
            raise ArchiveError(f"{archive.name} holds no {missing[0]}: it was changed at its source")
    except ArchiveError as error:
        archive.unlink()  # the next call fetches it anew
        raise DownloadError(f"{error} (from {item.url})") from None
