"""FLOPs of a step of BLIP: what `flops.py` is for models with a Q-Former.

A text model runs in several ways, each a pass over rows of text, of which some read image tokens or a question's states:
every layer then makes keys and values of them.
"""

from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn

from instructblip.models.med import TextLayer, TextModel
from instructblip.models.vision import VisionEncoder
from instructblip.objectives.distillation import COPIES
from instructblip.training.plan.flops import (
    ModelShape,
    PartFlops,
    SampleLengths,
    StepWorkload,
    image_flops,
    matrices,
    size_of,
)


class TextPass(NamedTuple):
    """What goes through a text model in one of its passes, summed over the pass's rows.

    Attributes:
        model: its layers, whose weights are not looked at.
        rows: texts, or pairs of a text and an image.
        text: their tokens.
        image, states: positions that each row reads, of an image or of a question; 0 in a text encoder.
    """

    model: TextModel
    rows: float
    text: float
    image: float = 0.0
    states: float = 0.0


@dataclass(frozen=True)
class BLIPShape(ModelShape):
    """That of BLIP; what is particular to a task is in its kind."""

    def by_part(self, work: StepWorkload, outputs: Collection[str]) -> list[PartFlops]:
        """What the momentum copies compute has no backward pass."""
        passes = self.text_passes(work, outputs)
        text = self._trainable("text models and heads", sum(map(_text_flops, passes)) + self.head_flops(work, outputs))
        if "vision" not in self.trained:  # image tokens need no gradient
            text = text._replace(backward=text.backward - sum(map(_image_flops, passes)))
        return [
            self._vision_flops(work),
            text,
            self._trainable("logits of the answers", self.logit_flops(work, outputs))._replace(recompute=False),
        ]

    @abstractmethod
    def text_passes(self, work: StepWorkload, outputs: Collection[str]) -> list[TextPass]:
        """What goes through the text models for these outputs."""

    @abstractmethod
    def logit_flops(self, work: StepWorkload, outputs: Collection[str]) -> float:
        """Of the language-model head, at supervised tokens."""

    def head_flops(self, work: StepWorkload, outputs: Collection[str]) -> float:
        """Of projections."""
        return 0.0

    def _trainable(self, part: str, forward: float) -> PartFlops:
        """A part of the text models'."""
        return self._behind_vision(part, "text", forward)


@dataclass(frozen=True)
class CaptionShape(BLIPShape):
    """Of a captioner.

    Attributes:
        decoder: what writes.
        prompt: tokens before a caption, which are not learnt.
    """

    usual = SampleLengths(0, 17)  # a caption of COCO with the prompt's 4 tokens, and [SEP]
    decoder: TextModel
    prompt: int

    def sample_work(self, lengths: SampleLengths) -> StepWorkload:
        """Prompt and caption are one text."""
        text = lengths.answer
        return StepWorkload(samples=1, frames=1, encoded=1, text=text, positions=text, answers=text - self.prompt)

    def text_passes(self, work: StepWorkload, outputs: Collection[str]) -> list[TextPass]:
        """One, over prompt and caption."""
        return [TextPass(self.decoder, work.samples, work.text, self.image_tokens)]

    def logit_flops(self, work: StepWorkload, outputs: Collection[str]) -> float:
        """At the captions' tokens."""
        return 2.0 * (work.text - self.prompt * work.samples) * _words(self.decoder)


@dataclass(frozen=True)
class AnswerShape(BLIPShape):
    """Of a model for questions.

    Attributes:
        encoder: of questions.
        decoder: of answers; a question's are counted as one row.
    """

    usual = SampleLengths(10, 9)  # three answers of two words and [SEP]
    encoder: TextModel
    decoder: TextModel

    def sample_work(self, lengths: SampleLengths) -> StepWorkload:
        """All answers to a question together."""
        prompt, answer = lengths
        return StepWorkload(samples=1, frames=1, encoded=1, text=prompt, positions=answer, answers=answer)

    def text_passes(self, work: StepWorkload, outputs: Collection[str]) -> list[TextPass]:
        """Questions read images, answers questions."""
        question = work.text / max(work.samples, 1)
        return [
            TextPass(self.encoder, work.samples, work.text, self.image_tokens),
            TextPass(self.decoder, work.samples, work.positions, states=question),
        ]

    def logit_flops(self, work: StepWorkload, outputs: Collection[str]) -> float:
        """At the answers' tokens."""
        return 2.0 * work.positions * _words(self.decoder)


