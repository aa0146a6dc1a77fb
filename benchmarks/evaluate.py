"""Questions answered a second: this evaluation against one-by-one use of transformers' own InstructBLIP class.

    python benchmarks/evaluate.py --checkpoint outputs/train/demo

The questions are easy-VQA's test questions, the protocol the demo's: open generation with 5 beams, ranking its 13 answers,
and ranking 100 answers. transformers' class (`InstructBlipForConditionalGeneration`) holds the checkpoint's own Q-Former,
projection and language model; its vision model, which must be a ViT, is replaced by the checkpoint's encoder. It is used as
its users do: one question at a time, `generate` for an answer, one forward pass with labels for each candidate. Both are
asked the same prompts and must say the same. `--fast` takes few questions, for a try.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from measure import provenance
from rank import CANDIDATES
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from instructblip.config.entry import compose_config
from instructblip.config.schema import EvaluateConfig
from instructblip.data.cards import Card, load_card
from instructblip.data.prepare.command import Needed, shards_folder
from instructblip.evaluation.protocol import Task, make_task
from instructblip.evaluation.runner import read_pixels, run_task
from instructblip.models.instructblip import InstructBLIP
from instructblip.weights.load import load_model
from instructblip.weights.names import foreign_names
from instructblip.weights.transformers_write import qformer_config

# What is measured: questions asked of this code and of transformers' class; the latter takes a part of them.
QUESTIONS = {"generation, 5 beams": (128, 12), "ranking 13 answers": (128, 6), "ranking 100 answers": (64, 2)}
FAST = dict.fromkeys(QUESTIONS, (4, 1))
BATCH = EvaluateConfig.batch_size


class _Vision(nn.Module):
    """The checkpoint's encoder and norm in the place of transformers' ViT; takes uint8 pixels (B, 3, H, W)."""

    def __init__(self, model: InstructBLIP) -> None:
        super().__init__()
        self.encoder, self.norm = model.vision, model.vision_norm

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=self.norm(self.encoder(pixel_values).float()))


def transformers_model(model: InstructBLIP) -> InstructBlipForConditionalGeneration:
    """transformers' class around the parts of `model`; the last row of the token table marks the visual tokens."""
    text = model.llm.model.config
    config = InstructBlipConfig(
        vision_config={"hidden_size": model.vision.width, "num_hidden_layers": 1, "image_size": 28},
        qformer_config=qformer_config(model.qformer, model.qformer_tokenizer.pad_token_id)
        | {"encoder_hidden_size": model.vision.width},
        text_config=text.to_dict(),
        num_query_tokens=model.qformer.query_tokens.shape[1],
        image_token_index=text.vocab_size - 1,
    )
    found = InstructBlipForConditionalGeneration(config)
    found.vision_model, found.language_model = _Vision(model), model.llm.model  # type: ignore[assignment]
    own = {name: tensor for name, tensor in model.held_state().items() if not name.startswith("vision_norm.")}
    names = foreign_names(own, "huggingface")
    missing = found.load_state_dict({names[name]: tensor for name, tensor in own.items()}, strict=False)
    if missing.unexpected_keys or [
        key for key in missing.missing_keys if key.startswith(("qformer.", "query", "language_p"))
    ]:
        raise RuntimeError(f"transformers' class does not take these parts: {missing}")
    return found.eval()


class OneByOne:
    """transformers' class, asked one question at a time."""

    def __init__(self, model: InstructBLIP) -> None:
        self.own, self.model = model, transformers_model(model)

    def inputs(self, task: Task, number: int, answer: Sequence[int] = ()) -> dict[str, Tensor]:
        """What the class takes for one question: the image, the Q-Former's text, and the tokens of all."""
        sample, own = task.samples[number], self.own
        visual = [self.model.config.image_token_index] * self.model.config.num_query_tokens
        ids = [
            *own.llm.prompt_format.image_prefix_ids,
            *visual,
            *own.llm.prompt_format.prompt_ids(sample.prompt),
            *answer,
        ]
        text = own.qformer_tokenizer([sample.prompt], return_tensors="pt")
        return {
            "pixel_values": read_pixels(own.vision.image_size)(sample.shard, sample.row),
            "qformer_input_ids": text["input_ids"],
            "qformer_attention_mask": text["attention_mask"],
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        }

    @torch.inference_mode()
    def answer(self, task: Task, number: int) -> str:
        """The text it writes, or the candidate with the largest log-likelihood."""
        protocol, tokenizer = task.protocol, self.own.llm.prompt_format.tokenizer
        if protocol.mode == "generate":
            inputs = self.inputs(task, number)
            ids = self.model.generate(
                **inputs,
                num_beams=protocol.num_beams,
                max_new_tokens=protocol.max_new_tokens,
                min_new_tokens=protocol.min_new_tokens,
                length_penalty=protocol.length_penalty,
            )
            return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        return max(protocol.candidates, key=lambda text: self.log_likelihood(task, number, text))

    def log_likelihood(self, task: Task, number: int, candidate: str) -> float:
        """Of one candidate, in nats, by a forward pass of its own."""
        answer = self.own.llm.prompt_format.target_ids(candidate, task.protocol.include_eos)
        inputs = self.inputs(task, number, answer)
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[0, -len(answer) :] = torch.tensor(answer)
        return -float(self.model(**inputs, labels=labels).loss) * len(answer)


