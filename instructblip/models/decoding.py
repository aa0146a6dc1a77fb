"""Texts from a stack of blocks with a key/value cache: greedy, nucleus sampling, and the beam search of the released models.

BLIP and BLIP-2 were released with transformers 4.26. Later versions of its beam search stop earlier and divide the
log-likelihood of a text that never ended by another length, so that they find other captions.

Shape legend: B batch, N beams, R = B x N rows, T tokens, W vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

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
from instructblip.models.transformer import KeyValueCache

# (token ids (R, T) that the cache does not hold yet, the cache) -> logits (R, W) of the token behind them.
Step = Callable[[Tensor, KeyValueCache], Tensor]

# (token ids so far (R, T), scores (R, W) of the next one) -> changed scores.
Process = Callable[[Any, Any], Tensor]

# Scores (B, W) -> the next token of each row (B,).
Choose = Callable[[Tensor], Tensor]


@torch.no_grad()
def decode(
    step: Step,
    start_BT: Tensor,
    cache: KeyValueCache,
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
) -> Tensor:
    """Continue token sequences.

    Args:
        step: runs new tokens through the blocks and extends the cache.
        start_BT: the tokens to begin with; none is padding.
        cache: what stands in front of them (each sample's queries, say); left as it is.
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
        return _beam_search(step, start_BT, cache, processors, tokens, num_beams, length_penalty)
    choices = _draws(noise_BT, start_BT.device) if do_sample else repeat(_likeliest)
    return _one_text_each(step, start_BT, cache, processors, tokens, choices, on_ids)


def cut_at(text: str, until: Sequence[str]) -> str:
    """What of a text stands in front of the first of some others, without white space around it."""
    ends = [place for stop in until if (place := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))].strip()


class _Tokens(NamedTuple):
    eos_id: int
    pad_id: int
    max_length: int  # the start's tokens are counted


def _likeliest(scores_BW: Tensor) -> Tensor:
    return scores_BW.argmax(dim=1)


def _draw(scores_BW: Tensor) -> Tensor:
    return torch.multinomial(scores_BW.softmax(dim=1), 1)[:, 0]


def _draws(noise_BT: Tensor | None, device: torch.device) -> Iterator[Choose]:
    """How each new token is drawn, in turn."""
    if noise_BT is None:
        return repeat(_draw)
    return (partial(drawn_with, noise_B=noise_B) for noise_B in noise_BT.to(device).T)


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
        chosen_R1 = next(self._choices)(scores)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, chosen_R1, 0.0)


def _one_text_each(
    step: Step,
    start_BT: Tensor,
    cache: KeyValueCache,
    process: Process,
    tokens: _Tokens,
    choices: Iterator[Choose],
    on_ids: OnIds | None,
) -> Tensor:
    ids_BT, new_BT, cache = start_BT, start_BT, replace(cache)
    ended_B = torch.zeros(len(ids_BT), dtype=torch.bool, device=ids_BT.device)
    while ids_BT.shape[1] < tokens.max_length and not ended_B.all():
        next_B = next(choices)(process(ids_BT, step(new_BT, cache).float()))
        next_B = next_B.masked_fill(ended_B, tokens.pad_id)
        ended_B = ended_B | (next_B == tokens.eos_id)
        new_BT = next_B[:, None]
        ids_BT = torch.cat([ids_BT, new_BT], dim=1)
        if on_ids is not None:
            on_ids(ids_BT[:, start_BT.shape[1] :])
    return ids_BT


class _Candidate(NamedTuple):
    """A row of the batch, a token behind it, and the log-likelihood of both."""

    score: float
    row: int
    token: int


@dataclass
class _BestTexts:
    """The texts that one sample's beams have finished, at most as many as beams, and whether a better one may come."""

    beams: int
    length_penalty: float
    texts: list[tuple[float, list[int]]] = field(default_factory=list)
    complete: bool = False

    def add(self, ids: list[int], log_likelihood: float, length: int) -> None:
        """Keep a text if it is among the best; `length` counts the start and leaves the end token out."""
        score = log_likelihood / length**self.length_penalty
        if len(self.texts) < self.beams or score > self._worst():
            self.texts.append((score, ids))
        if len(self.texts) > self.beams:
            self.texts.remove(min(self.texts, key=_score))

    def check(self, best_log_likelihood: float, length: int) -> None:
        """The search is over when the best candidate, divided by its length so far, is worse than all that are kept."""
        if len(self.texts) == self.beams:
            self.complete |= self._worst() >= best_log_likelihood / length**self.length_penalty

    def best(self) -> list[int]:
        return sorted(self.texts, key=_score)[-1][1]

    def _worst(self) -> float:
        return min(map(_score, self.texts))


def _score(text: tuple[float, list[int]]) -> float:
    return text[0]


def _beam_search(
    step: Step,
    start_BT: Tensor,
    cache: KeyValueCache,
    process: Process,
    tokens: _Tokens,
    beams: int,
    length_penalty: float,
) -> Tensor:
    batch, device = len(start_BT), start_BT.device
    ids_RT = new_RT = start_BT.repeat_interleave(beams, dim=0)
    cache = cache.select(torch.arange(batch, device=device).repeat_interleave(beams))
    scores_BN = torch.zeros(batch, beams, device=device)
    scores_BN[:, 1:] = -1e9  # all beams begin alike: the first step's candidates are those of one
    found = [_BestTexts(beams, length_penalty) for _ in range(batch)]
    while ids_RT.shape[1] < tokens.max_length and not all(best.complete for best in found):
        scores_RW = process(ids_RT, step(new_RT, cache).float().log_softmax(dim=1))
        running = [
            candidate
            for best, candidates in zip(found, _candidates(scores_RW, scores_BN), strict=True)
            for candidate in _go_on(best, candidates, ids_RT, tokens)
        ]
        scores_BN = torch.tensor([candidate.score for candidate in running], device=device).view(batch, beams)
        rows_R = torch.tensor([candidate.row for candidate in running], device=device)
        new_RT = torch.tensor([[candidate.token] for candidate in running], device=device)
        ids_RT, cache = torch.cat([ids_RT[rows_R], new_RT], dim=1), cache.select(rows_R)
    unfinished = zip(ids_RT.view(batch, beams, -1).tolist(), scores_BN.tolist(), strict=True)
    for best, (texts, scores) in zip(found, unfinished, strict=True):
        if not best.complete:
            for ids, score in zip(texts, scores, strict=True):
                best.add(ids, score, len(ids))
    texts = [torch.tensor(best.best(), device=device) for best in found]
    return torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=tokens.pad_id)


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


def _go_on(best: _BestTexts, candidates: list[_Candidate], ids_RT: Tensor, tokens: _Tokens) -> list[_Candidate]:
    """Set aside what ends, and return the N best candidates that do not."""
    if best.complete:
        return [_Candidate(0.0, candidates[0].row, tokens.pad_id)] * best.beams
    length, running = ids_RT.shape[1], []
    for rank, candidate in enumerate(candidates):
        if candidate.token != tokens.eos_id:
            running.append(candidate)
        elif rank < best.beams:
            best.add([*ids_RT[candidate.row].tolist(), tokens.eos_id], candidate.score, length)
        if len(running) == best.beams:
            break
    best.check(candidates[0].score, length)
    return running
