"""What a language model's class can do, found by trying: its own plain forward against the ways this code saves work.

A table of model names would be wrong for the next model. So each saving is tried once on short random rows, and logits or
log-likelihoods are compared with those of the class's own forward, without padding. ALiBi and biases in every layer break
a tree of candidates; recurrent and convolutional layers let samples of one row see each other.

The verdict falls in float32, where rounding and mistakes lie three orders of magnitude apart. In half precision thirty
layers of rounding look like a mistake, so a model that is held in it is tried there as well, by what its own forward makes
of inputs that differ in the last bit. Draws are seeded: a model has one verdict.

Shape legend: P positions of a prompt, S answer tokens, L language-model width, V vocabulary.
"""

import contextlib
import copy
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from instructblip.errors import UserError
from instructblip.models.base import blocks_of
from instructblip.models.generation import Branches
from instructblip.models.llm import LLM, DecoderLLM, LLMAbilities
from instructblip.models.ranking import rank_candidates

logger = logging.getLogger(__name__)

# Relative to the deviation of a row of logits. Rounding leaves some 1e-5 in float32; what breaks leaves 1e-2 or more.
_TOLERANCE = 1e-3
# In half precision: multiples of the change that a change of every input by up to half its last bit makes.
_ROUNDINGS = 4
# Parameters; a larger model has the matrices of its blocks widened in turn, lest it take three times its memory. What is
# small is wide all the time: T5's table of positions, for one, is used outside its block.
_AT_ONCE, _SMALL = 1_000_000_000, 1_000_000
_VISUAL, _PROMPT, _PADDING = 3, 6, 3  # positions: of a prompt that are no tokens, of it all, of padding
_ANSWER = 3  # tokens of each of the two answers
_LONGEST_PROMPT = 600  # positions; longer attention windows are not tried
# Settings that limit how far back a layer looks; and those that only sound alike.
_WINDOW, _NO_WINDOW = re.compile(r"window|local|chunk|block_size|index_topk"), re.compile(r"layers|experts")
_NEW_TOKENS, _BEAMS = 2, 2


def measure(llm: LLM) -> LLMAbilities:
    """Try each saving in float32, and in the dtype the model is in where that is another.

    The model is as before afterwards. About a dozen short passes, or twice as many for a model in half precision.

    Raises:
        UserError: the plain way itself is not what the model's class computes, so that nothing could be right.
    """
    with _in_float32(llm.model):
        found = _measure(llm)
    if llm.embeddings.weight.dtype == torch.float32:
        return found
    held = _measure(llm, found)
    savings = {name: held_so and getattr(found, name) for name, held_so in vars(held).items()}
    return LLMAbilities(**savings | {"embedding_factor": found.embedding_factor})


def attend_by_length(llm: LLM) -> None:
    """Switch a decoder-only model's packed samples to attention by their lengths, once it was seen to keep them apart.

    Raises:
        UserError: it does not, or is no decoder-only model.
    """
    right = isinstance(llm, DecoderLLM)
    if isinstance(llm, DecoderLLM):
        llm.attend_by_length()
        with _in_float32(llm.model):
            right = _tries(_packing_is_right, _start(llm, llm.abilities.embedding_factor))
        if right and llm.embeddings.weight.dtype != torch.float32:
            right = _tries(_packing_is_right, _start(llm, llm.abilities.embedding_factor))
    if not right:
        raise UserError(
            f"{_name(llm)} does not keep packed samples apart by their lengths; set parallel.packed_attention=dense"
        )


def limits(llm: LLM) -> list[str]:
    """One phrase for each saving that is not to be had with a measured model, for the user."""
    phrases = {
        "tree": "candidates are ranked one by one",
        "packed": "packed batches are bucketed instead",
        "padded_prompts": "prompts are answered one by one",
        "shared_beams": "each beam runs its prompt",
        "beams": "it writes with num_beams=1 only",
        "generates": "it ranks but does not write",
    }
    if llm.kind != "decoder":
        del phrases["packed"]  # which is refused where the configuration is checked
    return [phrase for name, phrase in phrases.items() if not getattr(llm.abilities, name)]