def tasks(shards: Path, questions: dict[str, tuple[int, int]]) -> dict[str, Task]:
    """What is asked, by name."""
    card = load_card("easy_vqa")
    assert card.evaluation is not None
    hundred = dataclasses.replace(card.evaluation, candidates=tuple(CANDIDATES))
    cards: list[tuple[Card, str]] = [
        (card, "generate"),
        (card, "rank"),
        (dataclasses.replace(card, evaluation=hundred), "rank"),
    ]
    return {
        name: make_task(asked, shards, samples=count, mode=mode)
        for (name, (count, _)), (asked, mode) in zip(questions.items(), cards, strict=True)
    }


def timed(work: Callable[[], list[str]]) -> tuple[float, list[str]]:
    """Seconds that `work` takes, and what it gives."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def measure(model: InstructBLIP, task: Task, few: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds a question, round by round, of transformers' class and of this code."""
    theirs, plain = OneByOne(model), []
    ours = []

    def ask(task: Task) -> list[str]:
        with tempfile.TemporaryDirectory() as folder:
            reader = read_pixels(model.vision.image_size)
            result = run_task(model, task, reader, batch_size=BATCH, folder=Path(folder), show_progress=False)
        return [item.prediction for item in result.predictions]

    ask(dataclasses.replace(task, samples=task.samples[:2]))  # not timed: first use
    theirs.answer(task, 0)
    for _ in range(rounds):
        seconds, found = timed(lambda: ask(task))
        ours.append(seconds / len(task.samples))
        seconds, expected = timed(lambda: [theirs.answer(task, number) for number in range(few)])
        plain.append(seconds / few)
        if found[:few] != expected:
            raise RuntimeError(f"the two disagree: {found[:few]} and {expected}")
    return plain, ours


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--checkpoint", default="outputs/train/demo", help="a run, as of evaluate.py")
    parser.add_argument("--shards", type=Path, default=Path("data/shards"), help="folder of prepared datasets")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    parser.add_argument("--fast", action="store_true", help="few questions, for a try")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=120)
    config = compose_config("evaluate", EvaluateConfig, [f"checkpoint={arguments.checkpoint}"])
    config.data.shards = str(arguments.shards)
    shards_folder([Needed(load_card("easy_vqa"), frozenset({"test"}))], config.data, console)
    model = load_model(arguments.checkpoint, device="cpu").model.eval()
    questions = FAST if arguments.fast else QUESTIONS
    table = Table(title="Questions answered a second, one process", title_justify="left")
    for heading in ("what", "one by one, transformers", "this evaluation", "times faster", "min-max"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for name, task in tasks(arguments.shards, questions).items():
        plain, ours = measure(model, task, questions[name][1], arguments.rounds)
        ratios = [before / after for before, after in zip(plain, ours, strict=True)]
        rates = [f"{1 / statistics.median(seconds):.2f}" for seconds in (plain, ours)]
        table.add_row(name, *rates, f"{statistics.median(ratios):.1f}", f"{min(ratios):.1f}-{max(ratios):.1f}")
    console.print(table)
    asked = ", ".join(f"{few} of {many}" for many, few in questions.values())
    console.print(
        f"Batches of {BATCH}; both give the same answers where both were asked ({asked} questions).", highlight=False
    )
    console.print(provenance(f"{arguments.threads} threads"), highlight=False)


if __name__ == "__main__":
    main()
