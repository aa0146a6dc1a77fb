"""What `generate`, `rank` and `forward` are called with, checked before anything is computed.

A string is a sequence of letters, and a path a string: given for a list they would be taken letter by letter and answered.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from PIL import Image
from torch import Tensor


def check_images(images: Any) -> int:
    """The number of pictures, clips or image tokens.

    Raises:
        ValueError: names `images`.
    """
    if isinstance(images, Tensor):
        if images.ndim not in (4, 5) or not len(images):
            raise ValueError(
                f"images is a tensor of {tuple(images.shape)}; give frames (B, F, 3, H, W) or image tokens (B, F, P, V)"
            )
        return len(images)
    _check_list("images", images, "PIL images")
    for number, clip in enumerate(images):
        name = f"images[{number}]"
        if isinstance(clip, Image.Image):
            continue
        if not _is_list(clip) or isinstance(clip, Tensor):
            _check_picture(name, clip)
        if not len(clip):
            raise ValueError(f"{name} is a clip without frames; give at least one")
        for place, frame in enumerate(clip):
            _check_picture(f"{name}[{place}]", frame)
    return len(images)


def check_texts(name: str, texts: Any, count: int) -> None:
    """A list of `count` strings.

    Raises:
        ValueError: names the argument.
    """
    _check_list(name, texts, "strings")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{number}] is of type {type(text).__name__}; give strings")
    if len(texts) != count:
        raise ValueError(f"{name} has {len(texts)} entries for {count} images; give one for each")


def check_candidates(candidates: Any, count: int) -> None:
    """`count` lists of strings, none of them empty.

    Raises:
        ValueError: names `candidates`.
    """
    _check_list("candidates", candidates, "lists of strings, one for each prompt")
    for number, texts in enumerate(candidates):
        name = f"candidates[{number}]"
        _check_list(name, texts, "strings")
        for place, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"{name}[{place}] is of type {type(text).__name__}; give strings")
    if len(candidates) != count:
        raise ValueError(f"candidates has {len(candidates)} lists for {count} prompts; give one for each")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """One of a few words.

    Raises:
        ValueError: names the argument.
    """
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; give {' or '.join(map(repr, choices))}")


def check_counts(counts: Mapping[str, Any], *, at_least: int) -> None:
    """Whole numbers that are not too small.

    Raises:
        ValueError: names the argument.
    """
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
            raise ValueError(f"{name} is {value!r}; give a whole number of at least {at_least}")


def check_decoding(
    *,
    num_beams: int,
    max_new_tokens: int,
    min_new_tokens: int,
    length_penalty: float,
    repetition_penalty: float,
    temperature: float,
    top_p: float,
) -> None:
    """Settings of decoding that go together.

    Raises:
        ValueError: names the argument.
    """
    check_counts({"num_beams": num_beams, "max_new_tokens": max_new_tokens}, at_least=1)
    check_counts({"min_new_tokens": min_new_tokens}, at_least=0)
    if min_new_tokens > max_new_tokens:
        raise ValueError(f"min_new_tokens is {min_new_tokens}, more than max_new_tokens ({max_new_tokens})")
    if not _is_number(length_penalty):
        raise ValueError(f"length_penalty is {length_penalty!r}; give a number, 1 for the mean a token")
    for name, value in {"repetition_penalty": repetition_penalty, "temperature": temperature}.items():
        if not _is_number(value) or value <= 0:
            raise ValueError(f"{name} is {value!r}; give a number above 0, 1 for none")
    if not _is_number(top_p) or not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p!r}; give a probability above 0, 1 for all tokens")


def check_positions(lengths: Sequence[int], answer: int, limit: int | None) -> None:
    """Prompts that fit the language model's positions, together with their answers.

    Args:
        lengths: positions of each prompt with its visual tokens.
        answer: positions of the longest answer.
        limit: positions that there are; None: any number.

    Raises:
        ValueError: names the prompt.
    """
    for number, length in enumerate(lengths):
        if limit is not None and length + answer > limit:
            raise ValueError(
                f"prompts[{number}] needs {length} positions with its visual tokens and {answer} for the answer; the "
                f"language model has {limit}: shorten it"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _check_list(name: str, value: Any, of: str) -> None:
    if not _is_list(value):
        raise ValueError(f"{name} is of type {type(value).__name__}; give a list of {of}")
    if not len(value):
        raise ValueError(f"{name} is empty; give a list of {of}")


def _check_picture(name: str, value: Any) -> None:
    if isinstance(value, str | PurePath):
        raise ValueError(f"{name} is a path; give the picture itself, PIL.Image.open({str(value)!r})")
    if not isinstance(value, Image.Image):
        raise ValueError(f"{name} is of type {type(value).__name__}; give a PIL image, or a list of them for a clip")
