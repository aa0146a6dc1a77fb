"""The feature cache gives what encoding gives, once per image, and never a half-written or foreign file."""

import os
import pickle
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from instructblip.data import feature_cache as features
from instructblip.data.feature_cache import FeatureCache, feature_cache, shard_pixels
from instructblip.data.shards import ShardReader
from instructblip.errors import UserError
from instructblip.images import decode_image, resize_square
from instructblip.models.adapters import Adapter
from tests.kit.tiny import tiny_vision
from tests.unit.test_shards import _write, _write_videos

SIZE = 8
Usage = namedtuple("Usage", "total used free")


class Encoder:
    """Tokens (B, 4, 3) that depend on every pixel, and a count of the images that were encoded."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, images_B3HW: Tensor) -> Tensor:
        self.images += len(images_B3HW)
        pooled_B3HW = torch.nn.functional.adaptive_avg_pool2d(images_B3HW.float(), 2) / 7
        return pooled_B3HW.flatten(2).transpose(1, 2)


@pytest.fixture
def shards(tmp_path: Path) -> list[ShardReader]:
    return [ShardReader(_write(tmp_path / "shards", numbers, k)) for k, numbers in enumerate((range(5), range(5, 8)))]


def _cache(tmp_path: Path, fingerprint: str = "weights", size: int = SIZE) -> FeatureCache:
    return FeatureCache(tmp_path / "features", encoder_fingerprint=fingerprint, image_size=size)


def _direct(shard: ShardReader, row: int) -> Tensor:
    return Encoder()(resize_square(decode_image(shard.read(row)[0][0], "x"), SIZE)[None])


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_the_cache_equals_direct_encoding(tmp_path: Path, shards: list[ShardReader]) -> None:
    cache = _cache(tmp_path)
    cache.fill(shards, Encoder(), "encoding", batch=2)
    for shard in reversed(shards):
        for row in (len(shard) - 1, *range(len(shard))):
            assert torch.equal(cache.tokens(shard, row), _direct(shard, row))


def test_a_video_has_the_tokens_of_its_frames(tmp_path: Path) -> None:
    shard = ShardReader(_write_videos(tmp_path))
    cache = _cache(tmp_path)
    cache.fill([shard], Encoder(), "encoding", batch=4)  # a batch ends within a video
    for row, frames in enumerate((3, 1, 2)):
        tokens, pixels = cache.tokens(shard, row), shard_pixels(shard, row, SIZE)
        assert (tokens.shape, pixels.shape) == ((frames, 4, 3), (frames, 3, SIZE, SIZE))
        assert torch.equal(tokens, Encoder()(pixels))
        expected = [resize_square(decode_image(frame, "x"), SIZE) for frame in shard.read(row)[0]]
        assert torch.equal(pixels, torch.stack(expected))


def test_a_second_fill_does_nothing(tmp_path: Path, shards: list[ShardReader]) -> None:
    first, second = Encoder(), Encoder()
    _cache(tmp_path).fill(shards[:1], first, "encoding")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "features").rglob("*.safetensors")}
    _cache(tmp_path).fill(shards[:1], second, "encoding")
    assert (first.images - 1, second.images) == (5, 0)  # one more image is the probe that tells the size
    assert {path: path.stat().st_mtime_ns for path in before} == before
    _cache(tmp_path).fill(shards, second, "encoding")
    assert second.images - 1 == 3


@pytest.mark.parametrize(("fingerprint", "size"), [("other weights", SIZE), ("weights", SIZE + 1)])
def test_another_encoder_or_size_is_another_folder(
    tmp_path: Path, shards: list[ShardReader], fingerprint: str, size: int
) -> None:
    cache, other = _cache(tmp_path), _cache(tmp_path, fingerprint, size)
    assert cache.folder != other.folder
    assert _cache(tmp_path).folder == cache.folder
    cache.fill(shards[:1], Encoder(), "encoding")
    encoder = Encoder()
    other.fill(shards[:1], encoder, "encoding")
    assert encoder.images - 1 == 5


def test_the_same_weights_computed_with_otherwise_are_another_folder(tmp_path: Path) -> None:
    """As CLIP's in timm's models with its own GELU and with the exact one."""
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def encoder(**options: Any) -> Any:
        return tiny_vision("test_vit", layers=(), grid=None, image_size=32, options=options)

    def folder(vision: Any, alpha: float | None = None) -> Path:
        adapters = {} if alpha is None else {"vision": Adapter(2, alpha, 0.0)}
        model: Any = SimpleNamespace(vision=vision, adapters=adapters)
        return feature_cache(model, tmp_path).folder

    plain = encoder()
    others = [encoder(num_heads=4), encoder(act_layer="quick_gelu"), encoder()]
    for module in others[2].modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 0.1
    for other in others:
        other.load_state_dict(plain.state_dict())
        assert not torch.equal(other(images), plain(images))
    folders = [*map(folder, [plain, *others]), folder(plain, 4.0), folder(plain, 8.0)]
    assert len(set(folders)) == 6
    again = encoder()
    again.load_state_dict(plain.state_dict())
    assert folder(again.train().eval().requires_grad_(False)) == folders[0]


def test_a_shard_with_other_bytes_is_another_file(tmp_path: Path, shards: list[ShardReader]) -> None:
    changed = ShardReader(_write(tmp_path / "changed", range(1, 6)))
    cache = _cache(tmp_path)
    cache.fill([shards[0], changed], Encoder(), "encoding")
    assert len(_files(cache.folder)) == 2
    assert torch.equal(cache.tokens(changed, 0), _direct(changed, 0))


def test_too_little_space_is_said_before_anything_is_encoded(
    tmp_path: Path, shards: list[ShardReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1000, 700, 8 * 4 * 3 * 4 - 1))
    encoder = Encoder()
    with pytest.raises(UserError) as error:
        _cache(tmp_path).fill(shards, encoder, "encoding")
    for word in ("features need", "features", "free", "INSTRUCTBLIP_CACHE", "data.cache_features=false"):
        assert word in str(error.value)
    assert encoder.images == 1  # the probe
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1000, 700, 8 * 4 * 3 * 4))
    _cache(tmp_path).fill(shards, encoder, "encoding")


def test_a_fill_that_fails_leaves_nothing_half_written(
    tmp_path: Path, shards: list[ShardReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = _cache(tmp_path)

    def full_disk(tensors: dict[str, Tensor], path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(features, "save_file", full_disk)
        with pytest.raises(UserError, match=r"disk full while writing .*features.*free some space"):
            cache.fill(shards, Encoder(), "encoding")
    assert _files(cache.folder) == []
    cache.fill(shards, Encoder(), "encoding")
    assert len(_files(cache.folder)) == 2


@pytest.mark.parametrize("damage", ["partial", "cut", "empty", "fewer images"])
def test_a_half_written_file_is_not_taken(tmp_path: Path, shards: list[ShardReader], damage: str) -> None:
    cache = _cache(tmp_path)
    cache.fill(shards[:1], Encoder(), "encoding")
    (path,) = cache.folder.iterdir()
    if damage == "partial":
        path.rename(path.with_name(f"{path.name}.{os.getpid() + 1}.partial"))
    elif damage == "cut":
        os.truncate(path, path.stat().st_size - 8)
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        save_file({"tokens": load_file(path)["tokens"][:-1].contiguous()}, path)
    encoder, fresh = Encoder(), _cache(tmp_path)
    fresh.fill(shards[:1], encoder, "encoding")
    assert encoder.images - 1 == 5
    assert all(torch.equal(fresh.tokens(shards[0], row), _direct(shards[0], row)) for row in range(5))


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def test_no_flipped_bit_becomes_a_feature(tmp_path: Path, shards: list[ShardReader]) -> None:
    """Anywhere in the file: what is read is what was encoded, or it is refused, and made anew the next time."""
    cache = _cache(tmp_path)
    cache.fill(shards[:1], Encoder(), "encoding")
    (path,) = cache.folder.iterdir()
    whole = path.read_bytes()
    expected = [_direct(shards[0], row) for row in range(5)]
    refused = []
    for place in range(0, len(whole), 3):
        path.write_bytes(whole)
        _flip(path, place)
        fresh = _cache(tmp_path)
        try:
            assert all(torch.equal(fresh.tokens(shards[0], row), expected[row]) for row in range(5))
        except UserError as error:
            refused.append((str(error), path.exists()))
    line = f"{path} was damaged, and is removed; run the same command again (train.py with resume=auto), which encodes "
    assert set(refused) == {(line + "those images anew", False)}
    assert len(refused) > 0.8 * len(whole) / 3  # what else the header says of a file is not read
    encoder, fresh = Encoder(), _cache(tmp_path)
    path.unlink(missing_ok=True)
    fresh.fill(shards[:1], encoder, "encoding")
    assert encoder.images - 1 == 5
    assert all(torch.equal(fresh.tokens(shards[0], row), expected[row]) for row in range(5))


@pytest.mark.parametrize("place", [-1, -8, -200])
def test_damage_in_the_midst_of_a_run_is_found_and_made_anew(
    tmp_path: Path, shards: list[ShardReader], place: int
) -> None:
    cache = _cache(tmp_path)
    cache.fill(shards[:1], Encoder(), "encoding")
    assert torch.equal(cache.tokens(shards[0], 0), _direct(shards[0], 0))
    (path,) = cache.folder.iterdir()
    _flip(path, place)
    with pytest.raises(UserError, match="was damaged, and is removed"):
        for row in range(5):
            assert torch.equal(cache.tokens(shards[0], row), _direct(shards[0], row))
        _cache(tmp_path).tokens(shards[0], 4)  # the checksums of an open file were read before
    encoder, fresh = Encoder(), _cache(tmp_path)
    fresh.fill(shards[:1], encoder, "encoding")
    assert encoder.images - 1 == 5
    assert all(torch.equal(fresh.tokens(shards[0], row), _direct(shards[0], row)) for row in range(5))


@pytest.mark.parametrize("how", ["cut", "emptied", "deleted"])
def test_a_file_that_goes_while_it_is_read_is_one_line(tmp_path: Path, shards: list[ShardReader], how: str) -> None:
    """From a memory map the signal SIGBUS would end the process."""
    cache = _cache(tmp_path)
    cache.fill(shards[:1], Encoder(), "encoding")
    cache.tokens(shards[0], 0)
    (path,) = cache.folder.iterdir()
    if how == "deleted":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2 if how == "cut" else 0)
    with pytest.raises(UserError, match=r"safetensors (was damaged|cannot be read)"):
        cache.tokens(shards[0], 4)


def test_what_was_kept_without_checksums_is_made_anew(tmp_path: Path, shards: list[ShardReader]) -> None:
    cache = _cache(tmp_path)
    cache.fill(shards[:1], Encoder(), "encoding")
    (path,) = cache.folder.iterdir()
    save_file({"tokens": load_file(path)["tokens"]}, path)
    encoder = Encoder()
    _cache(tmp_path).fill(shards[:1], encoder, "encoding")
    assert encoder.images - 1 == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_features_keep_their_precision(tmp_path: Path, shards: list[ShardReader], dtype: torch.dtype) -> None:
    cache = _cache(tmp_path)
    cache.fill(shards, lambda images: Encoder()(images).to(dtype), "encoding")
    found = cache.tokens(shards[1], 2)
    assert found.dtype == dtype
    assert torch.equal(found, _direct(shards[1], 2).to(dtype))


def test_an_opened_cache_goes_to_another_process(tmp_path: Path, shards: list[ShardReader]) -> None:
    cache = _cache(tmp_path)
    cache.fill(shards, Encoder(), "encoding")
    cache.tokens(shards[0], 0)
    read, shard = pickle.loads(pickle.dumps((cache.tokens, shards[1])))
    assert torch.equal(read(shard, 1), _direct(shards[1], 1))


def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path, range(3))
    shard = ShardReader(path)
    content = bytearray(path.read_bytes())
    start = int(shard.arrays["frame_offset"][1])
    content[start : start + 8] = bytes(8)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"image image_1 of .*shard-000000\.tar cannot be decoded"):
        _cache(tmp_path).fill([shard], Encoder(), "encoding")
