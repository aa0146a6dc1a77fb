"""The captioner and the filter.

Shape legend: B pictures, H and W pixels, N pairs of a picture and a text.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from instructblip.capfilt.pictures import Fit
from instructblip.capfilt.settings import CAPTIONERS
from instructblip.config.schema import CapFiltConfig
from instructblip.errors import UserError
from instructblip.evaluation.suite import model_identity
from instructblip.models.base import Model
from instructblip.models.clip import CLIP
from instructblip.models.fingerprint import fingerprint, fingerprint_tensors
from instructblip.weights.clip import find_clip, load_clip
from instructblip.weights.load import LoadedModel, Source, find_source, frozen_fingerprints, load_model
from instructblip.weights.parts import MODELS

logger = logging.getLogger(__name__)


class Judge(Protocol):
    """Says how well pictures and texts go together."""

    fit: Fit

    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """Whatever it needs of each picture: a tensor of B rows."""

    def score(self, encoded: Tensor, texts: Sequence[str]) -> Tensor:
        """A number (N,) for each row and its text."""


class MatchingJudge:
    """A model of this project, by the probability of its matching head."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.fit = ("resize_square", model.vision.image_size)

    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """Image tokens."""
        return self.model.image_tokens(pixels_B3HW[:, None])

    def score(self, encoded: Tensor, texts: Sequence[str]) -> Tensor:
        """Probabilities."""
        return self.model.match(encoded, list(texts))


class ClipJudge:
    """A CLIP, by the cosine."""

    def __init__(self, clip: CLIP) -> None:
        self.clip = clip
        self.fit = ("center_crop", clip.image_size)

    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """Features of the pictures."""
        return self.clip.encode_images(pixels_B3HW)

    def score(self, encoded: Tensor, texts: Sequence[str]) -> Tensor:
        """Cosines."""
        return (encoded * self.clip.encode_texts(texts)).sum(dim=1)


class Found(NamedTuple):
    """Captioner and filter before anything of their weights is read."""

    captioner: Source
    filter: Source | Path


def find_models(config: CapFiltConfig) -> Found:
    """Find both models.

    Raises:
        UserError: there is none, or one that cannot do its part; a prompt that is missing, or that nothing reads.
    """
    captioner = find_source(config.captioner, config.llm)
    if captioner.kind not in CAPTIONERS:
        raise _unable(
            captioner, f"captioner={config.captioner}", "caption", [kind for kind in MODELS if kind in CAPTIONERS]
        )
    if captioner.kind == "instructblip" and config.prompt is None:
        raise UserError(f"captioner={config.captioner} reads a prompt; give one: prompt='A short image caption:'")
    if captioner.kind == "blip2_stage1" and config.prompt is not None:
        raise UserError(f"captioner={config.captioner} captions without a prompt; leave prompt= out")
    if config.variant == "blip2":
        return Found(captioner, find_clip(config.filter))
    judge = find_source(config.filter)
    able = [kind for kind, model in MODELS.items() if model.match is not Model.match]
    if judge.kind not in able:
        raise _unable(judge, f"filter={config.filter}", "match", able)
    return Found(captioner, judge)


def _unable(source: Source, given: str, call: str, able: Sequence[str]) -> UserError:
    return UserError(f"{given} is of model={source.kind}, which does not {call}; give one of {', '.join(able)}")


@dataclass(frozen=True)
class Models:
    """Both models at work.

    Attributes:
        captioner, judge: see above.
        names: what each was loaded from.
        identities: SHA-256 of all that their answers depend on.
    """

    captioner: Any
    judge: Judge
    names: Mapping[str, str]
    identities: Mapping[str, str]

    @property
    def fits(self) -> set[Fit]:
        """How pictures are shown to them."""
        return {("resize_square", self.captioner.vision.image_size), self.judge.fit}


def load_models(config: CapFiltConfig, found: Found, device: str) -> Models:
    """Load both models; once, where they are the same.

    Raises:
        UserError: files that do not fit, a part that was never trained, or no head for what is asked.
    """
    captioner = _load(found.captioner, config, device, llm=True)
    _refuse_headless(captioner, "generate", f"captioner={config.captioner}")
    names, identities = {"captioner": captioner.name}, {"captioner": _identity(captioner.model)}
    judge: Judge
    if isinstance(found.filter, Path):
        clip = load_clip(found.filter, device)
        names["filter"], identities["filter"] = config.filter, fingerprint(clip.model)
        judge = ClipJudge(clip)
    else:
        same = found.filter == found.captioner
        if same:
            logger.warning("captioner and filter are one model: the paper saw it keep most of its own mistakes")
        other = captioner if same else _load(found.filter, config, device, llm=False)
        _refuse_headless(other, "match", f"filter={config.filter}")
        names["filter"], identities["filter"] = other.name, _identity(other.model)
        judge = MatchingJudge(other.model)
    return Models(captioner.model, judge, names, identities)


def _load(source: Source, config: CapFiltConfig, device: str, *, llm: bool) -> LoadedModel:
    # A transformers folder has all of its parts.
    paths = {"vision_path": config.vision_path, "qformer_path": config.qformer_path}
    given = {} if source.format == "huggingface" else paths
    return load_model(source, llm=config.llm if llm else None, device=device, **given)


def _refuse_headless(loaded: LoadedModel, call: str, given: str) -> None:
    if call not in loaded.model.calls():
        raise UserError(f"{given} has no head to {call} with; it can {', '.join(loaded.model.calls())}")
    if loaded.standing.untrained:
        raise UserError(f"{given}: {', '.join(loaded.standing.untrained)} was never trained; train it first")


def _identity(model: Model) -> str:
    return model_identity(model, frozen_fingerprints(model), fingerprint_tensors(model.held_state()))
