"""BLIP's checkpoints, of its own repository and of LAVIS, read and written.

Both use one set of names. Whatever the source, tensors meet under these names: a pre-trained model's decoder is whole there,
and so a captioner finds in it what it needs. Momentum copies and queue stay in the models that train with them.
"""

import logging
import math
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from instructblip.config.schema import ModelKind
from instructblip.errors import UserError
from instructblip.files import atomic_path
from instructblip.models.blip import BLIP, BLIPVQA, BLIPCaption, BLIPPretrain, BLIPRetrieval
from instructblip.weights.names import check_tensors, foreign_names, has_place, is_ignored
from instructblip.weights.position import resize_position_embedding

logger = logging.getLogger(__name__)

POSITIONS = ("visual_encoder.pos_embed", "visual_encoder_m.pos_embed")
QUEUE_IDS = "idx_queue"
_VISION, _ENCODER, _DECODER, _MATCHING = "visual_encoder.", "text_encoder.", "text_decoder.", "itm_head."
_MOMENTUM = re.compile(r"(\w+_m\.|(image|text|idx)_queue$|queue_ptr$)")
_CONTRAST = re.compile(r"(vision|text)_proj\.|temp$")
_POINTER = {"ptr_queue": "queue_ptr"}  # as BLIP's own repository calls it in its retrieval
_WORDS = "embeddings.word_embeddings.weight"
_LAYER = re.compile(r"text_(?:encoder|decoder\.bert)\.encoder\.layer\.(\d+)\.")
# As released, by the kind of the model; a file does not say them.
MAX_TEXT_TOKENS: dict[ModelKind, int] = {
    "blip_caption": 40,
    "blip_vqa": 35,
    "blip_retrieval": 35,
    "blip_pretrain": 30,
}


class BlipCheckpoint(NamedTuple):
    """What a checkpoint of BLIP holds, under LAVIS's names; copies of tied tensors and position numbers are left out.

    Attributes:
        path: the file.
        kind: the model that it is of.
        tensors: its weights, and the queue.
    """

    path: Path
    kind: ModelKind
    tensors: dict[str, Tensor]

    @property
    def vision_width(self) -> int:
        """Width of the image tokens."""
        return self.tensors["visual_encoder.cls_token"].shape[-1]

    @property
    def image_size(self) -> int:
        """Side of the images that its ViT takes, pixels."""
        patch = self.tensors["visual_encoder.patch_embed.proj.weight"].shape[-1]
        return math.isqrt(self.tensors[POSITIONS[0]].shape[1] - 1) * patch

    @property
    def layers(self) -> int:
        """Of its text models."""
        return 1 + max(int(found[1]) for found in map(_LAYER.match, self.tensors) if found)


def is_blip(path: Path, names: Collection[str]) -> bool:
    """Whether a file's tensors are BLIP's.

    Raises:
        UserError: as `blip_kind`.
    """
    try:
        return blip_kind(names) is not None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def blip_kind(names: Collection[str]) -> ModelKind | None:
    """The model that tensors of these names, of LAVIS or of BLIP's repository, are of; None where it is no BLIP.

    Raises:
        UserError: BLIP for a task that there is no model for.
    """
    has = {part: any(name.startswith(part) for name in names) for part in (_VISION, _ENCODER, _DECODER, _MATCHING)}
    if any(".crossattention.self0." in name for name in names):
        raise UserError("it is BLIP for NLVR2, of two images a question, and there is no such model here")
    if not has[_VISION] or not (has[_ENCODER] or has[_DECODER]):
        return None
    if not has[_ENCODER]:
        return "blip_caption"
    if not has[_DECODER]:
        return "blip_retrieval"
    return "blip_pretrain" if has[_MATCHING] else "blip_vqa"


