"""What a run of a model needs whose connector is no Q-Former: `flops.py` and `memory.py` for those.

torch counts both of a connector, on the meta device: its FLOPs, and what autograd keeps of a frame's pass in float32. Under
bfloat16 a part of that is half as large, so the plan is on the safe side.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from instructblip.models.connector import Connector
from instructblip.models.vision import VisionEncoder
from instructblip.training.plan.flops import (
    LanguageShape,
    ModelShape,
    PartFlops,
    SampleLengths,
    StepWorkload,
    adapter_shares,
    image_flops,
    language_shape,
)
from instructblip.training.plan.memory import LOGITS, VISION, LanguagePlan, PlanLayout, PlannedPhase
from instructblip.weights.modules import ConnectorParts

_CONNECTOR, _LLM = "activations, connector", "activations, language model"


@dataclass(frozen=True)
class ConnectorShape(ModelShape):
    """That of a model with a connector, which reads no text, in front of a language model.

    Attributes:
        connector_flops: of a frame through it.
        unneeded_flops: of a frame's backward pass, of image tokens' gradient that nothing needs.
        recomputes: activation checkpointing repeats its layers; without any there is nothing to repeat.
        frame_tokens: it gives.
        language: of the LLM.
    """

    usual = SampleLengths(35, 16)  # as with a Q-Former
    connector_flops: float
    unneeded_flops: float
    recomputes: bool
    frame_tokens: int
    language: LanguageShape

    @property
    def visual_tokens(self) -> int:
        """The connector's."""
        return self.frame_tokens

    def by_part(self, work: StepWorkload, outputs: Collection[str]) -> list[PartFlops]:
        """The LLM's layers take part in `answer_logits` alone."""
        connector = self._behind_vision("connector", "connector", self.connector_flops * work.frames)
        backward = connector.backward - self.unneeded_flops * work.frames
        recompute = connector.recompute and self.recomputes
        return [
            self._vision_flops(work),
            connector._replace(backward=backward, recompute=recompute),
            *self.language.by_part(work, runs="answer_logits" in outputs, gradients=self._gradients("llm")),
        ]

    def sample_work(self, lengths: SampleLengths) -> StepWorkload:
        """The prompt reaches the LLM alone."""
        positions = self.language.positions(self.frame_tokens, lengths)
        return StepWorkload(samples=1, frames=1, encoded=1, positions=positions, answers=lengths.answer)


def connector_shape(
    vision: VisionEncoder,
    norm: nn.Module,
    connector: Connector,
    llm: Any,
    trained: Collection[str] = ("connector",),
    shares: Mapping[str, float] = MappingProxyType({}),
) -> ConnectorShape:
    """The shape of these parts, whose weights are not looked at; arguments as of `model_shape`."""
    return ConnectorShape(
        image_flops=image_flops(vision),
        image_tokens=vision.tokens,
        trained=frozenset(trained),
        shares=shares,
        connector_flops=frame_flops(connector, vision.tokens, vision.width),
        unneeded_flops=unneeded_flops(norm, connector, trained),
        recomputes=bool(connector.layers()),
        frame_tokens=connector.tokens,
        language=language_shape(llm),
    )


def frame_flops(connector: Connector, image_tokens: int, vision_width: int) -> float:
    """FLOPs of a frame's image tokens through a connector, which may be on any device."""
    empty = copy.deepcopy(connector).to("meta").requires_grad_(False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        empty(torch.zeros(1, image_tokens, vision_width, device="meta"))
    return float(counter.get_total_flops())


def unneeded_flops(norm: nn.Module, connector: Connector, trained: Collection[str]) -> float:
    """FLOPs of a frame's gradient for what the first layer reads, where neither encoder nor norm in front of it trains."""
    if "connector" not in trained or "vision" in trained or any(True for _ in norm.parameters()):
        return 0.0
    first = connector.first
    return 2.0 * connector.patches.tokens * first.weight.numel() if isinstance(first, nn.Linear) else 0.0


@dataclass(frozen=True)
class ConnectorPlan(LanguagePlan):
    """Of a run of a model whose connector is no Q-Former."""

    shape: ConnectorShape
    parts: ConnectorParts

    @property
    def llm(self) -> Any:
        """A transformers model."""
        return self.parts.llm

    def _text_part(self) -> tuple[str, str, nn.Module]:
        return "connector", "connector", nn.ModuleList([self.parts.norm, self.parts.connector])

    def _activities(self) -> list[str]:
        every = (VISION, _CONNECTOR, _LLM, LOGITS)
        return [part for part in every if part != VISION or "vision" in self.layout.trained]

    def _kept(self, part: str, work: StepWorkload, phase: PlannedPhase) -> float:
        if part == VISION:
            return self._vision_kept(work)
        if part == _CONNECTOR:
            if not self.shape.passes_gradients("connector"):
                return 0.0
            norm = 4.0 * self.shape.image_tokens * self.vision.width
            return work.frames * (norm + self._frame_kept())
        if "answer_logits" not in phase.outputs:
            return 0.0
        return self._llm_logits_kept(work) if part == LOGITS else self._llm_kept(work)

    def _frame_kept(self) -> float:
        """Of a frame's pass; with activation checkpointing one layer's, and what enters each."""
        connector, layers = self.parts.connector, len(self.parts.connector.layers())
        whole = kept_bytes(connector, torch.zeros(1, self.shape.image_tokens, self.vision.width, device="meta"))
        if not self.layout.activation_checkpointing or not layers:
            return whole
        return whole / layers + layers * 4.0 * connector.tokens * connector.output.in_features


def kept_bytes(module: nn.Module, *inputs: Tensor) -> float:
    """What autograd keeps of a module's pass for its backward pass, without weights."""
    weights = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no later one takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(*inputs)
    return float(sum(storage.nbytes() for place, storage in kept.items() if place not in weights))


def plan_connector(parts: ConnectorParts, phases: Sequence[PlannedPhase], layout: PlanLayout) -> ConnectorPlan:
    """The plan of a run of these parts, which may be on the meta device."""
    shares = adapter_shares({"vision": [parts.vision.backbone], "llm": [parts.llm]})
    shape = connector_shape(parts.vision, parts.norm, parts.connector, parts.llm, layout.trained, shares)
    return ConnectorPlan(vision=parts.vision, shape=shape, phases=tuple(phases), layout=layout, parts=parts)
