"""What is made, and where each of its files lies."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instructblip.capfilt.pictures import Part
from instructblip.capfilt.settings import Settings
from instructblip.data.cards import TRAIN_SPLIT
from instructblip.data.shards import MANIFEST_NAME
from instructblip.distributed import Ranks
from instructblip.errors import UserError
from instructblip.evaluation.journal import Journal
from instructblip.files import errors_for_users, read_json, write_json

DATASET = "web_capfilt"
REPORT, CAPTIONS = "report.json", "captions.json"
_WORK, _PLAN = ".work", "plan.json"


@dataclass(frozen=True)
class Job:
    """What is made where.

    Attributes:
        out: the folder of the results.
        settings: see there.
        plan: all that decides what is written, as JSON values.
        names: of the models.
        tolerance: pictures of a shard that may be damaged.
    """

    out: Path
    settings: Settings
    plan: Mapping[str, Any]
    names: Mapping[str, str]
    tolerance: int

    @property
    def split(self) -> Path:
        """The folder of the shards."""
        return self.out / DATASET / TRAIN_SPLIT

    @property
    def work(self) -> Path:
        """The folder of what is not finished."""
        return self.out / _WORK

    def done(self, part: Part) -> Path:
        """The file that says what a finished shard holds."""
        return self.work / f"{part.number:06d}.json"

    def journal(self, part: Part) -> Path:
        """The folder of an unfinished shard's journal."""
        return self.work / f"{part.number:06d}"

    def keys(self, part: Part) -> list[str]:
        """The journal's, of a shard's pictures."""
        plan = json.dumps(self.plan, sort_keys=True)
        names = (f"{plan}\n{part.picture(row)}" for row in range(len(part.reader)))
        return [hashlib.sha256(name.encode()).hexdigest()[:32] for name in names]

    def is_finished(self) -> bool:
        """Whether all is written."""
        return (self.out / REPORT).is_file()

    def check_whole(self) -> None:
        """Refuse a finished folder of which something is gone: nothing would be written.

        Raises:
            UserError: names the first missing file.
        """
        manifest = self.split / MANIFEST_NAME
        for file in (manifest, self.out / CAPTIONS):
            self._check_there(file)
        for shard in read_json(manifest)["shards"]:
            self._check_there(self.split / shard["name"])

    def _check_there(self, file: Path) -> None:
        if not file.is_file():
            raise UserError(f"{self.out} is finished, and {file} is gone; put it back, or delete {self.out}")

    def clear_up(self) -> None:
        """Remove what is not needed once all is written, and what a killed run left."""
        with errors_for_users(self.out):
            for path in self.out.glob("*.partial"):
                path.unlink(missing_ok=True)
            shutil.rmtree(self.work, ignore_errors=True)

    def claim(self, ranks: Ranks) -> None:
        """Say what is made here, before anything is: the first rank does, the others wait for it.

        Raises:
            UserError: as `refuse_other`; the first rank is lost.
        """
        if not ranks.is_first:
            # A shard of theirs would be taken for another's by a first rank that looks later.
            Journal(self.work, (), ranks).wait_until_none(lambda: _held_plan(self.out) is None, "plans")
        if not refuse_other(self.out, self.plan):
            write_json(self.work / _PLAN, self.plan)


def refuse_other(out: Path, plan: Mapping[str, Any]) -> bool:
    """Refuse a folder in which something else is, or was begun; return whether this was.

    Args:
        out: the folder of the results.
        plan: what decides them, or a part of it.

    Raises:
        UserError: names what differs.
    """
    way_out, split = f"give another out=, or delete {out}", out / DATASET / TRAIN_SPLIT
    held = _held_plan(out)
    if held is None and split.exists():
        raise UserError(f"{split} was not made by capfilt, and would be overwritten; {way_out}")
    changed = [] if held is None else [name for name in plan if name not in held or held[name] != plan[name]]
    if changed:
        raise UserError(f"{out} holds captions of another {' and '.join(changed)}; {way_out}")
    return held is not None


def _held_plan(out: Path) -> dict[str, Any] | None:
    """That of finished or begun results; None where there are none."""
    if (out / REPORT).is_file():
        report = read_json(out / REPORT)
        plan = report.get("plan") if isinstance(report, dict) else None
        if not isinstance(plan, dict):
            raise UserError(f"{out / REPORT} is no report of capfilt, and would be overwritten; give another out=")
        return plan
    begun = out / _WORK / _PLAN
    if not begun.is_file():
        return None
    found: dict[str, Any] = read_json(begun)
    return found
