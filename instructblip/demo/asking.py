"""A checkpoint that visitors ask: whatever was loaded, by what it can do."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from instructblip.errors import UserError
from instructblip.models.attention import ImageAttention
from instructblip.models.base import Model
from instructblip.models.blip import BLIPVQA
from instructblip.models.blip2 import BLIP2
from instructblip.models.instructblip import InstructBLIP
from instructblip.weights.load import LoadedModel

Ability = Literal["generate", "rank", "attention", "match"]
ABILITIES: tuple[Ability, ...] = ("generate", "rank", "attention", "match")
Prompting = Literal["none", "may", "must"]


class Candidate(NamedTuple):
    """A candidate answer.

    Attributes:
        text: as it was given.
        log_likelihood: in nats; with `mean` a token.
        probability: among the candidates: softmax of their log-likelihoods.
    """

    text: str
    log_likelihood: float
    probability: float


class Matching(NamedTuple):
    """How well picture and text match.

    Attributes:
        probability: by the matching head.
        cosine: of their projected features, the contrastive head's.
    """

    probability: float
    cosine: float


class _LeftError(Exception):
    """Nobody waits for the answer any more."""


class Subject:
    """One loaded checkpoint. It answers one question at a time, and keeps the last picture's image tokens.

    Args:
        loaded: the checkpoint.
        label: what it is called on the page.
    """

    def __init__(self, loaded: LoadedModel, label: str) -> None:
        self.loaded, self.label = loaded, label
        self.model: Any = loaded.model
        self._lock = threading.Lock()
        self._seen: tuple[bytes, Tensor] | None = None

    @property
    def abilities(self) -> frozenset[Ability]:
        """Those of `ABILITIES` that the model has a head for."""
        calls = set(self.model.calls())
        looks = type(self.model).attention is not Model.attention
        return frozenset(name for name in ABILITIES if name in calls or (name == "attention" and looks))

    @property
    def prompting(self) -> Prompting:
        """Whether the model reads a prompt where it writes."""
        if isinstance(self.model, BLIP2) or "generate" not in self.abilities:
            return "none"
        aware = isinstance(self.model, InstructBLIP) and self.model.qformer.instruction_aware
        return "must" if aware or isinstance(self.model, BLIPVQA) else "may"

    def lack(self, ability: Ability) -> str:
        """What a model without that ability says of it; empty where it has it."""
        if ability in self.abilities:
            return ""
        try:
            getattr(Model, ability)(self.model)
        except UserError as error:
            return str(error).partition(";")[0]  # what it can do stands beside
        raise AssertionError(ability)

    def written(self, picture: Image.Image, prompt: str, *, num_beams: int, max_new_tokens: int) -> Iterator[str]:
        """The answer so far, after each token; of several beams once, when the search has ended.

        An iteration that is left early ends the writing at its next token.

        Raises:
            UserError: the model cannot take what was given.
        """
        heard: SimpleQueue[str | BaseException | None] = SimpleQueue()
        left = threading.Event()

        def listen(text: str) -> None:
            if left.is_set():
                raise _LeftError
            heard.put(text)

        options: dict[str, Any] = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, "min_new_tokens": 1}
        if num_beams == 1:
            options["on_text"] = listen
        if self.prompting != "none" and prompt:
            options["prompts"] = [prompt]

        def write() -> None:
            try:
                with self._lock:
                    heard.put(self.model.generate(self._tokens(picture), **options)[0])
                heard.put(None)
            except BaseException as error:  # for who waits
                heard.put(error)

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        try:
            while (found := heard.get()) is not None:
                if isinstance(found, BaseException):
                    raise _for_visitors(found)
                yield found
        finally:
            left.set()
            thread.join()

    def rank(self, picture: Image.Image, prompt: str, texts: list[str], normalize: str) -> list[Candidate]:
        """The candidates, the likeliest first.

        Raises:
            UserError: the model cannot take what was given.
        """
        with self._lock, _errors_for_visitors():
            (scores,) = self.model.rank(self._tokens(picture), [prompt], [texts], normalize=normalize)
        rows = zip(texts, scores.tolist(), scores.softmax(dim=0).tolist(), strict=True)
        return sorted((Candidate(*row) for row in rows), key=lambda row: -row.log_likelihood)

    def attention(self, picture: Image.Image, prompt: str) -> ImageAttention:
        """Where its queries look.

        Raises:
            UserError: the model cannot take what was given, or its patches make no square.
        """
        read = [prompt] if self.prompting != "none" else None
        with self._lock, _errors_for_visitors():
            found: ImageAttention = self.model.attention(self._tokens(picture), read)
        if found.grid[0] == 1 < found.grid[1]:
            raise UserError(f"{self.label}: its {found.grid[1]} image tokens make no square that lies over a picture")
        return found

    def match(self, picture: Image.Image, text: str) -> Matching:
        """How well they match.

        Raises:
            UserError: the model cannot take what was given.
        """
        with self._lock, _errors_for_visitors():
            tokens = self._tokens(picture)
            itm, itc = (float(self.model.match(tokens, [text], head=head)) for head in ("itm", "itc"))
        return Matching(itm, itc)

    @torch.inference_mode()
    def _tokens(self, picture: Image.Image) -> Tensor:
        """Image tokens; a picture that is asked about again is not encoded again."""
        key = hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).digest()
        if self._seen is None or self._seen[0] != key:
            self._seen = (key, self.model.image_tokens([picture]))
        return self._seen[1]


@contextmanager
def _errors_for_visitors() -> Iterator[None]:
    """What a model says of its arguments, or a device of its memory, is the visitor's one line."""
    try:
        yield
    except (ValueError, torch.OutOfMemoryError) as error:
        raise _for_visitors(error) from None


def _for_visitors(error: BaseException) -> BaseException:
    if isinstance(error, torch.OutOfMemoryError):
        return UserError("the device's memory is full; give fewer candidates, beams or tokens, or a shorter prompt")
    return UserError(str(error)) if isinstance(error, ValueError) else error