@dataclass(frozen=True)
class PairShape(BLIPShape):
    """Of retrieval and of pre-training.

    Attributes:
        encoder: of texts and pairs; in pre-training it writes too.
        heads: parameters of the projections of both sides.
    """

    usual = SampleLengths(0, 14)  # a caption of COCO with [CLS] and [SEP]
    encoder: TextModel
    heads: int

    def sample_work(self, lengths: SampleLengths) -> StepWorkload:
        """One text."""
        text = lengths.answer
        return StepWorkload(samples=1, frames=1, encoded=1, text=text, positions=text, answers=text - 1)

    def by_part(self, work: StepWorkload, outputs: Collection[str]) -> list[PartFlops]:
        """With the momentum copies, where their outputs are among these."""
        parts = super().by_part(work, outputs)
        if COPIES & set(outputs):
            parts.append(PartFlops("momentum copies", self._features(work), 0.0, recompute=False))
        return parts

    def text_passes(self, work: StepWorkload, outputs: Collection[str]) -> list[TextPass]:
        """Texts alone, three pairs a sample, and texts as captions."""
        wanted, passes = set(outputs), []
        if "text_projected" in wanted:
            passes.append(TextPass(self.encoder, work.samples, work.text))
        if "match_logits" in wanted:
            passes.append(TextPass(self.encoder, 3 * work.samples, 3 * work.text, self.image_tokens))
        if "answer_logits" in wanted:
            passes.append(TextPass(self.encoder, work.samples, work.text, self.image_tokens))
        return passes

    def logit_flops(self, work: StepWorkload, outputs: Collection[str]) -> float:
        """At all tokens but the first."""
        return 2.0 * (work.text - work.samples) * _words(self.encoder) if "answer_logits" in outputs else 0.0

    def head_flops(self, work: StepWorkload, outputs: Collection[str]) -> float:
        """Of both sides."""
        return 2.0 * work.samples * self.heads if "text_projected" in outputs else 0.0

    def repeated(self, work: StepWorkload, outputs: Collection[str]) -> float:
        """Features of images and texts, and the images of wrong pairs where their encoder trains."""
        if not {"image_projected", "match_logits"} & set(outputs):
            return 0.0
        wrong = 3 * self._images(work) if "match_logits" in outputs else 0.0
        return self._features(work) + wrong

    def _features(self, work: StepWorkload) -> float:
        text = _text_flops(TextPass(self.encoder, work.samples, work.text))
        return self._images(work) + text + 2.0 * work.samples * self.heads

    def _images(self, work: StepWorkload) -> float:
        """A frozen encoder's image tokens are kept, and read by the copies too."""
        return self.image_flops * work.encoded if "vision" in self.trained else 0.0


class TextParts(NamedTuple):
    """The text part of a BLIP; weights are not looked at.

    Attributes:
        encoder, decoder: None where the model has none; one and the same in pre-training.
        heads: projections and the like, by name.
        prompt: tokens that begin a caption.
    """

    encoder: TextModel | None
    decoder: TextModel | None
    heads: nn.ModuleDict
    prompt: int = 1


def blip_shape(
    vision: VisionEncoder,
    parts: TextParts,
    trained: Collection[str],
    shares: Mapping[str, float] = MappingProxyType({}),
) -> BLIPShape:
    """The shape of a model of these parts.

    Args:
        vision: like the model's, on the meta device; runs once.
        parts: its text part.
        trained: parts that train.
        shares: `adapter_shares` of the model.
    """
    common: dict[str, Any] = {
        "shares": shares,
        "image_flops": image_flops(vision),
        "image_tokens": vision.tokens,
        "trained": frozenset(trained),
    }
    encoder, decoder = parts.encoder, parts.decoder
    if encoder is None:
        assert decoder is not None
        return CaptionShape(**common, decoder=decoder, prompt=parts.prompt)
    if decoder is not None and decoder is not encoder:
        return AnswerShape(**common, encoder=encoder, decoder=decoder)
    heads = sum(size_of(parts.heads[name]) for name in ("vision_projection", "text_projection"))
    return PairShape(**common, encoder=encoder, heads=heads)


def _text_flops(each: TextPass) -> float:
    """Forward pass."""
    if not each.rows:
        return 0.0
    total = 0.0
    for layer in each.model.layers:
        assert isinstance(layer, TextLayer)
        own, cross = layer.self_attention, layer.cross_attention
        total += 2 * each.text * (matrices(own) + matrices(layer.ffn))
        total += 4 * each.text * each.text / each.rows * own.query.out_features
        if source := each.image + each.states:
            total += 2 * each.text * (size_of(cross.query) + size_of(cross.output))
            total += 2 * each.rows * source * (size_of(cross.key) + size_of(cross.value))
            total += 4 * each.text * source * cross.query.out_features
    return total


def _image_flops(each: TextPass) -> float:
    """Of them those that make keys and values of image tokens."""
    total = 0.0
    for layer in each.model.layers:
        assert isinstance(layer, TextLayer)
        total += size_of(layer.cross_attention.key) + size_of(layer.cross_attention.value)
    return 2 * each.rows * each.image * total


def _words(model: TextModel) -> int:
    """Parameters that a token's logits are products with."""
    assert model.lm_head is not None
    return model.word_embeddings.weight.numel() + matrices(model.lm_head)
