"""What transformers' own classes compute of a folder on the fixed input of `parity.py`, from the folder's own tokenizers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, LlavaProcessor

from instructblip._transformers import quiet_transformers
from instructblip.models.blip import BLIPVQA, BLIPCaption, BLIPRetrieval
from instructblip.models.blip2 import BLIP2
from instructblip.weights.names import QFORMER_TOKENIZER, SIDE_TENSORS
from instructblip.weights.parity import (
    ANSWER,
    ANSWERS,
    BATCH,
    INSTRUCTION,
    UNEQUAL,
    Trace,
    Traces,
    in_float32,
    pixels,
    trace_native,
)
from instructblip.weights.peft_format import ADAPTER_FOLDER, is_adapter_folder
from instructblip.weights.transformers_blip import is_blip_folder, load_blip_folder
from instructblip.weights.transformers_layout import is_llava_folder, layout_of
from instructblip.weights.transformers_llava import around_image, read_llava_settings
from instructblip.weights.transformers_read import load_huggingface
from instructblip.weights.transformers_settings import LLMSettings, read_settings, read_transformers_config


def traces_huggingface(folder: Path, *, pad_as_saved: bool = False) -> Traces:
    """Run a folder's model through transformers' own classes, from its own tokenizers and image processor.

    It is opened in the type that transformers chooses. Adapters that were written beside it act through peft.

    Args:
        folder: of the model.
        pad_as_saved: batches are padded on the side that the folder's processor says. Not every published folder says the
            right one, which is the left for a decoder-only language model.

    Raises:
        UserError: it is no folder of InstructBLIP or BLIP-2.
    """
    model = _open(folder)
    loaded = _trace(model, folder, pad_as_saved=pad_as_saved)
    if all(parameter.dtype == torch.float32 for parameter in model.parameters()):
        return Traces(loaded, loaded)
    return Traces(loaded, _trace(model.float(), folder, pad_as_saved=pad_as_saved))


def trace_huggingface(folder: Path, *, pad_as_saved: bool = False) -> Trace:
    """The first of `traces_huggingface`."""
    return _trace(_open(folder), folder, pad_as_saved=pad_as_saved)


def _open(folder: Path) -> Any:
    read_transformers_config(folder)
    with quiet_transformers():
        model = layout_of(folder).model.from_pretrained(folder, trust_remote_code=False)
        if is_adapter_folder(folder / ADAPTER_FOLDER):
            model.load_adapter(str(folder / ADAPTER_FOLDER))  # by peft
        return model.eval()


@torch.inference_mode()
def _trace(model: Any, folder: Path, *, pad_as_saved: bool) -> Trace:
    with quiet_transformers():
        pictures = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    size = model.config.vision_config.image_size
    images = pictures(list(pixels(size)), do_resize=False, return_tensors="pt")["pixel_values"]
    if is_blip_folder(folder):
        return _trace_blip(model, folder, images)
    if is_llava_folder(folder):
        return _trace_llava(model, folder, images, pad_as_saved=pad_as_saved)
    said = read_settings(folder).llm
    if said is None:
        return _trace_retrieval(model, folder, images)
    return _trace_with_llm(model, folder, images, said, pad_as_saved=pad_as_saved)


# --- with a language model -------------------------------------------------------------------------------------------


def _trace_with_llm(model: Any, folder: Path, images: Tensor, said: LLMSettings, *, pad_as_saved: bool) -> Trace:
    tokenizer, config = AutoTokenizer.from_pretrained(folder, trust_remote_code=False), model.config
    prompt, answer = _token_ids(tokenizer, config, said)
    decoder_only = config.use_decoder_only_language_model
    if config.image_token_index is None:  # the older form: any token that the text has not can mark the places
        short = tokenizer(UNEQUAL[0])["input_ids"]
        used = {*prompt, *answer, *short, config.text_config.pad_token_id}
        config.image_token_index = next(i for i in range(config.text_config.vocab_size) if i not in used)
    before = [config.image_token_index if token is None else token for token in prompt]
    ids = torch.tensor([before + answer[:-1] if decoder_only else before] * BATCH)
    outputs = model(
        pixel_values=images,
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **_heard(folder),
        **({} if decoder_only else {"labels": torch.tensor([answer] * BATCH)}),
    )
    queries = outputs.qformer_outputs[0][:, : config.num_query_tokens]
    return in_float32(
        vision=outputs.vision_outputs[0],
        qformer=queries,
        projection=model.language_projection(queries.to(model.language_projection.weight.dtype)),
        logits=outputs.logits[:, -len(answer) :].flatten(0, 1),
        padded=_first_logits(model, folder, said, pad_as_saved=pad_as_saved),
    )


def _heard(folder: Path) -> dict[str, Tensor]:
    """What InstructBLIP's Q-Former reads; BLIP-2's reads nothing."""
    if layout_of(folder).kind != "instructblip":
        return {}
    text = AutoTokenizer.from_pretrained(folder / QFORMER_TOKENIZER, trust_remote_code=False)(
        [INSTRUCTION] * BATCH, return_tensors="pt"
    )
    return {"qformer_input_ids": text["input_ids"], "qformer_attention_mask": text["attention_mask"]}


def _first_logits(model: Any, folder: Path, said: LLMSettings, *, pad_as_saved: bool) -> Tensor:
    """What `generate` takes its first token from, for two prompts of unequal length that the folder's processor pads."""
    layout, config, conventions = layout_of(folder), model.config, said.conventions
    with quiet_transformers():
        processor = layout.processor.from_pretrained(folder, trust_remote_code=False)
    processor.num_query_tokens = config.num_query_tokens  # which the older form does not tell it
    processor.tokenizer.init_kwargs.pop("padding_side", None)  # which it would hand on to the Q-Former's tokenizer
    if not pad_as_saved:
        processor.tokenizer.padding_side = "left" if config.use_decoder_only_language_model else "right"
        if layout.kind == "instructblip":
            processor.qformer_tokenizer.padding_side = "right"
    around = conventions.get("prompt_prefix", ""), conventions.get("prompt_suffix", "")
    texts = [around[0] + text + around[1] for text in UNEQUAL]
    images = list(pixels(config.vision_config.image_size))
    inputs = processor(images=images, text=texts, do_resize=False, padding=True, return_tensors="pt")
    if layout.kind == "instructblip":  # the Q-Former hears the instructions alone
        heard = processor(text=list(UNEQUAL), padding=True, return_tensors="pt")
        inputs |= {name: heard[name] for name in ("qformer_input_ids", "qformer_attention_mask")}
    ids = inputs["input_ids"]
    mark = processor.tokenizer.convert_tokens_to_ids(processor.image_token.content)
    before = processor.tokenizer(conventions.get("image_prefix", ""), add_special_tokens=False)["input_ids"]
    inputs["input_ids"] = torch.cat([torch.tensor([before] * len(ids), dtype=ids.dtype).view(len(ids), -1), ids], dim=1)
    inputs["input_ids"][inputs["input_ids"] == mark] = config.image_token_index
    ones = ids.new_ones(len(ids), len(before))
    inputs["attention_mask"] = torch.cat([ones, inputs["attention_mask"]], dim=1)
    options = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1}
    found = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    return found.logits[0]


