"""Tables on the hub: which files of a dataset are a split's, asked for and found as the hub's own client does."""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from instructblip.data.cards import load_card
from instructblip.data.prepare.convert import prepare_dataset
from instructblip.errors import UserError
from instructblip.fetch.hub_datasets import hub_files
from tests.kit.own_tables import own_card, write_parquet
from tests.kit.raw_files import write_images


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the hub: `snapshot_download` copies what its patterns match, as the real one does."""
    import huggingface_hub

    def download(repository: str, *, repo_type: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert repo_type == "dataset"
        source, target = tmp_path / "hub" / repository / (revision or "main"), tmp_path / "snapshot"
        for path in source.rglob("*.*"):
            name = path.relative_to(source).as_posix()
            if any(fnmatchcase(name, pattern) for pattern in allow_patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (target / name).write_bytes(path.read_bytes())
        target.mkdir(exist_ok=True)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return tmp_path / "hub"


def _names(place: str, split: str = "train") -> list[str]:
    return [path.as_posix().partition("snapshot/")[2] for path in hub_files(place, split)]


def _publish(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_the_files_of_a_split_have_its_name_as_a_word(hub: Path) -> None:
    _publish(
        hub / "someone/photos/main",
        "data/train-00001-of-00002.parquet",
        "data/train-00000-of-00002.parquet",
        "data/train_extra-00000-of-00001.parquet",
        "data/test-00000-of-00001.parquet",
        "data/constrained.parquet",
        "photos.py",
        "train.py",
        "README.md",
    )
    assert _names("someone/photos") == ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
    assert _names("someone/photos", "train_extra") == ["data/train_extra-00000-of-00001.parquet"]
    assert _names("someone/photos/data/t*-00000-of-00001.parquet") == [
        "data/test-00000-of-00001.parquet",
        "data/train_extra-00000-of-00001.parquet",
    ]
    with pytest.raises(
        UserError, match=r"hf://datasets/someone/photos has no tables .* with the split's name val in theirs"
    ):
        _names("someone/photos", "val")
    with pytest.raises(UserError, match=r"someone/photos/data/a\.parquet has no such file; name them"):
        _names("someone/photos/data/a.parquet")


def test_one_of_several_configurations_is_named_by_its_folder(hub: Path) -> None:
    _publish(hub / "someone/many/v2", "ai2d/train-00000.parquet", "chartqa/train/0000.parquet")
    with pytest.raises(UserError, match="has tables of split train in ai2d, chartqa/train; name one of these folders"):
        _names("someone/many@v2")
    assert _names("someone/many@v2/chartqa") == ["chartqa/train/0000.parquet"]


@pytest.mark.parametrize("place", ["photos", "some one/photos", "someone/photos@a/b c"])
def test_what_is_no_dataset_of_the_hub_is_one_line(place: str) -> None:
    with pytest.raises(UserError, match=r"is no dataset of the hub; write hf://datasets/OWNER/NAME"):
        hub_files(place, "train")


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError, match=r"hf://datasets/a/b cannot be fetched \(Hugging Face hub: no answer for a/b"):
        hub_files("a/b", "train")


@pytest.mark.slow
def test_a_dataset_of_the_hub_is_prepared_without_raw_files(hub: Path, tmp_path: Path) -> None:
    write_images(tmp_path, "a.png")
    rows: list[dict[str, Any]] = [
        {"image": {"bytes": (tmp_path / "a.png").read_bytes()}, "question": "q", "answer": "a"}
    ]
    (hub / "someone/photos/main/data").mkdir(parents=True)
    write_parquet(hub / "someone/photos/main/data/train-00000-of-00001.parquet", rows)
    own_card(tmp_path, {"train": {"records": "hf://datasets/someone/photos"}})
    (path,) = prepare_dataset(load_card(tmp_path / "mine.yaml"), tmp_path, tmp_path / "out", progress=False)
    assert '"records": 1' in path.read_text()
