"""Activation checkpointing and compiled blocks change memory and speed, not a step's result.

Several ranks are tested in tests/distributed.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from instructblip.data.batching import Batch
from instructblip.distributed import Ranks
from instructblip.models.instructblip import InstructBLIP
from instructblip.training import validation as scoring
from instructblip.training.loop import train_step
from instructblip.training.optim import make_adamw
from instructblip.training.parallel import parallelize
from tests.kit.losses import LANGUAGE, term_of
from tests.kit.tiny import tiny_encoder_decoder_llm, tiny_images, tiny_llm, tiny_model

LLMS = {"decoder": tiny_llm, "encoder_decoder": tiny_encoder_decoder_llm}


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compile without generating code, which takes minutes, and fail where torch would go on uncompiled."""
    compile_module = nn.Module.compile

    def compile_eagerly(module: nn.Module, *arguments: Any, **options: Any) -> None:
        compile_module(module, *arguments, backend="eager", **options)

    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    torch._dynamo.reset()
    before = torch._dynamo.config.recompile_limit
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, suppress_errors=False):
        yield
    torch._dynamo.config.recompile_limit = before
    torch._dynamo.reset()


def batches() -> list[Batch]:
    """Three passes of unlike sizes and lengths, so that compiled blocks meet changing shapes."""
    prompts = ["what is it?", "Question: what color is the shape? Short answer:", "is it a circle?", "a b", "color?"]
    targets = ["red", "a yellow rectangle", "yes", "no", "teal it is"]
    cuts = [slice(0, 2), slice(2, 4), slice(4, 5)]
    return [
        Batch(
            ids=[str(place) for place in range(5)][cut],
            datasets=["a"] * len(targets[cut]),
            instructions=prompts[cut],
            targets=targets[cut],
            images=tiny_images(5)[cut],
            places=list(range(5))[cut],
            image_ids=list("abcde")[cut],
            positions=list(range(5))[cut],
        )
        for cut in cuts
    ]


def steps(model: InstructBLIP, count: int = 2) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of a few steps, and the weights after them."""
    optimizer = make_adamw(model.named_parameters(), weight_decay=0.05, betas=(0.9, 0.999))
    losses = []
    for number in range(count):
        torch.manual_seed(number)
        result = train_step(model.train(), optimizer, batches(), objectives=LANGUAGE, rate=1e-3, clip_norm=1.0)
        losses.append(result.loss)
    return losses, model.held_state()


def model_of(kind: str, dropout: float = 0.1) -> InstructBLIP:
    torch.manual_seed(1)
    return tiny_model(llm=LLMS[kind](), dropout=dropout)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LLMS)
def test_activation_checkpointing_gives_the_same_bits_with_less_memory(kind: str) -> None:
    plain, recomputing = model_of(kind), model_of(kind)
    parallelize(recomputing, Ranks(), kind="single", activation_checkpointing=True)
    assert list(plain.state_dict()) == list(recomputing.state_dict())
    assert kept_values(recomputing) < 0.6 * kept_values(plain)
    losses, weights = steps(plain)
    again, others = steps(recomputing)  # dropout's masks are drawn again as they were
    assert losses == again
    assert all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(("kind", "recompute"), [("decoder", False), ("encoder_decoder", True)])
def test_compiled_blocks_compute_the_same(kind: str, recompute: bool) -> None:
    plain, compiled = model_of(kind, dropout=0.0), model_of(kind, dropout=0.0)
    parallelize(compiled, Ranks(), kind="single", activation_checkpointing=recompute, compile_blocks=True)
    losses, weights = steps(plain, count=1)
    again, others = steps(compiled, count=1)
    assert again == pytest.approx(losses, abs=1e-6)
    assert max(float((weights[name] - others[name]).abs().max()) for name in weights) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 5


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("compiled", [True, False])
def test_evaluations_compile_nothing(compiled: bool) -> None:
    """With a cache each layer would be compiled by itself, until nothing more is."""
    model = model_of("decoder")
    parallelize(model, Ranks(), kind="single", compile_blocks=True)
    run: Any = SimpleNamespace(
        optimisation=SimpleNamespace(average=None), config=SimpleNamespace(parallel=SimpleNamespace(compile=compiled))
    )
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with scoring._to_evaluate(run):
        model.generate(tiny_images(2), ["what is it?", "color?"], max_new_tokens=3, num_beams=2)
    assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] == before) is compiled


def kept_values(model: InstructBLIP) -> int:
    """Numbers that a pass keeps for its backward pass, without weights."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    batch = batches()[0]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = term_of(model.train(), batch.images, batch.instructions, batch.targets)
    del loss
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)
