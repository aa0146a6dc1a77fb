"""Evaluation in another precision: what is computed in it, what its protocol states, and what stays as it was."""

import hashlib
import json
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from instructblip.data.cards import load_card
from instructblip.data.prepare.convert import prepare_dataset
from instructblip.errors import UserError
from instructblip.evaluation.outcomes import TaskResult
from instructblip.evaluation.precision import check_held, check_precision, computing
from instructblip.evaluation.protocol import Task, as_json, make_task
from instructblip.evaluation.runner import read_pixels, run_task
from instructblip.models.base import Model
from tests.kit.stage1 import tiny_stage1
from tests.kit.tiny import IMAGE_SIZE, tiny_model, write_easy_vqa


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    write_easy_vqa(folder / "raw", images=12)
    prepare_dataset(load_card("easy_vqa"), folder / "raw", folder / "shards", progress=False)
    return folder / "shards"


def in_precision(task: Task, precision: Any) -> Task:
    return replace(task, protocol=replace(task.protocol, precision=precision))


def answered(model: Model, task: Task) -> tuple[TaskResult, set[tuple[torch.dtype, str]]]:
    """A task's result, and the type and the rule of float32 that the Q-Former's products had."""
    seen: set[tuple[torch.dtype, str]] = set()

    def note(module: nn.Module, inputs: object, output: Tensor) -> None:
        seen.add((output.dtype, torch.get_float32_matmul_precision()))

    handles = [layer.register_forward_hook(note) for layer in model.qformer.modules() if isinstance(layer, nn.Linear)]
    try:
        return run_task(model, task, read_pixels(IMAGE_SIZE), batch_size=8, show_progress=False), seen
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["rank", "generate", "match"])
def test_products_are_computed_in_the_precision_of_the_protocol(shards: Path, mode: Any) -> None:
    model: Any = tiny_stage1() if mode == "match" else tiny_model()
    asked = make_task(load_card("easy_vqa_statements"), shards, mode=mode)
    convolutions = torch.backends.cudnn.allow_tf32
    exact, seen = answered(model, asked)
    assert seen == {(torch.float32, "highest")}
    rounded, seen = answered(model, in_precision(asked, "bf16"))
    assert seen == {(torch.bfloat16, "highest")}
    same, seen = answered(model, in_precision(asked, "tf32"))  # which a CPU does not round to
    assert seen == {(torch.float32, "high")}
    assert [one.prediction for one in same.predictions] == [one.prediction for one in exact.predictions]
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.is_autocast_enabled("cpu")
    assert torch.backends.cudnn.allow_tf32 == convolutions
    if mode != "generate":
        scores = [torch.tensor([row.scores for row in found.predictions]) for found in (exact, rounded)]
        assert not torch.equal(*scores)
        torch.testing.assert_close(*scores, atol=0.3, rtol=0.05)


def test_the_protocol_states_it_and_older_results_stay_comparable(shards: Path) -> None:
    task = make_task(load_card("easy_vqa_statements"), shards)
    protocol = task.protocol
    assert as_json(protocol)["precision"] == protocol.describe()["precision"] == "fp32"
    before = {name: value for name, value in asdict(protocol).items() if name not in ("precision", "until")}
    assert protocol.sha256() == hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()
    others = {in_precision(task, precision).protocol.sha256() for precision in ("fp32", "tf32", "bf16")}
    assert len(others) == 3


def test_bfloat16_is_not_mixed_with_what_is_held_in_float16() -> None:
    model = tiny_model()
    check_held("bf16", model)
    model.llm.half()
    check_held("fp32", model)
    with pytest.raises(
        UserError, match="precision=bf16 computes in bfloat16, and the llm of this model is held in float16"
    ):
        check_held("bf16", model)


def test_evaluations_in_two_threads_leave_the_settings_of_torch_as_they_were() -> None:
    def settings() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    def compute_until_the_other_ended() -> None:
        with computing("fp32", torch.device("cpu")):
            began.set()
            assert ended.wait(60)

    before, began, ended = settings(), threading.Event(), threading.Event()
    other = threading.Thread(target=compute_until_the_other_ended, daemon=True)
    with computing("tf32", torch.device("cpu")):
        other.start()
        assert began.wait(60)
    assert settings() == ("highest", False)
    ended.set()
    other.join(60)
    assert settings() == before != ("highest", False)


def test_tf32_needs_a_gpu_that_has_it() -> None:
    check_precision("tf32", torch.device("cuda"))
    check_precision("bf16", torch.device("cpu"))
    with pytest.raises(
        UserError, match="precision=tf32 is for NVIDIA GPUs, and the device is cpu; give precision=fp32"
    ):
        check_precision("tf32", torch.device("cpu"))
