"""What an evaluation harness asks of a model: texts to write, and the log-likelihoods of given texts.

A request is read by the arguments that lmms-eval gives it, so nothing here needs that package:

    to write     (prompt, settings of decoding, document -> pictures, document id, task, split)
    to score     (prompt, text or document -> text, document -> pictures, document id, task, split)
"""

import logging
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple, Protocol, TypeVar, cast

from PIL import Image

from instructblip.errors import UserError
from instructblip.models.arguments import Decoding, DecodingOptions, of_samples
from instructblip.models.decoding import cut_at
from instructblip.models.facts import SEARCH

logger = logging.getLogger(__name__)

# Task -> split -> its documents.
Documents = Mapping[str, Mapping[str, Sequence[Any]]]
Answered = Callable[[int], None]  # told how many requests more are answered

MAX_NEW_TOKENS = 1024  # where a task says nothing; that of lmms-eval's own class of InstructBLIP
_WRITE, _SCORE = 6, 6  # arguments of a request
_IMAGE_MARK = "<image>"  # stands for a picture in some tasks' prompts
_OF_SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "seed")

Item = TypeVar("Item")


class Request(Protocol):
    """An lmms-eval `Instance`, as far as it is read."""

    @property
    def args(self) -> tuple[Any, ...]:
        """What the task asks."""


class TaskDecoding(NamedTuple):
    """How a task wants its texts written.

    Attributes:
        options: of `generate`, in the order of their names.
        until: texts that end an answer and are no part of it.
    """

    options: tuple[tuple[str, Any], ...]
    until: tuple[str, ...]


class _Asked(NamedTuple):
    """One prompt about one document's pictures; `place` among the requests."""

    place: int
    prompt: str
    pictures: Callable[[Any], Any]
    document: tuple[str, str, Any]  # task, split, id

    @property
    def name(self) -> str:
        return "/".join(map(str, self.document))


def read_decoding(given: Mapping[str, Any], *, max_new_tokens: int = MAX_NEW_TOKENS) -> TaskDecoding:
    """A task's `generation_kwargs`.

    Args:
        given: as the task states them.
        max_new_tokens: where it does not.

    Raises:
        UserError: it wants texts drawn, something that is not known here, or a number that is none.
    """
    settings = {name: value for name, value in given.items() if value is not None}
    if settings.get("do_sample", settings.get("temperature", 0) > 0):
        asked = ", ".join(f"{name}={settings[name]}" for name in _OF_SAMPLING if name in settings)
        raise UserError(
            f"the task wants its answers drawn ({asked}), and instructblip_native writes the likeliest, which come out the "
            "same in every batch and on every rank; give --gen_kwargs do_sample=False,temperature=0"
        )
    until = settings.pop("until", ())
    until = (until,) if isinstance(until, str) else tuple(until)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "min_new_tokens": 0}
    for name, value in settings.items():
        if name in SEARCH:
            options[name] = value
        elif name not in _OF_SAMPLING:
            known = ", ".join(("until", *SEARCH))
            raise UserError(f"generation_kwargs has {name}, which instructblip_native does not know; it takes {known}")
    try:  # here, where no document is to blame
        Decoding().given(cast(DecodingOptions, options), 1)
    except ValueError as error:
        raise UserError(f"generation_kwargs: {error}; --gen_kwargs sets another") from None
    return TaskDecoding(tuple(sorted(options.items())), tuple(text for text in until if text))


def write_answers(
    model: Any,
    requests: Sequence[Request],
    documents: Documents,
    *,
    batch_size: int,
    max_new_tokens: int = MAX_NEW_TOKENS,
    answered: Answered = lambda _: None,
) -> list[str]:
    """The model's text for each request, cut at the first of its task's `until`; never with the prompt in it.

    Args:
        model: what `instructblip.load` returns.
        requests: in any order.
        documents: the tasks' own.
        batch_size: requests at a time; changes no text.
        max_new_tokens: where a task does not say it.
        answered: told of each batch.

    Raises:
        UserError: a model that writes nothing, or a request that it cannot take.
    """
    if not {"generate", "caption"} & model.SKILLS:
        raise UserError(f"{model.title} writes no texts; it can {', '.join(model.calls())}")
    prompted = "generate" in model.SKILLS
    if not prompted:
        logger.warning("%s captions pictures and reads no prompts: those of the tasks are left out", model.title)
    by_decoding: dict[TaskDecoding, list[_Asked]] = {}
    for place, request in enumerate(requests):
        asked, settings = _read(place, request, _WRITE)
        by_decoding.setdefault(read_decoding(settings, max_new_tokens=max_new_tokens), []).append(asked)
    texts = [""] * len(requests)
    for decoding, group in by_decoding.items():
        for batch, images in _batches(group, documents, batch_size):
            prompts = ([asked.prompt for asked in batch],) if prompted else ()
            written = _of_model(model.generate, batch, images, *prompts, **dict(decoding.options))
            for asked, text in zip(batch, written, strict=True):
                texts[asked.place] = cut_at(text, decoding.until)
            answered(len(batch))
    return texts


