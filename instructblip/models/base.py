"""What training and evaluation may touch of a model.

A model is made of named parts, each frozen or trained. It turns samples into `Inputs` (texts as tokens) and those into
named outputs: features, hidden states, logits. Objectives (`instructblip/objectives`) make losses of the outputs.

Shape legend: B batch, F frames, P image tokens, V vision width, N rows of any kind.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from instructblip.devices import on_device, to_device
from instructblip.errors import UserError
from instructblip.models.adapters import Adapter, is_adapter, train_dropout
from instructblip.models.facts import Skill
from instructblip.models.vision import Images, VisionEncoder, as_frames

if TYPE_CHECKING:  # transformers is imported where it is used: what only counts does without
    from transformers import PreTrainedTokenizerBase


class Samples(Protocol):
    """A micro-batch as the loader gives it: B samples."""

    @property
    def images(self) -> Tensor:
        """uint8 frames (B, F, 3, H, W), or image tokens (B, F, P, V) from a feature cache."""

    @property
    def instructions(self) -> Sequence[str]:
        """B prompts."""

    @property
    def targets(self) -> Sequence[str]:
        """B answers."""

    @property
    def image_ids(self) -> Sequence[str]:
        """Of B images, equal where they are the same."""

    @property
    def positions(self) -> Sequence[int]:
        """B places in the run."""

    @property
    def answers(self) -> Sequence[Sequence[tuple[str, float]]]:
        """Of B samples all accepted answers with their weights, where a model is to learn them all; else empty."""

    @property
    def pixel_ids(self) -> Sequence[int]:
        """Of B samples, equal where their pixels are the same; empty: not known."""


class Partners(NamedTuple):
    """For each sample of a micro-batch another one's image, and another one's answer, which do not belong to it.

    Attributes:
        images: as in `Samples`.
        answers: as in `Inputs`.
    """

    images: Tensor
    answers: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Inputs:
    """A micro-batch as a model takes it, with its units countable before anything is computed.

    Attributes:
        images: as in `Samples`.
        prompts: B prompts.
        answers: B token sequences with their end, none of them empty; more where `answer_counts` says so.
        image_ids, positions: as in `Samples`; read by objectives over the whole batch.
        partners: drawn for an objective that needs them.
        answer_counts: how many of the answers each sample has, which stand sample after sample; empty: one each.
        answer_weights: of each answer in its sample's loss; empty: 1.
        pixel_ids: as in `Samples`.
    """

    images: Images
    prompts: Sequence[str]
    answers: Sequence[Sequence[int]]
    image_ids: Sequence[str] = ()
    positions: Sequence[int] = ()
    partners: Partners | None = None
    answer_counts: Sequence[int] = ()
    answer_weights: Sequence[float] = ()
    pixel_ids: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.prompts)

    def answers_by_sample(self) -> list[Sequence[Sequence[int]]]:
        """Each sample's answers."""
        ends = list(itertools.accumulate(self.answer_counts or [1] * len(self)))
        return [self.answers[start:end] for start, end in zip([0, *ends], ends, strict=False)]


class PassWorkload(NamedTuple):
    """What one forward pass went through, for the count of floating-point operations.

    Attributes:
        positions: places of the pass through the LLM, an encoder-decoder's in both parts, or through BLIP's decoder of
            answers.
        padding: those of them that hold nothing.
        text: tokens of text in the Q-Former, once a frame, or in BLIP's text model.
    """

    positions: int = 0
    padding: int = 0
    text: int = 0


class Outputs(NamedTuple):
    """Named outputs of a forward pass. Each model documents the names and shapes that it gives."""

    tensors: dict[str, Tensor]
    workload: PassWorkload = PassWorkload()


