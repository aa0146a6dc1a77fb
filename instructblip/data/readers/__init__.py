"""One function per raw format, found by the name a card gives: each module of this package says its own in `READERS`."""

import importlib
import pkgutil

from instructblip.data.readers.base import (
    MEDIA_ROLES,
    OCR_ROLE,
    FileSlice,
    Losses,
    MediaRecords,
    RawSplit,
    Reader,
    is_there,
    unpack_hint,
)

READERS: dict[str, Reader] = {}
for _module in pkgutil.iter_modules(__path__):
    READERS |= getattr(importlib.import_module(f"{__name__}.{_module.name}"), "READERS", {})

__all__ = [
    "MEDIA_ROLES",
    "OCR_ROLE",
    "READERS",
    "FileSlice",
    "Losses",
    "MediaRecords",
    "RawSplit",
    "Reader",
    "is_there",
    "unpack_hint",
]