def score_texts(
    model: Any,
    requests: Sequence[Request],
    documents: Documents,
    *,
    batch_size: int,
    include_eos: bool = False,
    answered: Answered = lambda _: None,
) -> list[tuple[float, bool]]:
    """For each request the log-likelihood of its text in nats, and whether greedy decoding would write that text.

    White space in front of a text is the harness's own delimiter and is left out: the model joins prompt and answer in its
    way. Texts after the same prompt on the same pictures share the work.

    Args:
        model, requests, documents, batch_size, answered: as of `write_answers`; a batch is of prompts.
        include_eos: count the end of the text as one of its tokens.

    Raises:
        UserError: a model that gives no log-likelihoods, or a request that it cannot take.
    """
    if "llm" not in model.PARTS:
        raise UserError(
            f"{model.title} has no language model to give log-likelihoods with; it can {', '.join(model.calls())}: take "
            "tasks of output_type generate_until"
        )
    texts_of: dict[Hashable, list[tuple[int, str]]] = {}
    prompts: list[_Asked] = []
    for place, request in enumerate(requests):
        asked, text = _read(place, request, _SCORE)
        text = text(_document(asked, documents)) if callable(text) else text
        key = (asked.prompt, asked.document)
        if key not in texts_of:
            texts_of[key] = []
            prompts.append(asked)
        texts_of[key].append((place, str(text).lstrip()))
    results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    for batch, images in _batches(prompts, documents, batch_size):
        texts = [texts_of[asked.prompt, asked.document] for asked in batch]
        candidates = [[text for _, text in own] for own in texts]
        asked_prompts = [asked.prompt for asked in batch]
        found = _of_model(model.rank, batch, images, asked_prompts, candidates, include_eos=include_eos)
        greedy = _of_model(model.is_greedy, batch, images, asked_prompts, candidates, include_eos=include_eos)
        for own, scores, flags in zip(texts, found, greedy, strict=True):
            for (place, _), score, flag in zip(own, scores.tolist(), flags, strict=True):
                results[place] = score, flag
        answered(sum(map(len, texts)))
    return results


def _read(place: int, request: Request, arguments: int) -> tuple[_Asked, Any]:
    """What a request asks, and its second argument."""
    given = request.args
    if len(given) != arguments or not callable(given[2]):
        raise UserError(
            f"request {place} is not about a picture ({len(given)} arguments), and instructblip_native answers no others"
        )
    prompt, second, pictures, number, task, split = given
    return _Asked(place, prompt.replace(_IMAGE_MARK, ""), pictures, (task, split, number)), second


def _document(asked: _Asked, documents: Documents) -> Any:
    task, split, number = asked.document
    return documents[task][split][number]


def _batches(
    asked: Sequence[_Asked], documents: Documents, batch_size: int
) -> Iterator[tuple[Sequence[_Asked], list[list[Image.Image]]]]:
    """Prompts of like length together, with their pictures, as many in each of a batch; read when it is its turn."""
    in_order = sorted(asked, key=lambda one: len(one.prompt))
    for start in range(0, len(in_order), batch_size):
        batch = [(one, _pictures(one, documents)) for one in in_order[start : start + batch_size]]
        for _, alike in groupby(sorted(batch, key=_count), key=_count):
            rows = list(alike)
            yield [one for one, _ in rows], [pictures for _, pictures in rows]


def _count(row: tuple[_Asked, list[Image.Image]]) -> int:
    return len(row[1])


def _pictures(asked: _Asked, documents: Documents) -> list[Image.Image]:
    found = asked.pictures(_document(asked, documents))
    pictures = list(found) if isinstance(found, Sequence) and not isinstance(found, str | bytes) else [found]
    if wrong := [picture for picture in pictures if not isinstance(picture, Image.Image)]:
        raise UserError(
            f"{asked.name} is about a {type(wrong[0]).__name__}, not a picture; instructblip_native reads pictures alone"
        )
    if not pictures:
        raise UserError(f"{asked.name} has no picture, and instructblip_native answers about pictures alone")
    return pictures


def _of_model(call: Callable[..., Any], batch: Sequence[_Asked], *arguments: Any, **options: Any) -> Any:
    """What a call of the model gives, whose complaint about an argument becomes one about the documents.

    Raises:
        UserError: an argument that the model cannot take, such as several pictures where it reads one.
    """
    try:
        return call(*arguments, **options)
    except ValueError as error:
        raise of_samples(error, [asked.name for asked in batch]) from None
