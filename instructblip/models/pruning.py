"""The likeliest of many candidate answers, without scoring them all.

No log-probability is above 0, so a candidate is at most as likely as its beginning. The vocabulary is a tree of beginnings.
Those with the largest bounds are run first, many in a pass; what is bounded below the best that were found is never run. So
the best are those of `ranking.rank_candidates`, and their scores, whatever the model knows; what it saves depends on that.

Shape legend: B samples, C candidates, M nodes of a vocabulary's tree, S (node, next token) pairs, L language-model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from instructblip.models.llm import LLM
from instructblip.models.prefill import Prefill
from instructblip.models.ranking import (
    TOKEN_BUDGET,
    CandidateTree,
    check_lists,
    length_groups,
    log_probs,
    rank_candidates,
    tree_states,
)

# The same sum comes out a little differently in passes of other sizes, so a bound must be this far below, in nats.
_ROUNDING = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-1}
_FIRST_PASS = 2  # nodes of the first pass, times the candidates wanted; each further pass has twice as many


@dataclass(frozen=True)
class Vocabulary:
    """Candidates as a tree that holds all their tokens; nodes are numbered level by level, so parents come first.

    Attributes:
        tokens_M, parents_M, depths_M: of each node; the parent is -1 and the depth 0 where it begins an answer.
        children_M: numbers of each node's first child and of the one behind its last, (M + 1, 2); row 0 is the prompt's.
        longest_M: tokens of the longest candidate below each node; 0 where none is.
        ends_C: the node of each candidate's last token.
        lengths_C: tokens of each candidate.
    """

    tokens_M: Tensor
    parents_M: Tensor
    depths_M: Tensor
    children_M: Tensor
    longest_M: Tensor
    ends_C: Tensor
    lengths_C: Tensor


def vocabulary_of(candidates: Sequence[Sequence[int]]) -> Vocabulary:
    """The tree of token sequences, none of them empty."""
    tokens, parents, depths = list[int](), list[int](), list[int]()
    ends, longest = [0] * len(candidates), list[int]()
    # Candidates that share a beginning, by its node; one level after the other.
    level: list[tuple[int, list[int]]] = [(-1, list(range(len(candidates))))]
    children = [(0, 0)]
    depth = 0
    while level:
        below: list[tuple[int, list[int]]] = []
        for node, numbers in level:
            first, sharing = len(tokens), dict[int, list[int]]()
            for number in numbers:
                if depth < len(candidates[number]):
                    sharing.setdefault(candidates[number][depth], []).append(number)
            for token, members in sharing.items():
                below.append((len(tokens), members))
                tokens.append(token)
                parents.append(node)
                depths.append(depth)
                children.append((0, 0))
                further = [len(candidates[number]) for number in members if len(candidates[number]) > depth + 1]
                longest.append(max(further, default=0))
                for number in members:
                    if len(candidates[number]) == depth + 1:
                        ends[number] = len(tokens) - 1
            children[node + 1] = (first, len(tokens))
        level, depth = below, depth + 1
    lengths = [len(candidate) for candidate in candidates]
    return Vocabulary(*map(torch.tensor, (tokens, parents, depths, children, longest, ends, lengths)))


def best_candidates(
    llm: LLM,
    prefixes: Sequence[Tensor],
    candidates: Sequence[Sequence[Sequence[int]]],
    list_of: Sequence[int],
    *,
    best: int,
    normalize: str = "sum",
    token_budget: int = TOKEN_BUDGET,
) -> list[Tensor]:
    """Score the likeliest candidates after each prefix.

    Args:
        llm, prefixes, candidates, list_of, normalize, token_budget: as of `rank_candidates`.
        best: so many of each list are scored for certain, the first of equals.

    Returns:
        B float32 tensors of log-likelihoods in nats, in the candidates' order: -inf of those that are not among the best and
        were not looked at. A row of NaN where the model's numbers are not finite.

    Raises:
        ValueError: as `rank_candidates`.
    """
    if not llm.abilities.tree:
        whole = rank_candidates(llm, prefixes, candidates, list_of, normalize=normalize, token_budget=token_budget)
        return [row if bool(row.isfinite().all()) else torch.full_like(row, torch.nan) for row in whole]
    check_lists(candidates, list_of, normalize)
    vocabularies = [vocabulary_of(sequences) for sequences in candidates]
    scores: list[Tensor] = [torch.empty(0)] * len(prefixes)
    for group in length_groups([len(prefix) for prefix in prefixes], token_budget):
        prompts = llm.prefill([prefixes[row] for row in group])
        searches = [_Search(vocabularies[list_of[row]], best, normalize, _rounding(prompts)) for row in group]
        _search_all(llm, prompts, searches, token_budget)
        for row, search in zip(group, searches, strict=True):
            scores[row] = search.scores()
    return scores


def _rounding(prompts: Prefill) -> float:
    return _ROUNDING.get(prompts.last_BL.dtype, max(_ROUNDING.values()))


class _Search:
    """What is known of one prompt's candidates.

    Args:
        vocabulary: all of them.
        best: so many are wanted.
        normalize: `sum` or `mean`.
        rounding: how far a bound must be below a score to be below it for certain, nats.
    """

    def __init__(self, vocabulary: Vocabulary, best: int, normalize: str, rounding: float) -> None:
        self.vocabulary, self._best, self._rounding = vocabulary, min(best, len(vocabulary.ends_C)), rounding
        self._mean = normalize == "mean"
        nodes = len(vocabulary.tokens_M)
        self._sums_M = torch.full((nodes,), -torch.inf)
        self._known_M = torch.zeros(nodes, dtype=torch.bool)
        self._open_M = vocabulary.longest_M > 0  # not run yet, and something is below
        self._finite = True

    def next_nodes(self, count: int) -> Tensor:
        """Up to `count` nodes to run, those with the largest bounds; none where the best are known."""
        if not self._finite:
            return torch.empty(0, dtype=torch.long)
        found = self.scores().topk(self._best).values[-1]
        bounds_M = self._sums_M / self.vocabulary.longest_M.clamp_min(1) if self._mean else self._sums_M
        wanted = (self._known_M & self._open_M & (bounds_M >= found - self._rounding)).nonzero()[:, 0]
        return wanted[bounds_M[wanted].topk(min(count, len(wanted))).indices]

    def pass_over(self, nodes: Tensor) -> tuple[CandidateTree, Tensor]:
        """A tree of these nodes and those before them, and the place of each of these in it."""
        vocabulary, needed, above = self.vocabulary, nodes.unique(), nodes
        while len(above := vocabulary.parents_M[above]):
            above = above[above >= 0]
            needed = torch.cat([needed, above]).unique()
        parents = vocabulary.parents_M[needed]
        places = torch.where(parents >= 0, torch.searchsorted(needed, parents), -1)
        tokens, depths = vocabulary.tokens_M[needed], vocabulary.depths_M[needed]
        return CandidateTree(tokens.tolist(), places.tolist(), depths.tolist()), torch.searchsorted(needed, nodes)

    def below(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """The children of nodes (-1: the prompt), and for each the place of its parent among `nodes`."""
        first, last = self.vocabulary.children_M[nodes + 1].unbind(1)
        counts = last - first
        parents = torch.arange(len(nodes)).repeat_interleave(counts)
        inside = torch.arange(len(parents)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        return first[parents] + inside, parents

    def learn(self, nodes: Tensor, children: Tensor, log_probs_S: Tensor) -> None:
        """Take the log-probabilities of children of nodes that were run."""
        if not bool(log_probs_S.isfinite().all()):
            self._finite = False
        parents = self.vocabulary.parents_M[children]
        before_S = torch.where(parents >= 0, self._sums_M[parents.clamp_min(0)], 0.0)
        self._sums_M[children] = before_S + log_probs_S
        self._known_M[children] = True
        self._open_M[nodes[nodes >= 0]] = False

    def scores(self) -> Tensor:
        """Log-likelihoods (C,), -inf of what was not looked at."""
        if not self._finite:
            return torch.full((len(self.vocabulary.ends_C),), torch.nan)
        ends = self.vocabulary.ends_C
        sums_C = torch.where(self._known_M[ends], self._sums_M[ends], -torch.inf)
        return sums_C / self.vocabulary.lengths_C if self._mean else sums_C


def _search_all(llm: LLM, prompts: Prefill, searches: Sequence[_Search], token_budget: int) -> None:
    """Run what may be among the best, in passes over all prompts that have such nodes left."""
    root = torch.tensor([-1])
    _learn(llm, prompts.last_BL, [(search, root, root + 1) for search in searches], rows=1)
    best, number = max(search._best for search in searches), 0
    left = list(searches)
    while True:
        # Ancestors are run again with each pass, so a pass has at most so many nodes for each that it is for. If the cache
        # kept them (`decode_tree(keep=True)`), it would grow by every node of every pass, whatever `token_budget` says.
        deepest = max(int(search.vocabulary.depths_M[-1]) + 1 for search in left)
        count = max(min(_FIRST_PASS * best << number, token_budget // (len(left) * deepest)), 1)
        nodes = [search.next_nodes(count) for search in left]
        kept = [row for row, chosen in enumerate(nodes) if len(chosen)]
        if not kept:
            return
        if len(kept) < len(left):
            prompts = prompts.keep(kept)
            left, nodes = [left[row] for row in kept], [nodes[row] for row in kept]
        passes = [search.pass_over(chosen) for search, chosen in zip(left, nodes, strict=True)]
        states_BNL = tree_states(llm, prompts, [tree for tree, _ in passes], range(len(left)))
        asked = [
            (search, chosen, places + 1)  # row 0 is the prompt's
            for search, chosen, (_, places) in zip(left, nodes, passes, strict=True)
        ]
        _learn(llm, states_BNL.flatten(0, 1), asked, rows=states_BNL.shape[1])
        number += 1


def _learn(llm: LLM, hidden_NL: Tensor, asked: Sequence[tuple[_Search, Tensor, Tensor]], rows: int) -> None:
    """Tell each search the log-probabilities below its nodes: (search, nodes, their places among its `rows` states)."""
    below = [search.below(nodes) for search, nodes, _ in asked]
    pairs = [
        (number * rows + places[parents], search.vocabulary.tokens_M[children])
        for number, ((search, _, places), (children, parents)) in enumerate(zip(asked, below, strict=True))
    ]
    rows_S, tokens_S = (torch.cat(parts).to(hidden_NL.device) for parts in zip(*pairs, strict=True))
    found_S = log_probs(llm, hidden_NL, rows_S, tokens_S).cpu()
    parts = found_S.split([len(children) for children, _ in below])
    for (search, nodes, _), (children, _), own_S in zip(asked, below, parts, strict=True):
        search.learn(nodes, children, own_S)
