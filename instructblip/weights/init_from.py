"""The start of a run from weights that are not its own: the parts that fit are taken, what is new is said.

It is no resume: the run begins at step 0. From then on its checkpoints hold all that was taken and comes from no file of
the run's configuration, so that resuming needs the source no more.
"""

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from instructblip.config.schema import LLMConfig, QFormerConfig
from instructblip.errors import UserError
from instructblip.models.adapters import is_adapter, without_adapters
from instructblip.models.base import Model
from instructblip.models.fingerprint import fingerprint_tensors
from instructblip.models.vision_language import VisionLanguageModel
from instructblip.weights.init_sources import CONNECTOR_OUTPUT, StartWeights
from instructblip.weights.partner import declared, said_partner
from instructblip.weights.position import resize_position_embedding
from instructblip.weights.start import NO_LLM, PROJECTION, QFORMER, Start, not_aligned

_MOST_ADDED = 16  # tokens that a Q-Former's table may have beyond BERT's
_SAMPLED = 64  # values of each tensor that tell one language model from another

# What a model may have and weights to start from may not, or in another shape: it stays as it was drawn.
VISION_NORM = "vision norm"
_CROSS_ATTENTION, _TEXT_BRANCH, _LM_HEAD = "cross-attention keys and values", "text branch", "language-model head"
_HEADS = ("vision_projection", "text_projection", "matching_head", "temperature")
_PLACES = {
    VISION_NORM: re.compile(r"vision_norm\."),
    _CROSS_ATTENTION: re.compile(r"qformer\.layers\.\d+\.cross_attention\.(key|value)\."),
    _TEXT_BRANCH: re.compile(r"qformer\.(word_embeddings|position_embeddings|layers\.\d+\.text_ffn)\."),
    _LM_HEAD: re.compile(r"qformer\.lm_head\."),
    QFORMER: re.compile(r"qformer\."),
    PROJECTION: re.compile(r"(projection|connector\.output)\."),  # the last layer of any connector
}
_TITLES = {"vision": "vision encoder", "llm": "language model"}
_CONNECTOR = ("connector.", "vision_norm.")
_TOKEN_TABLES = ("qformer.word_embeddings.weight", "qformer.lm_head.bias")


@dataclass(frozen=True)
class Begun:
    """What `start_from` did.

    Attributes:
        start: for the record.
        lines: for the user, one a fact.
        text_branch: tensors of the Q-Former that a later stage needs, and this model has no place for.
        frozen: fingerprints of the frozen parts that the weights were trained with, as far as a run names them by that.
    """

    start: Start
    lines: list[str] = field(default_factory=list)
    text_branch: dict[str, Tensor] = field(default_factory=dict)
    frozen: dict[str, str] = field(default_factory=dict)


def start_from(
    model: Model, weights: Sequence[StartWeights], qformer: QFormerConfig | None, llm: LLMConfig | None
) -> Begun:
    """Put weights into a model that was built from its configuration; later ones lie over earlier ones.

    Args:
        model: on the CPU, not wrapped yet.
        weights: one at least.
        qformer, llm: what it was built from; no Q-Former where it has another connector.

    Raises:
        UserError: weights of another Q-Former, without a text branch that is needed, or in an order that makes no sense.
    """
    everything, last = _laid_over(weights, qformer=qformer is not None), weights[-1]
    tensors = without_adapters(everything)
    fitted = _fit_connector(model, tensors, last) if qformer is None else _fit_qformer(model, tensors, qformer, last)
    model.load_state_dict(fitted.taken, strict=False)
    lines = [f"starting from {_names(weights)}: {', '.join(_places(fitted.taken))}"]
    lines += [f"new: {', '.join(fitted.new.values())}"] if fitted.new else []
    lines += [f"left out, since this model has none: {', '.join(_places(fitted.left))}"] if fitted.left else []
    lines += _take_own(model, "vision", tensors, last)
    if llm is not None and last.partner is not None and last.partner.name == llm.name:
        lines += _take_own(model, "llm", tensors, last)
    lines += _take_adapters(model, everything, last, llm)
    lines += [
        f"left out: the adapters of {found.source.given}, over which others lie"
        for found in weights[:-1]
        if found.adapters
    ]
    aligned_to = None if llm is None else _aligned_to(model, last, said_partner(qformer), llm)
    if llm is not None and aligned_to is not None:
        fits = PROJECTION not in fitted.new
        lines.append(not_aligned(aligned_to, llm.name, projection_fits=fits, qformer=qformer is not None))
    text_branch = {name: tensor for name, tensor in fitted.left.items() if _place(name) == _TEXT_BRANCH}
    untrained = [place for place in last.untrained if place not in fitted.new]
    start = Start(
        weights=tuple({"source": w.source.given, "name": w.source.name, "sha256": w.sha256} for w in weights),
        new=(*fitted.new, *untrained),
        aligned_to=aligned_to,
        text_branch=fingerprint_tensors(text_branch) if text_branch else None,
    )
    return Begun(start, lines, text_branch, last.frozen)


