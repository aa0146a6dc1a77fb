"""What the methods of models are called with, checked before anything is computed.

A string is a sequence of letters, and a path a string: given for a list they would be taken letter by letter and answered.
"""

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import PurePath
from typing import Any, TypedDict, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from instructblip.errors import UserError

_MOST_NAMED = 5  # samples in a message

OnText = Callable[[str], None]  # the text of new tokens so far
Method = TypeVar("Method", bound=Callable[..., Any])


class EntryError(ValueError):
    """A wrong entry of an argument that has one for each sample.

    Attributes:
        argument: its name, a plural.
        number: of the entry.
        reason: what is wrong with it, as it follows the name.
    """

    def __init__(self, argument: str, number: int, reason: str) -> None:
        super().__init__(f"{argument}[{number}] {reason}")
        self.argument, self.number, self.reason = argument, number, reason


def of_samples(error: ValueError, ids: Sequence[str]) -> UserError:
    """What is wrong with a batch of a dataset's samples, for the person whose data they are.

    Args:
        error: what a method of a model said of the batch.
        ids: of its samples.
    """
    if isinstance(error, EntryError):
        return UserError(f"{ids[error.number]}: its {error.argument.removesuffix('s')} {error.reason}")
    named = ", ".join(ids[:_MOST_NAMED]) + (f" and {len(ids) - _MOST_NAMED} more" if len(ids) > _MOST_NAMED else "")
    return UserError(f"the model cannot take {named}: {error}; correct them in their source, and prepare it again")


def check_images(images: Any) -> int:
    """The number of pictures, clips or image tokens.

    Raises:
        ValueError: names `images`.
    """
    if isinstance(images, Tensor):
        _check_tensor(images)
        return len(images)
    _check_list("images", images, "PIL images")
    for number, clip in enumerate(images):
        name = f"images[{number}]"
        if isinstance(clip, Image.Image) or not _is_list(clip):
            _check_picture(name, clip)
            continue
        if not len(clip):
            raise ValueError(f"{name} is a clip without frames; give at least one")
        for place, frame in enumerate(clip):
            _check_picture(f"{name}[{place}]", frame)
    frames = frame_counts(images)
    if len(set(frames)) > 1:
        raise ValueError(
            f"images holds clips of {min(frames)} and of {max(frames)} frames; give clips of one length a call"
        )
    return len(images)


def frame_counts(images: Any) -> list[int]:
    """How many frames each entry of `images` has, which was checked."""
    if isinstance(images, Tensor):
        return [images.shape[1]] * len(images)
    return [1 if isinstance(clip, Image.Image) else len(clip) for clip in images]


def check_texts(name: str, texts: Any, count: int | None) -> None:
    """A list of strings, as many as there are images; None: of any length.

    Raises:
        ValueError: names the argument.
    """
    _check_list(name, texts, "strings")
    for number, text in enumerate(texts):
        if wrong := _what_is_wrong_with(text):
            raise EntryError(name, number, wrong)
    if count is not None and len(texts) != count:
        raise ValueError(f"{name} has {len(texts)} entries for {count} images; give one for each")


def check_tokens(name: str, sequences: Any, count: int) -> None:
    """`count` lists of token ids, none of them empty.

    Raises:
        ValueError: names the argument.
    """
    _check_list(name, sequences, "lists of token ids")
    for number, tokens in enumerate(sequences):
        _check_list(f"{name}[{number}]", tokens, "token ids")
        if not all(_is_whole(token) for token in tokens):
            raise ValueError(f"{name}[{number}] holds something else than token ids; give whole numbers")
    if len(sequences) != count:
        raise ValueError(f"{name} has {len(sequences)} entries for {count} images; give one for each")


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
            if wrong := _what_is_wrong_with(text):
                raise ValueError(f"{name}[{place}] {wrong}")
    if len(candidates) != count:
        raise ValueError(f"candidates has {len(candidates)} lists for {count} prompts; give one for each")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """One of a few words.

    Raises:
        ValueError: names the argument.
    """
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; give {' or '.join(map(repr, choices))}")


