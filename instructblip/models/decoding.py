"""Texts from a model with a cache: greedy, nucleus sampling, and beam search as three versions of transformers have it.

BLIP and BLIP-2 were released with transformers 4.26, InstructBLIP with 4.33. Each version stops a beam search by another
rule, and divides the log-likelihood of a text by another length, so that they find other captions. What has ended leaves the
batch where the cache allows it.

Shape legend: B batch, N beams, R = B x N rows, T tokens, W vocabulary.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from instructblip.errors import UserError
from instructblip.models.arguments import Decoding
from instructblip.models.streaming import OnIds

# (token ids (R, T) that the cache does not hold yet, the cache) -> logits (R, W) of the token behind them.
Step = Callable[[Tensor, Any], Tensor]

# (token ids so far (R, T), scores (R, W) of the next one) -> changed scores.
Process = Callable[[Any, Any], Tensor]

# Scores (R, W), numbers of the R rows in the batch -> the next token of each row (R,).
Choose = Callable[[Tensor, Tensor], Tensor]

_ENTERING = 4  # others enter once a share of one in so many places is free: each entry copies the cache


class Cache(Protocol):
    """What a model has computed of the rows; a dataclass."""

    def select(self, rows_N: Tensor) -> Self:
        """Of these rows, in this order; one may be taken more than once. What was given may be used up."""


class OpenCache(Cache, Protocol):
    """A cache that rows can enter."""

    def joined(self, other: Self) -> Self:
        """Of these rows and then the other's. What was given may be used up."""


@dataclass(frozen=True)
class BeamLengths:
    """How a version of transformers counts tokens in its beam search. The n-th new token is being added.

    Attributes:
        before: tokens counted in front of the new ones; None: those of the start.
        end: 1 where a text that ends is divided by a length with its end token, else 0.
        added: 1 where the search is judged to be over by a length with the n-th token, else 0.
        by_running: it is judged by the best beam that goes on; else by the best candidate, which may have ended. At the
            largest length the N best candidates are taken as they are; else the N best that have not ended.
    """

    before: int | None
    end: int
    added: int
    by_running: bool


RELEASED_BLIP = BeamLengths(before=None, end=0, added=0, by_running=False)  # transformers 4.26, and BLIP's repository
BEAM_LENGTHS = {
    "new_tokens": BeamLengths(before=0, end=1, added=1, by_running=True),  # transformers since 4.35
    # It counts the token that generation begins with, which is none of the text where a prompt is embedded.
    "transformers_4_33": BeamLengths(before=1, end=0, added=1, by_running=False),
}


@contextmanager
def finite_logits() -> Iterator[Callable[[Tensor], None]]:
    """What logits are shown to; at the end of the block refuse what was generated from NaN or +infinity.

    A model with such logits writes texts like any other. The check costs no wait for the device until the end.

    Raises:
        UserError: there were such logits.
    """
    found: list[Tensor] = []

    def look(logits: Tensor) -> None:
        wrong = ~(logits < torch.inf).all()
        found[:] = [wrong | found[0]] if found else [wrong]

    try:
        yield look
    except RuntimeError:  # transformers' sampling stumbles over such numbers itself
        if not (found and bool(found[0])):
            raise
    if found and bool(found[0]):
        raise UserError(
            "the language model's logits are not finite numbers; weights are damaged, or overflow in their dtype"
        )


@torch.no_grad()
def decode(
    step: Step,
    start_BT: Tensor,
    cache: Cache,
    decoding: Decoding,
    *,
    eos_id: int,
    pad_id: int,
    on_ids: OnIds | None = None,
) -> Tensor:
    """Continue token sequences as BLIP was released; the repetition penalty and lengths of beams count those of the start.

    Args:
        step: runs new tokens through the blocks and extends the cache.
        start_BT: the tokens to begin with; none is padding. T may be 0 where `step` has logits from the cache alone.
        cache: what stands in front of them (each sample's queries, say).
        decoding: how.
        eos_id: ends a text.
        pad_id: fills the rows behind it.
        on_ids: called after each token with the new ones so far; without beams.

    Returns:
        Start and new tokens (B, T).

    Raises:
        UserError: logits that are not finite.
    """
    search = _search(start_BT, decoding, RELEASED_BLIP, on_ids, eos_id=eos_id, pad_id=pad_id, leaves=False)
    cache = replace(cache)  # type: ignore[type-var]
    if decoding.num_beams > 1:
        cache = cache.select(_beam_rows(start_BT, decoding.num_beams))
    with finite_logits() as look:
        while not search.ended:
            look(logits_RW := step(search.new_RT, cache))
            rows_R = search.take(logits_RW)
            if rows_R is not None and not search.ended:
                cache = cache.select(rows_R)
    return search.texts()