def start_new(model: Model) -> Start:
    """Of a model without weights to start from: all that no part's own files hold is new."""
    part = "qformer" if "qformer" in model.PARTS else "connector"
    return Start(new=tuple(_places(model.part_state(part))), aligned_to=NO_LLM if "llm" in model.PARTS else None)


# --- several sources -------------------------------------------------------------------------------------------------


def _laid_over(weights: Sequence[StartWeights], *, qformer: bool) -> dict[str, Tensor]:
    """The tensors of all sources, those of later ones in place of earlier ones.

    Raises:
        UserError: a source without the wanted kind of connector, one of which nothing is left, or a projection from under
            another Q-Former.
    """
    tensors: dict[str, Tensor] = {}
    mark, what = ("qformer.query_tokens", "Q-Former") if qformer else (CONNECTOR_OUTPUT, "connector but a Q-Former")
    for found in weights:
        if mark not in found.tensors:
            raise UserError(f"init_from={found.source.given} holds no {what}; give weights of one")
    for lower, upper in itertools.pairwise(weights):
        tensors |= lower.tensors
        if "projection.weight" in tensors and "projection.weight" not in upper.tensors:
            raise UserError(
                f"init_from: {upper.source.given} holds no projection, as BLIP-2's first stage, and would lie over the "
                f"second stage of {lower.source.given}; give the first stage first: init_from=[STAGE1, STAGE2]"
            )
        if tensors.keys() <= upper.tensors.keys():
            raise UserError(
                f"init_from: nothing of {lower.source.given} is left under {upper.source.given}; leave it out"
            )
    return tensors | weights[-1].tensors


def _names(weights: Sequence[StartWeights]) -> str:
    return " overlaid by ".join(f"{found.source.given} (sha256 {found.sha256[:12]})" for found in weights)


# --- Q-Former, projection, heads -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Fitted:
    """Attributes: taken, left: tensors; new: places of the model that stay as they are, each with a remark."""

    taken: dict[str, Tensor]
    left: dict[str, Tensor]
    new: dict[str, str]


def _fit_qformer(model: Model, tensors: Mapping[str, Tensor], config: QFormerConfig, last: StartWeights) -> _Fitted:
    """What of the tensors fits the model's part `qformer`, and what of that part they do not hold."""
    expected = without_adapters(model.part_state("qformer"))
    taken, new = {}, {}
    for name, own in expected.items():
        place, found = _place(name), tensors.get(name)
        if found is not None and name in _TOKEN_TABLES:
            found = _fit_rows(found, own, config)
        if found is not None and found.shape == own.shape:
            taken[name] = found
        elif _may_be_new(place, missing=found is None, config=config):
            new[place] = _remark(place, own, found)
        else:
            raise UserError(_other_qformer(name, own, found, last, place))
    own_places = model.PARTS["qformer"]
    left = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in expected and name.partition(".")[0] in {*own_places, *_HEADS, PROJECTION}
    }
    for name in left:
        if _place(name) == QFORMER:
            raise UserError(_other_qformer(name, None, tensors[name], last, QFORMER))
    # A place that is new in part is new as a whole.
    return _Fitted(
        {name: tensor for name, tensor in taken.items() if _place(name) not in new},
        {name: tensor for name, tensor in left.items() if _place(name) not in new},
        new,
    )


