"""A model before and after conversion, on one fixed random input: how far apart do they compute?

Each side computes in the types that it is loaded in, as it will for its user; what is held in half precision is compared
once more in float32, where a difference is one of weights or arithmetic and not of rounding. A transformers folder is run by
transformers' own classes (`parity_transformers.py`), this code's formats by this code.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from instructblip.models.base import Inputs
from instructblip.models.blip import BLIP, BLIPVQA, BLIPCaption, BLIPPretrain, BLIPRetrieval, Momentum
from instructblip.models.blip2 import BLIP2
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.llava import LLaVA
from instructblip.models.llm import LLM
from instructblip.models.pairs import similarities
from instructblip.models.vision_language import VisionLanguageModel

INSTRUCTION = "Question: what color is the shape in the image? Short answer:"
SHORT_INSTRUCTION = "what is it?"  # beside the other it has to be padded
ANSWER = "it is a blue rectangle"
ANSWERS = ("blue", ANSWER)
BATCH = 2
UNEQUAL = (SHORT_INSTRUCTION, INSTRUCTION)
_SEED = 0
_ROUNDINGS = 8
_OVER_WORDS = ("logits", "padded")

# What a model computed on the fixed input at each stage, on the CPU, given as float32. Of a model with a language model:
#   vision      image tokens behind `ln_vision`
#   qformer     the queries' outputs
#   projection  the soft prompt
#   logits      of the language model at each position that predicts a token of the answer
#   padded      the same at the first position of the answers to two instructions of unequal length, run together
# of LLaVA the same without a Q-Former, vision in front of the choice of patches.
# Of BLIP-2's first stage: vision; qformer, of the queries alone; and of two texts of unequal length
#   text        states of the text alone
#   contrast    cosine of every image and text
#   matching    logits of each image and its text
#   captions    logits of each token of the texts as captions; missing without a language-model head
# Of BLIP: vision, image tokens; captions of its captioner; of its answerer
#   questions   states of two questions of unequal length in the light of their images
#   answers     logits of each token of two answers to them
# text, contrast and matching of its retriever, captions with them of its pre-training; and where it has momentum copies
#   momentum    their projections, and the queue
Trace = dict[str, Tensor]

KnownModel = InstructBLIP | LLaVA | BLIP2 | BLIP


class Traces(NamedTuple):
    """What a model computed in the types it was loaded in, and what it computed in float32: one trace where they agree."""

    loaded: Trace
    float32: Trace


def stage_differences(source: Trace, target: Trace) -> dict[str, float]:
    """Largest absolute difference at each stage: infinite where shapes differ or a side lacks it, NaN where one has a NaN.

    Of two vocabularies only the words that both have are compared: a transformers folder may have got `<image>`.
    """
    return {stage: _difference(stage, source.get(stage), target.get(stage)) for stage in {**source, **target}}


def _difference(stage: str, ours: Tensor | None, theirs: Tensor | None) -> float:
    if ours is None or theirs is None:
        return float("inf")
    if stage in _OVER_WORDS:
        words = min(ours.shape[-1], theirs.shape[-1])
        ours, theirs = ours[..., :words], theirs[..., :words]
    return float((ours - theirs).abs().max()) if ours.shape == theirs.shape else float("inf")


def rounding_bounds(source: Trace, dtype: torch.dtype) -> dict[str, float]:
    """How far apart two correct programs may be at each stage in half precision.

    Each rounds in places of its own. A few roundings are allowed, measured by the stage's largest value.
    """
    unit = _ROUNDINGS * torch.finfo(dtype).eps
    return {stage: unit * float(values.abs().max()) for stage, values in source.items()}


def model_dtype(model: KnownModel) -> torch.dtype:
    """The coarsest type that a part of the model is held in."""
    parts = [model.vision.dtype]
    if isinstance(model, VisionLanguageModel):
        parts.append(model.llm.model.dtype)
    elif isinstance(model, BLIP):
        parts += [text.norm.weight.dtype for text in model.text_models()]
    return max(parts, key=lambda dtype: torch.finfo(dtype).eps)


def traces_native(model: KnownModel) -> Traces:
    """Run this code's model twice; it is left in float32."""
    loaded = trace_native(model)
    return Traces(loaded, loaded if model_dtype(model) == torch.float32 else trace_native(model.float()))


@torch.inference_mode()
def trace_native(model: KnownModel) -> Trace:
    """Run this code's model in the types it has."""
    model = model.cpu().eval()
    if isinstance(model, BLIP):
        return _trace_blip(model)
    if isinstance(model, LLaVA):
        return _trace_llava(model)
    return _trace_stage1(model) if isinstance(model, BLIP2) else _trace_with_llm(model)


