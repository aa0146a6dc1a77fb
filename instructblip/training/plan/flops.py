"""FLOPs of a training step, counted by part from a model's shape and from what went through it, and what devices can do.

The one source of every such figure: the plan, `mfu` in metrics.jsonl, and the benchmark of the training step.

A product of an (m, k) and a (k, n) matrix is 2mkn FLOPs, so a token costs twice the parameters of the matrices that it
meets, and attention over K places 4 A K a layer of attention width A (scores and mixture; PaLM, arXiv:2204.02311, appendix
B, which also takes the whole square of causal attention). Norms, activations and softmax are left out. A backward pass
costs the forward's FLOPs once for the gradient of the inputs and once for that of the weights, attention twice: so what
trains costs three times its forward pass, the frozen LLM's matrices, through which gradients only pass, twice, the frozen
vision encoder once. Adapters cost what matrices of their size do, and of an adapted part they alone have gradients. Padding
and recomputation are not counted: they are no work that the model asks for.
"""

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from instructblip.models.adapters import adapter_size, adapters_off, linear_layers
from instructblip.models.qformer import QFormer, QFormerLayer
from instructblip.models.vision import VisionEncoder
from instructblip.weights.outlines import OutlinedEncoder

# Names of layers that make queries alone, or queries, keys and values together.
QUERIES, FUSED = ("q", "q_proj", "q_b_proj", "query"), ("qkv_proj", "query_key_value", "Wqkv", "c_attn")
# T5's, BART's, T5Gemma's and NLLB-MoE's
_CROSS_ATTENTION = ("EncDecAttention", "encoder_attn", "cross_attn", "cross_attention")
_EXPERTS_A_POSITION = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k")  # as configurations call them
_ONE_OF_EXPERTS = re.compile(r"(.*\bexperts)\.([^.]+)\.")


@dataclass(frozen=True)
class StepWorkload:
    """What goes through the parts of a model, summed over samples: of one, of a step.

    Attributes:
        samples: how many.
        frames: pictures and frames of clips that the Q-Former looks at.
        encoded: those of them that go through the vision encoder; none where image tokens are cached.
        text: tokens of text in the Q-Former: of instructions, once a frame, or of captions, once.
        positions: places of the LLM that hold something, an encoder-decoder's in both parts; 0 where it is left out.
        answers: supervised tokens.
    """

    samples: float = 0
    frames: float = 0
    encoded: float = 0
    text: float = 0
    positions: float = 0
    answers: float = 0


class PartFlops(NamedTuple):
    """FLOPs of a part: a forward pass, and what the backward pass adds; `recompute`: activation checkpointing repeats it."""

    part: str
    forward: float
    backward: float
    recompute: bool = True


class SampleLengths(NamedTuple):
    """Tokens of a sample's prompt and of its answer, or caption."""

    prompt: int
    answer: int


class QFormerPass(NamedTuple):
    """What goes through a Q-Former in one of its passes, summed over the pass's rows.

    Attributes:
        rows: pictures, texts, or pairs of them.
        queries, text: positions of each kind.
        cached: positions of an earlier pass that each row attends to.
        text_states: the last layer computes the text too.
    """

    rows: float
    queries: float
    text: float
    cached: float = 0.0
    text_states: bool = False


@dataclass(frozen=True)
class Stack:
    """Transformer layers as far as FLOPs go: parameters of their matrices, and attention width summed over layers.

    `source_matrices` are met by what a decoder's cross-attention looks at (its keys and values), `cross_attention` is that
    attention's width.
    """

    matrices: int
    attention: int
    source_matrices: int = 0
    cross_attention: int = 0


@dataclass(frozen=True)
class LanguageShape:
    """A language model as far as FLOPs go.

    Attributes:
        decoder: its layers; `encoder` too where it is an encoder-decoder.
        head: parameters of its output head.
    """

    decoder: Stack
    encoder: Stack | None
    head: int

    def by_part(self, work: StepWorkload, *, runs: bool, gradients: float) -> list[PartFlops]:
        """Its layers, which may be left out, and its logits; `gradients` is the share of its weights that have some."""
        llm, llm_backward = self._layers(work) if runs else (0.0, 0.0)
        logits = 2.0 * (work.answers if runs else work.samples) * self.head
        return [
            PartFlops("language model", llm, llm_backward + gradients * llm),
            PartFlops("logits of the answers", logits, 2 * logits if gradients == 1.0 else logits, recompute=False),
        ]

    def positions(self, visual_tokens: int, lengths: SampleLengths) -> int:
        """Of a sample: a decoder's last token is only predicted; an encoder's prompt ends with EOS."""
        return visual_tokens + sum(lengths) + (-1 if self.encoder is None else 1)

    def _layers(self, work: StepWorkload) -> tuple[float, float]:
        decoded = work.positions if self.encoder is None else work.answers
        matrices = 2 * decoded * self.decoder.matrices
        attention = 4 * decoded * (decoded / max(work.samples, 1)) * self.decoder.attention
        if self.encoder is not None:
            encoded = work.positions - work.answers
            matrices += 2 * encoded * (self.encoder.matrices + self.decoder.source_matrices)
            each = encoded / max(work.samples, 1)
            attention += 4 * each * (encoded * self.encoder.attention + decoded * self.decoder.cross_attention)
        return matrices + attention, matrices + 2 * attention


