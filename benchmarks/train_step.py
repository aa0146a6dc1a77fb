"""The training step, forward to AdamW: this code in its batchings against transformers' own InstructBLIP class.

    python benchmarks/train_step.py                                        a small model, three minutes on a CPU
    python benchmarks/train_step.py --llm vicuna_7b --device cuda          the published one, on an H200 or H100
    python benchmarks/train_step.py --tiny                                 a few seconds, for a try

Models are full-size, with random weights that are drawn on the device: nothing is downloaded. On a GPU the ViT and the
Q-Former are the released ones, in bfloat16 where they are frozen, under bfloat16 autocast where they are trained; on a CPU a
ViT of 12 layers of width 384 and MiniLM's Q-Former, in float32. Samples have the lengths of instruction tuning: 32 visual
tokens, prompts of 10 to 60 and answers of 2 to 30, the same for all, cut into passes of at most `--micro-batch`. With
`--long 16` one answer in 16 has 100 to 250 tokens, as LLaVA's descriptions and reasoning have in the held-in mixture. With
`--questions 5` five samples in a row have one image, as `mixture.per=image` draws them.

transformers' class is used as one would train it: ViT and language model frozen, batches padded to their longest, its own
loss over all logits, the same AdamW and clipping, the same weights. All must begin at one loss. Dropout is off, so that they
do. MFU is the work of the model without padding (instructblip/training/plan/flops.py) over the largest rate at which this
device multiplies matrices of the type, measured here.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from measure import in_turns, provenance
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from instructblip.config.entry import compose_config
from instructblip.config.schema import LLMConfig, TrainConfig
from instructblip.data.batching import Batch, Batching
from instructblip.data.records import Record, Sample
from instructblip.distributed import Ranks
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.llm import LLM_KINDS
from instructblip.models.quantized import quantize_linears
from instructblip.objectives import make_objectives
from instructblip.training.loop import train_step
from instructblip.training.optim import make_adamw
from instructblip.training.parallel import StepContext, parallelize
from instructblip.training.plan.flops import StepWorkload, measured_peak, model_shape
from instructblip.training.timer import peak_memory
from instructblip.weights.modules import (
    language_model_of_sizes,
    parts_without_weights,
    qformer_of_sizes,
    vision_encoder,
)
from instructblip.weights.transformers_write import huggingface_model

PROMPT_WORDS, ANSWER_WORDS, LONG_WORDS = (10, 60), (2, 30), (100, 250)
WORDS = 200  # of the made-up language, one token each
BASELINE = "transformers"
RATE, CLIP = 1e-5, 1.0
Step = Callable[[], float]  # one optimiser step; returns the loss before it, nats a token

_SMALL_VISION = ("++vision.options.embed_dim=384", "vision.options.depth=12", "++vision.options.num_heads=6")
_SMALL = ("vision=eva_vit_g", *_SMALL_VISION, "++vision.options.mlp_ratio=4.0", "qformer=minilm", "qformer.layers=null")
_TINY = (
    "vision.options.depth=2",
    "++vision.options.embed_dim=96",
    "vision.image_size=56",
    "qformer.sizes.num_hidden_layers=2",
    "llm.sizes.vocab_size=400",
    "llm.added_tokens=[]",
)
_TINY_LLM = {
    "decoder": ("hidden_size=96", "intermediate_size=256", "num_hidden_layers=2", "num_attention_heads=3"),
    "encoder_decoder": ("d_model=96", "d_ff=256", "num_layers=2", "num_heads=3"),
}
_DEPTH = {"decoder": "num_hidden_layers", "encoder_decoder": "num_layers"}


# --- model and samples -----------------------------------------------------------------------------------------------


def configuration(arguments: argparse.Namespace, layers: int | None = None) -> TrainConfig:
    """The parts: the published ones on a GPU, small ones beside the language model on a CPU.

    Args:
        layers: of the language model, where not all.
    """
    dtype = "bfloat16" if arguments.device == "cuda" else "float32"
    parts = ("vision=eva_vit_g", "qformer=bert_base") if arguments.device == "cuda" and not arguments.tiny else _SMALL
    common = (f"vision.dtype={dtype}", f"llm.dtype={dtype}", "qformer.queries=32", "qformer.dropout=0")
    overrides = [
        *parts,
        f"llm={arguments.llm}",
        *common,
        "qformer.cross_attention_every=2",
        "qformer.query_init=normal",
    ]
    kind = compose_config("train", TrainConfig, overrides).llm.kind
    if arguments.tiny:
        overrides += [*_TINY, *(f"++llm.sizes.{size}" for size in _TINY_LLM[kind])]
    elif layers:
        overrides.append(f"++llm.sizes.{_DEPTH[kind]}={layers}")
    return compose_config("train", TrainConfig, overrides)


def build(config: TrainConfig, device: str) -> InstructBLIP:
    """The model with random weights, always the same ones."""
    torch.manual_seed(0)
    with torch.device(device):
        vision = vision_encoder(config.vision)
        qformer = qformer_of_sizes(config.qformer, vision_width=vision.width)
        language = language_model_of_sizes(config.llm)
        model = InstructBLIP(
            vision=vision,
            vision_norm=nn.LayerNorm(vision.width, eps=1e-6),  # transformers' only one
            qformer=qformer,
            qformer_tokenizer=qformer_tokenizer(),
            llm=LLM_KINDS[config.llm.kind](language, **conventions(config.llm)),
        )
    return model.train()


def conventions(llm: LLMConfig) -> dict[str, Any]:
    """A tokenizer of the made-up language with the model's special tokens; no text around prompts."""
    names = {"eos_token": llm.eos_token, "pad_token": llm.pad_token, "bos_token": llm.bos_token}
    return {"tokenizer": made_up_tokenizer([name for name in names.values() if name]), **names}


