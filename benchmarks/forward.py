"""Forward and backward of a small InstructBLIP over one step: this code in its three batchings against transformers.

    python benchmarks/forward.py

The language model is SmolLM2-135M, the Q-Former MiniLM's with 32 queries, the ViT twelve random layers of width 384 with 257
tokens (two layers with `--parts`, for a quick try with smaller parts). ViT and language model are frozen in all. The samples
have the lengths of instruction tuning: prompts of 10 to 60 tokens, answers of 2 to 30, and one of LLaVA's detailed
descriptions. Every variant makes passes of at most eight samples and adds up their gradients; all give one loss a token.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from measure import Prepare, Work, compare
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import InstructBlipForConditionalGeneration

from instructblip.build import load_llm, load_qformer
from instructblip.cli import compose_config
from instructblip.config import TrainConfig
from instructblip.data.batching import BATCHINGS, Batch, Batching
from instructblip.data.sample import Record, Sample
from instructblip.model.instructblip import InstructBLIP
from instructblip.model.vision import VisionEncoder
from instructblip.weights.huggingface import load_huggingface

SAMPLES = [
    ("Question: what color is the shape? Short answer:", "red"),
    (
        "Based on the image, is this statement true or false? The cat is to the left of the laptop. Answer:",
        "true",
    ),
    ("A short image description:", "a man riding a wave on top of a surfboard"),
    (
        "Context: The picture shows a model of a molecule of water. Question: which of these is the element whose atoms are "
        "drawn in red? Options: (a) oxygen (b) hydrogen (c) carbon. Short answer:",
        "oxygen",
    ),
    ("Question: how many people are in the picture? Short answer:", "two"),
    ("what is the man on the left doing", "reading a book"),
    ("Q: what is written on the sign? A:", "stop"),
    ("OCR tokens: open, 24, hours, coffee, tea. Question: what can one drink here? Short answer:", "coffee"),
    (
        "Describe the scene in detail.",
        "The photograph shows a small harbor early in the morning. Five fishing boats, three of them blue and two of them "
        "white, lie side by side along a wooden pier, their nets hung over the rails to dry. On the pier a man in a yellow "
        "coat bends over a crate and sorts the night's catch, while a gray cat sits behind him and waits. To the right a "
        "woman pushes a bicycle with a basket full of bread towards a row of low houses, whose shutters are still closed. "
        "Behind the houses a hill rises, with a white chapel at its top and a narrow road that winds up to it between "
        "olive trees. The sky is pale and almost without clouds, and the sun, just above the water at the left edge, throws "
        "long shadows over the stones. Some gulls circle above the boats, and one of them stands on a post close to the "
        "camera. The water is calm enough to show the boats a second time, upside down, and the whole scene looks quiet, as "
        "if the day had not quite begun.",
    ),
    (
        "Given the image, generate a question whose answer is: umbrella. Question:",
        "what is the woman in the red dress holding over her head",
    ),
    ("Write a short description for the image.", "two dogs run along a beach with a stick between them"),
    ("What is the title of this book? The answer to the question is", "a history of bridges, second edition"),
    (
        "Question: what could have caused the tree in the garden to fall on the car? Options: (a) a strong wind (b) a fire "
        "(c) a child (d) the sun. Short answer:",
        "a strong wind",
    ),
    (
        "Dialog history: is it sunny? yes. are there people? yes, two. what do they wear? coats. Question: do they look "
        "old? Short answer:",
        "no",
    ),
    ("Use a few words to illustrate what is happening in the picture.", "children fly a kite on a hill"),
    (
        "What would be a good name for a cafe in this street, and why?",
        "The Corner Lamp, because of the old street lamp that stands in front of its door",
    ),
]
MICRO_BATCH = 8


def write_model(folder: Path, parts: list[str]) -> None:
    """The model as a transformers folder, from which both variants start."""
    torch.manual_seed(0)
    overrides = [*parts, "qformer.queries=32", "llm.image_prefix=''", "llm.prompt_prefix=''", "llm.prompt_suffix=''"]
    config = compose_config("train", TrainConfig, overrides)
    vision = VisionEncoder(
        backbone="eva_giant_patch14_clip_224",
        image_size=224,
        mean=[122.77, 116.75, 104.09],
        std=[68.50, 66.63, 70.32],
        options={"embed_dim": 384, "depth": 2 if parts else 12, "num_heads": 6, "mlp_ratio": 4.0},
        final_norm=False,
    )
    qformer, tokenizer = load_qformer(config.qformer, vision_width=vision.width)
    InstructBLIP(
        vision=vision,
        vision_norm=nn.LayerNorm(vision.width, eps=1e-6),
        qformer=qformer,
        qformer_tokenizer=tokenizer,
        llm=load_llm(config.llm),
        max_instruction_tokens=config.qformer.max_instruction_tokens,
    ).save_huggingface(folder / "model")


def pictures() -> Tensor:
    """The step's images, uint8 (B, 1, 3, 224, 224)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (len(SAMPLES), 1, 3, 224, 224), dtype=torch.uint8, generator=generator)


