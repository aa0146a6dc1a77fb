"""InstructBLIP: instruction tuning of vision-language models with a Q-Former, training and evaluation.

`instructblip.load(source)` returns a model ready to `generate`, `rank` or `match`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, cast

from instructblip._torchvision import declare_when_looked_for

if TYPE_CHECKING:
    from instructblip.models.blip import BLIP
    from instructblip.models.blip2 import BLIP2
    from instructblip.models.instructblip import InstructBLIP
    from instructblip.models.llava import LLaVA

declare_when_looked_for()  # before anything imports torchvision: transformers and timm both do

__all__ = ["load"]


def load(
    source: str | Path,
    *,
    llm: str | None = None,
    llm_path: str | None = None,
    vision_path: str | None = None,
    qformer_path: str | None = None,
    adapter: str | Path | None = None,
    device: str = "auto",
) -> "InstructBLIP | LLaVA | BLIP2 | BLIP":
    """Load a trained model: what `instructblip.weights.load.load_model` does and documents, the model alone.

    Args:
        source: a run (`outputs/train/<name>`) or one of its checkpoints, a transformers folder or hub id (with
            `@REVISION` for another than the newest), a LAVIS `.pth`; of
            InstructBLIP, of either stage of BLIP-2, of BLIP for captions, questions or retrieval.
        llm: a name in configs/llm, or the path of a YAML of your own; a `.pth` of a model with a language model needs it.
        llm_path, vision_path, qformer_path: files of frozen parts in place of the configured sources.
        adapter: a folder in peft's format with low-rank adapters for it: `adapters/llm` of a checkpoint, or what peft saved
            around transformers' class of its language model, or of the whole model. Those that a transformers folder was
            written with, in `adapter`, are taken where nothing is given.
        device: `auto` takes a GPU where there is one.

    Raises:
        UserError: nothing there that can be loaded, or files that do not fit.
    """
    from instructblip.weights.load import load_model

    parts = {"llm": llm, "llm_path": llm_path, "vision_path": vision_path, "qformer_path": qformer_path}
    found = load_model(source, adapter=adapter, device=device, **parts).model
    return cast("InstructBLIP | LLaVA | BLIP2 | BLIP", found)