def check_names(name: str, values: Any, known: Collection[str]) -> None:
    """Some of a few words, in any collection.

    Raises:
        ValueError: names the argument.
    """
    if isinstance(values, str) or not isinstance(values, Collection):
        raise ValueError(f"{name} is of type {type(values).__name__}; give a list of names")
    if unknown := [value for value in values if value not in known]:
        raise ValueError(f"{name} holds {unknown[0]!r}; there are {', '.join(sorted(known))}")


def check_counts(counts: Mapping[str, Any], *, at_least: int) -> None:
    """Whole numbers that are not too small.

    Raises:
        ValueError: names the argument.
    """
    for name, value in counts.items():
        if not _is_whole(value) or value < at_least:
            raise ValueError(f"{name} is {value!r}; give a whole number of at least {at_least}")


class DecodingOptions(TypedDict, total=False):
    """`Decoding`, as callers may give it."""

    num_beams: int
    max_new_tokens: int
    min_new_tokens: int
    length_penalty: float
    repetition_penalty: float
    do_sample: bool
    temperature: float
    top_p: float
    noise: Tensor | None
    on_text: OnText | None


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How texts are written.

    Attributes:
        num_beams: 1 is greedy, or sampling with `do_sample`.
        max_new_tokens: of each text at most, its end token among them.
        min_new_tokens: at least so many stand before the end token.
        length_penalty: of beam search: exponent of the tokens that a text's log-likelihood is divided by; 1 for their mean.
        repetition_penalty: against tokens that a text already holds, those it was begun with among them; 1 for none.
        do_sample: draw each token from the smallest set of probability `top_p`, after division of the logits by
            `temperature`.
        noise: what sampling draws with, a number in [0, 1) for each new token of each image (B, max_new_tokens or more): a
            text is then a function of its own numbers, whatever stands beside it. None: torch's global random stream.
        on_text: called with the text so far after each token, of one image and one beam.
    """

    num_beams: int = 1
    max_new_tokens: int = 10
    min_new_tokens: int = 1
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    noise: Tensor | None = None
    on_text: OnText | None = None

    def given(self, options: DecodingOptions, count: int, *, draws_one: bool = False) -> "Decoding":
        """A caller's options, the rest as it is here; checked.

        Args:
            options: what was given.
            count: of the images.
            draws_one: sampling draws one text, whatever `num_beams`.

        Raises:
            TypeError: an unknown option, by its name.
            ValueError: a wrong one, by its name.
        """
        if unknown := options.keys() - DecodingOptions.__annotations__:
            raise TypeError(f"generate() got an unexpected keyword argument {min(unknown)!r}")
        found = replace(self, **options)
        found._check_numbers()
        found = found._plain()
        found._check_noise(count)
        if draws_one and found.do_sample:
            found = replace(found, num_beams=1)
        if found.on_text is not None and not callable(found.on_text):
            raise ValueError(f"on_text is of type {type(found.on_text).__name__}; give a function of the text so far")
        if found.on_text is not None and count != 1:
            raise ValueError(f"on_text follows one text as it is written, not {count}; give one image")
        if found.on_text is not None and found.num_beams != 1:
            raise ValueError(
                f"on_text follows a text whose tokens stay, not a search with {found.num_beams} beams; set num_beams=1"
            )
        if found.noise is not None and found.num_beams > 1:
            raise ValueError("noise draws one text for each image: num_beams=1")
        return found

    def of_rows(self, rows: Sequence[int]) -> "Decoding":
        """For some of the images, which keep their own noise."""
        return self if self.noise is None else replace(self, noise=self.noise[list(rows)])

    def _check_numbers(self) -> None:
        check_counts({"num_beams": self.num_beams, "max_new_tokens": self.max_new_tokens}, at_least=1)
        check_counts({"min_new_tokens": self.min_new_tokens}, at_least=0)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}, more than max_new_tokens ({self.max_new_tokens})"
            )
        if not _is_number(self.length_penalty):
            raise ValueError(f"length_penalty is {self.length_penalty!r}; give a number, 1 for the mean a token")
        for name, value in {"repetition_penalty": self.repetition_penalty, "temperature": self.temperature}.items():
            if not _is_number(value) or value <= 0:
                raise ValueError(f"{name} is {value!r}; give a number above 0, 1 for none")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p!r}; give a probability above 0, 1 for all tokens")
        if not isinstance(self.do_sample, bool | np.bool_):  # any text is true, "false" too
            raise ValueError(f"do_sample is {self.do_sample!r}; give True or False")

    def _plain(self) -> "Decoding":
        """With Python's own numbers, which transformers insists on."""
        kinds = {"num_beams": int, "max_new_tokens": int, "min_new_tokens": int, "do_sample": bool}
        kinds |= dict.fromkeys(("length_penalty", "repetition_penalty", "temperature", "top_p"), float)
        plain: Any = {name: kind(getattr(self, name)) for name, kind in kinds.items()}
        return replace(self, **plain)

    def _check_noise(self, count: int) -> None:
        noise, most = self.noise, self.max_new_tokens
        if noise is None:
            return
        if not self.do_sample:
            raise ValueError("noise is what sampling draws with; set do_sample=True, or leave it out")
        if not isinstance(noise, Tensor) or not noise.is_floating_point() or noise.ndim != 2:
            raise ValueError("noise is no tensor of numbers (images, tokens); give one of torch.rand")
        if len(noise) != count or noise.shape[1] < most:
            raise ValueError(
                f"noise is of {tuple(noise.shape)} for {count} images and {most} new tokens; give a number for each"
            )
        if not ((noise >= 0) & (noise < 1)).all():
            raise ValueError("noise holds numbers outside of [0, 1); give those of torch.rand")