def language_shape(llm: Any) -> LanguageShape:
    """That of a transformers model, quantised or not, whose weights are not looked at."""
    decoder, encoder = _stack(llm.base_model, llm.config), None
    if llm.config.is_encoder_decoder:
        decoder, encoder = _stack(llm.get_decoder(), llm.config), _stack(llm.get_encoder(), llm.config)
    return LanguageShape(decoder, encoder, size_of(llm.get_output_embeddings()))


@dataclass(frozen=True)
class ModelShape(ABC):
    """The sizes of a model that its FLOPs follow from.

    Attributes:
        usual: lengths of a usual sample, as a plan counts with.
        image_flops: of one picture through the vision encoder, as torch's `FlopCounterMode` counts them.
        image_tokens: it gives.
        trained: parts that train: their backward pass computes gradients of weights too.
        shares: of those that train by adapters, the share of these in their matrices: no other weights have gradients.
    """

    usual: ClassVar[SampleLengths]
    image_flops: float
    image_tokens: int
    trained: frozenset[str]
    shares: Mapping[str, float]

    @property
    def visual_tokens(self) -> int:
        """Of a picture, that texts are written by."""
        return self.image_tokens

    @abstractmethod
    def sample_work(self, lengths: SampleLengths) -> StepWorkload:
        """What a picture and its texts of these lengths ask for."""

    @abstractmethod
    def by_part(self, work: StepWorkload, outputs: Collection[str]) -> list[PartFlops]:
        """FLOPs of a forward and backward pass for the model's named outputs, by part.

        Lengths within the attention's square are means over samples.
        """

    def repeated(self, work: StepWorkload, outputs: Collection[str]) -> float:
        """FLOPs of a first pass over the whole batch, which computes again what the second one does."""
        return 0.0

    def total(self, work: StepWorkload, outputs: Collection[str]) -> float:
        """FLOPs of a forward and backward pass."""
        return sum(part.forward + part.backward for part in self.by_part(work, outputs))

    def _vision_flops(self, work: StepWorkload) -> PartFlops:
        image = self.image_flops * work.encoded / (1 - self.shares.get("vision", 0.0))
        trains = "vision" in self.trained
        return PartFlops("vision encoder", image, image * (1 + self._gradients("vision")) if trains else 0.0, trains)

    def _gradients(self, part: str) -> float:
        """The share of a part's weights that have gradients."""
        return self.shares.get(part, 1.0) if part in self.trained else 0.0

    def passes_gradients(self, part: str) -> bool:
        """Whether a part that reads the vision encoder's tokens has a backward pass: it trains, or the encoder does."""
        return not self.trained.isdisjoint({part, "vision"})

    def _behind_vision(self, title: str, part: str, forward: float) -> PartFlops:
        """A part that reads the vision encoder's tokens."""
        passes = self.passes_gradients(part)
        return PartFlops(title, forward, forward * (1 + self._gradients(part)) if passes else 0.0, recompute=passes)


@dataclass(frozen=True)
class QFormerShape(ModelShape):
    """That of a model with a Q-Former.

    Attributes:
        queries: of a frame.
        qformer: its layers, whose weights are not looked at.
    """

    queries: int
    qformer: QFormer

    @property
    def visual_tokens(self) -> int:
        """The queries' states."""
        return self.queries

    @abstractmethod
    def qformer_passes(self, work: StepWorkload, outputs: Collection[str]) -> list[QFormerPass]:
        """What goes through the Q-Former for these outputs."""

    def _trainable(self, part: str, forward: float) -> PartFlops:
        """A part of the Q-Former's."""
        return self._behind_vision(part, "qformer", forward)

    def _qformer_flops(self, work: StepWorkload, outputs: Collection[str]) -> float:
        passes = self.qformer_passes(work, outputs)
        return sum(_qformer_flops(self.qformer, self.image_tokens, each) for each in passes)


