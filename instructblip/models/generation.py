"""Texts from a language model: all beams of a prompt are branches of one tree behind it.

A step adds a node for each beam. A node attends to the prompt and to its own ancestors, so a prompt's keys and values are
held once, whatever the number of its beams, and none is copied when beams change places. Prompts that have ended leave the
batch, and others that wait take their places. A language model whose class cannot do that (`LLMAbilities.tree`) is continued
by transformers' own generation.

Shape legend: B prompts, N beams, R = B x N rows, T tokens, K nodes so far, L language-model width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from instructblip.errors import UserError
from instructblip.models.arguments import Decoding
from instructblip.models.decoding import BEAM_LENGTHS, BeamLengths, decode_in_turn, drawing, finite_logits
from instructblip.models.facts import SEARCH
from instructblip.models.llm import LLM
from instructblip.models.prefill import Prefill
from instructblip.models.streaming import NewTokens, on_ids


def check_write(llm: LLM, decoding: Decoding, beam_lengths: str) -> None:
    """Refuse what this language model does not write.

    Raises:
        ValueError: sampling with several beams, where the beams are branches.
        UserError: as `LLM.check_writes`; other `beam_lengths` than transformers' where that generates.
    """
    llm.check_writes(decoding.num_beams)
    if decoding.num_beams == 1:
        return
    if llm.abilities.tree and decoding.do_sample:
        raise ValueError("sampling draws one text: num_beams=1")
    if not llm.abilities.tree and beam_lengths != "new_tokens":
        raise UserError(
            f"{type(llm.model).__name__} is searched by transformers' own generation, which counts beam lengths as "
            "new_tokens; set beam_lengths=new_tokens"
        )


@torch.inference_mode()
def write(
    llm: LLM,
    prefixes: Sequence[Tensor],
    decoding: Decoding,
    *,
    beam_lengths: str = "new_tokens",
    at_once: int | None = None,
) -> list[str]:
    """Continue each embedded prompt (T_i, L); return the new text only, stripped.

    Args:
        llm: the language model.
        prefixes: B embedded prompts.
        decoding: how, as `check_write` lets it pass; lengths and the repetition penalty count new tokens only.
        beam_lengths: key of `BEAM_LENGTHS`.
        at_once: so many prompts are worked on together, at most; as some end, others enter. None: all.

    Raises:
        UserError: logits that are not finite.
    """
    together = at_once or len(prefixes)
    if llm.abilities.tree:
        return _in_branches(llm, prefixes, decoding, BEAM_LENGTHS[beam_lengths], together)
    return _by_transformers(llm, prefixes, decoding, together)


# --- branches of a tree ----------------------------------------------------------------------------------------------


@dataclass
class Branches:
    """The rows of a search, for `decoding.decode`: what of a tree's nodes each of them has written.

    Attributes:
        llm: the language model.
        prompts: of the rows, as many of each.
        ancestors_RK: which nodes are a row's own.
    """

    llm: LLM
    prompts: Prefill
    ancestors_RK: Tensor

    @classmethod
    def of(cls, llm: LLM, prefixes: Sequence[Tensor]) -> "Branches":
        """One row for each prompt, of nothing yet."""
        ancestors_RK = torch.zeros(len(prefixes), 0, dtype=torch.bool, device=prefixes[0].device)
        return cls(llm, llm.prefill(prefixes), ancestors_RK)

    def select(self, rows_N: Tensor) -> "Branches":
        """These rows, those of a prompt side by side; prompts without any are dropped, and so is what this was."""
        of_prompt = (rows_N // (len(self.ancestors_RK) // len(self.prompts.lengths))).unique_consecutive().tolist()
        every = of_prompt == list(range(len(self.prompts.lengths)))
        prompts = self.prompts if every else self.prompts.keep(of_prompt)
        return Branches(self.llm, prompts, self.ancestors_RK[rows_N])

    def joined(self, other: "Branches") -> "Branches":
        """These rows and then the other's; nodes that no row has written are dropped."""
        ancestors_RK = self._forget_nodes()
        nodes = max(ancestors_RK.shape[1], other.ancestors_RK.shape[1])
        both = [F.pad(rows_RK, (0, nodes - rows_RK.shape[1])) for rows_RK in (ancestors_RK, other.ancestors_RK)]
        return Branches(self.llm, self.prompts.joined(other.prompts), torch.cat(both))

    def _forget_nodes(self) -> Tensor:
        """Drop nodes that no row has written, as far as all prompts keep equally many places; the rows' ancestors."""
        batch, beams = len(self.prompts.lengths), len(self.ancestors_RK) // len(self.prompts.lengths)
        by_prompt_BNK = self.ancestors_RK.view(batch, beams, -1)
        written_BK = by_prompt_BNK.any(dim=1)
        needed = int(written_BK.sum(dim=1).max())
        if needed == written_BK.shape[1]:
            return self.ancestors_RK
        # False sorts behind True; a stable sort leaves parents in front of their children.
        places_BK = written_BK.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :needed]
        self.prompts.keep_nodes(places_BK)
        return by_prompt_BNK.gather(2, places_BK[:, None].expand(-1, beams, -1)).flatten(0, 1)

    def next_logits(self, new_RT: Tensor) -> Tensor:
        """Logits (R, V) of the token behind each row, after one more token or none."""
        batch, rows = len(self.prompts.lengths), len(new_RT)
        if new_RT.shape[1]:
            return self.llm.logits(self._grown(new_RT.view(batch, -1)))
        return self.llm.logits(self.prompts.last_BL).repeat_interleave(rows // batch, dim=0)

    def _grown(self, tokens_BN: Tensor) -> Tensor:
        """Hidden states (R, L) of a new node for each row."""
        batch, beams = tokens_BN.shape
        own_NN = torch.eye(beams, dtype=torch.bool, device=tokens_BN.device)
        before_BNK = self.ancestors_RK.view(batch, beams, -1)
        visible_BNK = torch.cat([before_BNK, own_NN.expand(batch, -1, -1)], dim=2)
        depths_BN = before_BNK.sum(dim=2)
        self.ancestors_RK = visible_BNK.flatten(0, 1)
        return self.llm.decode_tree(self.prompts, tokens_BN, depths_BN, visible_BNK, keep=True).flatten(0, 1)


def _in_branches(
    llm: LLM, prefixes: Sequence[Tensor], decoding: Decoding, lengths: BeamLengths, at_once: int
) -> list[str]:
    pad_id = llm.prompt_format.pad_id

    def step(new_RT: Tensor, rows: Branches) -> Tensor:
        look(logits_RV := rows.next_logits(new_RT))
        return logits_RV

    with finite_logits() as look:
        ids = decode_in_turn(
            step,
            lambda numbers: Branches.of(llm, [prefixes[number] for number in numbers]),
            len(prefixes),
            at_once,
            decoding,
            lengths,
            device=prefixes[0].device,
            eos_id=llm.prompt_format.eos_id,
            pad_id=pad_id,
            on_ids=on_ids(decoding.on_text, llm.texts),
        )
    return llm.texts(pad_sequence(ids, batch_first=True, padding_value=pad_id))


# --- transformers' own generation ------------------------------------------------------------------------------------


def _by_transformers(llm: LLM, prefixes: Sequence[Tensor], decoding: Decoding, at_once: int) -> list[str]:
    options: dict[str, Any] = {name: getattr(decoding, name) for name in SEARCH}
    options["do_sample"] = decoding.do_sample and decoding.noise is None
    if options["do_sample"]:  # top_k=0 sets no limit; left out, transformers' default of 50 would
        options |= {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": 0}
    if (listener := on_ids(decoding.on_text, llm.texts)) is not None:
        options["streamer"] = NewTokens(listener)
    together = at_once if llm.abilities.padded_prompts or len({len(prefix) for prefix in prefixes}) == 1 else 1
    texts = []
    with finite_logits() as look, llm.model.register_forward_hook(lambda *call: look(call[-1].logits[:, -1])):
        for first in range(0, len(prefixes), together):
            rows = range(len(prefixes))[first : first + together]
            processors = drawing(decoding.of_rows(rows), prefixes[0].device)
            found = llm.continue_rows([prefixes[row] for row in rows], processors=processors, **options)
            texts += llm.texts(llm.new_tokens(found))
    return texts
