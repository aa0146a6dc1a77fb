"""LAVIS's checkpoints of InstructBLIP and of both stages of BLIP-2, read and written.

A `.pth` file is a pickle. It is read with torch's `weights_only` loader, which builds tensors and plain values and nothing
else, and is mapped into memory rather than read where its container allows.
"""

import logging
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from instructblip.config.schema import ModelKind
from instructblip.errors import UserError
from instructblip.files import atomic_path
from instructblip.models.base import Model
from instructblip.models.blip2 import BLIP2
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.llm import EncoderDecoderLLM
from instructblip.weights.names import (
    LAVIS_ALIASES,
    LAVIS_TIED,
    PROJECTIONS,
    backbone_state,
    check_tensors,
    foreign_names,
    is_ignored,
    native_names,
)

logger = logging.getLogger(__name__)

LN_VISION_EPS = 1e-5  # torch's default, which LAVIS leaves as it is
_VISION = "visual_encoder."
_PROJECTION = "llm_proj."  # the table's name; others are renamed to it

_POSITION_IDS = "Qformer.bert.embeddings.position_ids"
_WORDS, _HEAD_BIAS = "Qformer.bert.embeddings.word_embeddings.weight", "Qformer.cls.predictions.bias"
_MATCHING_HEAD = "itm_head.weight"
_STAGE1_HEADS = ("Qformer.cls.", "vision_proj.", "text_proj.", "itm_head.", "temp")


class LavisTensors(NamedTuple):
    """All that means something in a file of LAVIS's Q-Former models: BLIP-2's stages, InstructBLIP.

    Attributes:
        tensors: under this code's names.
        projection: what the file calls its projection, one of `PROJECTIONS`; None where it has none, as in stage 1.
    """

    tensors: dict[str, Tensor]
    projection: str | None


class LavisCheckpoint(NamedTuple):
    """What a checkpoint of LAVIS holds, still under its own names.

    Attributes:
        path: the file.
        kind: the model that it is of.
        trained: Q-Former, query tokens, `ln_vision`, heads or projection; the projection is called `llm_proj`.
        vision: the ViT; empty where it was frozen, as in most released files.
        projection: the projection's original name, one of `PROJECTIONS`, which tells the family of language models; None in
            BLIP-2's first stage.
    """

    path: Path
    kind: ModelKind
    trained: dict[str, Tensor]
    vision: dict[str, Tensor]
    projection: str | None

    @property
    def llm_width(self) -> int | None:
        """Width of the embeddings of the language model that the projection was aligned to; None without one."""
        return self.trained[f"{_PROJECTION}weight"].shape[0] if self.projection else None

    @property
    def vision_width(self) -> int:
        """Width of the image tokens that the Q-Former reads."""
        return self.trained["ln_vision.weight"].shape[0]

    @property
    def image_size(self) -> int | None:
        """Side of the images that the file's ViT takes, pixels; None where it has none."""
        positions, patches = (self.vision.get(f"{_VISION}{name}") for name in ("pos_embed", "patch_embed.proj.weight"))
        if positions is None or patches is None:
            return None
        return math.isqrt(positions.shape[1] - 1) * patches.shape[-1]


def read_pth(path: Path) -> Any:
    """Read a `.pth` or `.bin` file without unpickling anything but tensors and plain values.

    Raises:
        UserError: missing, not a file of torch, cut short, or with Python objects in it.
    """
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:  # files from before torch 1.6 cannot be mapped
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the path of a .pth file") from None
    except pickle.UnpicklingError as error:
        reason = str(error).split("WeightsUnpickler error:")[-1].strip().partition("\n")[0]
        raise UserError(
            f"{path} is no file of tensors and plain values ({reason}), and unpickling anything else could run foreign "
            "code; save its state dict alone, with torch.save, where the file comes from"
        ) from None
    except Exception as error:  # what is no pickle at all fails in any way
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(f"{path} cannot be read ({reason}); fetch it again") from None


