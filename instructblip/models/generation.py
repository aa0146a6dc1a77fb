"""What is particular about generation here: logits that are not finite stop it, and beams may be counted as years ago.

Both hold for the calls inside a `with` block and leave the model as it was.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from instructblip.errors import UserError

# Steps of transformers' beam search (5.23) that have no public hook.
_UPDATE, _UNSATISFIED = "_update_finished_beams", "_check_early_stop_heuristic"
BEAM_LENGTHS = ("new_tokens", "transformers_4_33")


@contextmanager
def finite_logits(model: PreTrainedModel) -> Iterator[None]:
    """Refuse, at the end of the block, what was generated from logits that are NaN or +infinity.

    A model with such logits writes texts like any other. The check costs no wait for the device until the end.

    Raises:
        UserError: there were such logits.
    """
    found: list[Tensor] = []

    def watch(_module: Any, _inputs: Any, outputs: Any) -> None:
        wrong = ~(outputs.logits[:, -1] < torch.inf).all()
        found[:] = [wrong | found[0]] if found else [wrong]

    handle = model.register_forward_hook(watch)
    try:
        yield
    finally:
        handle.remove()
    if found and bool(found[0]):
        raise UserError(
            "the language model's logits are not finite numbers; weights are damaged, or overflow in their dtype"
        )


@contextmanager
def beam_lengths(model: PreTrainedModel, lengths: str) -> Iterator[None]:
    """Divide the log-likelihoods of beams by lengths as one of `BEAM_LENGTHS` counts them.

    `new_tokens` is transformers' own way since 4.35: all beams by the number of new tokens, with the power `length_penalty`.
    The released code runs on 4.33, which counts the token that generation begins with in two places: a beam that is cut at
    the maximum of N tokens is divided by (N + 1)^p, and after n tokens a prompt is done when none of its beams, divided by
    (n + 1)^p, is better than the worst finished one; beams that end in the same step count there, too.

    Raises:
        ValueError: another name.
    """
    if lengths not in BEAM_LENGTHS:
        raise ValueError(f"beam_lengths is {' or '.join(BEAM_LENGTHS)}, not {lengths!r}")
    if lengths == "new_tokens":
        yield
        return
    search = _BeamsOf433(model)
    hooks = {_UPDATE: search.update, _UNSATISFIED: search.unsatisfied}
    for name, hook in hooks.items():
        setattr(model, name, hook)  # on the instance, before its class's
    try:
        yield
    finally:
        for name in hooks:
            delattr(model, name)


class _BeamsOf433:
    """The two steps of transformers' beam search that count lengths, with the lengths of 4.33.

    Shape legend: B prompts, K kept continuations of all their beams, the best first (two a beam), N beams, T tokens.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._update: Callable[..., tuple[Tensor, ...]] = getattr(model, _UPDATE)
        self._unsatisfied: Callable[..., Tensor] = getattr(model, _UNSATISFIED)
        self._ends = torch.as_tensor(model.generation_config.eos_token_id, device=model.device)
        self._best_B1 = torch.empty(0)

    def update(
        self,
        *,
        topk_running_sequences: Tensor,
        topk_log_probs: Tensor,
        is_early_stop_heuristic_unsatisfied: Tensor,
        next_token_hits_stopping_criteria: Tensor,
        top_num_beam_mask: Tensor,
        cur_len: int,
        decoder_prompt_len: int,
        **state: Any,
    ) -> tuple[Tensor, ...]:
        """Add the beams that end with an EOS, then, at the maximum, those of the N best others that are cut there."""
        ended_BK = torch.isin(topk_running_sequences[:, :, cur_len], self._ends)
        self._best_B1 = topk_log_probs[:, :1]
        shared = {
            "topk_running_sequences": topk_running_sequences,
            "topk_log_probs": topk_log_probs,
            "cur_len": cur_len,
        }
        finished = self._update(
            **shared,
            **state,
            is_early_stop_heuristic_unsatisfied=is_early_stop_heuristic_unsatisfied,
            next_token_hits_stopping_criteria=next_token_hits_stopping_criteria & ended_BK,
            top_num_beam_mask=top_num_beam_mask,
            decoder_prompt_len=decoder_prompt_len,
        )
        cut_BK = next_token_hits_stopping_criteria & ~ended_BK
        if not bool(cut_BK.any()):
            return finished
        state = state | dict(zip(_STATE, finished, strict=True))
        unsatisfied = self.unsatisfied(
            is_early_stop_heuristic_unsatisfied=is_early_stop_heuristic_unsatisfied,
            beam_scores=state["beam_scores"],
            is_sent_finished=state["is_sent_finished"],
            cur_len=cur_len + 1,
            max_length=cur_len + 1,
            decoder_prompt_len=decoder_prompt_len,
            early_stopping=state["early_stopping"],
            length_penalty=state["length_penalty"],
        )
        return self._update(
            **shared,
            **state,
            is_early_stop_heuristic_unsatisfied=unsatisfied,
            next_token_hits_stopping_criteria=cut_BK & (cut_BK.cumsum(dim=1) <= state["num_beams"]),
            top_num_beam_mask=torch.ones_like(top_num_beam_mask),
            decoder_prompt_len=decoder_prompt_len - 1,
        )

    def unsatisfied(
        self, *, decoder_prompt_len: int, running_beam_scores: Tensor | None = None, **state: Any
    ) -> Tensor:
        """Which prompts go on, by the best continuation of this step, whether it ended or not."""
        return self._unsatisfied(running_beam_scores=self._best_B1, decoder_prompt_len=decoder_prompt_len - 1, **state)


# What `_update_finished_beams` returns, in its order and by the names of its arguments.
_STATE = ("sequences", "beam_scores", "beam_indices", "is_sent_finished")