@torch.no_grad()
def decode_in_turn(
    step: Step,
    begin: Callable[[Sequence[int]], OpenCache],
    count: int,
    at_once: int,
    decoding: Decoding,
    lengths: BeamLengths,
    *,
    device: torch.device,
    eos_id: int,
    pad_id: int,
    on_ids: OnIds | None,
) -> list[Tensor]:
    """Continue prompts from nothing: as some end, others enter their places, so that a step always serves many.

    Args:
        step: as of `decode`; gives logits for no tokens from the cache that `begin` gave, which holds all it knows of a row.
        begin: a cache of these prompts, by their numbers, a row each.
        count: of all prompts.
        at_once: so many of them are in the cache together, at most.
        lengths: how beam search counts them.
        device: of the token ids.
        decoding, eos_id, pad_id, on_ids: as of `decode`.

    Returns:
        The new tokens of each prompt.
    """
    found: list[Tensor] = [torch.empty(0)] * count
    waiting, running, cache = deque(range(count)), list[tuple[list[int], _Search]](), None
    while waiting or running:
        free = at_once - sum(search.prompts for _, search in running)
        if waiting and (not running or free * _ENTERING >= at_once):
            numbers = [waiting.popleft() for _ in range(min(free, len(waiting)))]
            start_BT = torch.zeros(len(numbers), 0, dtype=torch.long, device=device)
            own = decoding.of_rows(numbers)
            search = _search(start_BT, own, lengths, on_ids, eos_id=eos_id, pad_id=pad_id, leaves=True)
            entering = begin(numbers)
            if own.num_beams > 1:
                entering = entering.select(_beam_rows(start_BT, own.num_beams))
            rows_R = search.take(step(search.new_RT, entering))
            if not search.ended:
                entering = entering if rows_R is None else entering.select(rows_R)
                cache = entering if cache is None else cache.joined(entering)
            running.append((numbers, search))
        else:
            logits_RW = step(torch.cat([search.new_RT for _, search in running]), cache)
            cache = _taken(running, logits_RW, cache)
        for numbers, search in running:
            if search.ended:
                for number, text_T in zip(numbers, search.texts(), strict=True):
                    found[number] = text_T
        running = [(numbers, search) for numbers, search in running if not search.ended]
        cache = cache if running else None
    return found


def _taken(running: Sequence[tuple[list[int], "_Search"]], logits_RW: Tensor, cache: Any) -> Any:
    """Hand to each search the logits of its rows; the cache of the rows that go on."""
    kept, first, changed = list[Tensor](), 0, False
    for (_, search), own_RW in zip(
        running, logits_RW.split([len(search.new_RT) for _, search in running]), strict=True
    ):
        rows_R = search.take(own_RW)
        if not search.ended:
            kept.append(first + (torch.arange(len(own_RW), device=own_RW.device) if rows_R is None else rows_R))
        changed |= search.ended or rows_R is not None
        first += len(own_RW)
    return cache.select(torch.cat(kept)) if kept and changed else cache


def _beam_rows(start_BT: Tensor, beams: int) -> Tensor:
    return torch.arange(len(start_BT), device=start_BT.device).repeat_interleave(beams)


