"""Tiny stand-ins for real parts and data, with random weights: whole models in milliseconds, nothing fetched.

`tiny_model` gives an assembled model; `tiny_parts` and `write_easy_vqa` write what the entry points read, and return the
overrides that point them there:

    parts = tiny_parts(tmp_path / "parts")
    write_easy_vqa(tmp_path / "raw", images=24)
    overrides = [*(f"{key}={value}" for key, value in parts.items()), f"data.sources.easy_vqa.path={tmp_path / 'raw'}"]
"""

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BlipImageProcessor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from instructblip.models.instructblip import InstructBLIP
from instructblip.models.llm import LLM, DecoderLLM, EncoderDecoderLLM
from instructblip.models.qformer import QFormer
from instructblip.models.vision import ChannelNorm, VisionEncoder

EOS = "<|im_end|>"  # SmolLM2's, so that its config serves the tiny model too
BOS = "<|im_start|>"
BACKBONE = "test_efficientnet"
LAYERS = ("bn1", "blocks.0", "blocks.2")
IMAGE_SIZE = 32
GRID = 4
WIDTH = 32

COLORS = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (139, 69, 19),
    "gray": (128, 128, 128),
    "green": (0, 128, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}
SHAPES = ("circle", "rectangle", "triangle")

_CORPUS = [
    "Question: what color is the shape? Short answer: red",
    "is there a circle in the image? yes no rectangle triangle",
    "does the image contain a blue shape? black brown gray green teal yellow",
    "Based on the image, is this statement true or false?",
]


def tiny_llm_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE as SmolLM2's: any text, a few merges, words inside a text begin with a space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS)


def tiny_bert_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-case WordPiece over single characters and a few words, [CLS] ... [SEP] around a text, cut on the left."""
    characters = "abcdefghijklmnopqrstuvwxyz0123456789?!.,:;'\"()-"
    words = ["the", "is", "color", "shape", "image", "what", "answer", "question", "there"]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *characters, *(f"##{character}" for character in characters), *words]
    tokenizer = Tokenizer(models.WordPiece({token: row for row, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", tokens.index("[CLS]")), ("[SEP]", tokens.index("[SEP]"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        truncation_side="left",
    )


def tiny_llama(vocab_size: int, eos_id: int, *, width: int = WIDTH) -> LlamaForCausalLM:
    """Two layers with grouped keys; weights ten times the usual deviation, so that inputs matter."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=eos_id,
        pad_token_id=eos_id,
    )
    return LlamaForCausalLM(config).eval()


def tiny_llm(
    *,
    answer_prefix: str = " ",
    bos_token: str | None = None,
    image_prefix: str = "",
    prompt_prefix: str = "",
    prompt_suffix: str = "",
    image_in_text: bool = False,
    supervise_bos: bool = False,
    max_prompt_tokens: int = 128,
    max_target_tokens: int = 256,
) -> DecoderLLM:
    """A frozen tiny language model; its weights come from torch's global random stream."""
    tokenizer = tiny_llm_tokenizer()
    return DecoderLLM(
        tiny_llama(len(tokenizer), tokenizer.eos_token_id),
        tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        bos_token=bos_token,
        image_prefix=image_prefix,
        prompt_prefix=prompt_prefix,
        prompt_suffix=prompt_suffix,
        image_in_text=image_in_text,
        supervise_bos=supervise_bos,
        answer_prefix=answer_prefix,
        max_prompt_tokens=max_prompt_tokens,
        max_target_tokens=max_target_tokens,
    )


def tiny_t5(vocab_size: int, eos_id: int) -> T5ForConditionalGeneration:
    """FlanT5's shape in small: gated feed-forward, output head of its own; few buckets, so that far ones are shared."""
    config = T5Config(
        vocab_size=vocab_size,
        d_model=WIDTH,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        feed_forward_proj="gated-gelu",
        dense_act_fn="gelu",
        tie_word_embeddings=False,
        initializer_factor=1.0,
        eos_token_id=eos_id,
        pad_token_id=eos_id,
        decoder_start_token_id=eos_id,
    )
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight = nn.Parameter(
        model.lm_head.weight.flip(0)
    )  # transformers ties it whatever the configuration says
    for module in model.modules():  # transformers starts them all small, and positions would hardly matter
        if getattr(module, "has_relative_attention_bias", False):
            nn.init.normal_(module.relative_attention_bias.weight, std=2.0)
    nn.init.normal_(model.lm_head.weight, std=0.3)  # its own start would give likelihoods of e^-100
    return model.eval()


