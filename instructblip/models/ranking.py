"""Candidate ranking: the log-likelihood of every candidate answer for the price of little more than one prompt.

The prompt (soft visual prompt and text) is run once and its keys and values are kept; an encoder-decoder model encodes it
once. All candidates of a sample are then laid out in one row as a tree: candidates that begin alike share their beginning,
every token attends to the prompt and to its own ancestors only, and its position is its depth. So the scores are those of
one full forward per candidate. A language model whose class cannot do that (`LLMAbilities.tree`) gets the full forwards.

Shape legend: B samples, N tree nodes, L language-model width.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from instructblip.models.llm import LLM
from instructblip.models.prefill import Prefill

Item = TypeVar("Item", bound=Hashable)

_LOGIT_ROWS = 256  # vocabulary rows in memory at a time
TOKEN_BUDGET = 8192  # tokens of one forward pass


@dataclass
class CandidateTree:
    """Candidates of one sample as a prefix tree.

    Attributes:
        tokens: token of each node that is fed to the model (a candidate's last token is only ever predicted).
        parents: node before it, -1 for the prompt.
        depths: 0 for children of the prompt.
        paths: for each candidate, the (predicting node, predicted token) pairs whose log-probabilities it sums; node -1 is
            the last token of the prompt.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    paths: list[list[tuple[int, int]]] = field(default_factory=list)
    _children: dict[tuple[int, int], int] = field(default_factory=dict, repr=False)

    def add(self, candidate: Sequence[int], room: int | None = None) -> bool:
        """Merge a token sequence into the tree, unless it would then hold more than `room` nodes and not this one alone."""
        node, depth = -1, 0
        while depth < len(candidate) - 1 and (node, candidate[depth]) in self._children:
            node, depth = self._children[node, candidate[depth]], depth + 1
        new = len(candidate) - 1 - depth
        if room is not None and self.paths and new > 0 and len(self.tokens) + new > room:
            return False
        for token in candidate[depth:-1]:
            self._children[node, token] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(node)
            self.depths.append(depth)
            node, depth = len(self.tokens) - 1, depth + 1
        self.paths.append(self._path(candidate))
        return True

    def _path(self, candidate: Sequence[int]) -> list[tuple[int, int]]:
        node, path = -1, []
        for depth, token in enumerate(candidate):
            path.append((node, token))
            if depth < len(candidate) - 1:
                node = self._children[node, token]
        return path


def rank_candidates(
    llm: LLM,
    prefixes: Sequence[Tensor],
    candidates: Sequence[Sequence[Sequence[int]]],
    list_of: Sequence[int] | None = None,
    *,
    normalize: str = "sum",
    token_budget: int = TOKEN_BUDGET,
) -> list[Tensor]:
    """Score candidate token sequences after each prefix.

    Args:
        llm: the language model.
        prefixes: B embedded prompts, each (T_i, L).
        candidates: lists of token sequences, of any lengths.
        list_of: which of the lists each prefix is scored with; prefixes of one list share the work on it. None: the i-th
            prefix has the i-th list.
        normalize: `sum` or `mean` over a candidate's tokens.
        token_budget: tokens, padding included, that one forward pass may hold; bounds memory, changes no score. A single
            prompt or candidate that is longer is run alone.

    Returns:
        B float32 tensors of log-likelihoods in nats, in the candidates' order.

    Raises:
        ValueError: a sample without candidates, a candidate without tokens, an unknown normalisation.
    """
    list_of = range(len(candidates)) if list_of is None else list_of
    if len(prefixes) != len(list_of):
        raise ValueError(f"{len(prefixes)} prompts and {len(list_of)} lists of candidates; each prompt needs one")
    check_lists(candidates, list_of, normalize)
    if not llm.abilities.tree:
        rows = zip(prefixes, list_of, strict=True)
        return [_score_rows(llm, prefix, candidates[number], normalize, token_budget) for prefix, number in rows]
    scores: list[Tensor] = [torch.empty(0)] * len(prefixes)
    for group in length_groups([len(prefix) for prefix in prefixes], token_budget):
        prompts = llm.prefill([prefixes[row] for row in group])
        numbers, inverse = deduplicated([list_of[row] for row in group])
        lists = [candidates[number] for number in numbers]
        for row, row_scores in zip(
            group, _rank_group(llm, prompts, lists, inverse, normalize, token_budget), strict=True
        ):
            scores[row] = row_scores
    return scores


def greedy_candidates(
    llm: LLM, prefixes: Sequence[Tensor], candidates: Sequence[Sequence[int]], token_budget: int = TOKEN_BUDGET
) -> list[bool]:
    """Whether each token of a candidate is the likeliest behind those before it, so that greedy decoding would write it.

    Args:
        llm: the language model.
        prefixes: B embedded prompts, each (T_i, L).
        candidates: a token sequence for each of them.
        token_budget: as of `rank_candidates`.
    """
    found = [False] * len(prefixes)
    lengths = [len(prefix) + len(tokens) for prefix, tokens in zip(prefixes, candidates, strict=True)]
    for group in length_groups(lengths, token_budget):
        answers = [candidates[row] for row in group]
        hidden_SL = llm.answer_states([prefixes[row] for row in group], answers).hidden_SL
        likeliest_S = torch.cat([llm.logits(chunk_NL).argmax(-1) for chunk_NL in hidden_SL.split(_LOGIT_ROWS)]).cpu()
        agrees_S = likeliest_S == torch.tensor([token for answer in answers for token in answer])
        for row, own in zip(group, agrees_S.split([len(answer) for answer in answers]), strict=True):
            found[row] = bool(own.all())
    return found


def deduplicated(items: Sequence[Item]) -> tuple[list[Item], list[int]]:
    """The distinct items in the order of their first appearance, and for each item the place of its like among them."""
    places: dict[Item, int] = {}
    inverse = [places.setdefault(item, len(places)) for item in items]
    return list(places), inverse


def check_lists(candidates: Sequence[Sequence[Sequence[int]]], list_of: Sequence[int], normalize: str) -> None:
    """Refuse what cannot be ranked.

    Raises:
        ValueError: a sample without candidates, a candidate without tokens, an unknown normalisation.
    """
    if normalize not in ("sum", "mean"):
        raise ValueError(f"normalize is 'sum' or 'mean', not {normalize!r}")
    for list_number, sequences in enumerate(candidates):
        row = list_of.index(list_number)
        if not sequences:
            raise ValueError(f"sample {row} has no candidates to rank")
        for number, tokens in enumerate(sequences):
            if not tokens:
                raise ValueError(
                    f"candidate {number} of sample {row} has no tokens; rank it with include_eos=True or leave it out"
                )


def length_groups(lengths: list[int], token_budget: int) -> Iterator[list[int]]:
    """Rows of like length together, each group within the budget when padded to its longest."""
    group: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and (len(group) + 1) * lengths[row] > token_budget:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _score_rows(
    llm: LLM, prefix: Tensor, candidates: Sequence[Sequence[int]], normalize: str, token_budget: int
) -> Tensor:
    """Scores of one prompt's candidates, each in a row of its own."""
    scores = torch.empty(len(candidates))
    for group in length_groups([len(prefix) + len(tokens) for tokens in candidates], token_budget):
        answers = [candidates[number] for number in group]
        hidden_SL = llm.answer_states([prefix] * len(answers), answers).hidden_SL
        tokens_S = torch.tensor([token for answer in answers for token in answer], device=hidden_SL.device)
        rows_S = torch.arange(len(hidden_SL), device=hidden_SL.device)
        log_probs_S = log_probs(llm, hidden_SL, rows_S, tokens_S)
        scores[group] = _reduced(log_probs_S, [len(answer) for answer in answers], normalize)
    return scores


def _rank_group(
    llm: LLM,
    prompts: Prefill,
    lists: Sequence[Sequence[Sequence[int]]],
    list_of: Sequence[int],
    normalize: str,
    token_budget: int,
) -> list[Tensor]:
    """Scores of each prompt's candidates, in passes whose trees hold together as many tokens as the budget allows.

    Prompts of one list of candidates, such as a vocabulary, share its order and its trees.
    """
    room = max(token_budget // len(list_of), 1)
    # In the order of their tokens, candidates that begin alike come into the same tree.
    orders = [_token_order(sequences) for sequences in lists]
    scores = [torch.empty(len(lists[number])) for number in list_of]
    places = [0] * len(lists)
    while any(place < len(order) for place, order in zip(places, orders, strict=True)):
        trees, taken = [], []
        for number, (sequences, order) in enumerate(zip(lists, orders, strict=True)):
            start = places[number]
            tree, places[number] = _fill_tree(sequences, order, start, room)
            trees.append(tree)
            taken.append(order[start : places[number]])
        for row, values in enumerate(_score_trees(llm, prompts, trees, list_of, normalize)):
            scores[row][taken[list_of[row]]] = values
    return scores


def _fill_tree(
    sequences: Sequence[Sequence[int]], order: list[int], start: int, room: int
) -> tuple[CandidateTree, int]:
    """A tree of the candidates from `start` on, as many as there is room for, and the place of the first that is left."""
    tree, place = CandidateTree(), start
    while place < len(order) and tree.add(sequences[order[place]], room):
        place += 1
    return tree, place


def _token_order(sequences: Sequence[Sequence[int]]) -> list[int]:
    return sorted(range(len(sequences)), key=lambda number: tuple(sequences[number]))


def _score_trees(
    llm: LLM, prompts: Prefill, trees: Sequence[CandidateTree], tree_of: Sequence[int], normalize: str
) -> list[Tensor]:
    """Scores of each prompt's tree, `trees[tree_of[i]]`."""
    node_BNL = tree_states(llm, prompts, trees, tree_of)
    return [_score(llm, trees[number], node_NL, normalize) for number, node_NL in zip(tree_of, node_BNL, strict=True)]


def tree_states(llm: LLM, prompts: Prefill, trees: Sequence[CandidateTree], tree_of: Sequence[int]) -> Tensor:
    """Hidden states (B, 1 + N, L) of each prompt's last token and of the nodes of its tree, `trees[tree_of[i]]`, padded."""
    nodes, node_BNL = max(len(tree.tokens) for tree in trees), prompts.last_BL[:, None]
    if nodes:
        device, filler = node_BNL.device, [[0] * (nodes - len(tree.tokens)) for tree in trees]
        pad_id = llm.prompt_format.pad_id
        tokens = [tree.tokens + [pad_id] * len(rest) for tree, rest in zip(trees, filler, strict=True)]
        depths = [tree.depths + rest for tree, rest in zip(trees, filler, strict=True)]
        of_row_B = torch.tensor(tree_of, device=device)
        tokens_BN = torch.tensor(tokens, device=device)[of_row_B]
        depths_BN = torch.tensor(depths, device=device)[of_row_B]
        visible_BNN = torch.stack([_visible(tree, nodes) for tree in trees]).to(device)[of_row_B]
        hidden_BNL = llm.decode_tree(prompts, tokens_BN, depths_BN, visible_BNN)
        node_BNL = torch.cat([node_BNL, hidden_BNL], dim=1)
    return node_BNL


def _visible(tree: CandidateTree, nodes: int) -> Tensor:
    """Which nodes each node attends to, (N, N) booleans; filler nodes see nothing but the prompt."""
    visible_NN = torch.zeros(nodes, nodes, dtype=torch.bool)
    parents_N = torch.tensor(tree.parents, dtype=torch.long)
    node_N = at_N = torch.arange(len(tree.parents))
    while len(node_N):
        visible_NN[node_N, at_N] = True
        above_N = parents_N[at_N]
        node_N, at_N = node_N[above_N >= 0], above_N[above_N >= 0]
    return visible_NN


def _score(llm: LLM, tree: CandidateTree, node_NL: Tensor, normalize: str) -> Tensor:
    if not tree.paths:
        return torch.empty(0)
    # Row 0 of node_NL is the prompt's last token, row n + 1 is node n.
    rows = torch.tensor([node + 1 for path in tree.paths for node, _ in path], device=node_NL.device)
    tokens = torch.tensor([token for path in tree.paths for _, token in path], device=node_NL.device)
    return _reduced(log_probs(llm, node_NL, rows, tokens), [len(path) for path in tree.paths], normalize)


def log_probs(llm: LLM, hidden_NL: Tensor, rows_S: Tensor, tokens_S: Tensor) -> Tensor:
    """The log-probability (S,) of each token by the hidden state of its row; each row's logits are computed once."""
    needed, place_S = rows_S.unique(return_inverse=True)
    log_probs_S = torch.empty(len(rows_S), device=hidden_NL.device)
    for start in range(0, len(needed), _LOGIT_ROWS):
        chunk_NV = llm.logits(hidden_NL[needed[start : start + _LOGIT_ROWS]]).log_softmax(-1)
        inside = (place_S >= start) & (place_S < start + _LOGIT_ROWS)
        log_probs_S[inside] = chunk_NV[place_S[inside] - start, tokens_S[inside]]
    return log_probs_S


def _reduced(log_probs_S: Tensor, lengths: Sequence[int], normalize: str) -> Tensor:
    """Sum or mean over the tokens of each candidate, on the CPU."""
    return torch.segment_reduce(log_probs_S.cpu(), normalize, lengths=torch.tensor(lengths))
