"""LAVIS's own losses, log-likelihoods and answers of InstructBLIP (`tests/lavis_vectors/instructblip`): the same here."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    T5Config,
    T5ForConditionalGeneration,
)

from instructblip.evaluation.protocol import released_lengths
from instructblip.models.facts import RANKING_PRESETS
from instructblip.models.instructblip import InstructBLIP
from instructblip.models.llm import LLM, DecoderLLM, EncoderDecoderLLM
from instructblip.models.qformer import QFormer
from instructblip.weights.names import foreign_names
from tests.kit.losses import term_of
from tests.kit.tiny import tiny_vision

FOLDER = Path(__file__).parents[1] / "lavis_vectors" / "instructblip"
CASES: dict[str, Any] = json.loads((FOLDER / "cases.json").read_text(encoding="utf-8"))
CONFIG: dict[str, Any] = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
KINDS = {"vicuna": "decoder", "t5": "encoder_decoder"}
GENERATED = [name for name, case in CASES.items() if "settings" in case]


@cache
def tensors(name: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def vicuna(state: dict[str, Tensor]) -> LLM:
    settings = {name: value for name, value in CONFIG["vicuna"].items() if not name.startswith("tokenizer_")}
    model = LlamaForCausalLM(
        LlamaConfig(**settings | {"rope_parameters": {"rope_theta": 10000, "rope_type": "default"}})
    )
    weights = {name: value for name, value in part(state, "llm_model.").items() if not name.endswith("inv_freq")}
    model.load_state_dict(weights)
    tokenizer = LlamaTokenizer.from_pretrained(FOLDER / "vicuna_tokenizer")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return DecoderLLM(model, tokenizer, eos_token="</s>", pad_token="[PAD]", bos_token="</s>", **limits())


def t5(state: dict[str, Tensor]) -> LLM:
    model = T5ForConditionalGeneration(T5Config(**CONFIG["t5"]))
    # Flan-T5 has an output head of its own; transformers ties it until weights say otherwise.
    model.lm_head.weight = nn.Parameter(torch.empty_like(model.shared.weight))
    missing, unexpected = model.load_state_dict(part(state, "t5_model."), strict=False)
    assert not unexpected and all(name.endswith("embed_tokens.weight") for name in missing)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "t5_tokenizer")
    return EncoderDecoderLLM(model, tokenizer, eos_token="</s>", pad_token="<pad>", **limits())


def limits() -> dict[str, int]:
    return {"max_prompt_tokens": CONFIG["max_txt_len"], "max_target_tokens": CONFIG["max_output_txt_len"]}


@cache
def model_of(kind: str) -> InstructBLIP:
    """LAVIS's model; its vision encoder is never run."""
    state, sizes = tensors(f"{kind}_weights"), CONFIG["qformer"]
    model = InstructBLIP(
        vision=tiny_vision(),
        vision_norm=nn.LayerNorm(sizes["vision_width"], eps=sizes["ln_vision_eps"]),
        qformer=QFormer(
            vocab_size=sizes["vocab_size"],
            width=sizes["hidden_size"],
            layers=sizes["num_hidden_layers"],
            heads=sizes["num_attention_heads"],
            hidden_width=sizes["intermediate_size"],
            vision_width=sizes["vision_width"],
            queries=sizes["num_query_token"],
            cross_attention_every=sizes["cross_attention_freq"],
            max_text_tokens=sizes["max_position_embeddings"],
            norm_eps=sizes["layer_norm_eps"],
        ),
        qformer_tokenizer=BertTokenizerFast(vocab=str(FOLDER / "vocab.txt"), bos_token="[DEC]", truncation_side="left"),
        llm={"vicuna": vicuna, "t5": t5}[kind](state),
        max_instruction_tokens=CONFIG["max_txt_len"],
    )
    native = model.held_state()
    names = foreign_names(native, "lavis")
    projection = {"vicuna": "llm_proj", "t5": "t5_proj"}[kind]
    loaded = {name: state[theirs.replace("llm_proj", projection)] for name, theirs in names.items()}
    model.load_state_dict(loaded, strict=False)
    return model.eval()


