"""A model before and after conversion, on one fixed random input: how far apart do they compute?

Each side computes in the types that it is loaded in, as it will for its user; what is held in half precision is compared
once more in float32, where a difference is one of weights or arithmetic and not of rounding. A transformers folder is run by
transformers' own classes, this code's formats by this code.

Shape legend: B batch, P image tokens, V vision width, Q queries, D Q-Former width, L language-model width, S answer tokens
in the batch, W words of the vocabulary.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    PreTrainedTokenizerBase,
)

from instructblip._transformers import quiet_transformers
from instructblip.files import read_json
from instructblip.models.instructblip import InstructBLIP
from instructblip.weights.names import SIDECAR
from instructblip.weights.transformers_read import read_transformers_config

INSTRUCTION = "Question: what color is the shape in the image? Short answer:"
SHORT_INSTRUCTION = "what is it?"  # beside the other it has to be padded
ANSWER = "it is a blue rectangle"
_BATCH = 2
_SEED = 0
_ROUNDINGS = 8
_UNEQUAL = (SHORT_INSTRUCTION, INSTRUCTION)


class Trace(NamedTuple):
    """What a model computed on the fixed input, on the CPU, given as float32.

    Attributes:
        vision: image tokens behind `ln_vision` (B, P, V).
        qformer: the queries' outputs (B, Q, D).
        projection: the soft prompt (B, Q, L).
        logits: at each position that predicts a token of the answer (S, W).
        padded: at the first position of the answers to two instructions of unequal length, run together (B, W).
    """

    vision: Tensor
    qformer: Tensor
    projection: Tensor
    logits: Tensor
    padded: Tensor


class Traces(NamedTuple):
    """What a model computed in the types it was loaded in, and what it computed in float32: one trace where they agree."""

    loaded: Trace
    float32: Trace


def stage_differences(source: Trace, target: Trace) -> dict[str, float]:
    """Largest absolute difference at each stage; infinite where the shapes differ, NaN where one side has a NaN.

    Of two vocabularies only the words that both have are compared: a transformers folder may have got `<image>`.
    """
    words = min(source.logits.shape[-1], target.logits.shape[-1])
    source, target = (
        trace._replace(logits=trace.logits[..., :words], padded=trace.padded[..., :words]) for trace in (source, target)
    )
    return {
        stage: float((ours - theirs).abs().max()) if ours.shape == theirs.shape else float("inf")
        for stage, ours, theirs in zip(Trace._fields, source, target, strict=True)
    }


def rounding_bounds(source: Trace, dtype: torch.dtype) -> dict[str, float]:
    """How far apart two correct programs may be at each stage in half precision.

    Each rounds in places of its own. A few roundings are allowed, measured by the stage's largest value.
    """
    unit = _ROUNDINGS * torch.finfo(dtype).eps
    return {stage: unit * float(values.abs().max()) for stage, values in zip(Trace._fields, source, strict=True)}


def model_dtype(model: InstructBLIP) -> torch.dtype:
    """The coarsest type that a part of the model is held in."""
    return max((model.vision.dtype, model.llm.model.dtype), key=lambda dtype: torch.finfo(dtype).eps)


def traces_native(model: InstructBLIP) -> Traces:
    """Run this code's model twice; it is left in float32."""
    loaded = trace_native(model)
    return Traces(loaded, loaded if model_dtype(model) == torch.float32 else trace_native(model.float()))


@torch.inference_mode()
def trace_native(model: InstructBLIP) -> Trace:
    """Run this code's model in the types it has."""
    model = model.cpu().eval()
    tokens = model.vision(_pixels(model.vision.image_size))
    images = model.normalised(tokens)
    text, mask = None, None
    if model.qformer.instruction_aware:
        encoded = model.qformer_tokenizer([INSTRUCTION] * _BATCH, return_tensors="pt")
        text, mask = encoded["input_ids"], encoded["attention_mask"]
    queries = model.qformer(images, text, mask).query_BQD
    projected = model.projection(queries)
    answers = [model.llm.prompt_format.target_ids(ANSWER)] * _BATCH
    states = model.llm.answer_states(model.llm.prefixes(projected, [INSTRUCTION] * len(projected)), answers)
    prefixes = model.llm.prefixes(model.visual_prompt(tokens[:, None], _UNEQUAL), _UNEQUAL)
    padded = model.llm.prefill(prefixes).last_BL
    return _trace(images, queries, projected, model.llm.logits(states.hidden_SL), model.llm.logits(padded))


def traces_huggingface(folder: Path, *, pad_as_saved: bool = False) -> Traces:
    """Run a folder's model through transformers' own classes, from its own tokenizers and image processor.

    It is opened in the type that transformers chooses.

    Args:
        folder: of the model.
        pad_as_saved: batches are padded on the side that the folder's processor says. Not every published folder says the
            right one, which is the left for a decoder-only language model.

    Raises:
        UserError: it is no InstructBLIP folder.
    """
    model = _open_huggingface(folder)
    loaded = _trace_huggingface(model, folder, pad_as_saved=pad_as_saved)
    if all(parameter.dtype == torch.float32 for parameter in model.parameters()):
        return Traces(loaded, loaded)
    return Traces(loaded, _trace_huggingface(model.float(), folder, pad_as_saved=pad_as_saved))