@dataclass(frozen=True)
class PartStructure:
    """What a layout over processes needs to know of a part.

    Attributes:
        blocks: its repeated blocks, in the order in which they run.
        roots: the modules above the blocks that one forward pass calls. Empty: the part is small and is never sharded.
        entry: method of the roots through which a pass enters.
        ends_early: a pass may end before the last block has run.
        recompute: activation checkpointing applies to the blocks although the part is frozen, since gradients pass through.
    """

    blocks: list[nn.Module] = field(default_factory=list)
    roots: list[nn.Module] = field(default_factory=list)
    entry: str = "forward"
    ends_early: bool = False
    recompute: bool = True


class PartedModule(nn.Module):
    """A module made of named parts, each frozen or trained.

    Attributes:
        PARTS: the children (modules or parameters) of each part.
        held_parts: parts that a checkpoint holds even where they are frozen, since they come from no file of their own.
        trained_parts: names of the parts that train; all others are frozen: no gradient, evaluation mode.
        adapters: of parts that train by adapters alone, and of those that were loaded with some: the rest of such a part is
            frozen, too.
    """

    PARTS: ClassVar[Mapping[str, tuple[str, ...]]]
    held_parts: frozenset[str] = frozenset()
    trained_parts: frozenset[str] = frozenset()
    adapters: Mapping[str, Adapter] = MappingProxyType({})

    @property
    def full_parts(self) -> frozenset[str]:
        """The parts of which all weights train."""
        return self.trained_parts - self.adapters.keys()

    def part_modules(self, part: str) -> list[nn.Module]:
        """The modules of a part."""
        return [child for child in self._children(part) if isinstance(child, nn.Module)]

    def part_of(self, parameter: str) -> str:
        """The part that a parameter of that name belongs to."""
        child = parameter.partition(".")[0]
        return next(part for part, children in self.PARTS.items() if child in children)

    def choose_trained(self, parts: Collection[str]) -> Self:
        """Train these parts and freeze all others. What a part itself holds fixed (`fixed_parameters`) stays so.

        Raises:
            ValueError: there is no part of that name.
        """
        if unknown := set(parts) - self.PARTS.keys():
            raise ValueError(
                f"{type(self).__name__} has no part {sorted(unknown)[0]!r}; it has {', '.join(self.PARTS)}"
            )
        self.trained_parts = frozenset(parts)
        for part in self.PARTS:
            for child in self._children(part):
                child.requires_grad_(part in self.full_parts)
            for name, parameter in self._part_parameters(part) if part in self.adapters else ():
                parameter.requires_grad_(part in self.trained_parts and is_adapter(name))
        for parameter in self.fixed_parameters():
            parameter.requires_grad_(False)
        return self.train(self.training)

    def fixed_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that stay as they are even where their part trains."""
        return iter(())

    def train(self, mode: bool = True) -> Self:
        """Frozen parts stay in evaluation mode, and so do batch statistics: those of a rank would be its own.

        Of an adapted part the adapters' dropout alone follows the mode.
        """
        super().train(mode)
        for part in self.PARTS.keys() - self.full_parts:
            for module in self.part_modules(part):
                module.train(False)
                train_dropout(module, mode and part in self.trained_parts)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.train(False)
        return self

    def part_state(self, part: str) -> dict[str, Tensor]:
        """Parameters and buffers of a part, under the model's names."""
        # The model's own state_dict would go through the other parts as well, whose blocks may be shared out among
        # processes: its hooks reshard them, and a process that does so alone gathers other blocks than the rest afterwards.
        state: dict[str, Tensor] = {}
        for name, child in zip(self.PARTS[part], self._children(part), strict=True):
            state |= child.state_dict(prefix=f"{name}.") if isinstance(child, nn.Module) else {name: child.detach()}
        return state

    def held_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the state of all parts that train, and of those that no other file has.

        Of a part with adapters, unless no other file has its base, those alone.
        """
        whole = self.full_parts | self.held_parts
        adapters = {name for name, _ in self.named_parameters() if is_adapter(name)}  # each by one of its names
        return {
            name: tensor
            for part in self.PARTS
            if part in whole | self.adapters.keys()
            for name, tensor in self.part_state(part).items()
            if name in adapters or (part in whole and not is_adapter(name))
        }

    def _part_parameters(self, part: str) -> Iterator[tuple[str, nn.Parameter]]:
        for module in self.part_modules(part):
            yield from module.named_parameters()

    def _children(self, part: str) -> list[nn.Module | nn.Parameter]:
        return [getattr(self, name) for name in self.PARTS[part]]


class Model(PartedModule, ABC):
    """What training drives: samples in, named outputs out. What a user calls is in it too, as far as it has the head.

    Attributes:
        OUTPUTS: names of all outputs that it gives.
        SKILLS: what evaluation may ask of it: to `rank` candidates, to `generate` an answer to a prompt, to `caption` a
            picture without one, to `retrieve` by contrast and matching, to judge statements by whether they `match`.
        RELEASED_RANKING: further arguments of `rank` with which the released code of this model ranks.
        vision: image encoder, a part of its own.
        vision_norm: normalisation between the encoder and what reads its tokens.
        FOLLOWERS: parts that neither train nor stay as they are, since they hold the `copies`.
        copy_momentum: share of itself that each of the `copies` keeps in a step.
    """

    OUTPUTS: ClassVar[frozenset[str]]
    SKILLS: ClassVar[frozenset[Skill]]
    RELEASED_RANKING: ClassVar[Mapping[str, Any]] = {}
    FOLLOWERS: ClassVar[frozenset[str]] = frozenset()
    copy_momentum: float = 0.0
    vision: VisionEncoder
    vision_norm: nn.Module

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the model's inputs go."""

    @abstractmethod
    def tokenizers(self) -> "dict[str, PreTrainedTokenizerBase]":
        """Its tokenizers, by the part that reads their tokens."""

    @abstractmethod
    def conventions(self) -> list[Any]:
        """How texts enter, as JSON values: beside weights and the vision encoder's settings, what an answer depends on."""

    def image_tokens(self, images: Images, pixel_ids: Sequence[int] = ()) -> Tensor:
        """Image tokens (B, F, P, V) of pictures or uint8 frames; tokens (from a feature cache) pass through.

        Args:
            images: B of them.
            pixel_ids: equal where pixels are the same; such images are encoded once. Empty: not known.
        """
        images = as_frames(images, self.vision.image_size)
        self._check_fit(images)
        if images.dtype != torch.uint8:
            return to_device(images, self.device)
        first: dict[int, int] = {}
        rows = [first.setdefault(number, len(first)) for number in pixel_ids]
        if len(first) < len(rows):
            images = images[on_device([rows.index(row) for row in range(len(first))], images.device)]
        images = to_device(images, self.device)
        tokens_NFPV = self.vision(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        return tokens_NFPV if len(first) == len(rows) else tokens_NFPV[on_device(rows, self.device)]

    def _check_fit(self, images: Tensor) -> None:
        """Refuse frames of another size, and pixels as floats (B, 3, H, W), which have the form of image tokens.

        Raises:
            ValueError: names `images`.
        """
        side, width = self.vision.image_size, self.vision.width
        if images.dtype == torch.uint8:
            fits = images.shape[-2:] == (side, side)
        else:
            fits = images.shape[1] != 3 or images.shape[-1] == width
        if not fits:
            raise ValueError(
                f"images is a tensor of {tuple(images.shape)}, {images.dtype}; this model takes uint8 frames "
                f"(B, F, 3, {side}, {side}), or image tokens (B, F, P, {width})"
            )

    def vision_structure(self) -> PartStructure:
        """That of the vision encoder, which may be sharded."""
        backbone = self.vision.backbone
        return PartStructure(
            blocks_of(backbone),
            [backbone],
            entry="forward_features",
            ends_early=bool(self.vision.layers),
            recompute=False,  # frozen, its passes have no gradient
        )

    @abstractmethod
    def structure(self) -> dict[str, PartStructure]:
        """How each part is built, for checkpointing, compiling, sharding and adapting."""

    def blocks(self, part: str) -> dict[str, nn.Module]:
        """The repeated blocks of a part, by their names in the model."""
        blocks = {id(block) for block in self.structure()[part].blocks}
        return {name: module for name, module in self.named_modules() if id(module) in blocks}

    @abstractmethod
    def prepare(self, samples: Samples) -> Inputs:
        """Turn a micro-batch's texts into tokens; needs no weights.

        Raises:
            ValueError: lists of unequal lengths.
        """

    @abstractmethod
    def forward(self, inputs: Inputs, wanted: Collection[str], *, packed: bool = False) -> Outputs:
        """Compute the wanted named outputs, and nothing that only others need.

        Args:
            inputs: what `prepare` returned.
            wanted: names of outputs.
            packed: several samples share a row of a decoder-only LLM, each blind to the others.

        Raises:
            ValueError: packed, and the LLM is no decoder-only one.
        """

    def language_settings(self) -> Any:
        """The configuration of the language model, transformers'; None where there is none."""
        return None

    def copies(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Weights that never learn and follow others, with those: (copy, original). Training moves them before each step."""
        return iter(())

    def remember(self, rows: Mapping[str, Tensor], image_ids_N: Tensor) -> None:
        """Keep what later steps compare with; training says it after each step in which objectives compared a whole batch.

        Args:
            rows: the outputs that they compared, (N, ...) of the N samples of all ranks, in the order of their positions.
            image_ids_N: a number of each sample's image.
        """

    def uses_every_weight(self, wanted: Collection[str]) -> bool:
        """Whether all that trains takes part in computing these outputs; when in doubt, no."""
        return False

    def packs(self) -> bool:
        """Whether several samples can share a row of the LLM."""
        return False

    def attend_by_length(self) -> None:
        """From now on tell attention kernels the lengths of samples that share a row, in place of a mask.

        Raises:
            UserError: the LLM's class cannot do that.
        """
        raise UserError(f"{self.title} packs no samples; set parallel.packed_attention=dense")

    @abstractmethod
    def sample_length(self) -> Callable[[str, str, int], int]:
        """A picklable function: how many positions of the largest pass a sample fills, from (prompt, target, frames)."""

    @property
    @abstractmethod
    def title(self) -> str:
        """What it is called in messages."""

    # A class overrides those of these calls that it has a head for.

    def generate(self, *_: Any, **__: Any) -> list[str]:
        """Text for each image.

        Raises:
            UserError: the model has no head for it; the same of the calls below.
        """
        raise self._has_no("head to generate text with")

    def rank(self, *_: Any, **__: Any) -> list[Tensor]:
        """Log-likelihoods of candidate answers."""
        raise self._has_no("language model to rank answers with")

    def match(self, *_: Any, **__: Any) -> Tensor:
        """How well each image and its text match."""
        raise self._has_no("head to match images and texts with")

    def features(self, *_: Any, **__: Any) -> Any:
        """Features of images and texts."""
        raise self._has_no("projections to make features with")

    def attention(self, *_: Any, **__: Any) -> Any:
        """Where the queries of a Q-Former look."""
        raise self._has_no("Q-Former whose queries look at an image")

    def save_huggingface(self, folder: str | Path) -> None:
        """Write a folder that transformers' class of this model and its processor open.

        Raises:
            UserError: parts that their format cannot hold.
        """
        from instructblip.weights.transformers_write import save_huggingface  # which knows the models

        save_huggingface(self, Path(folder))

    def _has_no(self, head: str) -> UserError:
        return UserError(f"{self.title} has no {head}; it can {', '.join(self.calls())}")

    def calls(self) -> list[str]:
        """Those of the calls that it has a head for."""
        calls = ("generate", "rank", "match", "features")
        return [name for name in calls if getattr(type(self), name) is not getattr(Model, name)]


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformer or CNN: members of its outermost lists of two and more modules of one class."""
    found: list[nn.Module] = []
    for child in module.children():
        members = list(child.children())
        is_list = isinstance(child, nn.ModuleList | nn.Sequential)
        if is_list and len(members) > 1 and len({type(member) for member in members}) == 1:
            found += members
        else:
            found += blocks_of(child)
    return found
