"""InstructBLIP: instruction tuning of vision-language models with a Q-Former, training and evaluation.

`instructblip.load(source)` returns a model ready to `generate` and `rank`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from instructblip._torchvision import declare_missing_operators

if TYPE_CHECKING:
    from instructblip.model.instructblip import InstructBLIP

declare_missing_operators()  # before anything imports torchvision: transformers and timm both do

__all__ = ["load"]


def load(source: str | Path, *, device: str = "auto") -> "InstructBLIP":
    """Load a trained model.

    Args:
        source: folder of a run (`outputs/train/<name>`, its newest whole checkpoint is taken) or one of its checkpoints.
        device: `auto` takes a GPU where there is one.

    Raises:
        UserError: no checkpoint there, a broken one, or frozen parts that are not those it was trained with.
    """
    from instructblip.build import load_run

    return load_run(Path(source), device=device).model