def read_lavis(path: Path) -> LavisCheckpoint:
    """Read a checkpoint of LAVIS, released or of LAVIS's own training: InstructBLIP's, or one of BLIP-2's two stages.

    What stands beside the weights (optimizer, config, scaler, epoch) is left alone.

    Raises:
        UserError: not such a file.
    """
    trained, vision = _split(model_state(path))
    projection = _projection(trained)
    if projection is None and _MATCHING_HEAD not in trained:
        raise UserError(
            f"{path} has no projection ({' or '.join(PROJECTIONS)}) and no matching head (itm_head), so it is no checkpoint "
            "of InstructBLIP or BLIP-2"
        )
    for needed in ("ln_vision.weight", *(["vision_proj.bias"] if projection is None else [])):
        if needed not in trained:
            raise UserError(f"{path} lacks the tensor {needed}; it is of another model, or incomplete")
    if projection is None:
        return LavisCheckpoint(path, "blip2_stage1", trained, vision, None)
    if heads := [name for name in trained if name.startswith(_STAGE1_HEADS)]:
        logger.info("passed over %d tensors of BLIP-2's first stage: %s", len(heads), ", ".join(heads))
    trained = {name: tensor for name, tensor in trained.items() if name not in heads}
    kind: ModelKind = "instructblip" if _WORDS in trained else "blip2"
    return LavisCheckpoint(path, kind, _with_one_projection(trained, projection), vision, projection)


def qformer_settings(checkpoint: LavisCheckpoint) -> dict[str, Any]:
    """What a checkpoint's tensors say of its Q-Former beyond BERT's sizes: arguments of `QFormer`.

    Raises:
        UserError: no query tokens or no cross-attention in it.
    """
    layer = re.compile(r"Qformer\.bert\.encoder\.layer\.(\d+)\.(crossattention\.)?")
    found = [match for match in map(layer.match, checkpoint.trained) if match]
    crossed = sorted({int(match[1]) for match in found if match[2]})
    if "query_tokens" not in checkpoint.trained or not crossed:
        raise UserError(f"{checkpoint.path} has no query tokens or no cross-attention; it holds no Q-Former")
    return {
        "queries": checkpoint.trained["query_tokens"].shape[1],
        "cross_attention_every": crossed[1] if len(crossed) > 1 else 1 + max(int(match[1]) for match in found),
        "instruction_aware": _WORDS in checkpoint.trained,
    }


def architecture_settings(checkpoint: LavisCheckpoint) -> dict[str, Any]:
    """What the tensors of BLIP-2's first stage say of its heads; nothing for another model."""
    if checkpoint.kind != "blip2_stage1":
        return {}
    return {
        "feature_width": checkpoint.trained["vision_proj.bias"].shape[0],
        "language_model_head": _HEAD_BIAS in checkpoint.trained,
    }


def load_lavis(checkpoint: LavisCheckpoint, model: InstructBLIP | BLIP2) -> bool:
    """Load a checkpoint into a model of its kind: its trained tensors, and its ViT where it has one, held from then on.

    Returns:
        Whether the projection is the checkpoint's: one into another width is left as it is in the model.

    Raises:
        UserError: a tensor is missing, unknown or of another shape.
    """
    expected, found = model.part_state("qformer"), checkpoint.trained
    fits = not isinstance(model, InstructBLIP) or model.llm.width == checkpoint.llm_width
    if not fits:
        expected = {name: tensor for name, tensor in expected.items() if not name.startswith("projection.")}
        found = {name: tensor for name, tensor in found.items() if not name.startswith(_PROJECTION)}
    if checkpoint.vision:
        expected, found = {**expected, **backbone_state(model.vision)}, {**found, **checkpoint.vision}
        model.held_parts |= {"vision"}  # which no file of its configuration has
    names = foreign_names(expected, "lavis")
    shapes = {names[name]: tensor.shape for name, tensor in expected.items()}
    check_tensors(shapes, found, str(checkpoint.path))
    model.load_state_dict({name: found[names[name]] for name in expected}, strict=False)
    return fits


