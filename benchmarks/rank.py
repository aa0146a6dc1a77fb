"""Ranking 100 candidate answers after prompts of 60 tokens: shared prompt and tree, against the plain ways.

    python benchmarks/rank.py

The language model is `llm=smollm2_135m` (fetched on first use). The baseline is one full forward a candidate; the other
plain way is the released code's: the prompt repeated for segments of 20 candidates.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from measure import Work, compare
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from instructblip.config.entry import compose_config
from instructblip.config.schema import TrainConfig
from instructblip.models.llm import LLM
from instructblip.models.ranking import rank_candidates
from instructblip.weights.parts import load_llm

SAMPLES = 1
VISUAL_TOKENS = 32
QUESTION = "Question: what is the man on the left side of the picture doing with the thing that he holds? Short answer:"
# Frequent answers to questions about pictures: mostly one or two tokens, some share their beginning.
CANDIDATES = """
yes;no;one;two;three;four;red;blue;green;white;black;brown;yellow;gray;orange;pink;man;woman;boy;girl;dog;cat;horse;cow;
sheep;elephant;giraffe;bird;car;truck;bus;train;plane;boat;bike;motorcycle;pizza;sandwich;cake;banana;apple;broccoli;
carrot;salad;soup;bread;water;wine;beer;coffee;table;chair;couch;bed;desk;bench;lamp;clock;phone;laptop;keyboard;mouse;
book;umbrella;kite;frisbee;skateboard;surfboard;snowboard;baseball;baseball bat;baseball player;tennis;tennis racket;
tennis court;soccer;soccer ball;playing tennis;playing baseball;playing soccer;playing video games;riding a horse;
riding a bike;riding a wave;riding a skateboard;talking on phone;talking;eating;eating pizza;cooking;walking;
running;standing;sitting;sitting on a bench;sleeping;flying a kite;brushing teeth;brushing hair;reading a book
""".replace("\n", "").split(";")


def inputs(parts: list[str]) -> tuple[LLM, list[Tensor], list[list[int]]]:
    """The language model, embedded prompts (60 tokens each) and candidate tokens, without EOS as in the released code."""
    torch.manual_seed(0)
    llm = load_llm(compose_config("train", TrainConfig, parts).llm)
    room = 60 - VISUAL_TOKENS - len(llm.prompt_format.image_prefix_ids)
    scale = llm.embeddings.weight.std()
    first, asked = llm.embed([llm.prompt_format.image_prefix_ids, llm.prompt_format.prompt_ids(QUESTION)[:room]])
    prefixes = [torch.cat([first, torch.randn(VISUAL_TOKENS, llm.width) * scale, asked]) for _ in range(SAMPLES)]
    return llm, prefixes, [llm.prompt_format.target_ids(text, include_eos=False) for text in CANDIDATES]


def shared(parts: list[str]) -> Work:
    llm, prefixes, candidates = inputs(parts)

    def work() -> list[Tensor]:
        with torch.inference_mode():
            return rank_candidates(llm, prefixes, [candidates], [0] * SAMPLES)

    return work


def plain(parts: list[str], rows: int) -> Work:
    llm, prefixes, candidates = inputs(parts)

    def work() -> list[Tensor]:
        with torch.inference_mode():
            return [torch.cat(list(_segments(llm, prefix, candidates, rows))) for prefix in prefixes]

    return work


def _segments(llm: LLM, prefix: Tensor, candidates: list[list[int]], rows: int) -> Iterator[Tensor]:
    """Scores of `rows` candidates at a time, each after a prompt of its own, through transformers' own model."""
    for start in range(0, len(candidates), rows):
        segment = candidates[start : start + rows]
        embedded = [torch.cat([prefix, answer]) for answer in llm.embed(segment)]
        labels = pad_sequence(
            [torch.tensor([-100] * len(prefix) + ids) for ids in segment], batch_first=True, padding_value=-100
        )
        logits = llm.model(inputs_embeds=pad_sequence(embedded, batch_first=True)).logits
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        yield -losses.view(len(segment), -1).sum(dim=1)


if __name__ == "__main__":
    compare(
        {
            "one full forward a candidate": lambda _, parts: plain(parts, 1),
            "segments of 20": lambda _, parts: plain(parts, 20),
            "shared prompt, tree": lambda _, parts: shared(parts),
        },
        baseline="one full forward a candidate",
        unit="sample",
        per_run=SAMPLES,
        what="Ranking 100 candidates, prompts of 60 tokens, SmolLM2-135M, fp32",
        description=f"{SAMPLES} samples a run; the three give the same scores (tests/unit/test_ranking.py).",
    )
