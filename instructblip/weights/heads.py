"""How many heads a part has: no tensor's shape tells it, and by another number the same weights compute something else."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from instructblip.config.schema import ModelConfig
from instructblip.errors import UserError
from instructblip.fetch.parts import part_settings, sources
from instructblip.models.base import Model
from instructblip.models.empty import empty_modules
from instructblip.weights.init_sources import StartWeights
from instructblip.weights.modules import vision_encoder

_CHOICES = {
    "vision": "set vision.options.num_heads as it had, or choose its vision=",
    "qformer": "choose the qformer= that it was trained with",
    "text": "choose the text= that it was trained with",
}
_VISION = ("vision.", "visual_encoder.")  # this code's name, LAVIS's
Heads = list[int]


def check_heads(model: Model, weights: Sequence[StartWeights], config: ModelConfig) -> list[str]:
    """Refuse parts that were begun from weights trained with other heads, as far as what lies beside the weights says.

    Args:
        model: begun from them.
        weights: in their order.
        config: of the model.

    Returns:
        A line where the vision encoder is the configured one, and the weights were trained beside one of other heads.

    Raises:
        UserError: names the part and both numbers.
    """
    lines = []
    for part in [name for name in model.PARTS if name not in {"llm", *model.FOLLOWERS}]:
        own = _heads(model.part_modules(part))
        for found in weights:
            theirs = _said(found, part, config)
            if not own or not theirs or theirs == own:
                continue
            if part == "vision" and "vision" not in model.held_parts:
                lines += [
                    f"the vision encoder is not the one that these weights were trained with: {_words(theirs)}, here "
                    f"{_words(own)}"
                ]
            elif part != "vision" or any(name.startswith(_VISION) for name in found.tensors):
                raise UserError(_refusal(found, part, theirs, own))
    return lines


def _refusal(found: StartWeights, part: str, theirs: Heads, own: Heads) -> str:
    where = f"init_from={found.source.given}"
    if part == "connector":
        return (
            f"{where} was trained with connector.heads={theirs[0]}, and {own[0]} would read its weights otherwise; set "
            f"connector.heads={theirs[0]}"
        )
    title = {"vision": "vision encoder", "qformer": "Q-Former", "text": "text model"}[part]
    return (
        f"{where} was trained with a {title} of {_words(theirs)}, and {_words(own)} would read its weights otherwise; "
        f"{_CHOICES[part]}"
    )


def _words(heads: Heads) -> str:
    return f"{', '.join(map(str, heads))} heads"


def _heads(modules: Sequence[nn.Module]) -> Heads:
    """The numbers of heads that there are, each once; none where nothing attends."""
    found = (
        getattr(module, name, None) for one in modules for module in one.modules() for name in ("heads", "num_heads")
    )
    return sorted({heads for heads in found if isinstance(heads, int)})


def _said(found: StartWeights, part: str, config: ModelConfig) -> Heads:
    """What a source says of a part; nothing of one that is built as this model's is, and has as many."""
    if found.config is None:
        return found.heads.get(part, [])
    theirs, own = getattr(found.config, part), getattr(config, part)
    if theirs is None or own is None or theirs == own:
        return []
    return _OF_RUNS[part](found.config)


def _of_vision(config: ModelConfig) -> Heads:
    try:
        with empty_modules():
            return _heads([vision_encoder(config.vision)])
    except UserError:  # of another timm, which a start needs no more
        return []


def _of_connector(config: ModelConfig) -> Heads:
    return [config.connector.heads] if config.connector.kind == "resampler" else []


def _of_bert(part: str) -> Callable[[ModelConfig], Heads]:
    def heads(config: ModelConfig) -> Heads:
        section: Any = getattr(config, part)
        try:
            settings = part_settings(sources(section.name, section.sources), setting=f"{part}.sources.path")
        except UserError:  # a start needs none of the files of its source any more
            return []
        said = settings.get("num_attention_heads")
        return [said] if isinstance(said, int) else []

    return heads


_OF_RUNS: dict[str, Callable[[ModelConfig], Heads]] = {
    "vision": _of_vision,
    "connector": _of_connector,
    "qformer": _of_bert("qformer"),
    "text": _of_bert("text"),
}