@dataclass
class _Trial:
    """Prompts of different lengths, two answers to each, and what the class's own forward makes of them.

    Attributes:
        llm: the model, every saving switched on.
        prefixes: embedded prompts (P, L).
        answers: token sequences of equal length that begin alike.
        own: for each prompt the logits (answers, S, V) that predict the answers' tokens.
        tolerance: of differences between logits, or log-likelihoods.
        exact: in float32. Else the plain way, which was right there, need but give numbers: where rounding chooses other
            experts, no tolerance is wide enough.
    """

    llm: LLM
    prefixes: list[Tensor]
    answers: list[list[int]]
    own: list[Tensor]
    tolerance: float
    exact: bool

    def one_answer_each(self) -> list[list[int]]:
        """The answers in turn, one for each prompt."""
        return [self.answers[number % len(self.answers)] for number in range(len(self.prefixes))]

    def own_of_one_each(self) -> Tensor:
        """Logits (S, V) that predict those, one after the other."""
        return torch.cat([logits_ASV[number % len(self.answers)] for number, logits_ASV in enumerate(self.own)])

    def near(self, found: Tensor, expected: Tensor) -> bool:
        """Whether logits, or log-likelihoods, are equal up to rounding; NaN never is, a masked token's -inf may be."""
        return bool((((found - expected).abs() <= self.tolerance) | (found == expected)).all())

    def plainly_near(self, found: Tensor, expected: Tensor) -> bool:
        """The same of the plain way."""
        return self.near(found, expected) if self.exact else bool((found < torch.inf).all())


@torch.inference_mode()
def _measure(llm: LLM, in_float32: LLMAbilities | None = None) -> LLMAbilities:
    """Abilities in the dtype the model is in now.

    Args:
        llm: the model.
        in_float32: those that it has there, where that is another dtype.
    """
    trial = _start(llm, 1.0 if in_float32 is None else in_float32.embedding_factor)
    right = _rows_are_right(trial)
    if not right and trial.exact:
        trial = _start(llm, _embedding_factor(llm))
        right = trial.llm.abilities.embedding_factor != 1 and _rows_are_right(trial)
    if not right and not trial.exact:  # which asks for no more than numbers
        raise _not_finite(llm, "logits of padded rows", "the padding overflows there:")
    if not right:
        raise UserError(
            f"{_name(llm)} gives other logits for padded rows of embeddings than for each row's tokens alone; answers "
            "would be wrong: use another LLM"
        )
    tree = _tries(_tree_is_right, trial) and _tries(_growing_tree_is_right, trial)
    return replace(
        trial.llm.abilities,
        tree=tree,
        packed=isinstance(llm, DecoderLLM) and _tries(_packing_is_right, trial),
        **({} if tree else _generation(trial)),  # else nothing is asked of its class
    )


# --- what is compared with -------------------------------------------------------------------------------------------


def _start(llm: LLM, embedding_factor: float) -> _Trial:
    """Draw prompts and answers; run each of them alone through the class's own forward.

    The longest prompt begins with what no table holds, as visual tokens are; the others are run as tokens.
    """
    trying = copy.copy(llm)
    trying.abilities = LLMAbilities(embedding_factor=embedding_factor)
    draw = _token_source(llm)
    begin = draw(1)
    answers = [begin + draw(_ANSWER - 1) for _ in range(2)]
    longest, *lengths = _prompt_lengths(llm)
    long, *others = draw(longest - _VISUAL), *map(draw, lengths)
    visual = torch.randn(_VISUAL, llm.width, generator=torch.Generator().manual_seed(0))
    prefixes = [prefix.clone() for prefix in trying.embed([long, *others])]
    prefixes[0] = torch.cat([(visual * prefixes[0].float().std()).to(prefixes[0]), prefixes[0]])
    try:
        prompts: list[Tensor | list[int]] = [prefixes[0], *others]
        own = [_own_logits(trying, prompt, answers) for prompt in prompts]
        _check_finite(trying, own)
        deviation = torch.stack([logits[logits.isfinite()].std() for logits in own]).mean()
        tolerance = max(_TOLERANCE * float(deviation), _ROUNDINGS * _rounding(trying, prefixes[0], answers, own[0]))
    except UserError:
        raise
    except Exception as error:  # a foreign class, fed what it may not take
        raise UserError(f"{_name(llm)} cannot be run on embeddings ({_reason(error)}); use another LLM") from None
    return _Trial(trying, prefixes, answers, own, tolerance, exact=prefixes[0].dtype == torch.float32)


