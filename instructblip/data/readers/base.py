"""What every reader takes and gives."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from instructblip.data.sample import Record

MAX_EXAMPLES = 5


@dataclass(frozen=True)
class ImageRecords:
    """One image with all records that use it.

    Attributes:
        key: name of the image in the shard, unique within the split: letters, digits, `_` and `-` only (a dot would
            split the sample in a WebDataset tar).
        image_id: the image's id in the source.
        image: file to read, or the encoded bytes themselves. A reader does not open the file: preparation does.
        records: the annotations, in a fixed order.
    """

    key: str
    image_id: str
    image: Path | bytes
    records: list[Record]


@dataclass
class Losses:
    """What could not be kept: counted by reason, with the first few examples of each.

    Attributes:
        reasons: reason -> {"reason", "count" (entries or images lost), "records" (records lost with them), "examples"}.
    """

    reasons: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, reason: str, example: str, records: int = 1) -> None:
        """Count one lost entry or image and the `records` that are lost with it; `example` says which one it was."""
        self.merge([{"reason": reason, "count": 1, "records": records, "examples": [example]}])

    def merge(self, losses: list[dict[str, Any]]) -> None:
        """Add what another `to_list` counted."""
        for loss in losses:
            empty: dict[str, Any] = {"reason": loss["reason"], "count": 0, "records": 0, "examples": []}
            entry = self.reasons.setdefault(loss["reason"], empty)
            entry["count"] += loss["count"]
            entry["records"] += loss["records"]
            entry["examples"] = (entry["examples"] + loss["examples"])[:MAX_EXAMPLES]

    def to_list(self) -> list[dict[str, Any]]:
        """All losses, sorted by reason, as they stand in a manifest."""
        return [self.reasons[reason] for reason in sorted(self.reasons)]


# (raw folder, split, losses) -> images in an order that depends on the raw files alone
Reader = Callable[[Path, str, Losses], Iterator[ImageRecords]]
