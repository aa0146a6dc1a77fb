"""benchmarks/train_step.py in small: every variant starts at one loss, and its work is what the loop reports."""

import argparse
import sys

import pytest
import torch

from instructblip.models.instructblip import InstructBLIP
from instructblip.training.loop import train_step
from instructblip.training.optim import make_adamw
from tests.kit.losses import LANGUAGE
from tests.kit.runs import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import train_step as benchmark


def arguments(llm: str, questions: int = 1) -> argparse.Namespace:
    values = {"llm": llm, "device": "cpu", "batch": 6, "micro_batch": 3, "tiny": True, "compile": False}
    return argparse.Namespace(**values, runs=1, warm=1, threads=1, long=0, questions=questions)


def model_of(options: argparse.Namespace) -> InstructBLIP:
    return benchmark.build(benchmark.configuration(options), "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("llm", ["vicuna_7b", "flan_t5_xl"])
def test_every_variant_starts_at_one_loss(llm: str) -> None:
    options = arguments(llm)
    rows, left_out = benchmark.variants(options)
    packed = llm == "vicuna_7b"
    assert list(rows) == ["transformers", "fixed", "bucketed", *(["packed", "packed, by length"] if packed else [])]
    assert [line.partition(":")[0] for line in left_out] == [
        *([] if packed else ["packed"]),
        "compiled",
        "FP8 frozen linears",
    ]
    steps = {name: prepare(model_of(options), options) for name, prepare in rows.items()}
    first = {name: step() for name, step in steps.items()}
    assert first == pytest.approx(dict.fromkeys(first, first["fixed"]), abs=1e-4)
    second = {name: step() for name, step in steps.items()}  # after one optimiser step each
    assert second["transformers"] != first["transformers"]
    assert second == pytest.approx(dict.fromkeys(second, second["fixed"]), abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("llm", "questions"), [("vicuna_7b", 1), ("flan_t5_xl", 3)])
def test_its_work_is_that_of_the_step(llm: str, questions: int) -> None:
    options = arguments(llm, questions)
    model = model_of(options)
    optimizer = make_adamw(model.named_parameters(), weight_decay=0.0, betas=(0.9, 0.999))
    batches = benchmark.batches_of(model, options, "fixed")
    result = train_step(model, optimizer, batches, objectives=LANGUAGE, rate=0.0, clip_norm=None)
    assert result.work == benchmark.work_of(benchmark.configuration(options), options.batch, options.long, questions)
    lengths = [len(sample.instruction.split()) for sample, _ in benchmark.samples(200, 0, image_size=1)]
    assert (min(lengths), max(lengths)) == (10, 60)
    answers = [len((sample.target or "").split()) for sample, _ in benchmark.samples(64, 16, image_size=1)]
    assert [number for number, length in enumerate(answers) if length >= 100] == [15, 31, 47, 63]


@pytest.mark.slow
def test_the_published_model_is_built_from_its_sizes_on_a_gpu() -> None:
    options = arguments("vicuna_7b")
    options.device, options.tiny = "cuda", False
    config = benchmark.configuration(options)
    assert (config.vision.dtype, config.llm.dtype) == ("bfloat16", "bfloat16")
    with torch.device("meta"):
        model = benchmark.build(config, "meta")
    assert sum(parameter.numel() for parameter in model.vision.parameters()) == 985_894_528
    assert sum(parameter.numel() for parameter in model.llm.parameters()) == 6_738_423_808
    assert sum(tensor.numel() for tensor in model.held_state().values()) == 188_837_376
