"""LAVIS's checkpoints: InstructBLIP's and BLIP-2's read, InstructBLIP's written.

A `.pth` file is a pickle. It is read with torch's `weights_only` loader, which builds tensors and plain values and nothing
else, and is mapped into memory rather than read where its container allows.
"""

import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from instructblip.errors import UserError
from instructblip.files import atomic_path
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.llm import EncoderDecoderLLM
from instructblip.weights.names import LAVIS_ALIASES, PROJECTIONS, check_tensors, foreign_names, is_ignored

logger = logging.getLogger(__name__)

LN_VISION_EPS = 1e-5  # torch's default, which LAVIS leaves as it is
_VISION = "visual_encoder."
_PROJECTION = "llm_proj."  # the table's name; others are renamed to it

_POSITION_IDS = "Qformer.bert.embeddings.position_ids"

_TEXT_BRANCH = re.compile(
    r"Qformer\.bert\.(embeddings\.(word|position)_embeddings|encoder\.layer\.\d+\.(intermediate|output))\."
)


class Blip2Start(NamedTuple):
    """What instruction tuning starts from.

    Attributes:
        tensors: under this code's names.
        projection: its name in the second stage's file, one of `PROJECTIONS`; None without that stage.
    """

    tensors: dict[str, Tensor]
    projection: str | None


class LavisCheckpoint(NamedTuple):
    """What an InstructBLIP checkpoint of LAVIS holds, still under its own names.

    Attributes:
        path: the file.
        trained: Q-Former, query tokens, `ln_vision` and projection; the projection is called `llm_proj`.
        vision: the ViT; empty where it was frozen, as in the released files.
        projection: the projection's original name, one of `PROJECTIONS`, which tells the family of language models.
    """

    path: Path
    trained: dict[str, Tensor]
    vision: dict[str, Tensor]
    projection: str

    @property
    def llm_width(self) -> int:
        """Width of the embeddings of the language model that the projection was aligned to."""
        return self.trained[f"{_PROJECTION}weight"].shape[0]


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
    """Read an InstructBLIP checkpoint of LAVIS: a released one, or one of LAVIS's own training.

    What stands beside the weights (optimizer, config, scaler, epoch) is left alone.

    Raises:
        UserError: not such a file, or no projection in it.
    """
    trained, vision = _split(_model_state(path))
    projection = _projection(trained)
    if projection is None:
        raise UserError(
            f"{path} has no {' or '.join(PROJECTIONS)} and is no InstructBLIP checkpoint of LAVIS; a BLIP-2 checkpoint of "
            "stage 1 or 2 is a start for training"
        )
    return LavisCheckpoint(path, _with_one_projection(trained, projection), vision, projection)


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
        "instruction_aware": "Qformer.bert.embeddings.word_embeddings.weight" in checkpoint.trained,
    }


def load_lavis(checkpoint: LavisCheckpoint, model: InstructBLIP) -> bool:
    """Load a checkpoint into a model: its trained tensors, and its ViT where it has one.

    Returns:
        Whether the projection is the checkpoint's: one into another width is left as it is in the model.

    Raises:
        UserError: a tensor is missing, unknown or of another shape.
    """
    expected, found = model.part_state("qformer"), checkpoint.trained
    fits = model.llm.width == checkpoint.llm_width
    if not fits:
        expected = {name: tensor for name, tensor in expected.items() if not name.startswith("projection.")}
        found = {name: tensor for name, tensor in found.items() if not name.startswith(_PROJECTION)}
    if checkpoint.vision:
        own = {f"vision.backbone.{name}": tensor for name, tensor in model.vision.backbone.state_dict().items()}
        expected, found = {**expected, **own}, {**found, **checkpoint.vision}
    names = foreign_names(expected, "lavis")
    shapes = {names[name]: tensor.shape for name, tensor in expected.items()}
    check_tensors(shapes, found, str(checkpoint.path))
    model.load_state_dict({name: found[names[name]] for name in expected}, strict=False)
    return fits