def qformer_tokenizer() -> PreTrainedTokenizerFast:
    """The same language for the Q-Former, in BERT's manner."""
    return made_up_tokenizer(["[PAD]", "[CLS]", "[SEP]"], around="[CLS] $A [SEP]")


def made_up_tokenizer(special: Sequence[str], around: str | None = None) -> PreTrainedTokenizerFast:
    """`w0 w1 ...`: a token a word."""
    tokens = list(dict.fromkeys([*special, *(f"w{number}" for number in range(WORDS))]))
    tokenizer = Tokenizer(models.WordLevel({token: row for row, token in enumerate(tokens)}, unk_token=tokens[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if around is not None:
        marks = [(token, row) for row, token in enumerate(tokens) if token in around]
        tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=marks)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=special[0], truncation_side="left")


def samples(count: int, long: int, image_size: int, questions: int = 1) -> list[tuple[Sample, Tensor]]:
    """Drawn samples as the loader gives them, always the same texts; every `long`-th has a long answer, if that is not 0.

    So many `questions` in a row are about one image.
    """
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        prompt, answer = (
            " ".join(f"w{draw.randrange(WORDS)}" for _ in range(draw.randint(*limits)))
            for limits in (PROMPT_WORDS, LONG_WORDS if long and number % long == long - 1 else ANSWER_WORDS)
        )
        sample = Sample(
            id=str(number),
            dataset="benchmark",
            record=Record(str(number), "question", answers=(answer,)),
            frames=(),
            image_location=(0, number // questions),
            image_id=str(number // questions),
            position=number,
            instruction=prompt,
            target=answer,
            template=prompt,
        )
        shape = (1, 3, image_size, image_size)
        if number % questions == 0:
            image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        found.append((sample, image))
    return found


def batches_of(model: InstructBLIP, arguments: argparse.Namespace, kind: str) -> list[Batch]:
    """The step's samples as the loader would cut them."""
    batching = Batching(kind, micro_batch_size=arguments.micro_batch, length=model.sample_length())
    return batching.split(samples(arguments.batch, arguments.long, model.vision.image_size, arguments.questions))


def work_of(config: TrainConfig, count: int, long: int, questions: int = 1) -> StepWorkload:
    """What a step asks for, however it is computed."""
    texts = LLM_KINDS[config.llm.kind].prompt_format_kind(**conventions(config.llm))
    pairs = [(sample.instruction, sample.target or "") for sample, _ in samples(count, long, image_size=1)]
    return StepWorkload(
        samples=count,
        frames=count,
        encoded=-(-count // questions),
        text=sum(len(qformer_tokenizer()(prompt)["input_ids"]) for prompt, _ in pairs),
        positions=sum(texts.length(prompt, answer, 1, queries=config.qformer.queries) for prompt, answer in pairs),
        answers=sum(len(texts.target_ids(answer)) for _, answer in pairs),
    )


# --- variants --------------------------------------------------------------------------------------------------------


def this_code(
    kind: str, *, by_length: bool = False, compiled: bool = False, fp8: bool = False
) -> Callable[[InstructBLIP, Any], Step]:
    """A variant: `training/loop.py`'s step with one of the batchings; `best` is packed by length where the model packs."""

    def prepare(model: InstructBLIP, arguments: argparse.Namespace) -> Step:
        packs = model.llm.kind == "decoder"
        cut = kind if kind != "best" else "packed" if packs else "bucketed"
        optimizer = make_adamw(model.named_parameters(), weight_decay=0.05, betas=(0.9, 0.999))
        batches = batches_of(model, arguments, cut)
        if by_length or (kind == "best" and packs):
            model.attend_by_length()
        if fp8:
            quantize_linears(model.llm.model, "fp8", keep=model.llm.model.get_output_embeddings())
        parallelize(model, Ranks(), kind="single", compile_blocks=compiled)
        context = StepContext(autocast=torch.bfloat16 if arguments.device == "cuda" else None)

        def step() -> float:
            result = train_step(
                model,
                optimizer,
                batches,
                objectives=make_objectives({"language_modeling": 1.0}),
                packed=cut == "packed",
                rate=RATE,
                clip_norm=CLIP,
                context=context,
            )
            return result.loss

        return step

    return prepare


def transformers(model: InstructBLIP, arguments: argparse.Namespace) -> Step:
    """The baseline: transformers' class around the same weights; the token table's last row marks the visual tokens."""
    rows, device = len(model.llm.embeddings.weight), torch.device(arguments.device)
    theirs = around_same_weights(model).train()
    for part in (theirs.vision_model, theirs.language_model):
        part.requires_grad_(False).eval()
    theirs.vision_model.post_layernorm.requires_grad_(True)
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.05, fused=True)
    inputs = [transformers_batch(model, rows - 1, batch) for batch in batches_of(model, arguments, "fixed")]
    tokens = [int((batch["labels"] >= 0).sum()) for batch in inputs]
    autocast = torch.autocast("cuda", torch.bfloat16) if arguments.device == "cuda" else contextlib.nullcontext()

    def step() -> float:
        optimizer.zero_grad()
        losses = []
        for batch, count in zip(inputs, tokens, strict=True):
            with autocast:
                loss = theirs(**{name: value.to(device) for name, value in batch.items()}).loss * count / sum(tokens)
            loss.backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        return float(sum(losses))

    return step


def around_same_weights(model: InstructBLIP) -> nn.Module:
    """transformers' class around a model's weights."""
    rows = len(model.llm.embeddings.weight)
    theirs = huggingface_model(model, rows, rows - 1)
    theirs.language_model = model.llm.model
    for module in theirs.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta and name == "position_ids":
                module._buffers[name] = torch.arange(buffer.shape[-1], device=model.device)[
                    None
                ]  # computed, not loaded
    return theirs


def transformers_batch(model: InstructBLIP, image_token: int, batch: Batch) -> dict[str, Tensor]:
    """The same samples as transformers' class takes them, prepared beforehand."""
    text = model.qformer_tokenizer(batch.instructions, padding=True, return_tensors="pt")
    visual = [image_token] * model.qformer.query_tokens.shape[1]
    rows = [
        (visual + model.llm.prompt_format.prompt_ids(prompt, training=True), model.llm.prompt_format.target_ids(answer))
        for prompt, answer in zip(batch.instructions, batch.targets, strict=True)
    ]
    together = not model.llm.model.config.is_encoder_decoder
    ids = [torch.tensor(prompt + answer * together) for prompt, answer in rows]
    labels = [torch.tensor([-100] * (len(prompt) * together) + answer) for prompt, answer in rows]
    pixels = (batch.images[:, 0] - model.vision.mean.cpu()) / model.vision.std.cpu()
    return {
        "pixel_values": pixels,
        "qformer_input_ids": text["input_ids"],
        "qformer_attention_mask": text["attention_mask"],
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


def variants(arguments: argparse.Namespace) -> tuple[dict[str, Callable[[InstructBLIP, Any], Step]], list[str]]:
    """The rows by name, and a line for each that is left out."""
    rows = {BASELINE: transformers, "fixed": this_code("fixed"), "bucketed": this_code("bucketed")}
    best, left_out = "bucketed", []
    if configuration(arguments).llm.kind == "decoder":
        rows["packed"] = this_code("packed")
        best, rows["packed, by length"] = "packed, by length", this_code("packed", by_length=True)
    else:
        left_out.append("packed: rows of an encoder-decoder hold one sample each.")
    if arguments.compile:
        rows[f"{best}, compiled"] = this_code("best", compiled=True)
    else:
        left_out.append("compiled: minutes of compiling on a CPU; --compile adds it.")
    if arguments.device == "cuda":
        rows[f"{best}, compiled, FP8"] = this_code("best", compiled=True, fp8=True)
    else:
        left_out.append("FP8 frozen linears: need an NVIDIA GPU.")
    return rows, left_out


# --- measurement -----------------------------------------------------------------------------------------------------


def measure(prepare: Callable[[InstructBLIP, Any], Step], arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step (the median of `--runs`), peak memory and the first step's loss."""
    device = torch.device(arguments.device)
    step = prepare(build(configuration(arguments), arguments.device), arguments)
    loss = step()
    for _ in range(arguments.warm - 1):
        step()
    seconds = []
    for _ in range(arguments.runs):
        _finish(device)
        start = time.perf_counter()
        step()
        _finish(device)
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "peak": peak_memory(device), "loss": loss}


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_figures(arguments: argparse.Namespace) -> dict[str, float]:
    """What a step asks for, and what the device can do: FLOPs, LLM tokens, the largest FLOP/s of a matrix product."""
    config = configuration(arguments)
    parts, work = parts_without_weights(config), work_of(config, arguments.batch, arguments.long, arguments.questions)
    flops = model_shape(parts.vision, parts.qformer, parts.heads, parts.llm).total(work, {"answer_logits"})
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    peak = measured_peak(torch.device(arguments.device), dtype)
    return {"flops": flops, "positions": work.positions, "peak": peak}


def show(figures: dict[str, list[dict[str, float]]], left_out: Sequence[str], arguments: argparse.Namespace) -> None:
    """Print the table."""
    counts = figures.pop("device")[0]
    middle = {
        name: {key: statistics.median(value[key] for value in values) for key in values[0]}
        for name, values in figures.items()
    }
    table = Table(title=f"Training step, {arguments.llm}, {arguments.batch} samples", title_justify="left")
    table.add_column("variant")
    for heading in (
        "samples/s",
        "min-max",
        "LLM tokens/s",
        "MFU %",
        "peak memory, GB",
        "of baseline",
        "times faster",
        "loss",
    ):
        table.add_column(heading, justify="right")
    for name, found in middle.items():
        rates = sorted(arguments.batch / value["seconds"] for value in figures[name])
        table.add_row(
            name if name == BASELINE else f"this code, {name}",
            f"{arguments.batch / found['seconds']:.2f}",
            f"{rates[0]:.2f}-{rates[-1]:.2f}",
            f"{counts['positions'] / found['seconds']:,.0f}",
            f"{100 * counts['flops'] / found['seconds'] / counts['peak']:.1f}",
            f"{found['peak'] / 1e9:.2f}",
            f"{found['peak'] / middle[BASELINE]['peak']:.2f}",
            f"{middle[BASELINE]['seconds'] / found['seconds']:.2f}",
            f"{found['loss']:.4f}",
        )
    console = Console(width=140)
    console.print(table)
    place = torch.cuda.get_device_name() if arguments.device == "cuda" else None
    lines = [
        f"Ratios are to: {BASELINE}. {counts['flops'] / arguments.batch / 1e9:,.1f} GFLOP and "
        f"{counts['positions'] / arguments.batch:.1f} LLM tokens a sample without padding; passes of at most "
        f"{arguments.micro_batch}; MFU of a measured {counts['peak'] / 1e12:,.2f} TFLOP/s.",
        *(f"Left out: {line}" for line in left_out),
        provenance(f"{arguments.threads} threads", place=place),
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False)


def parse() -> argparse.Namespace:
    """The command line, with the defaults of the device."""
    parser = argparse.ArgumentParser(description="Training step")
    parser.add_argument("--llm", default="smollm2_135m", help="of configs/llm")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, help="samples a step (128 on a GPU, 32 on a CPU)")
    parser.add_argument("--micro-batch", type=int, help="samples a pass, at most (32)")
    parser.add_argument("--long", type=int, default=0, help="one answer in this many is long; 0: none")
    parser.add_argument("--questions", type=int, default=1, help="samples in a row with one image")
    parser.add_argument("--tiny", action="store_true", help="parts of two small layers, for a try")
    parser.add_argument("--compile", action="store_true", help="the compiled row on a CPU too")
    parser.add_argument("--rounds", type=int, default=1, help="processes for each variant")
    parser.add_argument("--runs", type=int, help="timed steps in a process (10 on a GPU, 1 on a CPU)")
    parser.add_argument("--warm", type=int, help="steps before them, 1 or more (3 on a GPU, 1 on a CPU)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    parser.add_argument("--variant", help="run one variant and print its figures as JSON")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    for name, (gpu, cpu) in {"batch": (128, 32), "micro_batch": (32, 32), "runs": (10, 1), "warm": (3, 1)}.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, gpu if on_gpu else cpu)
    arguments.compile = arguments.compile or on_gpu
    torch.set_num_threads(arguments.threads)
    return arguments


def main() -> None:
    """Every variant in a process of its own, in turns; or one of them. Tiny ones all in this process."""
    arguments = parse()
    rows, left_out = variants(arguments)
    if arguments.variant == "device":
        print(json.dumps(step_figures(arguments)))
    elif arguments.variant is not None:
        print(json.dumps(measure(rows[arguments.variant], arguments)))
    elif arguments.tiny:
        show(
            {"device": [step_figures(arguments)]} | {name: [measure(rows[name], arguments)] for name in rows},
            left_out,
            arguments,
        )
    else:
        figures = in_turns(["device"], 1) | in_turns(list(rows), arguments.rounds)
        show(figures, left_out, arguments)


if __name__ == "__main__":
    main()
