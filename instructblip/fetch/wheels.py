"""Fetch wheels of the Python registry that carry weights and data: alone, checked against their hash, never installed."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.parser import BytesHeaderParser
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from rich.progress import Progress, TaskID

from instructblip.errors import UserError
from instructblip.fetch.archives import check_zip_member
from instructblip.files import sha256_file
from instructblip.progress import bytes_bar

_MAX_UNPACKED_BYTES = 4 << 30
_SLACK_BYTES = 1 << 20  # that pip's own files may have
_MAX_TEXT_BYTES = 1 << 20  # of a licence
_POLL_SECONDS = 0.2
_NO_CONNECTION = ("NewConnectionError", "ConnectTimeout", "ReadTimeout", "NameResolution", "ProxyError", "SSLError")


class UnreachableError(Exception):
    """A source could not be reached; the message is a short reason, and another source may be tried."""


@dataclass(frozen=True)
class WheelSource:
    """A wheel, pinned.

    Attributes:
        project, version: as in `pip download project==version`.
        sha256: of the wheel file, in hexadecimal.
        files: member of the wheel -> file name in the part's folder. A member that ends in "/" means every file below
            it, hidden ones such as .DS_Store left out; its value is the folder they go to ("": the part's folder).
        bytes: size of the wheel file, for the progress bar; None shows a bar without an end.
    """

    project: str
    version: str
    sha256: str
    files: dict[str, str]
    bytes: int | None = None

    @property
    def file_pattern(self) -> str:
        """Glob pattern of the wheel's file name, whatever its platform tag."""
        return f"{self.project.replace('-', '_')}-{self.version}-*.whl"


def find_wheel(wheel: WheelSource, folder: Path) -> Path | None:
    """The wheel's file in `folder`, verified, or None.

    Raises:
        UserError: a file of that name has another SHA-256.
    """
    for path in sorted(folder.glob(wheel.file_pattern)):
        _verify(path, wheel)
        return path
    return None


def download_wheel(wheel: WheelSource, folder: Path, *, progress: bool) -> Path:
    """Fetch the wheel into `folder` with the user's own pip configuration, and verify it.

    Raises:
        UnreachableError: pip did not get it, with pip's reason.
        UserError: the registry's file has another SHA-256.
        OSError: disk full.
    """
    temporary, target = folder / "temporary", folder / "download"
    temporary.mkdir()
    target.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    # No second copy in pip's cache; few retries, so that a missing network is reported in seconds.
    command += ["--no-cache-dir", "--disable-pip-version-check", "--progress-bar", "off", "--retries", "2"]
    command += ["--dest", str(target), f"{wheel.project}=={wheel.version}"]
    log = folder / "pip.log"
    with bytes_bar(f"fetching {wheel.project} {wheel.version}", wheel.bytes, show=progress) as (bar, task):
        # pip tells nothing of its progress to a pipe (before 24.1), but its temporary file can be seen growing.
        with open(log, "wb") as output:
            environment = {**os.environ, "TMPDIR": str(temporary)}
            status = _run(command, environment, output, partial(_show_size, wheel, folder, bar, task))
        if status != 0:
            _raise_reason(log.read_text(errors="replace"), status)
    found = find_wheel(wheel, target)
    if found is None:
        raise UnreachableError(f"pip fetched no file {wheel.file_pattern}")
    return found


def unpack_wheel(archive: Path, files: Mapping[str, str], folder: Path) -> None:
    """Write the named members of a wheel below `folder`, and nothing else.

    Raises:
        UserError: a member is missing, is no regular file, points out of `folder`, or the whole is too large.
    """
    with zipfile.ZipFile(archive) as wheel:
        wanted = _wanted_members(wheel, archive.name, files)
        unpacked_bytes = sum(member.file_size for _, member in wanted)
        if unpacked_bytes > _MAX_UNPACKED_BYTES:
            raise UserError(f"{archive.name} would unpack to {unpacked_bytes} bytes, allowed are {_MAX_UNPACKED_BYTES}")
        for name, member in wanted:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with wheel.open(member) as source, open(path, "xb") as target:
                shutil.copyfileobj(source, target, 1 << 20)


def wheel_licence(archive: Path) -> dict[str, str]:
    """What the wheel says of its licence: `licence` (name, where given) and `licence_text` (where packed)."""
    with zipfile.ZipFile(archive) as wheel:
        names = [PurePosixPath(name) for name in wheel.namelist() if ".dist-info/" in name]
        found = {}
        for name in names:
            if name.name == "METADATA":
                headers = BytesHeaderParser().parsebytes(_beginning(wheel, str(name)))
                found["licence"] = _licence_name(headers.items())
            elif name.name.upper().startswith(("LICENSE", "LICENCE")):
                found["licence_text"] = _beginning(wheel, str(name)).decode(errors="replace")
    return {key: value for key, value in found.items() if value}


def _beginning(wheel: zipfile.ZipFile, name: str) -> bytes:
    with wheel.open(name) as member:
        return member.read(_MAX_TEXT_BYTES)


def _licence_name(headers: list[tuple[str, str]]) -> str:
    for wanted in ("License-Expression", "License"):
        for key, value in headers:
            if key == wanted and value != "UNKNOWN":
                return value
    classifiers = [value for key, value in headers if key == "Classifier" and value.startswith("License ::")]
    return classifiers[0].split(" :: ")[-1] if classifiers else ""


def _verify(path: Path, wheel: WheelSource) -> None:
    found = sha256_file(path)
    if found != wheel.sha256:
        raise UserError(f"{path} has sha256 {found}, expected {wheel.sha256}; delete it and fetch it again")


def _wanted_members(
    wheel: zipfile.ZipFile, archive: str, files: Mapping[str, str]
) -> list[tuple[str, zipfile.ZipInfo]]:
    """Pairs of (name below the part's folder, member), every one checked."""
    wanted: dict[str, zipfile.ZipInfo] = {}
    for name, target in files.items():
        if name.endswith("/"):
            members = [m for m in wheel.infolist() if m.filename.startswith(name) and not m.is_dir()]
        else:
            members = [m for m in wheel.infolist() if m.filename == name]
        if not members:
            raise UserError(f"{archive} has no member {name}; correct the part's list of files")
        for member in members:
            path = str(PurePosixPath(target) / member.filename[len(name) :]) if name.endswith("/") else target
            check_zip_member(archive, member, path)
            if name.endswith("/") and any(part.startswith(".") for part in PurePosixPath(path).parts):
                continue
            if path in wanted:
                raise UserError(f"{archive}: two members would be written to {path}; correct the part's list of files")
            wanted[path] = member
    return list(wanted.items())


def _run(command: list[str], environment: dict[str, str], output: BinaryIO, tick: Callable[[], None]) -> int:
    """Run a command to its end, calling `tick` meanwhile; stop it when this process is interrupted."""
    process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        while True:
            try:
                return process.wait(_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                tick()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _raise_reason(log: str, status: int) -> None:
    if "No space left on device" in log:
        raise OSError(28, "No space left on device")
    if "No module named pip" in log:
        raise UnreachableError("this Python has no pip")
    if any(sign in log for sign in _NO_CONNECTION):
        raise UnreachableError("no connection to the package registry")
    errors = [line.removeprefix("ERROR: ") for line in log.splitlines() if line.startswith("ERROR: ")]
    raise UnreachableError(errors[-1] if errors else f"pip ended with status {status}")


def _show_size(wheel: WheelSource, folder: Path, bar: Progress, task: TaskID) -> None:
    """Show how much has come.

    Raises:
        UserError: more than the wheel has, so that the rest need not be waited for.
    """
    size, limit = _largest_file(folder), _MAX_UNPACKED_BYTES if wheel.bytes is None else wheel.bytes
    if size > limit:
        raise UserError(
            f"the registry's file {wheel.file_pattern} has more than the {limit:,} bytes that were expected"
        )
    bar.update(task, completed=size)


def _largest_file(folder: Path) -> int:
    """Size in bytes of the largest file below `folder`: pip's download, first in its temporary place."""
    sizes = [0]
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.stat(os.path.join(root, name)).st_size)
            except FileNotFoundError:
                continue  # pip has just moved it
    return max(sizes)