def tiny_encoder_decoder_llm(
    *,
    answer_prefix: str = " ",
    supervise_bos: bool = False,
    max_prompt_tokens: int = 128,
    max_target_tokens: int = 256,
) -> EncoderDecoderLLM:
    """A frozen tiny T5; its weights come from torch's global random stream."""
    tokenizer = tiny_llm_tokenizer()
    return EncoderDecoderLLM(
        tiny_t5(len(tokenizer), tokenizer.eos_token_id),
        tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        answer_prefix=answer_prefix,
        supervise_bos=supervise_bos,
        max_prompt_tokens=max_prompt_tokens,
        max_target_tokens=max_target_tokens,
    )


def by_transformers(llm: LLM) -> LLM:
    """The same, whose texts are continued by transformers' own generation."""
    llm.abilities = dataclasses.replace(llm.abilities, tree=False)
    return llm


def tiny_vision(
    backbone: str = BACKBONE,
    *,
    layers: Sequence[str] = LAYERS,
    grid: int | None = GRID,
    image_size: int = IMAGE_SIZE,
    options: Mapping[str, Any] | None = None,
    final_norm: bool = True,
) -> VisionEncoder:
    """A frozen tiny timm backbone with random weights."""
    return VisionEncoder(
        backbone=backbone,
        image_size=image_size,
        mean=[127.0] * 3,
        std=[128.0] * 3,
        layers=layers,
        grid=grid,
        options=options,
        final_norm=final_norm,
    )


def tiny_qformer(
    *,
    vision_width: int,
    queries: int = 4,
    layers: int = 3,
    dropout: float = 0.0,
    instruction_aware: bool = True,
    text_outputs: bool = False,
    language_model_head: bool = False,
    vocab_size: int | None = None,
) -> QFormer:
    """A Q-Former over the tiny BERT tokenizer's vocabulary, width 32, cross-attention in every other layer."""
    return QFormer(
        vocab_size=vocab_size or len(tiny_bert_tokenizer()),
        width=WIDTH,
        layers=layers,
        heads=4,
        hidden_width=64,
        vision_width=vision_width,
        queries=queries,
        max_text_tokens=64,
        dropout=dropout,
        instruction_aware=instruction_aware,
        text_outputs=text_outputs,
        language_model_head=language_model_head,
    )


def tiny_model(
    seed: int = 0,
    *,
    instruction_aware: bool = True,
    queries: int = 4,
    dropout: float = 0.0,
    vision_norm: str = "layer",
    max_instruction_tokens: int = 64,
    llm: LLM | None = None,
) -> InstructBLIP:
    """A whole model in evaluation mode, drawn from `seed`.

    Args:
        seed: of every weight.
        instruction_aware, queries, dropout: of the Q-Former.
        vision_norm: `layer` (trainable) or `channel` (fixed statistics, not calibrated yet).
        max_instruction_tokens: limit of the Q-Former's text.
        llm: a language model with other text conventions than `tiny_llm()`.
    """
    torch.manual_seed(seed)
    vision = tiny_vision()
    model = InstructBLIP(
        vision=vision,
        vision_norm=nn.LayerNorm(vision.width) if vision_norm == "layer" else ChannelNorm(vision.width),
        qformer=tiny_qformer(
            vision_width=vision.width, queries=queries, dropout=dropout, instruction_aware=instruction_aware
        ),
        qformer_tokenizer=tiny_bert_tokenizer(),
        llm=llm or tiny_llm(),
        max_instruction_tokens=max_instruction_tokens,
    )
    return model.eval()


def tiny_released_model(seed: int = 0, *, llm: LLM | None = None, norm_eps: float = 1e-5) -> InstructBLIP:
    """A model of the released parts' kinds, with random weights that all matter: EVA-CLIP, LayerNorm, both text branches.

    Args:
        seed: of every weight but the language model's.
        llm: in place of `tiny_llm()`.
        norm_eps: of `ln_vision`.
    """
    torch.manual_seed(seed)
    options = {"embed_dim": WIDTH, "depth": 2, "num_heads": 4, "mlp_ratio": 1.5}
    vision = VisionEncoder(
        backbone="eva_giant_patch14_clip_224",
        image_size=28,
        mean=[120.0, 125.0, 130.0],
        std=[60.0, 61.0, 62.0],
        options=options,
        final_norm=False,
    )
    model = InstructBLIP(
        vision=vision,
        vision_norm=nn.LayerNorm(vision.width, eps=norm_eps),
        qformer=tiny_qformer(vision_width=vision.width),
        qformer_tokenizer=tiny_bert_tokenizer(),
        llm=llm or tiny_llm(),
        max_instruction_tokens=32,
    )
    for part in (model.vision, model.vision_norm, model.qformer, model.projection):
        redraw(part)
    return model.eval()


