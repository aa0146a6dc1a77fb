"""What a run needs and how long it takes, from its configuration and a GPU's data sheet: nothing is loaded.

Memory is counted by part. What is static follows from the parts' parameters and types. What a forward pass keeps for the
backward pass follows from which tensors autograd saves; through frozen matrices it saves nothing but weights, so a layer of
the LLM keeps the inputs of its norms, of its attention and of its activation function. Peaks inside kernels and the
allocator's gaps are not counted: a tenth of the GPU is left for them.

Work is `flops.py`'s, for samples of the usual length; memory is also that of the largest forward pass which the
configuration admits, since one such pass ends a run that it does not fit.

Shape legend of the names: L width of the LLM, D of the Q-Former, V of the vision encoder.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from instructblip.config.schema import PhaseConfig
from instructblip.models.adapters import adapted_layers, adapter_size, is_adapter, linear_layers
from instructblip.models.base import blocks_of
from instructblip.models.qformer import QFormerLayer
from instructblip.models.vision import VisionEncoder
from instructblip.objectives import make_objectives
from instructblip.objectives.distillation import COPIES
from instructblip.training.layout import is_sharded
from instructblip.training.plan.flops import (
    Gpu,
    ModelShape,
    PartFlops,
    QFormerPass,
    QFormerShape,
    SampleLengths,
    StepWorkload,
    adapter_shares,
    beside_attention,
    language_matrices,
    model_shape,
    query_widths,
)
from instructblip.weights.modules import Parts

GIB = 2**30
_GELU_STEPS = 4  # of GPT-2's GELU, which is written as a formula: what autograd keeps of it, its input among that
USABLE = 0.9  # of a GPU's memory
# Bytes a value: of rounded weights with their scales, without those of rows, which are few. float8 is held in two orders.
_QUANTIZED = {"int8": 1.0, "nf4": 0.5 + 4 / 64, "fp8": 2.0}


@dataclass(frozen=True)
class PlannedPhase:
    """A phase of training as far as a plan goes; see `config.PhaseConfig`."""

    name: str
    steps: int
    batch_size: int
    micro_batch_size: int | None
    micro_batch_tokens: int | None
    outputs: frozenset[str]  # of the model, that its objectives need, with those of its copies
    bounded: bool  # the batching knows a limit of tokens


@dataclass(frozen=True)
class PlanLayout:
    """How a run is laid over GPUs.

    Attributes:
        gpu, gpus: which, and how many.
        mfu: share of the GPU's peak that is counted on.
        kind, shard_size, activation_checkpointing: see `config.ParallelConfig`.
        autocast: the trainable part computes in bfloat16 over float32 weights.
        average: a moving average of the trained weights is kept.
        quantization: of the LLM.
        cached: image tokens come from a cache.
        longest: lengths of the longest sample.
        trained: parts that train.
    """

    gpu: Gpu
    gpus: int
    mfu: float
    kind: str
    shard_size: int | None
    activation_checkpointing: bool
    autocast: bool
    average: bool
    quantization: str | None
    cached: bool
    longest: SampleLengths
    trained: frozenset[str] = frozenset({"qformer"})


class Memory(NamedTuple):
    """Bytes of a part on each GPU, in a usual forward pass and in the largest that the configuration admits."""

    part: str
    usual: float
    largest: float


@dataclass(frozen=True)
class Plan(ABC):
    """A run's needs, which follow from these; `plan_run` makes one."""

    vision: VisionEncoder
    shape: ModelShape
    phases: tuple[PlannedPhase, ...]
    layout: PlanLayout

    @property
    def llm(self) -> Any:
        """A transformers model; None where there is none."""
        return None

    @property
    def heaviest(self) -> PlannedPhase:
        """The phase whose largest pass needs most."""
        return max(self.phases, key=lambda phase: self._activations(self._pass(phase, largest=True), phase))

    def memory(self) -> list[Memory]:
        """Bytes on each GPU by part."""
        return list(self._rows)

    @cached_property
    def _rows(self) -> list[Memory]:
        phase = self.heaviest
        static = [Memory(part, size, size) for part, size in self._static()]
        return [
            *static,
            *self._whole_batch(phase),
            *(Memory(part, *self._both(part, phase)) for part in self._activities()),
        ]

    def needed(self) -> Memory:
        """Bytes on each GPU."""
        rows = self.memory()
        return Memory("together", sum(row.usual for row in rows), sum(row.largest for row in rows))

    @property
    def fits(self) -> bool:
        """Whether the largest pass fits into `USABLE` of the GPU's memory."""
        return self.needed().largest <= USABLE * self.layout.gpu.memory * GIB

    def loading(self) -> float:
        """Bytes of main memory that each process needs to build the model before it goes to its GPU."""
        total = self._copies()
        for part, module in (("vision", self.vision.backbone), ("llm", self.llm), ("", self._text_part()[2])):
            if module is not None:  # what trains in full is in float32
                sizes = _parameter_bytes(module, None)
                total += sum(4.0 * p.numel() if part in self._full else size for p, size in sizes.items())
        return total

    def sample_flops(self) -> list[PartFlops]:
        """FLOPs of a usual sample, by part, for the outputs of all phases together."""
        return self.shape.by_part(self._usual(1), frozenset().union(*(phase.outputs for phase in self.phases)))

    def samples_per_second(self, phase: PlannedPhase) -> float:
        """Over all GPUs, for usual samples; what is recomputed takes time and is no useful work."""
        work = self._usual(1)
        parts = self.shape.by_part(work, phase.outputs)
        flops = sum(part.forward + part.backward for part in parts) + self.shape.repeated(work, phase.outputs)
        if self.layout.activation_checkpointing:
            flops += sum(part.forward for part in parts if part.recompute)
        return self.layout.gpus * self.layout.gpu.flops * self.layout.mfu / flops

    def hours(self) -> float:
        """Of all phases' steps, without validation."""
        return sum(phase.steps * phase.batch_size / self.samples_per_second(phase) for phase in self.phases) / 3600

    # --- what a pass holds -------------------------------------------------------------------------------------------

    def _usual(self, samples: int) -> StepWorkload:
        return self._work(samples, self.shape.usual)

    def _work(self, samples: int, lengths: SampleLengths) -> StepWorkload:
        one = dataclasses.asdict(self.shape.sample_work(lengths))
        if self.layout.cached:
            one["encoded"] = 0
        return StepWorkload(**{name: samples * count for name, count in one.items()})

    def _pass(self, phase: PlannedPhase, *, largest: bool) -> StepWorkload:
        """A forward pass of one GPU: its share of the batch, cut to the phase's limits."""
        samples = self._share(phase)
        if phase.micro_batch_size is not None:
            samples = min(samples, phase.micro_batch_size)
        lengths = self.layout.longest if largest else self.shape.usual
        if phase.micro_batch_tokens is not None:
            samples = min(samples, max(1, int(phase.micro_batch_tokens / self._work(1, lengths).positions)))
        return self._work(samples, lengths)

    def _share(self, phase: PlannedPhase) -> int:
        """Samples of a step on one GPU."""
        return -(-phase.batch_size // self.layout.gpus)

    # --- memory ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def _text_part(self) -> tuple[str, str, nn.Module]:
        """Title, name and modules of the part that is small, and that each GPU holds in float32."""

    def _copies(self) -> float:
        """Bytes of what follows the weights, and of a queue."""
        return 0.0

    def _static(self) -> Iterator[tuple[str, float]]:
        trained, layers = 0.0, list[nn.Module]()
        for title, part, module in (
            ("vision encoder", "vision", self.vision.backbone),
            ("language model", "llm", self.llm),
        ):
            if module is None:
                continue
            trains = part in self._full
            held = self._held(module, self.layout.quantization if part == "llm" else None, trained=trains)
            yield title, held
            if trains:  # in float32, and so are its gradients
                trained += self._held(module, None, trained=True, gathered=0) / 4
                layers.append(module)
            trained += _adapter_parameters(module)
        title, part, module = self._text_part()
        yield title, 4.0 * sum(p.numel() for p in module.parameters())
        if part in self._full:
            trained += sum(p.numel() for p in module.parameters() if p.requires_grad)
            layers.append(module)
        trained += _adapter_parameters(module)
        if copies := self._copies():
            yield "momentum copies and queue", copies
        yield "gradients", 4.0 * trained
        yield "AdamW's moments", 8.0 * trained
        if self.layout.average:
            yield "moving average", 4.0 * trained
        if self.layout.autocast:
            inner: list[Any] = [layer for module in layers for layer in module.modules()]
            # GPT-2's `Conv1D` among them.
            weights = [layer.weight for layer in inner if isinstance(layer, nn.Linear) or hasattr(layer, "nf")]
            yield "bfloat16 copies", 2.0 * sum(weight.numel() for weight in weights)

    @property
    def _full(self) -> frozenset[str]:
        """The parts of which all weights train."""
        return self.layout.trained - self.shape.shares.keys()

    def _held(self, model: Any, quantization: str | None, *, trained: bool, gathered: int = 2) -> float:
        """Bytes of a large part on each GPU.

        Under FSDP blocks are shared out, and `gathered` of them are whole at a time: one runs, the next arrives.
        """
        sizes = _parameter_bytes(model, quantization)
        if trained:
            sizes = {parameter: 4.0 * parameter.numel() for parameter in sizes}
        whole = sum(sizes.values())
        layout = self.layout
        if not is_sharded(layout.kind, layout.gpus):
            return whole
        blocks = [
            sum(sizes[parameter] for parameter in block.parameters() if parameter not in _kept_whole(block))
            for block in blocks_of(model)
        ]
        shards = min(layout.shard_size or layout.gpus, layout.gpus)
        return whole - sum(blocks) * (1 - 1 / shards) + gathered * max(blocks, default=0.0)

    def _whole_batch(self, phase: PlannedPhase) -> Iterator[Memory]:
        """What a phase keeps between its two passes: image tokens of this GPU's samples, and of their wrong partners."""
        if self.shape.repeated(self._usual(1), phase.outputs) and "vision" not in self.layout.trained:
            each = self.shape.image_tokens * self.vision.width * self.vision.dtype.itemsize
            size = float(self._share(phase) * each * (2 if "match_logits" in phase.outputs else 1))
            yield Memory("image tokens of a step", size, size)

    @abstractmethod
    def _activities(self) -> list[str]:
        """The parts that keep activations."""

    @abstractmethod
    def _kept(self, part: str, work: StepWorkload, phase: PlannedPhase) -> float:
        """Bytes of the activations that a part keeps."""

    def _both(self, part: str, phase: PlannedPhase) -> tuple[float, float]:
        """Of a part in a usual pass and in the largest."""
        usual, largest = (self._kept(part, self._pass(phase, largest=largest), phase) for largest in (False, True))
        return usual, largest

    def _activations(self, work: StepWorkload, phase: PlannedPhase) -> float:
        return sum(self._kept(part, work, phase) for part in self._activities())

    def _vision_kept(self, work: StepWorkload) -> float:
        """Of each linear layer its input, of attention and activation their outputs, of norms their float32 inputs."""
        backbone, value = self.vision.backbone, 2 if self.layout.autocast else 4
        tokens, each = self.shape.image_tokens * work.encoded, []
        for block in blocks_of(backbone):
            inputs = [layer.in_features for _, layer in linear_layers(block)]
            norms = [module for module in block.modules() if isinstance(module, nn.LayerNorm)]
            width = norms[0].normalized_shape[0] if norms else max(inputs, default=0)
            kept = value * (sum(inputs) + 2 * max(inputs, default=0)) + 4 * len(norms) * width
            each.append(tokens * (kept + _adapters_kept(block)))
        if self.layout.activation_checkpointing and each:
            return max(each) + len(each) * tokens * 4 * self.vision.width
        return float(sum(each))


@dataclass(frozen=True)
class LanguagePlan(Plan):
    """Of a run of a model with a language model, or of one that may have one."""

    def _llm_logits_kept(self, work: StepWorkload) -> float:
        """In the head's type and in float32, their log-softmax, and the gradients of both."""
        value = torch.finfo(self.llm.dtype).bits // 8
        return float(work.answers * self.llm.get_output_embeddings().out_features * (2 * value + 12))

    def _llm_kept(self, work: StepWorkload) -> float:
        llm = self.llm
        if not llm.config.is_encoder_decoder:
            return self._stack_kept(llm.base_model, work.positions)
        decoded = self._stack_kept(llm.get_decoder(), work.answers)
        return self._stack_kept(llm.get_encoder(), work.positions - work.answers) + decoded

    def _stack_kept(self, stack: nn.Module, tokens: float) -> float:
        """Of layers over so many tokens: float32 copies before norms, attention's inputs and outputs, the FFN's factors."""
        llm, blocks = self.llm, blocks_of(stack) or [stack]  # one layer is no list
        embedded = llm.get_input_embeddings().weight.shape[1]
        value, width = torch.finfo(llm.dtype).bits // 8, getattr(llm.config, "hidden_size", embedded)
        found = language_matrices(blocks[0], llm.config)
        attention = sum(queries for _, queries in query_widths(found))
        ffn = beside_attention(found)
        hidden = sum(each.outputs for each in ffn if each.outputs != width)
        read = sum(each.inputs for each in ffn if each.outputs == width)
        leaves = [(name, layer) for name, layer in blocks[0].named_modules() if not list(layer.children())]
        # The activation's input, and where it is gated its output and the other factor.
        steps = _GELU_STEPS if any(type(layer).__name__ == "NewGELUActivation" for _, layer in leaves) else 1
        inner = read * (steps + 2 if hidden > 1.5 * read else steps)
        plain = sum(isinstance(layer, nn.LayerNorm) for _, layer in leaves)  # which keeps its input as it is
        norms = sum("norm" in f"{name} {type(layer).__name__}".lower() for name, layer in leaves) - plain
        kept = (norms * 4 + plain * value) * width + value * (4 * attention + inner) + _adapters_kept(blocks[0])
        if llm.config.is_encoder_decoder:
            kept += value * norms * width  # T5's norm multiplies what it was given, not the copy
        if self.layout.activation_checkpointing:
            return tokens * (len(blocks) * value * width + kept)
        return tokens * len(blocks) * kept


@dataclass(frozen=True)
class QFormerPlan(LanguagePlan):
    """Of a run of a model with a Q-Former."""

    shape: QFormerShape
    parts: Parts

    @property
    def llm(self) -> Any:
        """A transformers model; None in BLIP-2's first stage."""
        return self.parts.llm

    def _text_part(self) -> tuple[str, str, nn.Module]:
        modules = nn.ModuleList([self.parts.norm, self.parts.qformer, self.parts.heads])
        return f"Q-Former and {'heads' if self.llm is None else 'projection'}", "qformer", modules

    def _activities(self) -> list[str]:
        left_out = {VISION: "vision" not in self.layout.trained, _LLM: self.llm is None}
        return [part for part in (VISION, _QFORMER, _LLM, LOGITS) if not left_out.get(part)]

    def _kept(self, part: str, work: StepWorkload, phase: PlannedPhase) -> float:
        if part == _QFORMER:
            return self._qformer_kept(work, phase)
        if part == VISION:
            return self._vision_kept(work)
        if "answer_logits" not in phase.outputs:
            return 0.0
        return self._logits_kept(work) if part == LOGITS else self._llm_kept(work)

    def _logits_kept(self, work: StepWorkload) -> float:
        """As the LLM's, of the Q-Former's own head where there is none."""
        if self.llm is not None:
            return self._llm_logits_kept(work)
        value, words = 2 if self.layout.autocast else 4, self.parts.qformer.word_embeddings.num_embeddings
        return float(work.answers * words * (2 * value + 12))

    def _qformer_kept(self, work: StepWorkload, phase: PlannedPhase) -> float:
        """Of each linear layer its input, of attention its inputs and output, the input of norms, masks of dropout."""
        if not self.shape.passes_gradients("qformer"):
            return 0.0
        passes = self.shape.qformer_passes(work, phase.outputs)
        pictures = max(each.rows for each in passes if each.queries)  # wrong pictures of pairs are normalised too
        norm = 8.0 * self.shape.image_tokens * pictures * self.parts.vision.width  # float32 before and after
        layers = [[self._layer_kept(layer, each) for layer in self.parts.qformer.layers] for each in passes]
        if self.layout.activation_checkpointing:
            tokens = sum(each.queries + each.text for each in passes)
            return norm + max(map(max, layers)) + len(layers[0]) * 4 * self.parts.qformer.width * tokens
        return norm + sum(map(sum, layers))

    def _layer_kept(self, layer: nn.Module, each: QFormerPass) -> float:
        assert isinstance(layer, QFormerLayer)
        value = 2 if self.layout.autocast else 4
        width, image_width, hidden = self.parts.qformer.width, self.parts.vision.width, layer.query_ffn.up.out_features
        kept = (each.queries + each.text) * (value * (8 * width + 2 * hidden) + 10 * width)
        if layer.cross_attention is not None and each.queries:
            image = self.shape.image_tokens * each.rows
            kept += each.queries * (3 * value + 5) * width + image * 2 * value * (width + image_width)
        return kept


def plan_run(parts: Parts, phases: Sequence[PlannedPhase], layout: PlanLayout) -> Plan:
    """The plan of a run of these parts, which may be on the meta device."""
    modules = {"vision": [parts.vision.backbone], "qformer": [parts.qformer, parts.heads]}
    shares = adapter_shares(modules | ({} if parts.llm is None else {"llm": [parts.llm]}))
    shape = model_shape(parts.vision, parts.qformer, parts.heads, parts.llm, layout.trained, shares)
    return QFormerPlan(vision=parts.vision, shape=shape, phases=tuple(phases), layout=layout, parts=parts)


_QFORMER, _LLM, LOGITS = "activations, Q-Former", "activations, language model", "logits of the answers"
VISION = "activations, vision encoder"  # none where it is frozen


def what_fits(plan: Plan) -> tuple[str, Plan] | None:
    """The least change of settings with which a plan fits, and the plan with it; None where none of them helps."""
    layout = plan.layout
    recompute = {"activation_checkpointing": True}
    changes: list[tuple[str, dict[str, Any]]] = [("", {}), ("parallel.activation_checkpointing=true", recompute)]
    if layout.kind == "ddp" and layout.gpus > 1:
        changes.append(("parallel=fsdp", {"kind": "fsdp", **recompute}))  # as that file in configs/parallel
    if layout.quantization is None and plan.llm is not None:
        # Rounded weights are not sharded.
        whole = "parallel=ddp parallel.activation_checkpointing=true " if layout.kind == "fsdp" else ""
        other = {"kind": "ddp", "shard_size": None, **recompute} if whole else {}
        changes += [(f"{whole}llm.quantization={kind}", {"quantization": kind, **other}) for kind in ("int8", "nf4")]
    for name, change in changes:
        changed = dataclasses.replace(plan, layout=dataclasses.replace(layout, **change))
        for tokens, limited in _with_fewer_tokens(changed):
            if limited.fits:
                return " ".join(part for part in (name, tokens) if part), limited
    return None


def _with_fewer_tokens(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """The plan, and with ever smaller passes in its heaviest phase; a longer sample than the limit comes alone."""
    yield "", plan
    number = plan.phases.index(plan.heaviest)
    largest = plan._pass(plan.heaviest, largest=True).positions
    for tokens in (16384, 8192, 4096, 2048, 1024):
        if tokens < largest and plan.phases[number].bounded:
            phases = [*plan.phases]
            phases[number] = dataclasses.replace(phases[number], micro_batch_tokens=tokens)
            setting = f"recipe.phases.{phases[number].name}.micro_batch_tokens={tokens}"
            yield setting, dataclasses.replace(plan, phases=tuple(phases))


def _parameter_bytes(model: nn.Module, quantization: str | None) -> dict[Tensor, float]:
    """Bytes of every parameter; tied tables once, the output head never rounded."""
    sizes: dict[Tensor, float] = {p: p.numel() * float(p.element_size()) for p in model.parameters()}
    if quantization is not None:
        head = model.get_output_embeddings()  # type: ignore[operator]
        adapters = {parameter for name, parameter in model.named_parameters() if is_adapter(name)}
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and layer is not head and layer.weight not in adapters:
                sizes[layer.weight] = layer.weight.numel() * _QUANTIZED[quantization]
    return sizes


def _kept_whole(block: nn.Module) -> set[nn.Parameter]:
    """Tables and adapters."""
    tables = {p for module in block.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    return tables | {parameter for name, parameter in block.named_parameters() if is_adapter(name)}


def _adapter_parameters(module: nn.Module) -> float:
    return float(sum(parameter.numel() for name, parameter in module.named_parameters() if is_adapter(name)))


def _adapters_kept(module: nn.Module) -> float:
    """Bytes for each token: what an adapter reads, in float32 and dropped, and what it makes of it."""
    layers = [layer for _, layer in adapted_layers(module)]
    ranks = [adapter_size(layer) / (layer.in_features + layer.out_features) for layer in layers]
    return sum(9 * layer.in_features + 4 * rank for layer, rank in zip(layers, ranks, strict=True))


def planned_phases(phases: Mapping[str, PhaseConfig]) -> tuple[PlannedPhase, ...]:
    """What a plan takes of the phases of a recipe."""
    return tuple(
        PlannedPhase(
            name=name,
            steps=phase.steps,
            batch_size=phase.batch_size,
            micro_batch_size=phase.micro_batch_size,
            micro_batch_tokens=phase.micro_batch_tokens,
            outputs=_outputs(phase),
            bounded=phase.batching != "fixed",
        )
        for name, phase in phases.items()
    )


def _outputs(phase: PhaseConfig) -> frozenset[str]:
    """Those that the objectives need with gradient, and those of a model's copies."""
    objectives = make_objectives(phase.objectives)
    needed = frozenset[str]().union(*(objective.needed() for objective in objectives))
    return frozenset[str]().union(*(objective.outputs for objective in objectives)) | (needed & COPIES)