def blip_checkpoint(path: Path, state: Mapping[str, Tensor]) -> BlipCheckpoint:
    """What a file's state dict holds.

    Raises:
        UserError: it is of another model, lacks what tells its sizes, or has two different decoders.
    """
    kind = blip_kind(state)
    if kind is None:
        raise UserError(
            f"{path} has no visual_encoder with a text_encoder or text_decoder; it is no checkpoint of BLIP"
        )
    tensors = {_POINTER.get(name, name): tensor for name, tensor in state.items() if not is_ignored(name, "lavis_blip")}
    for needed in ("visual_encoder.cls_token", POSITIONS[0], "visual_encoder.patch_embed.proj.weight"):
        if needed not in tensors:
            raise UserError(f"{path} lacks the tensor {needed}; it is of another model, or incomplete")
    if not any(map(_LAYER.match, tensors)):
        raise UserError(f"{path} has no layer of a text model; it is of another model, or incomplete")
    if kind == "blip_pretrain":
        tensors = _without_copies(path, tensors)
    return BlipCheckpoint(path, kind, tensors)


def blip_settings(checkpoint: BlipCheckpoint) -> dict[str, Any]:
    """What a checkpoint's tensors say of the section `model`, and the released length of its texts."""
    settings: dict[str, Any] = {"max_text_tokens": MAX_TEXT_TOKENS[checkpoint.kind]}
    if checkpoint.kind in ("blip_retrieval", "blip_pretrain"):
        if "vision_proj.bias" not in checkpoint.tensors:
            raise UserError(
                f"{checkpoint.path} lacks the tensor vision_proj.bias; it is of another model, or incomplete"
            )
        settings["feature_width"] = checkpoint.tensors["vision_proj.bias"].shape[0]
        if "image_queue" in checkpoint.tensors and any("_m." in name for name in checkpoint.tensors):
            settings["queue_size"] = checkpoint.tensors["image_queue"].shape[1]
    return settings


def load_blip(checkpoint: BlipCheckpoint, model: BLIP) -> None:
    """Load a checkpoint into a model of its kind, image size and queue, which holds the vision encoder from then on.

    Raises:
        UserError: a tensor is missing, unknown or of another shape.
    """
    own, names = model.state_dict(), lavis_names(model)
    found, where = dict(checkpoint.tensors), str(checkpoint.path)
    passed = _passed_over(model, found)
    if passed:
        logger.info("passed over %d tensors of momentum and contrast: %s", len(passed), ", ".join(passed[:3]))
        found = {name: tensor for name, tensor in found.items() if name not in passed}
    expected = {names[name]: tensor.shape for name, tensor in own.items()}
    if QUEUE_IDS not in found:  # pre-training has none
        expected.pop(QUEUE_IDS, None)
    found = {name: shaped(tensor, expected.get(name)) for name, tensor in found.items()}
    check_tensors(expected, found, where)
    model.load_state_dict({name: found[names[name]] for name in own if names[name] in found}, strict=False)
    model.held_parts |= {"vision"}


def _passed_over(model: BLIP, names: Collection[str]) -> list[str]:
    """Those that the model has no place for, and that are none of another model."""
    if not isinstance(model, BLIPRetrieval):  # momentum and contrast are of another task's training
        return [name for name in names if _MOMENTUM.match(name) or _CONTRAST.match(name)]
    # Copies without a queue, or a queue without copies: nothing can go on with either.
    return [name for name in names if _MOMENTUM.match(name)] if model.queue_size is None else []


def lavis_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A BLIP model's tensors, under this code's names, as LAVIS's; a pre-trained decoder is whole there.

    Raises:
        UserError: a tensor that has no place there.
    """
    return _renamed(state, foreign_names(state, "lavis_blip"))


def meeting_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, where what LAVIS has no place for, a CNN, keeps its names; other models of BLIP start from these."""
    return _renamed(state, meeting_names(state))


def _renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    found = {names[name]: tensor for name, tensor in state.items()}
    if any(".decoder_attention." in name for name in state):
        found |= {copy: found[name] for copy, name in _copies(found).items()}
    return found


