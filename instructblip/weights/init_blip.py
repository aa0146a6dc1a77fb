"""The start of a BLIP from weights that are not its own: what fits is taken, what is new is said.

All models of BLIP meet under LAVIS's names (`blip.py`): captioner, answerer and retriever find in a pre-trained one what
they need, as the released code's do. A decoder of questions reads states where the pre-trained one reads image tokens; where
both are of one width its cross-attention starts from that, else it is new.
"""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from instructblip.errors import UserError
from instructblip.models.blip import BLIP, BLIPRetrieval, Momentum
from instructblip.weights.blip import fit_positions, meeting_names, shaped
from instructblip.weights.init_from import VISION_NORM, Begun
from instructblip.weights.init_sources import StartWeights
from instructblip.weights.start import Start

VISION, MOMENTUM, QUEUE, QUEUE_IDS = "vision encoder", "momentum copies", "queue", "image ids of the queue"
_ENCODER, _DECODER, _HEAD, _CROSS = "text encoder", "text decoder", "language-model head", "cross-attention"
# What a tensor belongs to, by this code's names; the first that matches.
_PLACES = {
    VISION: re.compile(r"vision\."),
    VISION_NORM: re.compile(r"vision_norm\."),  # of a CNN
    QUEUE_IDS: re.compile(r"momentum\.image_id_queue$"),  # pre-training has none
    QUEUE: re.compile(r"momentum\.(image_queue|text_queue|pointer)$"),
    MOMENTUM: re.compile(r"momentum\."),
    _HEAD: re.compile(r"text_\w+\.lm_head\."),
    _CROSS: re.compile(r"text_\w+\.layers\.\d+\.cross_attention\."),
    _ENCODER: re.compile(r"text_encoder\."),
    _DECODER: re.compile(r"text_decoder\."),
    "projections": re.compile(r"(vision|text)_projection\."),
    "matching head": re.compile(r"matching_head\."),
    "temperature": re.compile(r"temperature$"),
}
_WHOLE = (VISION, _ENCODER, _DECODER)  # of which a part alone makes no sense


def start_blip_from(model: BLIP, weights: Sequence[StartWeights]) -> Begun:
    """Put weights into a model that was built from its configuration; later ones lie over earlier ones.

    Args:
        model: on the CPU, not wrapped yet.
        weights: one at least, of any model of BLIP.

    Raises:
        UserError: nothing that this model has, or a vision encoder or text model of other sizes.
    """
    last, tensors = weights[-1], dict[str, Tensor]()
    for found in weights:
        tensors |= found.tensors
    taken, new = _fitting(model, fit_positions(model, tensors), last)
    model.load_state_dict(taken, strict=False)
    if any(name.startswith("vision.") for name in taken):
        model.held_parts |= {"vision"}  # no file of the run's configuration has it
    lines = [f"starting from {_names(weights)}: {', '.join(_places(taken))}"]
    if isinstance(model, BLIPRetrieval) and isinstance(model.momentum, Momentum) and MOMENTUM in new:
        model.momentum.copy_from(model)
        lines.append(f"{MOMENTUM} start as what they follow")
        new.remove(MOMENTUM)
    if VISION in new and "vision" in last.frozen:
        new.remove(VISION)  # of the configured files, as there
    lines += [f"new: {', '.join(new)}"] if new else []
    start = Start(
        weights=tuple({"source": w.source.given, "name": w.source.name, "sha256": w.sha256} for w in weights),
        new=(*new, *(place for place in last.untrained if place not in new)),
    )
    return Begun(start, lines, frozen=last.frozen)


def start_blip_new(model: BLIP) -> Start:
    """Of a model without weights to start from: all that no part's own files hold is new."""
    drawn = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("momentum.")}
    return Start(new=tuple(place for place in _places(drawn) if place not in _WHOLE))


def _fitting(model: BLIP, tensors: Mapping[str, Tensor], last: StartWeights) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors that the model takes, under this code's names, and the places that stay new, in part or as a whole."""
    names, taken, lacking = meeting_names(model.state_dict()), dict[str, Tensor](), dict[str, str]()
    for name, own in model.state_dict().items():
        found = tensors.get(names[name])
        found = None if found is None else shaped(found, own.shape)
        if found is not None and found.shape == own.shape:
            taken[name] = found
        else:
            lacking.setdefault(_place(name), _unlike(name, own, found))
    if QUEUE in lacking:  # features, their images and the place of the oldest belong together
        taken = {name: tensor for name, tensor in taken.items() if _place(name) not in (QUEUE, QUEUE_IDS)}
        lacking.setdefault(QUEUE_IDS, "")
    filled = set(_places(taken))
    if not filled & {VISION, _ENCODER, _DECODER}:
        raise UserError(f"init_from={last.source.given} holds nothing that {model.title} has; give weights of BLIP")
    for place in _WHOLE:
        theirs = any(names[name] in tensors for name in names if _place(name) == place)
        if place in lacking and theirs:
            raise UserError(
                f"init_from={last.source.given}: {lacking[place]}; choose the vision= and text= that it was trained with"
            )
    return taken, list(lacking)


def _unlike(name: str, own: Tensor, found: Tensor | None) -> str:
    if found is None:
        return f"it lacks {name}"
    return f"{name} is {tuple(found.shape)}, this model needs {tuple(own.shape)}"


def _place(name: str) -> str:
    return next(place for place, pattern in _PLACES.items() if pattern.match(name))


def _places(names: Mapping[str, Tensor]) -> list[str]:
    return list(dict.fromkeys(map(_place, names)))


def _names(weights: Sequence[StartWeights]) -> str:
    return " overlaid by ".join(f"{found.source.given} (sha256 {found.sha256[:12]})" for found in weights)
