"""LAVIS's numbers in `tests/lavis_vectors`: a case's inputs and what LAVIS computed from them."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertTokenizerFast,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

from instructblip.models.blip import BLIP, BLIPVQA, BLIPCaption, BLIPPretrain, BLIPRetrieval
from instructblip.models.blip2 import BLIP2
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.llm import LLM, DecoderLLM, EncoderDecoderLLM
from instructblip.models.med import TextModel
from instructblip.models.qformer import QFormer
from instructblip.models.vision import VisionEncoder
from instructblip.weights.names import foreign_names
from tests.kit.tiny import tiny_vision

FOLDER = Path(__file__).parents[1] / "lavis_vectors"
TOLERANCE = {"atol": 3e-4, "rtol": 1e-5}  # the files' own


@cache
def tensors(name: str) -> dict[str, Tensor]:
    """Tensors of a file such as `blip2_stage1/weights`."""
    return load_file(FOLDER / f"{name}.safetensors")


@cache
def read(name: str) -> Any:
    """Content of a file such as `blip2_stage1/cases`."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def case(of: str, name: str) -> dict[str, Any]:
    """A case with the tensors of `inputs` and `expected` in place of their keys."""
    found = dict(read(f"{of}/cases")[name])
    # `inputs_of` may say which of them behind the case's name.
    shared = read(f"{of}/cases")[found["inputs_of"].split()[0]]["inputs"] if "inputs_of" in found else {}
    inputs = shared | found.get("inputs", {})
    found["inputs"] = {key: _filled(value, f"{of}/inputs") for key, value in inputs.items()}
    found["expected"] = {key: _filled(value, f"{of}/expected") for key, value in found["expected"].items()}
    return found


def _filled(value: Any, file: str) -> Any:
    return tensors(file)[value["tensor"]] if isinstance(value, dict) and "tensor" in value else value


def stage1_qformer(*, dropout: float = 0.0) -> QFormer:
    """The Q-Former of `blip2_stage1` with LAVIS's weights, in evaluation mode."""
    sizes = read("blip2_stage1/config")["sizes"]
    qformer = QFormer(
        vocab_size=sizes["vocab_size"],
        width=sizes["hidden_size"],
        layers=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        hidden_width=sizes["intermediate_size"],
        vision_width=sizes["vision_width"],
        queries=sizes["num_query_token"],
        cross_attention_every=sizes["cross_attention_freq"],
        max_text_tokens=sizes["max_position_embeddings"],
        dropout=dropout,
        norm_eps=sizes["layer_norm_eps"],
        text_outputs=True,
        language_model_head=True,
    )
    names = foreign_names((f"qformer.{name}" for name in qformer.state_dict()), "lavis")
    weights = tensors("blip2_stage1/weights")
    qformer.load_state_dict({name.removeprefix("qformer."): weights[theirs] for name, theirs in names.items()})
    return qformer.eval()


def bert_tokenizer() -> PreTrainedTokenizerBase:
    """The vocabulary of the vectors, [DEC] behind it."""
    return BertTokenizerFast(vocab=str(FOLDER / "blip2_stage1/vocab.txt"), bos_token="[DEC]")


def stage1_model() -> BLIP2:
    """The model of `blip2_stage1` with LAVIS's weights, in evaluation mode; its vision encoder is never run."""
    sizes, weights = read("blip2_stage1/config")["sizes"], tensors("blip2_stage1/weights")
    model = BLIP2(
        vision=tiny_vision(),
        vision_norm=nn.LayerNorm(sizes["vision_width"], eps=sizes["ln_vision_eps"]),
        qformer=stage1_qformer(),
        tokenizer=bert_tokenizer(),
        feature_width=sizes["embed_dim"],
        max_text_tokens=sizes["max_txt_len"],
    )
    names = foreign_names(model.held_state(), "lavis")
    model.load_state_dict({name: weights[theirs] for name, theirs in names.items()}, strict=False)
    return model.eval()


def stage2_llm(kind: str, *, supervise_bos: bool = False, max_target_tokens: int = 32) -> LLM:
    """The language model of `blip2_stage2`, `opt` or `t5`, with its released text conventions."""
    sizes = {name: value for name, value in read("blip2_stage2/config")[kind].items() if "tokenizer_" not in name}
    state = {
        name.removeprefix(f"{kind}_model."): tensor
        for name, tensor in tensors(f"blip2_stage2/{kind}_weights").items()
        if name.startswith(f"{kind}_model.")
    }
    if kind == "opt":
        end = sizes.pop("newline_eos_token_id")
        del sizes["position_offset"]
        opt = OPTForCausalLM(OPTConfig(**sizes))
        missing, unexpected = opt.load_state_dict(state, strict=False)
        assert (missing, unexpected) == (["lm_head.weight"], [])  # tied
        tokenizer = AutoTokenizer.from_pretrained(FOLDER / "blip2_stage2/opt_tokenizer")
        return DecoderLLM(
            opt,
            tokenizer,
            eos_token=tokenizer.convert_ids_to_tokens(end),
            pad_token="<pad>",
            bos_token="</s>",
            supervise_bos=supervise_bos,
            max_target_tokens=max_target_tokens,
        )
    t5 = T5ForConditionalGeneration(T5Config(**sizes))
    # Flan-T5 has an output head of its own; transformers ties it until weights say otherwise.
    t5.lm_head.weight = nn.Parameter(torch.empty_like(t5.shared.weight))
    missing, unexpected = t5.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("embed_tokens.weight") for name in missing)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "instructblip/t5_tokenizer")
    return EncoderDecoderLLM(t5, tokenizer, eos_token="</s>", pad_token="<pad>")


