"""Forward and backward of a small InstructBLIP: this code against transformers' own class, same weights, same batch.

    python benchmarks/forward.py

The language model is SmolLM2-135M, the Q-Former MiniLM's with 32 queries, the ViT twelve random layers of width 384 with 257
tokens. ViT and language model are frozen in both. Answers are short and prompts ragged, as in
visual question answering.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from measure import Work, compare
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import InstructBlipForConditionalGeneration

from instructblip.build import load_llm, load_qformer
from instructblip.cli import compose_config
from instructblip.config import TrainConfig
from instructblip.model.instructblip import InstructBLIP
from instructblip.model.vision import VisionEncoder
from instructblip.weights.huggingface import load_huggingface

PROMPTS = [
    "Question: what color is the shape? Short answer:",
    "Based on the image, is this statement true or false? The cat is to the left of the laptop. Answer:",
    "A short image description:",
    "Context: The picture shows a model of a molecule of water. Question: which of these is the element whose atoms are "
    "drawn in red? Options: (a) oxygen (b) hydrogen (c) carbon. Short answer:",
    "Question: how many people are in the picture? Short answer:",
    "what is the man on the left doing",
    "Q: what is written on the sign? A:",
    "OCR tokens: open, 24, hours, coffee, tea. Question: what can one drink here? Short answer:",
]
ANSWERS = [
    "red",
    "true",
    "a man riding a wave on top of a surfboard",
    "oxygen",
    "two",
    "reading a book",
    "stop",
    "coffee",
]


def write_model(folder: Path, parts: list[str]) -> None:
    """The model as a transformers folder, from which both variants start."""
    torch.manual_seed(0)
    overrides = [*parts, "qformer.queries=32", "llm.image_prefix=''", "llm.prompt_prefix=''"]
    config = compose_config("train", TrainConfig, overrides)
    vision = VisionEncoder(
        backbone="eva_giant_patch14_clip_224",
        image_size=224,
        mean=[122.77, 116.75, 104.09],
        std=[68.50, 66.63, 70.32],
        options={"embed_dim": 384, "depth": 12, "num_heads": 6, "mlp_ratio": 4.0},
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
    """The batch's images, uint8 (B, 1, 3, 224, 224)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (len(PROMPTS), 1, 3, 224, 224), dtype=torch.uint8, generator=generator)


def this_code(folder: Path, _: list[str]) -> Work:
    model = load_huggingface(folder / "model").train()
    images = pictures()

    def work() -> float:
        model.zero_grad()
        loss = model(images, PROMPTS, ANSWERS)
        mean = loss.total / loss.tokens_per_sample.sum()
        mean.backward()
        return mean.item()

    return work


def transformers(folder: Path, _: list[str]) -> Work:
    ours = load_huggingface(folder / "model")  # for its tokenizers and pixels only
    pixels = (pictures()[:, 0] - ours.vision.mean) / ours.vision.std
    text = ours.qformer_tokenizer(
        PROMPTS, padding=True, truncation=True, max_length=ours.max_instruction_tokens, return_tensors="pt"
    )
    rows = [
        (ours.llm.prompt_ids(prompt), ours.llm.target_ids(answer))
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
    ]
    queries = ours.qformer.query_tokens.shape[1]
    model = InstructBlipForConditionalGeneration.from_pretrained(folder / "model").train()
    image = model.config.image_token_index
    ids = pad_sequence([torch.tensor([image] * queries + prompt + answer) for prompt, answer in rows], batch_first=True)
    labels = [torch.tensor([-100] * (queries + len(prompt)) + answer) for prompt, answer in rows]
    batch = {
        "pixel_values": pixels,
        "qformer_input_ids": text["input_ids"],
        "qformer_attention_mask": text["attention_mask"],
        "input_ids": ids,
        "attention_mask": pad_sequence([torch.ones_like(row) for row in labels], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }
    for part in (model.vision_model, model.language_model):
        part.requires_grad_(False).eval()
    model.vision_model.post_layernorm.requires_grad_(True)

    def work() -> float:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss.item()

    return work


if __name__ == "__main__":
    compare(
        {"transformers": transformers, "this code": this_code},
        baseline="transformers",
        unit="sample",
        per_run=len(PROMPTS),
        what="Forward and backward, SmolLM2-135M, fp32",
        description=f"Batches of {len(PROMPTS)} samples.",
        setup=write_model,
    )
