"""Sizes of a connector with which it has the budget of the Q-Former that the configuration describes beside it.

Parameters that train choose `hidden_width`; visual tokens of a frame, or FLOPs of a training step on a usual sample, choose
`tokens`. Everything is counted on the meta device, as a plan does it.
"""

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from instructblip.config.schema import ConnectorConfig, TrainConfig
from instructblip.errors import UserError
from instructblip.models.connector import rectangles
from instructblip.models.empty import empty_modules
from instructblip.training.plan.connector import ConnectorShape, connector_shape, frame_flops, unneeded_flops
from instructblip.training.plan.flops import ModelShape, model_shape
from instructblip.weights.modules import (
    ConnectorParts,
    Parts,
    connector_without_weights,
    make_connector,
    parts_without_weights,
)

TOLERANCE = {"parameters": 0.01, "tokens": 0.0, "flops": 0.05}  # of the Q-Former's number
_LONGEST_SIDES = 2  # a rectangle of pooled patches is at most so many times as wide as it is high
_OUTPUTS = frozenset({"answer_logits"})


@dataclass(frozen=True)
class Budget:
    """What a connector costs.

    Attributes:
        parameters: that train, with the normalisation of image tokens.
        tokens: visual tokens of a frame.
        flops: of a forward and backward pass over a usual sample, frozen parts included.
    """

    parameters: int
    tokens: int
    flops: float

    def misses(self, other: "Budget", name: str) -> bool:
        """Whether it is further from another one than is tolerated."""
        own, wanted = getattr(self, name), getattr(other, name)
        return abs(own - wanted) > TOLERANCE[name] * wanted