def step_batches(model: InstructBLIP, kind: str) -> list[Batch]:
    """The step's samples as the loader would cut them."""
    items = []
    for number, ((prompt, answer), image) in enumerate(zip(SAMPLES, pictures(), strict=True)):
        record = Record(str(number), "question", answers=(answer,))
        sample = Sample(
            id=str(number),
            dataset="benchmark",
            record=record,
            frames=(),
            image_location=(0, number),
            instruction=prompt,
            target=answer,
            template=prompt,
        )
        items.append((sample, image))
    return Batching(kind, micro_batch_size=MICRO_BATCH, length=model.sample_length()).split(items)


def this_code(kind: str) -> Prepare:
    """A variant: this code with one of its batchings."""

    def prepare(folder: Path, _: list[str]) -> Work:
        model = load_huggingface(folder / "model").train()
        batches = step_batches(model, kind)

        def work() -> float:
            model.zero_grad()
            losses = []
            for batch in batches:
                loss = model(batch.images, batch.instructions, batch.targets, packed=kind == "packed")
                loss.total.backward()
                losses.append(loss)
            waste = sum(loss.padding for loss in losses) / sum(loss.positions for loss in losses)
            print(f"{kind}: {len(batches)} passes, {100 * waste:.1f}% padding", file=sys.stderr)
            return sum(loss.total.item() for loss in losses) / sum(int(loss.tokens_per_sample.sum()) for loss in losses)

        return work

    return prepare


def transformers(folder: Path, _: list[str]) -> Work:
    """The baseline: transformers' own class, on batches padded to their longest."""
    ours = load_huggingface(folder / "model")  # for its tokenizers and pixels only
    model = InstructBlipForConditionalGeneration.from_pretrained(folder / "model").train()
    batches = [transformers_batch(ours, model, batch) for batch in step_batches(ours, "fixed")]
    tokens = [int((batch["labels"] >= 0).sum()) for batch in batches]
    for part in (model.vision_model, model.language_model):
        part.requires_grad_(False).eval()
    model.vision_model.post_layernorm.requires_grad_(True)

    def work() -> float:
        model.zero_grad()
        total = 0.0
        for batch, count in zip(batches, tokens, strict=True):
            loss = model(**batch).loss * count / sum(tokens)
            loss.backward()
            total += loss.item()
        return total

    return work


def transformers_batch(
    ours: InstructBLIP, model: InstructBlipForConditionalGeneration, batch: Batch
) -> dict[str, Tensor]:
    """The same samples as transformers' class takes them."""
    text = ours.qformer_tokenizer(
        batch.instructions, padding=True, truncation=True, max_length=ours.max_instruction_tokens, return_tensors="pt"
    )
    rows = [
        (ours.llm.prompt_ids(prompt, truncate=True), ours.llm.target_ids(answer))
        for prompt, answer in zip(batch.instructions, batch.targets, strict=True)
    ]
    queries, image = ours.qformer.query_tokens.shape[1], model.config.image_token_index
    ids = pad_sequence([torch.tensor([image] * queries + prompt + answer) for prompt, answer in rows], batch_first=True)
    labels = [torch.tensor([-100] * (queries + len(prompt)) + answer) for prompt, answer in rows]
    return {
        "pixel_values": (batch.images[:, 0] - ours.vision.mean) / ours.vision.std,
        "qformer_input_ids": text["input_ids"],
        "qformer_attention_mask": text["attention_mask"],
        "input_ids": ids,
        "attention_mask": pad_sequence([torch.ones_like(row) for row in labels], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


if __name__ == "__main__":
    compare(
        {"transformers": transformers} | {f"this code, {kind}": this_code(kind) for kind in BATCHINGS},
        baseline="transformers",
        unit="sample",
        per_run=len(SAMPLES),
        what="Forward and backward, SmolLM2-135M, fp32",
        description=f"Steps of {len(SAMPLES)} samples in passes of at most {MICRO_BATCH}.",
        setup=write_model,
    )