def save_lavis(model: InstructBLIP, path: Path, *, projection: str | None = None) -> None:
    """Write what is trained as a LAVIS checkpoint: Q-Former, query tokens, `ln_vision`, projection.

    The frozen ViT and language model are not in such a file. LAVIS computes `ln_vision` with an eps of 1e-5, whatever the
    model has.

    Args:
        model: the model.
        path: of the file.
        projection: its name there, one of `PROJECTIONS`; None takes that of InstructBLIP's models of this kind.

    Raises:
        UserError: other parts were trained, a tensor has no place there (of another vision norm than a LayerNorm, say),
            or the disk is full.
    """
    if others := sorted(model.trained_parts - {"qformer"}):
        raise UserError(f"{others[0]} was trained too, and a LAVIS file has no place for it; write --to huggingface")
    state = model.part_state("qformer")
    projection = projection or ("t5_proj" if isinstance(model.llm, EncoderDecoderLLM) else "llm_proj")
    names = {
        native: name.replace(_PROJECTION, f"{projection}.") for native, name in foreign_names(state, "lavis").items()
    }
    positions = torch.arange(model.qformer.max_text_tokens)[None]  # a buffer, which LAVIS's own files have
    with atomic_path(path) as partial:
        content = {names[native]: tensor.detach().cpu() for native, tensor in state.items()}
        torch.save({"model": content | {_POSITION_IDS: positions}}, partial)
    if isinstance(model.vision_norm, nn.LayerNorm) and model.vision_norm.eps != LN_VISION_EPS:
        logger.warning(
            "LAVIS computes ln_vision with an eps of %g, this model with %g: its outputs differ by that",
            LN_VISION_EPS,
            model.vision_norm.eps,
        )


def read_blip2(stage1: Path, stage2: Path | None, expected: Mapping[str, Tensor]) -> Blip2Start:
    """The start of instruction tuning: BLIP-2's first stage, overlaid by its second, under this code's names.

    The second stage has no text branch: its text embeddings and text feed-forwards are those of the first. It alone has a
    projection, into the language model it was aligned to.

    Args:
        stage1: `blip2_pretrained.pth`.
        stage2: such as `blip2_pretrained_flant5xl.pth`; None starts from the first stage.
        expected: the tensors to be filled, such as `model.part_state("qformer")`. A Q-Former that takes no instructions
            leaves the first stage's text branch out.

    Returns:
        With a tensor for each of `expected`; the projection is left out where the second stage has none of that shape.

    Raises:
        UserError: a file of the other stage, or another tensor is missing, unknown or of another shape.
    """
    state, where = _split(_model_state(stage1))[0], str(stage1)
    if (found := _projection(state)) is not None:
        raise UserError(
            f"{stage1} has a projection ({found}), so it is no file of BLIP-2's first stage; give blip2_pretrained.pth as "
            "qformer.stage1 and the second stage's, blip2_pretrained_<llm>.pth, as qformer.stage2"
        )
    projection = None
    if stage2 is not None:
        second = _split(_model_state(stage2))[0]
        projection = _projection(second)
        if projection is None:
            raise UserError(
                f"{stage2} has no {' or '.join(PROJECTIONS)}, so it is no file of BLIP-2's second stage; give "
                "blip2_pretrained_<llm>.pth as qformer.stage2, or null to start from the first stage"
            )
        state |= _with_one_projection(second, projection)
        where = f"{stage1} overlaid by {stage2}"
    if "qformer.word_embeddings.weight" not in expected:
        state = {name: tensor for name, tensor in state.items() if not _TEXT_BRANCH.match(name)}
    names = foreign_names(expected, "lavis")
    fits = {
        name: names[name] in state and state[names[name]].shape == tensor.shape
        for name, tensor in expected.items()
        if names[name].startswith(_PROJECTION)
    }
    if not all(fits.values()):
        state = {name: tensor for name, tensor in state.items() if not name.startswith(_PROJECTION)}
        names = {native: name for native, name in names.items() if native not in fits}
    check_tensors({name: expected[native].shape for native, name in names.items()}, state, where)
    return Blip2Start({native: state[name] for native, name in names.items()}, projection)


def _projection(state: Mapping[str, Tensor]) -> str | None:
    """What the file of these tensors calls its projection; None where it has none."""
    return next((name for name in PROJECTIONS if f"{name}.weight" in state), None)


def _model_state(path: Path) -> dict[str, Tensor]:
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
