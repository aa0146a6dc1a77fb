"""A model before and after conversion, on one fixed random input: how far apart do they compute?

Both sides compute in float32, whatever types their weights are stored in, so a difference is one of weights or arithmetic.
A transformers folder is run by transformers' own classes, this code's formats by this code.

Shape legend: B batch, P image tokens, V vision width, Q queries, D Q-Former width, L language-model width, S answer tokens
in the batch, W words of the vocabulary.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    InstructBlipForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from instructblip.files import read_json
from instructblip.model.instructblip import InstructBLIP
from instructblip.weights.convert import quiet_transformers
from instructblip.weights.huggingface import SIDECAR, read_config

INSTRUCTION = "Question: what color is the shape in the image? Short answer:"
ANSWER = "it is a blue rectangle"
_BATCH = 2
_SEED = 0


class Trace(NamedTuple):
    """What a model computed on the fixed input, float32 on the CPU.

    Attributes:
        vision: image tokens behind `ln_vision` (B, P, V).
        qformer: the queries' outputs (B, Q, D).
        projection: the soft prompt (B, Q, L).
        logits: at each position that predicts a token of the answer (S, W).
    """

    vision: Tensor
    qformer: Tensor
    projection: Tensor
    logits: Tensor


def differences(source: Trace, target: Trace) -> dict[str, float]:
    """Largest absolute difference at each stage; infinite where the shapes differ, NaN where one side has a NaN.

    Of two vocabularies only the words that both have are compared: a transformers folder may have got `<image>`.
    """
    words = min(source.logits.shape[-1], target.logits.shape[-1])
    source, target = (trace._replace(logits=trace.logits[..., :words]) for trace in (source, target))
    return {
        stage: float((ours - theirs).abs().max()) if ours.shape == theirs.shape else float("inf")
        for stage, ours, theirs in zip(Trace._fields, source, target, strict=True)
    }


@torch.inference_mode()
def trace_native(model: InstructBLIP) -> Trace:
    """Run this code's model, which is left in float32."""
    model = model.float().cpu().eval()
    images = model.vision_norm(model.image_tokens(_pixels(model.vision.image_size)[:, None]).flatten(0, 1))
    text, mask = None, None
    if model.qformer.instruction_aware:
        encoded = model.qformer_tokenizer([INSTRUCTION] * _BATCH, return_tensors="pt")
        text, mask = encoded["input_ids"], encoded["attention_mask"]
    queries = model.qformer(images, text, mask).query_BQD
    projected = model.projection(queries)
    answers = [model.llm.target_ids(ANSWER)] * _BATCH
    states = model.llm.answer_states(model.llm.prefixes(projected, [INSTRUCTION] * len(projected)), answers)
    return Trace(images, queries, projected, model.llm.logits(states.hidden_SL))


@torch.inference_mode()
def trace_huggingface(folder: Path) -> Trace:
    """Run a folder's model through transformers' own classes, from its own tokenizers and image processor.

    Raises:
        UserError: it is no InstructBLIP folder.
    """
    read_config(folder)
    with quiet_transformers():
        model = InstructBlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        pictures = AutoImageProcessor.from_pretrained(folder)
    size = model.config.vision_config.image_size
    pixels = pictures(list(_pixels(size)), do_resize=False, return_tensors="pt")["pixel_values"]
    text = AutoTokenizer.from_pretrained(folder / "qformer_tokenizer")([INSTRUCTION] * _BATCH, return_tensors="pt")
    prompt, answer = _token_ids(folder, AutoTokenizer.from_pretrained(folder))
    decoder_only = model.config.use_decoder_only_language_model
    if model.config.image_token_index is None:  # the older form: any token that the text has not can mark the places
        used = {*prompt, *answer}
        model.config.image_token_index = next(i for i in range(model.config.text_config.vocab_size) if i not in used)
    image = model.config.image_token_index
    before = [image if token is None else token for token in prompt]
    ids = torch.tensor([before + answer[:-1] if decoder_only else before] * _BATCH)
    outputs = model(
        pixel_values=pixels,
        qformer_input_ids=text["input_ids"],
        qformer_attention_mask=text["attention_mask"],
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **({} if decoder_only else {"labels": torch.tensor([answer] * _BATCH)}),
    )
    queries = outputs.qformer_outputs[0][:, : model.config.num_query_tokens]
    logits = outputs.logits[:, -len(answer) :].flatten(0, 1)
    return Trace(outputs.vision_outputs[0], queries, model.language_projection(queries), logits)


def _pixels(size: int) -> Tensor:
    """Random pictures (B, 3, size, size), uint8, the same at every call."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(0, 256, (_BATCH, 3, size, size), dtype=torch.uint8, generator=generator)


def _token_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int | None], list[int]]:
    """The prompt's ids, None in the places of the visual tokens, and the answer's, as a user of the folder writes them.

    `instructblip.json` tells what has to be written around the visual tokens and before the answer.
    """
    said = read_json(folder / SIDECAR)["llm"] if (folder / SIDECAR).is_file() else {}
    queries: list[int | None] = [None] * read_config(folder).num_query_tokens
    before = tokenizer(said.get("image_prefix", ""), add_special_tokens=False)["input_ids"]
    prompt = tokenizer(said.get("prompt_prefix", "") + INSTRUCTION + said.get("prompt_suffix", ""))["input_ids"]
    answer = tokenizer(said.get("answer_prefix", "") + ANSWER, add_special_tokens=False)["input_ids"]
    return [*before, *queries, *prompt], [*answer, tokenizer.eos_token_id]