def shows_options(defaults: Decoding, **instead: Any) -> Callable[[Method], Method]:
    """Names a method's options of decoding and their defaults where Python is asked what it takes: `help`, notebooks.

    Args:
        defaults: of the method's class.
        instead: those that are decided when it is called.
    """

    def names_them(method: Method) -> Method:
        own = inspect.signature(method)
        *stated, _ = own.parameters.values()
        options = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=instead.get(field.name, getattr(defaults, field.name)),
                annotation=field.type,
            )
            for field in fields(defaults)
        ]
        method.__signature__ = own.replace(parameters=[*stated, *options])  # type: ignore[attr-defined]
        return method

    return names_them


def check_positions(spans: Sequence[int], limit: int | None) -> None:
    """Prompts that fit the language model's positions, together with their answers.

    Args:
        spans: positions that each prompt needs with its visual tokens and its answer.
        limit: positions that there are; None: any number.

    Raises:
        EntryError: names the prompt.
    """
    for number, span in enumerate(spans):
        if limit is not None and span > limit:
            raise EntryError(
                "prompts",
                number,
                f"needs {span} positions with its visual tokens and its answer; the language model has {limit}: shorten the "
                "prompt or the answer, or give fewer frames",
            )


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _check_list(name: str, value: Any, of: str) -> None:
    if not _is_list(value):
        raise ValueError(f"{name} is of type {type(value).__name__}; give a list of {of}")
    if not len(value):
        raise ValueError(f"{name} is empty; give a list of {of}")


def _what_is_wrong_with(text: Any) -> str:
    """Nothing: it is a text that a tokenizer takes."""
    if not isinstance(text, str):
        return f"is of type {type(text).__name__}; give strings"
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a character
        return f"is no text: {error.reason} at place {error.start}"
    return ""


def _check_tensor(images: Tensor) -> None:
    frames = images.dtype == torch.uint8 and images.ndim == 5 and images.shape[2] == 3
    tokens = images.is_floating_point() and images.ndim == 4
    if not images.numel() or not (frames or tokens):
        raise ValueError(
            f"images is a tensor of {tuple(images.shape)}, {images.dtype}; give uint8 frames (B, F, 3, H, W), or image "
            "tokens (B, F, P, V)"
        )


def _check_picture(name: str, value: Any) -> None:
    if isinstance(value, str | PurePath):
        raise ValueError(f"{name} is a path; give the picture itself, PIL.Image.open({str(value)!r})")
    if not isinstance(value, Image.Image):
        raise ValueError(f"{name} is of type {type(value).__name__}; give a PIL image, or a list of them for a clip")
    if 0 in value.size:
        raise ValueError(f"{name} has no pixels: its size is {value.size}")
