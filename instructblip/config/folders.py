"""Compose by Hydra from files of `configs/` and of a folder beside it (`-cd`), and name a file that cannot be."""

import os
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from instructblip.config.validate import group_options, read_yaml
from instructblip.errors import UserError

_FURTHER = "command-line"  # as Hydra calls what -cd adds
_OF_GROUPS = ("*.yaml", "*/*.yaml", "hydra/*/*.yaml")  # a further folder may have much else below it


class _Files(FileConfigSource):
    """A folder's files.

    Attributes:
        behind: folders whose files are not read where this one has some of the same names.
    """

    def __init__(self, provider: str, folder: Path, behind: Sequence[Path]) -> None:
        super().__init__(provider, f"{self.scheme()}://{folder}")
        self.behind = behind

    def load_config(self, config_path: str) -> ConfigResult:
        """A file's settings.

        Raises:
            UserError: it cannot be read, or another one that is meant perhaps would not be.
        """
        name = self._normalize_file_name(config_path)
        path = Path(self.path, name)
        for other in (folder / name for folder in self.behind):
            if os.path.isfile(other) and not _is_copy(other, path):
                raise UserError(f"{other} would not be read, since configs/{name} has its name; give it another name")
        try:
            found = super().load_config(config_path)
        except (OSError, ValueError, YAMLError) as error:
            values = read_yaml(path)  # says what is wrong with most of them
            reason = f"cannot be composed: {error}" if isinstance(values, dict) else _NO_SETTINGS
            raise UserError(f"{path} {reason}") from None
        if not isinstance(found.config, DictConfig):
            raise UserError(f"{path} {_NO_SETTINGS}")
        return found

    def is_group(self, config_path: str) -> bool:
        """Of a further folder only what has files: an `output` beside them is none."""
        found = super().is_group(config_path)
        return found and (self.provider != _FURTHER or not config_path or holds_choices(config_path, Path(self.path)))


_NO_SETTINGS = "must hold keys and values at its top level"


def _is_copy(path: Path, other: Path) -> bool:
    try:
        return path.read_bytes() == other.read_bytes()
    except OSError:
        return False


def holds_choices(group: str, folder: Path) -> bool:
    """Whether a folder has files for a group, or groups of `hydra/`."""
    return group == "hydra" or bool(group_options(group, folder))


def stamp(folders: Sequence[Path]) -> frozenset[tuple[str, int]]:
    """When each file was written."""
    paths = (path for folder in folders for pattern in _OF_GROUPS for path in folder.glob(pattern))
    return frozenset((str(path), path.stat().st_mtime_ns) for path in paths if os.path.isfile(path))


def compose(name: str, overrides: Sequence[str], folders: Sequence[Path], *, with_hydra: bool) -> DictConfig:
    """What Hydra composes of `<name>.yaml` in the first folder; further ones have files that stand beside its.

    Raises:
        UserError: a file cannot be read.
    """
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(folders[0]), version_base="1.3"):
            _look_into(folders)
            return hydra.compose(name, overrides=list(overrides), return_hydra_config=with_hydra)
    finally:
        GlobalHydra.instance().hydra = before


def _look_into(folders: Sequence[Path]) -> None:
    """Give Hydra the folders, in the order in which it looks itself."""
    loader = GlobalHydra.instance().config_loader()
    assert isinstance(loader, ConfigLoaderImpl)
    assert isinstance(loader.repository, ConfigRepository)
    found = loader.get_search_path()
    for folder in folders[1:]:
        found.prepend(_FURTHER, f"file://{folder}", SearchPathQuery(provider="schema"))
    loader.repository.initialize_sources(found)
    behind = {"main": folders[1:], _FURTHER: ()}
    loader.repository.sources = [
        _Files(source.provider, Path(source.path), behind[source.provider]) if source.provider in behind else source
        for source in loader.repository.get_sources()
    ]


def further_folder() -> Path | None:
    """The folder of this command's `-cd`; None without one, and outside of a command."""
    if not HydraConfig.initialized():
        return None
    sources = OmegaConf.to_container(HydraConfig.get().runtime.config_sources)  # a folder `${a}` is no interpolation
    assert isinstance(sources, list)
    return next((Path(source["path"]) for source in sources if source["provider"] == _FURTHER), None)


def further_option() -> list[str]:
    """This command's `-cd`, for a line that starts another by hand; nothing without one."""
    folder = further_folder()
    return [] if folder is None else ["-cd", str(folder)]
