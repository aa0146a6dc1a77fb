"""Files at addresses that fsspec reads (s3://, gs://, ...) as streams."""

import contextlib
from collections.abc import Iterator
from typing import Any

import fsspec

from instructblip.errors import UserError
from instructblip.fetch.streams import CHUNK_BYTES, BrokenOffError, CannotResumeError, NotThereError, Stream, shown


@contextlib.contextmanager
def open_file(url: str, start: int, validator: str | None) -> Iterator[Stream]:
    """Open a file at byte `start`, if it still has the validator, where one is given.

    Raises:
        NotThereError: it is not there, for certain.
        BrokenOffError: any other error of its file system; each has its own kinds of them.
        UserError: no such kind of address, or a package that it needs is not installed.
    """
    files, place = _file_system(url)
    with _errors(url):
        facts = files.info(place)
        if facts.get("type") == "directory":
            raise FileNotFoundError(place)
        found = str(files.ukey(place))
        if start and validator is not None and found != validator:
            raise CannotResumeError("the file has changed")
        opened = files.open(place, "rb")
    with contextlib.closing(opened):

        def read() -> bytes:
            with _errors(url):
                return bytes(opened.read(CHUNK_BYTES))

        with _errors(url):
            opened.seek(start)
        size = facts.get("size")
        yield Stream(start, size if isinstance(size, int) else None, found, read)


def _file_system(url: str) -> tuple[Any, str]:
    try:
        files, place = fsspec.core.url_to_fs(url)  # anew each time: a file system does not outlive a fork
    except ImportError as error:
        raise UserError(f"{shown(url)} needs a package that is not installed ({error})") from None
    except ValueError as error:
        line = f"{shown(url)} cannot be read ({error}); give a folder, or a URL such as s3://BUCKET/FOLDER"
        raise UserError(line) from None
    return files, place


@contextlib.contextmanager
def _errors(url: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise NotThereError(f"{shown(url)} is not there") from None
    except (BrokenOffError, UserError):
        raise
    except Exception as error:  # each file system raises errors of its own, with no class in common
        raise BrokenOffError(f"{type(error).__name__} {error}".strip()) from None