def tiny_images(count: int, *, frames: int = 1, seed: int = 0) -> torch.Tensor:
    """Random uint8 pictures (B, F, 3, H, W) of the tiny encoder's size."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, frames, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8, generator=generator)


def noise_pictures(count: int, *, side: int = 28, seed: int = 0) -> list[Image.Image]:
    """Pictures of noise."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator)
    return [Image.fromarray(picture.numpy()) for picture in pixels]


def tiny_parts(folder: Path, seed: int = 0) -> dict[str, str]:
    """Write the three parts' files below `folder`; return the overrides that make train.py's demo configuration use them.

    The demo's LLM text conventions (tokens, answer prefix) hold for the tiny LLM as they are.
    """
    torch.manual_seed(seed)
    llm, vision, qformer = folder / "llm", folder / "vision", folder / "qformer"
    tokenizer = tiny_llm_tokenizer()
    tiny_llama(len(tokenizer), tokenizer.eos_token_id).save_pretrained(llm)
    tokenizer.save_pretrained(llm)
    vision.mkdir(parents=True)
    save_file(timm.create_model(BACKBONE, pretrained=False).state_dict(), vision / "model.safetensors")
    bert_tokenizer = tiny_bert_tokenizer()
    bert = BertConfig(
        vocab_size=len(bert_tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(bert).save_pretrained(qformer)
    bert_tokenizer.save_pretrained(qformer)
    return {
        "llm.sources.path": str(llm),
        "vision.sources.path": str(vision),
        "vision.backbone": BACKBONE,
        "vision.layers": f"[{','.join(LAYERS)}]",
        "vision.image_size": str(IMAGE_SIZE),
        "vision.grid": str(GRID),
        "qformer.sources.path": str(qformer),
        "qformer.queries": "4",
        "qformer.max_instruction_tokens": "64",
    }


HUGGINGFACE_LLMS = ("llama", "opt", "t5")
Written = TypeVar("Written", bound=PreTrainedModel)
PAD = "[PAD]"


def tiny_huggingface(
    folder: Path, llm: str = "llama", *, image_token: bool = True, seed: int = 0, positions: int | None = None
) -> InstructBlipForConditionalGeneration:
    """Write an InstructBLIP folder of transformers with random weights that all matter; return the model.

    Args:
        folder: to write.
        llm: one of `HUGGINGFACE_LLMS`; the decoder-only ones begin each text with the token that ends it, as Vicuna's.
        image_token: the newer form, whose tokenizer and token table have `<image>`; the older one has a
            preprocessor_config.json and no word of it.
        seed: of every weight.
        positions: of the language model and of the Q-Former's text, in place of a few.
    """
    tokenizer, bert_tokenizer = huggingface_tokenizer(ends_prompts=llm == "t5"), tiny_bert_tokenizer()
    images = BlipImageProcessor(size={"height": 28, "width": 28})
    if image_token:  # which the processor adds to the tokenizer
        InstructBlipProcessor(images, tokenizer, bert_tokenizer, num_query_tokens=4).save_pretrained(folder)
    else:
        for part in (images, tokenizer):
            part.save_pretrained(folder)
        bert_tokenizer.save_pretrained(folder / "qformer_tokenizer")
    config = InstructBlipConfig(
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 28,
        },
        qformer_config={
            "vocab_size": len(bert_tokenizer),
            "hidden_size": WIDTH,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": positions or 64,
        },
        text_config=huggingface_llm_config(llm, tokenizer, tokenizer.eos_token_id),
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>") if image_token else None,
    )
    if positions is not None:
        config.text_config.max_position_embeddings = positions
    return write_redrawn(InstructBlipForConditionalGeneration, config, folder, seed=seed, untied=llm == "t5")


def write_redrawn(
    kind: type[Written], config: PretrainedConfig, folder: Path, *, seed: int = 0, untied: bool = False
) -> Written:
    """Write a model of a class of transformers with random weights that all matter."""
    torch.manual_seed(seed)
    model = kind(config).eval()
    if untied:  # transformers ties the two until weights say otherwise, as FlanT5's do
        model.language_model.lm_head.weight = nn.Parameter(model.language_model.lm_head.weight.clone())
    redraw(model)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def redraw(model: nn.Module, std: float = 0.15) -> None:
    """Draw every parameter anew, biases and norms too; key biases of a vision part stay zero, as in released files."""
    for name, parameter in model.named_parameters():
        center = 1.0 if parameter.ndim == 1 and "norm" in name.lower() and name.endswith("weight") else 0.0
        parameter.normal_(mean=center, std=std)
        if name.endswith("self_attn.qkv.bias"):
            parameter.view(3, -1)[1] = 0


def huggingface_tokenizer(*, ends_prompts: bool) -> PreTrainedTokenizerFast:
    """A language model's, that ends or begins each text with the token of the end."""
    tokenizer = tiny_llm_tokenizer()
    template = f"$A {EOS}" if ends_prompts else f"{EOS} $A"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(EOS, tokenizer.eos_token_id)]
    )
    tokenizer.add_special_tokens({"pad_token": PAD, "bos_token": EOS})
    return tokenizer