def _qformer_flops(qformer: QFormer, image_tokens: int, each: QFormerPass) -> float:
    """Forward pass: queries and text share self-attention; cross-attention is the queries'; each has its own FFN."""
    if not each.rows:
        return 0.0
    both = each.queries + each.text
    attended = both / each.rows + each.cached  # by each position
    total = 0.0
    for layer in qformer.layers:
        assert isinstance(layer, QFormerLayer)
        wants_text = each.text_states or not layer.is_last
        own, seen = layer.self_attention, both if wants_text else each.queries
        total += 2 * seen * (size_of(own.query) + size_of(own.output)) + 2 * both * (
            size_of(own.key) + size_of(own.value)
        )
        total += 4 * seen * attended * own.query.out_features + 2 * each.queries * matrices(layer.query_ffn)
        if layer.text_ffn is not None and wants_text:
            total += 2 * each.text * matrices(layer.text_ffn)
        if layer.cross_attention is not None and each.queries:
            cross, image = layer.cross_attention, image_tokens * each.rows
            total += 2 * each.queries * (size_of(cross.query) + size_of(cross.output))
            total += 2 * image * (size_of(cross.key) + size_of(cross.value))
            total += 4 * each.queries * image_tokens * cross.query.out_features
    return total


@dataclass(frozen=True)
class LLMShape(QFormerShape):
    """InstructBLIP's, or that of BLIP-2's second stage: a Q-Former in front of a language model.

    Attributes:
        projection: parameters of its matrix.
        language: of the LLM.
    """

    usual = SampleLengths(35, 16)  # of instruction tuning; the mean of benchmarks/train_step.py
    projection: int
    language: LanguageShape

    def by_part(self, work: StepWorkload, outputs: Collection[str]) -> list[PartFlops]:
        """The LLM's layers take part in `answer_logits` alone."""
        qformer = self._qformer_flops(work, outputs) + 2 * self.queries * work.frames * self.projection
        return [
            self._vision_flops(work),
            self._trainable("Q-Former and projection", qformer),
            *self.language.by_part(work, runs="answer_logits" in outputs, gradients=self._gradients("llm")),
        ]

    def qformer_passes(self, work: StepWorkload, outputs: Collection[str]) -> list[QFormerPass]:
        """One, with the instruction."""
        text = work.text if self.qformer.instruction_aware else 0.0
        return [QFormerPass(work.frames, self.queries * work.frames, text)]

    def sample_work(self, lengths: SampleLengths) -> StepWorkload:
        """The Q-Former reads the prompt too."""
        positions = self.language.positions(self.queries, lengths)
        text = lengths.prompt + 2  # [CLS] and [SEP]
        return StepWorkload(samples=1, frames=1, encoded=1, text=text, positions=positions, answers=lengths.answer)


@dataclass(frozen=True)
class Stage1Shape(QFormerShape):
    """That of BLIP-2's first stage: a Q-Former that runs several ways, with its heads.

    Attributes:
        heads: parameters of the matrices behind the queries.
        words: of the language-model head, with the word embeddings that its logits are products with.
    """

    usual = SampleLengths(0, 14)  # a caption of COCO with [CLS] and [SEP]
    heads: int
    words: int

    def by_part(self, work: StepWorkload, outputs: Collection[str]) -> list[PartFlops]:
        """The heads of queries and texts count with the Q-Former."""
        supervised = work.text - work.samples if "answer_logits" in outputs else 0.0
        qformer = self._qformer_flops(work, outputs) + 2 * self.queries * work.frames * self.heads
        return [
            self._vision_flops(work),
            self._trainable("Q-Former and heads", qformer),
            self._trainable("logits of the captions", 2.0 * supervised * self.words)._replace(recompute=False),
        ]

    def qformer_passes(self, work: StepWorkload, outputs: Collection[str]) -> list[QFormerPass]:
        """Queries alone, text alone, three pairs a sample, and the text as a caption of the queries."""
        pictures, queries, wanted = work.frames, self.queries * work.frames, set(outputs)
        passes = []
        if wanted & {"image_projected", "answer_logits"}:
            passes.append(QFormerPass(pictures, queries, 0.0))
        if "text_projected" in wanted:
            passes.append(QFormerPass(work.samples, 0.0, work.text, text_states=True))
        if "match_logits" in wanted:
            passes.append(QFormerPass(3 * pictures, 3 * queries, 3 * work.text))
        if "answer_logits" in wanted:
            passes.append(QFormerPass(work.samples, 0.0, work.text, cached=self.queries, text_states=True))
        return passes

    def sample_work(self, lengths: SampleLengths) -> StepWorkload:
        """Positions are those that `BLIP2.sample_length` counts."""
        text = lengths.answer
        return StepWorkload(samples=1, frames=1, encoded=1, text=text, positions=self.queries + text, answers=text - 1)

    def repeated(self, work: StepWorkload, outputs: Collection[str]) -> float:
        """Features of images and texts; image tokens of a frozen encoder are kept."""
        if not {"image_projected", "match_logits"} & set(outputs):
            return 0.0
        image = self.image_flops * work.encoded if "vision" in self.trained else 0.0
        return image + self._qformer_flops(work, ("image_projected", "text_projected"))