def _token_ids(tokenizer: Any, config: Any, said: LLMSettings) -> tuple[list[int | None], list[int]]:
    """The prompt's ids, None in the places of the visual tokens, and the answer's, as a user of the folder writes them.

    `instructblip.json` tells what has to be written around the visual tokens and before the answer.
    """
    text = said.conventions
    queries: list[int | None] = [None] * config.num_query_tokens
    before = tokenizer(text.get("image_prefix", ""), add_special_tokens=False)["input_ids"]
    prompt = tokenizer(text.get("prompt_prefix", "") + INSTRUCTION + text.get("prompt_suffix", ""))["input_ids"]
    answer = tokenizer(text.get("answer_prefix", "") + ANSWER, add_special_tokens=False)["input_ids"]
    return [*before, *queries, *prompt], [*answer, tokenizer.eos_token_id]


# --- LLaVA -----------------------------------------------------------------------------------------------------------


def _trace_llava(model: Any, folder: Path, images: Tensor, *, pad_as_saved: bool) -> Trace:
    said, config = read_llava_settings(folder).llm.conventions, model.config
    with quiet_transformers():
        processor = LlavaProcessor.from_pretrained(folder, trust_remote_code=False)
    before, after, behind = around_image(processor.tokenizer, said)
    processor.patch_size = config.vision_config.patch_size  # which older folders do not tell it, nor the next two
    processor.vision_feature_select_strategy = config.vision_feature_select_strategy
    processor.num_additional_image_tokens = 1
    if not pad_as_saved:
        processor.tokenizer.padding_side = "left"
    pictures = list(pixels(config.vision_config.image_size))

    def asked(texts: Sequence[str]) -> dict[str, Tensor]:
        written = [f"{before}{processor.image_token}{after}{text}{behind}" for text in texts]
        found = processor(images=pictures, text=written, padding=True, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")} | {"pixel_values": images}

    answer = processor.tokenizer(said.get("answer_prefix", "") + ANSWER, add_special_tokens=False)["input_ids"]
    answer = torch.tensor([[*answer, processor.tokenizer.convert_tokens_to_ids(said["eos_token"])]] * BATCH)
    inputs = asked([INSTRUCTION] * BATCH)
    ids = torch.cat([inputs["input_ids"], answer[:, :-1]], dim=1)
    outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=images)
    tower = model.model.vision_tower(images.to(model.dtype), output_hidden_states=True)
    options = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1}
    first = model.generate(**asked(UNEQUAL), **options, output_logits=True, return_dict_in_generate=True)
    return in_float32(
        vision=tower.hidden_states[config.vision_feature_layer],
        projection=outputs.image_hidden_states.view(BATCH, -1, outputs.image_hidden_states.shape[-1]),
        logits=outputs.logits[:, -answer.shape[1] :].flatten(0, 1),
        padded=first.logits[0],
    )


