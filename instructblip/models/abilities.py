"""What a language model's class can do, found by trying: its own plain forward against the ways this code saves work.

A table of model names would be wrong for the next model. So each saving is tried once on short random rows, and logits or
log-likelihoods are compared with those of the class's own forward, without padding. ALiBi and biases in every layer break
a tree of candidates; recurrent and convolutional layers let samples of one row see each other.

Shape legend: P positions of a prompt, S answer tokens, L language-model width, V vocabulary.
"""

import copy
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from instructblip.errors import UserError
from instructblip.models.llm import LLM, LLMAbilities
from instructblip.models.ranking import rank_candidates

logger = logging.getLogger(__name__)

# Relative to the deviation of a row of logits. Rounding leaves some 1e-6 in float32; what breaks leaves 1e-2 or more.
_FLOAT32_TOLERANCE = 1e-3
_HALF_TOLERANCE = 12  # times the dtype's eps, for float16 and bfloat16
# Larger models are compared in the dtype they are loaded in alone: a copy in float32 would take too much memory.
_LARGEST_COPY = 1_000_000_000  # parameters
_PROMPT, _SHORT_PROMPT = 12, 5  # positions of the two prompts
_LONGEST_PROMPT = 600  # positions; longer attention windows are not tried
_WINDOW = re.compile(r"window|local|chunk|block_size")  # names of settings that limit how far back a layer looks
_NEW_TOKENS, _BEAMS = 2, 2


def measure(llm: LLM) -> LLMAbilities:
    """Try each saving, in the dtype the model is in and, for up to a billion parameters, in float32.

    Pure: the model stays as it is. About a dozen short passes, or twice as many for a model in half precision.

    Raises:
        UserError: the plain way itself is not what the model's class computes, so that nothing could be right.
    """
    found = _measure(llm)
    parameters = sum(parameter.numel() for parameter in llm.parameters())
    if llm.embeddings.weight.dtype == torch.float32 or parameters > _LARGEST_COPY:
        return found
    exact = _measure(_in_float32(llm))
    names = LLMAbilities.__dataclass_fields__
    return LLMAbilities(**{name: getattr(found, name) and getattr(exact, name) for name in names})


def limits(llm: LLM) -> list[str]:
    """One phrase for each saving that is not to be had with a measured model, for the user."""
    phrases = {
        "tree": "candidates are ranked one by one",
        "packed": "packed batches hold one sample a row",
        "padded_prompts": "prompts are answered one by one",
        "shared_beams": "each beam runs its prompt",
        "generates": "it does not generate",
    }
    if llm.kind != "decoder":
        del phrases["packed"]  # which is refused where the configuration is checked
    return [phrase for name, phrase in phrases.items() if not getattr(llm.abilities, name)]


@dataclass
class _Trial:
    """Two prompts of different lengths, two answers to each, and what the class's own forward makes of them.

    Attributes:
        llm: the model, every saving switched on.
        prefixes: embedded prompts (P, L).
        answers: token sequences of equal length that begin alike.
        own: for each prompt the logits (answers, S, V) that predict the answers' tokens.
        tolerance: of differences, relative to the deviation of logits.
    """

    llm: LLM
    prefixes: list[Tensor]
    answers: list[list[int]]
    own: list[Tensor]
    tolerance: float

    def samples(self) -> tuple[list[Tensor], list[list[int]]]:
        """Every prompt with every answer."""
        prefixes = [prefix for prefix in self.prefixes for _ in self.answers]
        return prefixes, self.answers * len(self.prefixes)

    def near(self, found: Tensor, expected: Tensor) -> bool:
        """Whether logits, or log-probabilities, are equal up to rounding."""
        deviation = torch.stack([logits.std(dim=-1).mean() for logits in self.own]).mean()
        return bool((found - expected).abs().max() <= self.tolerance * deviation)  # not where either is NaN


@torch.inference_mode()
def _measure(llm: LLM) -> LLMAbilities:
    trial = _start(llm)
    if not _rows_are_right(trial):
        raise UserError(
            f"{type(llm.model).__name__} computes something else for rows that are padded than for one alone, or its logits "
            "do not follow from its final hidden states; use another LLM"
        )
    padded, shared, generates = _generation(trial)
    return LLMAbilities(
        tree=_tries(_tree_is_right, trial),
        packed=llm.kind == "decoder" and _tries(_packing_is_right, trial),
        padded_prompts=padded,
        shared_beams=shared,
        generates=generates,
    )


