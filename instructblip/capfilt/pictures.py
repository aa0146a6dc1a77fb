"""Web pictures in prepared shards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from instructblip.capfilt.foreign import ForeignSplit, ForeignTar, foreign_split
from instructblip.capfilt.texts import web_texts
from instructblip.data.shards import MANIFEST_NAME, PreparedSplit, ShardReader, open_split
from instructblip.errors import DamagedSample, UserError
from instructblip.images import FITS, decode_image

Fit = tuple[str, int]  # how a picture is shown to a model: name in `FITS`, size


@dataclass(frozen=True)
class Part:
    """A shard of web pictures: the `place`-th of its split, the `number`-th of all; `first` pictures stand before it."""

    number: int
    split: PreparedSplit | ForeignSplit
    place: int
    first: int

    @property
    def reader(self) -> ShardReader | ForeignTar:
        """Of the shard."""
        return self.split.shards[self.place]

    def picture(self, row: int) -> str:
        """What a picture is called, whatever shard it stands in: its captions are drawn by that."""
        return f"{self.split.dataset}/{self.split.split}/{self.reader.keys[row]}"


def parts_of(splits: Sequence[PreparedSplit | ForeignSplit]) -> list[Part]:
    """The shards of all splits, in order; no index is opened for it."""
    parts: list[Part] = []
    first = 0
    for split in splits:
        for place, entry in enumerate(split.manifest["shards"]):
            parts.append(Part(len(parts), split, place, first))
            first += entry.get("images", 0)
    return parts


def web_splits(folder: Path, split: str) -> Sequence[PreparedSplit | ForeignSplit]:
    """The prepared splits of a name below a folder, in the order of their paths; or the tars of a card that is a file.

    Raises:
        UserError: there is none, or two of one dataset; or as `foreign_split`.
    """
    if folder.suffix in (".yaml", ".yml"):
        return [foreign_split(str(folder), split)]
    if not folder.is_dir():
        raise UserError(f"shards={folder} is no folder; give one that prepare.py wrote to")
    found = [open_split(manifest.parent) for manifest in sorted(folder.rglob(MANIFEST_NAME))]
    wanted = [opened for opened in found if opened.split == split]
    if not wanted:
        others = ", ".join(sorted({opened.split for opened in found}))
        way_out = f"it has {others}: set split=" if others else "prepare web pictures first (prepare.py)"
        raise UserError(f"shards={folder} has no prepared split {split}; {way_out}")
    places: dict[str, Path] = {}
    for opened in wanted:
        # Pictures are told apart by dataset and key: in captions, and in what is trained on them.
        if (other := places.setdefault(opened.dataset, opened.folder)) != opened.folder:
            raise UserError(
                f"{other} and {opened.folder} are both {opened.dataset}/{split}; give shards= that hold one of them"
            )
    return wanted


class Seen(NamedTuple):
    """A picture as the models see it: pixels (3, H, W) by how they were fitted, and the web's texts."""

    name: str
    web: list[str]
    pixels: Mapping[Fit, Tensor]


def look(part: Part, fits: set[Fit], row: int) -> Seen:
    """Read a picture.

    Raises:
        DamagedSample: it or its records cannot be read.
    """
    frames, records = part.reader.read(row)
    where = f"{part.reader.keys[row]} of {part.reader.path}"
    if len(frames) != 1:
        raise DamagedSample(f"{where} has {len(frames)} frames, and a caption is of one picture")
    image = decode_image(frames[0], where)
    return Seen(part.picture(row), web_texts(records), {fit: FITS[fit[0]](image, fit[1]) for fit in fits})
