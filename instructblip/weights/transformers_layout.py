"""Which of transformers' classes holds which model: InstructBLIP, BLIP-2's two stages, LLaVA, BLIP's three tasks."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipProcessor,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from instructblip.config.schema import ModelKind
from instructblip.errors import UserError
from instructblip.models.base import Model
from instructblip.models.blip import BLIPVQA, BLIPCaption, BLIPRetrieval
from instructblip.models.blip2 import BLIP2
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.llava import LLaVA
from instructblip.weights.gatekeeper import MODEL_TYPES, config_json
from instructblip.weights.names import Format, has_place


@dataclass(frozen=True)
class Layout:
    """A class of transformers, with what its folders are like.

    Attributes:
        kind: the model that it holds.
        names: of its tensors.
        model, processor: the classes.
    """

    kind: ModelKind
    names: Format
    model: Any
    processor: Any

    @property
    def title(self) -> str:
        """The class's name, for messages."""
        return self.model.__name__


_INSTRUCTBLIP = Layout("instructblip", "huggingface", InstructBlipForConditionalGeneration, InstructBlipProcessor)
_BLIP2 = Layout("blip2", "huggingface_blip2", Blip2ForConditionalGeneration, Blip2Processor)
_RETRIEVAL = Layout("blip2_stage1", "huggingface_blip2", Blip2ForImageTextRetrieval, Blip2Processor)
# Its kind is InstructBLIP's, with another connector.
_LLAVA = Layout("instructblip", "huggingface_llava", LlavaForConditionalGeneration, LlavaProcessor)
_BLIP: dict[type[Model], Layout] = {
    BLIPCaption: Layout("blip_caption", "huggingface_blip", BlipForConditionalGeneration, BlipProcessor),
    BLIPVQA: Layout("blip_vqa", "huggingface_blip", BlipForQuestionAnswering, BlipProcessor),
    BLIPRetrieval: Layout("blip_retrieval", "huggingface_blip", BlipForImageTextRetrieval, BlipProcessor),
}
_BY_CLASS = {layout.title: layout for layout in (_INSTRUCTBLIP, _BLIP2, _RETRIEVAL, _LLAVA, *_BLIP.values())}


def layout_for(model: Model) -> Layout:
    """The class that a model is written for; pre-training of BLIP has none."""
    if type(model) in _BLIP:
        return _BLIP[type(model)]
    if isinstance(model, BLIP2):
        return _RETRIEVAL
    if isinstance(model, LLaVA):
        return _LLAVA
    assert isinstance(model, InstructBLIP)
    return _INSTRUCTBLIP if model.qformer.instruction_aware else _BLIP2


def layout_of(folder: Path) -> Layout:
    """The class that a folder is of.

    Raises:
        UserError: no config.json, or of another model.
    """
    config = config_json(folder)
    if config.get("model_type") not in MODEL_TYPES:
        raise UserError(
            f"{folder} holds a model of type {config.get('model_type')}, wanted is {' or '.join(MODEL_TYPES)}"
        )
    classes = config.get("architectures") or [_usual_class(config)]
    if len(classes) != 1 or classes[0] not in _BY_CLASS:
        raise UserError(
            f"{folder} holds a {', '.join(classes) or 'model of no class'}; wanted is one of {', '.join(_BY_CLASS)}"
        )
    return _BY_CLASS[classes[0]]


def _usual_class(config: Mapping[str, Any]) -> str:
    """What a configuration without a class is of: BLIP-2's retrieval alone gives text to its Q-Former."""
    if config["model_type"] == "instructblip":
        return _INSTRUCTBLIP.title
    if config["model_type"] == "blip":
        return ""
    if config["model_type"] == "llava":
        return _LLAVA.title
    reads_text = (config.get("qformer_config") or {}).get("use_qformer_text_input")
    return (_RETRIEVAL if reads_text else _BLIP2).title


def is_llava_folder(folder: Path) -> bool:
    """Whether a transformers folder is of LLaVA.

    Raises:
        UserError: as `layout_of`.
    """
    return layout_of(folder) is _LLAVA


def beside(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Those of this code's tensors that the class has no place for: they go into a file of their own."""
    return {name: tensor for name, tensor in state.items() if not has_place(name, layout.names)}
