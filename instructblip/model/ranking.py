"""Candidate ranking: the log-likelihood of every candidate answer for the price of little more than one prompt.

The prompt (soft visual prompt and text) is run once and its keys and values are kept. All candidates of a sample are then
laid out in one row as a tree: candidates that begin alike share their beginning, every token attends to the prompt and to
its own ancestors only, and its position is its depth. So the scores are those of one full forward per candidate.

Shape legend: B samples, T prompt tokens, N tree nodes, L language-model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from instructblip.model.llm import DecoderLLM

_LOGIT_ROWS = 256  # vocabulary rows in memory at a time


@dataclass
class CandidateTree:
    """The candidates of one sample as a prefix tree.

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


def build_tree(candidates: Sequence[Sequence[int]]) -> CandidateTree:
    """Merge token sequences into a prefix tree.

    Raises:
        ValueError: no candidates, or an empty one, which has no likelihood.
    """
    if not candidates:
        raise ValueError("a sample has no candidates to rank")
    tree = CandidateTree()
    node_of: dict[tuple[int, ...], int] = {(): -1}
    for number, tokens in enumerate(candidates):
        if not tokens:
            raise ValueError(f"candidate {number} has no tokens; rank it with include_eos=True or leave it out")
        path = []
        for depth, token in enumerate(tokens):
            prefix = tuple(tokens[:depth])
            if prefix not in node_of:
                node_of[prefix] = len(tree.tokens)
                tree.tokens.append(prefix[-1])
                tree.parents.append(node_of[prefix[:-1]])
                tree.depths.append(depth - 1)
            path.append((node_of[prefix], token))
        tree.paths.append(path)
    return tree


def rank_candidates(
    llm: DecoderLLM, prefixes: Sequence[Tensor], candidates: Sequence[Sequence[Sequence[int]]], *, normalize: str
) -> list[Tensor]:
    """Score candidate token sequences after each prefix.

    Args:
        llm: the language model.
        prefixes: B embedded prompts, each (T_i, L).
        candidates: B lists of token sequences.
        normalize: `sum` or `mean` over a candidate's tokens.

    Returns:
        B float32 tensors of log-likelihoods in nats, in the candidates' order.
    """
    if normalize not in ("sum", "mean"):
        raise ValueError(f"normalize is 'sum' or 'mean', not {normalize!r}")
    trees = [build_tree(lists) for lists in candidates]
    lengths = [prefix.shape[0] for prefix in prefixes]
    cache = llm.empty_cache()
    hidden_BTL = llm.hidden_states(pad_sequence(list(prefixes), batch_first=True), cache=cache)
    last_BL = torch.stack([row[length - 1] for row, length in zip(hidden_BTL, lengths, strict=True)])
    nodes = max(len(tree.tokens) for tree in trees)
    node_BNL = last_BL[:, None]
    if nodes:
        node_BNL = torch.cat([node_BNL, _run_trees(llm, trees, lengths, hidden_BTL.shape[1], nodes, cache)], dim=1)
    return [_score(llm, tree, row, normalize) for tree, row in zip(trees, node_BNL, strict=True)]


def _run_trees(
    llm: DecoderLLM, trees: list[CandidateTree], lengths: list[int], prompt: int, nodes: int, cache: object
) -> Tensor:
    device, dtype = llm.embeddings.weight.device, llm.embeddings.weight.dtype
    tokens_BN = torch.tensor([tree.tokens + [llm.pad_id] * (nodes - len(tree.tokens)) for tree in trees])
    positions_BN = torch.tensor(
        [
            [length + depth for depth in tree.depths] + [length] * (nodes - len(tree.tokens))
            for tree, length in zip(trees, lengths, strict=True)
        ]
    )
    visible = torch.stack([_visible(tree, length, prompt, nodes) for tree, length in zip(trees, lengths, strict=True)])
    mask_B1NK = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)[:, None]
    return llm.hidden_states(
        llm.embeddings(tokens_BN.to(device)),
        cache=cache,  # type: ignore[arg-type]
        positions_BT=positions_BN.to(device),
        mask_B1TK=mask_B1NK.to(device),
    )


def _visible(tree: CandidateTree, length: int, prompt: int, nodes: int) -> Tensor:
    """Which of [prompt, nodes] each node attends to: (N, prompt + N) booleans. Filler nodes see the prompt only."""
    visible = torch.zeros(nodes, prompt + nodes, dtype=torch.bool)
    visible[:, :length] = True
    for node, parent in enumerate(tree.parents):  # parents come before children
        if parent >= 0:
            visible[node, prompt:] = visible[parent, prompt:]
        visible[node, prompt + node] = True
    return visible


def _score(llm: DecoderLLM, tree: CandidateTree, node_NL: Tensor, normalize: str) -> Tensor:
    # Row 0 of node_NL is the prompt's last token, row n + 1 is node n.
    rows = torch.tensor([node + 1 for path in tree.paths for node, _ in path], device=node_NL.device)
    tokens = torch.tensor([token for path in tree.paths for _, token in path], device=node_NL.device)
    needed, place = rows.unique(return_inverse=True)
    log_probs = torch.empty(len(rows), device=node_NL.device)
    for start in range(0, len(needed), _LOGIT_ROWS):
        chunk = llm.logits(node_NL[needed[start : start + _LOGIT_ROWS]]).log_softmax(-1)
        inside = (place >= start) & (place < start + _LOGIT_ROWS)
        log_probs[inside] = chunk[place[inside] - start, tokens[inside]]
    pieces = log_probs.split([len(path) for path in tree.paths])
    return torch.stack([piece.sum() if normalize == "sum" else piece.mean() for piece in pieces]).cpu()