def _check_finite(llm: LLM, logits: Sequence[Tensor]) -> None:
    if all((part < torch.inf).all() for part in logits):  # NaN is not
        return
    raise _not_finite(llm, "logits", "its weights are damaged, or overflow in that dtype: fetch them again, or")


def _not_finite(llm: LLM, what: str, why: str) -> UserError:
    dtype = str(llm.embeddings.weight.dtype).removeprefix("torch.")
    return UserError(f"{_name(llm)}: {what} are not finite numbers in {dtype}; {why} take bfloat16 or float32")


def _token_source(llm: LLM) -> Callable[[int], list[int]]:
    """Draws tokens, none of which is padding: some classes leave its places out, others count no positions for them."""
    generator = torch.Generator().manual_seed(0)
    padding = {llm.prompt_format.pad_id, getattr(llm.model.config.get_text_config(decoder=True), "pad_token_id", None)}
    kept = [token for token in range(len(llm.embeddings.weight)) if token not in padding]
    return lambda count: [kept[place] for place in torch.randint(len(kept), (count,), generator=generator).tolist()]


def _prompt_lengths(llm: LLM) -> list[int]:
    """Positions of each prompt, the longest first.

    Two go past the attention windows that the configuration names, but for long ones, so that one of them is padded. The
    last is short: what a recurrent layer remembers of the sample before is soon forgotten.
    """
    settings = llm.model.config.get_text_config(decoder=True).to_dict()
    windows = [
        value
        for name, value in settings.items()
        if isinstance(value, int) and value > 0 and _WINDOW.search(name) and not _NO_WINDOW.search(name)
    ]
    wanted = max([_PROMPT, *(value + 2 * _PROMPT for value in windows if value + 2 * _PROMPT <= _LONGEST_PROMPT)])
    limit = llm.max_positions
    longest = wanted if limit is None else max(min(wanted, limit - _ANSWER), _VISUAL + 1)
    return sorted({longest, longest - _PADDING, min(_PADDING, longest - _PADDING)}, reverse=True)


def _own_logits(llm: LLM, prompt: Tensor | list[int], answers: Sequence[Sequence[int]]) -> Tensor:
    """Logits (answers, S, V) of answers of equal length, by the class's own forward: no row is padded.

    Args:
        llm: the model.
        prompt: embeddings (P, L), or tokens.
        answers: token sequences.
    """
    table = llm.embeddings.weight
    asked: Any = prompt
    if isinstance(prompt, Tensor):
        name, rows = "inputs_embeds", prompt.expand(len(answers), -1, -1)
    else:
        name, rows = "input_ids", torch.tensor([prompt] * len(answers), device=table.device)
    if llm.kind != "decoder":
        labels = torch.tensor(answers, device=table.device)
        return llm.model(**{name: rows}, labels=labels, use_cache=False).logits.float()
    heard: Any = [list(answer[:-1]) for answer in answers]
    heard = torch.stack(llm.embed(heard)) if name == "inputs_embeds" else torch.tensor(heard, device=table.device)
    logits = llm.model(**{name: torch.cat([rows, heard], dim=1)}, use_cache=False).logits
    return logits[:, len(asked) - 1 :].float()


def _rounding(llm: LLM, prompt: Tensor, answers: Sequence[Sequence[int]], own: Tensor) -> float:
    """How far logits move when every value of the prompt moves by up to half its last bit; 0 in float32."""
    if prompt.dtype == torch.float32:
        return 0.0
    moves = torch.rand(prompt.shape, generator=torch.Generator().manual_seed(1)).sub(0.5).to(prompt.device)
    moved = prompt.float() * (1 + moves * torch.finfo(prompt.dtype).eps)
    logits = _own_logits(llm, moved.to(prompt.dtype), answers)
    _check_finite(llm, [logits])
    difference = (logits - own).abs()
    return float(difference[difference.isfinite()].amax())


