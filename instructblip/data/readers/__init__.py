"""One function per raw format, found by the name a card gives."""

from instructblip.data.readers.base import Losses, MediaRecords, RawSplit, Reader
from instructblip.data.readers.easy_vqa import read_easy_vqa

READERS: dict[str, Reader] = {
    "easy_vqa": read_easy_vqa,
}

__all__ = ["READERS", "Losses", "MediaRecords", "RawSplit", "Reader"]
