"""What holds for every test: one thread, no network service, and a cache of its own instead of the user's."""

import gc
import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Before the first import of torch, for this process and for those that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["HF_HUB_OFFLINE"] = "1"
# For processes that are forked from a server, see below.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])

import torch
import yaml

import instructblip  # noqa: F401  before timm and transformers, see instructblip/_torchvision.py

torch.set_num_threads(1)
# OmegaConf derives a loader from this one for each file that Hydra composes; libyaml reads the same eight times as fast.
yaml.SafeLoader = yaml.CSafeLoader  # type: ignore[misc, assignment]
# Processes start in a moment, forked from a server that has imported all of this once; Python 3.11's sees PYTHONPATH only.
multiprocessing.set_forkserver_preload(["tests.kit.preload"])

if TYPE_CHECKING:
    from tests.kit.runs import World


@pytest.hookimpl(tryfirst=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: some tests wait for the disk, or for a bound in seconds."""
    return len(os.sched_getaffinity(0)) + 1


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected stays to the end: looking for garbage in it costs a sixth of the time it takes."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INSTRUCTBLIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> "World":
    """Tiny parts, data and a cache for whole runs; not to be changed by a test."""
    from tests.kit.runs import make_world  # Hydra and all: only for those who need it

    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def caption_world(tmp_path_factory: pytest.TempPathFactory) -> "World":
    """As `world`, for runs of BLIP-2's first stage."""
    from tests.kit.runs import make_caption_world

    return make_caption_world(tmp_path_factory.mktemp("caption_world"))


@pytest.fixture(scope="session")
def blip_world(tmp_path_factory: pytest.TempPathFactory) -> "World":
    """As `world`, for runs of BLIP."""
    from tests.kit.runs import make_blip_world

    return make_blip_world(tmp_path_factory.mktemp("blip_world"))


@pytest.fixture(scope="session")
def untrained_run(world: "World", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run on the tiny world whose model is as it was drawn; not to be changed by a test."""
    from tests.kit.untrained import write_untrained_run

    return write_untrained_run(world, tmp_path_factory.mktemp("untrained") / "run")


@pytest.fixture(scope="session")
def untrained_stage1(world: "World", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of BLIP-2's first stage."""
    from tests.kit.untrained import write_untrained_stage1

    return write_untrained_stage1(world, tmp_path_factory.mktemp("untrained_stage1") / "run")


@pytest.fixture(scope="session")
def all_datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`raw/<dataset>` and `shards/<dataset>/<split>` of all datasets, hand-made; not to be changed by a test."""
    from tests.kit.all_datasets import prepare_all

    folder = tmp_path_factory.mktemp("datasets")
    prepare_all(folder)
    return folder


@pytest.fixture(scope="session")
def finished_run(world: "World", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run on the tiny world that went to its end; not to be changed by a test."""
    from tests.kit.runs import train_here

    return train_here(world, tmp_path_factory.mktemp("finished") / "outputs/train")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 320 KB, where writing more gives the real error; skipped where none may be mounted."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=320k", "tmpfs", str(folder)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("no right to mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
