"""What a run of BLIP needs: `memory.py`'s plan for models whose text models read image tokens themselves.

Their blocks are the Q-Former's, so they keep what those keep.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from instructblip.models.med import CAPTION_PROMPT, TextLayer, TextModel
from instructblip.training.plan.blip_flops import BLIPShape, TextParts, TextPass, blip_shape
from instructblip.training.plan.flops import StepWorkload, adapter_shares
from instructblip.training.plan.memory import LOGITS, VISION, Plan, PlanLayout, PlannedPhase
from instructblip.weights.modules import BLIPParts

_TEXT = "activations, text models"


@dataclass(frozen=True)
class BLIPPlan(Plan):
    """Of a run of BLIP."""

    shape: BLIPShape
    parts: BLIPParts

    def _text_part(self) -> tuple[str, str, nn.Module]:
        models = [model for model in (self.parts.encoder, self.parts.decoder) if model is not None]
        return "text models and heads", "text", nn.ModuleList([*models, self.parts.heads])

    def _copies(self) -> float:
        parts = self.parts
        if parts.queue_size is None or parts.encoder is None:
            return 0.0
        heads: list[Any] = [parts.heads[name] for name in ("vision_projection", "text_projection")]
        copied = [parts.vision.backbone, *_reading_modules(parts.encoder), *heads]
        width = int(heads[-1].out_features)
        weights = sum(p.numel() for module in copied for p in module.parameters())
        return 4.0 * weights + parts.queue_size * (2 * 4.0 * width + 8.0)

    def _activities(self) -> list[str]:
        return [part for part in (VISION, _TEXT, LOGITS) if part != VISION or "vision" in self.layout.trained]

    def _kept(self, part: str, work: StepWorkload, phase: PlannedPhase) -> float:
        if part == VISION:  # of wrong pairs' images too
            return self._vision_kept(work) * (2 if "match_logits" in phase.outputs else 1)
        if part == LOGITS:
            return self._logits_kept(work, phase)
        passes = self.shape.text_passes(work, phase.outputs)
        layers = [[self._layer_kept(layer, each) for layer in each.model.layers] for each in passes]
        if self.layout.activation_checkpointing:
            states = sum(len(each.model.layers) * 4 * each.model.width * each.text for each in passes)
            return max(map(max, layers)) + states
        return sum(map(sum, layers))

    def _logits_kept(self, work: StepWorkload, phase: PlannedPhase) -> float:
        """In the head's type and in float32, their log-softmax, and the gradients of both."""
        decoder = self.parts.decoder
        if decoder is None or "answer_logits" not in phase.outputs:
            return 0.0
        value = 2 if self.layout.autocast else 4
        return float(work.answers * decoder.word_embeddings.num_embeddings * (2 * value + 12))

    def _layer_kept(self, layer: nn.Module, each: TextPass) -> float:
        """Of each linear layer its input, of attention its inputs and output, the input of norms, masks of dropout."""
        assert isinstance(layer, TextLayer)
        value, width = 2 if self.layout.autocast else 4, each.model.width
        kept = each.text * (value * (8 * width + 2 * layer.ffn.up.out_features) + 10 * width)
        if source := each.image + each.states:
            reads = layer.cross_attention.key.in_features
            kept += each.text * (3 * value + 5) * width + source * each.rows * 2 * value * (width + reads)
        return kept


def plan_blip(
    parts: BLIPParts, phases: Sequence[PlannedPhase], layout: PlanLayout, *, prompt: str = CAPTION_PROMPT
) -> BLIPPlan:
    """The plan of a run of these parts, which may be on the meta device; `prompt` begins every caption."""
    start = 1 + len(prompt.split())  # [DEC], and a token a word
    text = TextParts(parts.encoder, parts.decoder, parts.heads, start)
    models = [model for model in (parts.encoder, parts.decoder) if model is not None]
    shares = adapter_shares({"vision": [parts.vision.backbone], "text": [*models, parts.heads]})
    shape = blip_shape(parts.vision, text, layout.trained, shares)
    return BLIPPlan(vision=parts.vision, shape=shape, phases=tuple(phases), layout=layout, parts=parts)


def _reading_modules(encoder: TextModel) -> list[nn.Module]:
    """What of a text model only reads."""
    modules: list[nn.Module] = [encoder.word_embeddings, encoder.position_embeddings, encoder.norm]
    for layer in encoder.layers:
        assert isinstance(layer, TextLayer)
        modules += [layer.self_attention, layer.cross_attention, layer.ffn]
    return modules
