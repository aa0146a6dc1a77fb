"""Tiny random language models of every family in configs/llm, each a transformers folder with a tokenizer of its kind.

The special tokens are those that the family's YAML names, so a folder loads with the real YAML and `llm.sources.path`:

    write_llm("vicuna_7b", tmp_path)
    config = llm_config("vicuna_7b", tmp_path)
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from instructblip.config.schema import CONFIGS, LLMConfig
from instructblip.config.validate import read_config

WIDTH = 32
SLIDING_WINDOW = 6  # of the tiny Gemma: shorter than any prompt with its visual tokens
_CORPUS = ["Question: what color is the shape? Short answer: red", "is there a circle? yes no", "blue green teal gray"]
_SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # ten times the usual one, so that inputs matter
}


def llm_config(name: str, folder: Path, **changes: Any) -> LLMConfig:
    """The configuration of a YAML in configs/llm, pointed at a local folder, with some values changed."""
    config = read_config(CONFIGS / "llm" / f"{name}.yaml", LLMConfig)
    return replace(config, sources=replace(config.sources, path=str(folder)), **changes)


def write_llm(name: str, folder: Path, seed: int = 0) -> None:
    """Write the tiny model that stands for `configs/llm/<name>.yaml`."""
    torch.manual_seed(seed)
    FAMILIES[name](folder)


# --- tokenizers ------------------------------------------------------------------------------------------------------


def byte_level(special: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: words inside a text begin with a space, a text does not."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(tokenizer, special, alphabet)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentencepiece(special: Sequence[str], *, leading_space: bool) -> PreTrainedTokenizerFast:
    """BPE over text whose spaces are visible; `leading_space` puts one in front of each text, as SentencePiece does."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if leading_space:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        tokenizer.decoder = decoders.Replace("▁", " ")
    _train(tokenizer, special, [chr(code) for code in range(33, 127)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _train(tokenizer: Tokenizer, special: Sequence[str], alphabet: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + len(alphabet) + 60,
        special_tokens=list(special),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)


# --- families --------------------------------------------------------------------------------------------------------


def _save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    # What a hub's own settings for sampling look like; none of it may reach an evaluation.
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _vicuna(folder: Path) -> None:
    tokenizer = sentencepiece(["<unk>", "<s>", "</s>"], leading_space=True)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    sizes = _SIZES | {"num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)
    _save(LlamaForCausalLM(config), tokenizer, folder)


def _llama3(folder: Path) -> None:
    tokenizer = byte_level(["<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>"])
    tokenizer.add_special_tokens({"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"})
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = LlamaConfig(vocab_size=len(tokenizer), rope_parameters=scaling, bos_token_id=0, eos_token_id=[1], **_SIZES)
    _save(LlamaForCausalLM(config), tokenizer, folder)


def _smollm2(folder: Path) -> None:
    tokenizer = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **_SIZES)
    _save(LlamaForCausalLM(config), tokenizer, folder)


def _qwen3(folder: Path) -> None:
    tokenizer = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    config = Qwen3Config(vocab_size=len(tokenizer) + 9, **_SIZES)  # more rows than tokens, as the real one
    _save(Qwen3ForCausalLM(config), tokenizer, folder)


def _mistral(folder: Path) -> None:
    tokenizer = sentencepiece(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], leading_space=True)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    config = MistralConfig(vocab_size=len(tokenizer), sliding_window=None, **_SIZES)
    _save(MistralForCausalLM(config), tokenizer, folder)


def _gemma3(folder: Path) -> None:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer = sentencepiece(special, leading_space=False)
    tokenizer.add_special_tokens({"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"})
    text = _SIZES | {
        "vocab_size": len(tokenizer) + 3,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "sliding_window": SLIDING_WINDOW,
        "query_pre_attn_scalar": 8,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    _save(Gemma3ForConditionalGeneration(config), tokenizer, folder)


def _opt(folder: Path) -> None:
    tokenizer = byte_level(["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.add_special_tokens({"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"})
    config = OPTConfig(
        vocab_size=len(tokenizer) + 5,
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        init_std=0.2,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )
    _save(OPTForCausalLM(config), tokenizer, folder)


def _flan_t5(folder: Path) -> None:
    tokenizer = sentencepiece(["<pad>", "</s>", "<unk>"], leading_space=True)
    tokenizer.add_special_tokens({"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"})
    config = T5Config(
        vocab_size=len(tokenizer) + 28,
        d_model=WIDTH,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        initializer_factor=1.0,
    )
    _save(T5ForConditionalGeneration(config), tokenizer, folder)


FAMILIES: dict[str, Callable[[Path], None]] = {
    "vicuna_7b": _vicuna,
    "vicuna_13b": _vicuna,
    "flan_t5_base": _flan_t5,
    "flan_t5_xl": _flan_t5,
    "flan_t5_xxl": _flan_t5,
    "llama_3_1_8b": _llama3,
    "qwen3_8b": _qwen3,
    "mistral_7b": _mistral,
    "gemma_3_4b": _gemma3,
    "opt_2_7b": _opt,
    "opt_6_7b": _opt,
    "smollm2_135m": _smollm2,
}