def _start(llm: LLM) -> _Trial:
    """Draw prompts and answers; run each of them alone through the class's own forward."""
    trying = copy.copy(llm)
    trying.abilities = LLMAbilities()
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return torch.randint(len(llm.embeddings.weight), (count,), generator=generator).tolist()

    begin = draw(1)
    answers = [begin + draw(3), begin + draw(3)]
    prefixes = [prefix.clone() for prefix in llm.embed([draw(_prompt_length(llm)), draw(_SHORT_PROMPT)])]
    try:
        own = [_own_logits(llm, prefix, answers) for prefix in prefixes]
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:  # a foreign class, fed what it may not take
        reason = str(error).partition("\n")[0]
        raise UserError(f"{type(llm.model).__name__} cannot be run on embeddings ({reason}); use another LLM") from None
    dtype = llm.embeddings.weight.dtype
    tolerance = _FLOAT32_TOLERANCE if dtype == torch.float32 else _HALF_TOLERANCE * torch.finfo(dtype).eps
    return _Trial(trying, prefixes, answers, own, tolerance)


def _prompt_length(llm: LLM) -> int:
    """Positions of the longer prompt: past the attention windows that the configuration names, unless those are long."""
    settings = llm.model.config.get_text_config(decoder=True).to_dict()
    windows = [value for name, value in settings.items() if isinstance(value, int) and _WINDOW.search(name)]
    wanted = max([_PROMPT, *(value + _SHORT_PROMPT for value in windows if value + _SHORT_PROMPT <= _LONGEST_PROMPT)])
    return min(wanted, (llm.max_positions or wanted + 20) - 20)


def _own_logits(llm: LLM, prefix: Tensor, answers: Sequence[Sequence[int]]) -> Tensor:
    """Logits (answers, S, V) of answers of equal length to one prompt, by the class's own forward: no row is padded."""
    prompts = prefix.expand(len(answers), -1, -1)
    if llm.kind == "decoder":
        heard = torch.stack(llm.embed([answer[:-1] for answer in answers]))
        rows = torch.cat([prompts, heard], dim=1)
        return llm.model(inputs_embeds=rows, use_cache=False).logits[:, len(prefix) - 1 :].float()
    labels = torch.tensor(answers, device=prefix.device)
    return llm.model(inputs_embeds=prompts, labels=labels, use_cache=False).logits.float()


def _tries(check: Callable[[_Trial], bool], trial: _Trial) -> bool:
    """Whether a saving gives the right result; one that a class cannot take may fail in any way."""
    try:
        return check(trial)
    except Exception as error:
        logger.debug("%s: %s: %s", type(trial.llm.model).__name__, check.__name__, error)
        return False


def _rows_are_right(trial: _Trial) -> bool:
    """Padded rows together, and the logits of their hidden states."""
    return _samples_are_right(trial, packed=False)


def _packing_is_right(trial: _Trial) -> bool:
    """Samples that share a row, none of which may see another."""
    return _samples_are_right(trial, packed=True)


def _samples_are_right(trial: _Trial, *, packed: bool) -> bool:
    states = trial.llm.answer_states(*trial.samples(), packed=packed)
    expected_SV = torch.cat([logits.flatten(0, 1) for logits in trial.own])
    return trial.near(trial.llm.logits(states.hidden_SL), expected_SV)


def _tree_is_right(trial: _Trial) -> bool:
    """Two branches after each of two prompts of different lengths."""
    numbers = [0] * len(trial.prefixes)
    found = torch.stack(rank_candidates(trial.llm, trial.prefixes, [trial.answers], numbers))
    wanted_ST = torch.tensor(trial.answers, device=found.device)[..., None]
    expected = [logits.cpu().log_softmax(-1).gather(-1, wanted_ST).sum(dim=(1, 2)) for logits in trial.own]
    return trial.near(found, torch.stack(expected))


def _generation(trial: _Trial) -> tuple[bool, bool, bool]:
    """Whether prompts may be padded, whether beams may share their prompt, and whether the class generates at all."""
    options: dict[str, Any] = {"num_beams": _BEAMS, "max_new_tokens": _NEW_TOKENS, "min_new_tokens": _NEW_TOKENS}
    plain = copy.copy(trial.llm)
    plain.abilities = LLMAbilities(shared_beams=False)
    short = trial.prefixes[-1:]  # which is padded beside the other
    try:
        expected = _beam_scores(plain, short, options)
    except Exception as error:  # of a foreign class
        logger.debug("%s does not generate: %s", type(trial.llm.model).__name__, error)
        return True, True, False

    def right(llm: LLM, prefixes: Sequence[Tensor]) -> bool:
        return _tries(lambda _: trial.near(_beam_scores(llm, prefixes, options)[-1:], expected), trial)

    if right(trial.llm, trial.prefixes):
        return True, True, True
    return right(plain, trial.prefixes), right(trial.llm, short), True


def _beam_scores(llm: LLM, prefixes: Sequence[Tensor], options: dict[str, Any]) -> Tensor:
    """Log-likelihood of the best beam of each prompt."""
    found = llm.continue_rows(prefixes, return_dict_in_generate=True, output_scores=True, length_penalty=0.0, **options)
    return found.sequences_scores.float()


def _in_float32(llm: LLM) -> LLM:
    """A copy whose language model is in float32; tokenizer and settings are shared."""
    exact = copy.copy(llm)
    exact._modules = copy.deepcopy(llm._modules)
    exact.model.float()
    return exact
