"""Small file helpers: whole files or none, hashes, JSON."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from safetensors import SafetensorError

from instructblip.errors import UserError

_CHUNK_BYTES = 1 << 20
_SHA256 = re.compile("[0-9a-f]{64}")


def shipped(folder: str) -> Path:
    """Where `configs` or `datasets` lies: inside the package once it is installed (setup.py), at the top of a checkout."""
    package = Path(__file__).parent
    installed = package / folder
    return installed if installed.is_dir() else package.parent / folder


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to; on success it takes its place, on any error it is removed.

    Raises:
        UserError: the disk is full, the folder may not be written, or a file stands where a folder should.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with errors_for_users(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):  # where it could not be written, the error above says why
            partial.unlink()


@contextlib.contextmanager
def atomic_folder(folder: Path, *, overwrite_if: str | None = None) -> Iterator[Path]:
    """Give an empty folder beside `folder` to fill; on success it takes its place, on any error it is removed.

    Args:
        folder: must not exist yet, or be empty.
        overwrite_if: a folder that holds a file of this name may be replaced, once the new one is whole.

    Raises:
        UserError: something else stands there, or as `atomic_path`.
    """
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        if overwrite_if is None:
            raise UserError(f"{folder} exists already; choose another folder, or ask for it to be overwritten")
        if not (folder / overwrite_if).is_file():
            raise UserError(f"{folder} has no {overwrite_if}, so it is not replaced; choose another folder")
    try:
        with errors_for_users(folder):
            partial.mkdir(parents=True)
            yield partial
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def exclusive(path: Path, doing: str, *, show: bool = True, busy: str | None = None) -> Iterator[None]:
    """Let one process at a time do something; the others wait and say what for. Who ends, however, lets go.

    Args:
        path: the lock file; it stays, empty.
        doing: `fetching vicuna_7b`, for the line that is shown while waiting.
        show: whether to show it.
        busy: what is wrong when another process has it, where that is not to be waited for.

    Raises:
        UserError: the lock file cannot be written; `busy`.
    """
    with errors_for_users(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if busy is not None:
                raise UserError(busy) from None
            with Console().status(f"waiting for another process that is {doing}") if show else contextlib.nullcontext():
                lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def errors_for_users(path: Path) -> Iterator[None]:
    """Say in one line why `path`, or something below it, could not be written.

    Raises:
        UserError: no space, no right to, something else in the way, or no such place can be.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if is_disk_full(error):
            raise UserError(f"disk full while writing {path}; free some space and run the same command again") from None
        if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"no permission to write {path}; choose another folder or mend its rights") from None
        if isinstance(error, NotADirectoryError | FileExistsError):
            place = Path(os.fsdecode(error.filename))
            taken = next((parent for parent in (place, *place.parents) if parent.is_file()), place)
            raise UserError(f"{path} cannot be written: {taken} is not a folder; choose another") from None
        if isinstance(error, IsADirectoryError):
            place = error.filename2 or error.filename
            raise UserError(f"{path} cannot be written: {place} is a folder; choose another name") from None
        if isinstance(error, OSError) and _is_no_place(error, path):
            raise UserError(f"{path} cannot be written ({error.strerror}); choose another place") from None
        raise


def _is_no_place(error: OSError, path: Path) -> bool:
    """Whether nothing can be written there: a name too long, links in a circle, or a folder that cannot be made.

    That a file is missing may be said of any other that was to be read, too.
    """
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return True
    place = Path(os.fsdecode(error.filename or ""))
    return isinstance(error, FileNotFoundError) and (place in path.parents or str(place).startswith(str(path)))


def is_disk_full(error: Exception) -> bool:
    """Whether writing failed for want of space or quota; safetensors says so in the text of its own error only."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a whole file, or leave what was there."""
    data = content.encode() if isinstance(content, str) else content
    with atomic_path(path) as partial, open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, so that equal values give equal bytes."""
    write_atomically(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a UTF-8 JSON file.

    Raises:
        UserError: missing, not UTF-8, cut short, or nested absurdly deep; names the file.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); fetch it again") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not whole JSON (line {error.lineno}: {error.msg}); fetch it again") from None
    except (RecursionError, ValueError) as error:  # brackets by the thousand, a number of thousands of digits
        raise UserError(f"{path} is no sound JSON ({error}); fetch it again") from None


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_digits(text: str) -> str:
    """A stated SHA-256, in lower case. What is none could be a path, where hashes name files.

    Raises:
        ValueError: not 64 hexadecimal digits.
    """
    if not isinstance(text, str) or not _SHA256.fullmatch(text.lower()):
        raise ValueError("give the 64 hexadecimal digits of a SHA-256")
    return text.lower()
