"""Adapters from a folder in peft's format, put onto a model that was loaded without them."""

from collections.abc import Iterable
from pathlib import Path

from instructblip.errors import UserError
from instructblip.models.adapters import NAME, Adapter, require_peft
from instructblip.models.base import Model
from instructblip.weights.names import Format, check_tensors, native_layers
from instructblip.weights.parts import adapt
from instructblip.weights.peft_format import MATRICES, LayerAdapter, read_peft_folder

# What names in a folder may lead from: this code's modules, and the classes of transformers.
_ROOTS = ("llm.model", "vision.backbone", "qformer", "text_encoder", "text_decoder")
_LAYOUTS: tuple[Format, ...] = ("huggingface", "huggingface_blip2", "huggingface_blip", "huggingface_llava")


def attach(model: Model, folder: str | Path) -> None:
    """Put the adapters of a folder in peft's format onto a model, in place; they stay as they are, untrained further.

    Args:
        model: without adapters on the parts that the folder has some for.
        folder: of a checkpoint of ours, or written by peft around transformers' class of the language model or of the whole
            model.

    Raises:
        UserError: no such folder, adapters of another kind than plain LoRA, or of another model.
    """
    require_peft()
    folder = Path(folder).expanduser()
    found = read_peft_folder(folder)
    layers = _layers_in(model, found, folder)
    by_part: dict[str, dict[str, LayerAdapter]] = {}
    for name, layer in layers.items():
        by_part.setdefault(model.part_of(layer), {})[layer] = found[name]
    for part, own in by_part.items():
        if part in model.adapters:
            raise UserError(
                f"adapter={folder} is for the {part}, which has adapters already; give the base without them"
            )
        kinds = {(layer.rank, layer.scaling) for layer in own.values()}
        if len(kinds) > 1:
            raise UserError(f"adapter={folder} has several ranks or factors in the {part}; this code knows one a part")
        ((rank, scaling),) = kinds
        adapt(model, part, Adapter(rank, scaling * rank, 0.0, tuple(own)))
    state = {
        f"{layer}.{matrix}.{NAME}.weight": tensor
        for name, layer in layers.items()
        for matrix, tensor in zip(MATRICES, (found[name].a_RI, found[name].b_OR), strict=True)
    }
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items() if name in state}
    check_tensors(wanted, state, f"adapter={folder}")
    model.load_state_dict(state, strict=False)
    model.choose_trained(model.trained_parts - by_part.keys())


def _layers_in(model: Model, names: Iterable[str], folder: Path) -> dict[str, str]:
    """The layers of a model that a folder means by its names, whichever module they lead from."""
    names, known = list(names), {name for part in model.PARTS for name in _linear_names(model, part)}
    readings = [{name: f"{root}.{name}" for name in names} for root in _ROOTS]
    readings += [native_layers(names, layout) for layout in _LAYOUTS]
    if not names:
        raise UserError(f"adapter={folder} adapts nothing: it has no tensors; save it again")
    strays = [[name for name in names if reading.get(name) not in known] for reading in readings]
    fewest = min(strays, key=len)
    if not fewest:
        return readings[strays.index(fewest)]
    if len(fewest) < len(names):
        raise UserError(
            f"adapter={folder} adapts {fewest[0]}, for which this model has no layer of its own: it is of another model, "
            "outside the blocks of a part, or one with others in it; train the adapter again with target_modules without it"
        )
    raise UserError(f"adapter={folder} adapts {fewest[0]}, which this model has not; it is of another model")


def _linear_names(model: Model, part: str) -> list[str]:
    blocks = model.blocks(part) if part in model.structure() else {}
    return [f"{prefix}.{name}" for prefix, block in blocks.items() for name, _ in block.named_modules()]
