"""Small file helpers: whole files or none, locks, checksums, JSON."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from rich.console import Console
from safetensors import SafetensorError

from instructblip.errors import UserError

CHECKSUM = "checksum"  # the key of `with_checksum`
_CHUNK_BYTES = 1 << 20
_LOCK = ".lock"
# Of a disk that fails, a network file system that lost its server or was mounted anew, and a limit on the size of files.
_FAILING = (
    errno.EIO,
    errno.ESTALE,
    errno.EFBIG,
    errno.ENXIO,
    errno.ENODEV,
    errno.EREMOTEIO,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.ENOLCK,
)
_SHA256 = re.compile("[0-9a-f]{64}")


def shipped(folder: str) -> Path:
    """Where `configs` or `datasets` lies: inside the package once it is installed (setup.py), at the top of a checkout."""
    package = Path(__file__).parent
    installed = package / folder
    return installed if installed.is_dir() else package.parent / folder


@contextlib.contextmanager
def atomic_path(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Give a path beside `path` to write to; on success it takes its place, on any error it is removed.

    Args:
        path: of the file.
        durable: on the disk before it takes its place, and there for good when this ends, whatever the power does. Without,
            a crash of the machine may leave it empty: for many small files that something else vouches for.

    Raises:
        UserError: the disk is full, the folder may not be written, or a file stands where a folder should.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with errors_for_users(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            if durable:
                sync(partial)
            os.replace(partial, path)
            if durable:
                sync(path.parent)
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
            sync_all(partial)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(partial, folder)
            sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """Return when a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():  # some systems have it for files only
            raise
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """`sync` everything below a folder, and the folder."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            sync(path)


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
def claimed_folder(folder: Path, what: str, *, locked: bool = True, setting: str = "name") -> Iterator[None]:
    """Make an output folder, and keep other processes that write there out of it. Who ends, however, lets go.

    Args:
        folder: with a file `.lock` from now on.
        what: is at work there: `run`.
        locked: whether this process takes the lock, for all that belong together.
        setting: by which another folder is given.

    Raises:
        UserError: another one is at work there, or the folder cannot be made or written.
    """
    with errors_for_users(folder):
        folder.mkdir(parents=True, exist_ok=True)
    busy = f"another {what} is writing to {folder}; wait until it has ended, or give another {setting}="
    with exclusive(folder / _LOCK, f"writing to {folder}", busy=busy) if locked else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def errors_for_users(path: Path) -> Iterator[None]:
    """Say in one line why `path`, or something below it, could not be written.

    Raises:
        UserError: no space, no right to, something else in the way, a disk that fails, or no such place can be.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        problem = write_problem(error, path)
        if problem is None:
            raise
        raise UserError(f"{problem.what}; {problem.mend}{' and run the same command again' * problem.passes}") from None


class WriteProblem(NamedTuple):
    """Why something could not be written, how the user mends it, and whether the same command is right afterwards."""

    what: str
    mend: str
    passes: bool = False


def write_problem(error: OSError | SafetensorError, path: Path) -> WriteProblem | None:
    """Why `path`, or something below it, could not be written; None for an error that no user can mend."""
    number = error_number(error)
    if is_disk_full(error):
        return WriteProblem(f"disk full while writing {path}", "free some space", passes=True)
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return WriteProblem(f"no permission to write {path}", "choose another folder or mend its rights")
    if number in _FAILING:
        what = f"{path} cannot be written ({os.strerror(number or 0)})"
        return WriteProblem(what, "look at its disk, its mount and `ulimit -f`", passes=True)
    if isinstance(error, NotADirectoryError | FileExistsError):
        place = Path(os.fsdecode(error.filename))
        taken = next((parent for parent in (place, *place.parents) if parent.is_file()), place)
        return WriteProblem(f"{path} cannot be written: {taken} is not a folder", "choose another")
    if isinstance(error, IsADirectoryError):
        place = error.filename2 or error.filename
        return WriteProblem(f"{path} cannot be written: {place} is a folder", "choose another name")
    if _is_no_place(error, path):
        return WriteProblem(f"{path} cannot be written ({os.strerror(number or 0)})", "choose another place")
    return None


def _is_no_place(error: OSError | SafetensorError, path: Path) -> bool:
    """Whether nothing can be written there: a name too long, links in a circle, or a folder that cannot be made.

    That a file is missing may be said of any other that was to be read, too.
    """
    if isinstance(error, SafetensorError):  # which names no file, and is raised for one that is written
        return error_number(error) == errno.ENOENT
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return True
    place = Path(os.fsdecode(error.filename or ""))
    return isinstance(error, FileNotFoundError) and (place in path.parents or str(place).startswith(str(path)))


def error_number(error: Exception) -> int | None:
    """The system's number of an error; safetensors tells it in the text of its own error only."""
    if isinstance(error, SafetensorError):
        found = re.search(r"\(os error (\d+)\)|\bcode: (\d+)", str(error))
        return int(found[1] or found[2]) if found else None
    return getattr(error, "errno", None)


def is_disk_full(error: Exception) -> bool:
    """Whether writing failed for want of space or quota."""
    return error_number(error) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a whole file, or leave what was there."""
    with atomic_path(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


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


def with_checksum(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values and, under `CHECKSUM`, the beginning of the SHA-256 of them all: 16 digits tell any damage."""
    return {**values, CHECKSUM: _checksum(values)}


def checksum_holds(values: Mapping[str, Any]) -> bool:
    """Whether values are as `with_checksum` wrote them; not where they have none."""
    return values.get(CHECKSUM) == _checksum({key: value for key, value in values.items() if key != CHECKSUM})


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


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