# --- BLIP-2's first stage --------------------------------------------------------------------------------------------


def _trace_retrieval(model: Any, folder: Path, images: Tensor) -> Trace:
    """Captions are computed by this code, of the head beside transformers' files: its class has none."""
    inputs = {"pixel_values": images.to(model.dtype)} | _texts(model, folder)
    matching = model(**inputs, use_image_text_matching_head=True).logits_per_image
    contrast = model(**inputs, use_image_text_matching_head=False)
    tokens = contrast.vision_model_output.last_hidden_state
    queries = model.query_tokens.expand(len(tokens), -1, -1)
    states = model.qformer(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state
    real = inputs["attention_mask"][:, -contrast.text_model_output.last_hidden_state.shape[1] :].bool()
    trace = in_float32(
        vision=tokens,
        qformer=states,
        text=contrast.text_model_output.last_hidden_state[real],
        contrast=contrast.logits_per_image,
        matching=matching,
    )
    if not (folder / SIDE_TENSORS).is_file():
        return trace
    own = load_huggingface(folder)
    assert isinstance(own, BLIP2)
    own = own.float() if model.dtype == torch.float32 else own
    return trace | {stage: values for stage, values in trace_native(own).items() if stage == "captions"}


def _texts(model: Any, folder: Path) -> dict[str, Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(folder, truncation_side="right", trust_remote_code=False)
    longest = read_settings(folder).max_text_tokens
    text = tokenizer(list(UNEQUAL), padding=True, truncation=True, max_length=longest, return_tensors="pt")
    ids, mask = text["input_ids"], text["attention_mask"]
    if model.config.image_token_index is not None:  # the class cuts off as many marks as there are queries
        marks = ids.new_full((len(ids), model.config.num_query_tokens), model.config.image_token_index)
        ids, mask = torch.cat([marks, ids], dim=1), torch.cat([torch.ones_like(marks), mask], dim=1)
    return {"input_ids": ids, "attention_mask": mask}


# --- BLIP ------------------------------------------------------------------------------------------------------------


def _trace_blip(model: Any, folder: Path, images: Tensor) -> Trace:
    """Texts begin as this code's model has them: its class takes them from outside. What it has no place for is this code's.

    Each question runs alone, since transformers' decoder reads its padding.
    """
    own = load_blip_folder(folder)
    own = own.float() if model.dtype == torch.float32 else own
    images = images.to(model.dtype)
    tokens = model.vision_model(images).last_hidden_state
    trace = in_float32(vision=tokens)
    if isinstance(own, BLIPVQA):
        return trace | _trace_questions(model, own, tokens)
    if isinstance(own, BLIPCaption):
        prompt = len(own.caption_start())
        ids, mask = own.padded([[*own.caption_start(), *answer] for answer in own.caption_ids(UNEQUAL)])
        logits = model(images, input_ids=ids, attention_mask=mask).logits
        return trace | in_float32(captions=logits[:, prompt - 1 : -1][mask[:, prompt:].bool()])
    assert isinstance(own, BLIPRetrieval)
    ids, mask = own.tokenize(UNEQUAL)
    paired = torch.cat([torch.full_like(ids[:, :1], own.encode_id), ids[:, 1:]], dim=1)
    trace |= in_float32(
        text=model.text_encoder(ids, attention_mask=mask).last_hidden_state[mask.bool()],
        contrast=model(ids, images, use_itm_head=False, attention_mask=mask).itm_score,
        matching=model(paired, images, use_itm_head=True, attention_mask=mask).itm_score,
    )
    return trace | {stage: values for stage, values in trace_native(own).items() if stage == "momentum"}


def _trace_questions(model: Any, own: BLIPVQA, tokens: Tensor) -> Trace:
    questions, answers = [], []
    for row, (question, answer) in enumerate(zip(UNEQUAL, own.answer_ids(ANSWERS), strict=True)):
        asked = torch.tensor([[own.encode_id, *own.token_ids([question])[0][1:]]])
        states = model.text_encoder(asked, encoder_hidden_states=tokens[row : row + 1]).last_hidden_state
        written = torch.tensor([[own.start_id, *answer[:-1]]])
        questions.append(states[0])
        answers.append(model.text_decoder(written, encoder_hidden_states=states).logits[0])
    return in_float32(questions=torch.cat(questions), answers=torch.cat(answers))