def stage2_model(llm: LLM) -> InstructBLIP:
    """The model of `blip2_stage2` with LAVIS's weights around its language model; its vision encoder is never run."""
    sizes, kind = read("blip2_stage2/config")["qformer"], "opt" if llm.kind == "decoder" else "t5"
    model = InstructBLIP(
        vision=tiny_vision(),
        vision_norm=nn.LayerNorm(sizes["vision_width"], eps=sizes["ln_vision_eps"]),
        qformer=QFormer(
            vocab_size=0,
            width=sizes["hidden_size"],
            layers=sizes["num_hidden_layers"],
            heads=sizes["num_attention_heads"],
            hidden_width=sizes["intermediate_size"],
            vision_width=sizes["vision_width"],
            queries=sizes["num_query_token"],
            cross_attention_every=sizes["cross_attention_freq"],
            norm_eps=sizes["layer_norm_eps"],
            instruction_aware=False,
        ),
        qformer_tokenizer=None,
        llm=llm,
    )
    weights = tensors(f"blip2_stage2/{kind}_weights")
    names = foreign_names(model.held_state(), "lavis")
    state = {name: weights[theirs.replace("llm_proj", f"{kind}_proj")] for name, theirs in names.items()}
    model.load_state_dict(state, strict=False)
    return model.eval()


def blip_tokenizer() -> PreTrainedTokenizerBase:
    """The vocabulary of the vectors, [DEC] and [ENC] behind it."""
    tokenizer = BertTokenizerFast(vocab=str(FOLDER / "blip_med/vocab.txt"), bos_token="[DEC]")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return tokenizer


def blip_vision() -> VisionEncoder:
    """The ViT of `blip_med`, with new weights; a case's pixels enter it through `blip_images`."""
    sizes = read("blip_med/config")["sizes"]
    return VisionEncoder(
        backbone="vit_base_patch16_224",
        image_size=sizes["image_size"],
        mean=[0.0] * 3,
        std=[1.0] * 3,
        options={
            "patch_size": sizes["patch_size"],
            "embed_dim": sizes["vision_width"],
            "depth": sizes["vision_depth"],
            "num_heads": sizes["vision_heads"],
        },
    )


def blip_images(model: BLIP, vectors: dict[str, Any]) -> Tensor:
    """Image tokens (B, 1, P, U) of a case's normalised pixels, which no picture of 8 bits gives."""
    tokens_BPU: Tensor = model.vision.backbone.forward_features(vectors["inputs"]["image"])
    return tokens_BPU[:, None]


def _blip_text_model(**options: Any) -> TextModel:
    config = read("blip_med/config")
    sizes = config["sizes"]["text"]
    return TextModel(
        **{
            "vocab_size": sizes["vocab_size"],
            "width": sizes["hidden_size"],
            "layers": sizes["num_hidden_layers"],
            "heads": sizes["num_attention_heads"],
            "hidden_width": sizes["intermediate_size"],
            "source_width": config["sizes"]["vision_width"],
            "max_text_tokens": sizes["max_position_embeddings"],
            "dropout": 0.0,
            "norm_eps": sizes["layer_norm_eps"],
            **options,
        }
    )


def blip_caption() -> BLIPCaption:
    """The captioner of `blip_med` with LAVIS's weights, in evaluation mode."""
    model = BLIPCaption(
        vision=blip_vision(), text_decoder=_blip_text_model(language_model_head=True), tokenizer=blip_tokenizer()
    )
    return _blip_filled(model, "caption")


def blip_vqa() -> BLIPVQA:
    """The model for questions of `blip_med`, likewise."""
    width = read("blip_med/config")["sizes"]["text"]["hidden_size"]
    model = BLIPVQA(
        vision=blip_vision(),
        text_encoder=_blip_text_model(),
        text_decoder=_blip_text_model(language_model_head=True, source_width=width),
        tokenizer=blip_tokenizer(),
    )
    return _blip_filled(model, "vqa")


def blip_retrieval() -> BLIPRetrieval:
    """The model for retrieval: encoder, heads and momentum copies of `blip_med`'s pre-training."""
    weights = tensors("blip_med/pretrain_weights")
    model = BLIPRetrieval(
        vision=blip_vision(),
        text_encoder=_blip_text_model(),
        tokenizer=blip_tokenizer(),
        feature_width=read("blip_med/config")["sizes"]["embed_dim"],
        queue_size=weights["image_queue"].shape[1],
    )
    return _blip_filled(model, "pretrain")


def blip_pretrain() -> BLIPPretrain:
    """The model of `blip_med`'s pre-training, momentum copies and queue with it."""
    weights = tensors("blip_med/pretrain_weights")
    model = BLIPPretrain(
        vision=blip_vision(),
        text_encoder=_blip_text_model(language_model_head=True, decoder_attention=True),
        tokenizer=blip_tokenizer(),
        feature_width=read("blip_med/config")["sizes"]["embed_dim"],
        queue_size=weights["image_queue"].shape[1],
    )
    return _blip_filled(model, "pretrain")


def _blip_filled(model: Any, file: str) -> Any:
    weights = tensors(f"blip_med/{file}_weights")
    names = foreign_names(model.state_dict(), "lavis_blip")
    found = {
        name: weights[theirs].view(own.shape) for (name, theirs), own in _beside(names, model) if theirs in weights
    }
    missing, _ = model.load_state_dict(found, strict=False)
    assert set(missing) <= {"momentum.image_id_queue"}, missing  # which pre-training has not
    return model.eval()


def _beside(names: dict[str, str], model: nn.Module) -> Any:
    return zip(names.items(), model.state_dict().values(), strict=True)
