"""Which files are known to have which hash, so that a start looks at each file's size and time, and reads none again."""

import contextlib
from pathlib import Path
from typing import Any

from instructblip.errors import UserError
from instructblip.files import read_json, sha256_file, write_json


class Stamps:
    """What was seen of the files of one folder; to be saved after looking.

    A file whose size and time of change are those of its stamp has the stamped hash. Any other is read.

    Args:
        path: where the stamps are kept. Damaged or missing stamps cost a reading of the files, nothing else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Any] = {}
        if path.is_file():
            with contextlib.suppress(UserError):
                known = read_json(path)
                self._known = known if isinstance(known, dict) else {}
        self._changed = False

    def has(self, file: Path, name: str, sha256: str) -> bool:
        """Whether a file, known here by `name`, is there and has this hash."""
        try:
            state = file.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        stamp = [sha256, state.st_size, state.st_mtime_ns]
        if self._known.get(name) == stamp:
            return True
        if not file.is_file() or sha256_file(file) != sha256:
            return False
        self._known[name] = stamp
        self._changed = True
        return True

    def save(self) -> None:
        """Keep what was seen, where that may be written."""
        if self._changed:
            with contextlib.suppress(UserError):
                write_json(self._path, self._known)
