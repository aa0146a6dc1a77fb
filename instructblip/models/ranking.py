"""Candidate ranking: the log-likelihood of every candidate answer for the price of little more than one prompt.

The prompt (soft visual prompt and text) is run once and its keys and values are kept; an encoder-decoder model encodes it
once. All candidates of a sample are then laid out in one row as a tree: candidates that begin alike share their beginning,
every token attends to the prompt and to its own ancestors only, and its position is its depth. So the scores are those of
one full forward per candidate.

Shape legend: B samples, N tree nodes, L language-model width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from instructblip.models.llm import LLM, Prefill

Item = TypeVar("Item")
Result = TypeVar("Result")

_LOGIT_ROWS = 256  # vocabulary rows in memory at a time
TOKEN_BUDGET = 8192  # tokens of one forward pass

# What is counted, where the paper and the released code differ. The released decoder-only code divides by the padded
# length as well, which is one number for all candidates of a forward pass and so changes no order within it; it scores
# long candidate lists in several passes whose numbers do not compare, which is not repeated here.
RANKING_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "decoder": {"normalize": "sum", "include_eos": True},
        "encoder_decoder": {"normalize": "sum", "include_eos": True},
    },
    "lavis": {
        "decoder": {"normalize": "sum", "include_eos": False},
        "encoder_decoder": {"normalize": "sum", "include_eos": True},
    },
}


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
    *,
    normalize: str = "sum",
    token_budget: int = TOKEN_BUDGET,
) -> list[Tensor]:
    """Score candidate token sequences after each prefix.

    Args:
        llm: the language model.
        prefixes: B embedded prompts, each (T_i, L).
        candidates: B lists of token sequences, of any lengths.
        normalize: `sum` or `mean` over a candidate's tokens.
        token_budget: tokens, padding included, that one forward pass may hold; bounds memory, changes no score. A single
            prompt or candidate that is longer is run alone.

    Returns:
        B float32 tensors of log-likelihoods in nats, in the candidates' order.

    Raises:
        ValueError: a sample without candidates, a candidate without tokens, an unknown normalisation.
    """
    if normalize not in ("sum", "mean"):
        raise ValueError(f"normalize is 'sum' or 'mean', not {normalize!r}")
    if len(prefixes) != len(candidates):
        raise ValueError(f"{len(prefixes)} prompts and {len(candidates)} lists of candidates; each prompt needs one")
    _check(candidates)
    scores: list[Tensor] = [torch.empty(0)] * len(prefixes)
    for group in _groups([len(prefix) for prefix in prefixes], token_budget):
        prompts = llm.prefill([prefixes[row] for row in group])
        lists = [candidates[row] for row in group]
        for row, row_scores in zip(group, _rank_group(llm, prompts, lists, normalize, token_budget), strict=True):
            scores[row] = row_scores
    return scores


def _check(candidates: Sequence[Sequence[Sequence[int]]]) -> None:
    for row, sequences in enumerate(candidates):
        if not sequences:
            raise ValueError(f"sample {row} has no candidates to rank")
        for number, tokens in enumerate(sequences):
            if not tokens:
                raise ValueError(
                    f"candidate {number} of sample {row} has no tokens; rank it with include_eos=True or leave it out"
                )


def _groups(lengths: list[int], token_budget: int) -> Iterator[list[int]]:
    """Rows of like length together, each group within the budget when padded to its longest."""
    group: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and (len(group) + 1) * lengths[row] > token_budget:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _rank_group(
    llm: LLM, prompts: Prefill, candidates: list[Sequence[Sequence[int]]], normalize: str, token_budget: int
) -> list[Tensor]:
    """Scores of each row's candidates, in passes whose trees hold together as many tokens as the budget allows."""
    room = max(token_budget // len(candidates), 1)
    # In the order of their tokens, candidates that begin alike come into the same tree. Rows that were given one and the
    # same list, such as a vocabulary, share order and trees.
    orders = for_each_object(_token_order, candidates)
    scores = [torch.empty(len(sequences)) for sequences in candidates]
    places = [0] * len(candidates)
    while any(place < len(order) for place, order in zip(places, orders, strict=True)):
        trees, taken = [], []
        made: dict[int, tuple[CandidateTree, int]] = {}
        for row, sequences in enumerate(candidates):
            start = places[row]  # the same for all rows of one list
            if id(sequences) not in made:
                made[id(sequences)] = _fill_tree(sequences, orders[row], start, room)
            tree, places[row] = made[id(sequences)]
            trees.append(tree)
            taken.append(orders[row][start : places[row]])
        for row, values in enumerate(_score_trees(llm, prompts, trees, normalize)):
            scores[row][taken[row]] = values
    return scores


def for_each_object(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """The work's result for each item, done once, and shared, where several items are one and the same object."""
    results = {number: work(item) for number, item in {id(item): item for item in items}.items()}
    return [results[id(item)] for item in items]


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


def _score_trees(llm: LLM, prompts: Prefill, trees: list[CandidateTree], normalize: str) -> list[Tensor]:
    nodes, node_BNL = max(len(tree.tokens) for tree in trees), prompts.last_BL[:, None]
    if nodes:
        device = node_BNL.device
        tokens_BN = torch.tensor(
            [tree.tokens + [llm.prompt_format.pad_id] * (nodes - len(tree.tokens)) for tree in trees]
        )
        depths_BN = torch.tensor([tree.depths + [0] * (nodes - len(tree.tokens)) for tree in trees])
        visible_BNN = torch.stack(for_each_object(lambda tree: _visible(tree, nodes), trees))
        hidden_BNL = llm.decode_tree(prompts, tokens_BN.to(device), depths_BN.to(device), visible_BNN.to(device))
        node_BNL = torch.cat([node_BNL, hidden_BNL], dim=1)
    return [_score(llm, tree, node_NL, normalize) for tree, node_NL in zip(trees, node_BNL, strict=True)]


def _visible(tree: CandidateTree, nodes: int) -> Tensor:
    """Which nodes each node attends to, (N, N) booleans; filler nodes see nothing but the prompt."""
    visible_NN = torch.zeros(nodes, nodes, dtype=torch.bool)
    for node, parent in enumerate(tree.parents):  # parents come before children
        if parent >= 0:
            visible_NN[node] = visible_NN[parent]
        visible_NN[node, node] = True
    return visible_NN


def _score(llm: LLM, tree: CandidateTree, node_NL: Tensor, normalize: str) -> Tensor:
    if not tree.paths:
        return torch.empty(0)
    # Row 0 of node_NL is the prompt's last token, row n + 1 is node n.
    rows = torch.tensor([node + 1 for path in tree.paths for node, _ in path], device=node_NL.device)
    tokens = torch.tensor([token for path in tree.paths for _, token in path], device=node_NL.device)
    needed, place = rows.unique(return_inverse=True)
    log_probs = torch.empty(len(rows), device=node_NL.device)
    for start in range(0, len(needed), _LOGIT_ROWS):
        chunk = llm.logits(node_NL[needed[start : start + _LOGIT_ROWS]]).log_softmax(-1)
        inside = (place >= start) & (place < start + _LOGIT_ROWS)
        log_probs[inside] = chunk[place[inside] - start, tokens[inside]]
    lengths = torch.tensor([len(path) for path in tree.paths])
    return torch.segment_reduce(log_probs.cpu(), normalize, lengths=lengths)
