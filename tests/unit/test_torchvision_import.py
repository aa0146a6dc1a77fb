"""timm imports beside a torchvision whose binary does not load, and a working binary keeps its operators."""

import subprocess
import sys
from pathlib import Path

import pytest

from instructblip import _torchvision

ROOT = Path(__file__).parents[2]


def run(code: str) -> str:
    """Standard output of a fresh Python in the repository root."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_timm_imports_after_the_declaration() -> None:
    code = """
import sys
import instructblip
from instructblip._torchvision import declare_missing_operators
assert "torch" not in sys.modules
import timm
assert declare_missing_operators() == []  # the package had them declared
print(timm.create_model("test_efficientnet", pretrained=False).num_classes)
"""
    assert run(code) == "1000"


@pytest.mark.slow
def test_an_existing_operator_is_left_untouched() -> None:
    code = """
import importlib.util, torch
spec = importlib.util.spec_from_file_location("shim", "instructblip/_torchvision.py")
shim = importlib.util.module_from_spec(spec)  # by its path: the package declares at import
spec.loader.exec_module(shim)
shim._load_binary = lambda folder: None
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.impl("nms", lambda dets, scores, iou_threshold: scores + 1, "CPU")
assert shim.declare_missing_operators() == ["qnms"]
print(torch.ops.torchvision.nms(torch.zeros(1, 4), torch.ones(1), 0.5).item())
"""
    assert run(code) == "2.0"


def test_without_torchvision_there_is_nothing_to_declare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torchvision.importlib.util, "find_spec", lambda name: None)
    assert _torchvision.declare_missing_operators() == []
