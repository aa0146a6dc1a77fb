"""Texts from a model with a cache: greedy, nucleus sampling, and beam search as three versions of transformers have it.

BLIP and BLIP-2 were released with transformers 4.26, InstructBLIP with 4.33. Each version stops a beam search by another
rule, and divides the log-likelihood of a text by another length, so that they find other captions. What has ended leaves the
batch where the cache allows it.

Shape legend: B batch, N beams, R = B x N rows, T tokens, W vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
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

from instructblip.models.streaming import OnIds

# (token ids (R, T) that the cache does not hold yet, the cache) -> logits (R, W) of the token behind them.
Step = Callable[[Tensor, Any], Tensor]

# (token ids so far (R, T), scores (R, W) of the next one) -> changed scores.
Process = Callable[[Any, Any], Tensor]

# Scores (R, W), numbers of the R rows in the batch -> the next token of each row (R,).
Choose = Callable[[Tensor, Tensor], Tensor]


class Cache(Protocol):
    """What a model has computed of the rows; a dataclass."""

    def select(self, rows_N: Tensor) -> Self:
        """Of these rows, in this order; one may be taken more than once. What was given may be used up."""


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


@torch.no_grad()
def decode(
    step: Step,
    start_BT: Tensor,
    cache: Cache,
    *,
    eos_id: int,
    pad_id: int,
    num_beams: int = 1,
    max_new_tokens: int,
    min_new_tokens: int = 1,
    length_penalty: float = 1.0,
    repetition_penalty: float = 1.0,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    noise_BT: Tensor | None = None,
    on_ids: OnIds | None = None,
    lengths: BeamLengths = RELEASED_BLIP,
    leaves: bool = False,
) -> Tensor:
    """Continue token sequences.

    Args:
        step: runs new tokens through the blocks and extends the cache.
        start_BT: the tokens to begin with; none is padding. T may be 0 where `step` has logits from the cache alone.
        cache: what stands in front of them (each sample's queries, say).
        eos_id: ends a text.
        pad_id: fills the rows behind it.
        num_beams: 1 is greedy, or sampling with `do_sample`.
        max_new_tokens: at most so many are added to the start, the end token among them.
        min_new_tokens: at least so many stand before the end token.
        length_penalty: of beam search: exponent of the length that a text's log-likelihood is divided by.
        repetition_penalty: on the tokens that a row already holds, those of the start among them.
        do_sample: draw each token from the smallest set of probability `top_p`, after division of the logits by
            `temperature`.
        noise_BT: what sampling draws with, a number in [0, 1) for each new token of each row: a row is then a function of
            its own numbers, whatever stands beside it. None: torch's global random stream.
        on_ids: called after each token with the new ones so far; without beams.
        lengths: how beam search counts them.
        leaves: what has ended is dropped from the cache, which holds all that `step` knows of a row.

    Returns:
        Start and new tokens (B, T).

    Raises:
        ValueError: sampling with several beams.
    """
    if do_sample and num_beams > 1:
        raise ValueError("sampling draws one text: num_beams=1")
    first, device = start_BT.shape[1], str(start_BT.device)
    processors = LogitsProcessorList()
    if repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(repetition_penalty)))
    if min_new_tokens > 0:
        processors.append(MinLengthLogitsProcessor(first + min_new_tokens, eos_id, device=device))
    if do_sample:
        processors += nucleus(temperature, top_p)
    tokens = _Tokens(eos_id, pad_id, first + max_new_tokens)
    if num_beams > 1:
        before = first if lengths.before is None else lengths.before
        counted = _Counted(first, before, lengths, length_penalty)
        return _beam_search(step, start_BT, cache, processors, tokens, num_beams, counted, leaves=leaves)
    choices = _draws(noise_BT, start_BT.device) if do_sample else repeat(_likeliest)
    leaves = leaves and not (do_sample and noise_BT is None)  # torch's stream gives every row a number in each step
    return _one_text_each(step, start_BT, cache, processors, tokens, choices, on_ids, leaves=leaves)


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
    return torch.multinomial(scores_RW.softmax(dim=1), 1)[:, 0]


def _draw_with(scores_RW: Tensor, rows_R: Tensor, *, noise_B: Tensor) -> Tensor:
    return drawn_with(scores_RW, noise_B[rows_R])


def _draws(noise_BT: Tensor | None, device: torch.device) -> Iterator[Choose]:
    """How each new token is drawn, in turn."""
    if noise_BT is None:
        return repeat(_draw)
    return (partial(_draw_with, noise_B=noise_B) for noise_B in noise_BT.to(device).T)


def nucleus(temperature: float, top_p: float) -> list[LogitsProcessor]:
    """What leaves to scores the smallest set of probability `top_p`, after division by `temperature`."""
    return [TemperatureLogitsWarper(float(temperature)), TopPLogitsWarper(top_p)]


def drawn_with(scores_BW: Tensor, noise_B: Tensor) -> Tensor:
    """The token (B,) of each row that a number in [0, 1) falls on, where all tokens share that interval by their
    probabilities; never one of score -inf.
    """
    # In float64 no order of summation, which a GPU does not promise, moves a border by what a draw would notice.
    borders_BW = scores_BW.double().softmax(dim=1).cumsum(dim=1)
    total_B1 = borders_BW[:, -1:]
    # Rounding may bring the product to the total itself, which is behind every token.
    last_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
    wanted_B1 = torch.minimum(noise_B.to(borders_BW)[:, None] * total_B1, last_B1)
    return torch.searchsorted(borders_BW, wanted_B1, right=True)[:, 0]


class Draws(NamedTuple):
    """How transformers' greedy search is made to draw, each row with its own numbers; arguments as of `decode`."""

    noise_BT: Tensor
    temperature: float
    top_p: float

    def processors(self, rows: Sequence[int], device: torch.device) -> list[LogitsProcessor]:
        """For one call over some of the B rows; they come last."""
        return [*nucleus(self.temperature, self.top_p), _OnlyDrawn(self.noise_BT[list(rows)], device)]


class _OnlyDrawn(LogitsProcessor):
    """Of each row's scores (R, W) it leaves the token that was drawn; sees every step of one call."""

    def __init__(self, noise_RT: Tensor, device: torch.device) -> None:
        self._choices = _draws(noise_RT, device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen_R1 = next(self._choices)(scores, torch.arange(len(scores), device=scores.device))[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, chosen_R1, 0.0)


def _one_text_each(
    step: Step,
    start_BT: Tensor,
    cache: Cache,
    process: Process,
    tokens: _Tokens,
    choices: Iterator[Choose],
    on_ids: OnIds | None,
    *,
    leaves: bool,
) -> Tensor:
    batch, first, device = *start_BT.shape, start_BT.device
    ids_BT = start_BT.new_full((batch, tokens.max_length), tokens.pad_id)
    ids_BT[:, :first] = start_BT
    new_RT, cache, length = start_BT, replace(cache), first  # type: ignore[type-var]
    left_R, ended_R = torch.arange(batch, device=device), torch.zeros(batch, dtype=torch.bool, device=device)
    while length < tokens.max_length and not ended_R.all():
        if leaves and ended_R.any():
            rows = (~ended_R).nonzero()[:, 0]
            cache, left_R, new_RT, ended_R = cache.select(rows), left_R[rows], new_RT[rows], ended_R[rows]
        scores_RW = process(ids_BT[left_R, :length], step(new_RT, cache).float())
        next_R = next(choices)(scores_RW, left_R).masked_fill(ended_R, tokens.pad_id)
        ended_R = ended_R | (next_R == tokens.eos_id)
        ids_BT[left_R, length] = next_R
        new_RT, length = next_R[:, None], length + 1
        if on_ids is not None:
            on_ids(ids_BT[:, first:length])
    return ids_BT[:, :length]


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


def _beam_search(
    step: Step,
    start_BT: Tensor,
    cache: Cache,
    process: Process,
    tokens: _Tokens,
    beams: int,
    counted: _Counted,
    *,
    leaves: bool,
) -> Tensor:
    batch, device = len(start_BT), start_BT.device
    ids_RT = new_RT = start_BT.repeat_interleave(beams, dim=0)
    cache = cache.select(torch.arange(batch, device=device).repeat_interleave(beams))
    scores_BN = torch.zeros(batch, beams, device=device)
    scores_BN[:, 1:] = -1e9  # all beams begin alike: the first step's candidates are those of one
    found = [_BestTexts(beams, counted) for _ in range(batch)]
    left = list(range(batch))
    while left and ids_RT.shape[1] < tokens.max_length:
        scores_RW = process(ids_RT, step(new_RT, cache).float().log_softmax(dim=1))
        so_far = ids_RT.tolist()
        running = [
            [_Candidate(0.0, candidates[0].row, tokens.pad_id)] * beams
            if found[number].complete
            else found[number].go_on(candidates, so_far, tokens)
            for number, candidates in zip(left, _candidates(scores_RW, scores_BN), strict=True)
        ]
        if leaves or all(found[number].complete for number in left):
            running = [own for number, own in zip(left, running, strict=True) if not found[number].complete]
            left = [number for number in left if not found[number].complete]
        rows = [candidate for own in running for candidate in own]
        scores_BN = torch.tensor([candidate.score for candidate in rows], device=device).view(len(left), beams)
        rows_R = torch.tensor([candidate.row for candidate in rows], dtype=torch.long, device=device)
        new_RT = torch.tensor([[candidate.token] for candidate in rows], dtype=torch.long, device=device)
        if left:
            ids_RT, cache = torch.cat([ids_RT[rows_R], new_RT], dim=1), cache.select(rows_R)
    running_texts = ids_RT.view(-1, beams, ids_RT.shape[1]).tolist() if left else []
    for number, texts, scores in zip(left, running_texts, scores_BN.tolist(), strict=True):
        found[number].cut(texts, scores)
    best_texts = [torch.tensor(best.best(), device=device) for best in found]
    return torch.nn.utils.rnn.pad_sequence(best_texts, batch_first=True, padding_value=tokens.pad_id)


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