def _search(
    start_BT: Tensor,
    decoding: Decoding,
    lengths: BeamLengths,
    on_ids: OnIds | None,
    *,
    eos_id: int,
    pad_id: int,
    leaves: bool,
) -> "_Search":
    """`leaves`: what has ended is dropped from the cache, which holds all that is known of a row."""
    first, device = start_BT.shape[1], str(start_BT.device)
    processors = LogitsProcessorList()
    if decoding.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(decoding.repetition_penalty)))
    if decoding.min_new_tokens > 0:
        processors.append(MinLengthLogitsProcessor(first + decoding.min_new_tokens, eos_id, device=device))
    if decoding.do_sample:
        processors += _nucleus(decoding)
    tokens = _Tokens(eos_id, pad_id, first + decoding.max_new_tokens)
    if decoding.num_beams > 1:
        before = first if lengths.before is None else lengths.before
        counted = _Counted(first, before, lengths, decoding.length_penalty)
        return _Beams(start_BT, processors, tokens, decoding.num_beams, counted, leaves=leaves)
    choices = _draws(decoding.noise, start_BT.device) if decoding.do_sample else repeat(_likeliest)
    # torch's stream gives every row a number in each step
    leaves = leaves and not (decoding.do_sample and decoding.noise is None)
    return _OneTextEach(start_BT, processors, tokens, choices, on_ids, leaves=leaves)


def cut_at(text: str, until: Sequence[str]) -> str:
    """What of a text stands in front of the first of some others, without white space around it."""
    ends = [place for stop in until if (place := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))].strip()


class _Tokens(NamedTuple):
    eos_id: int
    pad_id: int
    max_length: int  # the start's tokens are counted


def _likeliest(scores_RW: Tensor, _rows_R: Tensor) -> Tensor:
    return scores_RW.argmax(dim=1)


def _draw(scores_RW: Tensor, _rows_R: Tensor) -> Tensor:
    return torch.multinomial(_shares(scores_RW), 1)[:, 0]


def _draw_with(scores_RW: Tensor, rows_R: Tensor, *, noise_B: Tensor) -> Tensor:
    return drawn_with(scores_RW, noise_B[rows_R])


def _shares(scores_BW: Tensor) -> Tensor:
    """Probabilities; even ones of a row that is no row of numbers, which `finite_logits` refuses at the end: until then it
    must name a token.
    """
    return scores_BW.softmax(dim=1).nan_to_num(nan=1.0)


def _draws(noise_BT: Tensor | None, device: torch.device) -> Iterator[Choose]:
    """How each new token is drawn, in turn."""
    if noise_BT is None:
        return repeat(_draw)
    return (partial(_draw_with, noise_B=noise_B) for noise_B in noise_BT.to(device).T)


def _nucleus(decoding: Decoding) -> list[LogitsProcessor]:
    """What leaves to scores the smallest set of probability `top_p`, after division by `temperature`."""
    return [TemperatureLogitsWarper(float(decoding.temperature)), TopPLogitsWarper(decoding.top_p)]


def drawn_with(scores_BW: Tensor, noise_B: Tensor) -> Tensor:
    """The token (B,) of each row that a number in [0, 1) falls on, where all tokens share that interval by their
    probabilities; never one of score -inf.
    """
    # In float64 no order of summation, which a GPU does not promise, moves a border by what a draw would notice.
    borders_BW = _shares(scores_BW.double()).cumsum(dim=1)
    total_B1 = borders_BW[:, -1:]
    # Rounding may bring the product to the total itself, which is behind every token.
    last_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
    wanted_B1 = torch.minimum(noise_B.to(borders_BW)[:, None] * total_B1, last_B1)
    return torch.searchsorted(borders_BW, wanted_B1, right=True)[:, 0]


def drawing(decoding: Decoding, device: torch.device) -> list[LogitsProcessor]:
    """What makes one call of transformers' greedy search draw, each row with its own noise; they come last."""
    return [] if decoding.noise is None else [*_nucleus(decoding), _OnlyDrawn(decoding.noise, device)]


