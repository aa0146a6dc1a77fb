"""What tests of parity begin with: a folder that both codes open, certificates, a small configs/."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from instructblip.config.validate import to_yaml
from instructblip.models.instructblip import InstructBLIP
from instructblip.weights.__main__ import main
from instructblip.weights.transformers_read import load_huggingface
from tests.kit.tiny import HUGGINGFACE_LLMS

# Language model, and the form of the folder: the older one has no word of an `<image>` token.
FORMS = [(llm, form) for llm in HUGGINGFACE_LLMS for form in ("older", "newer")]


class Pair(NamedTuple):
    """One folder, opened by transformers and by this code."""

    folder: Path
    theirs: Any
    ours: InstructBLIP


def written_pair(write: Callable[..., Any], folder: Path, llm: str, form: str) -> Pair:
    """A folder of one of the `FORMS`, by `tiny_huggingface` or `write_captioner`."""
    theirs = write(folder, llm, image_token=form == "newer")
    if form == "older":  # today's class needs a mark for the places of the visual tokens: a word that no text here has
        theirs.config.image_token_index = theirs.config.text_config.vocab_size - 2
    ours = load_huggingface(folder)
    assert isinstance(ours, InstructBLIP)
    return Pair(folder, theirs, ours)


def convert(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[tuple[str, float, str]], str]:
    """The exit status, the certificate's rows and what was said on standard error."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    rows = re.findall(r"│ (\w+) +│ +(\S+) │ +\S+ │ (\w+) +│", output.out)
    return status, [(stage, float(difference), verdict) for stage, difference, verdict in rows], output.err


def write_configs(folder: Path, sections: Mapping[str, Any]) -> None:
    """Write a configs/ of these sections, each under the name of its file."""
    for name, section in sections.items():
        file = folder / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(to_yaml(section))