def whole(checkpoint: BlipCheckpoint) -> dict[str, Tensor]:
    """A checkpoint's tensors, a pre-trained model's decoder whole: what any model of BLIP can start from."""
    copies = _copies(checkpoint.tensors) if checkpoint.kind == "blip_pretrain" else {}
    return checkpoint.tensors | {copy: checkpoint.tensors[name] for copy, name in copies.items()}


def save_blip(model: BLIP, path: Path) -> None:
    """Write a model as LAVIS and BLIP's repository do: all of it, momentum copies and queue where it has them.

    Raises:
        UserError: a tensor has no place there (of another vision encoder than a plain ViT, say), or the disk is full.
    """
    content = {name: tensor.detach().cpu() for name, tensor in lavis_tensors(model.state_dict()).items()}
    if isinstance(model, BLIPPretrain):
        content.pop(QUEUE_IDS, None)  # it contrasts by place, not by image
    # What the released files have too: position numbers, and copies of what is tied.
    for prefix in [name.removesuffix(_WORDS) for name in content if name.endswith(_WORDS)]:
        positions = content[f"{prefix}embeddings.position_embeddings.weight"].shape[0]
        content[f"{prefix}embeddings.position_ids"] = torch.arange(positions)[None]
    if "text_decoder.cls.predictions.bias" in content:
        content["text_decoder.cls.predictions.decoder.weight"] = content[f"text_decoder.bert.{_WORDS}"]
        content["text_decoder.cls.predictions.decoder.bias"] = content["text_decoder.cls.predictions.bias"]
    with atomic_path(path) as partial:
        torch.save({"model": content}, partial)


def kind_of(model: BLIP) -> ModelKind:
    """A model's kind."""
    if isinstance(model, BLIPPretrain):
        return "blip_pretrain"
    kinds: dict[type[BLIP], ModelKind] = {
        BLIPCaption: "blip_caption",
        BLIPVQA: "blip_vqa",
        BLIPRetrieval: "blip_retrieval",
    }
    return kinds[type(model)]


def fit_positions(model: BLIP, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, LAVIS's, with position embeddings of the model's image size."""
    if not any(name in tensors for name in POSITIONS):
        return dict(tensors)
    embed = model.vision.backbone.patch_embed
    prefix = model.vision.backbone.pos_embed.shape[1] - embed.num_patches
    patches = tuple(embed.grid_size)
    return {
        name: resize_position_embedding(tensor, patches, prefix_tokens=prefix) if name in POSITIONS else tensor
        for name, tensor in tensors.items()
    }


def lavis_names(model: BLIP) -> dict[str, str]:
    """This code's names of all that a model learns or keeps -> LAVIS's; pixel statistics are in no file.

    Raises:
        UserError: a tensor that has no place there.
    """
    return foreign_names(model.state_dict(), "lavis_blip")


def meeting_names(native: Iterable[str]) -> dict[str, str]:
    """This code's names -> those under which the weights of one BLIP meet another: LAVIS's, a CNN's as they are."""
    names = list(native)
    return {name: name for name in names} | foreign_names(
        [name for name in names if has_place(name, "lavis_blip")], "lavis_blip"
    )


def _without_copies(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A pre-trained model's tensors without what its decoder shares with the encoder."""
    copies = _copies(tensors)
    for copy, name in copies.items():
        if copy in tensors and not torch.equal(tensors[copy], tensors[name]):
            raise UserError(f"{path}: {copy} differs from {name}, which encoder and decoder share; it is no BLIP")
    return {name: tensor for name, tensor in tensors.items() if name not in copies}


def _copies(names: Iterable[str]) -> dict[str, str]:
    """The decoder's names of what it shares with the encoder -> the encoder's: all but self-attention."""
    shared = [name for name in names if name.startswith(_ENCODER) and ".attention." not in name]
    return {f"text_decoder.bert.{name.removeprefix(_ENCODER)}": name for name in shared}


def shaped(tensor: Tensor, shape: torch.Size | None) -> Tensor:
    """A tensor of one value in the shape that the model holds it in: files write some as (1,) and some as ()."""
    return tensor.reshape(shape) if shape is not None and tensor.numel() == shape.numel() == 1 else tensor
