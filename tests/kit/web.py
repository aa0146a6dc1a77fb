"""Shards of web pictures with their texts, and `instructblip.capfilt` on them in this process, with tiny models."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from PIL import Image
from rich.console import Console
from tokenizers import processors
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from instructblip.capfilt import command, models
from instructblip.config.schema import CapFiltConfig
from instructblip.data.cards import load_card
from instructblip.data.prepare.convert import prepare_dataset
from instructblip.models.blip2 import BLIP2
from instructblip.weights.load import LoadedModel, Source
from tests.kit.blip2 import tiny_stage1
from tests.kit.mixtures import jpeg
from tests.kit.tiny import BOS, COLORS, EOS, redraw, tiny_llm_tokenizer

SHORT: Mapping[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 2, "batch_size": 4}


class WebPicture(NamedTuple):
    """A picture as a tar of img2dataset has it; no url: its JSON says none."""

    content: bytes
    text: str
    url: str | None = None


def web_pictures(count: int = 11) -> list[WebPicture]:
    """Pictures of coloured blocks; every third has no url."""
    return [
        WebPicture(jpeg(number), f"Web text {number}!", f"http://a.org/{number}.jpg" if number % 3 else None)
        for number in range(count)
    ]


def colour_pictures(texts: Mapping[str, str]) -> list[WebPicture]:
    """A picture all of one colour for each, with its text."""
    return [WebPicture(_plain(COLORS[name]), text, f"http://a.org/{name}") for name, text in texts.items()]


def _plain(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_web(folder: Path, pictures: Sequence[WebPicture], *, images_per_shard: int = 4) -> Path:
    """Write a tar as img2dataset does, and prepare it as cc3m; return the folder of the prepared shards."""
    (folder / "raw").mkdir(parents=True)
    with tarfile.open(folder / "raw/00000.tar", "w") as tar:
        for number, picture in enumerate(pictures):
            facts = {"caption": picture.text, "url": picture.url, "key": f"{number:09d}"}
            kind = "png" if picture.content.startswith(b"\x89PNG") else "jpg"
            for extension, content in (
                (kind, picture.content),
                ("txt", picture.text.encode()),
                ("json", json.dumps(facts).encode()),
            ):
                member = tarfile.TarInfo(f"{number:09d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    prepare_dataset(
        load_card("cc3m"), folder / "raw", folder / "shards", images_per_shard=images_per_shard, progress=False
    )
    return folder / "shards"


@cache
def tiny_captioner() -> BLIP2:
    """Captions and matches by chance."""
    return tiny_stage1(seed=3)


def colour_filter() -> BLIP2:
    """Knows the answers: a text matches a picture of one colour where it names that colour."""
    model: Any = tiny_stage1(seed=4)

    def image_tokens(pixels_B13HW: Tensor) -> Tensor:
        return pixels_B13HW.float().mean(dim=(-2, -1))[:, :, None]

    def match(tokens_B113: Tensor, texts: Sequence[str]) -> Tensor:
        names, colours = list(COLORS), torch.tensor(list(COLORS.values())).float()
        nearest = torch.cdist(tokens_B113[:, 0, 0], colours).argmin(dim=1).tolist()
        return torch.tensor([0.9 if names[row] in text else 0.2 for row, text in zip(nearest, texts, strict=True)])

    model.image_tokens, model.match = image_tokens, match
    return model


def caption_web(
    shards: Path,
    out: Path,
    *,
    captioner: Any = None,
    judge: Any = None,
    kind: Any = "blip2_stage1",
    console: Console | None = None,
    **keys: Any,
) -> Path:
    """Run the command; `captioner`, which is of a `kind`, and `judge` stand where it would load models. Return `out`."""
    loaded = {"A": captioner or tiny_captioner(), "B": judge or captioner or tiny_captioner()}
    given = {"captioner": "A", "filter": "B", **SHORT, **keys}
    config = CapFiltConfig(shards=str(shards), out=str(out), **given)

    def find(name: str, llm: Any = None) -> Source:
        return Source("run", Path(name), name, kind if name == "A" else "blip2_stage1", None)

    def load(source: Source, **_: Any) -> LoadedModel:
        return LoadedModel(loaded[source.name], source.name, source.name, 0, None, {})

    with patch.object(models, "find_source", find), patch.object(models, "load_model", load):
        command.capfilt(config, console or Console(quiet=True))
    return out


def write_clip(folder: Path) -> Path:
    """Write a tiny CLIP as the released ones are: a byte-level vocabulary whose end token is the padding too."""
    tokenizer = tiny_llm_tokenizer()
    marks = [(BOS, tokenizer.bos_token_id), (EOS, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=marks
    )
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "pad_token_id": ids["eos_token_id"], **ids}
    config = CLIPConfig(
        text_config={**sizes, **text},
        vision_config={**sizes, "image_size": 28, "patch_size": 14},
        projection_dim=16,
    )
    torch.manual_seed(0)
    model = CLIPModel(config)
    redraw(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"shortest_edge": 28}
    CLIPImageProcessor(size=size, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder but the lock, by path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
