"""Rows of a language model's token table and output head, taken away or added, and tokens of its tokenizer.

transformers has a function for it that draws new rows at random and ties the two tables again, though weights such as
FlanT5's have a head of their own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn


@torch.no_grad()
def resize_vocabulary(model: Any, rows: int) -> None:
    """Give the token table and the output head of a transformers model `rows` rows, in place; tied ones stay tied."""
    head = model.get_output_embeddings()
    tables = {id(table): table for part in (model.get_input_embeddings(), head) for table in part.parameters()}
    resized = {key: nn.Parameter(with_rows(table, rows), table.requires_grad) for key, table in tables.items()}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in resized:
                setattr(module, name, resized[id(parameter)])
                setattr(module, "num_embeddings" if isinstance(module, nn.Embedding) else "out_features", rows)
    model.config.get_text_config().vocab_size = rows


def with_rows(table: Tensor, rows: int) -> Tensor:
    """The first rows of a table (or a bias), or all of them and new ones behind: the mean of those that are there."""
    table = table.detach()
    if rows <= len(table):
        return table[:rows].clone()
    mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(rows - len(table), *mean.shape[1:])])


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Add special tokens behind a tokenizer's own, those that it lacks."""
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], special_tokens=True)
