"""What holds for every test: one thread, no network service, and a cache of its own instead of the user's."""

import os
from collections.abc import Iterator

import pytest

# Before the first import of torch, for this process and for those that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

import instructblip  # noqa: F401  before timm and transformers, see instructblip/_torchvision.py

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INSTRUCTBLIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