def inputs_of(case: dict[str, Any]) -> dict[str, Tensor]:
    given = CASES[case["inputs_of"]]["inputs"] if "inputs_of" in case else case["inputs"]
    return {name: tensors("inputs")[value["tensor"]] for name, value in given.items()}


def expected(case: dict[str, Any], name: str) -> Tensor:
    return tensors("expected")[case["expected"][name]["tensor"]]


@pytest.mark.parametrize("name", [name for name in CASES if "_loss_" in name])
def test_losses_are_lavis_own(name: str) -> None:
    case, model = CASES[name], model_of(name.split("_")[0])
    prompts, targets = zip(*case["texts"], strict=True)
    images = inputs_of(case)["image_tokens"][:, None]
    with torch.no_grad():
        visual = model.visual_prompt(images, prompts)
        loss = term_of(model, images, prompts, targets)
    torch.testing.assert_close(visual, expected(case, "visual_prompt"), atol=3e-4, rtol=1e-5)
    assert int(loss.counts.sum()) == case["expected"]["n_labels"]
    assert float(loss.total / loss.counts.sum()) == pytest.approx(case["expected"]["loss"], abs=3e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_log_likelihoods_of_candidates_are_lavis_own(kind: str) -> None:
    case, model = CASES[f"{kind}_candidates_segments1"], model_of(kind)
    rules = RANKING_PRESETS["lavis"][KINDS[kind]]
    images = inputs_of(case)["image_tokens"][:, None]
    found = torch.stack(model.rank(images, case["prompts"], [case["candidates"]] * len(case["prompts"]), **rules))
    torch.testing.assert_close(found, expected(case, "log_likelihood_sum"), atol=5e-4, rtol=1e-5)


@pytest.fixture
def generated_ids(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Rows of token ids that are decoded while this is in use, in order."""
    rows: list[list[int]] = []
    for kind in KINDS:
        tokenizer = model_of(kind).llm.prompt_format.tokenizer

        def decode(ids: Any, _own: Any = tokenizer.batch_decode, **options: Any) -> Any:
            rows.extend(ids)
            return _own(ids, **options)

        monkeypatch.setattr(tokenizer, "batch_decode", decode)
    return rows


@pytest.mark.parametrize("name", GENERATED)
def test_answers_are_lavis_own_to_the_token(name: str, generated_ids: list[list[int]]) -> None:
    kind, case = name.split("_")[0], CASES[name]
    model, settings = model_of(kind), dict(case["settings"])
    most, fewest = released_lengths(settings.pop("max_length"), settings.pop("min_length"), KINDS[kind])
    images, prompts = inputs_of(case)["image_tokens"][:, None], CASES[case["inputs_of"]]["prompts"]
    model.generate(
        images,
        prompts,
        max_new_tokens=most,
        min_new_tokens=fewest,
        beam_lengths="transformers_4_33",
        **settings,
    )
    eos = model.llm.prompt_format.eos_id
    wanted = [_until(row[1:], eos) for row in expected(case, "ids").tolist()]
    assert [_until(row, eos) for row in generated_ids] == wanted


def _until(ids: list[int], eos: int) -> list[int]:
    return ids[: ids.index(eos)] if eos in ids else ids


@pytest.mark.slow
def test_beams_are_counted_otherwise_since_then(generated_ids: list[list[int]]) -> None:
    """The same search with the lengths of today's transformers gives other answers to some of the vectors."""
    differing = 0
    for name in GENERATED:
        if CASES[name]["settings"]["num_beams"] == 1 or CASES[name]["settings"]["length_penalty"] == 0:
            continue
        kind, case = name.split("_")[0], CASES[name]
        model, settings = model_of(kind), dict(case["settings"])
        most, fewest = released_lengths(settings.pop("max_length"), settings.pop("min_length"), KINDS[kind])
        del generated_ids[:]
        images, prompts = inputs_of(case)["image_tokens"][:, None], CASES[case["inputs_of"]]["prompts"]
        model.generate(images, prompts, max_new_tokens=most, min_new_tokens=fewest, **settings)
        eos = model.llm.prompt_format.eos_id
        wanted = [_until(row[1:], eos) for row in expected(case, "ids").tolist()]
        differing += [_until(row, eos) for row in generated_ids] != wanted
    assert differing > 0