def _embedding_factor(llm: LLM) -> float:
    """What a class multiplies embeddings by that it has looked up itself; 1 where it does something else to them."""
    looked_up: list[Tensor] = []
    received: list[Tensor] = []

    def take(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        received.extend(value for value in (*inputs, *named.values()) if _is_like(value, looked_up))

    handles = [
        llm.embeddings.register_forward_hook(lambda _module, _inputs, outputs: looked_up.append(outputs)),
        *(block.register_forward_pre_hook(take, with_kwargs=True) for block in blocks_of(llm.model)[:1]),
    ]
    try:
        llm.model(input_ids=torch.tensor([_token_source(llm)(_PROMPT)], device=llm.embeddings.weight.device))
    except Exception as error:
        logger.debug("%s: no factor: %s", _name(llm), error)
    finally:
        for handle in handles:
            handle.remove()
    if not received:
        return 1.0
    before, after = looked_up[0].double(), received[0].double()
    factor = float((before * after).sum() / before.square().sum())
    alike = torch.allclose(after, before * factor, rtol=1e-3, atol=1e-3 * float(after.std()))
    return float(f"{factor:.6g}") if alike else 1.0


def _is_like(value: Any, tensors: Sequence[Tensor]) -> bool:
    return isinstance(value, Tensor) and bool(tensors) and value.shape == tensors[0].shape


# --- savings ---------------------------------------------------------------------------------------------------------


def _tries(check: Callable[[_Trial], bool], trial: _Trial) -> bool:
    """Whether a saving gives the right result; one that a class cannot take may fail in any way."""
    try:
        return check(trial)
    except Exception as error:
        logger.debug("%s: %s: %s", _name(trial.llm), check.__name__, error)
        return False


def _rows_are_right(trial: _Trial) -> bool:
    """Padded rows of embeddings together, and the logits of their hidden states.

    Raises:
        UserError: the class cannot take such rows.
    """
    try:
        found_SL = trial.llm.answer_states(trial.prefixes, trial.one_answer_each()).hidden_SL
        return trial.plainly_near(trial.llm.logits(found_SL), trial.own_of_one_each())
    except Exception as error:
        raise UserError(
            f"{_name(trial.llm)} cannot be run on rows of embeddings ({_reason(error)}); use another LLM"
        ) from None


def _packing_is_right(trial: _Trial) -> bool:
    """Samples that share a row, where none may see another."""
    llm, heard = trial.llm, trial.llm.embed([answer[:-1] for answer in trial.one_answer_each()])
    assert isinstance(llm, DecoderLLM)
    samples = [torch.cat(pair) for pair in zip(trial.prefixes, heard, strict=True)]
    states = llm.states_in_rows(samples, [range(len(samples))])
    answers = [hidden_TL[len(prefix) - 1 :] for prefix, hidden_TL in zip(trial.prefixes, states, strict=True)]
    return trial.near(llm.logits(torch.cat(answers)), trial.own_of_one_each())


def _tree_is_right(trial: _Trial) -> bool:
    """Two branches after each of two prompts of different lengths."""
    found = torch.stack(rank_candidates(trial.llm, trial.prefixes, [trial.answers], [0] * len(trial.prefixes)))
    expected = [_log_likelihoods(logits, trial.answers) for logits in trial.own]
    return trial.near(found, torch.stack(expected).to(found.device))


def _growing_tree_is_right(trial: _Trial) -> bool:
    """The answers as beams, a token after the other."""
    llm, beams, prompts = trial.llm, len(trial.answers), len(trial.prefixes)
    rows = Branches.of(llm, trial.prefixes).select(
        torch.arange(prompts).repeat_interleave(beams).to(llm.embeddings.weight.device)
    )
    answers = torch.tensor(trial.answers * prompts, device=llm.embeddings.weight.device)
    found = [
        rows.next_logits(answers[:, token : token + 1] if token >= 0 else answers[:, :0])
        for token in range(-1, _ANSWER - 1)
    ]
    return trial.near(torch.stack(found, dim=1), torch.cat(trial.own))


def _log_likelihoods(logits_ASV: Tensor, answers: Sequence[Sequence[int]]) -> Tensor:
    """Of each of the answers, which are of equal length, in nats."""
    tokens_AS1 = torch.tensor(answers, device=logits_ASV.device)[..., None]
    return logits_ASV.log_softmax(-1).gather(-1, tokens_AS1).sum(dim=(1, 2))


def _generation(trial: _Trial) -> dict[str, bool]:
    """How its class continues prompts: at all, with beams, padded, with a prompt's keys shared among beams."""
    plain = copy.copy(trial.llm)
    plain.abilities = replace(plain.abilities, shared_beams=False)

    def right(llm: LLM, beams: int, *, together: bool) -> bool:
        near = trial.plainly_near if llm is plain and not together else trial.near
        return _tries(lambda _: _continues_right(trial, llm, beams, near, together=together), trial)

    if right(trial.llm, _BEAMS, together=True):
        return {}
    if right(plain, _BEAMS, together=False):
        padded = right(plain, _BEAMS, together=True)
        return {"padded_prompts": padded, "shared_beams": right(trial.llm, _BEAMS, together=False)}
    if right(plain, 1, together=False):
        return {"padded_prompts": right(plain, 1, together=True), "beams": False}
    return {"generates": False}


def _continues_right(
    trial: _Trial, llm: LLM, beams: int, near: Callable[[Tensor, Tensor], bool], *, together: bool
) -> bool:
    """Whether texts have the likelihoods of the class's own forward: a wrong cache gives others."""
    for prefixes in [trial.prefixes] if together else [[prefix] for prefix in trial.prefixes]:
        found, texts = _continued(llm, prefixes, beams)
        own_SV = llm.logits(llm.answer_states(prefixes, texts).hidden_SL)  # rows are right, it was seen
        if not near(found, _log_likelihoods(own_SV.unflatten(0, (len(texts), -1)), texts)):
            return False
    return True


def _continued(llm: LLM, prefixes: Sequence[Tensor], beams: int) -> tuple[Tensor, list[list[int]]]:
    """The likeliest continuation of each prompt: its log-likelihood as the search has it, and its tokens."""
    options: dict[str, Any] = {"max_new_tokens": _NEW_TOKENS, "min_new_tokens": _NEW_TOKENS, "num_beams": beams}
    if beams > 1:
        options |= {"output_scores": True, "length_penalty": 0.0}
    found = llm.continue_rows(prefixes, return_dict_in_generate=True, output_logits=True, **options)
    tokens = llm.new_tokens(found.sequences).tolist()
    if beams > 1:
        return found.sequences_scores.float(), tokens
    return _log_likelihoods(torch.stack(found.logits, dim=1).float(), tokens), tokens


# --- precision -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Hold a model in half precision in float32 for a while, bit for bit as before afterwards.

    A large one has its repeated blocks widened in turn, each while it runs.
    """
    narrow: dict[int, tuple[Tensor, Tensor]] = {}  # every tensor that is wider now, with what it held

    def widen(tensors: Sequence[Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for tensor in tensors:
                if tensor.is_floating_point() and tensor.dtype.itemsize < torch.float32.itemsize:
                    narrow[id(tensor)] = tensor, tensor.data
                    tensor.data = tensor.data.float()

    def restore(tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            if id(tensor) in narrow:
                tensor.data = narrow.pop(id(tensor))[1]

    large = sum(parameter.numel() for parameter in model.parameters()) > _AT_ONCE
    blocks = [
        (block, [tensor for tensor in _tensors(block) if tensor.numel() > _SMALL])
        for block in (blocks_of(model) if large else [])
    ]
    in_turn = {id(tensor) for _, tensors in blocks for tensor in tensors}
    handles = []
    for block, tensors in blocks:
        handles.append(block.register_forward_pre_hook(lambda *_, own=tensors: widen(own)))
        handles.append(block.register_forward_hook(lambda *_, own=tensors: restore(own)))
    try:
        widen([tensor for tensor in _tensors(model) if id(tensor) not in in_turn])
        yield
    finally:
        restore([tensor for tensor, _ in list(narrow.values())])
        for handle in handles:
            handle.remove()


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _name(llm: LLM) -> str:
    return type(llm.model).__name__


def _reason(error: Exception) -> str:
    """A foreign error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