class _OnlyDrawn(LogitsProcessor):
    """Of each row's scores (R, W) it leaves the token that was drawn; sees every step of one call."""

    def __init__(self, noise_RT: Tensor, device: torch.device) -> None:
        self._choices = _draws(noise_RT, device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen_R1 = next(self._choices)(scores, torch.arange(len(scores), device=scores.device))[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, chosen_R1, 0.0)


class _Search(Protocol):
    """Texts that are being written, from one step's logits to the next one's tokens.

    Attributes:
        new_RT: the tokens of each row that the cache does not hold yet.
        ended: nothing is to be written any more.
    """

    new_RT: Tensor
    ended: bool

    @property
    def prompts(self) -> int:
        """How many of them have rows."""

    def take(self, logits_RW: Tensor) -> Tensor | None:
        """Choose the next token of each row; the rows that go on, in their order. None: all, as they stand."""

    def texts(self) -> Tensor:
        """Start and new tokens (B, T)."""


class _OneTextEach:
    """Greedy, or drawn."""

    def __init__(
        self,
        start_BT: Tensor,
        process: Process,
        tokens: _Tokens,
        choices: Iterator[Choose],
        on_ids: OnIds | None,
        *,
        leaves: bool,
    ) -> None:
        batch, self._first = start_BT.shape
        self._ids_BT = start_BT.new_full((batch, tokens.max_length), tokens.pad_id)
        self._ids_BT[:, : self._first] = start_BT
        self._process, self._tokens, self._choices, self._on_ids = process, tokens, choices, on_ids
        self._leaves, self._length, self.new_RT = leaves, self._first, start_BT
        self._left_R = torch.arange(batch, device=start_BT.device)
        self._ended_R = torch.zeros(batch, dtype=torch.bool, device=start_BT.device)
        self.ended = self._length >= tokens.max_length

    @property
    def prompts(self) -> int:
        return len(self._left_R)

    def take(self, logits_RW: Tensor) -> Tensor | None:
        scores_RW = self._process(self._ids_BT[self._left_R, : self._length], logits_RW.float())
        next_R = next(self._choices)(scores_RW, self._left_R).masked_fill(self._ended_R, self._tokens.pad_id)
        self._ended_R = self._ended_R | (next_R == self._tokens.eos_id)
        self._ids_BT[self._left_R, self._length] = next_R
        self.new_RT, self._length = next_R[:, None], self._length + 1
        if self._on_ids is not None:
            self._on_ids(self._ids_BT[:, self._first : self._length])
        self.ended = self._length == self._tokens.max_length or bool(self._ended_R.all())
        if self.ended or not self._leaves or not bool(self._ended_R.any()):
            return None
        rows_R = (~self._ended_R).nonzero()[:, 0]
        self._left_R, self.new_RT, self._ended_R = self._left_R[rows_R], self.new_RT[rows_R], self._ended_R[rows_R]
        return rows_R

    def texts(self) -> Tensor:
        return self._ids_BT[:, : self._length]


class _Candidate(NamedTuple):
    """A row of the batch, a token behind it, and the log-likelihood of both."""

    score: float
    row: int
    token: int


@dataclass(frozen=True)
class _Counted:
    """The lengths of one search.

    Attributes:
        first: tokens of the start.
        before: of them, or in their place, those that are counted.
        rule: how.
        penalty: the exponent of a length.
    """

    first: int
    before: int
    rule: BeamLengths
    penalty: float

    def divided(self, log_likelihood: float, length: int, more: int) -> float:
        """A log-likelihood of so many tokens, the start and the one being added among them.

        `more` says whether the last is counted.
        """
        return log_likelihood / (length - 1 - self.first + self.before + more) ** self.penalty


@dataclass
class _BestTexts:
    """The texts that one sample's beams have finished, at most as many as beams, and whether a better one may come."""

    beams: int
    counted: _Counted
    texts: list[tuple[float, list[int]]] = field(default_factory=list)
    complete: bool = False

    def add(self, ids: list[int], score: float) -> None:
        """Keep a text if it is among the best."""
        if len(self.texts) < self.beams or score > self._worst():
            self.texts.append((score, ids))
        if len(self.texts) > self.beams:
            self.texts.remove(min(self.texts, key=_score))

    def go_on(self, candidates: Sequence[_Candidate], so_far: Sequence[list[int]], tokens: _Tokens) -> list[_Candidate]:
        """Set aside what ends, and return the N best candidates that do not.

        Args:
            candidates: the 2 N best, the best first.
            so_far: the tokens of each row.
            tokens: the end, and the largest length.
        """
        counted, rule = self.counted, self.counted.rule
        length, running = len(so_far[candidates[0].row]) + 1, list[_Candidate]()
        cut = rule.by_running and length == tokens.max_length
        for rank, candidate in enumerate(candidates):
            ends = candidate.token == tokens.eos_id
            if (ends or cut) and rank < self.beams:
                score = counted.divided(candidate.score, length, rule.end)
                self.add([*so_far[candidate.row], candidate.token], score)
            if not ends:
                running.append(candidate)
            if len(running) == self.beams:
                break
        if len(self.texts) == self.beams:
            best = (running if rule.by_running else candidates)[0].score
            self.complete = self._worst() >= counted.divided(best, length, rule.added)
        return running

    def cut(self, texts: Sequence[list[int]], log_likelihoods: Sequence[float]) -> None:
        """Take what runs still, at the largest length."""
        if not (self.complete or self.counted.rule.by_running):
            for ids, log_likelihood in zip(texts, log_likelihoods, strict=True):
                self.add(ids, self.counted.divided(log_likelihood, len(ids), 1))

    def best(self) -> list[int]:
        return sorted(self.texts, key=_score)[-1][1]

    def _worst(self) -> float:
        return min(map(_score, self.texts))


def _score(text: tuple[float, list[int]]) -> float:
    return text[0]


class _Beams:
    """Beam search; a sample's beams lie side by side."""

    def __init__(
        self, start_BT: Tensor, process: Process, tokens: _Tokens, beams: int, counted: _Counted, *, leaves: bool
    ) -> None:
        batch, device = len(start_BT), start_BT.device
        self._process, self._tokens, self._beams, self._leaves = process, tokens, beams, leaves
        self._ids_RT = self.new_RT = start_BT.repeat_interleave(beams, dim=0)
        self._scores_BN = torch.zeros(batch, beams, device=device)
        self._scores_BN[:, 1:] = -1e9  # all beams begin alike: the first step's candidates are those of one
        self._found = [_BestTexts(beams, counted) for _ in range(batch)]
        self._left = list(range(batch))
        self.ended = self._ids_RT.shape[1] >= tokens.max_length

    @property
    def prompts(self) -> int:
        return len(self._left)

    def take(self, logits_RW: Tensor) -> Tensor | None:
        scores_RW = self._process(self._ids_RT, logits_RW.float().log_softmax(dim=1))
        so_far, found = self._ids_RT.tolist(), self._found
        running = [
            [_Candidate(0.0, candidates[0].row, self._tokens.pad_id)] * self._beams
            if found[number].complete
            else found[number].go_on(candidates, so_far, self._tokens)
            for number, candidates in zip(self._left, _candidates(scores_RW, self._scores_BN), strict=True)
        ]
        if self._leaves or all(found[number].complete for number in self._left):
            running = [own for number, own in zip(self._left, running, strict=True) if not found[number].complete]
            self._left = [number for number in self._left if not found[number].complete]
        self.ended = not self._left
        if self.ended:
            return None
        rows, device = [candidate for own in running for candidate in own], logits_RW.device
        self._scores_BN = torch.tensor([candidate.score for candidate in rows], device=device).view(-1, self._beams)
        rows_R = torch.tensor([candidate.row for candidate in rows], device=device)
        self.new_RT = torch.tensor([[candidate.token] for candidate in rows], device=device)
        self._ids_RT = torch.cat([self._ids_RT[rows_R], self.new_RT], dim=1)
        self.ended = self._ids_RT.shape[1] == self._tokens.max_length
        return rows_R

    def texts(self) -> Tensor:
        running = self._ids_RT.view(-1, self._beams, self._ids_RT.shape[1]).tolist() if self._left else []
        for number, texts, scores in zip(self._left, running, self._scores_BN.tolist(), strict=False):
            self._found[number].cut(texts, scores)
        best = [torch.tensor(found.best(), device=self.new_RT.device) for found in self._found]
        return torch.nn.utils.rnn.pad_sequence(best, batch_first=True, padding_value=self._tokens.pad_id)


def _candidates(scores_RW: Tensor, scores_BN: Tensor) -> list[list[_Candidate]]:
    """Of each sample the 2 N likeliest next tokens of all its beams: were N of them the end, N would still go on."""
    batch, beams = scores_BN.shape
    words = scores_RW.shape[1]
    total_BX = (scores_RW.view(batch, beams, words) + scores_BN[:, :, None]).flatten(1)
    best_BC, places_BC = total_BX.topk(2 * beams, dim=1)
    return [
        [
            _Candidate(score, sample * beams + place // words, place % words)
            for score, place in zip(scores, places, strict=True)
        ]
        for sample, (scores, places) in enumerate(zip(best_BC.tolist(), places_BC.tolist(), strict=True))
    ]