def huggingface_llm_config(llm: str, tokenizer: PreTrainedTokenizerFast, end: int) -> PretrainedConfig:
    """One of `HUGGINGFACE_LLMS`, in small; `end` ends its answers."""
    tokens = {"vocab_size": len(tokenizer), "eos_token_id": end, "pad_token_id": tokenizer.pad_token_id}
    if llm == "t5":
        small = tiny_t5(len(tokenizer), tokenizer.eos_token_id).config
        return T5Config(**(small.to_dict() | tokens | {"decoder_start_token_id": tokenizer.pad_token_id}))
    layers = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
    start = {"bos_token_id": tokenizer.eos_token_id}
    if llm == "opt":
        return OPTConfig(**tokens, **layers, **start, ffn_dim=64, word_embed_proj_dim=WIDTH)
    return LlamaConfig(**tokens, **layers, **start, intermediate_size=64)


def write_easy_vqa(raw: Path, images: int) -> None:
    """Write an easy-VQA raw folder: `images` train images (7, 11, 18, 19, 23, ... are validation) and half as many for test.

    Each image shows one coloured shape and has a question of each kind: shape, colour, yes/no (answered yes and no).

    Raises:
        ValueError: so few images that validation would be almost empty.
    """
    if images < 12:
        raise ValueError(f"{images} train images leave validation almost empty; ask for 12 or more")
    stream = random.Random(0)
    answers = []
    for split, count in (("train", images), ("test", images // 2)):
        (raw / split / "images").mkdir(parents=True)
        questions: list[tuple[str, str, int]] = []
        for number in range(count):
            color, shape = stream.choice(list(COLORS)), stream.choice(SHAPES)
            _draw(color, shape, stream).save(raw / split / "images" / f"{number}.png")
            questions += [(question, answer, number) for question, answer in _questions(color, shape, stream)]
        answers += [answer for _, answer, _ in questions]
        (raw / split / "questions.json").write_text(json.dumps(questions))
    (raw / "answers.txt").write_text("\n".join(sorted(set(answers))))


def write_coco_captions(raw: Path) -> None:
    """Write a raw folder of COCO captions, Karpathy splits: a picture of each colour and shape, 8 others to validate on."""
    stream = random.Random(0)
    shown = [(color, shape) for color in COLORS for shape in SHAPES]
    entries: list[dict[str, Any]] = []
    for split, pictures in (("train", shown), ("val", shown[::3]), ("test", shown[:1])):
        folder = "train2014" if split == "train" else "val2014"
        (raw / folder).mkdir(parents=True, exist_ok=True)
        for color, shape in pictures:
            number = len(entries) + 1
            name = f"COCO_{folder}_{number:012d}.jpg"
            _draw(color, shape, stream).save(raw / folder / name, quality=95)
            captions = [f"A {color} {shape}.", f"There is a {shape}, and the color is {color}!"]
            entries.append(
                {
                    "filepath": folder,
                    "filename": name,
                    "split": split,
                    "cocoid": number,
                    "imgid": number,
                    "sentences": [{"raw": text, "sentid": 2 * number + place} for place, text in enumerate(captions)],
                }
            )
    (raw / "dataset_coco.json").write_text(json.dumps({"dataset": "coco", "images": entries}))


def _questions(color: str, shape: str, stream: random.Random) -> list[tuple[str, str]]:
    other_color = stream.choice([name for name in COLORS if name != color])
    other_shape = stream.choice([name for name in SHAPES if name != shape])
    return [
        ("what shape is in the image?", shape),
        ("what color is the shape?", color),
        (f"is there a {shape}?", "yes"),
        (f"is there a {other_color} shape in the image?", "no"),
        (f"is there not a {other_shape} in the image?", "yes"),
        (f"is no {color} shape present?", "no"),
    ]


def _draw(color: str, shape: str, stream: random.Random) -> Image.Image:
    image = Image.new("RGB", (64, 64), tuple(stream.randint(230, 255) for _ in range(3)))
    pen, side = ImageDraw.Draw(image), stream.randint(16, 32)
    left, top = stream.randint(4, 60 - side), stream.randint(4, 60 - side)
    right, bottom = left + side, top + side
    if shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=COLORS[color])
    elif shape == "rectangle":
        pen.rectangle((left, top, right, bottom), fill=COLORS[color])
    else:
        pen.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=COLORS[color])
    return image