def trace_huggingface(folder: Path, *, pad_as_saved: bool = False) -> Trace:
    """The first of `traces_huggingface`."""
    return _trace_huggingface(_open_huggingface(folder), folder, pad_as_saved=pad_as_saved)


def _open_huggingface(folder: Path) -> Any:
    read_transformers_config(folder)
    with quiet_transformers():
        return InstructBlipForConditionalGeneration.from_pretrained(folder, trust_remote_code=False).eval()


@torch.inference_mode()
def _trace_huggingface(model: Any, folder: Path, *, pad_as_saved: bool) -> Trace:
    with quiet_transformers():
        pictures = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    size = model.config.vision_config.image_size
    pixels = pictures(list(_pixels(size)), do_resize=False, return_tensors="pt")["pixel_values"]
    text = AutoTokenizer.from_pretrained(folder / "qformer_tokenizer", trust_remote_code=False)(
        [INSTRUCTION] * _BATCH, return_tensors="pt"
    )
    prompt, answer = _token_ids(folder, AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
    decoder_only = model.config.use_decoder_only_language_model
    if model.config.image_token_index is None:  # the older form: any token that the text has not can mark the places
        used = {
            *prompt,
            *answer,
            *AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(SHORT_INSTRUCTION)["input_ids"],
            model.config.text_config.pad_token_id,
        }
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
    padded = _first_logits(model, folder, pad_as_saved=pad_as_saved)
    return _trace(outputs.vision_outputs[0], queries, model.language_projection(queries), logits, padded)


def _first_logits(model: Any, folder: Path, *, pad_as_saved: bool) -> Tensor:
    """What `generate` takes its first token from, for two prompts of unequal length that the folder's processor pads."""
    said, config = _said_of_text(folder), model.config
    with quiet_transformers():
        processor = InstructBlipProcessor.from_pretrained(folder, trust_remote_code=False)
    processor.num_query_tokens = config.num_query_tokens  # which the older form does not tell it
    processor.tokenizer.init_kwargs.pop("padding_side", None)  # which it would hand on to the Q-Former's tokenizer
    if not pad_as_saved:
        processor.tokenizer.padding_side = "left" if config.use_decoder_only_language_model else "right"
    texts = [said.get("prompt_prefix", "") + text + said.get("prompt_suffix", "") for text in _UNEQUAL]
    pixels = list(_pixels(config.vision_config.image_size))
    inputs = processor(images=pixels, text=texts, do_resize=False, padding=True, return_tensors="pt")
    heard = processor(text=list(_UNEQUAL), padding=True, return_tensors="pt")  # by the Q-Former: the instructions alone
    inputs |= {name: heard[name] for name in ("qformer_input_ids", "qformer_attention_mask")}
    ids = inputs["input_ids"]
    mark = processor.tokenizer.convert_tokens_to_ids(processor.image_token.content)
    before = processor.tokenizer(said.get("image_prefix", ""), add_special_tokens=False)["input_ids"]
    inputs["input_ids"] = torch.cat([torch.tensor([before] * len(ids), dtype=ids.dtype).view(len(ids), -1), ids], dim=1)
    inputs["input_ids"][inputs["input_ids"] == mark] = config.image_token_index
    ones = ids.new_ones(len(ids), len(before))
    inputs["attention_mask"] = torch.cat([ones, inputs["attention_mask"]], dim=1)
    options = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1}
    found = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    return found.logits[0]


def _trace(*stages: Tensor) -> Trace:
    return Trace(*(values.float() for values in stages))


def _pixels(size: int) -> Tensor:
    """Random pictures (B, 3, size, size), uint8, the same at every call."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(0, 256, (_BATCH, 3, size, size), dtype=torch.uint8, generator=generator)


def _said_of_text(folder: Path) -> dict[str, Any]:
    """What a folder's sidecar says that its user has to write around the visual tokens and the prompt."""
    return read_json(folder / SIDECAR)["llm"] if (folder / SIDECAR).is_file() else {}


def _token_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int | None], list[int]]:
    """The prompt's ids, None in the places of the visual tokens, and the answer's, as a user of the folder writes them.

    `instructblip.json` tells what has to be written around the visual tokens and before the answer.
    """
    said = _said_of_text(folder)
    queries: list[int | None] = [None] * read_transformers_config(folder).num_query_tokens
    before = tokenizer(said.get("image_prefix", ""), add_special_tokens=False)["input_ids"]
    prompt = tokenizer(said.get("prompt_prefix", "") + INSTRUCTION + said.get("prompt_suffix", ""))["input_ids"]
    answer = tokenizer(said.get("answer_prefix", "") + ANSWER, add_special_tokens=False)["input_ids"]
    return [*before, *queries, *prompt], [*answer, tokenizer.eos_token_id]