def model_shape(
    vision: VisionEncoder,
    qformer: QFormer,
    heads: nn.Module,
    llm: Any,
    trained: Collection[str] = ("qformer",),
    shares: Mapping[str, float] = MappingProxyType({}),
) -> QFormerShape:
    """The shape of these parts, whose weights are not looked at.

    Args:
        vision: on the meta device, where torch counts every kind of attention; runs once.
        qformer: on any device, as the following.
        heads: the projection into the LLM; without one, what stands behind the Q-Former.
        llm: the transformers model, quantised or not; None for BLIP-2's first stage.
        trained: parts that train.
        shares: `adapter_shares` of the model.
    """
    common: dict[str, Any] = {
        "image_flops": image_flops(vision),
        "image_tokens": vision.tokens,
        "shares": shares,
        "queries": qformer.query_tokens.shape[1],
        "qformer": qformer,
        "trained": frozenset(trained),
    }
    if llm is None:
        head = qformer.lm_head  # None where it is not to caption
        words = 0 if head is None else qformer.word_embeddings.weight.numel() + matrices(head)
        return Stage1Shape(**common, heads=matrices(heads), words=words)
    return LLMShape(**common, projection=matrices(heads), language=language_shape(llm))


def image_flops(vision: VisionEncoder) -> float:
    """Of one picture through an encoder on the meta device, where torch counts every kind of attention; without adapters."""
    if isinstance(vision, OutlinedEncoder):
        return vision.flops
    device = next(vision.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad(), adapters_off(vision):
        vision(torch.zeros(1, 3, vision.image_size, vision.image_size, dtype=torch.uint8, device=device))
    return float(counter.get_total_flops())


class Matrix(NamedTuple):
    """What positions are multiplied by: a linear layer's weight, or those of the experts that a position is sent to.

    Attributes:
        name: of the layer, or of the parameter.
        inputs, outputs: its sides.
        adapter: parameters of the adapter on it.
    """

    name: str
    inputs: int
    outputs: int
    adapter: int = 0

    @property
    def size(self) -> int:
        """Multiplications a position."""
        return self.inputs * self.outputs + self.adapter

    @property
    def own_name(self) -> str:
        """Without the names of what it stands in."""
        return self.name.rpartition(".")[2]


def language_matrices(layers: nn.Module, config: Any) -> list[Matrix]:
    """The matrices of a language model's layers.

    transformers has them as linear layers, as GPT-2's `Conv1D`, which is the transpose of one, and as one parameter for a
    layer's experts, of which a position meets those that it is sent to.
    """
    chosen = _experts_a_position(config)
    found = [
        Matrix(name, layer.in_features, layer.out_features, adapter_size(layer))
        for name, layer in _layers_of_chosen_experts(layers, chosen)
    ]
    for name, module in layers.named_modules():
        if hasattr(module, "nx") and hasattr(module, "nf") and not name.endswith(".base_layer"):
            found.append(Matrix(name, module.nx, module.nf))
        experts = getattr(module, "num_experts", None)
        for own, parameter in module.named_parameters(name, recurse=False):
            if parameter.ndim == 3 and len(parameter) == experts:
                found.append(_of_chosen_experts(own, parameter, config.hidden_size, chosen))
    return found


def _experts_a_position(config: Any) -> int:
    """Hunyuan has a number for each layer, mostly the same."""
    found = next((number for name in _EXPERTS_A_POSITION if (number := getattr(config, name, None))), 1)
    return found if isinstance(found, int) else round(sum(found) / len(found))


def _of_chosen_experts(name: str, parameter: nn.Parameter, width: int, chosen: int) -> Matrix:
    """One side is the LLM's width; some classes have the outputs first, as linear layers, others the inputs."""
    first, second = parameter.shape[1:]
    inner = chosen * (second if first == width else first)
    return Matrix(name, inner, width) if "down" in name else Matrix(name, width, inner)


def _layers_of_chosen_experts(layers: nn.Module, chosen: int) -> Iterator[tuple[str, Any]]:
    """Linear layers; where each expert has its own, those of so many of them."""
    experts: dict[str, set[str]] = {}
    for name, layer in linear_layers(layers):
        if inside := _ONE_OF_EXPERTS.match(name):
            met = experts.setdefault(inside[1], set())
            if inside[2] not in met and len(met) == chosen:
                continue
            met.add(inside[2])
        yield name, layer


def _stack(layers: nn.Module, config: Any) -> Stack:
    """Keys and values of cross-attention are of the encoder's states."""
    found = language_matrices(layers, config)
    source = sum(each.size for each in found if _crosses(each) and each.own_name in ("k", "v", "k_proj", "v_proj"))
    attention = cross = 0
    for each, width in query_widths(found):
        attention += 0 if _crosses(each) else width
        cross += width if _crosses(each) else 0
    return Stack(sum(each.size for each in found) - source, attention, source, cross)


def _crosses(matrix: Matrix) -> bool:
    return any(name in matrix.name for name in _CROSS_ATTENTION)


def beside_attention(found: Sequence[Matrix]) -> list[Matrix]:
    """The matrices that stand in no attention."""
    attentions = {each.name.rpartition(".")[0] for each in found if each.own_name in (*QUERIES, *FUSED)}
    return [each for each in found if each.name.rpartition(".")[0] not in attentions]


def query_widths(found: Sequence[Matrix]) -> Iterator[tuple[Matrix, int]]:
    """Of each attention its queries' width: where one matrix makes keys and values too, that of what the other one reads."""
    for each in found:
        if each.own_name in QUERIES:
            yield each, each.outputs
        elif each.own_name in FUSED:
            parent = each.name.rpartition(".")[0]
            beside = [other for other in found if other.name.rpartition(".")[0] == parent and other is not each]
            yield each, beside[0].inputs if beside else each.outputs // 3


def matrices(module: nn.Module) -> int:
    """Parameters of a module's linear layers with their adapters, without their biases."""
    return sum(size_of(layer) for _, layer in linear_layers(module))


def size_of(layer: Any) -> int:
    """Parameters of a linear layer's matrix, rounded or not, and of its adapter."""
    return int(layer.in_features * layer.out_features) + adapter_size(layer)


def adapter_shares(parts: Mapping[str, Sequence[nn.Module]]) -> dict[str, float]:
    """By part, the share of adapters in the parameters of its matrices; parts without any are left out."""
    shares = {}
    for part, modules in parts.items():
        found = [each for module in modules for each in language_matrices(module, _config_in(module))]
        if adapters := sum(each.adapter for each in found):
            shares[part] = adapters / sum(each.size for each in found)
    return shares


def _config_in(module: nn.Module) -> Any:
    """The configuration of a transformers model, or of the one that it holds; None where it holds none."""
    return next((config for inner in module.modules() if (config := getattr(inner, "config", None))), None)


# --- devices ---------------------------------------------------------------------------------------------------------


class Gpu(NamedTuple):
    """A GPU by its vendor's data sheet: dense bfloat16 FLOP/s with float32 sums, and memory in GiB.

    `name` is a pattern of what its driver calls it.
    """

    title: str
    flops: float
    memory: float
    name: str


GPUS = {
    "a100_40": Gpu("A100 40 GB", 312e12, 40, r"A100.*40GB"),
    "a100_80": Gpu("A100 80 GB", 312e12, 80, r"A100.*80GB"),
    "h100": Gpu("H100 SXM 80 GB", 989.4e12, 80, r"H100 80GB HBM3"),  # the PCIe and NVL cards are slower
    "h200": Gpu("H200 141 GB", 989.4e12, 141, r"H200"),
    "l40s": Gpu("L40S 48 GB", 362e12, 48, r"L40S"),
    "rtx_4090": Gpu("RTX 4090 24 GB", 165.2e12, 24, r"RTX 4090$"),
}


def known_gpu(name: str) -> Gpu | None:
    """The GPU that a driver's name means; None where it is not in the table."""
    return next((gpu for gpu in GPUS.values() if re.search(gpu.name, name)), None)


def device_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that `mfu` is a share of: a known GPU's data sheet in bfloat16, else what a large product reaches here."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        known = known_gpu(torch.cuda.get_device_name(device))
        if known is not None:
            return known.flops
    return measured_peak(device, dtype)


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of a few products of square matrices; less than a tenth of a second on a CPU core."""
    size, runs = (8192, 10) if device.type == "cuda" else (768, 3)
    left = torch.full((size, size), 0.5, device=device, dtype=dtype)
    right, best = left.clone(), float("inf")
    for _ in range(runs):
        _finish(device)
        start = time.perf_counter()
        left @ right
        _finish(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
