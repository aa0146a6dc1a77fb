"""Let a torchvision wheel built for CUDA import beside a CPU build of PyTorch.

The registry's torchvision wheel registers fake kernels for two detection operators at import and stops when its C++
library, which needs CUDA, could not define them. Neither operator is used here. Declaring their schemas is enough for
`import torchvision` (and so timm) to succeed; where the library does load, its own definitions are left untouched.

They are declared when something first looks for torchvision: commands that need no PyTorch start without it.
"""

import contextlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

_DETECTION_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[Any] = []  # a Library takes its operators with it when it is collected


class _Declaration(MetaPathFinder):
    """Finds nothing; the first time that anybody looks for torchvision it declares the operators."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name == "torchvision" and self in sys.meta_path:
            sys.meta_path.remove(self)
            declare_missing_operators()


def declare_when_looked_for() -> None:
    """Declare the missing operators once something looks for torchvision, as transformers and timm do."""
    sys.meta_path.insert(0, _Declaration())


def declare_missing_operators() -> list[str]:
    """Declare the torchvision operators that its binary could not, and return their names (usually none)."""
    import torch

    package = importlib.util.find_spec("torchvision")
    if package is None or package.origin is None:
        return []
    _load_binary(Path(package.origin).parent)
    missing = [name for name in _DETECTION_OPERATORS if not hasattr(torch.ops.torchvision, name)]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in missing:
            library.define(name + _SCHEMA)
        _declared.append(library)
    return missing


def _load_binary(folder: Path) -> None:
    """Load torchvision's operator library as torchvision itself does, without importing the package."""
    import torch

    for binary in (folder / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES):
        if binary.exists():
            # torchvision passes over this failure too: it only means that the operators stay undefined.
            with contextlib.suppress(OSError):
                torch.ops.load_library(str(binary))
            return