def _fit_connector(model: Model, tensors: Mapping[str, Tensor], last: StartWeights) -> _Fitted:
    """The same of another connector; its last layer stays as it was drawn where it leads into another width."""
    expected, taken, new = model.part_state("connector"), {}, {}
    where = f"init_from={last.source.given}"
    for name, own in expected.items():
        place, found = _place(name), tensors.get(name)
        if found is not None and found.shape == own.shape:
            taken[name] = found
        elif place == VISION_NORM or (place == PROJECTION and found is not None):
            new[place] = _remark(place, own, found)
        else:
            there = "has none" if found is None else f"is {tuple(found.shape)} there"
            raise UserError(
                f"{where}: {name} of {tuple(own.shape)} {there}; choose the connector= and connector.* that it was trained "
                "with"
            )
    left = {name: tensor for name, tensor in tensors.items() if name not in expected and name.startswith(_CONNECTOR)}
    if other := [name for name in left if _place(name) != VISION_NORM]:
        raise UserError(
            f"{where} has {other[0]} and this connector has not; choose the connector= that it was trained with"
        )
    return _Fitted({name: tensor for name, tensor in taken.items() if _place(name) not in new}, left, new)


def _place(name: str) -> str:
    """What a tensor of the part `qformer` belongs to, in the words of `_PLACES`, else the first part of its name."""
    return next((place for place, pattern in _PLACES.items() if pattern.match(name)), name.partition(".")[0])


def _places(names: Collection[str]) -> list[str]:
    found = dict.fromkeys(_place(name) for name in names)
    if QFORMER in found:
        found.pop(_CROSS_ATTENTION, None)
    return list(found)


def _may_be_new(place: str, *, missing: bool, config: QFormerConfig) -> bool:
    """Whether a place that weights do not fill may stay as it was drawn: with most of a Q-Former it would be another."""
    if place == _TEXT_BRANCH:
        return missing and config.init == "bert"
    if place == _CROSS_ATTENTION:
        return not missing
    return place in (PROJECTION, VISION_NORM, _LM_HEAD, *_HEADS)


def _remark(place: str, own: Tensor, found: Tensor | None) -> str:
    if place == PROJECTION and found is not None:
        return f"projection (into width {own.shape[0]}, there it leads into {found.shape[0]})"
    if place in (_CROSS_ATTENTION, VISION_NORM) and found is not None:
        return f"{place} (image tokens of width {own.shape[-1]}, there {found.shape[-1]})"
    return f"{place} (BERT's)" if place == _TEXT_BRANCH else place


def _fit_rows(found: Tensor, own: Tensor, config: QFormerConfig) -> Tensor:
    """A table of tokens with the model's number of rows: tokens that were added to BERT's stand at its end."""
    bert = len(own) - len(config.extra_tokens)
    if len(found) == len(own) or found.shape[1:] != own.shape[1:] or not bert <= len(found) <= bert + _MOST_ADDED:
        return found
    return torch.cat([found[: len(own)].to(own.dtype), own[len(found) :]])


def _other_qformer(name: str, own: Tensor | None, found: Tensor | None, last: StartWeights, place: str) -> str:
    """Why weights of another Q-Former are refused, and what to do."""
    where = f"init_from={last.source.given}"
    if place == _TEXT_BRANCH and found is None:
        return (
            f"{where} has no text branch ({name}), which BLIP-2's second stage leaves out; give the first stage too: "
            "init_from=[STAGE1, STAGE2], or set qformer.instruction_aware=false"
        )
    if own is None or found is None:
        has, lacks = (where, "this Q-Former") if own is None else ("this Q-Former", where)
        what = f"{has} has {name} and {lacks} has not"
    else:
        what = f"{where}: {name} is {tuple(found.shape)}, this Q-Former needs {tuple(own.shape)}"
    return f"{what}, so little would be left of it; choose the qformer= and qformer.* that it was trained with"


# --- vision encoder and language model -------------------------------------------------------------------------------


