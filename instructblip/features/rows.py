"""The work of `python -m instructblip.features`: rows of features, written as they come."""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from rich.console import Console
from torch import Tensor

from instructblip.config.schema import FeaturesConfig
from instructblip.errors import DamagedSample, UserError
from instructblip.files import atomic_path, errors_for_users
from instructblip.images import fit_frames
from instructblip.models.pairs import PairModel
from instructblip.progress import progress_bar
from instructblip.weights.load import find_source, load_model

_PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"})
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # as safetensors calls them


def features(config: FeaturesConfig, console: Console) -> None:
    """Write the features. Memory holds a batch: rows go to the disk as they come.

    Raises:
        UserError: nothing to read, too many damaged pictures, a model without features, a full disk.
    """
    if config.images is None and config.texts is None:
        raise UserError("images= and texts= are both missing; give a folder of pictures, a file of texts, or both")
    folder = Path(config.images or ".").expanduser()
    paths = [] if config.images is None else find_pictures(folder)
    texts = [] if config.texts is None else read_lines(Path(config.texts).expanduser())
    source = find_source(config.checkpoint)
    if "retrieve" not in source.skills:
        raise UserError(
            f"{config.checkpoint} has no features to give; take a checkpoint of BLIP-2's first stage or of BLIP's retrieval"
        )
    model = load_model(
        source, vision_path=config.vision_path, qformer_path=config.qformer_path, device=config.device
    ).model
    assert isinstance(model, PairModel)
    out = Path(config.out).expanduser()
    kept: list[str] = []
    failed: list[str] = []
    with FeatureFile(out) as file, progress_bar("rows") as progress:
        bar = progress.add_task("encoding", total=len(paths) + len(texts))
        for start in range(0, len(paths), config.batch_size):
            batch = paths[start : start + config.batch_size]
            read = {
                path: pixels for path in batch if (pixels := _read(folder / path, model, config, failed)) is not None
            }
            kept += read
            file.append(_image_rows(model, list(read.values())))
            progress.advance(bar, len(batch))
        for start in range(0, len(texts), config.batch_size):
            lines = texts[start : start + config.batch_size]
            file.append(_text_rows(model, lines))
            progress.advance(bar, len(lines))
        file.finish({"images": json.dumps(kept), "texts": json.dumps(texts)})
    for line in failed:
        console.print(f"left out: {line}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"wrote {out} ({len(kept):,} pictures, {len(texts):,} texts)", highlight=False, soft_wrap=True)


def find_pictures(folder: Path) -> list[str]:
    """Paths of the pictures in a folder and its subfolders, relative to it, sorted.

    Raises:
        UserError: no folder, or none in it.
    """
    if not folder.is_dir():
        raise UserError(f"images={folder} is no folder; give one with pictures in it")
    found = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in _PICTURES and path.is_file()
    )
    if not found:
        raise UserError(f"images={folder} has no pictures in it ({', '.join(sorted(_PICTURES))}); give another folder")
    return found


def read_lines(path: Path) -> list[str]:
    """The lines of a file of texts, blank ones left out.

    Raises:
        UserError: it cannot be read, is no UTF-8, or has none.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"texts={path} cannot be read as UTF-8 text ({error}); give a file with one text a line"
        ) from None
    if not any(lines):
        raise UserError(f"texts={path} has no text in it; give a file with one text a line")
    return [line for line in lines if line]


def _read(path: Path, model: PairModel, config: FeaturesConfig, failed: list[str]) -> Tensor | None:
    """The pixels of a picture; None where it is damaged and that is tolerated.

    Raises:
        UserError: more are damaged than `tolerance` allows.
    """
    try:
        return fit_frames([path.read_bytes()], str(path), "resize_square", model.vision.image_size)
    except (DamagedSample, OSError) as error:
        failed.append(str(error))
    if len(failed) > config.tolerance:
        raise UserError(f"{failed[-1]}; mend or remove it, or give tolerance={len(failed)} to leave such pictures out")
    return None


@torch.inference_mode()
def _image_rows(model: PairModel, pixels: Sequence[Tensor]) -> dict[str, Tensor]:
    if not pixels:
        return {}
    found = model.features(torch.stack(list(pixels)))
    assert found.image is not None
    assert found.image_projected is not None
    return {"image": found.image, "image_projected": found.image_projected}


@torch.inference_mode()
def _text_rows(model: PairModel, texts: Sequence[str]) -> dict[str, Tensor]:
    found = model.features(texts=list(texts)).text_projected
    assert found is not None
    return {"text_projected": found}


class FeatureFile:
    """A safetensors file whose tensors grow by rows; it takes its place when it is finished, and not before.

    The format wants the sizes at the beginning, so each tensor's rows are collected in a file of its own first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[str, tuple[BinaryIO, list[int], str]] = {}  # file, shape, type

    def __enter__(self) -> "FeatureFile":
        with errors_for_users(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._work = tempfile.TemporaryDirectory(dir=self.path.parent, prefix=f".{self.path.name}.")
        return self

    def __exit__(self, *details: object) -> None:
        for file, _, _ in self._rows.values():
            file.close()
        self._work.cleanup()

    def append(self, rows: Mapping[str, Tensor]) -> None:
        """Add rows to tensors by name; all rows of a tensor have one shape and type.

        Raises:
            UserError: a full disk.
        """
        with errors_for_users(self.path):
            for name, tensor in rows.items():
                if name not in self._rows:
                    opened = open(Path(self._work.name) / name, "w+b")
                    self._rows[name] = (opened, [0, *tensor.shape[1:]], _DTYPES[tensor.dtype])
                kept, shape = self._rows[name][:2]
                kept.write(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
                shape[0] += len(tensor)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Put the tensors together.

        Raises:
            UserError: a full disk.
        """
        with atomic_path(self.path) as partial, open(partial, "wb") as out:
            out.write(self._header(metadata))
            for file, _, _ in self._rows.values():
                file.seek(0)
                shutil.copyfileobj(file, out, 1 << 20)

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        """The length of the JSON header, and it: names, types, shapes and offsets, padded to a multiple of 8 bytes."""
        described: dict[str, object] = {"__metadata__": dict(metadata)}
        start = 0
        for name, (file, shape, dtype) in self._rows.items():
            end = start + file.tell()
            described[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
            start = end
        text = json.dumps(described).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text