def refuse_adapters(model: Model) -> None:
    """Refuse a model with adapters.

    Raises:
        UserError: says where they can go.
    """
    if model.adapters:
        raise UserError(
            f"{' and '.join(model.adapters)} has adapters, and a LAVIS file has no place for them; write --to huggingface"
        )


def save_lavis(model: InstructBLIP | BLIP2, path: Path, *, projection: str | None = None) -> None:
    """Write what a checkpoint holds as one of LAVIS: Q-Former, query tokens, `ln_vision`, projection or heads.

    A frozen ViT that has a file of its own and the language model are not in it. LAVIS computes `ln_vision` with an eps of
    1e-5, whatever the model has.

    Args:
        model: the model.
        path: of the file.
        projection: its name there, one of `PROJECTIONS`; None takes that of the released models of this kind.

    Raises:
        UserError: the language model was trained, a tensor has no place there (of another vision norm than a LayerNorm,
            say), or the disk is full.
    """
    refuse_adapters(model)
    held = model.trained_parts | model.held_parts
    if "llm" in held:
        raise UserError("llm was trained too, and a LAVIS file has no place for it; write --to huggingface")
    state = model.part_state("qformer")
    if "vision" in held:
        state |= backbone_state(model.vision)
    names = foreign_names(state, "lavis")
    if isinstance(model, InstructBLIP):
        projection = projection or _usual_projection(model)
        names = {native: name.replace(_PROJECTION, f"{projection}.") for native, name in names.items()}
    content = {names[native]: tensor.detach().cpu() for native, tensor in state.items()}
    # What LAVIS's own files have too: a buffer, and under their second names the tensors of a tied head.
    content[_POSITION_IDS] = torch.arange(model.qformer.max_text_tokens)[None]
    if model.qformer.lm_head is not None:
        content |= {copy: content[name] for copy, name in zip(LAVIS_TIED, (_WORDS, _HEAD_BIAS), strict=True)}
    with atomic_path(path) as partial:
        torch.save({"model": content}, partial)
    if isinstance(model.vision_norm, nn.LayerNorm) and model.vision_norm.eps != LN_VISION_EPS:
        logger.warning(
            "LAVIS computes ln_vision with an eps of %g, this model with %g: its outputs differ by that",
            LN_VISION_EPS,
            model.vision_norm.eps,
        )


def _usual_projection(model: InstructBLIP) -> str:
    if isinstance(model.llm, EncoderDecoderLLM):
        return "t5_proj"
    return "llm_proj" if model.qformer.instruction_aware else "opt_proj"


def read_tensors(path: Path) -> LavisTensors:
    """Read a file of any of LAVIS's Q-Former models under this code's names.

    Raises:
        UserError: no state dict of LAVIS's in it, or an unknown tensor.
    """
    state = model_state(path)
    if (projection := _projection(state)) is not None:
        state = _with_one_projection(state, projection)
    names = native_names(state, "lavis", str(path))
    return LavisTensors({native: state[name] for name, native in names.items()}, projection)


def _projection(state: Mapping[str, Tensor]) -> str | None:
    """What the file of these tensors calls its projection; None where it has none."""
    return next((name for name in PROJECTIONS if f"{name}.weight" in state), None)


def model_state(path: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint of LAVIS.

    Raises:
        UserError: there is none.
    """
    content = read_pth(path)
    state = content.get("model") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{path} has no state dict under 'model'; give a checkpoint of LAVIS")
    return state


def _split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is trained, and the ViT; what means nothing here is left out."""
    if aliases := [name for name in LAVIS_ALIASES if name in state]:
        logger.info("passed over %d tensors of the frozen language model: %s", len(aliases), ", ".join(aliases))
    known = {name: tensor for name, tensor in state.items() if not is_ignored(name, "lavis")}
    vision = {name: tensor for name, tensor in known.items() if name.startswith(_VISION)}
    return {name: tensor for name, tensor in known.items() if name not in vision}, vision


def _with_one_projection(state: Mapping[str, Tensor], projection: str) -> dict[str, Tensor]:
    return {name.replace(f"{projection}.", _PROJECTION, 1): tensor for name, tensor in state.items()}