def _take_own(model: Model, part: str, tensors: Mapping[str, Tensor], last: StartWeights) -> list[str]:
    """Take the vision encoder or the LLM of weights that hold it, where it is another than the model's own.

    No file of the run's configuration has it then: checkpoints hold it, trained or not.
    """
    found = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}
    if not found:
        return []
    own = without_adapters(model.part_state(part))
    if part == "vision":
        _fit_positions(model.vision.backbone, found)
    needed = {name for name in own if part != "vision" or name.startswith("vision.backbone.")}  # not image statistics
    misfit = [name for name, tensor in found.items() if name not in own or own[name].shape != tensor.shape]
    if misfit or not needed <= found.keys():
        return [f"left out: the {_TITLES[part]} of {last.source.given}, which has other sizes than {part}= has"]
    if all(torch.equal(own[name], tensor.to(own[name].dtype)) for name, tensor in found.items()):
        return []
    model.load_state_dict(found, strict=False)
    model.held_parts |= {part}
    return [f"taken too: the {_TITLES[part]} of {last.source.given}, which differs from {part}='s; checkpoints hold it"]


def _take_adapters(model: Model, tensors: Mapping[str, Tensor], last: StartWeights, llm: LLMConfig | None) -> list[str]:
    """Take over the adapters of the last source: what is beside them was trained with them.

    Raises:
        UserError: they are not like the model's own.
    """
    lines = []
    for part, theirs in last.adapters.items():
        if part == "llm" and (llm is None or last.partner is None or last.partner.name != llm.name):
            lines.append(f"left out: the adapters of {last.source.given} on another LLM")
            continue
        own, like = model.adapters.get(part), {"rank", "alpha", "targets"}
        if own is None or any(getattr(own, name) != getattr(theirs, name) for name in like):
            raise UserError(
                f"init_from={last.source.given} was trained with adapters on its {part}; go on with them: train.{part}=lora "
                f"train.lora.{part}.rank={theirs.rank} train.lora.{part}.alpha={theirs.alpha:g} "
                f"'train.lora.{part}.targets=[{','.join(theirs.targets)}]'"
            )
        found = {name: tensor for name, tensor in tensors.items() if is_adapter(name) and model.part_of(name) == part}
        model.load_state_dict(found, strict=False)
        lines.append(f"taken too: the adapters on the {part}")
    return lines


def differing_parts(begun: Begun, frozen: Mapping[str, str]) -> list[str]:
    """A line for each frozen part of a run that is another than its weights to start from were trained with."""
    return [
        f"the {_TITLES[part]} is not the one that these weights were trained with: other files, type or image size"
        for part, sha256 in begun.frozen.items()
        if frozen.get(part, sha256) != sha256
    ]


def _fit_positions(backbone: Any, found: dict[str, Tensor]) -> None:
    own, theirs = getattr(backbone, "pos_embed", None), found.get("vision.backbone.pos_embed")
    if own is None or theirs is None or own.shape == theirs.shape or theirs.shape[-1] != own.shape[-1]:
        return
    patches = tuple(backbone.patch_embed.grid_size)
    prefix = own.shape[1] - patches[0] * patches[1]
    found["vision.backbone.pos_embed"] = resize_position_embedding(theirs, patches, prefix_tokens=prefix)


def _aligned_to(model: Model, last: StartWeights, name: str | None, llm: LLMConfig) -> str | None:
    """The language model that the connector was trained beside, where it is not the model's; `name` as the user gave it."""
    partner = declared(last.partner, name)
    if partner is None:
        return NO_LLM
    assert isinstance(model, VisionLanguageModel)
    width = model.llm.width
    if other := partner.other_than(llm, width):
        return other
    if _differs(partner.weights, model.part_state("llm")):
        return f"the LLM of {last.source.name}"
    return None


def _differs(theirs: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    """Whether two language models differ in the first values of any tensor that both hold in floating point."""
    for name, tensor in theirs.items():
        other = own.get(name)
        if other is None or not other.is_floating_point() or other.shape[1:] != tensor.shape[1:]:
            continue  # quantised, or of a table that was resized
        few, as_many = (flat.flatten()[:_SAMPLED] for flat in (tensor, other))
        if not torch.equal(few.to(other.dtype), as_many):
            return True
    return False