def _trace_with_llm(model: InstructBLIP) -> Trace:
    tokens = model.vision(pixels(model.vision.image_size))
    images = model.normalised(tokens)
    text, mask = None, None
    if model.qformer.instruction_aware:
        assert model.qformer_tokenizer is not None
        encoded = model.qformer_tokenizer([INSTRUCTION] * BATCH, return_tensors="pt")
        text, mask = encoded["input_ids"], encoded["attention_mask"]
    queries = model.qformer(images, text, mask).query_BQD
    projected = model.projection(queries)
    visual = model.visual_prompt(tokens[:, None], UNEQUAL)
    return in_float32(vision=images, qformer=queries, projection=projected, **_heard(model.llm, projected, visual))


def _trace_llava(model: LLaVA) -> Trace:
    tokens = model.vision(pixels(model.vision.image_size))
    visual = model.visual_prompt(tokens[:, None], UNEQUAL)  # whatever the instruction is
    return in_float32(vision=tokens, projection=visual, **_heard(model.llm, visual, visual))


def _heard(llm: LLM, visual: Tensor, unequal: Tensor) -> Trace:
    """What a language model makes of visual tokens in front of one instruction, and of two of unequal length."""
    answers = [llm.prompt_format.target_ids(ANSWER)] * BATCH
    states = llm.answer_states(llm.prefixes(visual, [INSTRUCTION] * BATCH), answers)
    padded = llm.prefill(llm.prefixes(unequal, UNEQUAL)).last_BL
    return {"logits": llm.logits(states.hidden_SL), "padded": llm.logits(padded)}


def _trace_stage1(model: BLIP2) -> Trace:
    ids_BT, mask_BT = model.tokenize(UNEQUAL)
    image = model.encode_images(model.vision(pixels(model.vision.image_size))[:, None])
    text = model.encode_texts(ids_BT, mask_BT)
    trace = in_float32(
        vision=image.tokens_BPU,
        qformer=image.states_BSW,
        text=text.text_BTD[mask_BT.bool()],
        contrast=similarities(image.projected_BQE, text.projected_BE),
        matching=model.encode_pairs(image.tokens_BPU, ids_BT, mask_BT).logits_B2,
    )
    if model.qformer.lm_head is None:
        return trace
    return trace | in_float32(captions=model.encode_captions(image.cache, ids_BT, mask_BT).logits_NW)


def _trace_blip(model: BLIP) -> Trace:
    tokens_B1PU = model.vision(pixels(model.vision.image_size))[:, None]
    trace = in_float32(vision=model.normalised(tokens_B1PU))
    if isinstance(model, BLIPVQA):
        states_BTD, mask_BT = model.encode_questions(tokens_B1PU, UNEQUAL)
        answers = Inputs(tokens_B1PU, UNEQUAL, model.answer_ids(ANSWERS))
        logits_SV = model(answers, {"answer_logits"}).tensors["answer_logits"]
        return trace | in_float32(questions=states_BTD[mask_BT.bool()], answers=logits_SV)
    if isinstance(model, BLIPCaption):
        return trace | in_float32(
            captions=model.caption_logits(model.normalised(tokens_B1PU), model.caption_ids(UNEQUAL))
        )
    assert isinstance(model, BLIPRetrieval)
    image, (ids_BT, mask_BT) = model.encode_images(tokens_B1PU), model.tokenize(UNEQUAL)
    text = model.encode_texts(ids_BT, mask_BT)
    trace |= in_float32(
        text=text.text_BTD[mask_BT.bool()],
        contrast=similarities(image.projected_BQE, text.projected_BE),
        matching=model.encode_pairs(image.tokens_BPU, ids_BT, mask_BT).logits_B2,
    )
    if isinstance(model, BLIPPretrain):
        trace |= in_float32(captions=model.caption_logits(image.tokens_BPU, model.caption_ids(UNEQUAL)))
    if isinstance(model.momentum, Momentum):
        trace |= in_float32(momentum=_momentum(model))
    return trace


def _momentum(model: BLIPRetrieval) -> Tensor:
    """What the momentum copies make of the images and texts, and the queue, in one column."""
    wanted = ("image_projected_m", "text_projected_m")
    frames = pixels(model.vision.image_size)[:, None]
    inputs = Inputs(frames, [""] * BATCH, [ids[1:] for ids in model.token_ids(UNEQUAL)])
    outputs = model(inputs, wanted).tensors
    assert isinstance(model.momentum, Momentum)
    queues = model.momentum.image_queue, model.momentum.text_queue
    return torch.cat([values.float().flatten() for values in (*(outputs[name] for name in wanted), *queues)])


def in_float32(**stages: Tensor) -> Trace:
    """A trace of these stages."""
    return {stage: values.float() for stage, values in stages.items()}


def pixels(size: int) -> Tensor:
    """Random pictures (B, 3, size, size), uint8, the same at every call."""
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randint(0, 256, (BATCH, 3, size, size), dtype=torch.uint8, generator=generator)