def matched(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """The configuration with a connector of the wanted budget, and a line that says what was chosen.

    Without anything to be equal, the section `qformer` that no part is made of is left out.

    Raises:
        UserError: no size comes near enough to the budget, or a part whose YAML states no sizes.
    """
    connector = config.connector
    if connector.kind == "qformer":
        return config, []
    if not connector.match:
        return dataclasses.replace(config, qformer=None), []
    reference = dataclasses.replace(config, connector=ConnectorConfig())
    wanted = _qformer_budget(reference, parts_without_weights(reference, outlined=True))
    plain = dataclasses.replace(config, connector=_plain(connector))
    sizes = _Sizes(config, connector_without_weights(plain, outlined=True))
    chosen = sizes.nearest(wanted)
    found = sizes.budget(chosen)
    for name in connector.match:
        if found.misses(wanted, name):
            raise UserError(
                f"connector.match={name}: connector={connector.kind} comes no nearer to the Q-Former's "
                f"{_number(wanted, name)} than {_number(found, name)}; {_way_out(connector)}"
            )
    return dataclasses.replace(config, connector=chosen), [_line(config, chosen, found, wanted)]


@dataclass(frozen=True)
class _Sizes:
    """A connector of many sizes between the same parts."""

    config: TrainConfig
    parts: ConnectorParts

    @cached_property
    def shape(self) -> ConnectorShape:
        parts = self.parts
        return connector_shape(parts.vision, parts.norm, parts.connector, parts.llm, *_trained_of(self.config))

    def budget(self, connector: ConnectorConfig) -> Budget:
        vision = self.parts.vision
        llm_width = self.parts.llm.get_input_embeddings().weight.shape[1]
        with empty_modules():
            module = make_connector(connector, vision, llm_width)
        shape = dataclasses.replace(
            self.shape,
            connector_flops=frame_flops(module, vision.tokens, vision.width),
            unneeded_flops=unneeded_flops(self.parts.norm, module, self.shape.trained),
            frame_tokens=module.tokens,
        )
        return Budget(_trained(self.parts.norm, module), module.tokens, _step_flops(self.config, shape))

    def nearest(self, wanted: Budget) -> ConnectorConfig:
        """The sizes whose budget is nearest."""
        connector = self.config.connector
        sized: Callable[[int | None], ConnectorConfig] = lambda tokens: self._wide_enough(  # noqa: E731
            dataclasses.replace(connector, tokens=tokens), wanted
        )
        if "flops" not in connector.match:
            return sized(wanted.tokens if "tokens" in connector.match else connector.tokens)
        numbers = self._numbers_of_tokens()
        place = bisect.bisect_left(numbers, wanted.flops, key=lambda tokens: self.budget(sized(tokens)).flops)
        near = [sized(tokens) for tokens in numbers[max(place - 1, 0) : place + 1]]
        return min(near, key=lambda found: abs(self.budget(found).flops - wanted.flops))

    def _wide_enough(self, connector: ConnectorConfig, wanted: Budget) -> ConnectorConfig:
        """With the hidden width whose parameters are nearest, where those are to be equal: they grow with it evenly."""
        if "parameters" not in connector.match:
            return connector
        one, two = (self.budget(dataclasses.replace(connector, hidden_width=width)).parameters for width in (1, 2))
        return dataclasses.replace(connector, hidden_width=max(1, round(1 + (wanted.parameters - one) / (two - one))))

    def _numbers_of_tokens(self) -> Sequence[int]:
        """All that a frame can have, ascending."""
        vision, connector = self.parts.vision, self.config.connector
        if connector.kind == "resampler":
            return range(1, 4 * vision.tokens)
        beside = vision.prefix_tokens if connector.class_token else 0
        shapes = rectangles(vision.patch_grid)
        return sorted(count + beside for count, sides in shapes.items() if max(sides) <= _LONGEST_SIDES * min(sides))


def _plain(connector: ConnectorConfig) -> ConnectorConfig:
    """Without anything to be equal, in sizes that can be built."""
    return dataclasses.replace(connector, match=[])


def _qformer_budget(config: TrainConfig, parts: Parts) -> Budget:
    shape = model_shape(parts.vision, parts.qformer, parts.heads, parts.llm, *_trained_of(config))
    parameters = _trained(parts.norm, parts.qformer, parts.heads)
    return Budget(parameters, shape.queries, _step_flops(config, shape))


def _step_flops(config: TrainConfig, shape: ModelShape) -> float:
    work = shape.sample_work(shape.usual)
    if config.data.cache_features:
        work = dataclasses.replace(work, encoded=0)
    return shape.total(work, _OUTPUTS)


def _trained(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)


def _number(budget: Budget, name: str) -> str:
    if name == "flops":
        return f"{budget.flops / 1e9:,.4g} GFLOP a sample"
    return f"{getattr(budget, name):,} {'trained parameters' if name == 'parameters' else 'visual tokens a frame'}"


def _way_out(connector: ConnectorConfig) -> str:
    if connector.kind == "resampler":
        return "change connector.depth or connector.width, or the Q-Former"
    return "match other budgets, or change the Q-Former"


def _line(config: TrainConfig, chosen: ConnectorConfig, found: Budget, wanted: Budget) -> str:
    sizes = {name: getattr(chosen, name) for name in ("hidden_width", "tokens")}
    said = ", ".join(
        f"connector.{name}={size}" for name, size in sizes.items() if size != getattr(config.connector, name)
    )
    costs = "; ".join(
        f"{_number(found, name)} (Q-Former {_number(wanted, name).partition(' ')[0]})" for name in TOLERANCE
    )
    what = " and ".join(config.connector.match)
    return f"connector={chosen.kind} has the {what} of the Q-Former {config.q_former().name} with {said}: {costs}"


def _trained_of(config: TrainConfig) -> tuple[tuple[str, ...], dict[str, float]]:
    """The parts that train, and the share of adapters in them: none, since they cost the same beside any connector.

    Gradients pass through an adapted part nevertheless.
    """
    return config.train.parts(config), dict.fromkeys(config.train.adapted(config), 0.0)
